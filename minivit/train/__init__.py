"""Training: a loop to read, and an engine that survives.

`fit`, in loop.py, is the loop of the chapters. `run` trains for hours and goes on after
a crash, on one device or many: `python -m minivit.train --help`. Its loop is engine.py;
recipe.py says what it does, augment.py what it sees, place.py where it computes, and
records.py what it writes.

Copy this folder together with data.py, images.py, checkpoint.py, plots.py, vit.py,
encoder.py, attention.py and layers.py into one folder; it needs tqdm,
safetensors, torchvision, scikit-learn and matplotlib beside torch. `loop.py` alone
needs data.py and tqdm.
"""

from .engine import run
from .loop import evaluate, fit, parameter_groups, warmup_cosine
from .recipe import Recipe

__all__ = ["Recipe", "evaluate", "fit", "parameter_groups", "run", "warmup_cosine"]
