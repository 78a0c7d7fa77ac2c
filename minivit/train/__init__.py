"""Training: a loop to read, and an engine that survives.

`fit` is the loop of the chapters. `run` trains for hours and goes on after a crash, on
one device or many: `python -m minivit.train --help`.

Copy this folder together with data.py, images.py, checkpoint.py, plots.py, vit.py,
encoder.py, attention.py and layers.py into one folder; it needs tqdm,
safetensors, torchvision, scikit-learn and matplotlib beside torch. `loop.py` alone
needs data.py and tqdm.
"""

from .engine import run
from .loop import evaluate, fit, parameter_groups, warmup_cosine
from .recipe import Recipe

__all__ = ["Recipe", "evaluate", "fit", "parameter_groups", "run", "warmup_cosine"]
