"""What people install: the wheel, and the environment that `make` creates."""

import runpy
import subprocess
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOL = runpy.run_path(str(ROOT / "tools/install.py"))


def test_wheel_holds_all_files(wheel):
    """The marker of types, the weights and the logs as well as the code."""
    packed = {
        name for name in zipfile.ZipFile(wheel).namelist() if "-info/" not in name
    }
    found = {
        path.relative_to(folder).as_posix()
        for folder in (ROOT, ROOT / "book")
        for path in (folder / "minivit").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    logs = {
        f"minivit/logs/{path.relative_to(ROOT / 'book/logs').as_posix()}"
        for path in (ROOT / "book/logs").rglob("*")
        if path.is_file()
    }
    assert {"minivit/py.typed", "minivit/weights/vit_cifar10.safetensors"} <= found
    assert "minivit/logs/vit_cifar10/metrics.jsonl" in logs
    assert packed == found | logs


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
    with pytest.raises(SystemExit, match="failed"):
        TOOL["main"]()
    assert not (venv / "installed").exists()


def test_second_time_installs_nothing(tmp_path, monkeypatch):
    names, asked = TOOL["ensure"].__globals__, []
    monkeypatch.setitem(names, "create", lambda folder: folder.mkdir(exist_ok=True))
    monkeypatch.setitem(names, "install", lambda *given: asked.append(given))
    for wanted in (("a",), ("a",), ("b",)):
        TOOL["ensure"](tmp_path / "venv", wanted)
    assert [wanted for _, wanted in asked] == [("a",), ("b",)]
