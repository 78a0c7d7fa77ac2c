"""One address, written once; and the commands that the README promises."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

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


@pytest.mark.parametrize(
    "url", ["", "github.com/a/b", 'https://github.com/a"b', "https://a.b/c d"]
)
def test_make_repository_refuses(copy, url):
    before = (copy / "pyproject.toml").read_bytes()
    run = make_repository(copy, url)
    assert run.returncode != 0
    assert "https://github.com/OWNER/NAME" in run.stderr
    assert (copy / "pyproject.toml").read_bytes() == before


def test_help_lists_every_target():
    output = subprocess.check_output(
        ["make", "help"], cwd=ROOT, env=ENVIRONMENT, text=True
    )
    makefile = (ROOT / "Makefile").read_text("utf-8")
    phony = re.search(r"^\.PHONY:(.*)$", makefile, re.M)[1].split()
    assert [line.split()[0] for line in output.splitlines()] == phony


def test_versions_are_floors_in_pyproject_and_exact_in_constraints():
    """A cap would make Colab reinstall torch; a floor in a lock locks nothing."""
    extras = PROJECT["optional-dependencies"].values()
    wanted = [*PROJECT["dependencies"], *(name for extra in extras for name in extra)]
    pins = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pinned = {
        pin.partition("==")[0]: pin for pin in pins if re.match(r"[\w.-]+==", pin)
    }
    for requirement in wanted:
        match = re.fullmatch(r"([\w.-]+)(?:\[[\w,]+\])?(?:>=[\d.]+)?", requirement)
        assert match, f"{requirement}: floors only"
        assert match[1] in pinned or match[1] == "minivit", (
            f"run make lock: {requirement}"
        )
    for pin in (ROOT / "constraints.in").read_text("utf-8").splitlines():
        if pin and not pin.startswith("#"):
            assert pin in pins, "run make lock"
