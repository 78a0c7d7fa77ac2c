"""Functions, whose right answer is unique: checked by value.

Each has a class of checks, and most have a table of the mistakes that they recognise.
"""

from .dot_product import ATTENTION_MISTAKES, MASK_MISTAKES, attention
from .formulas import (
    LAYER_NORM_MISTAKES,
    PATCHIFY_MISTAKES,
    POSITION_MISTAKES,
    layer_norm,
    patchify,
    sinusoidal_positions,
)
from .loops import ACCUMULATION_MISTAKES, accumulation, generate, vocabulary
from .masks import (
    CAUSAL_MASK_MISTAKES,
    PADDING_MASK_MISTAKES,
    causal_mask,
    padding_mask,
)

# The known mistakes of each subject: what is said of them, and a function that makes
# each, to be called like the one under test.
CATALOGUE = {
    "attention": [*ATTENTION_MISTAKES, *MASK_MISTAKES],
    "causal_mask": CAUSAL_MASK_MISTAKES,
    "padding_mask": PADDING_MASK_MISTAKES,
    "sinusoidal_positions": POSITION_MISTAKES,
    "layer_norm": LAYER_NORM_MISTAKES,
    "patchify": PATCHIFY_MISTAKES,
    "accumulation": ACCUMULATION_MISTAKES,
}

__all__ = [
    "CATALOGUE",
    "accumulation",
    "attention",
    "causal_mask",
    "generate",
    "layer_norm",
    "padding_mask",
    "patchify",
    "sinusoidal_positions",
    "vocabulary",
]
