"""Check from the command line: python -m minivit.check package.module:Name --as vit."""

import argparse
import importlib
import inspect
import json
import sys
from collections.abc import Sequence
from typing import Any

from .. import check


def main(argv: Sequence[str] | None = None) -> int:
    """Run one checker; 0 if nothing is wrong, 1 otherwise."""
    checkers = [name for name in check.__all__ if name.islower()]
    parser = argparse.ArgumentParser(
        prog="python -m minivit.check",
        description="Check a function, or a class that is built with --kwargs first.",
    )
    parser.add_argument("target", help="package.module:Name")
    parser.add_argument("--as", dest="kind", required=True, choices=checkers)
    parser.add_argument("--kwargs", default="{}", help="JSON, to build a class with")
    parser.add_argument("--options", default="{}", help="JSON, for the checker")
    given = parser.parse_args(argv)
    sys.path.insert(0, "")
    module_name, _, name = given.target.partition(":")
    kwargs = _json(parser, "--kwargs", given.kwargs)
    options = _json(parser, "--options", given.options)
    checker = getattr(check, given.kind)
    known = inspect.signature(checker).parameters
    options = {k: v for k, v in kwargs.items() if k in known} | options
    try:
        target: Any = importlib.import_module(module_name)
        for part in name.split("."):
            target = getattr(target, part)
        if inspect.isclass(target) or kwargs:
            target = target(**kwargs)
        report = checker(target, **options)
    except (ImportError, AttributeError, SyntaxError, TypeError, ValueError) as error:
        parser.error(f"cannot check {given.target!r} as {given.kind}: {error}")
    sys.stdout.buffer.write(f"{report}\n".encode())  # a shell's own letters lack √
    return 0 if report else 1


def _json(parser: argparse.ArgumentParser, option: str, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        parser.error(f"{option} is no JSON: {error}")
    if not isinstance(found, dict):
        parser.error(f"{option} must be a JSON object, got {text}")
    return found


if __name__ == "__main__":
    raise SystemExit(main())
