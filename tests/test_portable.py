"""`make portable` believes no half run, and nothing that has changed since.

tools/portable.py is driven in a small project of three files, in which `make` is a
script that leaves the report that a test wants.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import machines
import pytest

fcntl = pytest.importorskip("fcntl")  # Windows has no make either

ROOT = Path(__file__).resolve().parent.parent

# Two machines, A and B, and what portable.py asks of tests/machines.py.
MACHINES = """
import os
MACHINES = {"A": {}, "B": {}}
can_be_played = bool
twin = lambda machine: None
arithmetic = lambda machine: machine
environment = lambda machine: {**os.environ, "MACHINE": machine, "OMP_NUM_THREADS": "1"}
"""

# The last words of PYTEST_ADDOPTS are --junitxml="...".
MAKE = """#!/bin/sh
echo "$MACHINE $* $PYTEST_ADDOPTS" >> given/asked
report=${PYTEST_ADDOPTS##*--junitxml=\\"}
cp "given/$MACHINE.xml" "${report%\\"}"
. "given/$MACHINE.sh"
"""


class Project:
    """A folder with portable.py in it."""

    def __init__(self, folder):
        self.folder = folder
        self.given = folder / "given"  # none of the files that records depend on
        self.records = folder / "_build/portable"
        files = {
            "tests/machines.py": MACHINES,
            "bin/make": MAKE,
            "book/a.md": "A book.",
        }
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True)
            (folder / name).write_text(text, "utf-8")
        (folder / "bin/make").chmod(0o755)
        (folder / "tools").mkdir()
        shutil.copy(ROOT / "tools/portable.py", folder / "tools")
        self.given.mkdir()
        self.plays("A", ok="")
        self.plays("B", ok="")

    def plays(self, machine, script="", /, **cases):
        """What `make test` leaves on a machine: for each test, what is in its case."""
        xml = "".join(
            f'<testcase classname="tests.test_a" name="{name}">{inside}</testcase>'
            for name, inside in cases.items()
        )
        (self.given / f"{machine}.xml").write_text(f"<all>{xml}</all>", "utf-8")
        (self.given / f"{machine}.sh").write_text(script, "utf-8")

    def start(self, *arguments, **variables):
        # -S: nobody asks what is installed here, and it starts sooner.
        path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        return subprocess.Popen(
            [sys.executable, "-S", self.folder / "tools/portable.py", *arguments],
            env={**os.environ, "PATH": path, "PYTEST_ADDOPTS": "", **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
        )

    def run(self, *arguments, **variables):
        """Exit status and output; never a traceback."""
        process = self.start(*arguments, **variables)
        output, _ = process.communicate(timeout=60)
        assert "Traceback" not in output, output
        return process.returncode, output

    def asked(self):
        """What `make` was called for, and for nothing else."""
        return (self.given / "asked").read_text("utf-8").splitlines()

    def recorded(self):
        return sorted(path.stem for path in self.records.glob("*.json"))


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


def test_a_table_and_records(project):
    project.plays("B", ok="", other="<skipped/>")
    project.plays("A", ok="", other="")
    status, output = project.run()
    assert status == 0, output
    assert "tests.test_a  2  1, 1 skipped" in output
    assert project.run() == (0, output.partition(" s\nB ... ")[2].partition("\n")[2])
    assert len(project.asked()) == 2  # the second call ran nothing
    assert project.recorded() == ["A", "B"]


def test_a_half_run_is_not_believed(project):
    """An interrupted pytest leaves a sound report of the tests that it came to."""
    project.plays("B", "exit 2", ok="")
    status, output = project.run()
    assert status == 1
    assert "B: `make test` did not come to its end: exit status 2, 1 outc" in output
    assert "_build/portable/B.log" in output
    assert project.recorded() == ["A"]


@pytest.mark.parametrize("report", ["<all/>", "<all><testcase", ""])
def test_no_outcomes_are_no_success(project, report):
    """As when all tests are deselected, or pytest dies when it writes."""
    (project.given / "A.xml").write_text(report, "utf-8")
    status, output = project.run()
    assert status == 1
    assert "A: `make test` did not come to its end: exit status 0, 0 outc" in output
    assert project.recorded() == []


def test_a_test_that_a_machine_lacks_is_told(project):
    project.plays("A", ok="", other="")
    status, output = project.run()
    assert status == 1
    assert "MISSING tests.test_a::other: B\n" in output


@pytest.mark.parametrize("inside", ["<skipped/><error/>", "<error/><skipped/>"])
def test_what_failed_has_failed(project, inside):
    """A skipped test whose fixture cannot be taken down has."""
    project.plays("A", "exit 2", ok=inside)
    status, output = project.run()
    assert status == 1
    assert "FAILED tests.test_a::ok: A\n" in output


@pytest.mark.parametrize("second", ["", "<skipped/>"])
def test_a_later_case_of_the_same_name_heals_nothing(project, second):
    another = '</testcase><testcase classname="tests.test_a" name="ok">'
    project.plays("A", "exit 2", ok=f"<failure/>{another}{second}")
    _, output = project.run()
    assert "FAILED tests.test_a::ok: A\n" in output


def test_a_file_that_cannot_be_imported_has_a_row(project):
    project.plays("A", "exit 2")
    case = '<testcase classname="" name="tests.test_b"><error/></testcase>'
    (project.given / "A.xml").write_text(f"<all>{case}</all>", "utf-8")
    _, output = project.run("--only", "A")
    assert "tests.test_b  0, 1 FAILED" in output
    assert "FAILED tests.test_b: A\n" in output


def test_files_that_change_meanwhile(project):
    """What ran on A and what runs on B would not be the same project."""
    project.plays("B", "echo more >> book/a.md", ok="")
    status, output = project.run()
    assert status == 1
    assert "has changed during the run" in output
    assert project.recorded() == ["A"]


def test_nothing_old_is_believed(project):
    project.run("--only", "A")
    (project.folder / "book/a.md").write_text("Another book.", "utf-8")
    project.run("--only", "A")
    project.run("--only", "A", "book/a.md")
    project.run("--only", "A", "book/a.md", PYTEST_ADDOPTS="-k ok")
    asked = [line.partition(" --junitxml")[0] for line in project.asked()]
    assert asked == [
        *["A test TESTS=tests book JOBS=2"] * 2,
        "A test TESTS=book/a.md JOBS=2",
        "A test TESTS=book/a.md JOBS=2 -k ok",
    ]


@pytest.mark.parametrize("keep", [0, 1, 30])
def test_a_torn_record_is_none(project, keep):
    status, _ = project.run("--only", "A")
    record = project.records / "A.json"
    whole = record.read_text("utf-8")
    record.write_text(whole[:keep], "utf-8")
    assert project.run("--only", "A")[0] == status == 0
    assert len(project.asked()) == 2
    assert json.loads(record.read_text("utf-8")) == json.loads(whole)


@pytest.mark.parametrize("tests", [["tests/no.py"], ["tests", "tests/no.py::test_a"]])
def test_a_test_that_is_not_there(project, tests):
    status, output = project.run(*tests)
    assert (status, output) == (1, f"There is no {tests[-1]}\n")
    assert not (project.given / "asked").exists()


def test_two_at_once(project):
    project.records.mkdir(parents=True)
    with (project.records / "lock").open("w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        status, output = project.run()
    assert status == 1
    assert "under way" in output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_it_started_ends_with_it(project, number):
    project.plays("A", "echo $$ > given/pid; exec sleep 60", ok="")
    process, pid = project.start(), project.given / "pid"
    for _ in range(1000):
        if pid.exists() and pid.read_text("utf-8"):
            break
        time.sleep(0.02)
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "Stopped" in output
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text("utf-8")), 0)
    assert project.recorded() == []


def test_other_updates_must_be_other(project):
    """Python goes on when sitecustomize.py cannot be imported."""
    with (project.folder / "tests/machines.py").open("a", encoding="utf-8") as file:
        file.write('arithmetic = lambda machine: "the same"\n')
    status, output = project.run()
    assert status == 1
    assert "sitecustomize.py has no effect" in output


# tests/machines.py ------------------------------------------------------------------


def test_a_machine_is_not_what_the_user_has_set(monkeypatch):
    for name in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("UNRELATED", "x")
    for machine, settings in machines.MACHINES.items():
        found = machines.environment(machine)
        assert "x" not in [found[name] for name in settings]
        assert found["OMP_NUM_THREADS"] in ("1", "2")
        assert found["UNRELATED"] == "x"
        decide = {name for name in found if name.startswith(machines.SETTINGS)}
        assert decide <= {"OMP_NUM_THREADS", *settings}
