"""Findings, the report that holds them, and the loop that runs checks."""

from __future__ import annotations

import contextlib
import functools
import html
import os
import random
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ParamSpec

import torch
from torch import Tensor


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        check: short name of what failed, such as "scale" or "causality".
        symptom: what was seen.
        cause: what that means.
        look_at: where in the code to look.
    """

    check: str
    symptom: str
    cause: str
    look_at: str


@dataclass
class Report:
    """What a checker found; true if nothing is wrong.

    Attributes:
        subject: what was checked, such as "attention".
        checks: names of the checks that ran, in order.
        findings: what failed.
    """

    subject: str
    checks: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def __bool__(self) -> bool:
        return not self.findings

    def __str__(self) -> str:
        lines = [self._headline()]
        for f in self.findings:
            lines.append(f"  x {f.check:<12} {f.symptom}: {f.cause}")
            lines.append(f"{'':17}look at: {f.look_at}")
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = "".join(
            "<tr>"
            + "".join(
                f"<td style='text-align:left'>{html.escape(text)}</td>"
                for text in (f.check, f.symptom, f.cause, f.look_at)
            )
            + "</tr>"
            for f in self.findings
        )
        head = "<tr><th>check</th><th>symptom</th><th>cause</th><th>look at</th></tr>"
        table = f"<table>{head}{rows}</table>" if self.findings else ""
        return f"<p><b>{html.escape(self._headline())}</b></p>{table}"

    def _headline(self) -> str:
        if self:
            return f"{self.subject}: all {len(self.checks)} checks passed"
        failed = len({f.check for f in self.findings})
        return f"{self.subject}: {failed} of {len(self.checks)} checks failed"

    def raise_if_failed(self) -> None:
        """Raise an AssertionError with the report as its text; for pytest.

        Raises:
            AssertionError: something is wrong.
        """
        if not self:
            raise AssertionError(str(self))


# Where to look, said alike by several checks.
SCALE_LINE = "the line that computes the scores"
SOFTMAX_LINE = "the line with the softmax"
MASK_LINE = "where the mask meets the scores"

# Where the code of a user does not stand.
NOT_THEIRS = (
    os.path.dirname(__file__) + os.sep,
    os.path.dirname(torch.__file__) + os.sep,
)

Given = ParamSpec("Given")


class Found(Exception):
    """Ends the check that found something."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding)
        self.finding = finding


def checker(check: Callable[Given, Report]) -> Callable[Given, Report]:
    """Make a checker of a function: its verdict depends on what it is given alone.

    Whatever surrounds the call changes nothing, and is left as it was.
    """

    @functools.wraps(check)
    def checked(*args: Given.args, **options: Given.kwargs) -> Report:
        try:
            with usual_surroundings():
                return check(*args, **options)
        except Found as stop:
            return Report(check.__name__, [stop.finding.check], [stop.finding])

    return checked


@contextlib.contextmanager
def usual_surroundings() -> Iterator[None]:
    """Set what a caller may have set otherwise, and the generators; put all back."""
    dtype, python, numpy_random = torch.get_default_dtype(), random.getstate(), _numpy()
    kept = numpy_random and numpy_random.get_state()
    # Not by a context: inside of one, autocast would keep its casts of older weights.
    autocast = torch.is_autocast_enabled("cpu")
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        try:
            torch.set_default_dtype(torch.float32)
            torch.set_autocast_enabled("cpu", False)
            seed_all(0)
            yield
        finally:
            torch.set_default_dtype(dtype)
            torch.set_autocast_enabled("cpu", autocast)
            random.setstate(python)
            if numpy_random:
                numpy_random.set_state(kept)


def seed_all(number: int) -> None:
    """Seed the generators of torch on the CPU, of Python, and of NumPy if it is used.

    `torch.manual_seed` would seed those of the user's accelerators too.
    """
    torch.default_generator.manual_seed(number)
    random.seed(number)
    numpy_random = _numpy()
    if numpy_random:
        numpy_random.seed(number)


def _numpy() -> Any:
    """NumPy's generator; None where nobody has imported it."""
    return getattr(sys.modules.get("numpy"), "random", None)


def run(
    subject: str, checks: Sequence[tuple[str, Callable[[], Finding | None]]]
) -> Report:
    """Run the checks one by one, seeded; an exception is a finding, not a crash."""
    report = Report(subject)
    for name, check in checks:
        if name == "overfit" and report.findings:
            break  # any mistake may fail it
        report.checks.append(name)
        try:
            seed_all(0)
            finding = check()
        except Exception as error:
            finding = from_exception(name, error)
        if finding and finding.check not in {f.check for f in report.findings}:
            report.findings.append(finding)  # one mistake makes one finding
        if finding is not None and name in ("shape", "in place", "repeatable"):
            break  # nothing else can be compared
    return report


def from_exception(name: str, error: Exception) -> Finding:
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [f for f in frames if not f.filename.startswith(NOT_THEIRS)]
    where = f"{theirs[-1].name}, line {theirs[-1].lineno}" if theirs else "the call"
    text = " ".join(str(error).split())
    cause = "the code raises on a valid input"
    if "without overflow" in text:
        cause = "a constant such as -1e9 does not fit into half precision"
    if "unexpected keyword argument" in text:
        cause = "the argument has another name here: say so with mask_name=…"
    if "missing" in text and "positional argument" in text:
        cause = "more inputs are asked for: see the options, or wrap it in a module"
    return Finding(name, f"{type(error).__name__}: {text[:200]}", cause, where)


def max_abs(t: Tensor) -> float:
    """The largest finite magnitude; zero if there is none."""
    finite = t.detach()[t.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def close(a: Tensor, b: Tensor, tol: float = 1e-5) -> bool:
    """Whether two tensors agree, up to `tol` of their size.

    Below a certain size, differences count in absolute terms: what theory says is zero
    comes out as rounding, which is no share of itself. float64 leaves less of it.
    """
    if a.shape != b.shape:
        return False
    least = 1e-3 if b.dtype == torch.float64 else 1.0
    return bool(((a - b).abs() <= tol * max(max_abs(b), least)).all())


def negligible(t: Tensor, beside: float) -> Tensor:
    """Where numbers are as good as zero beside another, so that rounding explains them.

    A rounding error is a share of 1e-16 in float64 and of 1e-7 in float32; a sum that
    cancels leaves some hundreds of them.
    """
    share = 1e-10 if t.dtype == torch.float64 else 1e-6
    return t.abs() <= share * beside


def differs(a: Tensor, b: Tensor) -> Tensor:
    """Where two results differ by more than rounding, for results of one size.

    Parts of a model may compute in float32 even if the model is in float64.
    """
    share = 1e-7 if b.dtype == torch.float64 else 1e-5
    return (a - b).abs() > share * max(max_abs(b), 1e-30)
