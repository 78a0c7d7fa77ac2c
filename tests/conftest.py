"""What all tests share: the same threads, the same seed, the same examples."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

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

ROOT = Path(__file__).resolve().parent.parent

if "PYTEST_XDIST_WORKER" in os.environ:
    # Several workers share the cores, unless it is said otherwise.
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


@pytest.fixture(autouse=True)
def seed():
    """Start each test from the same random state, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """The package as pip builds it from the files that lie here now; no network."""
    source, target = (tmp_path_factory.mktemp(name) for name in ("source", "wheel"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in ("minivit", "book/experiments", "book/logs"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, source / folder, ignore=ignore)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index"]
    command += ["--no-deps", "--no-build-isolation", "--wheel-dir", target, source]
    subprocess.run(command, check=True)
    (built,) = target.glob("*.whl")
    return built


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
