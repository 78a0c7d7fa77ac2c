"""The examples in the docstrings show what really comes out."""

import doctest
import importlib
import pkgutil

import pytest

import minivit

MODULES = [
    "minivit",
    *(f"minivit.{m.name}" for m in pkgutil.iter_modules(minivit.__path__)),
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    result = doctest.testmod(
        importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE
    )
    assert result.failed == 0


def test_there_are_examples():
    """A change of the docstrings' form must not make the test above empty."""
    finder, found = doctest.DocTestFinder(), 0
    for name in MODULES:
        for test in finder.find(importlib.import_module(name)):
            found += len(test.examples)
    assert found >= 3
