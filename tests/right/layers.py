"""Encoder and decoder layers."""

import random

import torch
import torch.nn.functional as F
from torch import nn

from . import right
from .attentions import (
    Causal,
    E,
    Fused,
    H,
    HeadByHead,
    MaskRequired,
    RmsNorm,
    Rotary,
    Separate,
)

bare = {"embed_dim": E, "mask_name": None}


class SwiGlu(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up, self.down = nn.Linear(E, 4 * E, bias=False), nn.Linear(2 * E, E)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Parts(nn.Module):
    attend, think, norm = Fused, SwiGlu, RmsNorm

    def __init__(self):
        super().__init__()
        self.attn, self.ff = self.attend(), self.think()
        self.norm1, self.norm2 = self.norm(E), self.norm(E)


@right("encoder_layer", **bare)
class RootMeanSquare(Parts):
    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.ff(self.norm2(x))


@right("encoder_layer", **bare)
class RotaryLayer(RootMeanSquare):
    attend = Rotary


@right("encoder_layer", **bare, causal=True)
class GptBlock(RootMeanSquare):
    attend, norm = Causal, nn.LayerNorm


@right("encoder_layer", **bare)
class Parallel(Parts):
    def forward(self, x):
        y = self.norm1(x)
        return x + self.attn(y) + self.ff(self.norm2(x))


@right("encoder_layer", **bare)
class FusedParallel(nn.Module):
    """One map in and one out for attention and feed-forward together."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(E, bias=False)
        self.inner = nn.Linear(E, 5 * E, bias=False)
        self.outer = nn.Linear(3 * E, E, bias=False)

    def forward(self, x):
        y = self.inner(self.norm(x))
        q, k, v = y[..., : 3 * E].unflatten(-1, (3, H, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.outer(torch.cat([mixed, F.gelu(y[..., 3 * E :])], dim=-1))


@right("encoder_layer", **bare)
class PostRootMeanSquare(Parts):
    def forward(self, x):
        x = self.norm1(x + self.attn(x))
        return self.norm2(x + self.ff(x))


@right("encoder_layer", **bare)
class Sandwich(Parts):
    def __init__(self):
        super().__init__()
        self.norm3, self.norm4 = RmsNorm(E), RmsNorm(E)

    def forward(self, x):
        x = x + self.norm3(self.attn(self.norm1(x)))
        return x + self.norm4(self.ff(self.norm2(x)))


@right("encoder_layer", **bare)
class ReZero(nn.Module):
    """No norm; branches that begin at zero."""

    def __init__(self):
        super().__init__()
        self.attn, self.ff = Fused(), SwiGlu()
        self.alpha = nn.Parameter(torch.zeros(()))
        self.beta = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        x = x + self.alpha * self.attn(x)
        return x + self.beta * self.ff(x)


class OwnNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))
        self.beta = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        mean, var = x.mean(-1, True), x.var(-1, unbiased=False, keepdim=True)
        return (x - mean) * torch.rsqrt(var + 1e-5) * self.gamma + self.beta


@right("encoder_layer", **bare)
class PostOwnNorm(PostRootMeanSquare):
    norm = OwnNorm


@right("encoder_layer", embed_dim=E, mask_name=None, padding_name="key_padding_mask")
class PaddingOnly(Parts):
    """Takes a padding mask (B, L) and nothing else; True = padding, as torch."""

    attend = staticmethod(lambda: nn.MultiheadAttention(E, H, batch_first=True))
    norm = nn.LayerNorm

    def forward(self, x, key_padding_mask=None):
        y = self.norm1(x)
        x = x + self.attn(y, y, y, key_padding_mask=key_padding_mask)[0]
        return x + self.ff(self.norm2(x))


@right(
    "encoder_layer",
    embed_dim=E,
    mask_name=None,
    padding_name="src_key_padding_mask",
)
class TorchPadding(nn.TransformerEncoderLayer):
    def __init__(self):
        super().__init__(E, H, 2 * E, batch_first=True)


@right(
    "encoder_layer",
    embed_dim=E,
    mask_name="attention_mask",
    mask_means="add",
    mask_dims=4,
)
class Additive(Parts):
    """A float mask (B, 1, L, L) is added to the scores, as in Hugging Face's models."""

    def forward(self, hidden, attention_mask=None):
        q, k, v = (t.transpose(1, 2) for t in self.attn.heads(self.norm1(hidden)))
        scores = q @ k.mT * q.size(-1) ** -0.5
        if attention_mask is not None:
            scores = scores + attention_mask
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        hidden = hidden + self.attn.proj(mixed)
        return (hidden + self.ff(self.norm2(hidden)),)


@right(
    "decoder_layer",
    embed_dim=E,
    mask_name="tgt_mask",
    memory_mask_name="src_mask",
    mask_dims=3,
    arguments="x memory",
)
class AnnotatedDecoder(nn.Module):
    """Both masks must be given."""

    def __init__(self):
        super().__init__()
        self.one, self.two = MaskRequired(), MaskRequired()
        self.ff = nn.Sequential(nn.Linear(E, 48), nn.ReLU(), nn.Linear(48, E))
        self.norms = nn.ModuleList([OwnNorm(E) for _ in range(3)])

    def forward(self, x, memory, src_mask, tgt_mask):
        y = self.norms[0](x)
        x = x + self.one(y, y, y, tgt_mask)
        x = x + self.two(self.norms[1](x), memory, memory, src_mask)
        return x + self.ff(self.norms[2](x))


class WithMask(Parts):
    attend, norm = HeadByHead, nn.LayerNorm

    def forward(self, x, mask=None):
        x = x + self.attn(self.norm1(x), mask)
        return x + self.ff(self.norm2(x))


@right("encoder_layer")
class InFloat32Only(WithMask):
    """No part of it can be judged in float64."""


@right("encoder_layer")
class LayerDrop(WithMask):
    """Left out at random while training; the dice are Python's."""

    def forward(self, x, mask=None):
        if self.training and random.random() < 0.3:
            return x
        return super().forward(x, mask)


class Experts(nn.Module):
    """Each token goes to two of eight networks; some get none of a small batch."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(E, 8, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(E, 2 * E), nn.GELU(), nn.Linear(2 * E, E))
            for _ in range(8)
        )

    def forward(self, x):
        weights, chosen = self.gate(x).softmax(-1).topk(2, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            hit = chosen == number
            here = hit.any(-1)
            if here.any():
                out[here] += (weights * hit).sum(-1)[here][:, None] * expert(x[here])
        return out


@right("encoder_layer")
class MixtureOfExperts(WithMask):
    think = Experts


@right("encoder_layer")
class AutocastInside(WithMask):
    attend = Separate

    def forward(self, x, mask=None):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(x, mask)
