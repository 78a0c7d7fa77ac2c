"""Put a finished run into the package: its weights, its log, and a card about both.

    python tools/ship.py runs/a vit_cifar10 --data cifar10/train

The figures on the card come from what the run left behind. Its words on data and
choices are those of the model made so far, from CIFAR-10 as JPEG files: adapt them for
others.
"""

import argparse
import json
import shutil
import sys
import textwrap
from pathlib import Path

from minivit import load
from minivit.checkpoint import write
from minivit.predict import measure

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 12_000_000  # bytes

CARD = """\
# {name}

A plain Vision Transformer for images of {size} pixels: linear patches of {patch}
pixels, CLS token, learned positions, {layers} layers of width {width} with {heads}
heads; {parameters} parameters, kept as {dtype} ({megabytes:.1f} MB).

| | |
|---|---|
| accuracy | **{accuracy:.2%}**: {right:,} of {val:,} validation images |
| trained on | {trained_on} images, {epochs} epochs, {minutes:.0f} minutes |
| hardware | {hardware} |
| seeds | {seed}; of the division into training and validation images {split_seed} |
| classes | {classes} |

## Data

The 50,000 training images of CIFAR-10 (Krizhevsky 2009), encoded anew as JPEG of
quality 75, in a folder with one folder for each class. A tenth of each class was held
out to measure with. The test images of CIFAR-10 were never seen.

The accuracy is that of the weights as they are kept, averaged, after the last epoch,
not the best one (in training, with other rounding, {val_accuracy:.2%} were measured).
Optimizer and learning rate were chosen in runs of up to three epochs, measured on the
same validation images; all else was fixed before.

## Recipe

```sh
{command}
```

`book/logs/{name}/` holds all settings (`run.json`) and a line for each epoch
(`metrics.jsonl`).{note}

## Measure it again

On the same folder, of which the seed holds out the same images:

```sh
python -m minivit.predict {name} --data {data}
```

On the 10,000 test images, which torchvision downloads:

```sh
python -m minivit.predict {name} --data cifar10 --test
```

The second figure is not known yet: the model was made on a machine without a network.

## What it is not for

It has seen ten kinds of things, each in the middle of a tiny picture. Shown anything
else, it names one of the ten all the same, often with confidence: the chapter *Looking
inside* shows how. It is for learning how such a model works.
"""


def main(argv: list[str] | None = None) -> int:
    """Copy, and write the card."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("name")
    parser.add_argument("--data", required=True, help="as in training, to measure on")
    parser.add_argument("--note", default="", help="a sentence for the card")
    given = parser.parse_args(argv)
    weights = given.run / "model.safetensors"
    if weights.stat().st_size > LIMIT:
        sys.exit(f"{weights} has {weights.stat().st_size:,} bytes, more than {LIMIT:,}")
    trained = load(weights)
    found = measure(trained, given.data)
    run = json.loads((given.run / "run.json").read_text("utf-8"))
    rows = (given.run / "metrics.jsonl").read_text("utf-8").splitlines()
    last, vit, recipe = json.loads(rows[-1]), run["vit"], run["recipe"]
    hardware = run["hardware"]
    where = hardware.get("gpu", f"{hardware['cores']} cores of {hardware['processor']}")
    card = CARD.format(
        name=given.name,
        size=vit["image_size"],
        patch=vit["patch_size"],
        layers=vit["num_layers"],
        width=vit["embed_dim"],
        heads=vit["num_heads"],
        parameters=f"{run['parameters']:,}",
        dtype=recipe["weights_dtype"],
        megabytes=weights.stat().st_size / 1e6,
        accuracy=found["accuracy"],
        val_accuracy=last["val_accuracy"],
        right=found["hits"],
        val=found["images"],
        trained_on=f"{run['images'][0]:,}",
        epochs=last["epoch"],
        minutes=last["seconds"] / 60,
        hardware=f"{where}; processes: {hardware['processes']}; "
        f"torch {hardware['torch']}",
        seed=recipe["seed"],
        split_seed=recipe["split_seed"],
        classes=", ".join(trained.classes),
        command=" \\\n    ".join(
            textwrap.wrap(run["command"], 80, break_on_hyphens=False)
        ),
        note=f" {given.note}" if given.note else "",
        data=recipe["data"],
    )
    target = ROOT / "minivit" / "weights"
    log = ROOT / "book" / "logs" / given.name
    for folder in (target, log):
        folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(weights, target / f"{given.name}.safetensors")
    for name in ("run.json", "metrics.jsonl"):
        shutil.copyfile(given.run / name, log / name)
    write(target / f"{given.name}.md", card.encode())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
