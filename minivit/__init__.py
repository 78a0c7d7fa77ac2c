"""minivit: the Transformer and the Vision Transformer, readable and checked."""

from .attention import MultiHeadAttention, causal_mask, padding_mask
from .decoder import Decoder, DecoderLayer
from .encoder import Encoder, EncoderLayer
from .generation import beam_search, greedy_search, sample
from .layers import DropPath, FeedForward, LayerNorm, LayerScale
from .positions import (
    LearnedPositions,
    SinusoidalPositions,
    alibi_bias,
    alibi_slopes,
    resample_positions,
    rotate,
    rotate_2d,
    sinusoidal_positions,
    sinusoidal_positions_2d,
)
from .predict import load
from .train import evaluate, fit
from .transfer import pretrained
from .transformer import Transformer
from .vit import (
    PatchEmbed,
    ViT,
    patchify,
    unpatchify,
    vit_b_16,
    vit_b_32,
    vit_l_16,
    vit_s_4,
    vit_s_16,
    vit_ti_16,
)

__all__ = [
    "Decoder",
    "DecoderLayer",
    "DropPath",
    "Encoder",
    "EncoderLayer",
    "FeedForward",
    "LayerNorm",
    "LayerScale",
    "LearnedPositions",
    "MultiHeadAttention",
    "PatchEmbed",
    "SinusoidalPositions",
    "Transformer",
    "ViT",
    "alibi_bias",
    "alibi_slopes",
    "beam_search",
    "causal_mask",
    "evaluate",
    "fit",
    "greedy_search",
    "load",
    "padding_mask",
    "patchify",
    "pretrained",
    "resample_positions",
    "rotate",
    "rotate_2d",
    "sample",
    "sinusoidal_positions",
    "sinusoidal_positions_2d",
    "unpatchify",
    "vit_b_16",
    "vit_b_32",
    "vit_l_16",
    "vit_s_4",
    "vit_s_16",
    "vit_ti_16",
]
