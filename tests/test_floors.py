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
    "generation": 0,
    "data": 0,
    "checkpoint": 0,
    "plots": 0,
    "convert": 0,
    "encoder": 1,
    "decoder": 1,
    "images": 1,
    "transformer": 2,
    "vit": 2,
    "inside": 3,
    "bundle": 3,
    "check": 3,
    "transfer": 3,
    "predict": 3,
    "train": 3,
}

# What a file of floor 0 may import at module level besides the standard library.
ALONE = {name: {"torch"} for name, floor in FLOORS.items() if floor == 0}
ALONE["checkpoint"] |= {"safetensors"}

# What nobody should wait for who only wants a model.
HEAVY = {"matplotlib", "torchvision", "sklearn", "timm"}

# A room is a file, or a folder of files with one name and one floor.
ROOMS = {
    path.stem: sorted(path.rglob("*.py")) if path.is_dir() else [path]
    for path in sorted(PACKAGE.iterdir())
    if path.suffix == ".py" or (path / "__init__.py").exists()
}
del ROOMS["__init__"]  # only re-exports

GROUND_FLOOR = [name for name in ROOMS if FLOORS.get(name) == 0]
each_room = pytest.mark.parametrize("room", ROOMS)


def imports(tree, path):
    """Yield (module, inside the package?) for every import below ``tree``."""
    package = path.relative_to(PACKAGE.parent).parts[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = (*above, *(node.module or "").split(".")) if node.module else above
            if module == ("minivit",):  # from . import attention
                targets = [(*module, alias.name) for alias in node.names]
            else:
                targets = [module]
        else:
            continue
        for target in targets:
            own = target[0] == "minivit"
            yield (target[1] if own and len(target) > 1 else target[0]), own


def own_imports(room):
    """The other rooms that a room imports, also those inside functions."""
    found = set()
    for path in ROOMS[room]:
        tree = ast.parse(path.read_text("utf-8"))
        found |= {module for module, own in imports(tree, path) if own}
    return found - {room}


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


def companions(room):
    """All rooms that ``room`` needs beside it, directly or not."""
    direct = own_imports(room)
    return direct.union(*map(companions, direct))


@each_room
def test_imports_point_down(room):
    assert room in FLOORS, f"{room} has no floor: give it one in this file"
    for module in own_imports(room):
        assert module in FLOORS, (
            f"{room} imports {module!r} from minivit, which is no file of it; "
            "name the file that defines it"
        )
        assert FLOORS[module] < FLOORS[room], (
            f"{room} (floor {FLOORS[room]}) imports {module} (floor {FLOORS[module]})"
        )


@each_room
def test_heavy_imports_wait(room):
    """Only functions that draw or load data import the libraries for it."""
    for path in ROOMS[room]:
        tree = module_level(ast.parse(path.read_text("utf-8")))
        found = {module for module, own in imports(tree, path) if not own}
        assert not found & HEAVY, path
        if room in ALONE:
            assert found - set(sys.stdlib_module_names) <= ALONE[room]


@each_room
def test_name_shadows_nothing(room):
    """A copied file must not replace a module that other code imports."""
    assert room not in sys.stdlib_module_names
    assert room not in HEAVY | {"torch", "numpy", "safetensors"}


@each_room
def test_companions_are_named(room):
    """Who copies a file learns from its first lines which others to take along."""
    head = ROOMS[room][0].read_text("utf-8")  # of a folder: its __init__.py
    docstring = ast.get_docstring(ast.parse(head)) or ""
    for name in companions(room):
        assert f"{name}.py" in docstring, f"{room} does not say that it needs {name}.py"


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
