"""The engine: a subject under test, its checks in order, and what each expects."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

from .report import Finding, Found, Report, run


class Subject:
    """Something under test; its checks are the methods marked with `@check`.

    They run in the order in which they are written. A check does something with the
    subject and says what it expects. The first expectation that is not met ends it, as
    does a finding that it returns, where a helper made one.
    """

    name: str
    needs: ClassVar[dict[str, str]] = {}  # names of checks, and the option they need

    def report(self) -> Report:
        """Run all checks that the options allow."""
        checks = [
            (c.name, partial(c.finding, self))
            for c in vars(type(self)).values()
            if isinstance(c, Check)
            and getattr(self, self.needs.get(c.name, "name")) is not None
        ]
        return run(self.name, checks)


@dataclass(frozen=True)
class Check:
    """A method of a subject, and the name that its findings bear."""

    name: str
    method: Callable[[Any], Finding | None]

    def finding(self, subject: Subject) -> Finding | None:
        try:
            return self.method(subject)
        except Found as found:
            return replace(found.finding, check=found.finding.check or self.name)


def check(name: str) -> Callable[[Callable[[Any], Finding | None]], Check]:
    """Mark a method of a subject as a check."""
    return partial(Check, name)


@dataclass(frozen=True)
class Mistake(Finding):
    """A row in a table of known mistakes: what is said of it, and who makes it.

    Attributes:
        fn: makes the mistake; called like the function under test.
    """

    fn: Callable[..., Any]

    def finding(self) -> Finding:
        return Finding(self.check, self.symptom, self.cause, self.look_at)


def expect(
    ok: bool,
    symptom: str,
    cause: str,
    look_at: str,
    *,
    check: str = "",
    known: Iterable[Mistake] = (),
) -> None:
    """End the check with a finding, unless it is as expected.

    Args:
        ok: it is.
        symptom: what was seen instead.
        cause: what that means.
        look_at: where in the code to look.
        check: name of the finding, if it is not that of the check.
        known: mistakes that make what was seen; the first is said in place of the rest.
    """
    if not ok:
        unknown = Finding(check, symptom, cause, look_at)
        raise Found(next((mistake.finding() for mistake in known), unknown))
