"""Create .venv with minivit and its pinned tools, unless that has been done already.

    python tools/install.py          # .venv: the versions of constraints.txt
    python tools/install.py colab    # .venv-colab: of these, what Google Colab has
    python tools/install.py floors   # .venv-floors: the lowest of package and tests

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
VENV = ROOT / ".venv"
PINS = ("--constraint", "constraints.txt")

# What a notebook in Colab finds. ipykernel runs it, there as here.
COLAB = (
    "torch",
    "torchvision",
    "numpy",
    "matplotlib",
    "scikit-learn",
    "tqdm",
    "safetensors",
    "ipython",
    "ipykernel",
)

# Folder of each environment, and what is installed there.
ENVIRONMENTS = {
    "dev": (VENV, ("--editable", ".[dev]", *PINS)),
    "colab": (ROOT / ".venv-colab", (*COLAB, *PINS)),
    "floors": (
        ROOT / ".venv-floors",
        ("--editable", ".[test]", "--resolution", "lowest-direct"),
    ),
}

WHO_AM_I = "import sys; print(sys.version, sys.base_prefix)"


def python(venv: Path) -> Path:
    """The interpreter of an environment."""
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def key(wanted: tuple[str, ...]) -> str:
    """What decides whether the environment is still the right one."""
    which = f"{sys.version} {sys.base_prefix} {ROOT} {wanted}"
    hasher = hashlib.sha256(which.encode())
    for name in ("pyproject.toml", "constraints.txt"):
        hasher.update((ROOT / name).read_bytes())
    return hasher.hexdigest()


def same_interpreter(venv: Path) -> bool:
    """Whether the environment exists and belongs to the interpreter of this file."""
    try:
        found = subprocess.check_output([python(venv), "-c", WHO_AM_I], text=True)
    except (OSError, subprocess.CalledProcessError):
        return False
    return found.strip() == f"{sys.version} {sys.base_prefix}".strip()


def same_place(venv: Path) -> bool:
    """Whether the environment was made here, and not copied from another checkout.

    In a copy, pytest and minivit would still be those of the original.
    """
    made = venv / "pyvenv.cfg"  # command = /usr/bin/python3 -m venv /home/.../.venv
    return made.exists() and f" {venv}\n" in made.read_text("utf-8")


def create(folder: Path) -> None:
    """Make an empty virtual environment, replacing what is there."""
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


def install(venv: Path, wanted: tuple[str, ...]) -> None:
    """Install with uv, which is much faster than pip, or else with pip."""
    pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # The system's certificates, as pip uses them.
    environment = os.environ | {"UV_SYSTEM_CERTS": "1"}
    uv = [python(VENV), "-m", "uv", "pip", "install", "--python", python(venv)]
    uv += [*wanted, "--build-constraint", "constraints.txt"]
    try:  # uv lives in .venv, whichever environment it fills
        subprocess.check_call([python(VENV), *pip, "uv", *PINS], cwd=ROOT)
        subprocess.check_call(uv, cwd=ROOT, env=environment)
    except (OSError, subprocess.CalledProcessError) as error:
        if "--resolution" in wanted:
            raise  # pip cannot look for the lowest versions
        print(
            f"uv does not work here ({error}). pip takes longer and ignores "
            f"UV_TORCH_BACKEND."
        )
        subprocess.check_call([python(venv), *pip, *wanted], cwd=ROOT)


def ensure(venv: Path, wanted: tuple[str, ...]) -> None:
    """Have an environment with what is wanted in it."""
    stamp = venv / "installed"
    if stamp.exists() and stamp.read_text("utf-8") == key(wanted):
        return
    print(f"Installing into {venv.name}; this is done once and takes a few minutes.")
    stamp.unlink(missing_ok=True)
    # .venv is mended, because leftovers do no harm there; another is made afresh.
    if venv != VENV or not (same_interpreter(venv) and same_place(venv)):
        create(venv)
    install(venv, wanted)
    stamp.write_text(key(wanted), "utf-8")


def main(name: str = "dev") -> None:
    if name == "floors" and sys.version_info >= (3, 13):
        sys.exit(
            "The lowest versions that minivit allows are older than Python {}.{} and "
            "would have to be compiled. Name an older one: "
            "PYTHON=python3.12 make floors".format(*sys.version_info[:2])
        )
    try:
        ensure(*ENVIRONMENTS[name])
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"The installation failed ({error}); see above. Is there a network?")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name", nargs="?", default="dev", choices=ENVIRONMENTS)
    main(parser.parse_args().name)
