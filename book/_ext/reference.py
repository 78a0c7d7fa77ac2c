"""The reference: what docstrings say, in the form that Sphinx lays out.

autodoc finds the public names. Here each docstring goes from the package's own form
(Google's sections, names between single backticks) to reStructuredText:

- a section becomes a field; one that is not known stops the strict build;
- a name between backticks becomes a link if the reference has it, and code if not;
- a module's letters for shapes lead to the glossary, and below them stands which
  chapters teach it, from the README's table;
- the comment above a constant is its description, and the help of a recipe's settings
  that of its parameters.

`names` is a directive: a table of a module's public names, each with its first line.
"""

import dataclasses
import gc
import importlib
import inspect
import re
import sys
import textwrap
from functools import cache
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList
from sphinx.errors import ExtensionError
from sphinx.util import logging

import minivit

ROOT = Path(__file__).resolve().parent.parent.parent
SECTION = re.compile(r"([A-Z]\w+):$")
ENTRY = re.compile(r"(\w+): ")
CHAPTER = re.compile(r"\[([^]]+)\]\(book/(\w+)\.(?:ipynb|md)\)")
log = logging.getLogger(__name__)


@cache
def modules():
    """The modules on the pages of the reference, with their public names."""
    pages = sorted((ROOT / "book/reference").glob("*.md"))
    text = "\n".join(page.read_text("utf-8") for page in pages)
    found = re.findall(r"^\.\. automodule:: (\S+)$", text, re.M)
    return {name: importlib.import_module(name).__all__ for name in found}


@cache
def chapters(module):
    """The (title, page) of the chapters that teach a file, or a folder's files."""
    path = module.replace(".", "/")
    found = {}
    for line in (ROOT / "README.md").read_text("utf-8").splitlines():
        if chapter := CHAPTER.search(line):
            for place in re.findall(r"`(minivit/[\w/]+)(?:\.py)?`", line):
                if f"{place}/".startswith(f"{path}/"):
                    found[chapter.groups()] = place
    return list(found) or (chapters(module.rpartition(".")[0]) if "." in path else [])


def entry(name, module, inside=None):
    """The full name under which the reference has a name, if it has."""
    if inside and inspect.isfunction(vars(inside).get(name)):
        return f"{module}.{inside.__name__}.{name}"
    where, _, short = name.rpartition(".")
    if where == "minivit" and short in minivit.__all__:  # where is it defined?
        same = getattr(minivit, short)
        found = [m for m in modules() if vars(sys.modules[m]).get(short) is same]
    elif where:
        found = [where]
    else:
        found = [m for m in modules() if m != "minivit.check" and name in modules()[m]]
        found = [module] if name in modules().get(module, ()) else found
    (place, *others) = [m for m in found if short in modules().get(m, ())] or [None]
    return f"{place}.{short}" if place and not others else None


def inline(text, link):
    """Prose: code and links between backticks, everything else as it stands."""

    def mark(match):
        code = " ".join(match[1].split())
        target = link(code)
        return f":py:obj:`{code} <{target}>`" if target else f"``{code}``"

    def plain(text):  # quotes and dots as well: Sphinx would make them curly
        return re.sub(r"([\\*_|\".])", r"\\\1", text)

    parts, end = [], 0
    for match in re.finditer(r"`([^`]+)`", text):
        parts += [plain(text[end : match.start()]), mark(match)]
        end = match.end()
        if text[end : end + 1].isalnum():
            parts.append("\\ ")
    return "".join([*parts, plain(text[end:])])


def unlinked(code):
    """Where a link would be one too many."""


def entries(body):
    """Cut a section into (name, text) at lines such as ``name: text``."""
    found = []
    for line in body:
        start = ENTRY.match(line)
        if start:
            found.append((start[1], [line[start.end() :]]))
        elif found:
            found[-1][1].append(line.strip())
    return [(name, " ".join(lines)) for name, lines in found]


def field(section, body, link, where):
    """One section of a docstring as fields."""
    kinds = {"Args": "param", "Raises": "raises"}
    listed = bool(ENTRY.match(body[0]))
    if section in kinds and listed:
        for name, text in entries(body):
            yield f":{kinds[section]} {name}: {inline(text, link)}"
    elif section in ("Returns", "Yields", "Attributes") and listed:
        yield f":{section.lower()}:"
        for name, text in entries(body):
            yield f"  - **{name}** – {inline(text, link)}"
    elif section in ("Returns", "Yields", "Source"):
        yield f":{section.lower()}: {inline(' '.join(map(str.strip, body)), link)}"
    elif section == "Example":
        yield from [":example:", "  .. code-block:: python", ""]
        yield from (f"     {line}" for line in body)
    else:
        log.warning("docstring of %s: what is a section %s:?", where, section)


def to_rst(text, link, where):
    """Turn a docstring into reStructuredText, block by block."""
    lines = text.splitlines()
    out = []
    while lines:
        line = lines.pop(0)
        if not line.strip():
            continue
        indented = line.startswith(" ") or SECTION.match(line)
        inside = re.compile(r" |$" if indented else r".")  # more of this block
        below = []
        while lines and inside.match(lines[0]):
            below.append(lines.pop(0))
        if section := SECTION.match(line):
            body = textwrap.dedent("\n".join(below)).strip("\n").splitlines()
            out += field(section[1], body, link, where)
            if lines and not SECTION.match(lines[0]):
                out.append("")
        elif indented:  # an example, or code
            body = textwrap.dedent("\n".join([line, *below])).strip("\n").splitlines()
            if not body[0].startswith(">>>"):
                shell = body[0].startswith(("python ", "torchrun "))
                out += [f".. code-block:: {'sh' if shell else 'python'}", ""]
                body = [f"   {code}" for code in body]
            out += [*body, ""]
        elif line.startswith(">>>"):
            out += [line, *below, ""]
        else:
            out += [*inline("\n".join([line, *below]), link).splitlines(), ""]
    return out


def comment(module, name):
    """The comment above a constant, here or in the file that it is imported from."""
    source = inspect.getsource(importlib.import_module(module))
    if found := re.search(rf"((?:^#.*\n)+){name}\b", source, re.M):
        return re.sub(r"^# ?", "", found[1], flags=re.M)
    below = re.search(rf"^from \.(\w+) import \([^)]*\b{name}\b", source, re.M)
    return comment(f"{module}.{below[1]}", name) if below else ""


def letters(text):
    """Link the letters in which a module writes shapes to the glossary."""
    head, found, tail = text.partition("Letters for shapes: ")
    alphabet = r"(?<![\w·])([BLSEHDNKVCP]) (?=[a-z])"
    return head + found + re.sub(alphabet, r":term:`\1` ", tail)


def describe(app, what, name, obj, options, lines):
    """Write the reStructuredText of an entry in the place of its docstring."""
    if not name.startswith("minivit"):
        return
    path = name.split(".")
    while ".".join(path) not in modules():
        path.pop()
    module = ".".join(path)
    rest = name.removeprefix(f"{module}.").split(".")
    inside = getattr(importlib.import_module(module), rest[0], None)
    own = set()
    if what in ("function", "method", "class"):
        own = set(inspect.signature(obj).parameters)
    if what == "class" or len(rest) == 1:
        inside = obj if inspect.isclass(obj) else None

    def link(code):
        code = code.removesuffix("()")
        return None if code in own else entry(code, module, inside)

    text = "\n".join(lines)
    if what == "data":
        text = comment(module, rest[0])
    out = to_rst(text, link, name)
    if what == "data" and isinstance(obj, tuple):
        out += [f"- ``{value}``" for value in obj]
    if what == "module":
        out = letters("\n".join(out)).splitlines()
        if taught := chapters(name):
            pages = ", ".join(
                f":doc:`{title} </book/{page}>`" for title, page in taught
            )
            out += ["", f"*Taught in:* {pages}."]
    if what == "class" and dataclasses.is_dataclass(obj):
        settings = [f for f in dataclasses.fields(obj) if "help" in f.metadata]
        fields = [f":param {f.name}: {inline(setting(f), link)}" for f in settings]
        first = next(
            (i for i, line in enumerate(out) if line.startswith(":")), len(out)
        )
        out[first:first] = fields
    lines[:] = [*out, ""]


def setting(field):
    """What a setting means, and what it may be."""
    means = field.metadata
    allowed = means.get("within") or ", ".join(means.get("choices") or ())
    return means["help"] + (f"; {allowed}" if allowed else "")


def choose(app, what, name, obj, skip, options):
    """Show no field of a named tuple by itself: the class describes them."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def first_line(module, name):
    """What a public name is, in a sentence."""
    obj = getattr(importlib.import_module(module), name)
    own = inspect.isclass(obj) or inspect.isroutine(obj)
    text = inspect.getdoc(obj) if own else comment(module, name)
    line = " ".join((text or "").partition("\n\n")[0].split())
    return inline(re.split(r"(?<=\.) (?=[A-Z])", line)[0], unlinked)


class Names(Directive):
    """For each module a table of its public names; for minivit, a line of them."""

    has_content = True

    def run(self):
        rst = []
        for module in self.content:
            if module == "minivit":
                found = (
                    (name, entry(f"minivit.{name}", "")) for name in minivit.__all__
                )
                rst += [", ".join(f":py:obj:`{n} <{full}>`" for n, full in found) + "."]
                continue
            about = importlib.import_module(module).__doc__.partition("\n")[0]
            rst += [
                "",
                ".. list-table::",
                "   :header-rows: 1",
                "   :class: names",
                "",
            ]
            rst += [
                f"   * - :py:mod:`{module}`",
                f"     - {inline(about, unlinked)}",
            ]
            for name in modules()[module]:
                rst.append(f"   * - :py:obj:`{name} <{module}.{name}>`")
                rst.append(f"     - {first_line(module, name)}")
        parent = nodes.container()
        self.state.nested_parse(StringList(rst, source="names"), 0, parent)
        return parent.children


def write_defaults(app, what, name, obj, options, signature, returned):
    """Say what a default is that each call makes anew."""
    if signature and dataclasses.is_dataclass(obj):
        for f in dataclasses.fields(obj):
            if f.default_factory is not dataclasses.MISSING:
                made = repr(f.default_factory())
                signature = signature.replace("<factory>", made, 1)
    return signature, returned


def mend_search(app, error):
    """Let the search find places whose names hold dots, as those of objects do.

    Sphinx looks for "#minivit.vit" as written, which to a browser is a class.
    """
    script = Path(app.outdir, "_static/searchtools.js")
    if error or not script.exists():
        return
    text = script.read_text("utf-8")
    lookup = '`[role="main"] ${anchor}`'
    if text.count(lookup) != 1:
        raise ExtensionError("searchtools.js is another: does it need mending still?")
    mended = '`[role="main"] #${CSS.escape(anchor.slice(1))}`'
    script.write_text(text.replace(lookup, mended), "utf-8")


def setup(app):
    # Torch's objects stay, and so do most nodes of a document: going through them for
    # what is garbage was a quarter of the build.
    gc.freeze()
    gc.set_threshold(100_000, 50, 50)
    app.setup_extension("sphinx.ext.autodoc")
    app.setup_extension("sphinx.ext.viewcode")
    app.connect("autodoc-process-docstring", describe)
    app.connect("autodoc-process-signature", write_defaults)
    app.connect("autodoc-skip-member", choose)
    app.connect("build-finished", mend_search)
    app.add_directive("names", Names)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
