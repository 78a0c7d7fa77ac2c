"""The files of the package keep their order, so that each can be copied and read."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "minivit"

# A file imports only from floors below its own. A new file gets a line here.
FLOORS = {
    "attention": 0,
    "positions": 0,
    "layers": 0,
    "generate": 0,
    "data": 0,
    "checkpoint": 0,
    "plots": 0,
    "convert": 0,
    "transformer": 1,
    "train": 1,
    "vit": 2,
    "explain": 3,
    "check": 3,
}

# What a file of floor 0 may import at module level besides the standard library.
ALONE = {name: {"torch"} for name, floor in FLOORS.items() if floor == 0}
ALONE["checkpoint"] |= {"safetensors"}

# What nobody should wait for who only wants a model.
HEAVY = {"matplotlib", "torchvision", "sklearn", "timm"}

FILES = sorted(path for path in PACKAGE.glob("*.py") if path.stem != "__init__")
GROUND_FLOOR = [path.stem for path in FILES if FLOORS.get(path.stem) == 0]
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def imports(tree, file):
    """Yield (module, inside the package?) for every import below ``tree``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top, _, rest = alias.name.partition(".")
                own = top == "minivit"
                yield (rest.split(".")[0] if own else top), own
        elif isinstance(node, ast.ImportFrom):
            assert node.level <= 1, f"{file}: an import from above the package"
            module = node.module or ""
            own = node.level == 1 or module.split(".")[0] == "minivit"
            if own and node.level == 0:
                module = module.partition(".")[2]
            if own and not module:  # from . import attention
                yield from ((alias.name, True) for alias in node.names)
            else:
                yield module.split(".")[0], own


def own_imports(path):
    tree = ast.parse(path.read_text("utf-8"))
    return {module for module, own in imports(tree, path.name) if own}


def module_level(tree):
    """The tree without functions and hints for type checkers: what runs on import."""

    class Strip(ast.NodeTransformer):
        def visit_FunctionDef(self, node):
            return None

        visit_AsyncFunctionDef = visit_FunctionDef

        def visit_If(self, node):
            if ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
                return node.orelse
            return self.generic_visit(node)

    return Strip().visit(tree)


def companions(name):
    """All files that ``name`` needs beside it, directly or not."""
    direct = own_imports(PACKAGE / f"{name}.py")
    return direct.union(*map(companions, direct))


@each_file
def test_imports_point_down(path):
    assert path.stem in FLOORS, f"{path.name} has no floor: add it to {__file__}"
    for module in own_imports(path):
        assert module in FLOORS, (
            f"{path.name} imports {module!r} from minivit, which is no file of it; "
            "name the file that defines it"
        )
        assert FLOORS[module] < FLOORS[path.stem], (
            f"{path.name} (floor {FLOORS[path.stem]}) imports "
            f"{module}.py (floor {FLOORS[module]})"
        )


@each_file
def test_heavy_imports_wait(path):
    """Only functions that draw or load data import the libraries for it."""
    tree = module_level(ast.parse(path.read_text("utf-8")))
    found = {module for module, own in imports(tree, path.name) if not own}
    assert not found & HEAVY
    if path.stem in ALONE:
        assert found - set(sys.stdlib_module_names) <= ALONE[path.stem]


@each_file
def test_name_shadows_nothing(path):
    """A copied file must not replace a module that other code imports."""
    assert path.stem not in sys.stdlib_module_names
    assert path.stem not in HEAVY | {"torch", "numpy", "safetensors"}


@each_file
def test_companions_are_named(path):
    """Who copies a file learns from its first lines which others to take along."""
    docstring = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    for name in companions(path.stem):
        assert f"{name}.py" in docstring, f"{path.name} does not say it needs {name}.py"


RUN_ALONE = """
import importlib, json, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in refused:
            raise ImportError(f"{name} is not at hand")

*refused, = json.loads(sys.argv[2])
sys.meta_path.insert(0, Refuse())
errors = {}
for name in json.loads(sys.argv[1]):
    sys.path.insert(0, name)
    try:
        importlib.import_module(name)
    except Exception as error:
        errors[name] = repr(error)
    finally:
        del sys.path[0]
        sys.modules.pop(name, None)
print(json.dumps(errors))
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Import each file of floor 0 from a folder of its own, without minivit."""
    folder = tmp_path_factory.mktemp("alone")
    for name in GROUND_FLOOR:
        (folder / name).mkdir()
        source = (PACKAGE / f"{name}.py").read_bytes()
        (folder / name / f"{name}.py").write_bytes(source)
    output = subprocess.check_output(
        [sys.executable, "-c", RUN_ALONE]
        + [json.dumps(value) for value in (GROUND_FLOOR, sorted(HEAVY | {"minivit"}))],
        cwd=folder,
        text=True,
    )
    return json.loads(output)


@pytest.mark.parametrize("name", GROUND_FLOOR)
def test_copied_alone(alone, name):
    assert alone.get(name) is None


def test_import_is_light_and_silent():
    code = "import json, sys, minivit; print(json.dumps(list(sys.modules)))"
    run = subprocess.run(
        [sys.executable, "-W", "always::UserWarning:minivit", "-c", code],
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stderr == ""
    assert run.stdout.count("\n") == 1
    assert not HEAVY & set(json.loads(run.stdout))
