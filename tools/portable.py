"""Run all tests and chapters as other machines would, and show where they differ.

    python tools/portable.py [--only MACHINE] [--all] [TEST ...]

`tests/machines.py` lists the machines. Prints a table, a row a file and a column a
machine, then every test or cell that failed somewhere, and how many cells are not
compared; every single outcome goes into _build/portable/outcomes.tsv. A machine on
which a probe computes the same bits as on an earlier one is left out, unless `--all`
asks for it. What a run gave is kept: a second call goes on where the first was stopped,
unless a file of the project or an installed version has changed since.
"""

import argparse
import collections
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "_build" / "portable"

sys.path.insert(0, str(ROOT / "tests"))
from machines import MACHINES, can_be_played, environment, twin  # noqa: E402

Outcomes = dict[str, str]  # of each test: passed, failed or skipped


def fingerprint() -> str:
    """What the records depend on: the files of the project, and what is installed."""
    list_files = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.check_output(list_files, cwd=ROOT, text=True).split("\0")
    hasher = hashlib.sha256(sys.version.encode())
    for name in filter(None, sorted(names)):
        if (ROOT / name).is_file():
            hasher.update(name.encode() + (ROOT / name).read_bytes())
    for one in sorted(importlib.metadata.distributions(), key=lambda d: d.name):
        hasher.update(f"{one.name} {one.version}".encode())
    return hasher.hexdigest()


def outcomes_on(machine: str, tests: list[str]) -> Outcomes:
    """Run `make test` on one machine."""
    report, log = RECORDS / f"{machine}.xml", RECORDS / f"{machine}.log"
    report.unlink(missing_ok=True)
    variables = environment(machine)
    # Where tests have threads of their own, they need the cores.
    jobs = 2 if variables["OMP_NUM_THREADS"] == "1" else 1
    command = ["make", "test", f"TESTS={' '.join(tests)}", f"JOBS={jobs}"]
    with log.open("w", encoding="utf-8") as file:
        subprocess.run(
            command,
            cwd=ROOT,
            env=variables | {"PYTEST_ADDOPTS": f'--junitxml="{report}"'},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    if not report.exists():
        sys.exit(f"{machine}: no report was written; see {log.relative_to(ROOT)}")
    outcomes = {}
    for case in ET.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "passed"
        if "skipped" in kinds:
            outcome = "skipped"
        outcomes[f"{case.get('classname')}::{case.get('name')}"] = outcome
    return outcomes


def recorded(machine: str, tests: list[str]) -> Outcomes:
    """The outcomes of an earlier call, if nothing has changed since, or new ones."""
    record = RECORDS / f"{machine}.json"
    key = [fingerprint(), tests]
    if record.exists():
        known = json.loads(record.read_text("utf-8"))
        if known["key"] == key:
            return known["outcomes"]
    print(f"{machine} ...", end=" ", flush=True)
    start = time.monotonic()
    outcomes = outcomes_on(machine, tests)
    print(f"{time.monotonic() - start:.0f} s", flush=True)
    record.write_text(json.dumps({"key": key, "outcomes": outcomes}), "utf-8")
    return outcomes


def table(results: dict[str, Outcomes]) -> str:
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
            failed = f" {count['failed']} FAILED" if count["failed"] else ""
            cells += f"  {str(count['passed']) + failed:>14}"
        lines.append(f"{file:{width}}{cells}")
    for name in sorted({name for outcomes in results.values() for name in outcomes}):
        where = [m for m in results if results[m].get(name) == "failed"]
        if where:
            lines.append(f"FAILED {name}: {', '.join(where)}")
    return "\n".join(lines)


def not_compared() -> str:
    """How many cells carry a tag that says why nobody compares what they print."""
    tags = collections.Counter(
        tag
        for path in ROOT.glob("book/*.ipynb")
        for cell in json.loads(path.read_text("utf-8"))["cells"]
        for tag in cell["metadata"].get("tags", [])
        if tag.startswith("varies-")
    )
    return "Cells not compared: " + ", ".join(f"{n} {tag}" for tag, n in tags.items())


def every_outcome(results: dict[str, Outcomes]) -> str:
    """A line a test or cell, a column a machine."""
    names = sorted({name for outcomes in results.values() for name in outcomes})
    lines = [["", *results]]
    lines += [[n, *(o.get(n, "") for o in results.values())] for n in names]
    return "".join("\t".join(line) + "\n" for line in lines)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", action="append", choices=MACHINES, metavar="MACHINE")
    parser.add_argument("--all", action="store_true", help="also what computes alike")
    parser.add_argument("tests", nargs="*", default=["tests", "book"])
    given = parser.parse_args(argv)
    RECORDS.mkdir(parents=True, exist_ok=True)
    results = {}
    for machine in given.only or MACHINES:
        if not can_be_played(machine):
            print(f"{machine}: this processor lacks the instructions")
        elif not (given.only or given.all) and (same := twin(machine)):
            print(f"{machine}: left out, a probe computes the same bits as on {same!r}")
        else:
            results[machine] = recorded(machine, given.tests)
    if not results:
        return 1
    print(table(results))
    print(not_compared())
    (RECORDS / "outcomes.tsv").write_text(every_outcome(results), "utf-8")
    failed = any("failed" in outcomes.values() for outcomes in results.values())
    return 1 if failed else 0


if __name__ == "__main__":
    # Makes below this one begin afresh.
    for name in ("MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS"):
        os.environ.pop(name, None)
    sys.exit(main(sys.argv[1:]))
