"""With identity matrices as projections, multi-head attention has a unique answer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..attention import attention as _attend
from .functions import ATTENTION_MISTAKES
from .properties import copy_of, dtype_of, random_input
from .report import Finding, close
from .scores import plain_attention


def wrong_heads(
    own: Any, call: Callable[..., Tensor], dim: int, heads: int
) -> Finding | None:
    plain = copy_of(own)
    if sum(p.numel() for p in plain.parameters() if p.ndim == 2) != 4 * dim * dim:
        return None  # shared keys, another width: the properties must do
    eye = torch.eye(dim, dtype=dtype_of(plain))
    fused = False
    with torch.no_grad():
        for name, p in plain.named_parameters():
            if p.ndim == 1 and name.endswith("bias"):
                p.zero_()
            elif p.ndim == 1:
                continue  # a gain
            elif (
                p.ndim == 2
                and p.size(1) == dim
                and p.size(0) in (dim, 2 * dim, 3 * dim)
            ):
                fused |= p.size(0) != dim
                p.copy_(eye.repeat(p.size(0) // dim, 1))
            else:
                return None  # another layout: the properties must do
        x = random_input(3, 5, dim).to(eye.dtype)
        got = call(plain, x, x, x)

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, H, L, D)

    def merge(x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2)  # (B, L, E)

    def bare(x: Tensor) -> Tensor:
        return x.reshape(3, heads, 5, -1)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _attend(q, k, v)[0]

    h = split(x)
    # The features of a head may also lie H apart, before and after.
    far = x.unflatten(-1, (-1, heads)).permute(0, 3, 1, 2)  # (B, H, L, D)
    mixed = attend(far, far, far)
    rights = [
        merge(attend(h, h, h)),
        merge(mixed),
        mixed.permute(0, 2, 3, 1).flatten(2),
    ]
    if fused:  # [x, x, x] taken apart in one of the other orders in use
        triple = torch.cat([x, x, x], dim=-1)
        by_head = triple.unflatten(-1, (heads, 3, -1)).permute(3, 0, 2, 1, 4)
        rights.append(merge(attend(*by_head.unbind())))
        inner = triple.unflatten(-1, (heads, -1, 3)).permute(4, 0, 2, 1, 3)
        rights.append(merge(attend(*inner.unbind())))
    if any(close(got, right) for right in rights):
        return None
    for m in ATTENTION_MISTAKES:
        if close(got, merge(m.fn(h, h, h, None)[0])):
            return m.finding()
    over_heads = x.unflatten(-1, (heads, -1))  # (B, L, H, D): attention among heads
    whole = x[:, None]  # (B, 1, L, E)
    for cause, wrong in (
        (
            "the heads are merged without undoing the transpose",
            attend(h, h, h).reshape(3, 5, -1),
        ),
        (
            "a bare reshape splits the sequence, not the width",
            merge(attend(bare(x), bare(x), bare(x))),
        ),
        (
            "a bare reshape splits the sequence, not the width",
            attend(bare(x), bare(x), bare(x)).reshape(3, 5, -1),
        ),
        (
            "the heads attend to each other inside a token; the transpose before the "
            "scores is missing",
            attend(over_heads, over_heads, over_heads).flatten(2),
        ),
        ("the heads are never split", attend(whole, whole, whole)[:, 0]),
        (
            "the heads are never split",
            ATTENTION_MISTAKES[1].fn(whole, whole, whole / 1.0, None)[0][:, 0],
        ),
        (
            "the heads are never split",
            (x @ x.transpose(1, 2) * (dim // heads) ** -0.5).softmax(-1) @ x,
        ),
    ):
        if close(got, wrong):
            return Finding(
                "heads",
                "with identity projections the outputs match a known mistake",
                cause,
                "the reshapes around the heads",
            )
    for other in range(1, dim + 1):
        if dim % other == 0 and other != heads:
            parts = x.unflatten(-1, (other, -1)).transpose(1, 2)
            if close(got, merge(attend(parts, parts, parts))):
                return Finding(
                    "heads",
                    f"with identity projections the outputs match {other} heads of "
                    f"{dim // other}, not {heads} of {dim // heads}",
                    "number and width of the heads are exchanged, or another number "
                    "is used",
                    "the reshapes around the heads",
                )
    if close(got, x + rights[0]):
        return Finding(
            "values",
            "with identity projections the input is added to the output",
            "the residual is inside the attention; the layer around adds it again",
            "the return statement",
        )
    if fused or any(
        p.ndim == 1 and not n.endswith("bias") for n, p in plain.named_parameters()
    ):
        return None
    if not plain_attention(lambda: call(plain, x, x, x)):
        return None  # rotary, biases, normalised queries: another attention, not wrong
    return Finding(
        "values",
        "with identity projections the outputs are not those of attention",
        "unknown; see the other findings",
        "forward, step by step",
    )
