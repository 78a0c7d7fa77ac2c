"""What the book says of training, as experiments that anybody can repeat.

Every other module of this folder is an experiment: its `run(seed)` gives the
figures of one run. `book/logs/NAME.json` records the runs of NAME, and
`claims.toml` lists what the chapters conclude from them.
"""

import importlib
import json
import math
import os
import statistics
import time
import tomllib
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import torch

from .. import checkpoint
from ..train.place import Place, hardware

__all__ = [
    "Claim",
    "Estimate",
    "Record",
    "claims",
    "estimate",
    "load",
    "repeat",
]

HERE = Path(__file__).resolve().parent
LOGS = HERE.parent / "logs"
LIBRARIES = ("torch", "torchvision", "numpy", "scikit-learn")
Figures = Mapping[str, float]


class Estimate(NamedTuple):
    """The mean of independent runs, its standard error, the number of runs."""

    mean: float
    error: float
    runs: int

    def __str__(self) -> str:
        """Write as many digits as the error has any use for."""
        size = max(abs(self.mean), self.error)
        if 0 < size < 1e-3:
            power = math.floor(math.log10(size))
            scaled = Estimate(
                self.mean / 10**power, self.error / 10**power, self.runs
            )
            raised = str(power).translate(
                str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
            )
            return f"({scaled})·10{raised}"
        if not self.error >= 1e-4:
            return f"{self.mean:.3g} ± {self.error:.1g}"
        digits = max(1 - math.floor(math.log10(self.error)), 0)
        return f"{self.mean:.{digits}f} ± {self.error:.{digits}f}"


def estimate(values: Iterable[float]) -> Estimate:
    """Estimate the mean that runs with all seeds would have.

    Args:
        values: a number from each run, from two runs at least.

    Returns:
        Mean, standard error and number of runs.
    """
    values = list(values)
    if not all(map(math.isfinite, values)):  # a training that diverged
        return Estimate(math.nan, math.nan, len(values))
    error = statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(statistics.fmean(values), error, len(values))


@dataclass
class Record:
    """What came out of an experiment.

    Attributes:
        name: of the experiment.
        runs: the figures of each seed.
        sessions: seeds, command, hardware, versions and date of each time that
            it was run.
    """

    name: str
    runs: dict[int, Figures] = field(default_factory=dict)
    sessions: list[dict[str, Any]] = field(default_factory=list)

    def __getitem__(self, figure: str) -> list[float]:
        """Give a figure of all runs, in the order of their seeds."""
        known = {name: None for run in self.runs.values() for name in run}
        if figure not in known:
            raise KeyError(
                f"{self.name} has no {figure!r}, only {', '.join(known)}"
            )
        lacking = [s for s in sorted(self.runs) if figure not in self.runs[s]]
        if lacking:
            raise KeyError(
                f"{self.name} has no {figure!r} for seeds {lacking}"
            )
        return [self.runs[seed][figure] for seed in sorted(self.runs)]

    def mean(self, figure: str) -> Estimate:
        """Estimate the mean of a figure."""
        return estimate(self[figure])

    def difference(self, figure: str, other: str) -> Estimate:
        """Estimate by how much a figure exceeds another of the same run."""
        return estimate(a - b for a, b in zip(self[figure], self[other]))

    def only(self, seeds: Iterable[int]) -> "Record":
        """Take the runs with some seeds."""
        return Record(self.name, {seed: self.runs[seed] for seed in seeds})

    def confirm(self, figures: Figures, *, slack: float = 0.0) -> None:
        """Hold a new run against the record.

        Args:
            figures: of the new run, all or some.
            slack: by how much a figure may differ that has no spread.

        Raises:
            ValueError: a figure lies further from the record's mean than
                `slack` and five standard deviations.
        """
        for name, found in figures.items():
            mean = self.mean(name).mean
            allowed = 5 * statistics.stdev(self[name]) + slack
            if not abs(found - mean) <= allowed:
                raise ValueError(
                    f"{name} of {self.name} is {mean:.4g} ± {allowed:.2g} on "
                    f"record, but {found:.4g} in this run"
                )

    def save(self, folder: Path) -> None:
        """Replace the file of the record."""
        runs = {str(seed): self.runs[seed] for seed in sorted(self.runs)}
        text = json.dumps({"sessions": self.sessions, "runs": runs}, indent=1)
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.write(folder / f"{self.name}.json", f"{text}\n".encode())


def load(name: str, folder: Path | None = None) -> Record:
    """Read the record of an experiment.

    Args:
        name: of the experiment.
        folder: where the record is; by default among the book's.

    Returns:
        The record, empty if there is none yet.
    """
    path = (folder or LOGS) / f"{name}.json"
    if not path.exists():
        return Record(name)
    try:
        found = json.loads(path.read_text("utf-8"))
        runs = {int(seed): figures for seed, figures in found["runs"].items()}
        return Record(name, runs, found["sessions"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged, or no record: {error!r}"
        ) from error


def repeat(
    name: str, seeds: Iterable[int], folder: Path, *, processes: int = 1
) -> Record:
    """Run an experiment with each seed that its record lacks.

    Every run is written down when it is done: an interrupted call goes on.

    Args:
        name: of the experiment.
        seeds: which the record shall have.
        folder: where the record is.
        processes: how many runs at a time, of one thread each.

    Returns:
        The record.
    """
    from tqdm import tqdm

    record = load(name, folder)
    missing = sorted(set(seeds) - record.runs.keys())
    command = f"python -m minivit.experiments {name} --seeds "
    command += ",".join(map(str, missing))
    session: dict[str, Any] = {
        "command": f"{command} --record" if folder == LOGS else command,
        "hardware": hardware(Place(torch.device("cpu"), 0, 1))
        | {"threads": 1},
        "versions": {library: version(library) for library in LIBRARIES},
        "date": date.today().isoformat(),
        "seeds": [],
    }
    context = get_context("spawn")
    with ProcessPoolExecutor(processes, context, _follow) as pool:
        runs = {pool.submit(_run, name, seed): seed for seed in missing}
        failed: BaseException | None = None
        try:
            for run in tqdm(
                as_completed(runs), name, len(runs), disable=not runs
            ):
                if run.cancelled():
                    continue
                if error := run.exception():
                    failed = failed or error
                    for other in runs:  # begin no other; write down what runs
                        other.cancel()
                    continue
                # Another call may have added runs to the file meanwhile.
                record = load(name, folder)
                others = [one for one in record.sessions if one != session]
                session["seeds"].append(runs[run])
                record.sessions = [*others, session]
                record.runs[runs[run]] = run.result()
                record.save(folder)
        finally:  # Ctrl-C, too, begins no other
            pool.shutdown(cancel_futures=True)
    if failed:
        raise failed
    return record


def _follow() -> None:
    """End this process when the one that began it is killed."""

    def wait(parent: Any) -> None:
        parent.join()
        os._exit(1)

    Thread(target=wait, args=[parent_process()], daemon=True).start()


def _run(name: str, seed: int) -> Figures:
    torch.set_num_threads(1)
    began = time.perf_counter()
    figures = importlib.import_module(f"{__name__}.{name}").run(seed)
    return {**figures, "seconds": round(time.perf_counter() - began, 1)}


@dataclass
class Claim:
    """A sentence of a chapter, as bounds on what is measured.

    Attributes:
        name: by which the chapter refers to it.
        chapter: where it is said.
        experiment: what it rests on.
        says: the sentence.
        figure: what is measured.
        minus: the figure of the same run that is taken away, if any.
        above: the mean lies above this by two standard errors or more.
        below: or below this.
        unit: of the figure.
    """

    name: str
    chapter: str
    experiment: str
    says: str
    figure: str
    minus: str = ""
    above: float = -math.inf
    below: float = math.inf
    unit: str = ""

    def __post_init__(self) -> None:
        if self.above == -math.inf and self.below == math.inf:
            raise ValueError(f"the claim {self.name} has no bound")

    def describe(self) -> str:
        """Write what is measured, and its bounds."""
        what = self.figure
        if self.minus:
            what = f"({self.figure}) − ({self.minus})"
        low = f"{self.above} < " if self.above > -math.inf else ""
        high = f" < {self.below}" if self.below < math.inf else ""
        return f"{low}{what}{high}"

    def measure(self, record: Record) -> Estimate:
        """Estimate what the sentence is about."""
        if self.minus:
            return record.difference(self.figure, self.minus)
        return record.mean(self.figure)

    def holds(self, record: Record) -> bool:
        """Say whether the record bears the sentence out."""
        mean, error, _ = self.measure(record)
        return (
            self.above <= mean - 2 * error and mean + 2 * error <= self.below
        )

    def chance(self, record: Record, *, runs: int = 10) -> float:
        """Say how probable it is that new seeds bear the sentence out too.

        Args:
            record: of the runs so far; they tell the spread.
            runs: number of new seeds.

        Returns:
            A probability, by Student's distribution: the spread, too, is
            only known from the runs.
        """
        from scipy.stats import t

        mean, error, known = self.measure(record)
        spread = error * math.sqrt(known)
        if spread == 0:
            return float(self.holds(record))
        scale = spread * math.sqrt(1 / known + 1 / runs)
        margin = 2 * spread / math.sqrt(runs)
        bounds = [self.above + margin, self.below - margin]
        low, high = t.cdf(bounds, known - 1, mean, scale)
        return float(high - low)


def claims() -> list[Claim]:
    """Read `claims.toml`.

    Returns:
        All claims, in the order of the chapters.
    """
    entries = tomllib.loads((HERE / "claims.toml").read_text("utf-8"))
    return [Claim(name, **entry) for name, entry in entries.items()]
