"""Whole sequence-to-sequence models with one mistake each."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from minivit import causal_mask, sinusoidal_positions

from . import mutant
from .modules import CrossLayer, E, Layer

SRC, TGT, PAD = 13, 11, 0
sizes = {"src_vocab_size": SRC, "tgt_vocab_size": TGT}


class Translator(nn.Module):
    """A right model of two right layers, for mutants to break one step of."""

    def __init__(self):
        super().__init__()
        self.src_embed, self.tgt_embed = nn.Embedding(SRC, E), nn.Embedding(TGT, E)
        self.register_buffer("table", sinusoidal_positions(32, E))
        self.layer, self.cross = PaddedLayer(), PaddedCrossLayer()
        self.norm, self.head = nn.LayerNorm(E), nn.Linear(E, TGT)

    def place(self, x):
        return x + self.table[: x.size(1)]

    def source_mask(self, src):
        return (src != PAD)[:, None, None, :]

    def encode(self, src):
        x = self.place(self.src_embed(src))
        return self.norm(self.layer(x, self.source_mask(src)))

    def causal(self, tgt):
        return causal_mask(tgt.size(1))

    def write(self, tgt, memory, src):
        x = self.place(self.tgt_embed(tgt))
        return self.cross(x, memory, self.causal(tgt), self.source_mask(src))

    def forward(self, src, tgt):
        return self.head(self.norm(self.write(tgt, self.encode(src), src)))


def attend(module, x, memory, mask):
    """torch's attention with a mask (B, 1, L or 1, S), True = may look."""
    if mask is not None:
        mask = ~mask.expand(x.size(0), 4, x.size(1), memory.size(1)).flatten(0, 1)
    return module(x, memory, memory, attn_mask=mask, need_weights=False)[0]


class PaddedLayer(Layer):
    def attend(self, x, mask):
        return attend(self.attention, x, x, mask)


class PaddedCrossLayer(CrossLayer):
    def attend(self, x, mask):
        return attend(self.attention, x, x, mask)

    def attend_memory(self, x, memory, mask):
        return attend(self.cross, x, memory, mask)


@mutant("transformer", "first loss", "too large", **sizes)
class TiedToAnUnscaledEmbedding(Translator):
    def __init__(self):
        super().__init__()
        self.head.weight = self.tgt_embed.weight


@mutant("transformer", "causality", "no causal mask", **sizes)
class FutureVisible(Translator):
    def causal(self, tgt):
        return None


@mutant("transformer", "causality", "in this mode", **sizes)
class FutureVisibleInEval(Translator):
    def causal(self, tgt):
        return super().causal(tgt) if self.training else None


@mutant("transformer", "causality", "", **sizes)
class FutureOnly(Translator):
    def causal(self, tgt):
        return super().causal(tgt).T


@mutant("transformer", "source order", "positions are missing", **sizes)
class WithoutPositions(Translator):
    def place(self, x):
        return x


@mutant("transformer", "source order", "same for all tokens", **sizes)
class TableReadAtOnePlace(Translator):
    def place(self, x):
        return x + self.table[x.size(1)]


@mutant("transformer", "padding", "cross-attention looks", **sizes)
class CrossIgnoresPadding(Translator):
    def write(self, tgt, memory, src):
        x = self.place(self.tgt_embed(tgt))
        return self.cross(x, memory, self.causal(tgt), None)


@mutant("transformer", "padding", "encoder looks", **sizes)
class EncoderIgnoresPadding(Translator):
    def encode(self, src):
        return self.norm(self.layer(self.place(self.src_embed(src)), None))


@mutant("transformer", "padding", "encoder looks", **sizes)
class PaddingOnTheRows(Translator):
    def encode(self, src):
        x = self.place(self.src_embed(src))
        attended = self.layer.attend(self.layer.norm1(x), None)
        attended = attended * (src != PAD)[:, :, None]
        x = x + attended
        return self.norm(x + self.layer.think(self.layer.norm2(x)))


@mutant("transformer", "padding", "wrong id", **sizes)
class WrongPadId(Translator):
    def source_mask(self, src):
        return (src != PAD + 1)[:, None, None, :]


@mutant("transformer", "source", "no cross-attention", **sizes)
class SourceUnused(Translator):
    def write(self, tgt, memory, src):
        return super().write(tgt, torch.zeros_like(memory), src)


@mutant("transformer", "logits", "CrossEntropyLoss", **sizes)
class SoftmaxAtTheEnd(Translator):
    def forward(self, src, tgt):
        return super().forward(src, tgt).softmax(-1)


@mutant("transformer", "batch", "batch_first", **sizes)
class BatchFirstForgotten(nn.Module):
    def __init__(self):
        super().__init__()
        self.src_embed, self.tgt_embed = nn.Embedding(SRC, E), nn.Embedding(TGT, E)
        self.register_buffer("table", sinusoidal_positions(32, E))
        self.encoder = nn.TransformerEncoderLayer(E, 4, 2 * E, dropout=0.0)
        self.decoder = nn.TransformerDecoderLayer(
            E, 4, 2 * E, dropout=0.0, batch_first=True
        )
        self.head = nn.Linear(E, TGT)

    def forward(self, src, tgt):
        memory = self.encoder(self.src_embed(src) + self.table[: src.size(1)])
        x = self.tgt_embed(tgt) + self.table[: tgt.size(1)]
        hide = ~causal_mask(tgt.size(1))
        return self.head(self.decoder(x, memory, tgt_mask=hide))


@mutant("transformer", "first loss", "too large", **sizes)
class LogitsTooLarge(Translator):
    def forward(self, src, tgt):
        return 20 * super().forward(src, tgt)


@mutant("transformer", "shape", "raises", **sizes)
class IdsAsNumbers(Translator):
    """Token ids fed through a linear layer, as if they were quantities."""

    def __init__(self):
        super().__init__()
        self.src_embed = nn.Linear(SRC, E)

    def encode(self, src):
        return self.src_embed(src.float())


class Cached(Translator):
    """Decoding step by step; the mistake is where a new token is put."""

    def new_cache(self):
        return []

    def decode(self, tgt, memory, src, cache=None):
        if cache is None:
            return self.head(self.norm(self.write(tgt, memory, src)))
        cache.append(self.embed_last(tgt))
        x = torch.cat(cache, dim=1)
        x = self.cross(x, memory, causal_mask(x.size(1)), self.source_mask(src))
        return self.head(self.norm(x))[:, -1:]


@mutant("transformer", "cache", "position 0", **sizes)
class CachePutsAllAtZero(Cached):
    def embed_last(self, tgt):
        return self.place(self.tgt_embed(tgt[:, -1:]))


class PlainAttention(Translator):
    """A right encoder whose attention is written out, for mutants to break."""

    def weigh(self, scores):
        return (scores / math.sqrt(E // 4)).softmax(-1)

    def encode(self, src):
        x = self.place(self.src_embed(src))
        weight, bias = (
            self.layer.attention.in_proj_weight,
            self.layer.attention.in_proj_bias,
        )
        heads = (
            F.linear(x, weight, bias).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        )
        scores = heads[0] @ heads[1].mT
        scores = scores.masked_fill(~self.source_mask(src), -torch.inf)
        mixed = (self.weigh(scores) @ heads[2]).transpose(1, 2).flatten(2)
        x = x + self.layer.attention.out_proj(mixed)
        return self.norm(x + self.layer.think(self.layer.norm2(x)))


@mutant("transformer", "scale", "root of 24", **sizes)
class ScaledByModelWidth(PlainAttention):
    def weigh(self, scores):
        return (scores / math.sqrt(E)).softmax(-1)


@mutant("transformer", "softmax", "another axis", **sizes)
class SoftmaxOverQueries(PlainAttention):
    def weigh(self, scores):
        return (scores.clamp(min=-1e4) / math.sqrt(E // 4)).softmax(-2)


@mutant("transformer", "batch", "x.size\\(0\\)", **sizes)
class PositionsOverTheBatch(Translator):
    def place(self, x):
        return x + self.table[: x.size(0), None]


@mutant("transformer", "source", "encoder is causal", **sizes)
class EncoderCausal(Translator):
    def source_mask(self, src):
        return super().source_mask(src)

    def encode(self, src):
        x = self.place(self.src_embed(src))
        mask = self.source_mask(src) & causal_mask(src.size(1))
        return self.norm(self.layer(x, mask))


@mutant("transformer", "layers", "same object", **sizes)
class OneLayerThrice(Translator):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([self.layer] * 3)

    def encode(self, src):
        x = self.place(self.src_embed(src))
        for layer in self.layers:
            x = layer(x, self.source_mask(src))
        return self.norm(x)


@mutant("transformer", "logits", "ReLU", **sizes)
class ReluAtTheEnd(Translator):
    def forward(self, src, tgt):
        return super().forward(src, tgt).relu()
