"""Find out what is wrong with an attention, a Transformer or a ViT, anybody's.

Copy this folder together with vit.py, transformer.py, encoder.py, decoder.py,
attention.py, positions.py, layers.py and generation.py into one folder.

Two ways of knowing. Where the right answer is unique (a function), outputs are
compared with the reference, and, if they differ, with a bank of known mistakes: a match
names the mistake. Where the weights are the user's (a module), properties are tested
that hold for any weights: the future must not change the past, padding must not change
anything.

    >>> from minivit import check
    >>> from minivit.attention import attention
    >>> print(check.attention(attention))
    attention: all 12 checks passed

Letters for shapes: B batch, L queries, S keys, E embed, H heads, D head, N patches,
K classes, V vocabulary.
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
from .heads import multi_head_attention
from .loops import ACCUMULATION_MISTAKES, accumulation, generate, vocabulary
from .masks import (
    CAUSAL_MASK_MISTAKES,
    PADDING_MASK_MISTAKES,
    causal_mask,
    padding_mask,
)
from .report import Finding, Report
from .seq2seq import transformer
from .stacks import decoder_layer, encoder_layer
from .vision import vit

# The known mistakes of each subject, as rows with what a `Finding` says (`check`,
# `symptom`, `cause`, `look_at`) and with `fn`, which makes the mistake and is called
# like the function under test.
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
    "Finding",
    "Report",
    "accumulation",
    "attention",
    "causal_mask",
    "decoder_layer",
    "encoder_layer",
    "generate",
    "layer_norm",
    "multi_head_attention",
    "padding_mask",
    "patchify",
    "sinusoidal_positions",
    "transformer",
    "vit",
    "vocabulary",
]
