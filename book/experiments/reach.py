"""Which positions work on sequences longer than those of the training?"""

import torch
import torch.nn.functional as F
from torch import nn

from minivit import (
    Encoder,
    LearnedPositions,
    MultiHeadAttention,
    SinusoidalPositions,
    alibi_bias,
    causal_mask,
)

VOCABULARY = 16
BACK = 3
LONGEST = 96
LENGTHS = (16, 32, 48, 64, 80, 96)
KINDS = ("none", "sinusoidal", "learned", "rotary", "ALiBi")


def speeds(width):
    return 10000.0 ** (-torch.arange(0, width, 2).double() / width)


def turn(x, speed):  # (..., L, D), (D/2,)
    angles = torch.arange(x.size(-2))[:, None] * speed  # (L, D/2)
    hands = torch.polar(torch.ones_like(angles), angles)  # e^(i m omega)
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    turned = torch.view_as_real(pairs * hands).flatten(-2)  # (..., L, D)
    return turned.to(x.dtype)


class RotaryAttention(MultiHeadAttention):
    def __init__(self, embed_dim, num_heads):
        super().__init__(embed_dim, num_heads)
        self.speed = speeds(embed_dim // num_heads)  # (D/2,)

    def project(self, query, key, value, *, cache=None):
        if cache is not None:  # the new tokens would be turned as if first
            raise ValueError("RotaryAttention works on whole sequences only")
        q, k, v = super().project(query, key, value)
        return turn(q, self.speed), turn(k, self.speed), v


class AlibiAttention(MultiHeadAttention):
    def forward(self, query, key, value, *, mask=None):
        q, k, v = self.project(query, key, value)  # (B, H, L, D), ...
        bias = alibi_bias(self.num_heads, q.size(-2), k.size(-2))  # (H, L, S)
        if mask is not None:
            bias = bias.masked_fill(~mask, -torch.inf)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))  # (B, L, E)


class Recall(nn.Module):
    def __init__(self, kind, width=32, heads=4, causal=False):
        super().__init__()
        self.causal = causal
        self.embed = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Identity()  # the others add nothing
        self.encoder = Encoder(width, 1, heads, 2 * width)
        self.head = nn.Linear(width, VOCABULARY)
        if kind == "sinusoidal":
            self.positions = SinusoidalPositions(LONGEST, width)
        elif kind == "learned":
            self.positions = LearnedPositions(LONGEST, width)
            nn.init.normal_(self.positions.table, std=1.0)
        elif kind in ("rotary", "ALiBi"):
            new = RotaryAttention if kind == "rotary" else AlibiAttention
            self.encoder.layers[0].self_attention = new(width, heads)

    def forward(self, ids, *, mask=None):  # (B, L)
        if self.causal:
            past = causal_mask(ids.size(1))  # (L, L)
            mask = past if mask is None else past & mask
        x = self.positions(self.embed(ids))  # (B, L, E)
        return self.head(self.encoder(x, mask=mask))  # (B, L, V)


def three_back(number, length, generator):
    shape = (number, length)
    ids = torch.randint(1, VOCABULARY, shape, generator=generator)
    answers = ids.roll(BACK, dims=1)
    answers[:, :BACK] = -100  # nothing is asked there
    return ids, answers


def latest(number, length, generator):
    shape = (number, length)
    ids = torch.randint(5, VOCABULARY, shape, generator=generator)
    names = torch.randint(1, 5, shape, generator=generator)
    speaks = torch.rand(shape, generator=generator) < 1 / 8
    speaks[:, 0] = True
    ids = ids.where(~speaks, names)
    places = torch.arange(length) * speaks  # (B, L), 0 where nobody speaks
    return ids, ids.gather(1, places.cummax(dim=1).values)


def train(model, task, seed, steps=400, lr=3e-3):
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps, pct_start=0.1
    )
    for _ in range(steps):
        length = int(torch.randint(8, 33, (), generator=generator))
        ids, answers = task(64, length, generator)
        loss = F.cross_entropy(model(ids).flatten(0, 1), answers.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def right_by_place(model, task, seed, length=LONGEST, mask=None):
    generator = torch.Generator().manual_seed(10**6 + seed)  # new sequences
    ids, answers = task(200, length, generator)
    hits = model(ids, mask=mask).argmax(dim=-1) == answers  # (B, L)
    right = 100 * hits.float().mean(dim=0)  # (L,), in percent
    return right[BACK:] if task is three_back else right


def within(distance, length=LONGEST):
    places = torch.arange(length)
    return (places[:, None] - places).abs() <= distance  # (L, S)


def run(seed):
    """The share of right answers, in percent, by task, kind and length."""
    figures = {}
    tries = [(three_back, kind, False) for kind in KINDS]
    tries += [(three_back, "ALiBi", True)]
    tries += [(latest, kind, True) for kind in KINDS]
    for task, kind, causal in tries:
        torch.manual_seed(seed)
        model = train(Recall(kind, causal=causal), task, seed)
        name = "latest" if task is latest else "three back"
        name += ", causal" if causal and task is three_back else ""
        for length in LENGTHS:
            right = right_by_place(model, task, seed, length)
            figures[f"{name}, {kind}, L = {length}"] = right.mean().item()
        right = right_by_place(model, task, seed, mask=within(31))
        figures[f"{name}, {kind}, window"] = right.mean().item()
        if kind == "sinusoidal" and task is three_back:
            early = torch.arange(LONGEST) < 32  # (S,)
            early = early.expand(LONGEST, LONGEST)  # (L, S)
            for keys, mask in (("all keys", None), ("early keys", early)):
                right = right_by_place(model, task, seed, mask=mask)
                mean = right[: 32 - BACK].mean().item()
                figures[f"first places, {keys}"] = mean
    return figures
