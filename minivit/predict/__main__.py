"""Name what pictures show: python -m minivit.predict vit_cifar10 photograph.jpg."""

import argparse
import sys
from collections.abc import Sequence

import torch

from ..images import read
from . import Trained, load, measure


def main(argv: Sequence[str] | None = None) -> int:
    """Name what pictures show, or measure a model; 0, or 2 for an error."""
    parser = _parser()
    given = parser.parse_args(argv)
    if given.top < 1:
        parser.error(f"--top must be at least 1, got {given.top}")
    if bool(given.images) == bool(given.data):
        parser.error("give pictures, or --data")
    try:
        trained = load(given.weights)
        if given.images:
            good = [_name(trained, file, given.top) for file in given.images]
            return 0 if all(good) else 2
        found = measure(trained, given.data, test=given.test, data_dir=given.data_dir)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"{found['hits']:,} of {found['images']:,} images right, none of which "
        f"it was trained on: {found['accuracy']:.2%}"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m minivit.predict",
        description="Say what pictures show, the likeliest classes first.",
    )
    parser.add_argument("weights", help="vit_cifar10, or a model.safetensors")
    parser.add_argument("images", nargs="*", help="picture files")
    parser.add_argument("--top", type=int, default=3, help="classes shown (3)")
    parser.add_argument(
        "--data", help="measure on what was held out of this data in training instead"
    )
    parser.add_argument(
        "--test", action="store_true", help="of cifar10 or fashion-mnist: the test part"
    )
    parser.add_argument(
        "--data-dir", default="data", help="folder for downloads (data)"
    )
    return parser


def _name(trained: Trained, file: str, top: int) -> bool:
    """Say what a picture shows; False if it cannot be read."""
    try:
        shares = _shares(trained, file)
    except (OSError, ValueError) as error:  # the other pictures are shown
        print(f"error: {error}", file=sys.stderr)
        return False
    best = sorted(shares.items(), key=lambda pair: -pair[1])[:top]
    answer = "  ".join(f"{name} {share:.1%}" for name, share in best)
    print(f"{file}: {answer}")
    return True


@torch.no_grad()
def _shares(trained: Trained, file: str) -> dict[str, float]:
    image = trained.preprocess(read(file))[None]  # (1, C, height, width)
    shares = trained.model(image).softmax(dim=-1)[0]  # (K,)
    return dict(zip(trained.classes, shares.tolist(), strict=True))


if __name__ == "__main__":
    raise SystemExit(main())
