"""Generation: write a sequence token by token with a sequence-to-sequence model.

Copy this file: it works alone and needs torch only.

The model is an `nn.Module` with `encode(src)`, `decode(tgt, memory, src, cache=…)`,
`new_cache()`, `pad_id`, `max_len` and `tgt_vocab_size`, as `minivit.Transformer` is;
for beam search its cache is a list of dicts of dicts of tensors, the batch first.

Letters for shapes: B batch, L length written, S source length, V vocabulary, W beams.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["beam_search", "greedy_search", "sample"]

ASK_EVERY = 16  # tokens between two looks at whether a GPU has written all ends


@torch.no_grad()
def greedy_search(
    model: Any,
    src: Tensor,
    *,
    bos_id: int,
    eos_id: int,
    max_len: int,
    use_cache: bool = True,
) -> Tensor:
    """Write the most probable token again and again.

    Args:
        model: a `minivit.Transformer` or something with its methods.
        src: (B, S) source ids.
        bos_id: start token; it is not part of what is returned.
        eos_id: end token; after it a sequence is filled up with `pad_id`.
        max_len: longest sequence to write, the end token included.
        use_cache: keep keys and values; slower without, and the same result.

    Returns:
        (B, L) ids, L <= max_len; L is as short as the longest sequence allows.

    Raises:
        ValueError: `max_len` is below one or beyond the model's, or an id is outside
            the vocabulary.
    """
    return _write(
        model,
        src,
        lambda logits: logits.argmax(dim=-1),
        bos_id=bos_id,
        eos_id=eos_id,
        max_len=max_len,
        use_cache=use_cache,
    )


@torch.no_grad()
def sample(
    model: Any,
    src: Tensor,
    *,
    bos_id: int,
    eos_id: int,
    max_len: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
) -> Tensor:
    """Draw each token by its probability, possibly among the likeliest only.

    Args:
        model: as `greedy_search`.
        src: (B, S) source ids.
        bos_id: start token.
        eos_id: end token.
        max_len: longest sequence to write, the end token included.
        temperature: divides the logits; below 1 sharper, above 1 flatter.
        top_k: draw among the k likeliest tokens.
        top_p: draw among the fewest likeliest tokens whose probabilities add up to at
            least p.
        generator: source of randomness, for repeatable draws.
        use_cache: as `greedy_search`.

    Returns:
        (B, L) ids, as `greedy_search`.

    Raises:
        ValueError: as `greedy_search`, or `temperature`, `top_k`, `top_p` out of range.

    Source:
        Top-k: Fan et al. 2018, section 5.4. Top-p: Holtzman et al. 2020, section 3.1.
    """
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be above 0 and finite, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], got {top_p}")

    def draw(logits: Tensor) -> Tensor:
        probabilities = _keep_likeliest(logits / temperature, top_k, top_p).softmax(-1)
        return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)

    return _write(
        model,
        src,
        draw,
        bos_id=bos_id,
        eos_id=eos_id,
        max_len=max_len,
        use_cache=use_cache,
    )


@torch.no_grad()
def beam_search(
    model: Any,
    src: Tensor,
    *,
    bos_id: int,
    eos_id: int,
    max_len: int,
    beam_size: int = 4,
    length_penalty: float = 0.6,
) -> Tensor:
    """Follow the `beam_size` best beginnings at once and return the best ending.

    The score of a sequence is its log-probability over ((5 + length) / 6) to the power
    `length_penalty`: 0 prefers short sequences, larger values longer ones.

    Args:
        model: as `greedy_search`.
        src: (B, S) source ids.
        bos_id: start token.
        eos_id: end token.
        max_len: longest sequence to write, the end token included.
        beam_size: W, number of beginnings that are kept.
        length_penalty: exponent.

    Returns:
        (B, L) ids, as `greedy_search`.

    Raises:
        ValueError: as `greedy_search`, or `beam_size` is below one, or
            `length_penalty` is negative.

    Source:
        Wu et al. 2016, equation 14 (without the coverage term).
    """
    if beam_size < 1:
        raise ValueError(f"beam_size must be at least 1, got {beam_size}")
    if not length_penalty >= 0:
        raise ValueError(f"length_penalty must not be negative, got {length_penalty}")
    _check(model, bos_id, eos_id, max_len)
    batch, vocab, device = src.size(0), model.tgt_vocab_size, src.device

    with _evaluating(model):
        memory = model.encode(src).repeat_interleave(beam_size, dim=0)  # (B·W, S, E)
        src = src.repeat_interleave(beam_size, dim=0)  # (B·W, S)
        tgt = torch.full((batch * beam_size, 1), bos_id, device=device)  # (B·W, 1)
        cache = model.new_cache()
        # All beams of a source begin alike: only the first may have offspring.
        log_prob = torch.full((batch, beam_size), -torch.inf, device=device)  # (B, W)
        log_prob[:, 0] = 0.0
        length = torch.zeros(batch, beam_size, device=device)  # (B, W)
        ended = torch.zeros(batch, beam_size, dtype=torch.bool, device=device)  # (B, W)
        # A sequence that has ended goes on with padding, at no cost.
        only_pad = torch.full((vocab,), -torch.inf, device=device)  # (V,)
        only_pad[model.pad_id] = 0.0
        while tgt.size(1) <= max_len and not _all(ended | log_prob.isneginf(), tgt):
            logits = _next_logits(model, tgt, memory, src, cache)  # (B·W, V)
            step = logits.log_softmax(-1).view(batch, beam_size, vocab)  # (B, W, V)
            step = torch.where(ended[..., None], only_pad, step)  # (B, W, V)
            grown = (length + ~ended)[..., None]  # (B, W, 1)
            total = log_prob[..., None] + step  # (B, W, V)
            score = total / ((5 + grown) / 6) ** length_penalty  # (B, W, V)
            best = score.flatten(1).topk(beam_size).indices  # (B, W)
            parent, token = best // vocab, best % vocab  # (B, W)
            log_prob = total.flatten(1).gather(1, best)
            length = grown.squeeze(-1).gather(1, parent)
            ended = ended.gather(1, parent) | (token == eos_id)
            rows = torch.arange(batch, device=device)[:, None] * beam_size + parent
            rows = rows.flatten()  # (B·W,)
            tgt = torch.cat([tgt[rows], token.view(-1, 1)], dim=1)
            _reorder(cache, rows)
    score = log_prob / ((5 + length) / 6) ** length_penalty  # (B, W)
    rows = torch.arange(batch, device=device) * beam_size + score.argmax(dim=1)  # (B,)
    return _trim(tgt[rows, 1:], model.pad_id)


def _write(
    model: Any,
    src: Tensor,
    choose: Callable[[Tensor], Tensor],
    *,
    bos_id: int,
    eos_id: int,
    max_len: int,
    use_cache: bool,
) -> Tensor:
    """Write until every sequence has ended; `choose` maps (B, V) logits to (B,) ids."""
    _check(model, bos_id, eos_id, max_len)
    with _evaluating(model):
        memory = model.encode(src)
        tgt = torch.full((src.size(0), 1), bos_id, device=src.device)  # (B, 1)
        ended = torch.zeros(src.size(0), dtype=torch.bool, device=src.device)  # (B,)
        cache = model.new_cache() if use_cache else None
        while tgt.size(1) <= max_len and not _all(ended, tgt):
            token = choose(_next_logits(model, tgt, memory, src, cache))
            token = token.masked_fill(ended, model.pad_id)
            tgt = torch.cat([tgt, token[:, None]], dim=1)
            ended = ended | (token == eos_id)
    return _trim(tgt[:, 1:], model.pad_id)


def _all(ended: Tensor, tgt: Tensor) -> bool:
    """Whether all have ended; to know, a GPU must wait, so it is asked now and then."""
    every = 1 if ended.device.type == "cpu" else ASK_EVERY
    return tgt.size(1) % every == 0 and bool(ended.all())


def _next_logits(
    model: Any, tgt: Tensor, memory: Tensor, src: Tensor, cache: Any
) -> Tensor:
    """Score what follows the last token; padding is never written by choice."""
    logits = model.decode(tgt, memory, src, cache=cache)[:, -1]  # (B, V)
    padding = torch.arange(logits.size(-1), device=logits.device) == model.pad_id
    return logits.float().masked_fill(padding, -torch.inf)


def _keep_likeliest(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Set the logits (B, V) of all other tokens to -inf."""
    if top_k is not None:
        least = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p is not None:
        sorted_logits, order = logits.sort(descending=True)  # (B, V)
        probabilities = sorted_logits.softmax(-1)
        # A token goes if those before it suffice; the first always stays.
        late = probabilities.cumsum(-1) - probabilities >= top_p  # (B, V)
        logits = logits.masked_fill(late.scatter(1, order, late), -torch.inf)
    return logits


def _reorder(cache: Any, rows: Tensor) -> None:
    """Let each beam go on with the keys and values of its parent."""
    for layer in cache:
        for part in layer.values():
            for name in part:
                part[name] = part[name].index_select(0, rows)


def _trim(ids: Tensor, pad_id: int) -> Tensor:
    """Cut columns at the end in which every sequence (B, L) is padding."""
    used = (ids != pad_id).any(dim=0).nonzero()
    return ids[:, : int(used.max()) + 1 if len(used) else 0]


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Switch dropout off while writing, and put the model back as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:  # parts may be frozen in eval mode
            module.training = training


def _check(model: Any, bos_id: int, eos_id: int, max_len: int) -> None:
    if not 1 <= max_len <= model.max_len:
        raise ValueError(
            f"max_len must lie between 1 and the model's {model.max_len}, got {max_len}"
        )
    for name, token in (("bos_id", bos_id), ("eos_id", eos_id)):
        if not 0 <= token < model.tgt_vocab_size or token == model.pad_id:
            raise ValueError(
                f"{name}={token} must lie in the vocabulary of "
                f"{model.tgt_vocab_size} tokens and differ from pad_id={model.pad_id}"
            )
