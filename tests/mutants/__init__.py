"""Broken implementations, each with the name of the finding that must expose it.

A mutant is registered by `@mutant(checker, finding, cause=…, **options)`: `checker` is
the function of `minivit.check` to call, `finding` the name that must be among what it
reports, and `cause` words that its text must contain where the mistake can be named.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Mutant:
    """Something broken, and what must be said of it."""

    name: str
    make: Callable[[], Any]
    checker: str
    finding: str
    cause: str = ""
    options: dict[str, Any] = field(default_factory=dict)


MUTANTS: list[Mutant] = []


def mutant(
    checker: str, finding: str, cause: str = "", **options: Any
) -> Callable[[Any], Any]:
    """Register a function, or a class that is built without arguments."""

    def register(broken: Any) -> Any:
        make = broken if isinstance(broken, type) else lambda: broken
        MUTANTS.append(Mutant(broken.__name__, make, checker, finding, cause, options))
        return broken

    return register


from . import functions, modules, training, transformers, vits  # noqa: E402, F401
