"""Run chapters in place and store their outputs, in the form the tests ask for.

    python tools/execute.py [book/attention.ipynb ...]

Without arguments: all chapters. What varies from machine to machine (timings, the
version of Python) is left out of the stored file, so that a second run on the same
code changes nothing but real differences.
"""

import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parent.parent
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def execute(path: Path) -> None:
    """Run one notebook from top to bottom in a fresh kernel and store it."""
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata = nbformat.from_dict(METADATA)
    client = NotebookClient(
        notebook,
        timeout=600,
        record_timing=False,
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute()
    notebook.metadata = nbformat.from_dict(METADATA)
    nbformat.write(notebook, path)


def main(arguments: list[str]) -> int:
    # The run time that a chapter states is measured on two cores.
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    chapters = [Path(name) for name in arguments] or sorted(ROOT.glob("book/*.ipynb"))
    failed = 0
    for chapter in chapters:
        start = time.perf_counter()
        try:
            execute(chapter)
            verdict = "stored"
        except CellExecutionError as error:
            failed += 1
            verdict = f"FAILED, left as it was\n{error}"
        seconds = time.perf_counter() - start
        print(f"{chapter.name:24} {seconds:6.1f} s  {verdict}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
