"""Every chapter as it is read in Google Colab: a notebook, and nothing around it.

The environment .venv-colab holds what Colab has (tools/install.py names it). On top of
it each chapter gets one of its own, empty, into which its first cell installs with pip,
as it stands, except that the repository's address becomes a wheel of this checkout.
"""

import json
import os
import runpy
import subprocess
import tomllib
import venv
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

pytestmark = pytest.mark.colab

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
ADDRESS = f"git+{PROJECT['urls']['Repository']}"
CHAPTERS = sorted(ROOT.glob("book/*.ipynb"))
TOOL = runpy.run_path(str(ROOT / "tools/install.py"))
python = TOOL["python"]

# What IPython runs before the first cell.
STARTUP = """
import sys
import types

sys.modules["google.colab"] = types.ModuleType("google.colab")


def pip(line, shell=get_ipython(), pip=get_ipython().find_line_magic("pip")):
    pip(line.replace({address!r}, {wheel!r}))
    assert shell.user_ns["_exit_code"] == 0, "pip could not install it"


get_ipython().register_magic_function(pip)
del pip, sys, types
"""

LIST = """
import importlib.metadata, json
found = {}
for one in importlib.metadata.distributions():
    name = one.metadata["Name"].lower().replace("_", "-")
    found.setdefault(name, (one.version, str(one.locate_file(""))))
print(json.dumps(found))
"""


def ask(venv, code):
    return subprocess.check_output([python(venv), "-I", "-c", code], text=True)


def installed(venv):
    """Version and place of every distribution that an environment sees."""
    return json.loads(ask(venv, LIST))


@pytest.fixture(scope="module")
def colab():
    folder, _ = TOOL["ENVIRONMENTS"]["colab"]
    assert (folder / "installed").exists(), "python tools/install.py colab"
    return folder


@pytest.fixture
def fresh(colab, tmp_path):
    """An empty environment on top of Colab's: what is installed here is seen first."""
    folder = tmp_path / "venv"
    venv.create(folder, symlinks=os.name != "nt")
    packages = "import sysconfig; print(sysconfig.get_path('purelib'))"
    below = Path(ask(folder, packages).strip(), "colab.pth")
    below.write_text(ask(colab, packages), "utf-8")
    return folder


@pytest.fixture
def kernel(fresh, wheel, tmp_path, monkeypatch):
    """A kernel that takes itself for Colab's; its name."""
    startup = tmp_path / "ipython/profile_default/startup/colab.py"
    startup.parent.mkdir(parents=True)
    startup.write_text(STARTUP.format(address=ADDRESS, wheel=str(wheel)), "utf-8")
    spec = tmp_path / "kernels/colab/kernel.json"
    spec.parent.mkdir(parents=True)
    command = [python(fresh), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    described = {
        "argv": [str(word) for word in command],
        "display_name": "Colab",
        "language": "python",
        "env": {"IPYTHONDIR": str(tmp_path / "ipython")},
    }
    spec.write_text(json.dumps(described), "utf-8")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    return "colab"


def test_environment_is_colabs(colab):
    """It has all of the list at the pinned versions, and nothing of this project's."""
    found = installed(colab)
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = {line.partition(" ;")[0] for line in lines}  # without their markers
    for name in TOOL["COLAB"]:
        version = found[name][0].partition("+")[0]  # +cpu
        assert f"{name}=={version}" in pins, name
    assert not found.keys() & {
        "jupyter-book",
        "minivit",
        "pytest",
        "scikit-image",
        "timm",
    }


def test_chapters_start_from_colab(colab, fresh):
    """What the chapters find is Colab's and no more: no package of this machine."""
    assert installed(fresh) == installed(colab)


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_chapter(chapter, kernel, fresh, tmp_path):
    notebook = nbformat.read(chapter, as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    _, named = first.source.split(ADDRESS)
    before = installed(fresh)
    folder = tmp_path / "content"
    folder.mkdir()
    NotebookClient(
        notebook,
        kernel_name=kernel,
        timeout=300,
        resources={"metadata": {"path": str(folder)}},
    ).execute()
    after = installed(fresh)
    assert before == {name: after[name] for name in before}, "Colab's were touched"
    added = after.keys() - before.keys()
    assert {"minivit", *named.split()} <= added
    if not named:  # else what they require may come with them
        assert added == {"minivit"}
