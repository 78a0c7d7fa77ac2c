"""What people install: the wheel, and the environment that `make` creates."""

import os
import runpy
import shutil
import subprocess
import sys
import tomllib
import venv as virtual_environments
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOL = runpy.run_path(str(ROOT / "tools/install.py"))


def test_wheel_holds_all_files(wheel):
    """The marker of types, the weights, experiments and logs as well as the code."""
    packed = {
        name for name in zipfile.ZipFile(wheel).namelist() if "-info/" not in name
    }
    found = {
        path.relative_to(folder).as_posix()
        for folder in (ROOT, ROOT / "book")
        for path in (folder / "minivit").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    brought = {
        f"minivit/{path.relative_to(ROOT / 'book').as_posix()}"
        for folder in ("book/experiments", "book/logs")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {"minivit/py.typed", "minivit/weights/vit_cifar10.safetensors"} <= found
    assert "minivit/logs/vit_cifar10/metrics.jsonl" in brought
    assert "minivit/experiments/claims.toml" in brought
    assert packed == found | brought


def test_wheel_is_small(wheel):
    """It is fetched for every chapter that somebody opens in Colab."""
    assert wheel.stat().st_size < 8e6


def test_nobody_needs_uv():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    for name in ("book", "test", "dev"):
        assert not [wanted for wanted in extras[name] if wanted.startswith("uv")]


@pytest.fixture
def venv(tmp_path):
    """An empty environment: nothing in it but pip."""
    folder = tmp_path / "venv"
    TOOL["create"](folder)
    return folder


def has_minivit(venv):
    command = [TOOL["python"](venv), "-I", "-m", "pip", "show", "minivit"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_pip_does_it_where_uv_cannot_be_installed(venv, wheel, monkeypatch, capsys):
    """As where no uv is built for the machine; here its home is missing altogether."""
    monkeypatch.setitem(TOOL["install"].__globals__, "VENV", venv / "missing")
    assert not has_minivit(venv)
    TOOL["install"](venv, ("--no-index", "--no-deps", str(wheel)))
    assert has_minivit(venv)
    assert "uv does not work here" in capsys.readouterr().out


def test_pip_does_it_where_uv_does_not_run(venv, wheel, monkeypatch, capsys):
    """As on an old system, or behind a mirror that only pip was told of."""

    def run(command, **options):
        if "uv" in command:
            raise subprocess.CalledProcessError(2, command)
        return genuine(command, **options)

    genuine = subprocess.check_call
    monkeypatch.setattr(subprocess, "check_call", run)
    TOOL["install"](venv, ("--no-index", "--no-deps", str(wheel)))
    assert has_minivit(venv)
    assert "uv does not work here" in capsys.readouterr().out


def test_a_failure_is_told(venv, monkeypatch):
    """When pip fails as well, the command ends with an error and leaves no stamp."""
    names = TOOL["main"].__globals__
    wanted = ("--no-index", "no-such-package")
    monkeypatch.setitem(names, "VENV", venv / "missing")
    monkeypatch.setitem(names, "ENVIRONMENTS", {"dev": (venv, wanted)})
    with pytest.raises(SystemExit, match=r"failed .* Is there a network\?"):
        TOOL["main"]()
    assert not (venv / "installed").exists()


def test_second_time_installs_nothing(tmp_path, monkeypatch):
    names, asked = TOOL["ensure"].__globals__, []
    monkeypatch.setitem(names, "create", lambda folder: folder.mkdir(exist_ok=True))
    monkeypatch.setitem(names, "install", lambda *given: asked.append(given))
    for wanted in (("a",), ("a",), ("b",)):
        TOOL["ensure"](tmp_path / "venv", wanted)
    assert [wanted for _, wanted in asked] == [("a",), ("b",)]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder whose .venv was made there, and a list of those that `ensure` makes."""
    folder, created = tmp_path / "checkout", []
    folder.mkdir()
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    virtual_environments.create(folder / ".venv", symlinks=os.name != "nt")
    names = TOOL["ensure"].__globals__
    monkeypatch.setitem(names, "create", created.append)
    monkeypatch.setitem(names, "install", lambda *given: None)

    def ensure(folder):
        monkeypatch.setitem(names, "ROOT", folder)
        monkeypatch.setitem(names, "VENV", folder / ".venv")
        TOOL["ensure"](folder / ".venv", ("a",))
        return created

    return folder, ensure


def test_an_environment_is_mended(checkout):
    """Other versions go into the one that is there."""
    folder, ensure = checkout
    for text in ("# some versions", "# others"):
        (folder / "pyproject.toml").write_text(text, "utf-8")
        assert ensure(folder) == []


def test_a_copied_checkout_gets_an_environment_of_its_own(checkout, tmp_path):
    """The commands in the copied one, and its minivit, are those of the original."""
    folder, ensure = checkout
    assert ensure(folder) == []
    copy = shutil.copytree(folder, tmp_path / "copy", symlinks=True)
    assert ensure(copy) == [copy / ".venv"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no make")
@pytest.mark.parametrize("interpreter", ["sound", "gone", "broken"])
def test_make_starts_with_an_interpreter_that_runs(interpreter, tmp_path):
    """That of .venv, or else the system's: it mends the environment."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    ours, systems = tmp_path / ".venv/bin/python", tmp_path / "bin/python3"
    for path in (ours, systems, tmp_path / "tools/install.py"):
        path.parent.mkdir(parents=True)
        path.write_text('#!/bin/sh\necho "$0"\n', "utf-8")
        path.chmod(0o755)
    (tmp_path / ".venv/installed").touch()
    if interpreter == "gone":
        ours.unlink()
        ours.symlink_to(tmp_path / "old/python")
    elif interpreter == "broken":
        ours.write_text("#!/bin/sh\nexit 1\n", "utf-8")
    given = {k: v for k, v in os.environ.items() if k not in ("PYTHON", "MAKEFLAGS")}
    path = f"{systems.parent}{os.pathsep}{os.environ['PATH']}"
    output = subprocess.check_output(
        ["make", "--no-print-directory", "install"],
        cwd=tmp_path,
        env=given | {"PATH": path},
        text=True,
    )
    chosen = ".venv/bin/python" if interpreter == "sound" else str(systems)
    assert output.strip() == chosen
