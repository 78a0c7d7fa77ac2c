"""One file to carry off: a model and all that it is made of, beside torch alone.

    python -m minivit.bundle vit > vit_single.py
    python -m minivit.bundle vit --bare > vit_single.py

The files that a module imports are written below each other; what nothing in it uses
stays behind.
"""

import argparse
import ast
import os
import re
import sys
import textwrap
from pathlib import Path

__all__ = ["MODULES", "bundle"]

# What can be carried off: a file of the package, and what it imports of it.
MODULES = (
    "attention",
    "layers",
    "positions",
    "encoder",
    "decoder",
    "transformer",
    "vit",
)
LICENCE = "# From minivit. MIT License, copyright (c) 2026 the minivit authors."
FOLDER = Path(__file__).resolve().parent
WIDTH = 100  # of a line without comments
GLUE = "\N{NO-BREAK SPACE}"


def bundle(module: str, *, bare: bool = False) -> str:
    """Write a file of the package, and what it uses of the others, as one file.

    Args:
        module: one of `MODULES`.
        bare: leave out docstrings, comments and type hints, functions that the
            module's classes do not call, and methods that only others would call.

    Returns:
        Source code that imports torch and Python's own library only.

    Raises:
        ValueError: an unknown module.
    """
    if module not in MODULES:
        raise ValueError(f"module must be one of {', '.join(MODULES)}, got {module!r}")
    files = _files(module)
    trees = [ast.parse(text) for text in files.values()]
    if bare:
        trees = _stripped(trees)
    public = _exports(files[module])
    wanted = {name for name in public if not bare or name[0].isupper()}
    used = _reachable(wanted or set(public), trees)

    blocks = [_imports(trees, used)]
    for tree, text in zip(trees, files.values(), strict=True):
        for node in tree.body:
            if _name(node) in used:
                block = _wrapped(ast.unparse(node)) if bare else _source(text, node)
                blocks.append(block)
    head = LICENCE if bare else f"{LICENCE}\n{_introduction(files[module])}"
    return head + "\n\n" + "\n\n\n".join(blocks) + "\n"


def _files(module: str) -> dict[str, str]:
    """Read a file and all that it imports, the lowest first."""
    text = (FOLDER / f"{module}.py").read_text("utf-8")
    found: dict[str, str] = {}
    for below in re.findall(r"^from \.(\w+) import", text, re.MULTILINE):
        found |= _files(below)
    return found | {module: text}


def _exports(text: str) -> list[str]:
    (names,) = [n for n in ast.parse(text).body if _name(n) == "__all__"]
    return ast.literal_eval(names.value)  # type: ignore[attr-defined]


def _name(node: ast.stmt) -> str | None:
    """What a statement at module level defines."""
    match node:
        case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
            return name
        case (
            ast.Assign(targets=[ast.Name(id=name)])
            | ast.AnnAssign(target=ast.Name(id=name))
        ):
            return name
    return None


def _mentions(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def _reachable(wanted: set[str], trees: list[ast.Module]) -> set[str]:
    """Find what the wanted definitions mention, what that mentions, and so on."""
    defined = {_name(node): node for tree in trees for node in tree.body}
    used: set[str] = set()
    while wanted:
        used |= wanted
        wanted = set().union(*(_mentions(defined[n]) for n in wanted if n in defined))
        wanted -= used
    return used


def _imports(trees: list[ast.Module], used: set[str]) -> str:
    """Every import from outside the package, once, and of names in use only."""
    lines, names = set(), {}
    for node in (node for tree in trees for node in tree.body):
        if isinstance(node, ast.Import):
            alias = node.names[0]
            if (alias.asname or alias.name) in used:
                lines.add(ast.unparse(node))
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            wanted = {alias.name for alias in node.names} & used
            names.setdefault(node.module, set()).update(wanted)
    for module, wanted in names.items():
        if wanted:
            lines.add(f"from {module} import {', '.join(sorted(wanted))}")
    standard, others = [], []  # Python's own library first
    for line in sorted(lines, key=lambda line: (line.startswith("from"), line)):
        (others if "torch" in line else standard).append(line)
    return "\n".join([*standard, "", *others] if standard else others)


def _introduction(text: str) -> str:
    """The module's docstring, without its advice on what to copy."""
    paragraphs = (ast.get_docstring(ast.parse(text)) or "").split("\n\n")
    kept = [part for part in paragraphs if not part.startswith("Copy this")]
    return '"""' + "\n\n".join(kept) + '\n"""'


def _source(text: str, node: ast.stmt) -> str:
    """A definition as it stands in its file, with the comment above it."""
    lines = text.splitlines()
    start = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    while lines[start - 2].startswith("#"):
        start -= 1
    return "\n".join(lines[start - 1 : node.end_lineno])


def _stripped(trees: list[ast.Module]) -> list[ast.Module]:
    """Take off docstrings and hints, and what no code calls of the files below."""
    called = {
        n.attr for t in trees for n in ast.walk(t) if isinstance(n, ast.Attribute)
    }
    called |= {"__init__", "forward"}
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and tree is not trees[-1]:
                node.body = [n for n in node.body if (_name(n) or "forward") in called]
    return [_Strip().visit(tree) for tree in trees]


class _Strip(ast.NodeTransformer):
    """Remove what a program does not need to run."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        return None if isinstance(node.value, ast.Constant) else node

    def visit_arg(self, node: ast.arg) -> ast.arg:
        return ast.arg(node.arg)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.Assign | None:
        if node.value is None:
            return None
        return ast.copy_location(ast.Assign([node.target], node.value), node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.returns = None
        self.generic_visit(node)
        return node


def _wrapped(code: str) -> str:
    """Break long lines after commas, but not inside a text."""
    inside = {
        (node.lineno, column)  # counted in bytes
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Constant | ast.JoinedStr)
        for column in range(node.col_offset, node.end_col_offset or 0)
    }
    lines = []
    for number, line in enumerate(code.splitlines(), start=1):
        glued, column = "", 0
        for c in line:  # spaces at which the line must stay together
            apart = glued.endswith(",") and (number, column) not in inside
            glued += GLUE if c == " " and not apart else c
            column += len(c.encode())
        indent = " " * (len(line) - len(line.lstrip()) + 8)
        lines += textwrap.wrap(
            glued,
            WIDTH,
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        ) or [""]
    code = "\n".join(lines).replace(GLUE, " ")
    return re.sub(r"^(class .*:)\n\n", r"\1\n", code, flags=re.MULTILINE)


def main() -> int:
    """Write the file that the command line asks for to the standard output."""
    parser = argparse.ArgumentParser(
        prog="python -m minivit.bundle", description="Write a model as one file."
    )
    parser.add_argument("module", choices=MODULES, help="what to write")
    parser.add_argument(
        "--bare",
        action="store_true",
        help="the classes and what they call, without docstrings, comments, type hints",
    )
    given = parser.parse_args()
    try:
        # In bytes: what a shell takes for its encoding may lack letters of ours.
        sys.stdout.buffer.write(bundle(given.module, bare=given.bare).encode())
        sys.stdout.flush()
    except OSError as error:  # a full disk, or nobody who reads
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
