"""Create .venv with minivit and its pinned tools, unless that has been done already.

    python tools/install.py

Run by every make target, and by hand where there is no make. A second run compares
one hash and ends: it installs nothing and needs no network.
"""

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
VENV = ROOT / ".venv"
STAMP = VENV / "installed"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
PYTHON = BIN / ("python.exe" if os.name == "nt" else "python")

WHO_AM_I = "import sys; print(sys.version, sys.base_prefix)"


def key() -> str:
    """What decides whether the environment is still the right one."""
    hasher = hashlib.sha256(f"{sys.version} {sys.base_prefix}".encode())
    for name in ("pyproject.toml", "constraints.txt"):
        hasher.update((ROOT / name).read_bytes())
    return hasher.hexdigest()


def same_interpreter() -> bool:
    """Whether .venv exists and belongs to the interpreter that runs this file."""
    try:
        found = subprocess.check_output([PYTHON, "-c", WHO_AM_I], text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return False
    return found == f"{sys.version} {sys.base_prefix}".strip()


def create() -> None:
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
    if VENV.exists():
        shutil.rmtree(VENV)
    venv.create(VENV, with_pip=True)


def install() -> None:
    """Install uv, and with it everything else: ten times faster than pip."""
    environment = os.environ | {
        "UV_SYSTEM_CERTS": "1",  # the system's certificates, as pip uses them
        "VIRTUAL_ENV": str(VENV),
    }
    pip = [PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.check_call([*pip, "uv", "-c", "constraints.txt"], cwd=ROOT)
    uv = [PYTHON, "-m", "uv", "pip", "install", "--editable", ".[dev]"]
    uv += ["--constraint", "constraints.txt", "--build-constraint", "constraints.txt"]
    subprocess.check_call(uv, cwd=ROOT, env=environment)


def main() -> None:
    wanted = key()
    if STAMP.exists() and STAMP.read_text() == wanted:
        return
    print("Installing into .venv; this is done once and takes a few minutes.")
    STAMP.unlink(missing_ok=True)
    try:
        if not same_interpreter():
            create()
        install()
    except subprocess.CalledProcessError as error:
        sys.exit(
            f"The installation failed (exit status {error.returncode}); see above."
        )
    STAMP.write_text(wanted)


if __name__ == "__main__":
    main()
