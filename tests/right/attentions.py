"""Attentions, as functions and as modules."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from . import right

E, H = 24, 4
D = E // H
sizes = {"embed_dim": E, "num_heads": H}
self_only = {**sizes, "arguments": "x", "mask_name": None}
lenient = {"hidden_rows": False}


# Functions ----------------------------------------------------------------------------


@right("attention")
def by_hand(q, k, v, mask=None):
    """Exponentials of the scores less their maximum; nothing seen makes zeros."""
    scores = torch.einsum("bhld,bhsd->bhls", q, k) / math.sqrt(q.shape[-1])
    e = (scores - scores.amax(-1, keepdim=True)).exp()
    if mask is not None:
        e = e * mask
    return torch.einsum("bhls,bhsd->bhld", e / e.sum(-1, keepdim=True).clamp(1e-6), v)


@right("attention")
def in_blocks(q, k, v, mask=None):
    """Two keys at a time, as flash attention does."""
    top = torch.full((*q.shape[:-1], 1), -1e4, dtype=q.dtype)
    total, mixed = torch.zeros_like(top), q.new_zeros(*q.shape[:-1], v.size(-1))
    for start in range(0, k.size(-2), 2):
        part = slice(start, start + 2)
        s = q @ k[..., part, :].mT * q.size(-1) ** -0.5
        new = torch.maximum(top, s.amax(-1, keepdim=True))
        e = (s - new).exp()
        if mask is not None:
            e = e * mask[..., part]
        total = total * (top - new).exp() + e.sum(-1, keepdim=True)
        mixed = mixed * (top - new).exp() + e @ v[..., part, :]
        top = new
    return mixed / total.clamp(min=1e-6)


@right("attention", mask_name="attention_mask", mask_means="hide", **lenient)
def with_infinity(query, key, value, attention_mask=None):
    scores = query @ key.transpose(-1, -2) / key.size(-1) ** 0.5
    if attention_mask is not None:
        scores = torch.where(attention_mask, -math.inf, scores)
    return {"output": scores.softmax(-1) @ value, "weights": scores.softmax(-1)}


@right("attention", mask_means="add", **lenient)
def batched_add(q, k, v, mask=None):
    """A float mask that is added, heads folded into the batch, softmax in float32."""
    (b, h, n, _), s = q.shape, k.size(2)
    bias = q.new_zeros(b, h, n, s) if mask is None else mask.expand(b, h, n, s)
    flat = [t.flatten(0, 1) for t in (bias, q, k)]
    scores = torch.baddbmm(flat[0], flat[1], flat[2].mT, alpha=q.size(-1) ** -0.5)
    w = scores.float().softmax(-1).to(q.dtype).unflatten(0, (b, h))
    return w @ v, w


@right("attention", **lenient)
def scaled_on_both_sides(q, k, v, mask=None):
    bias = torch.zeros(q.size(-2), k.size(-2))  # float32, whatever the inputs are
    if mask is not None:
        bias = bias.masked_fill(mask.logical_not(), torch.finfo(torch.float16).min)
    root = q.size(-1) ** 0.25
    return ((q / root) @ (k / root).mT + bias).softmax(-1).to(v.dtype) @ v, None


# Modules ------------------------------------------------------------------------------


@right("multi_head_attention", **sizes)
class Einsum(nn.Module):
    """Weights of three axes, everything in letters."""

    def __init__(self):
        super().__init__()
        self.wq, self.wk, self.wv = (
            nn.Parameter(torch.randn(H, E, D) * E**-0.5) for _ in range(3)
        )
        self.wo = nn.Parameter(torch.randn(H, D, E) * E**-0.5)

    def forward(self, query, key, value, mask=None):
        q = torch.einsum("ble,hed->bhld", query, self.wq)
        k = torch.einsum("bse,hed->bhsd", key, self.wk)
        scores = torch.einsum("bhld,bhsd->bhls", q, k) / math.sqrt(D)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        v = torch.einsum("bse,hed->bhsd", value, self.wv)
        return torch.einsum("bhls,bhsd,hde->ble", scores.softmax(-1), v, self.wo)


@right("multi_head_attention", **sizes)
class OnePointConvolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Conv1d(E, E, 1) for _ in range(4))

    def forward(self, query, key, value, mask=None):
        pairs = ((self.q, query), (self.k, key), (self.v, value))
        q, k, v = (f(x.mT).unflatten(1, (H, D)).mT for f, x in pairs)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o(y.mT.flatten(1, 2)).mT


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (
            nn.Linear(E, D, bias=False) for _ in range(3)
        )

    def forward(self, query, key, value, mask):
        q, k = self.query(query), self.key(key)
        scores = q @ k.transpose(1, 2) * k.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(mask == 0, float("-inf"))
        return F.softmax(scores, dim=-1) @ self.value(value)


@right("multi_head_attention", **sizes)
class ListOfHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList([Head() for _ in range(H)])
        self.proj = nn.Linear(E, E)

    def forward(self, query, key, value, mask=None):
        parts = [head(query, key, value, mask) for head in self.heads]
        return self.proj(torch.cat(parts, dim=-1))


class Fused(nn.Module):
    """One map for queries, keys and values, in three orders."""

    order = (3, H, D)

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(E, 3 * E), nn.Linear(E, E)
        self.drop = nn.Dropout(0.2)

    def heads(self, x):
        parts = self.qkv(x).unflatten(-1, self.order).unbind(self.order.index(3) - 3)
        left = [size for size in self.order if size != 3]
        return [p if left == [H, D] else p.mT for p in parts]  # each (B, L, H, D)

    def mix(self, q, k, v):
        w = self.drop((q @ k.mT * D**-0.5).softmax(-1))
        self.maps = w  # kept to be looked at
        return w @ v

    def forward(self, x):
        q, k, v = (t.transpose(1, 2) for t in self.heads(x))
        return self.drop(self.proj(self.mix(q, k, v).transpose(1, 2).flatten(2)))


@right("multi_head_attention", **self_only)
class FusedByPart(Fused):
    pass


@right("multi_head_attention", **self_only)
class FusedByHead(Fused):
    order = (H, 3, D)


@right("multi_head_attention", **self_only)
class FusedInside(Fused):
    order = (H, D, 3)


@right("multi_head_attention", **self_only, causal=True)
class Causal(Fused):
    """The mask is built in, as in GPT."""

    def mix(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def rotated(x):
    """Turn pairs (first half, second half) by an angle that grows with the place."""
    half = x.size(-1) // 2
    angle = torch.arange(x.size(-2))[:, None] / 100 ** (torch.arange(half) / half)
    a, b = x.chunk(2, dim=-1)
    c, s = angle.cos(), angle.sin()
    return torch.cat([a * c - b * s, a * s + b * c], dim=-1)


@right("multi_head_attention", **self_only)
class Rotary(Fused):
    def mix(self, q, k, v):
        return super().mix(rotated(q), rotated(k), v)


@right("multi_head_attention", **self_only)
class Alibi(Fused):
    def mix(self, q, k, v):
        place = torch.arange(q.size(-2))
        slope = 2.0 ** -torch.arange(1, H + 1)[:, None, None]
        bias = -slope * (place - place[:, None]).abs()
        return (q @ k.mT * D**-0.5 + bias).softmax(-1) @ v


class RmsNorm(nn.Module):
    """Gains under another name than weight, on three axes."""

    def __init__(self, width):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, 1, width))

    def forward(self, x):
        root = x.float().square().mean(-1, keepdim=True).add(1e-6).rsqrt()
        return (x * root).to(x.dtype) * self.scale.to(x.dtype)


@right("multi_head_attention", **self_only)
class NormedQueriesAndKeys(Fused):
    def __init__(self):
        super().__init__()
        self.scale_q = nn.Parameter(torch.ones(D))
        self.norm = RmsNorm(D)

    def mix(self, q, k, v):
        return super().mix(self.norm(q) * self.scale_q, self.norm(k), v)


@right("multi_head_attention", **self_only)
class Cosine(Fused):
    """Queries and keys of length one; separate maps; a fixed temperature."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.ModuleList([nn.Linear(E, E) for _ in range(3)])

    def heads(self, x):
        return [f(x).unflatten(-1, (H, D)) for f in self.qkv]

    def mix(self, q, k, v):
        return (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * 10).softmax(-1) @ v


@right("multi_head_attention", **self_only)
class Interleaved(Cosine):
    """The features of a head lie H apart: another order, not another result."""

    def heads(self, x):
        return [f(x).unflatten(-1, (D, H)).mT for f in self.qkv]

    mix = Fused.mix


class Grouped(nn.Module):
    """Several heads of queries share keys and values."""

    shared = 2

    def __init__(self):
        super().__init__()
        self.q, self.o = nn.Linear(E, E), nn.Linear(E, E)
        self.kv = nn.Linear(E, 2 * self.shared * D)

    def forward(self, x):
        q = self.q(x).unflatten(-1, (H, D)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, self.shared, D)).permute(2, 0, 3, 1, 4)
        k, v = (t.repeat_interleave(H // self.shared, dim=1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v)
        return {"out": self.o(y.transpose(1, 2).flatten(2)), "maps": None}


@right("multi_head_attention", **self_only)
class GroupedQueries(Grouped):
    pass


@right("multi_head_attention", **self_only)
class MultiQuery(Grouped):
    shared = 1


@right("multi_head_attention", **{**self_only, "num_heads": 1})
class OneHeadWithoutProjection(Fused):
    """With one head the output projection adds nothing."""

    order = (3, 1, E)

    def __init__(self):
        super().__init__()
        self.proj = nn.Identity()

    def heads(self, x):
        return self.qkv(x).unflatten(-1, self.order).unbind(-3)

    def mix(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)


@right("multi_head_attention", embed_dim=32, num_heads=4, arguments="x", mask_name=None)
class NarrowHeads(nn.Module):
    """Heads narrower than E/H: as many numbers as a module without its projection."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 3 * 24, bias=False), nn.Linear(24, 32)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (4, 6)).transpose(1, 2) for t in (q, k, v))
        return self.out(
            ((q * 6**-0.5) @ k.mT)
            .softmax(-1)
            .matmul(v)
            .mT.mT.transpose(1, 2)
            .flatten(2)
        )


@right("multi_head_attention", **sizes, mask_dims=3)
class MaskRequired(nn.Module):
    """As in the Annotated Transformer: a mask (B, L, S) must be given."""

    def __init__(self):
        super().__init__()
        self.linears = nn.ModuleList([nn.Linear(E, E) for _ in range(4)])

    def forward(self, query, key, value, mask):
        q, k, v = (
            f(x).view(x.size(0), -1, H, D).transpose(1, 2)
            for f, x in zip(self.linears, (query, key, value), strict=False)
        )
        scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(D)
        scores = scores.masked_fill(mask.unsqueeze(1) == 0, -1e4)
        y = torch.matmul(scores.softmax(dim=-1), v)
        return self.linears[-1](y.transpose(1, 2).contiguous().view(*query.shape))


@right("multi_head_attention", **sizes)
class ShiftsOfHeads(nn.Module):
    """Shifts of shape (H, D), as flax keeps them; that of the keys does nothing."""

    def __init__(self):
        super().__init__()
        self.maps = nn.ModuleList([nn.Linear(E, E, bias=False) for _ in range(3)])
        self.query_bias = nn.Parameter(torch.zeros(H, D))
        self.key_bias = nn.Parameter(torch.zeros(H, D))
        self.value_bias = nn.Parameter(torch.zeros(H, D))
        self.out = nn.Linear(E, E)

    def forward(self, query, key, value, mask=None):
        inputs = zip(self.maps, (query, key, value), self.shifts(), strict=True)
        q, k, v = (
            (f(x).unflatten(-1, (H, D)) + shift).transpose(1, 2)
            for f, x, shift in inputs
        )
        return self.out(self.mix(q, k, v, mask).transpose(1, 2).flatten(2))

    def shifts(self):
        return self.query_bias, self.key_bias, self.value_bias

    def mix(self, q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@right("multi_head_attention", **sizes)
class SoftmaxInFloat32(ShiftsOfHeads):
    """Whatever the type of its weights, as Hugging Face does it."""

    def mix(self, q, k, v, mask):
        scores = (q @ k.mT * D**-0.5).float()
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        return scores.softmax(-1).to(q.dtype) @ v


@right("multi_head_attention", **sizes)
class OnlyInFloat32(ShiftsOfHeads):
    """It cannot be checked in float64."""

    def forward(self, query, key, value, mask=None):
        return super().forward(query.float(), key.float(), value.float(), mask)


@right("multi_head_attention", **sizes)
class AddsAMaskInFloat32(ShiftsOfHeads):
    """Beside float64 queries, some of torch's kernels misread such a mask."""

    def mix(self, q, k, v, mask):
        if mask is not None:
            mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


# Precision ----------------------------------------------------------------------------


@right("attention")
def softmax_in_float32_only(q, k, v, mask=None):
    """Inputs in float64 would meet weights in float32: for float32 alone."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))
    if mask is None:
        return F.softmax(scores, -1, dtype=torch.float32) @ v
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = F.softmax(scores, -1, dtype=torch.float32).masked_fill(~mask, 0.0)
    return weights @ v


class Separate(nn.Module):
    """Four maps and one line for the weights."""

    def __init__(self, width=E, heads=H, std=None):
        super().__init__()
        self.embed_dim, self.num_heads = width, heads
        for name in "qkvo":
            self.add_module(name, nn.Linear(width, width))
            if std is not None:
                nn.init.normal_(getattr(self, name).weight, std=std)

    def split(self, t):
        return t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def scale(self):
        return (self.embed_dim // self.num_heads) ** -0.5

    def weigh(self, scores, mask):
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return scores.softmax(-1)

    def mix(self, q, k, v, mask):
        return self.weigh(q @ k.mT * self.scale(), mask) @ v

    def forward(self, x, mask=None):
        q, k, v = (self.split(m(x)) for m in (self.q, self.k, self.v))
        return self.o(self.mix(q, k, v, mask).transpose(1, 2).flatten(2))


@right("multi_head_attention", arguments="x")
class MaximumBeforeTheMask(Separate):
    """A softmax by hand in float32: a hidden key moves the last bits of the others."""

    def __init__(self):
        super().__init__(64, 8, std=0.3)

    def mix(self, q, k, v, mask):
        scores = (q @ k.mT * self.scale()).float()
        e = (scores - scores.amax(-1, keepdim=True)).exp()
        if mask is not None:
            e = e * mask
        return (e / e.sum(-1, keepdim=True)).to(v.dtype) @ v


@right("multi_head_attention", arguments="x")
class LargeWeights(Separate):
    """Each softmax is saturated: hardly any gradient passes it."""

    def __init__(self):
        super().__init__(64, 8, std=2.0)


@right("multi_head_attention", arguments="x")
class LearnedTemperature(Separate):
    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(math.log(D**-0.5)))

    def scale(self):
        return self.temperature.exp()


@right("multi_head_attention", arguments="x")
class HeadByHead(Separate):
    """Collected in a tensor of the default type, float32."""

    def mix(self, q, k, v, mask):
        out = torch.zeros(q.shape)
        for h in range(self.num_heads):
            out[:, h] = super().mix(q[:, h], k[:, h], v[:, h], mask)
        return out


@right("multi_head_attention", arguments="x")
class InHalfPrecision(Separate):
    """All but the maps in bfloat16, as where autocast is not trusted."""

    def mix(self, q, k, v, mask):
        scores = (q.bfloat16() @ k.bfloat16().mT * self.scale()).float()
        weights = self.weigh(scores, mask).bfloat16()
        return (weights @ v.bfloat16()).to(q.dtype)
