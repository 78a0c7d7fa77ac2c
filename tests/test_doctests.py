"""The examples in the docstrings show what really comes out."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import minivit

MODULES = [
    "minivit",
    *(m.name for m in pkgutil.walk_packages(minivit.__path__, "minivit.")),
]
MODULES = [name for name in MODULES if not name.endswith("__main__")]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    result = doctest.testmod(
        importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE
    )
    assert result.failed == 0


def test_no_example_is_left_out():
    """What the files write, and the reference shows, is what is run above."""
    finder, found, written = doctest.DocTestFinder(), 0, 0
    for name in MODULES:
        module = importlib.import_module(name)
        found += sum(len(test.examples) for test in finder.find(module))
        text = Path(module.__file__).read_text("utf-8")
        written += len(re.findall(r"^ *>>> ", text, re.MULTILINE))
    assert found == written >= 10
