"""Run all tests and chapters as other machines would, and show where they differ.

    python tools/portable.py [--only MACHINE] [--all] [TEST ...]

`tests/machines.py` lists the machines. Prints a table, a row a file and a column a
machine, then every test or cell that failed somewhere or is missing on one of the
machines, and how many cells are not compared; every single outcome goes into
_build/portable/outcomes.tsv. A machine on which a probe computes the same bits as on an
earlier one is left out, unless `--all` asks for it. What a whole run gave is kept: a
second call goes on where the first was stopped, unless a file of the project or an
installed version has changed since.
"""

import argparse
import collections
import fcntl
import hashlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "_build" / "portable"

sys.path.insert(0, str(ROOT / "tests"))
import machines  # noqa: E402

Outcomes = dict[str, str]  # of each test: passed, failed or skipped
SOURCES = (  # what tests and chapters read; a log that somebody writes here is none
    *("Makefile", "constraints.*", "*.cff", "*.md", "*.toml", "*.yml"),
    *(".github/**/*", "book/**/*", "minivit/**/*", "tests/**/*", "tools/**/*"),
)


def fingerprint() -> str:
    """What the records depend on: the files of the project, and what is installed."""
    hasher = hashlib.sha256(sys.version.encode())
    for path in sorted({path for pattern in SOURCES for path in ROOT.glob(pattern)}):
        made = path.parent.name in ("__pycache__", ".ipynb_checkpoints")
        if path.is_file() and not made:
            hasher.update(str(path).encode() + path.read_bytes())
    found = importlib.metadata.distributions()
    hasher.update(str(sorted(f"{one.name} {one.version}" for one in found)).encode())
    return hasher.hexdigest()


def exit_if_changed(sources: str) -> None:
    if fingerprint() != sources:
        sys.exit("A file of the project has changed during the run: start it again.")


def read(report: Path) -> Outcomes:
    """The outcomes in a report of pytest; none if it was never finished."""
    try:
        cases = list(ET.parse(report).iter("testcase"))
    except (FileNotFoundError, ET.ParseError):
        return {}
    outcomes = {}
    for case in cases:
        # A file that cannot be imported has no classname.
        name = "::".join(filter(None, (case.get("classname"), case.get("name"))))
        kinds = {child.tag for child in case}
        # A skipped test can still fail when it is taken down, in a case of its own too.
        if kinds & {"failure", "error"}:
            outcomes[name] = "failed"
        elif outcomes.get(name) != "failed":
            outcomes[name] = "skipped" if "skipped" in kinds else "passed"
    return outcomes


def outcomes_on(machine: str, tests: list[str]) -> Outcomes:
    """Run `make test` on one machine, to its end."""
    report, log = RECORDS / f"{machine}.xml", RECORDS / f"{machine}.log"
    report.unlink(missing_ok=True)
    variables = machines.environment(machine)
    # Where tests have threads of their own, they need the cores.
    jobs = 2 if variables["OMP_NUM_THREADS"] == "1" else 1
    command = ["make", "test", f"TESTS={' '.join(tests)}", f"JOBS={jobs}"]
    options = f'{os.environ.get("PYTEST_ADDOPTS", "")} --junitxml="{report}"'
    variables["PYTEST_ADDOPTS"] = options.strip()
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdout=file, stderr=subprocess.STDOUT
        )
        try:
            status = process.wait()
        finally:
            process.terminate()  # if it has not ended; make passes it on
            process.wait()
    outcomes = read(report)
    if not outcomes or (status != 0 and "failed" not in outcomes.values()):
        sys.exit(
            f"{machine}: `make test` did not come to its end: exit status {status}, "
            f"{len(outcomes)} outcomes, none of them a failure. "
            f"See {log.relative_to(ROOT)}"
        )
    return outcomes


def recorded(machine: str, tests: list[str], sources: str) -> Outcomes:
    """The outcomes of an earlier call, if nothing has changed since, or new ones."""
    record = RECORDS / f"{machine}.json"
    key = [sources, tests, os.environ.get("PYTEST_ADDOPTS", "")]
    try:
        known, outcomes = json.loads(record.read_text("utf-8"))
    except (FileNotFoundError, ValueError, TypeError):  # none, or not a whole one
        known = None
    if known == key:
        return outcomes
    print(f"{machine} ...", end=" ", flush=True)
    start = time.monotonic()
    outcomes = outcomes_on(machine, tests)
    print(f"{time.monotonic() - start:.0f} s", flush=True)
    exit_if_changed(sources)
    partial = record.with_suffix(".partial")
    partial.write_text(json.dumps([key, outcomes]), "utf-8")
    partial.replace(record)
    return outcomes


def names(results: dict[str, Outcomes]) -> list[str]:
    """All tests and cells."""
    return sorted({name for outcomes in results.values() for name in outcomes})


def table(results: dict[str, Outcomes]) -> str:
    """How many passed, were skipped and failed in each file on each machine."""
    counts: collections.Counter[tuple[str, str, str]] = collections.Counter(
        (name.partition("::")[0], machine, outcome)
        for machine, outcomes in results.items()
        for name, outcome in outcomes.items()
    )
    lines = [["", *results]]
    for file in sorted({file for file, _, _ in counts}):
        lines.append([file])
        for machine in results:
            cell = str(counts[file, machine, "passed"])
            for outcome, word in (("skipped", "skipped"), ("failed", "FAILED")):
                if count := counts[file, machine, outcome]:
                    cell += f", {count} {word}"
            lines[-1].append(cell)
    first, *others = (max(map(len, column)) for column in zip(*lines))
    return "\n".join(
        f"{file:{first}}" + "".join(f"  {c:>{w}}" for c, w in zip(cells, others))
        for file, *cells in lines
    )


def problems(results: dict[str, Outcomes]) -> list[str]:
    """A line for each test or cell that failed, or was not run, on some machine."""
    lines = []
    for name in names(results):
        for problem, outcome in (("FAILED", "failed"), ("MISSING", None)):
            if where := [m for m in results if results[m].get(name) == outcome]:
                lines.append(f"{problem} {name}: {', '.join(where)}")
    return lines


def not_compared() -> str:
    """How many cells carry a tag that says why nobody compares what they print."""
    tags = collections.Counter(
        tag
        for path in ROOT.glob("book/*.ipynb")
        for cell in json.loads(path.read_text("utf-8"))["cells"]
        for tag in cell["metadata"].get("tags", [])
        if tag.startswith("varies-")
    )
    return "Cells not compared: " + ", ".join(
        f"{n} {tag}" for tag, n in sorted(tags.items())
    )


def every_outcome(results: dict[str, Outcomes]) -> str:
    """A line a test or cell, a column a machine."""
    lines = [["", *results]]
    lines += [[n, *(o.get(n, "") for o in results.values())] for n in names(results)]
    return "".join("\t".join(line) + "\n" for line in lines)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--only", action="append", choices=machines.MACHINES, metavar="MACHINE"
    )
    parser.add_argument("--all", action="store_true", help="also what computes alike")
    parser.add_argument("tests", nargs="*", default=["tests", "book"])
    given = parser.parse_args(argv)
    for test in given.tests:
        if not (ROOT / test.partition("::")[0]).exists():
            sys.exit(f"There is no {test}")

    RECORDS.mkdir(parents=True, exist_ok=True)
    lock = (RECORDS / "lock").open("w", encoding="utf-8")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends
    except BlockingIOError:
        sys.exit("Another `make portable` is under way in this folder.")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit("Stopped. The next call goes on."))

    if machines.arithmetic("other updates") == machines.arithmetic("as it is"):
        sys.exit("other updates: tests/elsewhere/sitecustomize.py has no effect")

    sources, results = fingerprint(), {}
    for machine in given.only or machines.MACHINES:
        if not machines.can_be_played(machine):
            print(f"{machine}: this processor lacks the instructions")
        elif not (given.only or given.all) and (same := machines.twin(machine)):
            print(f"{machine}: left out, a probe computes the same bits as on {same!r}")
        else:
            results[machine] = recorded(machine, given.tests, sources)
    if not results:
        return 1
    exit_if_changed(sources)
    found = problems(results)
    print(table(results), *found, not_compared(), sep="\n")
    (RECORDS / "outcomes.tsv").write_text(every_outcome(results), "utf-8")
    return 1 if found else 0


if __name__ == "__main__":
    # Makes below this one begin afresh.
    for name in ("MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS"):
        os.environ.pop(name, None)
    sys.exit(main(sys.argv[1:]))
