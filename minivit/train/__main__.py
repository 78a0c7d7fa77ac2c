"""Train from the command line: python -m minivit.train --data digits --out runs/a."""

import argparse
import dataclasses
import json
import os
import sys
import typing
from collections.abc import Sequence
from pathlib import Path

from .engine import run
from .recipe import Recipe


def main(argv: Sequence[str] | None = None) -> int:
    """Run one recipe; 0 when it is finished or was asked to stop, 2 for an error."""
    given = vars(_parser().parse_args(argv))
    resume, file = given.pop("resume"), given.pop("recipe")
    try:
        if resume and not file:
            file = Path(given.get("out", Recipe.out), "run.json")
            if not file.exists():  # killed before it wrote anything
                if given.keys() <= {"out"}:
                    raise ValueError(f"there is no {file} to go on from")
                file = None
        settings = json.loads(Path(file).read_text("utf-8")) if file else {}
        settings = settings.get("recipe", settings)
        recipe = Recipe(**{**settings, **given})
        history = run(recipe, resume=resume)
    except (OSError, ValueError, TypeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if os.environ.get("RANK", "0") == "0":
        last = {name: values[-1] for name, values in history.items()}
        print(json.dumps(last))
        if last.get("epoch", 0) < recipe.epochs:
            print(f"stopped; go on with --resume --out {recipe.out}", file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    """Make an option of each field of the recipe."""
    parser = argparse.ArgumentParser(
        prog="python -m minivit.train",
        description="Train a Vision Transformer. Several devices: torchrun "
        "--nproc-per-node=N -m minivit.train ...",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        default=False,
        help="go on with the run in --out",
    )
    parser.add_argument(
        "--recipe", default=None, help="JSON file of settings, such as another run.json"
    )
    types = typing.get_type_hints(Recipe)
    for field in dataclasses.fields(Recipe):
        kind = types[field.name]
        options = typing.get_args(kind)  # int | None
        kind = options[0] if options else kind
        default = "" if field.default is None else f" ({field.default})"
        name = f"--{field.name.replace('_', '-')}"
        text = f"{field.metadata['help']}{default}".replace("%", "%%")
        if kind is bool:
            parser.add_argument(name, action=argparse.BooleanOptionalAction, help=text)
        else:
            choices = field.metadata["choices"] or None
            parser.add_argument(name, type=kind, choices=choices, help=text)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
