"""Attentions and layers with one mistake each, written as people write them."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from . import mutant

E, H = 24, 4
D = E // H


class Attention(nn.Module):
    """A right multi-head attention of separate steps, for mutants to break one of."""

    scale = D**-0.5

    def __init__(self):
        super().__init__()
        self.embed_dim, self.num_heads = E, H
        self.q, self.k, self.v = nn.Linear(E, E), nn.Linear(E, E), nn.Linear(E, E)
        self.out = nn.Linear(E, E)

    def split(self, x):
        return x.view(x.size(0), x.size(1), H, D).transpose(1, 2)

    def merge(self, x):
        return x.transpose(1, 2).reshape(x.size(0), x.size(2), E)

    def weigh(self, scores, mask):
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return scores.softmax(-1)

    def forward(self, query, key, value, mask=None):
        q, k, v = self.split(self.q(query)), self.split(self.k(key)), self.v(value)
        weights = self.weigh(q @ k.transpose(-2, -1) * self.scale, mask)
        return self.out(self.merge(weights @ self.split(v)))


@mutant("multi_head_attention", "scale", "")
class ScaledByModelWidth(Attention):
    scale = E**-0.5


@mutant("multi_head_attention", "scale", "")
class NotScaled(Attention):
    scale = 1.0


@mutant("multi_head_attention", "scale", "after the softmax")
class ScaledAfterSoftmax(Attention):
    scale = 1.0

    def weigh(self, scores, mask):
        return super().weigh(scores, mask) / math.sqrt(D)


@mutant("multi_head_attention", "softmax", "over the queries|dim=-2|another axis")
class SoftmaxOverQueries(Attention):
    def weigh(self, scores, mask):
        if mask is not None:
            scores = scores.masked_fill(~mask, -1e4)
        return scores.softmax(-2)


@mutant("multi_head_attention", "softmax", "heads|another axis")
class SoftmaxOverHeads(Attention):
    def weigh(self, scores, mask):
        weights = scores.softmax(1)
        return weights if mask is None else weights * mask


@mutant("multi_head_attention", "softmax", "no softmax")
class WithoutSoftmax(Attention):
    def weigh(self, scores, mask):
        return scores if mask is None else scores * mask


@mutant("multi_head_attention", "heads", "without undoing the transpose")
class MergedWithoutTranspose(Attention):
    def merge(self, x):
        return x.reshape(x.size(0), x.size(2), E)


@mutant("multi_head_attention", "heads", "splits the sequence")
class SequenceSplit(Attention):
    def split(self, x):
        return x.reshape(x.size(0), H, x.size(1), D)


@mutant("multi_head_attention", "heads", "never split")
class HeadsNeverSplit(Attention):
    scale = E**-0.5

    def split(self, x):
        return x[:, None]

    def merge(self, x):
        return x[:, 0]


@mutant("multi_head_attention", "heads", "attend to each other inside a token")
class HeadsAttendToHeads(Attention):
    def split(self, x):
        return x.view(x.size(0), x.size(1), H, D)

    def merge(self, x):
        return x.flatten(2)

    def weigh(self, scores, mask):
        return scores.softmax(-1)


@mutant("multi_head_attention", "projection", "output projection is missing")
class OutputProjectionMissing(Attention):
    def __init__(self):
        super().__init__()
        self.out = nn.Identity()


@mutant("multi_head_attention", "mask", "inverted")
class MaskInverted(Attention):
    def weigh(self, scores, mask):
        return super().weigh(scores, None if mask is None else ~mask)


@mutant("multi_head_attention", "mask", "not applied")
class MaskIgnored(Attention):
    def weigh(self, scores, mask):
        return scores.softmax(-1)


@mutant("multi_head_attention", "causality", "eval mode")
class MaskWhileTrainingOnly(Attention):
    def weigh(self, scores, mask):
        return super().weigh(scores, mask if self.training else None)


@mutant("multi_head_attention", "batch", "batch_first")
class BatchSecond(nn.MultiheadAttention):
    """What comes of torch's module when batch_first=True is forgotten."""

    def __init__(self):
        super().__init__(E, H)

    def forward(self, query, key, value, mask=None):
        if mask is not None:  # the shapes do not even fit
            mask = torch.zeros(query.size(0), key.size(0), dtype=torch.bool)
        return super().forward(query, key, value, attn_mask=mask)


@mutant("multi_head_attention", "map", "without the mask")
class MapsWithoutMask(Attention):
    def forward(self, query, key, value, mask=None):
        q, k = self.split(self.q(query)), self.split(self.k(key))
        maps = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
        self.maps = maps  # as many do; a copy of the module must not trip over it
        return super().forward(query, key, value, mask), maps


@mutant("multi_head_attention", "half", "half precision")
class MaskedWithBillion(Attention):
    def weigh(self, scores, mask):
        if mask is not None:
            scores = scores.masked_fill(~mask, -1e9)
        return scores.softmax(-1)


@mutant("multi_head_attention", "gradients", "never used")
class KeyProjectionUnused(Attention):
    def forward(self, query, key, value, mask=None):
        q, k, v = self.q(query), self.q(key), self.v(value)
        q, k, v = self.split(q), self.split(k), self.split(v)
        return self.out(self.merge(self.weigh(q @ k.mT * self.scale, mask) @ v))


@mutant("multi_head_attention", "gradients", "thrown away")
class KeysAllTheirMean(Attention):
    """The scores say nothing; a softmax in float32 leaves rounding of theirs."""

    def weigh(self, scores, mask):
        scores = scores.mean(-1, keepdim=True).expand_as(scores)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return F.softmax(scores, -1, dtype=torch.float32).to(scores.dtype)


@mutant("multi_head_attention", "repeatable", "state")
class CarriesState(Attention):
    def forward(self, query, key, value, mask=None):
        out = super().forward(query, key, value, mask)
        previous = getattr(self, "previous", torch.zeros(()))
        self.previous = out.detach().mean()
        return out + previous


@mutant("multi_head_attention", "shape|values", "", embed_dim=E, num_heads=H)
class RaisesOnCrossAttention(Attention):
    def forward(self, query, key, value, mask=None):
        raise RuntimeError("sizes do not match")


@mutant("multi_head_attention", "roles", "read twice")
class QueryReadFromTheKeys(Attention):
    def forward(self, query, key, value, mask=None):
        n = query.size(1)
        return super().forward(key[:, :n], key, value, mask)


@mutant("multi_head_attention", "roles", "exchanged")
class KeysAndValuesExchanged(Attention):
    def forward(self, query, key, value, mask=None):
        return super().forward(query, value, key, mask)


@mutant("multi_head_attention", "roles", "read twice")
class ValuesReadFromTheKeys(Attention):
    def forward(self, query, key, value, mask=None):
        return super().forward(query, key, key, mask)


@mutant("multi_head_attention", "heads", "exchanged, or another number")
class HeadsAndWidthExchanged(Attention):
    scale = H**-0.5

    def split(self, x):
        return x.unflatten(-1, (D, H)).transpose(1, 2)


@mutant("multi_head_attention", "mask", "repeat_interleave", mask_dims=3)
class MasksOfOtherSamples(Attention):
    def weigh(self, scores, mask):
        if mask is not None:
            mask = mask.repeat(H, 1, 1).view(scores.shape)
        return super().weigh(scores, mask)


@mutant("multi_head_attention", "gradients|scale", "skipped|left out")
class LastHeadSkipped(Attention):
    def merge(self, x):
        keep = torch.ones(H)[:, None, None]
        keep[-1] = 0
        return super().merge(x * keep)


@mutant("multi_head_attention", "built-in mask", "causal=True", mask_name=None)
class CausalUnasked(Attention):
    def weigh(self, scores, mask):
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        return scores.masked_fill(future, -torch.inf).softmax(-1)


@mutant("multi_head_attention", "values", "residual is inside")
class ResidualInside(Attention):
    def forward(self, query, key, value, mask=None):
        return query + super().forward(query, key, value, mask)


@mutant("multi_head_attention", "registered", "plain list")
class ProjectionsInAList(Attention):
    def __init__(self):
        super().__init__()
        self.all = [self.q, self.k, self.v]
        del self.q, self.k, self.v

    def forward(self, query, key, value, mask=None):
        q, k, v = (
            self.split(f(x)) for f, x in zip(self.all, (query, key, value), strict=True)
        )
        return self.out(self.merge(self.weigh(q @ k.mT * self.scale, mask) @ v))


# Layers -------------------------------------------------------------------------------


class Layer(nn.Module):
    """A right pre-norm encoder layer, for mutants to break one step of."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(E, H, batch_first=True)
        self.linear1, self.linear2 = nn.Linear(E, 2 * E), nn.Linear(2 * E, E)
        self.norm1, self.norm2 = nn.LayerNorm(E), nn.LayerNorm(E)

    def attend(self, x, mask):
        hide = None if mask is None else ~mask
        return self.attention(x, x, x, attn_mask=hide, need_weights=False)[0]

    def think(self, x):
        return self.linear2(self.linear1(x).relu())

    def forward(self, x, mask=None):
        x = x + self.attend(self.norm1(x), mask)
        return x + self.think(self.norm2(x))


@mutant("encoder_layer", "residual", "normalised input")
class ResidualOfTheNormalised(Layer):
    def forward(self, x, mask=None):
        x = self.norm1(x)
        x = x + self.attend(x, mask)
        x = self.norm2(x)
        return x + self.think(x)


@mutant("encoder_layer", "residual", "activation")
class ResidualThroughRelu(Layer):
    def forward(self, x, mask=None):
        x = (x + self.attend(self.norm1(x), mask)).relu()
        return (x + self.think(self.norm2(x))).relu()


@mutant("encoder_layer", "residual", "no residual")
class WithoutResidual(Layer):
    def forward(self, x, mask=None):
        return self.think(self.norm2(self.attend(self.norm1(x), mask)))


@mutant("encoder_layer", "stray softmax", "feed-forward")
class FeedForwardEndsInSoftmax(Layer):
    def think(self, x):
        return super().think(x).softmax(-1)


@mutant("encoder_layer", "batch", "batch_first", mask_name=None)
class BatchFirstForgotten(nn.TransformerEncoderLayer):
    def __init__(self):
        super().__init__(E, H, 2 * E)


@mutant("encoder_layer", "repeatable", "dropout")
class DropoutInEval(Layer):
    def think(self, x):
        return F.dropout(super().think(x), 0.1)


@mutant("encoder_layer", "attention", "do not look")
class WithoutAttention(Layer):
    def attend(self, x, mask):
        return self.attention.out_proj(x)


@mutant("encoder_layer", "mask", "inverted")
class LayerMaskInverted(Layer):
    def attend(self, x, mask):
        return super().attend(x, None if mask is None else ~mask)


@mutant("encoder_layer", "in place")
class AddsInPlace(Layer):
    def forward(self, x, mask=None):
        with torch.no_grad():
            x += self.attend(self.norm1(x), mask)
        return x + self.think(self.norm2(x))


@mutant("encoder_layer", "residual", "what the attention adds is lost")
class SecondResidualOfTheInput(Layer):
    def forward(self, x, mask=None):
        y = x + self.attend(self.norm1(x), mask)
        return x + self.think(self.norm2(y))


@mutant("encoder_layer", "residual", "what the attention adds is lost")
class SecondResidualOfTheInputPostNorm(Layer):
    def forward(self, x, mask=None):
        y = self.norm1(x + self.attend(x, mask))
        return self.norm2(x + self.think(y))


@mutant("encoder_layer", "activation", "no activation")
class WithoutActivation(Layer):
    def think(self, x):
        return self.linear2(self.linear1(x))


@mutant("encoder_layer", "activation", "has an activation too")
class ActivationAtTheEnd(Layer):
    def think(self, x):
        return super().think(x).relu()


@mutant("encoder_layer", "norm", "keys and values")
class OnlyTheQueryNormed(Layer):
    def forward(self, x, mask=None):
        hide = None if mask is None else ~mask
        y = self.attention(self.norm1(x), x, x, attn_mask=hide, need_weights=False)[0]
        x = x + y
        return x + self.think(self.norm2(x))


@mutant("encoder_layer", "causality", "norm runs over the tokens")
class NormOverTokens(Layer):
    def __init__(self):
        super().__init__()
        self.norm1 = nn.Identity()

    def attend(self, x, mask):
        mean, std = x.mean(1, keepdim=True), x.std(1, keepdim=True)
        return super().attend((x - mean) / (std + 1e-5), mask)


@mutant("encoder_layer", "padding", "inverted", mask_name=None, padding_name="padding")
class PaddingInverted(Layer):
    def forward(self, x, padding=None):
        y = self.norm1(x)
        keep = None if padding is None else ~padding
        x = x + self.attention(y, y, y, key_padding_mask=keep)[0]
        return x + self.think(self.norm2(x))


class CrossLayer(Layer):
    """A right pre-norm decoder layer, for mutants to break one step of."""

    def __init__(self):
        super().__init__()
        self.cross = nn.MultiheadAttention(E, H, batch_first=True)
        self.norm3 = nn.LayerNorm(E)

    def attend_memory(self, x, memory, mask):
        hide = None if mask is None else ~mask
        return self.cross(x, memory, memory, attn_mask=hide, need_weights=False)[0]

    def forward(self, x, memory, mask=None, memory_mask=None):
        x = x + self.attend(self.norm1(x), mask)
        x = x + self.attend_memory(self.norm2(x), memory, memory_mask)
        return x + self.think(self.norm3(x))


@mutant("decoder_layer", "memory", "no cross-attention")
class RepeatsTheEncoder(CrossLayer):
    def attend_memory(self, x, memory, mask):
        return self.cross(x, x, x, need_weights=False)[0]


@mutant("decoder_layer", "memory mask", "not applied")
class MemoryMaskIgnored(CrossLayer):
    def attend_memory(self, x, memory, mask):
        return super().attend_memory(x, memory, None)


@mutant("decoder_layer", "causality", "causal mask")
class DecoderMaskIgnored(CrossLayer):
    def attend(self, x, mask):
        return super().attend(x, None)


@mutant("decoder_layer", "causality", "in this mode")
class DecoderMaskWhileTrainingOnly(CrossLayer):
    def attend(self, x, mask):
        return super().attend(x, mask if self.training else None)


@mutant("decoder_layer", "residual", "normalised input")
class DecoderResidualOfTheNormalised(CrossLayer):
    def forward(self, x, memory, mask=None, memory_mask=None):
        x = self.norm1(x)
        x = x + self.attend(x, mask)
        x = self.norm2(x)
        x = x + self.attend_memory(x, memory, memory_mask)
        x = self.norm3(x)
        return x + self.think(x)


@mutant("decoder_layer", "activation", "no activation")
class DecoderWithoutActivation(CrossLayer):
    def think(self, x):
        return self.linear2(self.linear1(x))


@mutant("decoder_layer", "memory", "causal")
class CrossAttentionCausal(CrossLayer):
    def attend_memory(self, x, memory, mask):
        hide = torch.ones(x.size(1), memory.size(1), dtype=torch.bool).triu(1)
        return self.cross(x, memory, memory, attn_mask=hide, need_weights=False)[0]


@mutant("encoder_layer", "repeatable", "active in eval mode")
class DropPathInEvalMode(Layer):
    """One sample in ten, in one branch of two."""

    def forward(self, x, mask=None):
        keep = (torch.rand(len(x), 1, 1) < 0.9).to(x.dtype) / 0.9
        return x + keep * (super().forward(x, mask=mask) - x)
