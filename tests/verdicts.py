"""What the checker says of every planted mistake and every right implementation.

    python tests/verdicts.py FIRST LAST [MACHINE]

prints, as JSON, the verdicts on each subject with weights of these seeds; with the
rounding of another machine where one is numbered.
"""

import contextlib
import json
import re
import sys
import warnings

import torch
from mutants import MUTANTS
from right import STYLES
from right.libraries import LIBRARIES
from rounding import Rounding

from minivit import check

SUBJECTS = {
    **{f"{m.checker}-{m.name}": (m.checker, m.make, m.options) for m in MUTANTS},
    **{f"{row[0]}-library{i}": row for i, row in enumerate(LIBRARIES)},
    **{f"{row[0]}-style{i}-{row[1].__name__}": row for i, row in enumerate(STYLES)},
}
assert len(SUBJECTS) == len(MUTANTS) + len(LIBRARIES) + len(STYLES)


def verdict(subject: str, seed: int, machine: int | None = None) -> str:
    """The report without measured numbers: those depend on the weights by right."""
    checker, make, options = SUBJECTS[subject]
    another = contextlib.nullcontext() if machine is None else Rounding(machine)
    with another, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the subjects' own
        torch.manual_seed(seed)
        report = getattr(check, checker)(make(), **options)
    # Where an error was raised: under Rounding, that is in another file.
    text = re.sub(r"look at: \w+, line \d+", "look at: #", str(report))
    return re.sub(r"\d+\.\d+(e[+-]?\d+)?", "#", text)


def main(first: str, last: str, machine: str | None = None) -> None:
    number = None if machine is None else int(machine)
    seeds = range(int(first), int(last) + 1)
    said = {
        subject: sorted({verdict(subject, seed, number) for seed in seeds})
        for subject in SUBJECTS
    }
    print(json.dumps(said, ensure_ascii=False, indent=0))


if __name__ == "__main__":
    main(*sys.argv[1:])
