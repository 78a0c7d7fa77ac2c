"""One address, written once; and the commands and versions that are promised."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
URL = PROJECT["urls"]["Repository"]
MENTIONS = [
    ROOT / "_config.yml",
    ROOT / "CITATION.cff",
    *sorted(ROOT.glob("*.md")),
    *sorted(ROOT.glob("book/*.md")),
    *sorted(ROOT.glob("book/*.ipynb")),
]

CLASSIFIERS = [line.rpartition(" :: ")[2] for line in PROJECT["classifiers"]]
PYTHONS = [name for name in CLASSIFIERS if name.startswith("3.")]
PINS = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    if re.match(r"\w", line)
]
JOBS = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text("utf-8"))["jobs"]

no_make = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no make")

# `make test` tells the makes below it what it was told; these here begin afresh.
ENVIRONMENT = {
    name: value
    for name, value in os.environ.items()
    if name not in ("MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS")
}


def addresses(path):
    """Every address in a file that ends in the name of this repository."""
    name = re.escape(URL.rsplit("/", 1)[1])
    pattern = rf"https://[\w./-]+/{name}(?![\w-])"
    return set(re.findall(pattern, path.read_text("utf-8")))


def test_config_has_the_address():
    config = yaml.safe_load((ROOT / "_config.yml").read_text("utf-8"))
    assert config["repository"]["url"] == URL


def test_citation_has_the_address_and_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["repository-code"] == URL
    assert str(citation["version"]) == PROJECT["version"]


@pytest.mark.parametrize("path", MENTIONS, ids=lambda path: path.name)
def test_no_other_address(path):
    assert addresses(path) <= {URL}


@pytest.fixture
def copy(tmp_path):
    """A copy of the files that `make repository` works on."""
    for path in [ROOT / "Makefile", ROOT / "pyproject.toml", *MENTIONS]:
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(exist_ok=True)
        shutil.copy(path, target)
    shutil.copytree(ROOT / "tools", tmp_path / "tools")
    return tmp_path


def make_repository(folder, url):
    return subprocess.run(
        ["make", "repository", f"URL={url}", f"PYTHON={sys.executable}"],
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )


@no_make
def test_make_repository(copy):
    new = "https://example.org/somebody/vit-book"
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    run = make_repository(copy, new + "/")
    assert run.returncode == 0, run.stderr

    for path, content in before.items():
        assert path.read_bytes() == content.replace(URL.encode(), new.encode()), path
    project = tomllib.loads((copy / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["urls"]["Repository"] == new
    config = yaml.safe_load((copy / "_config.yml").read_text("utf-8"))
    assert config["repository"]["url"] == new
    for chapter in copy.glob("book/*.ipynb"):
        assert f"git+{new}" in chapter.read_text("utf-8")

    # And back again: what it wrote, it also finds.
    assert make_repository(copy, URL).returncode == 0
    for path, content in before.items():
        assert path.read_bytes() == content, path


@no_make
@pytest.mark.parametrize(
    "url", ["", "github.com/a/b", 'https://github.com/a"b', "https://a.b/c d"]
)
def test_make_repository_refuses(copy, url):
    before = (copy / "pyproject.toml").read_bytes()
    run = make_repository(copy, url)
    assert run.returncode != 0
    assert "https://github.com/OWNER/NAME" in run.stderr
    assert (copy / "pyproject.toml").read_bytes() == before


@no_make
def test_help_lists_every_target():
    output = subprocess.check_output(
        ["make", "help"], cwd=ROOT, env=ENVIRONMENT, text=True
    )
    makefile = (ROOT / "Makefile").read_text("utf-8")
    phony = re.search(r"^\.PHONY:(.*)$", makefile, re.M)[1].split()
    assert [line.split()[0] for line in output.splitlines()] == phony


# --- versions -----------------------------------------------------------------------


def needed(*extras):
    """What the package needs, and what these extras need beside it."""
    optional = PROJECT["optional-dependencies"]
    lines = [*PROJECT["dependencies"], *(line for e in extras for line in optional[e])]
    return [Requirement(line) for line in lines]


def test_versions_are_floors_in_pyproject_and_exact_in_constraints():
    """A cap would make Colab reinstall torch; a floor in a lock locks nothing."""
    pinned = {pin.name for pin in PINS}
    for requirement in needed(*PROJECT["optional-dependencies"]):
        if requirement.name == "minivit":
            continue
        operators = [limit.operator for limit in requirement.specifier]
        assert operators == [">="], f"{requirement}: floors only"
        assert requirement.name in pinned, f"run make lock: {requirement}"
    assert {limit.operator for pin in PINS for limit in pin.specifier} == {"=="}
    for line in (ROOT / "constraints.in").read_text("utf-8").splitlines():
        if line and not line.startswith("#"):
            assert Requirement(line) in PINS, "run make lock"


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_says_one_version_for_every_python_and_system(python, platform):
    machine = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": platform,
        "os_name": "nt" if platform == "win32" else "posix",
    }
    names = [pin.name for pin in PINS if not pin.marker or pin.marker.evaluate(machine)]
    assert len(set(names)) == len(names)
    direct = {requirement.name for requirement in needed("book", "test", "dev")}
    assert direct - {"minivit"} <= set(names)


@pytest.mark.parametrize("page", ["README.md", "book/index.md"])
def test_the_floors_that_readers_are_told(page):
    """Every "torch 2.5 or newer" is what pyproject.toml asks for."""
    floors = {r.name: str(r.specifier) for r in needed()}
    floors["python"] = PROJECT["requires-python"]
    told = re.findall(r"(\w+) (\d[\d.]*) or newer", (ROOT / page).read_text("utf-8"))
    assert told
    for name, number in told:
        assert floors[name.lower()] == f">={number}", f"{name} {number}"


@pytest.mark.skipif(
    Path(sys.prefix).name != ".venv-floors", reason="make floors looks at it"
)
def test_the_floors_are_what_is_tried():
    """A floor that nothing can be installed with would be raised in silence."""
    for requirement in needed("test"):
        (floor,) = requirement.specifier
        tried = Version(version(requirement.name)).public  # without +cpu
        assert Version(tried) == Version(floor.version), requirement.name


# --- other machines -----------------------------------------------------------------


def commands(job):
    return [step["run"] for step in JOBS[job]["steps"] if "run" in step]


def test_every_python_is_tried():
    assert JOBS["pythons"]["strategy"]["matrix"]["python"] == PYTHONS
    assert PROJECT["requires-python"] == f">={PYTHONS[0]}"
    assert ".ci/run" in commands("pythons")


def test_every_system_is_tried_as_the_readme_says():
    systems = JOBS["systems"]["strategy"]["matrix"]["system"]
    assert [name.split("-")[0] for name in systems] == ["ubuntu", "macos", "windows"]
    assert systems[0].endswith("-arm")
    assert {"Linux", "MacOS", "Windows"} < set(CLASSIFIERS)
    install, test = commands("systems")
    readme = (ROOT / "README.md").read_text("utf-8")
    assert install.split()[1].replace("/", "\\") in readme
    assert test.splitlines()[-1] in readme


def test_the_floors_are_tried():
    assert commands("floors") == ["make floors"]
    assert JOBS["floors"]["env"]["PYTHON"] == f"python{PYTHONS[0]}"


@pytest.mark.parametrize("folder", ["minivit", "tests", "tools", "book/_ext"])
def test_text_is_utf_8_on_every_system(folder):
    """Without a name, Windows would read and write files in an encoding of its own."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(call, ast.Call):
                continue
            name = getattr(call.func, "attr", getattr(call.func, "id", ""))
            if name in ("read_text", "write_text"):
                said = [*call.args, *(k.value for k in call.keywords)]
                assert any(ast.unparse(value) == "'utf-8'" for value in said), (
                    f"{path.relative_to(ROOT)}:{call.lineno}: {ast.unparse(call)}"
                )
            assert ast.unparse(call.func) != "open", f"{path}: use Path's own methods"
