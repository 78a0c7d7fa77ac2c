"""What all tests share: the same threads, the same seed, the same examples."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

# Everything is repeatable: the examples depend on the test alone, not on the clock.
# `pytest --hypothesis-profile=explore` looks further, with new examples each time.
settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("explore", deadline=None, max_examples=500)
settings.load_profile("ci")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # several workers share the cores


@pytest.fixture(autouse=True)
def seed():
    """Start each test from the same random state, whatever ran before it."""
    torch.manual_seed(0)


def pytest_terminal_summary(terminalreporter):
    """Print how often the checker was right, on mutants and on right ones."""
    rates = {}
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.getreports(outcome):
            # A file that cannot be imported has a report without them.
            for name, kind in getattr(report, "user_properties", ()):
                if name == "checker":
                    counts = rates.setdefault(kind, [0, 0])
                    counts[0] += outcome == "passed"
                    counts[1] += 1
    for kind, (right, total) in sorted(rates.items()):
        terminalreporter.write_line(
            f"minivit.check: {kind}: {right} of {total} ({right / total:.1%})"
        )
