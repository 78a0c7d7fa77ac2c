"""Hold the claims against the records, or against runs with other seeds.

python -m minivit.experiments                     # against the records
python -m minivit.experiments --seeds 100-109     # against other runs
python -m minivit.experiments --seeds 0-9 --record    # write the records
"""

import argparse
import hashlib
import os
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from .. import checkpoint
from . import HERE, LIBRARIES, LOGS, Claim, Record, claims, load, repeat


def main(argv: Sequence[str] | None = None) -> int:
    """Do what is asked for; 1 if a claim fails, else 0."""
    everything = claims()
    chapters = {claim.chapter for claim in everything}
    experiments = {path.stem for path in HERE.glob("[!_]*.py")}
    parser = argparse.ArgumentParser(
        prog="python -m minivit.experiments",
        description="Hold the book's claims against its records, or new runs.",
        epilog=f"Chapters: {', '.join(sorted(chapters))}. "
        f"Experiments: {', '.join(sorted(experiments))}.",
    )
    parser.add_argument(
        "only",
        nargs="*",
        help="chapters or experiments; if none, all claims",
    )
    parser.add_argument(
        "--seeds", type=_seeds, help="to run with: 3, 0-9, or 3,5-7"
    )
    parser.add_argument(
        "--record",
        action="store_true",
        help="add the runs to the book's records",
    )
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count(), help="runs at a time"
    )
    given = parser.parse_args(argv)

    only = set(given.only)
    if unknown := only - chapters - experiments:
        parser.error(
            f"neither chapter nor experiment: {', '.join(sorted(unknown))}"
        )
    chosen = [
        c for c in everything if not only or {c.chapter, c.experiment} & only
    ]
    # An experiment that bears no claim is run if it is asked for by name.
    names = {claim.experiment for claim in chosen} | experiments & only
    records = {name: load(name) for name in sorted(names)}
    if given.processes < 1:
        parser.error(f"--processes must be 1 or more, got {given.processes}")
    if problem := _problem(given.seeds, given.record, records):
        parser.error(problem)
    if given.seeds:
        folder = LOGS if given.record else _fresh()
        for name in records:
            record = repeat(
                name, given.seeds, folder, processes=given.processes
            )
            records[name] = (
                record if given.record else record.only(given.seeds)
            )
    return _report(chosen, records)


def _seeds(text: str) -> list[int]:
    """Read "3,100-102" as 3, 100, 101 and 102."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        numbers = range(int(first), int(last if dash else first) + 1)
        if not numbers:
            raise ValueError(f"{part} is empty")
        found += numbers
    return found


def _problem(
    seeds: list[int] | None, record: bool, records: dict[str, Record]
) -> str | None:
    """Say what is wrong with the request, if anything is."""
    if record and not seeds:
        return "--record needs --seeds"
    for name, known in records.items():
        if not seeds and not known.runs:
            return f"{name} has no record yet: give --seeds and --record"
        total = set(seeds or ()) | set(
            known.runs if record or not seeds else ()
        )
        if len(total) < 2:
            return "a standard error needs two seeds or more"
        again = sorted(set(seeds or ()) & set(known.runs))
        if again and not record:
            return f"the record of {name} holds seeds {again}: choose others"
    return None


def _fresh() -> Path:
    """A folder for runs of this code, where a call can go on."""
    digest = hashlib.sha256(" ".join(map(version, LIBRARIES)).encode())
    for folder in (HERE, Path(checkpoint.__file__).parent):
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.read_bytes())
    return Path("_build") / "claims" / digest.hexdigest()[:8]


def _report(chosen: list[Claim], records: dict[str, Record]) -> int:
    """Print two lines for each claim; return 1 if one fails, else 0."""
    held = 0
    for claim in chosen:
        record = records[claim.experiment]
        holds = claim.holds(record)
        held += holds
        print(
            f"{'holds' if holds else 'FAILS'}  {claim.chapter}: {claim.says}"
        )
        print(f"       {claim.describe()}: {claim.measure(record)}")
    print(f"{held} of {len(chosen)} claims hold")
    return int(held < len(chosen))


if __name__ == "__main__":
    raise SystemExit(main())
