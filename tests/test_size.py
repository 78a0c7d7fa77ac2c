"""The code that the book prints stays short, and says more than it refuses."""

import ast
import io
import tokenize
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "minivit"
VIT = ["attention.py", "layers.py", "encoder.py", "vit.py"]


def code_lines(source):
    """Numbers of the lines that hold code: no docstring, comment or empty line."""
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT)
    skipped += (tokenize.DEDENT, tokenize.ENDMARKER)
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skipped:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            lines.difference_update(range(node.lineno, node.end_lineno + 1))
    return lines


def functions():
    """(name, lines of code) of every function; what it defines inside counts too."""
    for path in sorted(PACKAGE.rglob("*.py")):
        source = path.read_text("utf-8")
        lines = code_lines(source)
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                own = lines & set(range(node.lineno, node.end_lineno + 1))
                yield f"{path.relative_to(PACKAGE)}:{node.name}", len(own)


def refusals(tree):
    """Line numbers of what only refuses: an `if` that raises, helpers for it."""
    found = set()
    for node in ast.walk(tree):
        refuses = isinstance(node, ast.If) and isinstance(node.body[-1], ast.Raise)
        helper = isinstance(node, ast.FunctionDef) and node.name.startswith("_check")
        if refuses:
            found.update(range(node.lineno, node.body[-1].end_lineno + 1))
        elif helper or (
            isinstance(node, ast.ExceptHandler) and isinstance(node.body[-1], ast.Raise)
        ):
            found.update(range(node.lineno, node.end_lineno + 1))
        elif isinstance(node, ast.Call) and "_check" in ast.unparse(node.func):
            found.add(node.lineno)
    return found


def test_functions_are_short():
    sizes = dict(functions())
    assert len(sizes) > 300
    long = {name: size for name, size in sizes.items() if size > 30}
    assert max(sizes.values()) <= 60, {n: s for n, s in long.items() if s > 60}
    assert len(long) <= 20, long


def test_a_vit_is_more_model_than_validation():
    code = refused = 0
    for name in VIT:
        source = (PACKAGE / name).read_text("utf-8")
        lines = code_lines(source)
        code += len(lines)
        refused += len(lines & refusals(ast.parse(source)))
    assert 0 < refused <= 0.15 * code, (refused, code)
