"""The book as a piece of work: every chapter is complete, executed and in order.

What the chapters compute is compared by nbval; here is what nbval does not see. It
skips a cell without an execution count, and does not care how a chapter is made.
"""

import ast
import re
import runpy
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import nbformat
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
CHAPTERS = sorted(ROOT.glob("book/*.ipynb"))

# What Colab has; torchvision brings pillow.
COLAB = {*runpy.run_path(str(ROOT / "tools/install.py"))["COLAB"], "pillow"}
COLAB_CELL = f"""\
import sys

if "google.colab" in sys.modules:  # on your own machine: see the README
    %pip install -q git+{PROJECT["urls"]["Repository"]}"""

# Why the printed text of a cell is not compared. How many there are may only fall.
VARIES = {"varies-clock": 11, "varies-rounding": 29}
TAGS = {
    *VARIES,
    "hide-cell",
    "hide-input",
    "hide-output",
    "nbval-ignore-output",
    "remove-cell",
    "remove-input",
    "remove-output",
}

# Cells that are not compared and whose claim nobody asserts: their first lines.
CLAIMS_NOTHING = {
    "days = small / (mfu * peak) / 86400": "divides by a speed that is asserted before",
}

RUN_TIME = re.compile(r"\babout\s+\**(\d+)\s*(?:s|seconds)\b[^.]*two CPU cores")
DIRECTIVE = re.compile(
    r"^(?:`{3,}|:{3,})\{(exercise|solution)(?:-start)?\} *(.*)$", re.M
)
MACHINE_PATH = re.compile(
    r"(?<![\w./])/(?:home|root|tmp|work|Users|private|opt|mnt|var)/\w|\b[A-Z]:\\\w"
)


class Chapter:
    """A notebook, and views of it that the tests need."""

    def __init__(self, path):
        self.path = path
        self.name = path.stem
        self.notebook = nbformat.read(path, as_version=4)
        self.cells = self.notebook.cells
        self.code = [cell for cell in self.cells if cell.cell_type == "code"]
        self.prose = "\n\n".join(
            cell.source for cell in self.cells if cell.cell_type == "markdown"
        )

    def outputs(self):
        for cell in self.code:
            for output in cell.outputs:
                yield cell, output


def shown(cell):
    """Name a cell in an error message."""
    return cell.source.strip().partition("\n")[0][:60]


@pytest.fixture(params=CHAPTERS, ids=lambda path: path.stem, scope="module")
def chapter(request):
    return Chapter(request.param)


@pytest.fixture(scope="module")
def toc():
    contents = yaml.safe_load((ROOT / "_toc.yml").read_text("utf-8"))
    chapters = [entry for part in contents["parts"] for entry in part["chapters"]]
    pages = [page for entry in chapters for page in (entry, *entry.get("sections", ()))]
    return [page["file"] for page in pages]


def test_there_are_chapters():
    assert CHAPTERS


def test_contents_name_what_exists(toc):
    for file in toc:
        suffixes = [".md", ".ipynb"]
        assert any((ROOT / f"{file}{suffix}").exists() for suffix in suffixes), file
    assert len(set(toc)) == len(toc)


def test_no_page_is_forgotten(toc):
    """A page outside the contents would not be built."""
    pages = {
        page.relative_to(ROOT).with_suffix("") for page in ROOT.glob("book/**/*.md")
    }
    logs = {page for page in pages if page.parts[1] == "logs"}
    assert {page.as_posix() for page in pages - logs} <= {*toc, "book/index"}


def test_in_contents(chapter, toc):
    assert f"book/{chapter.name}" in toc


def test_valid(chapter):
    nbformat.validate(chapter.notebook)
    assert chapter.notebook.metadata.kernelspec.name == "python3"
    ids = [cell.id for cell in chapter.cells]
    assert len(set(ids)) == len(ids)


def test_executed_in_order(chapter):
    assert not [cell for cell in chapter.code if not cell.source.strip()], "empty cell"
    counts = [cell.execution_count for cell in chapter.code]
    assert counts == list(range(1, len(counts) + 1)), "run it again: make execute"


def test_no_errors_stored(chapter):
    for cell, output in chapter.outputs():
        assert output.output_type != "error", shown(cell)
        assert output.get("name") != "stderr", f"{shown(cell)}: {output.text[:200]}"


def test_nothing_escapes_comparison(chapter):
    """Tags are known ones; no cell is skipped by nbval."""
    for cell in chapter.code:
        assert set(cell.metadata.get("tags", [])) <= TAGS, shown(cell)
        assert "NBVAL" not in cell.source, f"use a tag instead: {shown(cell)}"


def test_what_is_not_compared_says_why(chapter):
    for cell in chapter.code:
        tags = cell.metadata.get("tags", [])
        ignored = tags.count("nbval-ignore-output")
        assert len(VARIES.keys() & set(tags)) == ignored, shown(cell)
        text = any(o.get("text") or len(o.data) == 1 for o in cell.outputs)
        assert text or not ignored, f"a figure is not compared anyway: {shown(cell)}"


def asserts(tree):
    return any(
        isinstance(node, ast.Assert)
        or (isinstance(node, ast.Attribute) and node.attr == "assert_close")
        for node in ast.walk(tree)
    )


def names(tree, context):
    """The variables that are set (ast.Store) or read (ast.Load)."""
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    return {node.id for node in found if isinstance(node.ctx, context)}


def test_what_is_not_compared_is_asserted(chapter):
    """In the cell, or in one of the next two, which reads what the cell has set."""
    for i, cell in enumerate(chapter.code):
        ignored = "nbval-ignore-output" in cell.metadata.get("tags", [])
        if not ignored or cell.source.partition("\n")[0] in CLAIMS_NOTHING:
            continue
        this, *others = (ast.parse(c.source) for c in chapter.code[i : i + 3])
        assert asserts(this) or any(
            asserts(other) and names(this, ast.Store) & names(other, ast.Load)
            for other in others
        ), f"its claim is not asserted: {shown(cell)}"


def test_the_front_page_says_how_much_is_not_compared():
    """Who mends a cell lowers the number, here and there; nobody raises it."""
    cells = [cell for path in CHAPTERS for cell in Chapter(path).code]
    tags = [tag for cell in cells for tag in cell.metadata.get("tags", [])]
    assert {tag: tags.count(tag) for tag in VARIES} == VARIES
    index = " ".join((ROOT / "book/index.md").read_text("utf-8").split())
    clock, rounding = VARIES.values()
    assert (
        f"Of {len(cells)} cells of code, {clock + rounding} are left out of this "
        f"comparison: {clock} print what hangs on the clock or on memory, {rounding} "
        f"digits that rounding reaches"
    ) in index


def test_no_semicolon_at_the_end(chapter):
    """It hides an output when a reader runs the cell, but not when nbval does."""
    for cell in chapter.code:
        assert not re.search(r";\s*(#.*)?$", cell.source.rstrip()), shown(cell)


def test_no_machine_path(chapter):
    for cell in chapter.cells:
        texts = [cell.source]
        for output in cell.get("outputs", []):
            texts.append(output.get("text", ""))
            data = output.get("data", {})
            texts += [data.get("text/plain", ""), data.get("text/html", "")]
        for text in texts:
            assert not MACHINE_PATH.search(text), MACHINE_PATH.search(text)


def test_lines_fit_the_page(chapter):
    for cell in chapter.code:
        for line in cell.source.splitlines():
            assert len(line) <= 79, line


def test_figures_have_alt_text(chapter):
    for cell, output in chapter.outputs():
        if any(kind.startswith("image/") for kind in output.get("data", {})):
            alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
            assert len(alt) >= 20, f"describe the figure: {shown(cell)}"


def test_no_widgets(chapter):
    """A widget would load its script from elsewhere, and progress bars vary."""
    for cell, output in chapter.outputs():
        assert not any("widget" in kind for kind in output.get("data", {})), shown(cell)


def test_title_cell(chapter):
    title = chapter.cells[0]
    assert title.cell_type == "markdown"
    assert re.match(r"# \S", title.source)
    assert "After this chapter you can" in title.source
    assert RUN_TIME.search(title.source), "Runs in about ... s on two CPU cores"
    assert int(RUN_TIME.search(title.source)[1]) <= 60


def test_one_title(chapter):
    """A second first-level heading would become a page of its own in the contents."""
    prose = re.sub(r"^(```+|:::+).*?^\1", "", chapter.prose, flags=re.M | re.S)
    assert len(re.findall(r"^# \S", prose, re.M)) == 1


@pytest.fixture(scope="module")
def distributions():
    """What to install for a module: {"sklearn": ["scikit-learn"], ...}."""
    return packages_distributions()


def test_colab_cell(chapter, distributions):
    """The same everywhere, except for the names of what this chapter needs besides."""
    first, *others = chapter.code
    source = "\n".join(cell.source for cell in others)
    imported = set(re.findall(r"^ *(?:import|from) +(\w+)", source, re.M))
    others = imported - sys.stdlib_module_names - {"minivit"}
    wanted = {distributions[module][0].lower() for module in others} - COLAB
    assert first.source == " ".join([COLAB_CELL, *sorted(wanted)])
    assert "remove-output" in first.metadata.get("tags", [])
    assert not first.outputs


def test_imports_the_package(chapter):
    source = "\n".join(cell.source for cell in chapter.code)
    assert re.search(r"^(?:import minivit|from minivit[.\w]* import)", source, re.M)


def test_asserts(chapter):
    """A chapter proves what it says."""
    source = "\n".join(cell.source for cell in chapter.code)
    assert re.search(r"^\s*(?:assert\b|torch\.testing\.assert_close\()", source, re.M)


def test_sections(chapter):
    assert re.search(r"^## Summary\b", chapter.prose, re.M)
    assert re.search(r"^## Sources\b", chapter.prose, re.M)
    assert "{cite" in chapter.prose.partition("## Sources")[2]


def test_exercises_have_solutions(chapter):
    exercises, solutions = [], []
    for match in DIRECTIVE.finditer(chapter.prose):
        kind, argument = match.groups()
        options = chapter.prose[match.end() :].split("\n\n")[0]
        if kind == "solution":
            solutions.append(argument.strip())
            assert ":class: dropdown" in options, f"{argument} is not hidden"
        else:
            label = re.search(r":label: *(\S+)", options)
            assert label, f"an exercise has no label: {argument}"
            exercises.append(label[1])
    assert len(exercises) >= 3
    assert sorted(solutions) == sorted(exercises)
    assert len(set(exercises)) == len(exercises)
    for label in exercises:
        assert label.startswith(f"{chapter.name}-ex-")
    for kind in ("exercise", "solution"):
        starts = len(re.findall(rf"\{{{kind}-start\}}", chapter.prose))
        assert starts == len(re.findall(rf"\{{{kind}-end\}}", chapter.prose))


def test_on_the_map(chapter):
    """The front page links the chapter, with the run time that its title states."""
    index = (ROOT / "book/index.md").read_text("utf-8")
    row = re.search(rf"^\|.*\]\({chapter.name}\.ipynb\).*$", index, re.M)
    assert row, f"book/index.md has no row for {chapter.name}"
    seconds = RUN_TIME.search(chapter.cells[0].source)[1]
    assert re.search(rf"\b{seconds} s\b", row[0]), f"{row[0]} does not say {seconds} s"


def test_works_are_cited_by_key():
    """Every entry of the bibliography is well-formed: a key once, a title, a year."""
    text = (ROOT / "book/references.bib").read_text("utf-8")
    keys = re.findall(r"^@\w+\{([^,\s]+),", text, re.M)
    assert len(keys) > 20
    assert len(set(keys)) == len(keys)
    for entry in re.split(r"^(?=@)", text, flags=re.M)[1:]:
        for field in ("title", "author", "year"):
            assert re.search(rf"^\s*{field}\s*=\s*\{{", entry, re.M), entry[:80]
