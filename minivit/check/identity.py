"""With identity matrices as projections, multi-head attention has a unique answer."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..attention import attention as _attend
from .dot_product import ATTENTION_MISTAKES
from .properties import copy_of, dtype_of, random_input
from .report import Finding, close
from .scores import plain_attention


@torch.no_grad()
def wrong_heads(
    own: Any, call: Callable[..., Tensor], dim: int, heads: int
) -> Finding | None:
    """Hold it against the answer and against what known mistakes make of it.

    Nothing is said of other layouts, nor of another attention, such as with rotary
    positions, biases or normalised queries: there the properties must do.
    """
    plain = copy_of(own)
    fused = set_identities(plain, dim)
    if fused is None:
        return None
    x = random_input(3, 5, dim).to(dtype_of(plain))
    got = call(plain, x, x, x)
    if any(close(got, right) for right in right_answers(x, heads, fused)):
        return None
    for finding, wrong in wrong_answers(x, heads):
        if close(got, wrong):
            return finding
    vectors = [name for name, p in plain.named_parameters() if p.ndim == 1]
    gains = [name for name in vectors if not name.endswith("bias")]
    if fused or gains or not plain_attention(lambda: call(plain, x, x, x)):
        return None
    return Finding(
        "values",
        "with identity projections the outputs are not those of attention",
        "unknown; see the other findings",
        "forward, step by step",
    )


def set_identities(plain: Any, dim: int) -> bool | None:
    """Turn projections to identities; return whether some are fused into one matrix.

    None if there are others than (E, E), (2E, E) or (3E, E), or not four in all.
    """
    matrices = [p for p in plain.parameters() if p.ndim == 2]
    shapes = [(n * dim, dim) for n in (1, 2, 3)]
    known = all(p.ndim == 1 or tuple(p.shape) in shapes for p in plain.parameters())
    if not known or sum(p.numel() for p in matrices) != 4 * dim * dim:
        return None
    for p in matrices:
        p.copy_(torch.eye(dim).repeat(p.size(0) // dim, 1))
    for name, p in plain.named_parameters():
        if p.ndim == 1 and name.endswith("bias"):
            p.zero_()
    return any(p.size(0) != dim for p in matrices)


def split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, H, L, D)


def merge(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)  # (B, L, E)


def attend(x: Tensor) -> Tensor:
    return _attend(x, x, x)[0]


def right_answers(x: Tensor, heads: int, fused: bool) -> Iterator[Tensor]:
    """Every right order of the features: nothing says which of them make a head."""
    yield merge(attend(split(x, heads)))
    # The features of a head may also lie H apart, before and after.
    far = x.unflatten(-1, (-1, heads)).permute(0, 3, 1, 2)  # (B, H, L, D)
    yield merge(attend(far))
    yield attend(far).permute(0, 2, 3, 1).flatten(2)
    if fused:  # [x, x, x] taken apart in one of the other orders in use
        triple = torch.cat([x, x, x], dim=-1)
        by_head = triple.unflatten(-1, (heads, 3, -1)).permute(3, 0, 2, 1, 4)
        yield merge(_attend(*by_head.unbind())[0])
        inner = triple.unflatten(-1, (heads, -1, 3)).permute(4, 0, 2, 1, 3)
        yield merge(_attend(*inner.unbind())[0])


def wrong_answers(x: Tensor, heads: int) -> Iterator[tuple[Finding, Tensor]]:
    """What known mistakes make of x, and what is said of each."""
    h, dim, look_at = split(x, heads), x.size(-1), "the reshapes around the heads"
    for m in ATTENTION_MISTAKES:
        yield m.finding(), merge(m.fn(h, h, h, None)[0])
    symptom = "with identity projections the outputs match a known mistake"
    for cause, wrongs in wrong_reshapes(x, heads).items():
        for wrong in wrongs:
            yield Finding("heads", symptom, cause, look_at), wrong
    cause = "number and width of the heads are exchanged, or another number is used"
    for other in range(1, dim + 1):
        if dim % other == 0 and other != heads:
            symptom = (
                f"with identity projections the outputs match {other} heads of "
                f"{dim // other}, not {heads} of {dim // heads}"
            )
            finding = Finding("heads", symptom, cause, look_at)
            yield finding, merge(attend(split(x, other)))
    added = Finding(
        "values",
        "with identity projections the input is added to the output",
        "the residual is inside the attention; the layer around adds it again",
        "the return statement",
    )
    yield added, x + merge(attend(h))


def wrong_reshapes(x: Tensor, heads: int) -> dict[str, tuple[Tensor, ...]]:
    """Causes, and outputs (B, L, E) that show them."""
    h, bare = split(x, heads), x.reshape(3, heads, 5, -1)
    inside = x.unflatten(-1, (heads, -1))  # (B, L, H, D): attention among heads
    whole = x[:, None]  # (B, 1, L, E)
    scale = (x.size(-1) // heads) ** -0.5
    return {
        "the heads are merged without undoing the transpose": (
            attend(h).reshape(3, 5, -1),
        ),
        "a bare reshape splits the sequence, not the width": (
            merge(attend(bare)),
            attend(bare).reshape(3, 5, -1),
        ),
        "the heads attend to each other inside a token; the transpose before the "
        "scores is missing": (attend(inside).flatten(2),),
        "the heads are never split": (
            attend(whole)[:, 0],
            (x @ x.transpose(1, 2)).softmax(-1) @ x,
            (x @ x.transpose(1, 2) * scale).softmax(-1) @ x,
        ),
    }
