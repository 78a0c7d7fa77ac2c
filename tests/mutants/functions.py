"""Functions with one mistake each."""

import math

import torch
import torch.nn.functional as F

from minivit.check import CATALOGUE

from . import MUTANTS, Mutant, mutant

# The checker's own tables: each row makes the mistake that it names.
MUTANTS += [
    Mutant(
        f"{number}: {row.cause}",
        lambda row=row: row.fn,
        checker,
        row.check,
        f"{row.symptom}: {row.cause}",
    )
    for checker, rows in CATALOGUE.items()
    for number, row in enumerate(rows)
]

# Attention ----------------------------------------------------------------------------


def scores_of(q, k):
    return q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))


def weights_of(scores, mask):
    """The right way, for mutants whose mistake is elsewhere."""
    if mask is None:
        return scores.softmax(-1)
    weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1)
    return weights.masked_fill(~mask, 0.0)


@mutant("attention", "values", "mix the keys")
def keys_for_values(q, k, v, mask=None):
    weights = weights_of(scores_of(q, k), mask)
    return weights @ k, weights


@mutant("attention", "mask", "tiny number")
def masked_with_tiny_number(q, k, v, mask=None):
    scores = scores_of(q, k)
    if mask is not None:
        scores = scores.masked_fill(~mask, 1e-9)
    weights = scores.softmax(-1)
    return weights @ v, weights


@mutant("attention", "half", "half precision")
def masked_with_billion(q, k, v, mask=None):
    scores = scores_of(q, k)
    if mask is not None:
        scores = scores.masked_fill(~mask, -1e9)
    weights = scores.softmax(-1)
    if mask is not None:
        weights = weights.masked_fill(~mask, 0.0)
    return weights @ v, weights


@mutant("attention", "hidden row", "0/0")
def hidden_row_is_nan(q, k, v, mask=None):
    scores = scores_of(q, k)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1)
    return weights @ v, weights


@mutant("attention", "hidden row", "uniform")
def hidden_row_is_mean(q, k, v, mask=None):
    scores = scores_of(q, k)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1)
    return weights @ v, weights


@mutant("attention", "hidden row", "backward pass")
def nan_covered_up(q, k, v, mask=None):
    scores = scores_of(q, k)
    if mask is not None:
        scores = scores + torch.where(mask, 0.0, -torch.inf).to(scores.dtype)
    weights = scores.softmax(-1)
    return (weights @ v).nan_to_num(0.0), weights


@mutant("attention", "map", "without the mask")
def map_without_mask(q, k, v, mask=None):
    return weights_of(scores_of(q, k), mask) @ v, scores_of(q, k).softmax(-1)


@mutant("attention", "weights", "scores are returned")
def scores_for_weights(q, k, v, mask=None):
    return weights_of(scores_of(q, k), mask) @ v, scores_of(q, k)


@mutant("attention", "in place")
def query_scaled_in_place(q, k, v, mask=None):
    q *= q.size(-1) ** -0.5
    weights = weights_of(q @ k.transpose(-2, -1), mask)
    return weights @ v, weights


@mutant("attention", "repeatable", "dropout")
def dropout_always(q, k, v, mask=None):
    weights = F.dropout(weights_of(scores_of(q, k), mask), 0.1)
    return weights @ v, weights


@mutant("attention", "shape")
def output_transposed(q, k, v, mask=None):
    weights = weights_of(scores_of(q, k), mask)
    return (weights @ v).transpose(1, 2), weights


@mutant("attention", "values")
def keys_not_transposed(q, k, v, mask=None):
    weights = (q @ k.reshape(*k.shape[:-2], k.size(-1), k.size(-2))).softmax(-1)
    return weights @ v, weights


# Masks --------------------------------------------------------------------------------


@mutant("causal_mask", "aligned", "aligned with the first key")
def causal_upper_left(query_len, key_len=None):
    return torch.ones(query_len, key_len or query_len).tril().bool()


@mutant("padding_mask", "shape", "rows")
def padding_on_rows(lengths, max_len):
    return (torch.arange(max_len) < lengths[:, None])[:, None, :, None]


@mutant("padding_mask", "shape", "broadcast")
def padding_flat(lengths, max_len):
    return torch.arange(max_len) < lengths[:, None]


# Positions, normalisation, patches ----------------------------------------------------


@mutant("sinusoidal_positions", "values", "[n]")
def table_read_at_one_place(length, dim):
    turned = torch.arange(100)[:, None] / 10000 ** (torch.arange(0, dim, 2) / dim)
    table = torch.stack([turned.sin(), turned.cos()], dim=-1).flatten(1)
    return table[length].expand(length, dim)


@mutant("sinusoidal_positions", "values")
def learned_instead_of_sinusoidal(length, dim):
    return torch.nn.Embedding(length, dim).weight.detach()


# Generation ---------------------------------------------------------------------------


def decode(model, src, bos_id, eos_id, max_len):
    """Greedy search, written plainly, for mutants whose mistake is elsewhere."""
    memory = model.encode(src)
    tgt = torch.full((len(src), 1), bos_id)
    ended = torch.zeros(len(src), dtype=torch.bool)
    while tgt.size(1) <= max_len and not ended.all():
        logits = model.decode(tgt, memory, src)[:, -1]
        logits[:, model.pad_id] = -torch.inf
        token = logits.argmax(-1).masked_fill(ended, model.pad_id)
        tgt = torch.cat([tgt, token[:, None]], dim=1)
        ended |= token == eos_id
    return tgt[:, 1:]


@mutant("generate", "eval mode", "eval mode")
@torch.no_grad()
def generates_in_train_mode(model, src, *, bos_id, eos_id, max_len):
    return decode(model, src, bos_id, eos_id, max_len)


@mutant("generate", "mode kept", "restored")
@torch.no_grad()
def leaves_eval_mode(model, src, *, bos_id, eos_id, max_len):
    model.eval()
    return decode(model, src, bos_id, eos_id, max_len)


@mutant("generate", "no grad")
def keeps_the_graph(model, src, *, bos_id, eos_id, max_len):
    training = model.training
    model.eval()
    ids = decode(model, src, bos_id, eos_id, max_len)
    model.train(training)
    return ids


def quietly(fn):
    @torch.no_grad()
    def run(model, src, *, bos_id, eos_id, max_len):
        training = model.training
        model.eval()
        ids = fn(model, src, bos_id=bos_id, eos_id=eos_id, max_len=max_len)
        model.train(training)
        return ids

    run.__name__ = fn.__name__
    return run


@mutant("generate", "end", "pad_id")
@quietly
def goes_on_after_the_end(model, src, *, bos_id, eos_id, max_len):
    memory = model.encode(src)
    tgt = torch.full((len(src), 1), bos_id)
    for _ in range(max_len):
        logits = model.decode(tgt, memory, src)[:, -1]
        logits[:, model.pad_id] = -torch.inf
        tgt = torch.cat([tgt, logits.argmax(-1, keepdim=True)], dim=1)
    return tgt[:, 1:]


@mutant("generate", "length", "too early")
@quietly
def stops_with_the_first(model, src, *, bos_id, eos_id, max_len):
    memory = model.encode(src)
    tgt = torch.full((len(src), 1), bos_id)
    while tgt.size(1) <= max_len and not (tgt == eos_id).any():
        logits = model.decode(tgt, memory, src)[:, -1]
        logits[:, model.pad_id] = -torch.inf
        tgt = torch.cat([tgt, logits.argmax(-1, keepdim=True)], dim=1)
    return tgt[:, 1:]


@mutant("generate", "values|length", "")
@quietly
def one_token_short(model, src, *, bos_id, eos_id, max_len):
    return decode(model, src, bos_id, eos_id, max_len - 1)


@mutant("generate", "values", "all tokens so far")
@quietly
def every_token_at_position_zero(model, src, *, bos_id, eos_id, max_len):
    memory = model.encode(src)
    last = torch.full((len(src), 1), bos_id)
    ids, ended = [], torch.zeros(len(src), dtype=torch.bool)
    while len(ids) < max_len and not ended.all():
        logits = model.decode(last, memory, src)[:, -1]
        logits[:, model.pad_id] = -torch.inf
        token = logits.argmax(-1)
        last = token[:, None]
        ids.append(token.masked_fill(ended, model.pad_id))
        ended |= token == eos_id
    return torch.stack(ids, dim=1)


@mutant("generate", "values", "start token")
@quietly
def returns_the_start(model, src, *, bos_id, eos_id, max_len):
    ids = decode(model, src, bos_id, eos_id, max_len)
    return torch.cat([torch.full((len(src), 1), bos_id), ids], dim=1)


# Found by looking for what slipped through --------------------------------------------


@mutant("attention", "scale", "another number")
def scale_of_the_heads(q, k, v, mask=None):
    return weights_of(q @ k.mT / math.sqrt(q.size(1)), mask) @ v


@mutant("attention", "overflow", "written by hand")
def softmax_by_hand(q, k, v, mask=None):
    e = scores_of(q, k).exp()
    e = e if mask is None else e * mask
    return e / e.sum(-1, keepdim=True).clamp(min=1e-9) @ v


@mutant("attention", "gradients", "graph is cut")
def weights_detached(q, k, v, mask=None):
    return weights_of(scores_of(q, k), mask).detach() @ v


@mutant("attention", "in place")
def mask_changed_in_place(q, k, v, mask=None):
    scores = scores_of(q, k)
    if mask is None:
        return scores.softmax(-1) @ v
    out = weights_of(scores, mask) @ v
    mask.logical_not_()
    return out


def remembering():
    kept = {}

    @mutant("attention", "repeatable|mask|hidden row", "")
    def first_mask_kept(q, k, v, mask=None):
        if mask is not None:
            mask = kept.setdefault(mask.shape, mask.clone())
        return weights_of(scores_of(q, k), mask) @ v


remembering()


@mutant("layer_norm", "values", "eps is missing")
def norm_without_eps(x):
    return (x - x.mean(-1, True)) / x.std(-1, unbiased=False, keepdim=True)


@mutant("layer_norm", "gain", "gain · normalised")
class GainBeforeNorm(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones(6))
        self.shift = torch.nn.Parameter(torch.zeros(6))

    def forward(self, x):
        x = x * self.gain + self.shift
        return torch.nn.functional.layer_norm(x, (6,))


@mutant("generate", "in place")
@quietly
def source_changed(model, src, *, bos_id, eos_id, max_len):
    out = decode(model, src, bos_id, eos_id, max_len)
    src[:, 0] = bos_id
    return out
