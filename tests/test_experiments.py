"""What the book says of training: claims, their records, and how to repeat them."""

import ast
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest
from test_book import CHAPTERS, Chapter

from minivit import experiments
from minivit.experiments import Claim, Record, estimate
from minivit.experiments import __main__ as command

ROOT = Path(__file__).resolve().parent.parent
CLAIMS = {claim.name: claim for claim in experiments.claims()}
NAMES = sorted(path.stem for path in experiments.HERE.glob("[!_]*.py"))


@pytest.fixture(scope="module")
def records():
    return {name: experiments.load(name) for name in NAMES}


# What the book says -------------------------------------------------------------------


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=list(CLAIMS))
def test_the_record_bears_the_claim_out(claim, records):
    record = records[claim.experiment]
    assert claim.holds(record), claim.measure(record)
    assert claim.chance(record) > 0.99, claim.chance(record)


@pytest.mark.parametrize("name", sorted({c.experiment for c in CLAIMS.values()}))
def test_records_have_enough_seeds(name, records):
    """Ten; five, where a run takes more than three minutes."""
    record = records[name]
    slow = statistics.median(record["seconds"]) > 180
    assert len(record.runs) >= (5 if slow else 10)
    for session in record.sessions:
        assert {"command", "hardware", "versions", "date", "seeds"} <= session.keys()
    known = [seed for session in record.sessions for seed in session["seeds"]]
    assert sorted(known) == sorted(record.runs)


def test_every_claim_is_said_in_its_chapter():
    said = {}
    for page in [*ROOT.glob("book/*.ipynb"), *ROOT.glob("book/*.md")]:
        for name in re.findall(r"\{claim\}`([^`]+)`", page.read_text("utf-8")):
            said.setdefault(name, set()).add(page.stem)
    assert said.keys() == CLAIMS.keys()
    for name, claim in CLAIMS.items():
        assert claim.chapter in said[name], name
        assert claim.experiment in NAMES


def test_the_locked_digits_are_read_for_last_figures_only():
    """By the experiments of two chapters, and in one of these once more."""
    files = [*ROOT.glob("book/*.ipynb"), *ROOT.glob("book/experiments/*.py")]
    files += ROOT.glob("minivit/**/*.py")
    call = re.compile(r"load_digits\([^)]*locked=")
    asking = {path.stem for path in files if call.search(path.read_text("utf-8"))}
    assert asking == {"from_scratch", "locked_digits", "training"}


def definitions(source):
    """Functions, classes and what is given a name; their docstrings left out."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            if ast.get_docstring(node) is not None:
                node.body = node.body[1:]
            found[node.name] = ast.dump(node)
        elif isinstance(node, ast.Assign):
            found[ast.unparse(node.targets[0])] = ast.dump(node.value)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_the_code_that_is_shown_is_the_code_that_was_measured(name):
    """Where a chapter writes out what its experiment runs, it is the same."""
    own = definitions((experiments.HERE / f"{name}.py").read_text("utf-8"))
    del own["run"]  # each has one, and a chapter may call something else so
    compared = set()
    for path in CHAPTERS:
        if path.stem in {c.chapter for c in CLAIMS.values() if c.experiment == name}:
            for cell in Chapter(path).code:
                source = re.sub(r"^( *)[%!].*", r"\1pass", cell.source, flags=re.M)
                for shown, code in definitions(source).items():
                    assert own.get(shown, code) == code, f"{path.stem}: {shown}"
                    compared |= {shown} & own.keys()
    assert compared or not own


# How it is measured -------------------------------------------------------------------


def test_estimate():
    found = estimate([1.0, 2.0, 3.0, 6.0])
    assert found.mean == 3.0
    assert math.isclose(found.error, math.sqrt((4 + 1 + 0 + 9) / 3 / 4))
    assert found.runs == 4


@pytest.mark.parametrize(
    ("mean", "error", "text"),
    [
        (0.6712, 0.17, "0.67 ± 0.17"),
        (-0.0693, 0.0049, "-0.0693 ± 0.0049"),
        (97.31, 1.2, "97.3 ± 1.2"),
        (1234.0, 56.0, "1234 ± 56"),
        (1.0, 0.0, "1 ± 0"),
        (0.98765432, 3e-17, "0.988 ± 3e-17"),
        (1.46e-5, 2.1e-6, "(1.46 ± 0.21)·10⁻⁵"),
        (-2e-5, 1.6e-4, "(-0.2 ± 1.6)·10⁻⁴"),
    ],
)
def test_an_estimate_has_as_many_digits_as_its_error(mean, error, text):
    assert str(experiments.Estimate(mean, error, 10)) == text


RUNS = {seed: {"a": 1.0 + 0.1 * seed, "b": 0.1 * seed, "c": 2.0} for seed in range(5)}


def claim(**bounds):
    given = {"name": "x", "chapter": "y", "experiment": "z", "says": "", "figure": "a"}
    return Claim(**given | bounds)


def test_a_difference_is_paired():
    record = Record("z", RUNS)
    assert record.difference("a", "b").error < 1e-12 < record.mean("a").error
    assert claim(minus="b", above=0.99, below=1.01).holds(record)


@pytest.mark.parametrize(
    ("bounds", "holds"),
    [
        ({"above": 1.05}, True),  # 1.2 with an error of 0.071
        ({"above": 1.07}, False),
        ({"below": 1.35}, True),
        ({"below": 1.33}, False),
        ({"above": 1.0, "below": 1.4}, True),
        ({"above": 1.0, "below": 1.3}, False),
    ],
)
def test_a_claim_needs_two_standard_errors(bounds, holds):
    assert claim(**bounds).holds(Record("z", RUNS)) is holds


@pytest.mark.parametrize(
    ("low", "high", "tolerance"), [(0.6, 0.9, 0.05), (0.97, 0.995, 0.01)]
)
def test_chance_is_how_often_new_seeds_agree(low, high, tolerance):
    """Of all records with some chance, whatever is true, so many are borne out."""
    draw = Random(0)

    def record(true, runs):
        return Record("z", {s: {"a": draw.gauss(true, 1.0)} for s in range(runs)})

    chances, held = [], []
    while len(chances) < 1000:
        true = draw.uniform(-2, 4)
        chance = claim(above=0.5).chance(record(true, 10), runs=10)
        if low < chance < high:
            chances.append(chance)
            held.append(claim(above=0.5).holds(record(true, 10)))
    found, expected = statistics.fmean(held), statistics.fmean(chances)
    assert math.isclose(found, expected, abs_tol=tolerance)


def test_a_new_run_is_held_against_the_record():
    record = Record("z", RUNS)
    record.confirm({"a": 1.5, "c": 2.0})
    record.confirm({"c": 2.1}, slack=0.2)
    for wrong in ({"a": 3.0}, {"c": 2.1}, {"a": math.nan}):
        with pytest.raises(ValueError, match=r"of z is .* on record, but"):
            record.confirm(wrong)
    with pytest.raises(KeyError, match="z has no 'd', only a, b, c"):
        record.confirm({"d": 0.0})
    record = Record("z", {0: {"a": 1.0}, 1: {}})
    with pytest.raises(KeyError, match=r"z has no 'a' for seeds \[1\]"):
        record.mean("a")


def test_a_training_that_diverged_bears_nothing_out():
    record = Record("z", {0: {"a": math.nan}, 1: {"a": 1.0}})
    assert not claim(above=0.0).holds(record)
    assert str(record.mean("a")) == "nan ± nan"


def test_a_claim_needs_a_bound():
    with pytest.raises(ValueError, match="the claim x has no bound"):
        claim()


# The command --------------------------------------------------------------------------

EXPERIMENT = """
from pathlib import Path

def run(seed):
    if seed == 7 and not Path("seven").exists():
        raise RuntimeError("seven")
    return {"a": 1.0 + seed / 1000, "b": seed / 1000}
"""
CLAIM = """
[larger]
chapter = "training"
experiment = "tried"
says = "a is larger than b."
figure = "a"
minus = "b"
above = {above}
"""
# Processes look for experiments, claims and records in a folder of the test's own.
CUSTOMIZE = """
import os, pathlib
import minivit.experiments as e

e.HERE = e.LOGS = pathlib.Path(os.environ["OWN"])
e.__path__.append(os.environ["OWN"])
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "tried.py").write_text(EXPERIMENT, "utf-8")
    (tmp_path / "claims.toml").write_text(CLAIM.format(above=0.5), "utf-8")
    (tmp_path / "path").mkdir()
    (tmp_path / "path/sitecustomize.py").write_text(CUSTOMIZE, "utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    monkeypatch.setenv("OWN", str(tmp_path))
    for module in (experiments, command):
        monkeypatch.setattr(module, "HERE", tmp_path)
        monkeypatch.setattr(module, "LOGS", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def recorded(own):
    """Seeds 0 to 2 are on record."""
    runs = {seed: {"a": 1.0 + seed, "b": float(seed)} for seed in range(3)}
    Record("tried", runs).save(own)
    return own


def test_claims_are_repeated_on_other_seeds(recorded):
    """By processes of their own; if one fails, what was done before is kept."""
    call = [sys.executable, "-m", "minivit.experiments", "training"]
    call += ["--seeds", "5,7-8,5", "--processes", "1"]
    before = (recorded / "tried.json").read_bytes()
    done = subprocess.run(call, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 1
    assert "RuntimeError: seven" in done.stderr
    (recorded / "seven").touch()
    done = subprocess.run(call, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert "holds  training: a is larger than b." in done.stdout
    assert "0.5 < (a) − (b): 1 ± " in done.stdout
    assert "1 of 1 claims hold" in done.stdout
    assert (recorded / "tried.json").read_bytes() == before
    (kept,) = recorded.glob("_build/claims/*/tried.json")
    found = json.loads(kept.read_text("utf-8"))
    assert sorted(found["runs"]) == [*"578"]
    seeds = [seed for session in found["sessions"] for seed in session["seeds"]]
    assert sorted(seeds) == [5, 7, 8]
    first, again = (session["command"] for session in found["sessions"])
    assert first.endswith("tried --seeds 5,7,8")
    assert again.endswith("tried --seeds 7")


@pytest.mark.parametrize(("above", "status"), [(0.5, 0), (1.5, 1)])
def test_the_status_says_whether_all_claims_hold(recorded, capsys, above, status):
    (recorded / "claims.toml").write_text(CLAIM.format(above=above), "utf-8")
    assert command.main([]) == status
    said = capsys.readouterr().out
    assert ("FAILS  training: a is larger than b." in said) == bool(status)
    assert f"{1 - status} of 1 claims hold" in said


def test_what_bears_no_claim_is_run_only_by_name(recorded, capsys):
    (recorded / "in_work.py").write_text(EXPERIMENT, "utf-8")
    assert command.main([]) == 0
    with pytest.raises(SystemExit):
        command.main(["in_work"])
    assert "in_work has no record yet" in capsys.readouterr().err


def test_the_book_itself():
    assert command.main([]) == 0


def test_records_are_added_to(recorded, monkeypatch):
    def repeat(name, seeds, folder, *, processes):
        record = experiments.load(name, folder)
        record.runs |= {seed: {"a": 2.0, "b": 0.0} for seed in seeds}
        record.save(folder)
        return record

    monkeypatch.setattr(command, "repeat", repeat)
    command.main(["--record", "--seeds", "2-4"])
    assert sorted(experiments.load("tried", recorded).runs) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "neither chapter nor experiment: nothing"),
        (["--seeds", "1-"], r"invalid .* value: '1-'"),
        (["--seeds", "4-2"], r"invalid .* value: '4-2'"),
        (["--seeds", "9"], "needs two seeds"),
        (["--seeds", "2-3"], r"the record of tried holds seeds \[2\]: choose others"),
        (["--record"], "--record needs --seeds"),
        (["--processes", "0"], "--processes must be 1 or more, got 0"),
    ],
)
def test_what_cannot_be_done(recorded, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        command.main(arguments)
    assert stop.value.code == 2
    assert re.search(message, capsys.readouterr().err)


ADDS = """
from minivit.experiments import Record
from pathlib import Path

def run(seed):
    if seed == 5:  # meanwhile another call is ready with seed 9
        folder = Path(__file__).parent
        Record("tried", {9: {"a": 1.0, "b": 0.0}}).save(folder)
    return {"a": 1.0, "b": 0.0}
"""


def test_two_calls_on_one_record(own):
    (own / "tried.py").write_text(ADDS, "utf-8")
    call = [sys.executable, "-m", "minivit.experiments", "tried", "--record"]
    call += ["--seeds", "5-6", "--processes", "1"]
    done = subprocess.run(call, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert sorted(experiments.load("tried", own).runs) == [5, 6, 9]


SLEEPS = """
import os, time
from pathlib import Path

def run(seed):
    Path("pid").write_text(str(os.getpid()), "utf-8")
    time.sleep(60)
"""


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_killed_call_leaves_no_process_behind(own):
    (own / "tried.py").write_text(SLEEPS, "utf-8")
    call = [sys.executable, "-m", "minivit.experiments", "tried", "--seeds", "5-6"]
    running = subprocess.Popen(call, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while not ((own / "pid").exists() and (own / "pid").read_text("utf-8")):
        assert time.monotonic() < until
        time.sleep(0.1)
    pid = int((own / "pid").read_text("utf-8"))
    running.kill()
    running.wait()
    while alive(pid):
        assert time.monotonic() < until
        time.sleep(0.1)


def test_a_damaged_record_is_named(own):
    for text in ("{", "[]", "{}"):
        (own / "tried.json").write_text(text, "utf-8")
        with pytest.raises(ValueError, match=r"tried\.json is damaged, or no record"):
            experiments.load("tried", own)


def test_other_libraries_mean_other_runs(recorded, monkeypatch):
    before = command._fresh()
    monkeypatch.setattr(command, "version", lambda library: "9.9")
    assert command._fresh() != before


def test_no_record_yet(own, capsys):
    with pytest.raises(SystemExit):
        command.main([])
    assert "tried has no record yet" in capsys.readouterr().err
