"""Scaled dot-product attention, a function."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..attention import attention as _attend
from .properties import (
    change_of,
    changed_in_place,
    check_means,
    exact_inputs,
    in_half,
    mask_as,
    not_repeatable,
    wrong_shape,
)
from .report import (
    MASK_LINE,
    SCALE_LINE,
    SOFTMAX_LINE,
    Finding,
    Found,
    Report,
    checker,
    close,
    differs,
)
from .subject import Mistake, Subject, check, expect

FILL = "the value that hidden scores are filled with"


@checker
def attention(
    fn: Callable[..., Any],
    *,
    mask_name: str = "mask",
    mask_means: str = "look",
    hidden_rows: bool = True,
) -> Report:
    """Check a function that computes scaled dot-product attention.

    Args:
        fn: called as fn(query, key, value) and fn(query, key, value, mask=mask) with
            tensors (B, H, L, D), (B, H, S, D), (B, H, S, Dv) and a bool mask that
            broadcasts to (B, H, L, S); returns the output (B, H, L, Dv), alone or
            first in a tuple whose second member is the weights (B, H, L, S) or None.
        mask_name: the name of its mask argument, such as "attn_mask".
        mask_means: "look" if True lets a query see a key, "hide" if it hides it, "add"
            for a float mask, 0 or -inf, that is added to the scores.
        hidden_rows: ask for zeros where a query may look nowhere; False if its callers
            see to it that every query sees something.

    Returns:
        The report.

    Raises:
        ValueError: another `mask_means`.
    """
    check_means(mask_means)
    return Attention(fn, mask_name, mask_means, hidden_rows).report()


@dataclass
class Attention(Subject):
    """The function, inputs to try it on, and what it turns out to compute.

    `does` is what it does without a mask: RIGHT, a known mistake, or UNKNOWN. Later
    checks are held against that, so that one mistake makes one finding.
    """

    fn: Callable[..., Any]
    mask_name: str
    mask_means: str
    hidden_rows: bool
    name = "attention"

    def __post_init__(self) -> None:
        shapes = (2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 6)  # every size another number
        g = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(s, generator=g, dtype=torch.float64) for s in shapes)
        self.mask = torch.rand(2, 1, 5, 7, generator=g) > 0.4
        self.mask[..., 0] = True  # every query sees something
        q, k, v = exact_inputs(self.trial, q, k, v)
        self.inputs = q, k, v
        self.does = RIGHT

    def trial(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Call it in both ways, to see whether it computes in float64."""
        self.call(q, k, v)
        self.call(q, k, v, self.mask)

    def call(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Call it; return the output and, if it gives them, the weights."""
        extra = {}
        if mask is not None:
            extra[self.mask_name] = mask_as(mask, self.mask_means, q.dtype)
        result = self.fn(q, k, v, **extra)
        if isinstance(result, Tensor):
            return result, None
        if isinstance(result, Mapping):
            result = tuple(result.values())
        return result[0], result[1] if len(result) > 1 else None

    @check("shape")
    def shape(self) -> Finding | None:
        """Each query gets a mixture of the values, and so of their width."""
        output, _ = self.call(*self.inputs)
        q, k, v = self.inputs
        expect(
            not close(output, _attend(q, k, v)[1] @ k),
            "outputs match weights · K",
            "the weights mix the keys, not the values",
            "the last product",
            check="values",
        )
        return wrong_shape(output, (2, 3, 5, 6))

    @check("values")
    def values(self) -> None:
        """Without a mask the output is softmax(Q Kᵀ / √d) V."""
        output, _ = self.call(*self.inputs)
        known = chain([RIGHT], ATTENTION_MISTAKES, other_scales())
        alike = (m for m in known if close(output, m.fn(*self.inputs)[0]))
        self.does = next(alike, UNKNOWN)
        if self.does is not RIGHT:
            raise Found(self.does.finding())

    @check("mask")
    def masked(self) -> None:
        """With a mask, hidden keys do not reach the output, and visible ones do."""
        given = *self.inputs, self.mask
        output, _ = self.call(*given)
        if self.does is UNKNOWN or close(output, self.does.fn(*given)[0]):
            return
        seen = output.nan_to_num()
        known = [
            m
            for m in MASK_MISTAKES
            if self.does is RIGHT and close(seen, m.fn(*given)[0].nan_to_num())
        ]
        q, k, v = self.inputs
        other = v.clone()
        other[:, :, 3] += change_of(other[:, :, 3])
        changed = differs(self.call(q, k, other, self.mask)[0], output)
        sees = changed.any(-1).any(1)  # (B, L)
        expect(
            bool((sees == self.mask[:, 0, :, 3]).all()),
            "keys that are hidden change the output, or visible ones do not",
            "the mask is not applied to the scores before the softmax",
            MASK_LINE,
            known=known,
        )
        expect(
            self.does is not RIGHT,
            "hidden keys do not reach the output, but the weights are off",
            "the other weights are not those of a softmax over what is seen",
            MASK_LINE,
            known=known,
        )

    @check("hidden row")
    def hidden_row(self) -> None:
        """A query that may look nowhere gets zeros, and no gradient is NaN."""
        if not self.hidden_rows:
            return
        nothing = self.mask.clone()
        nothing[0, 0, 2] = False
        q, k, v = inputs = with_gradients(self.inputs)
        output, _ = self.call(q, k, v, nothing)
        row = output[0, :, 2]
        expect(
            not row.isnan().any(),
            "a query that may look nowhere gives NaN",
            "softmax over -inf alone is 0/0",
            f"{FILL} (or say hidden_rows=False, if no caller ever hides all keys)",
        )
        expect(
            self.does is not RIGHT or close(row, torch.zeros_like(row)),
            "a query that may look nowhere gives a mean of all values, not zeros",
            "with every score equally low, the softmax is uniform",
            "after the softmax: set the weights of hidden keys to zero (or say "
            "hidden_rows=False, if no caller ever hides all keys)",
        )
        output.sum().backward()
        expect(
            all(t.grad is None or t.grad.isfinite().all() for t in inputs),
            "gradients are NaN when a query may look nowhere",
            "NaN is made and covered up later; the backward pass still meets it",
            FILL,
        )

    @check("half")
    def half(self) -> None:
        """In half precision a masked output stays finite."""
        call = partial(self.call, mask=self.mask)
        for dtype in (torch.float16, torch.bfloat16):
            output = in_half(lambda _, *x: call(*x)[0], None, *self.inputs, dtype=dtype)
            expect(
                bool(output.isfinite().all()),
                f"the output under a mask is not finite in {dtype}",
                "a constant is too large for half precision",
                FILL,
            )

    @check("overflow")
    def large(self) -> None:
        """Large scores do no harm."""
        q, k, v = (t.float() for t in self.inputs)
        output, _ = self.call(q * 30, k * 30, v)
        expect(
            bool(output.isfinite().all())
            or not self.call(*self.inputs)[0].isfinite().all(),
            "large scores, of some hundreds, give inf or NaN",
            "exp() overflows in a softmax written by hand",
            "subtract the largest score of a row before exp, or use softmax",
        )

    @check("gradients")
    def gradients(self) -> None:
        """Right gradients reach the queries, the keys and the values."""
        if self.does is not RIGHT:
            return
        got = gradients_of(self.call, self.inputs)
        want = gradients_of(_attend, self.inputs)
        for name, a, b in zip("QKV", got, want, strict=True):
            expect(
                a is not None and b is not None and close(a, b, 1e-4),
                f"the output is right, the gradient that reaches {name} is not",
                "the graph is cut: detach, .data, no_grad or numbers taken out",
                "every step between the inputs and the output",
            )

    @check("weights")
    def weights(self) -> None:
        """Weights, if it returns them, sum to one and are those of the output."""
        output, w = self.call(*self.inputs)
        if w is None:
            return
        sums = w.sum(-1)
        expect(
            self.does is not RIGHT or close(sums, torch.ones_like(sums)),
            "the rows of the returned weights do not sum to one",
            "the scores are returned, or weights after dropout",
            "the return statement",
        )
        expect(
            self.does is not RIGHT
            or w.shape != (2, 3, 5, 7)
            or close(w @ self.inputs[2], output),
            "the returned weights are not those that made the output",
            "weights are computed twice, or changed in between",
            "the return statement",
        )

    @check("map")
    def weights_masked(self) -> None:
        """Returned weights are zero where the mask hides."""
        _, w = self.call(*self.inputs, self.mask)
        if w is None or w.shape != (2, 3, 5, 7) or self.does is not RIGHT:
            return
        expect(
            bool((w.masked_fill(self.mask, 0.0).abs() < 1e-9).all()),
            "the returned weights show keys that are hidden",
            "the weights are collected without the mask",
            "the return statement",
        )

    @check("order")
    def order(self) -> None:
        """Reordering the keys together with their values changes nothing."""
        q, k, v = self.inputs
        turn = torch.arange(6, -1, -1)
        turned, _ = self.call(q, k[:, :, turn], v[:, :, turn])
        expect(
            close(turned, self.call(q, k, v)[0]) or self.does is not RIGHT,
            "reordering keys together with their values changes the output",
            "something depends on where a key stands",
            "every index into the keys",
        )

    @check("in place")
    def untouched(self) -> Finding | None:
        """Its inputs stay as they are, the mask too."""
        given = mask_as(self.mask, self.mask_means, self.inputs[0].dtype)
        return changed_in_place(
            lambda q, k, v, m: self.fn(q, k, v, **{self.mask_name: m}),
            *(*self.inputs, given),
        )

    @check("repeatable")
    def repeatable(self) -> Finding | None:
        """The same again gives the same, also after a call with another mask."""
        another = ~self.mask | (torch.arange(7) == 0)
        return not_repeatable(
            lambda: self.call(*self.inputs, self.mask)[0],
            lambda: self.call(*self.inputs, another),
        )


def with_gradients(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(t.clone().requires_grad_() for t in inputs)


def gradients_of(
    fn: Callable[..., Any], inputs: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    inputs = with_gradients(inputs)
    out = fn(*inputs)[0]
    if not out.requires_grad:
        return None, None, None
    direction = torch.linspace(-1, 1, out.numel(), dtype=out.dtype)
    loss = (out * direction.view_as(out)).sum()
    return torch.autograd.grad(loss, inputs, allow_unused=True)


Scale = Callable[[Tensor, Tensor, Tensor], float]


def one(q: Tensor, k: Tensor, v: Tensor) -> float:
    return 1.0


def variant(
    scale: Scale = lambda q, k, v: q.size(-1) ** -0.5,
    weigh: Callable[[Tensor], Tensor] = lambda scores: scores.softmax(-1),
    after: Scale = one,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Build attention with one step replaced; masked rows are zero as in minivit."""

    def fn(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        scores = q @ k.transpose(-2, -1) * scale(q, k, v)
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        weights = weigh(scores) * after(q, k, v)
        if mask is not None:
            weights = weights.masked_fill(~mask, 0.0)
        return weights @ v, weights

    return fn


RIGHT = Mistake("", "", "", "", lambda q, k, v, mask=None: _attend(q, k, v, mask=mask))
UNKNOWN = Mistake(
    "values",
    "outputs differ from softmax(Q Kᵀ / √d) V and from every known mistake",
    "the formula is another one",
    "the whole function, step by step",
    RIGHT.fn,
)

SCALE_MISTAKES = [
    Mistake("scale", f"outputs match {formula}", cause, SCALE_LINE, fn)
    for formula, (cause, fn) in {
        "softmax(Q Kᵀ · √d)": (
            "the scores are multiplied by √d, not divided",
            variant(lambda q, k, v: q.size(-1) ** 0.5),
        ),
        "softmax(Q Kᵀ)": ("the scores are not divided by √d", variant(one)),
        "softmax(Q Kᵀ / d)": (
            "the scores are divided by d, not by √d",
            variant(lambda q, k, v: 1.0 / q.size(-1)),
        ),
        "softmax(Q Kᵀ / √(H · d))": (
            "the scores are divided by the square root of the whole width, not of one "
            "head",
            variant(lambda q, k, v: (q.size(1) * q.size(-1)) ** -0.5),
        ),
        "softmax(Q Kᵀ / √L)": (
            "the scores are divided by the root of the number of queries, not of the "
            "width",
            variant(lambda q, k, v: q.size(-2) ** -0.5),
        ),
        "softmax(Q Kᵀ / √S)": (
            "the scores are divided by the root of the number of keys, not of the "
            "width",
            variant(lambda q, k, v: k.size(-2) ** -0.5),
        ),
        "softmax(Q Kᵀ / √dᵥ)": (
            "the scores are divided by the root of the values' width, not the queries'",
            variant(lambda q, k, v: v.size(-1) ** -0.5),
        ),
        "softmax(Q Kᵀ) / √d": (
            "the scaling comes after the softmax instead of before",
            variant(one, after=lambda q, k, v: q.size(-1) ** -0.5),
        ),
    }.items()
]

SOFTMAX_MISTAKES = [
    Mistake("softmax", f"outputs match {what}", cause, SOFTMAX_LINE, fn)
    for what, (cause, fn) in {
        "(Q Kᵀ / √d) V": ("there is no softmax", variant(weigh=lambda s: s)),
        "a softmax over the queries": (
            "the softmax runs over dim=-2, not over the keys (dim=-1)",
            variant(weigh=lambda scores: scores.softmax(-2)),
        ),
        "a softmax over the heads": (
            "the softmax runs over dim=1, not over the keys (dim=-1)",
            variant(weigh=lambda scores: scores.softmax(1)),
        ),
        "a softmax over the batch": (
            "the softmax runs over dim=0, not over the keys (dim=-1)",
            variant(weigh=lambda scores: scores.softmax(0)),
        ),
        "exp(Q Kᵀ / √d) V": (
            "the exponentials are not divided by their sum",
            variant(weigh=torch.exp),
        ),
        "a softmax of a softmax": (
            "the softmax is applied twice",
            variant(weigh=lambda scores: scores.softmax(-1).softmax(-1)),
        ),
        "log-softmax weights": (
            "log_softmax stands where softmax belongs",
            variant(weigh=lambda scores: scores.log_softmax(-1)),
        ),
        "sigmoid weights": (
            "a sigmoid stands where the softmax belongs",
            variant(weigh=torch.sigmoid),
        ),
    }.items()
]

ATTENTION_MISTAKES = [*SCALE_MISTAKES, *SOFTMAX_MISTAKES]


def other_scales() -> Iterator[Mistake]:
    """Divide by other numbers, such as are written down when d is fixed."""
    for n in range(1, 200):
        for text, factor in ((f"√{n}", n**-0.5), (f"{n}", 1 / n)):
            yield Mistake(
                "scale",
                f"outputs match softmax(Q Kᵀ / {text}) where Q is (2, 3, 5, 8)",
                "the scores are divided by another number than √d = √8",
                SCALE_LINE,
                variant(lambda q, k, v, c=factor: c),
            )


def with_mask(change: Callable[[Tensor], Tensor | None]) -> Callable[..., Any]:
    """Build attention that looks through another mask than the one it was given."""

    def fn(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Any:
        return _attend(q, k, v, mask=None if mask is None else change(mask))

    return fn


def with_weights(weigh: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    """Build attention that makes its weights of scores and mask in another way."""

    def fn(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Any:
        if mask is None:
            return _attend(q, k, v)
        weights = weigh(q @ k.transpose(-2, -1) / math.sqrt(q.size(-1)), mask)
        return weights @ v, weights

    return fn


MASK_MISTAKES = [
    Mistake("mask", f"outputs {what}", cause, MASK_LINE, fn)
    for what, (cause, fn) in {
        "match an inverted mask": (
            "True hides a key here; it must let the query look",
            with_mask(torch.logical_not),
        ),
        "do not change with the mask": (
            "the mask is never used",
            with_mask(lambda m: None),
        ),
        "match weights · mask, rows no longer summing to one": (
            "the mask is applied after the softmax instead of before",
            with_weights(lambda scores, m: scores.softmax(-1) * m),
        ),
        "match scores in which hidden keys are 0, or as good as 0": (
            "the scores are multiplied by the mask, or filled with a tiny number such "
            "as 1e-9 instead of a very negative one; e⁰ = 1 is not nothing",
            with_weights(lambda scores, m: (scores * m).softmax(-1)),
        ),
        "match the first sample's mask, used for the whole batch": (
            "the mask loses its batch axis",
            with_mask(lambda m: m[:1]),
        ),
        "match scores to which the mask was added": (
            "True and False were added as 1 and 0",
            with_weights(lambda scores, m: (scores + m).softmax(-1)),
        ),
    }.items()
]
