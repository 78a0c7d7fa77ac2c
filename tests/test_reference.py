"""The reference has every public name once, and glossary and README tell no tales."""

import importlib
import inspect
import pkgutil
import re
import runpy
from pathlib import Path

import nbformat
import pytest
import yaml
from bs4 import BeautifulSoup

import minivit

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "_build" / "html"
README = (ROOT / "README.md").read_text("utf-8")
GLOSSARY = (ROOT / "book/glossary.md").read_text("utf-8")

# Every module with public names, and what they are.
MODULES = {
    module.name: importlib.import_module(module.name)
    for module in pkgutil.walk_packages(minivit.__path__, "minivit.")
    if not module.name.endswith("__main__")
}
PUBLIC = {
    (name, public): getattr(module, public)
    for name, module in {"minivit": minivit, **MODULES}.items()
    for public in getattr(module, "__all__", ())
}

# What the pages ask autodoc for.
PAGES = {page.stem: page.read_text("utf-8") for page in ROOT.glob("book/reference/*")}
ASKED = [
    name
    for text in PAGES.values()
    for name in re.findall(r"^\.\. automodule:: (\S+)$", text, re.M)
]
ENTRIES = {(m, n): obj for (m, n), obj in PUBLIC.items() if m in ASKED}

built = pytest.mark.browser  # needs the built book: make browser


def chapters():
    """The files of the contents that teach something, in order."""
    contents = yaml.safe_load((ROOT / "_toc.yml").read_text("utf-8"))
    parts = [part for part in contents["parts"] if part["caption"] != "Back matter"]
    return [entry["file"] for part in parts for entry in part["chapters"]]


def prose(chapter):
    cells = nbformat.read(ROOT / f"{chapter}.ipynb", as_version=4).cells
    text = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    return " ".join(text.split())


# --- entries ------------------------------------------------------------------------


@pytest.mark.parametrize(("module", "name"), PUBLIC)
def test_each_public_name_has_one_entry(module, name):
    """Under its module or one that hands it on; a new module needs its line."""
    same = [entry for entry, obj in ENTRIES.items() if obj is PUBLIC[module, name]]
    assert len(same) == 1, f"{module}.{name} has the entries {same}: book/reference/"


def test_each_module_is_asked_for_once():
    assert len(ASKED) == len(set(ASKED)) > 0
    assert set(ASKED) <= set(MODULES)


def test_constants_are_asked_for():
    """Autodoc finds classes and functions by itself."""
    constants = {
        f"{module}.{name}"
        for (module, name), obj in ENTRIES.items()
        if not (inspect.isclass(obj) or inspect.isroutine(obj))
    }
    text = "\n".join(PAGES.values())
    assert set(re.findall(r"^\.\. autodata:: (\S+)$", text, re.M)) == constants


def test_each_page_is_on_the_front_page_of_the_reference():
    text = (ROOT / "book/reference.md").read_text("utf-8")
    assert re.findall(r"^## \[.+\]\(reference/(\w+)\.md\)$", text, re.M) == re.findall(
        r"book/reference/(\w+)$", (ROOT / "_toc.yml").read_text("utf-8"), re.M
    )
    listed = re.findall(r"^   (minivit\.\S+)$", text, re.M)
    assert sorted(listed) == sorted(ASKED)


def described(obj):
    """A class's own public methods that say what they do."""
    own = vars(obj).items() if inspect.isclass(obj) else ()
    return {
        name
        for name, value in own
        if (inspect.isfunction(value) or isinstance(value, property))
        and (not name.startswith("_") or name == "__call__")
        and value.__doc__
    }


def site_page(page):
    text = (SITE / f"book/reference/{page}.html").read_text("utf-8")
    return BeautifulSoup(text, "html.parser")


@built
@pytest.mark.parametrize("page", PAGES)
def test_the_built_page_has_its_entries(page):
    """Each name and method has one place, says something, and leads to its code."""
    html = site_page(page)
    modules = re.findall(r"^\.\. automodule:: (\S+)$", PAGES[page], re.M)
    expected = set()
    for (module, name), obj in ENTRIES.items():
        if module in modules:
            expected.add(f"{module}.{name}")
            expected |= {f"{module}.{name}.{method}" for method in described(obj)}
    entries = html.select("dl.py > dt.sig")
    assert sorted(entry["id"] for entry in entries) == sorted(expected)
    for entry in entries:
        what = {*entry.parent["class"]}
        says = entry.find_next_sibling("dd").find("p", recursive=False)
        assert len(says.get_text().split()) > 2, entry["id"]
        code = entry.select(".viewcode-link")
        assert code or what & {"data", "property"}, entry["id"]  # viewcode's limit
        for hidden in ("torch._C", "<factory>", "<object", "~"):
            assert hidden not in entry.get_text(), entry["id"]


@built
@pytest.mark.parametrize("page", PAGES)
def test_the_built_page_has_no_loose_ends(page):
    """Sections have become fields, shapes stay as written, letters lead somewhere."""
    html = site_page(page)
    text = html.select_one("article").get_text()
    for paragraph in html.select("dl.py > dd > p"):
        assert not re.search(r"^[A-Z]\w+:$", paragraph.get_text(), re.M)
    assert "`" not in text
    assert "“" not in text
    for field in html.select("dl.py dl.field-list > dt"):
        known = "Parameters Returns Yields Raises Source Attributes Example"
        assert field.get_text().strip(" :\n") in known.split()
    docstrings = [m.__doc__ for n, m in MODULES.items() if f":: {n}\n" in PAGES[page]]
    found = re.findall(r"Letters for shapes: (.*)", "\n".join(docstrings))
    assert text.count("Letters for shapes: ") == text.count("Letters for") == len(found)
    for letters in found:
        for letter in re.findall(r"\b([BLSEHDNKVCP]) [a-z]", letters):
            target = f"../glossary.html#term-{letter}"
            assert html.select(f'article section > p a[href="{target}"]'), letter


# --- chapter = module = test --------------------------------------------------------


def table():
    """The README's rows: a chapter's file, what it teaches, what tests that."""
    rows = re.findall(
        r"^\| \[[^]]+\]\((book/\w+)\.(?:ipynb|md)\) \| (.+) \| (.+) \|$", README, re.M
    )
    return {chapter: (teaches, tests) for chapter, teaches, tests in rows}


def test_each_chapter_is_in_the_table():
    assert list(table()) == chapters()


@pytest.mark.parametrize("chapter", chapters())
def test_the_table_names_what_exists(chapter):
    teaches, tests = (re.findall(r"`([^`]+)`", cell) for cell in table()[chapter])
    assert teaches
    assert tests
    for path in (*teaches, *tests):
        assert (ROOT / path).exists(), path
        assert (ROOT / path).is_dir() == path.endswith("/"), path
    assert all(path.startswith("tests/test_") for path in tests)


def test_the_table_and_the_reference_agree():
    """What is taught in a chapter says so in the reference."""
    pytest.importorskip("sphinx")
    taught = runpy.run_path(str(ROOT / "book/_ext/reference.py"))["chapters"]
    found = {Path(page).stem for name in ASKED for _, page in taught(name)}
    assert found == {Path(chapter).stem for chapter in chapters()} - {"benchmarks"}


# --- glossary -----------------------------------------------------------------------

# An entry: one or more terms, and below them what they mean and the chapter.
GLOSSED = [
    entry.strip()
    for block in re.findall(r"```\{glossary\}\n(.*?)```", GLOSSARY, re.S)
    for entry in block.split("\n\n")
    if not entry.startswith(":")
]
WRITTEN = [
    (term, re.findall(r"\[[^]]+\]\((\w+)\.ipynb\)", entry))
    for entry in GLOSSED
    for term in re.findall(r"^\S.*$", entry, re.M)
]
TERMS = {term: links[-1] for term, links in WRITTEN if links}
LETTERS = {term for term in TERMS if len(term) == 1}


def test_each_term_names_one_chapter():
    for entry in GLOSSED:
        assert re.fullmatch(r"(\S.*\n)+(  .*\n)*  .*\.ipynb\)", entry), entry
    assert all(len(links) == 1 for _, links in WRITTEN)
    assert len(WRITTEN) == len({term.lower() for term, _ in WRITTEN})
    assert GLOSSARY.count(".ipynb)") == len(GLOSSED)


def test_the_alphabet_is_complete():
    contributing = " ".join((ROOT / "CONTRIBUTING.md").read_text("utf-8").split())
    alphabet = re.search(r"One alphabet everywhere: (.*?)\.", contributing)[1]
    assert set(re.findall(r"\b([A-Z]) ", alphabet)) == LETTERS
    index = (ROOT / "book/index.md").read_text("utf-8")
    assert set(re.findall(r"\{term\}`([A-Z])`", index)) == LETTERS


# Terms whose chapter says the word otherwise.
SAID = {
    "key": "**key**",
    "head": "**head**",
    "value": "**value**",
    "memory": "**memory**",
    "recipe": "**recipe**",
    "top-k": "**top-$k$**",
    "top-p": "**top-$p$**",
    "nucleus sampling": "(nucleus)",
    "tied weights": "**tied** weights",
    "attention": "Attention: a lookup that can be learned",
    "rotary positions": "Rotary positions",
}


@pytest.mark.parametrize("term", sorted(TERMS.keys() - LETTERS))
def test_the_chapter_introduces_the_term(term):
    """It has the word, and no chapter before it sets it in bold."""
    chapter = f"book/{TERMS[term]}"
    said = SAID.get(term, term)
    assert said.lower() in prose(chapter).lower()
    for earlier in chapters()[: chapters().index(chapter)]:
        bold = re.findall(r"\*\*(.+?)\*\*", prose(earlier))
        assert term.lower() not in map(str.lower, bold), earlier


@pytest.mark.parametrize("letter", sorted(LETTERS))
def test_the_chapter_uses_the_letter(letter):
    text = prose(f"book/{TERMS[letter]}")
    assert re.search(rf"\$[^$]*\b{letter}\b[^$]*\$|\(.*\b{letter}\b.*\)", text)
