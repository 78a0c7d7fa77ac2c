"""Run all tests and chapters as other machines would, and show where they differ.

    python tools/portable.py [--only MACHINE] [--jobs 2] [TEST ...]

`tests/machines.py` lists the machines. Prints a table, a row a file and a column a
machine, then every test or cell that failed somewhere. A machine whose arithmetic is
that of an earlier one is not run twice. What a run gave is kept in _build/portable: a
second call goes on where the first was stopped, unless a file has changed since.
"""

import argparse
import collections
import hashlib
import json
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "_build" / "portable"
WHAT_COUNTS = ("minivit", "tests", "book", "tools", "pyproject.toml", "constraints.txt")

sys.path.insert(0, str(ROOT / "tests"))
from machines import MACHINES, environment, twin  # noqa: E402


def fingerprint() -> str:
    """What the records depend on: every file of the project that a test may read."""
    hasher = hashlib.sha256(sys.version.encode())
    for name in WHAT_COUNTS:
        top = ROOT / name
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.is_file() and "__pycache__" not in path.parts:
                hasher.update(str(path.relative_to(ROOT)).encode())
                hasher.update(path.read_bytes())
    return hasher.hexdigest()


def test(machine: str, tests: list[str], jobs: int) -> dict[str, str]:
    """Run the tests on one machine; each test's outcome: passed, failed or skipped."""
    if MACHINES[machine].get("OMP_NUM_THREADS", "1") != "1":
        jobs = 1  # its threads need the cores
    report = RECORDS / f"{machine}.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-n", str(jobs)]
    command += ["--dist", "loadfile", "--nbval", "--nbval-current-env"]
    command += ["--nbval-cell-timeout", "300", "--junitxml", str(report), *tests]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment(machine),
        stdout=(RECORDS / f"{machine}.log").open("w", encoding="utf-8"),
        stderr=subprocess.STDOUT,
    )
    if done.returncode not in (0, 1) or not report.exists():
        sys.exit(f"{machine}: pytest ended with {done.returncode}; see {RECORDS}")
    outcomes = {}
    for case in ET.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "passed"
        if "skipped" in kinds:
            outcome = "skipped"
        outcomes[f"{case.get('classname')}::{case.get('name')}"] = outcome
    return outcomes


def recorded(machine: str, tests: list[str], jobs: int) -> dict[str, str]:
    """The outcomes of an earlier call, if nothing has changed since, or new ones."""
    record = RECORDS / f"{machine}.json"
    key = [fingerprint(), tests]
    if record.exists():
        known = json.loads(record.read_text("utf-8"))
        if known["key"] == key:
            return known["outcomes"]
    print(f"{machine} ...", end=" ", flush=True)
    start = time.monotonic()
    outcomes = test(machine, tests, jobs)
    print(f"{time.monotonic() - start:.0f} s", flush=True)
    record.write_text(json.dumps({"key": key, "outcomes": outcomes}), "utf-8")
    return outcomes


def table(results: dict[str, dict[str, str]]) -> str:
    """How many passed in each file on each machine; below, what failed anywhere."""
    files: dict[str, dict[str, collections.Counter[str]]] = {}
    for machine, outcomes in results.items():
        for name, outcome in outcomes.items():
            rows = files.setdefault(name.partition("::")[0], {})
            rows.setdefault(machine, collections.Counter())[outcome] += 1
    width = max(map(len, files))
    lines = [" " * width + "".join(f"  {machine:>14}" for machine in results)]
    for file, rows in sorted(files.items()):
        cells = ""
        for machine in results:
            count = rows.get(machine, collections.Counter())
            cell = f"{count['passed']}/{count.total()}"
            cells += f"  {cell + (' FAILED' if count['failed'] else ''):>14}"
        lines.append(f"{file:{width}}{cells}")
    failed = {
        n for o in results.values() for n, outcome in o.items() if outcome == "failed"
    }
    for name in sorted(failed):
        where = [m for m in results if results[m].get(name) == "failed"]
        lines.append(f"FAILED {name}: {', '.join(where)}")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", action="append", choices=MACHINES, metavar="MACHINE")
    parser.add_argument("--jobs", type=int, default=2, help="processes of tests")
    parser.add_argument("tests", nargs="*", default=["tests", "book"])
    given = parser.parse_args(argv)
    RECORDS.mkdir(parents=True, exist_ok=True)
    results = {}
    for machine in given.only or MACHINES:
        same = None if given.only else twin(machine)
        if same == "impossible":
            print(f"{machine}: this processor cannot play it")
        elif same:
            print(f"{machine}: computes as '{same}' does here, bit for bit")
        else:
            results[machine] = recorded(machine, given.tests, given.jobs)
    text = table(results)
    print(text)
    (RECORDS / "table.txt").write_text(text + "\n", "utf-8")
    failed = any("failed" in outcomes.values() for outcomes in results.values())
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
