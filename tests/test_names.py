"""A name is one thing: a file of the package, or a function or class, never both.

`import minivit.attention as a` must give the file. A function of that name, exported
beside it, would take its place.
"""

import importlib
import pkgutil
import types

import pytest

import minivit

MODULES = [
    found.name
    for found in pkgutil.walk_packages(minivit.__path__, "minivit.")
    if not found.name.endswith("__main__")  # running it is its purpose
]
PACKAGES = [
    name for name in MODULES if hasattr(importlib.import_module(name), "__path__")
]


@pytest.mark.parametrize("name", MODULES)
def test_a_file_is_what_its_name_gives(name):
    namespace = {}
    exec(f"import {name} as m", namespace)
    assert isinstance(namespace["m"], types.ModuleType)
    assert namespace["m"] is importlib.import_module(name)


@pytest.mark.parametrize("package", ["minivit", *PACKAGES])
def test_no_public_name_is_also_a_file(package):
    module = importlib.import_module(package)
    files = {found.name for found in pkgutil.iter_modules(module.__path__)}
    assert not files & set(module.__all__)


def test_there_are_files_and_packages():
    """Changed folders must not make the tests above empty."""
    assert {"minivit.attention", "minivit.transfer", "minivit.train.loop"} <= {*MODULES}
    assert {"minivit.check", "minivit.predict", "minivit.train"} <= {*PACKAGES}
