"""Create .venv with minivit and its pinned tools, unless that has been done already.

    python tools/install.py             # .venv: the versions in constraints.txt
    python tools/install.py --floors    # .venv-floors: the lowest of pyproject.toml

Run by every make target, and by hand where there is no make. A second run compares
one hash and ends: it installs nothing and needs no network.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys

if sys.version_info < (3, 11):
    sys.exit(
        "minivit needs Python 3.11 or newer; this one is {}.{}. Name another: "
        "PYTHON=python3.12 make ...".format(*sys.version_info[:2])
    )

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAMP = "installed"  # a file in the environment that says what it holds

# What uv installs into each environment.
LOCKED = ["--editable", ".[dev]", "--constraint", "constraints.txt"]
LOWEST = ["--editable", ".[test]", "--resolution", "lowest-direct"]
LOWEST += ["--upgrade"]  # what is there already counts for nothing: a floor may sink

WHO_AM_I = "import sys; print(sys.version, sys.base_prefix)"


def python(venv: Path) -> Path:
    """The interpreter of an environment."""
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def key(wanted: list[str]) -> str:
    """What decides whether the environment is still the right one."""
    hasher = hashlib.sha256(f"{sys.version} {sys.base_prefix} {wanted}".encode())
    for name in ("pyproject.toml", "constraints.txt"):
        hasher.update((ROOT / name).read_bytes())
    return hasher.hexdigest()


def same_interpreter(venv: Path) -> bool:
    """Whether the environment exists and belongs to the interpreter that runs this."""
    try:
        found = subprocess.check_output([python(venv), "-c", WHO_AM_I], text=True)
    except (OSError, subprocess.CalledProcessError):
        return False
    return found.strip() == f"{sys.version} {sys.base_prefix}".strip()


def create(folder: Path) -> None:
    """Make an empty virtual environment, replacing one of another interpreter."""
    try:
        import ensurepip  # noqa: F401
        import venv
    except ImportError:
        sys.exit(
            "This Python cannot make virtual environments (no 'venv' or 'ensurepip'). "
            "Debian and Ubuntu keep them in a package of their own: "
            "apt install python{}.{}-venv".format(*sys.version_info[:2])
        )
    if folder.exists():
        shutil.rmtree(folder)
    venv.create(folder, with_pip=True)


def install(venv: Path, wanted: list[str]) -> None:
    """Install uv, and with it everything else: ten times faster than pip."""
    environment = os.environ | {
        "UV_SYSTEM_CERTS": "1",  # the system's certificates, as pip uses them
        "VIRTUAL_ENV": str(venv),
    }
    pip = [python(venv), "-m", "pip", "install", "--quiet"]
    pip += ["--disable-pip-version-check", "uv", "--constraint", "constraints.txt"]
    subprocess.check_call(pip, cwd=ROOT)
    uv = [python(venv), "-m", "uv", "pip", "install", *wanted]
    uv += ["--build-constraint", "constraints.txt"]
    subprocess.check_call(uv, cwd=ROOT, env=environment)


def main() -> None:
    parser = argparse.ArgumentParser(description="Create an environment for minivit.")
    parser.add_argument(
        "--floors", action="store_true", help="the lowest versions, in .venv-floors"
    )
    floors = parser.parse_args().floors
    if floors and sys.version_info >= (3, 13):
        sys.exit(
            "The lowest versions that minivit allows are older than Python {}.{} and "
            "would have to be compiled. Name an older one: "
            "PYTHON=python3.12 make floors".format(*sys.version_info[:2])
        )
    venv = ROOT / (".venv-floors" if floors else ".venv")
    wanted = LOWEST if floors else LOCKED

    stamp = venv / STAMP
    if stamp.exists() and stamp.read_text("utf-8") == key(wanted):
        return
    print(f"Installing into {venv.name}; this is done once and takes a few minutes.")
    stamp.unlink(missing_ok=True)
    try:
        if not same_interpreter(venv):
            create(venv)
        install(venv, wanted)
    except subprocess.CalledProcessError as error:
        sys.exit(
            f"The installation failed (exit status {error.returncode}); see above."
        )
    stamp.write_text(key(wanted), "utf-8")


if __name__ == "__main__":
    main()
