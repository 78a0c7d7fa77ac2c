"""Write a new address of the repository into every file that mentions it.

    python tools/repository.py https://github.com/OWNER/NAME

The address is kept in pyproject.toml; what is found there is replaced in the files
that people read or click on. Needs nothing but Python.
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MENTIONS = (
    "pyproject.toml",
    "_config.yml",
    "CITATION.cff",
    "*.md",
    "book/*.md",
    "book/*.ipynb",
)


def current() -> str:
    """The address that pyproject.toml states."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return project["urls"]["Repository"]


def replace(new: str) -> list[Path]:
    """Replace the current address by ``new`` and return the files that changed."""
    new = new.removesuffix("/").removesuffix(".git")
    if not re.fullmatch(r"https://[\w.-]+(/[\w.-]+)+", new):
        raise ValueError(
            f"not an address like https://github.com/OWNER/NAME: {new or '(empty)'}"
        )
    # Not followed by more of a name: minivit must not match minivit-tools.
    old = re.compile(re.escape(current()) + r"(?![\w-])")
    changed = []
    for path in sorted({path for mention in MENTIONS for path in ROOT.glob(mention)}):
        before = path.read_bytes().decode("utf-8")
        after = old.sub(lambda match: new, before)
        if after != before:
            path.write_bytes(after.encode("utf-8"))
            changed.append(path)
    return changed


if __name__ == "__main__":
    try:
        files = replace(sys.argv[1] if len(sys.argv) == 2 else "")
    except ValueError as error:
        sys.exit(f"make repository URL=...: {error}")
    for file in files:
        print(file.relative_to(ROOT))
