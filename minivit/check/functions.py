"""Functions, whose right answer is unique: checked by value."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import generation
from .. import vit as _vit
from ..attention import attention as _attend
from ..attention import causal_mask as _causal_mask
from ..transformer import Transformer
from .properties import (
    change_of,
    changed_in_place,
    check_means,
    copy_of,
    eval_copy,
    exact_inputs,
    in_half,
    mask_as,
    not_repeatable,
    random_input,
    wrong_shape,
)
from .report import (
    MASK_LINE,
    SCALE_LINE,
    SOFTMAX_LINE,
    Finding,
    Report,
    checker,
    close,
    differs,
    from_exception,
    run,
    seed_all,
)


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
    shapes = (2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 6)  # every size another number
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(s, generator=g, dtype=torch.float64) for s in shapes)
    mask = torch.rand(2, 1, 5, 7, generator=g) > 0.4
    mask[..., 0] = True  # every query sees something
    first = torch.arange(7) == 0

    def call(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        extra = {}
        if mask is not None:
            extra[mask_name] = mask_as(mask, mask_means, q.dtype)
        result = fn(q, k, v, **extra)
        if isinstance(result, Tensor):
            return result, None
        if isinstance(result, Mapping):
            result = tuple(result.values())
        return result[0], result[1] if len(result) > 1 else None

    q, k, v = exact_inputs(
        lambda q, k, v: [call(q, k, v)[0], call(q, k, v, mask)[0]], q, k, v
    )

    # Later checks are held against what the function does without a mask, be that right
    # or a known mistake, so that one mistake makes one finding.
    base: list[Mistake] = [RIGHT]

    def shape() -> Finding | None:
        output, _ = call(q, k, v)
        if close(output, _attend(q, k, v)[1] @ k):
            return Finding(
                "values",
                "outputs match weights · K",
                "the weights mix the keys, not the values",
                "the last product",
            )
        return wrong_shape(output, (2, 3, 5, 6))

    def values() -> Finding | None:
        output, _ = call(q, k, v)
        if close(output, RIGHT.fn(q, k, v, None)[0]):
            return None
        for mistake in ATTENTION_MISTAKES:
            if close(output, mistake.fn(q, k, v, None)[0]):
                base[0] = mistake
                return mistake.finding()
        for n in range(1, 200):
            for text, factor in ((f"√{n}", n**-0.5), (f"{n}", 1 / n)):
                wrong = _variant(scale=lambda q, k, v, c=factor: c)
                if close(output, wrong(q, k, v, None)[0]):
                    base[0] = Mistake(
                        "scale",
                        f"outputs match softmax(Q Kᵀ / {text}) where Q is (2, 3, 5, 8)",
                        "the scores are divided by another number than √d = √8",
                        SCALE_LINE,
                        wrong,
                    )
                    return base[0].finding()
        base[0] = UNKNOWN
        return Finding(
            "values",
            "outputs differ from softmax(Q Kᵀ / √d) V and from every known mistake",
            "the formula is another one",
            "the whole function, step by step",
        )

    def masked() -> Finding | None:
        output, _ = call(q, k, v, mask)
        if base[0] is UNKNOWN:
            return None
        if close(output, base[0].fn(q, k, v, mask)[0]):
            return None
        if base[0] is RIGHT:
            for mistake in MASK_MISTAKES:
                wrong = mistake.fn(q, k, v, mask)[0]
                if close(output.nan_to_num(), wrong.nan_to_num()):
                    return mistake.finding()
        other = v.clone()
        other[:, :, 3] += change_of(other[:, :, 3])
        sees = differs(call(q, k, other, mask)[0], output).any(-1).any(1)  # (B, L)
        if bool((sees == mask[:, 0, :, 3]).all()):
            return (
                None
                if base[0] is not RIGHT
                else Finding(
                    "mask",
                    "hidden keys do not reach the output, but the weights are off",
                    "the other weights are not those of a softmax over what is seen",
                    "where the mask meets the scores",
                )
            )
        return Finding(
            "mask",
            "keys that are hidden change the output, or visible ones do not",
            "the mask is not applied to the scores before the softmax",
            "where the mask meets the scores",
        )

    def hidden_row() -> Finding | None:
        nothing = mask.clone()
        nothing[0, 0, 2] = False
        inputs = [t.clone().requires_grad_() for t in (q, k, v)]
        output, _ = call(inputs[0], inputs[1], inputs[2], nothing)
        row = output[0, :, 2]
        if row.isnan().any() and hidden_rows:
            return Finding(
                "hidden row",
                "a query that may look nowhere gives NaN",
                "softmax over -inf alone is 0/0",
                "the value that hidden scores are filled with (or say "
                "hidden_rows=False, if no caller ever hides all keys)",
            )
        if not hidden_rows:
            return None
        if base[0] is RIGHT and not close(row, torch.zeros_like(row)):
            return Finding(
                "hidden row",
                "a query that may look nowhere gives a mean of all values, not zeros",
                "with every score equally low, the softmax is uniform",
                "after the softmax: set the weights of hidden keys to zero (or say "
                "hidden_rows=False, if no caller ever hides all keys)",
            )
        output.sum().backward()
        if not all(t.grad is None or t.grad.isfinite().all() for t in inputs):
            return Finding(
                "hidden row",
                "gradients are NaN when a query may look nowhere",
                "NaN is made and covered up later; the backward pass still meets it",
                "the value that hidden scores are filled with",
            )
        return None

    def half() -> Finding | None:
        for dtype in (torch.float16, torch.bfloat16):
            try:
                output = in_half(
                    lambda _, *t: call(t[0], t[1], t[2], mask)[0],
                    None,
                    *(q, k, v),
                    dtype=dtype,
                )
            except RuntimeError as error:
                if "overflow" not in str(error):
                    raise
                return from_exception("half", error)
            if not output.isfinite().all():
                return Finding(
                    "half",
                    f"the output under a mask is not finite in {dtype}",
                    "a constant is too large for half precision",
                    "the value that hidden scores are filled with",
                )
        return None

    def large() -> Finding | None:
        output, _ = call(q.float() * 30, k.float() * 30, v.float())
        if bool(output.isfinite().all()) or not call(q, k, v)[0].isfinite().all():
            return None
        return Finding(
            "overflow",
            "large scores, of some hundreds, give inf or NaN",
            "exp() overflows in a softmax written by hand",
            "subtract the largest score of a row before exp, or use softmax",
        )

    def gradients() -> Finding | None:
        def of(fn: Callable[..., Any]) -> tuple[Tensor | None, ...]:
            inputs = [t.clone().requires_grad_() for t in (q, k, v)]
            out = fn(*inputs)[0]
            if not out.requires_grad:
                return None, None, None
            direction = torch.linspace(-1, 1, out.numel(), dtype=out.dtype)
            loss = (out * direction.view_as(out)).sum()
            return torch.autograd.grad(loss, inputs, allow_unused=True)

        if base[0] is not RIGHT:
            return None
        for name, got, want in zip("QKV", of(call), of(_attend), strict=True):
            if got is None or want is None or not close(got, want, 1e-4):
                return Finding(
                    "gradients",
                    f"the output is right, the gradient that reaches {name} is not",
                    "the graph is cut: detach, .data, no_grad or numbers taken out",
                    "every step between the inputs and the output",
                )
        return None

    def weights() -> Finding | None:
        output, w = call(q, k, v)
        if w is None:
            return None
        if not close(w.sum(-1), torch.ones_like(w.sum(-1))) and base[0] is RIGHT:
            return Finding(
                "weights",
                "the rows of the returned weights do not sum to one",
                "the scores are returned, or weights after dropout",
                "the return statement",
            )
        if base[0] is RIGHT and w.shape == (2, 3, 5, 7) and not close(w @ v, output):
            return Finding(
                "weights",
                "the returned weights are not those that made the output",
                "weights are computed twice, or changed in between",
                "the return statement",
            )
        return None

    def weights_masked() -> Finding | None:
        _, w = call(q, k, v, mask)
        if w is None or w.shape != (2, 3, 5, 7) or base[0] is not RIGHT:
            return None
        if bool((w.masked_fill(mask, 0.0).abs() < 1e-9).all()):
            return None
        return Finding(
            "map",
            "the returned weights show keys that are hidden",
            "the weights are collected without the mask",
            "the return statement",
        )

    def order() -> Finding | None:
        turn = torch.arange(6, -1, -1)
        same = close(call(q, k[:, :, turn], v[:, :, turn])[0], call(q, k, v)[0])
        if same or base[0] is not RIGHT:
            return None
        return Finding(
            "order",
            "reordering keys together with their values changes the output",
            "something depends on where a key stands",
            "every index into the keys",
        )

    def untouched() -> Finding | None:
        def four(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Any:
            return fn(q, k, v, **{mask_name: m})

        given = mask_as(mask, mask_means, q.dtype)
        return changed_in_place(four, q, k, v, given)

    return run(
        "attention",
        [
            ("shape", shape),
            ("values", values),
            ("mask", masked),
            ("hidden row", hidden_row),
            ("half", half),
            ("overflow", large),
            ("gradients", gradients),
            ("weights", weights),
            ("map", weights_masked),
            ("order", order),
            ("in place", untouched),
            (
                "repeatable",
                lambda: not_repeatable(
                    lambda: call(q, k, v, mask)[0], lambda: call(q, k, v, ~mask | first)
                ),
            ),
        ],
    )


@dataclass(frozen=True)
class Mistake:
    """A known mistake: what it says, and a function that makes it."""

    check: str
    symptom: str
    cause: str
    look_at: str
    fn: Callable[..., Any]

    def finding(self) -> Finding:
        return Finding(self.check, self.symptom, self.cause, self.look_at)


def _variant(
    scale: Callable[[Tensor, Tensor, Tensor], float] = lambda q, k, v: (
        q.size(-1) ** -0.5
    ),
    normalise: Callable[[Tensor], Tensor] = lambda scores: scores.softmax(-1),
    after: Callable[[Tensor], float] = lambda q: 1.0,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Build attention with one step replaced; masked rows are zero as in the house."""

    def fn(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        scores = q @ k.transpose(-2, -1) * scale(q, k, v)
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        weights = normalise(scores) * after(q)
        if mask is not None:
            weights = weights.masked_fill(~mask, 0.0)
        return weights @ v, weights

    return fn


RIGHT = Mistake("", "", "", "", lambda q, k, v, m: _attend(q, k, v, mask=m))
UNKNOWN = Mistake("", "", "", "", RIGHT.fn)

ATTENTION_MISTAKES = [
    Mistake(
        "scale",
        "outputs match softmax(Q Kᵀ · √d)",
        "the scores are multiplied by √d, not divided",
        SCALE_LINE,
        _variant(scale=lambda q, k, v: q.size(-1) ** 0.5),
    ),
    Mistake(
        "scale",
        "outputs match softmax(Q Kᵀ)",
        "the scores are not divided by √d",
        SCALE_LINE,
        _variant(scale=lambda q, k, v: 1.0),
    ),
    Mistake(
        "scale",
        "outputs match softmax(Q Kᵀ / d)",
        "the scores are divided by d, not by √d",
        SCALE_LINE,
        _variant(scale=lambda q, k, v: 1.0 / q.size(-1)),
    ),
    Mistake(
        "scale",
        "outputs match softmax(Q Kᵀ / √(H · d))",
        "the scores are divided by the square root of the whole width, not of one head",
        SCALE_LINE,
        _variant(scale=lambda q, k, v: (q.size(1) * q.size(-1)) ** -0.5),
    ),
    Mistake(
        "scale",
        "outputs match softmax(Q Kᵀ / √L)",
        "the scores are divided by the root of the number of queries, not of the width",
        SCALE_LINE,
        _variant(scale=lambda q, k, v: q.size(-2) ** -0.5),
    ),
    Mistake(
        "scale",
        "outputs match softmax(Q Kᵀ / √S)",
        "the scores are divided by the root of the number of keys, not of the width",
        SCALE_LINE,
        _variant(scale=lambda q, k, v: k.size(-2) ** -0.5),
    ),
    Mistake(
        "scale",
        "outputs match softmax(Q Kᵀ / √dᵥ)",
        "the scores are divided by the root of the values' width, not the queries'",
        SCALE_LINE,
        _variant(scale=lambda q, k, v: v.size(-1) ** -0.5),
    ),
    Mistake(
        "scale",
        "outputs match softmax(Q Kᵀ) / √d",
        "the scaling comes after the softmax instead of before",
        SCALE_LINE,
        _variant(scale=lambda q, k, v: 1.0, after=lambda q: q.size(-1) ** -0.5),
    ),
    Mistake(
        "softmax",
        "outputs match (Q Kᵀ / √d) V",
        "there is no softmax",
        SOFTMAX_LINE,
        _variant(normalise=lambda scores: scores),
    ),
    Mistake(
        "softmax",
        "outputs match a softmax over the queries",
        "the softmax runs over dim=-2, not over the keys (dim=-1)",
        SOFTMAX_LINE,
        _variant(normalise=lambda scores: scores.softmax(-2)),
    ),
    Mistake(
        "softmax",
        "outputs match a softmax over the heads",
        "the softmax runs over dim=1, not over the keys (dim=-1)",
        SOFTMAX_LINE,
        _variant(normalise=lambda scores: scores.softmax(1)),
    ),
    Mistake(
        "softmax",
        "outputs match a softmax over the batch",
        "the softmax runs over dim=0, not over the keys (dim=-1)",
        SOFTMAX_LINE,
        _variant(normalise=lambda scores: scores.softmax(0)),
    ),
    Mistake(
        "softmax",
        "outputs match exp(Q Kᵀ / √d) V",
        "the exponentials are not divided by their sum",
        SOFTMAX_LINE,
        _variant(normalise=torch.exp),
    ),
    Mistake(
        "softmax",
        "outputs match a softmax of a softmax",
        "the softmax is applied twice",
        SOFTMAX_LINE,
        _variant(normalise=lambda scores: scores.softmax(-1).softmax(-1)),
    ),
    Mistake(
        "softmax",
        "outputs match log-softmax weights",
        "log_softmax stands where softmax belongs",
        SOFTMAX_LINE,
        _variant(normalise=lambda scores: scores.log_softmax(-1)),
    ),
    Mistake(
        "softmax",
        "outputs match sigmoid weights",
        "a sigmoid stands where the softmax belongs",
        SOFTMAX_LINE,
        _variant(normalise=lambda scores: scores.sigmoid()),
    ),
]


def _mask_variant(fill: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Build attention with another way to bring in the mask."""

    def fn(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))
        weights = fill(scores, mask)
        return weights @ v, weights

    return fn


MASK_MISTAKES = [
    Mistake(
        "mask",
        "outputs match an inverted mask",
        "True hides a key here; it must let the query look",
        MASK_LINE,
        lambda q, k, v, m: _attend(q, k, v, mask=~m),
    ),
    Mistake(
        "mask",
        "outputs do not change with the mask",
        "the mask is never used",
        MASK_LINE,
        lambda q, k, v, m: _attend(q, k, v),
    ),
    Mistake(
        "mask",
        "outputs match weights · mask, rows no longer summing to one",
        "the mask is applied after the softmax instead of before",
        MASK_LINE,
        _mask_variant(lambda scores, m: scores.softmax(-1) * m),
    ),
    Mistake(
        "mask",
        "outputs match scores in which hidden keys are 0, or as good as 0",
        "the scores are multiplied by the mask, or filled with a tiny number such as "
        "1e-9 instead of a very negative one; e⁰ = 1 is not nothing",
        MASK_LINE,
        _mask_variant(lambda scores, m: (scores * m).softmax(-1)),
    ),
    Mistake(
        "mask",
        "outputs match the first sample's mask, used for the whole batch",
        "the mask loses its batch axis",
        MASK_LINE,
        lambda q, k, v, m: _attend(q, k, v, mask=m[:1]),
    ),
    Mistake(
        "mask",
        "outputs match scores to which the mask was added",
        "True and False were added as 1 and 0",
        MASK_LINE,
        _mask_variant(lambda scores, m: (scores + m).softmax(-1)),
    ),
]


@checker
def causal_mask(fn: Callable[..., Tensor], *, mask_means: str = "look") -> Report:
    """Check a function that makes a causal mask.

    Args:
        fn: called as fn(length), and as fn(query_len, key_len) if it takes two numbers;
            returns a mask that broadcasts to (L, S): bool, or float with -inf where
            hidden.
        mask_means: "look" if True lets a query see a key, "hide" if it hides it.

    Returns:
        The report.

    Raises:
        ValueError: another `mask_means`.
    """
    check_means(mask_means)

    def mask(*lengths: int) -> Tensor:
        m = torch.as_tensor(fn(*lengths))
        while m.dim() > 2 and m.size(0) == 1:
            m = m[0]
        if m.is_floating_point() and bool((m == 0).any() and (m < -1e3).any()):
            return m == 0  # to be added to the scores
        return m.bool() if mask_means == "look" else ~m.bool()

    def values() -> Finding | None:
        got, want = mask(5), _causal_mask(5)
        if got.shape != want.shape:
            return wrong_shape(got, tuple(want.shape))
        if bool((got == want).all()):
            return None
        for cause, wrong in (
            ("True and False are exchanged", ~want),
            ("each query sees the future instead of the past", want.T),
            ("a query does not see itself", want.tril(-1)),
            ("one token of the future is visible", torch.ones(5, 5).tril(1).bool()),
            ("everything is visible", torch.ones(5, 5).bool()),
            ("the past is hidden, and the query sees the future only", ~want.T & ~want),
        ):
            if bool((got == wrong).all()):
                return Finding(
                    "values", "the mask differs", cause, "tril, triu and their diagonal"
                )
        return Finding(
            "values",
            f"{int((got != want).sum())} of 25 cells differ",
            "query i must see keys 0 … i and no others",
            "the comparison of row and column numbers",
        )

    def aligned() -> Finding | None:
        try:
            got = mask(2, 5)
        except TypeError:
            return None  # takes one length only
        if got.shape == (2, 5) and bool((got == _causal_mask(2, 5)).all()):
            return None
        return Finding(
            "aligned",
            "with 2 queries and 5 keys, the last query does not see all keys",
            "the mask is aligned with the first key; in cached decoding the queries "
            "are the newest tokens",
            "the diagonal, which must be S - L",
        )

    return run(
        "causal_mask",
        [
            ("values", values),
            ("aligned", aligned),
            ("repeatable", lambda: not_repeatable(lambda: mask(4).float())),
        ],
    )


@checker
def padding_mask(fn: Callable[..., Tensor], *, mask_means: str = "look") -> Report:
    """Check a function that makes a padding mask from lengths.

    Args:
        fn: called as fn(lengths, max_len) with integers (B,); returns a mask with B·S
            cells that broadcasts over heads and queries, such as (B, 1, 1, S).
        mask_means: "look" if True lets a query see a key, "hide" if it hides it.

    Returns:
        The report.

    Raises:
        ValueError: another `mask_means`.
    """
    check_means(mask_means)
    lengths, want = (
        torch.tensor([3, 1, 5]),
        torch.arange(5) < torch.tensor([[3], [1], [5]]),
    )

    def mask() -> Tensor:
        m = fn(lengths.clone(), 5).bool()
        return m if mask_means == "look" else ~m

    def shape() -> Finding | None:
        m = mask()
        if m.shape == (3, 1, 1, 5):
            return None
        if m.shape == (3, 1, 5, 1):
            return Finding(
                "shape",
                "the mask has shape (B, 1, L, 1)",
                "it hides rows (queries), and hidden keys still reach the others",
                "the axis along which positions are compared with lengths",
            )
        if m.numel() == 15 and m.shape in ((3, 5), (3, 1, 5)):
            return Finding(
                "shape",
                f"the mask has shape {tuple(m.shape)}",
                "against scores (B, H, L, S) it does not broadcast over heads and "
                "queries: the batch meets another axis",
                "the result: add axes, (B, 1, 1, S)",
            )
        return wrong_shape(m, (3, 1, 1, 5))

    def values() -> Finding | None:
        m = mask()[:, 0, 0]
        if bool((m == want).all()):
            return None
        for cause, wrong in (
            ("True and False are exchanged", ~want),
            ("one padded key too many is visible", torch.arange(5) <= lengths[:, None]),
            ("the last real key is hidden", torch.arange(5) < lengths[:, None] - 1),
            ("the padding is taken to stand in front", want.flip(1)),
            ("everything is visible", torch.ones(3, 5).bool()),
        ):
            if bool((m == wrong).all()):
                return Finding(
                    "values", "the mask differs", cause, "the comparison with lengths"
                )
        return Finding(
            "values",
            f"{int((m != want).sum())} of 15 cells differ",
            "keys 0 … length-1 must be visible and no others",
            "the comparison with lengths",
        )

    return run("padding_mask", [("shape", shape), ("values", values)])


@checker
def sinusoidal_positions(fn: Callable[[int, int], Tensor]) -> Report:
    """Check a function that makes the table of sinusoidal positions.

    Args:
        fn: called as fn(length, embed_dim); returns (length, embed_dim), possibly with
            leading axes of size one; sines and cosines interleaved as in the paper, or
            all sines before all cosines.

    Returns:
        The report.
    """
    length, dim = 40, 16
    p = torch.arange(length, dtype=torch.float64)[:, None]  # (L, 1)
    i = torch.arange(dim, dtype=torch.float64)  # (E,)
    pair = torch.arange(dim // 2, dtype=torch.float64)  # (E/2,)

    def weave(angles_sin: Tensor, angles_cos: Tensor) -> Tensor:
        return torch.stack([angles_sin.sin(), angles_cos.cos()], -1).flatten(1)

    def angles(exponent: Tensor, base: float = 10000.0) -> Tensor:
        return p / base**exponent

    right = angles(2 * pair / dim)
    doubled = angles(2 * i / dim)  # i already runs over sines and cosines
    each = angles(i / dim)

    def table() -> Tensor:
        t = torch.as_tensor(fn(length, dim)).detach().double()
        while t.dim() > 2 and t.size(0) == 1:
            t = t[0]
        return t

    def values() -> Finding | None:
        got = table()
        for want in (weave(right, right), torch.cat([right.sin(), right.cos()], 1)):
            if close(got, want, 1e-4):
                return None
        line = "the exponent"
        for symptom, cause, where, wrong in (
            (
                "frequencies fall twice as fast as they should",
                "the exponent is 2i/d where i already runs over sines and cosines",
                line,
                weave(doubled[:, 0::2], doubled[:, 1::2]),
            ),
            (
                "frequencies fall twice as fast as they should",
                "the exponent is doubled: 2 · (2i)/d",
                line,
                weave(angles(4 * pair / dim), angles(4 * pair / dim)),
            ),
            (
                "a sine and its cosine turn at different speeds",
                "each feature has its own exponent i/d; the two of a pair share one",
                line,
                weave(each[:, 0::2], each[:, 1::2]),
            ),
            (
                "a sine and its cosine turn at different speeds",
                "the cosine's exponent is 2(i+1)/d instead of the sine's 2i/d",
                line,
                weave(doubled[:, 0::2], angles(2 * (i[0::2] + 1) / dim)),
            ),
            (
                "a sine and its cosine turn at different speeds",
                "the cosine's exponent is 2(i+1)/d instead of the sine's 2i/d",
                line,
                weave(right, angles(2 * (pair + 1) / dim)),
            ),
            (
                "frequencies grow instead of falling",
                "the angle is p · 10000^(2i/d): multiplied, not divided",
                line,
                weave(p * 10000 ** (2 * pair / dim), p * 10000 ** (2 * pair / dim)),
            ),
            (
                "sine and cosine are exchanged",
                "even features must be sines, odd ones cosines",
                "the two assignments",
                torch.stack([right.cos(), right.sin()], -1).flatten(1),
            ),
            (
                "frequencies fall half as fast as they should",
                "the exponent is i/d where i counts pairs; it must be 2i/d",
                line,
                weave(angles(pair / dim), angles(pair / dim)),
            ),
            (
                "the last frequency is reached half a step early",
                "the exponent is i/(d/2 - 1), as in Tensor2Tensor and fairseq; the "
                "paper has 2i/d",
                line,
                torch.cat(
                    [
                        angles(pair / (dim // 2 - 1)).sin(),
                        angles(pair / (dim // 2 - 1)).cos(),
                    ],
                    1,
                ),
            ),
            (
                "the wavelengths are too short",
                "the base is 1000, not 10000",
                line,
                weave(angles(2 * pair / dim, 1e3), angles(2 * pair / dim, 1e3)),
            ),
            (
                "the table is shifted by one position",
                "positions begin at 1, not at 0",
                "the range of positions",
                weave(right + right[1], right + right[1]),
            ),
        ):
            if close(got, wrong, 1e-4):
                return Finding("values", symptom, cause, where)
        if close(got[1:], got[:1].expand_as(got[1:])):
            return Finding(
                "values",
                "all positions have the same vector",
                "the table is read at one place, [n], instead of up to it, [:n]",
                "the index into the table",
            )
        return Finding(
            "values",
            "the table differs from the paper's and from every known mistake",
            "sin and cos of p / 10000^(2i/d), i counting pairs, are expected",
            "the whole function, step by step",
        )

    return run(
        "sinusoidal_positions",
        [
            ("shape", lambda: wrong_shape(table(), (length, dim))),
            ("values", values),
            ("repeatable", lambda: not_repeatable(table)),
        ],
    )


@checker
def layer_norm(fn: Callable[[Tensor], Tensor], *, eps: float | None = None) -> Report:
    """Check a layer normalisation, a function or a module.

    Args:
        fn: called with x (B, L, E), E = 6; scale one and shift zero.
        eps: the small number it uses; the module's attribute if not given, else 1e-5.

    Returns:
        The report.
    """
    known = getattr(fn, "eps", None) if eps is None else eps
    expected = 1e-5 if known is None else float(known)
    own = eval_copy(fn, torch.float32)
    g = torch.Generator().manual_seed(0)
    # Small numbers, so that the place of eps shows. Their mean is as small as their
    # deviation: E[x²] - E[x]² would lose its digits otherwise.
    x = torch.randn(4, 5, 6, generator=g) * 0.01 + 0.01

    def variant(
        over: tuple[int, ...],
        unbiased: bool,
        outside: bool,
        root: bool,
        eps: float = expected,
    ) -> Tensor:
        mean = x.mean(over, keepdim=True)
        variance = x.var(over, keepdim=True, unbiased=unbiased)
        if not root:
            return (x - mean) / (variance + eps)
        return (x - mean) / (
            variance.sqrt() + eps if outside else (variance + eps).sqrt()
        )

    features, tokens, batch = (2,), (1, 2), (0,)
    place = "the line with the square root"

    def values() -> Finding | None:
        got, constant = own(x.clone()), own(torch.zeros_like(x))
        if not constant.isfinite().all():
            return Finding(
                "values",
                "a constant input gives NaN or inf",
                "eps is missing: a constant input is 0/0",
                place,
            )
        if close(got, variant(features, False, False, True), 1e-4):
            return None
        for other in (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 0.0):
            if close(got, variant(features, False, False, True, other), 1e-4):
                return Finding(
                    "values",
                    "outputs differ from nn.LayerNorm's, but for another eps they do "
                    "not",
                    f"eps is {other or 'smaller than 1e-7'}, not {expected} (or say "
                    "eps=…)",
                    place,
                )
        for cause, where, wrong in (
            (
                "the deviation is the unbiased one (divided by E - 1), and eps stands "
                "outside the root",
                place,
                variant(features, True, True, True),
            ),
            (
                "the variance is the unbiased one, divided by E - 1 instead of E",
                "var or std: unbiased=False",
                variant(features, True, False, True),
            ),
            (
                "eps is added to the deviation, outside the root",
                place,
                variant(features, False, True, True),
            ),
            (
                "the square root of the variance is missing",
                place,
                variant(features, False, False, False),
            ),
            (
                "mean and variance are taken over tokens and features together",
                "the axes of mean and var",
                variant(tokens, False, False, True),
            ),
            (
                "mean and variance are taken over tokens, not features",
                "the axis of mean and var",
                variant((1,), False, False, True),
            ),
            (
                "mean and variance are taken over the batch",
                "the axis of mean and var",
                variant(batch, False, False, True),
            ),
            (
                "mean and variance are taken over batch and tokens (batch norm)",
                "the axes of mean and var",
                variant((0, 1), False, False, True),
            ),
            (
                "the mean is not subtracted (RMS norm)",
                "the numerator",
                x * (x.square().mean(-1, keepdim=True) + expected).rsqrt(),
            ),
            (
                "x is divided by √E: nothing is normalised",
                "the whole function",
                x / math.sqrt(x.size(-1)),
            ),
        ):
            if close(got, wrong, 1e-4):
                return Finding(
                    "values", "outputs differ from nn.LayerNorm", cause, where
                )
        return Finding(
            "values",
            "outputs differ from nn.LayerNorm and from every known mistake",
            "(x - mean) / √(variance + eps) over the features is expected",
            "the whole function, step by step",
        )

    def gain_and_shift() -> Finding | None:
        if not isinstance(own, nn.Module) or len(list(own.parameters())) != 2:
            return None
        if values() is not None:
            return None  # said already
        changed = copy_of(own)
        one, two = changed.parameters()
        if one.numel() != 6 or two.numel() != 6:
            return None
        with torch.no_grad():
            one.copy_(torch.linspace(1, 2, 6).view_as(one))
            two.copy_(torch.linspace(-3, 5, 6).view_as(two))
        got = changed(x.clone())
        for gain, shift in ((one, two), (two, one)):
            want = F.layer_norm(x, (6,), gain.flatten(), shift.flatten(), expected)
            if close(got, want, 1e-4):
                return None
        return Finding(
            "gain",
            "with other gains and shifts the outputs differ from nn.LayerNorm",
            "gain · normalised + shift is expected, one number a feature each",
            "the last line",
        )

    return run(
        "layer_norm",
        [
            ("shape", lambda: wrong_shape(own(x.clone()), (4, 5, 6))),
            ("values", values),
            ("gain", gain_and_shift),
            ("in place", lambda: changed_in_place(own, x)),
        ],
    )


@checker
def patchify(
    fn: Callable[[Tensor, int], Tensor], *, channels_first: bool = False
) -> Report:
    """Check a function that cuts images into patches.

    Args:
        fn: called as fn(images, patch_size) with (B, C, height, width), not square;
            returns (B, N, P·P·C), patches row by row.
        channels_first: inside a patch the order is channel, row, column (as
            `torch.nn.functional.unfold`), not row, column, channel.

    Returns:
        The report.
    """
    batch, channels, height, width, p = 2, 3, 4, 6, 2
    x = torch.arange(batch * channels * height * width, dtype=torch.float32)
    x = x.view(batch, channels, height, width)
    right = _vit.patchify(x, p)  # (B, N, P·P·C)
    unfolded = F.unfold(x, p, stride=p).transpose(1, 2)  # (B, N, C·P·P)
    want, other = (unfolded, right) if channels_first else (right, unfolded)
    n = right.size(1)

    def values() -> Finding | None:
        got = fn(x.clone(), p)
        if torch.equal(got, want):
            return None
        by_column = _vit.patchify(x.transpose(2, 3), p)
        for symptom, cause, wrong in (
            (
                "patches match a bare reshape: each is a run of rows, not a square",
                "reshape alone does not move pixels; permute must come in between",
                x.reshape(batch, n, -1),
            ),
            (
                "patches match a bare reshape of (B, height, width, C)",
                "reshape alone does not move pixels; permute must come in between",
                x.permute(0, 2, 3, 1).reshape(batch, n, -1),
            ),
            (
                "the patches are right, the order inside a patch is another",
                "channels come last in a patch (or first, with channels_first=True)",
                other,
            ),
            (
                "the patches come column by column, or transposed",
                "the axes of rows and columns are exchanged",
                by_column,
            ),
        ):
            if got.shape == wrong.shape and torch.equal(got, wrong):
                return Finding("values", symptom, cause, "the permutation of the axes")
        same_patches = torch.equal(got.sort(-1).values, right.sort(-1).values)
        if same_patches:
            return Finding(
                "values",
                "each patch holds the right pixels in an unknown order",
                "row, column, channel is expected",
                "the last reshape",
            )
        return Finding(
            "values",
            "patches do not hold the pixels of one square each",
            "the image is taken apart along the wrong axes",
            "the permutation of the axes",
        )

    return run(
        "patchify",
        [
            ("shape", lambda: wrong_shape(fn(x.clone(), p), tuple(right.shape))),
            ("values", values),
            ("in place", lambda: changed_in_place(lambda t: fn(t, p), x)),
        ],
    )


@checker
def generate(
    fn: Callable[..., Tensor], *, includes_bos: bool = False, max_len: int = 8
) -> Report:
    """Check a greedy decoder on small models of the house, whatever its insides.

    Args:
        fn: called as fn(model, src, bos_id=…, eos_id=…, max_len=…) with a
            `minivit.Transformer`; returns (B, L) ids, filled up with `pad_id`.
        includes_bos: what is returned begins with the start token.
        max_len: longest sequence to write, the end token included.

    Returns:
        The report.
    """
    bos, eos, pad = 1, 2, 0

    def model(seed: int, dropout: float = 0.0) -> Transformer:
        seed_all(seed)
        m = Transformer(
            src_vocab_size=9,
            tgt_vocab_size=9,
            embed_dim=16,
            num_heads=2,
            num_layers=1,
            mlp_dim=16,
            dropout=dropout,
            tie_embeddings=False,
        )
        nn.init.normal_(m.head.weight, std=1.0)
        return m.eval()

    src = torch.randint(3, 9, (6, 5), generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"bos_id": bos, "eos_id": eos, "max_len": max_len}

    def write(m: nn.Module, src: Tensor = src) -> Tensor:
        ids = fn(m, src.clone(), **options)
        return ids[:, 1:] if includes_bos else ids

    def padded(ids: Tensor, length: int) -> Tensor:
        return F.pad(ids, (0, max(length - ids.size(1), 0)), value=pad)

    def same(a: Tensor, b: Tensor) -> bool:
        length = max(a.size(1), b.size(1))
        return torch.equal(padded(a, length), padded(b, length))

    def values() -> Finding | None:
        for seed in range(4):
            m = model(seed)
            got, want = write(m), generation.greedy_search(m, src, **options)
            if same(got, want):
                continue
            if bool((got[:, 0] == bos).all()):
                return Finding(
                    "values",
                    "the output begins with the start token",
                    "it is not cut off (or say includes_bos=True)",
                    "the return statement",
                )
            if got.size(1) > max_len:
                return Finding(
                    "length",
                    f"{got.size(1)} tokens are written where max_len={max_len}",
                    "the loop runs too long",
                    "the loop's condition",
                )
            ended = (want == eos).cumsum(1).roll(1, 1)
            ended[:, 0] = 0
            if got.size(1) >= want.size(1):
                before = got[:, : want.size(1)][ended == 0]
                if torch.equal(before, want[ended == 0]):
                    return Finding(
                        "end",
                        "after its end token a sequence goes on",
                        "what follows is not replaced by pad_id",
                        "what happens once a sequence has ended",
                    )
            shorter = min(got.size(1), want.size(1))
            if torch.equal(got[:, :shorter], want[:, :shorter]):
                return Finding(
                    "length",
                    f"{got.size(1)} tokens are written, {want.size(1)} expected",
                    "the loop stops too early, when the first sequence has ended or "
                    "one token before max_len",
                    "the loop's condition",
                )
            if torch.equal(got[:, 0], want[:, 0]):
                return Finding(
                    "values",
                    "the first token is right, later ones are not",
                    "the model is not given all tokens so far, at their positions",
                    "what is handed to the decoder at each step",
                )
            return Finding(
                "values",
                "the tokens are not the most probable ones",
                "another position's logits are read, or another token chosen",
                "the arg-max over the last position",
            )
        return None

    def eval_mode() -> Finding | None:
        m = model(0, dropout=0.5)
        want = generation.greedy_search(m, src, **options)
        m.train()
        results = [write(m) for _ in range(3)]
        if all(same(got, want) for got in results):
            return None
        return Finding(
            "eval mode",
            "a model in train mode writes something else, with dropout active",
            "the model is not switched to eval mode while it writes",
            "model.eval() before, the old mode restored after",
        )

    def mode_kept() -> Finding | None:
        m = model(0).train()
        write(m)
        if m.training:
            return None
        return Finding(
            "mode kept",
            "the model comes back in eval mode although it came in train mode",
            "the mode is not restored",
            "model.train(...) at the end",
        )

    def batch() -> Finding | None:
        m = model(1)
        together = write(m)
        for b in range(3):
            if not same(write(m, src[b : b + 1]), together[b : b + 1]):
                return Finding(
                    "batch",
                    "a sequence is written differently alone and in a batch",
                    "sequences influence each other",
                    "what ends the loop, and every reshape",
                )
        return None

    def no_graph() -> Finding | None:
        m = model(0)
        seen: list[bool] = []
        hook = m.head.register_forward_hook(
            lambda module, args, out: seen.append(out.requires_grad)
        )
        write(m)
        hook.remove()
        if not any(seen):
            return None
        return Finding(
            "no grad",
            "a graph for gradients is kept while writing",
            "memory grows with every token",
            "torch.no_grad() around the loop",
        )

    return run(
        "generate",
        [
            ("values", values),
            ("eval mode", eval_mode),
            ("mode kept", mode_kept),
            ("batch", batch),
            ("no grad", no_graph),
            (
                "in place",
                lambda: changed_in_place(lambda s: fn(model(0), s, **options), src),
            ),
        ],
    )


@checker
def accumulation(fn: Callable[..., Any]) -> Report:
    """Check a function that makes one update from several micro-batches.

    Args:
        fn: called as fn(model, batches, loss_fn, optimizer, scheduler), where batches
            is a list of (inputs, targets); makes one update of the model.

    Returns:
        The report.
    """
    x, y = random_input(8, 4), torch.arange(8) % 3

    def whole(model: Any, batches: Any, loss_fn: Any, optimizer: Any, _: Any) -> None:
        loss_fn(model(x), y).backward()
        optimizer.step()

    def update(fn: Callable[..., Any]) -> tuple[Tensor, int]:
        """Return how the weight changed, and how far the schedule moved."""
        seed_all(0)
        model = nn.Linear(4, 3)
        before = model.weight.detach().clone()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1000)
        batches = list(zip(x.split(2), y.split(2), strict=True))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, on the order of the steps
            fn(model, batches, F.cross_entropy, optimizer, scheduler)
        return model.weight.detach() - before, scheduler.last_epoch

    def gradient() -> Finding | None:
        got, want = update(fn)[0], update(whole)[0]
        if close(got, want):
            return None
        if close(got, 4 * want):
            return Finding(
                "gradient",
                "the update is 4 times as large for 4 micro-batches",
                "the loss is not divided by the number of micro-batches",
                "the line before backward()",
            )
        return Finding(
            "gradient",
            "the update differs from that of the whole batch",
            "gradients are reset between micro-batches, or the optimiser steps in each",
            "zero_grad() and step()",
        )

    def schedule() -> Finding | None:
        steps = update(fn)[1]
        if steps == 1:
            return None
        return Finding(
            "schedule",
            f"the scheduler moved {steps} steps in one update",
            "it is stepped once a micro-batch, not once an update",
            "scheduler.step()",
        )

    return run("accumulation", [("gradient", gradient), ("schedule", schedule)])


@checker
def vocabulary(fn: Callable[..., Iterable[str]]) -> Report:
    """Check that a vocabulary is made of the training texts only.

    Args:
        fn: called as fn(train, val, test), each a list of sentences; returns the tokens
            of the vocabulary (any collection of strings, or a dict with such keys).

    Returns:
        The report.
    """

    def leak() -> Finding | None:
        known = set(fn(["the cat sat"] * 3, ["a dogfish ran"] * 3, ["one zebra"] * 3))
        if "cat" not in known:
            return Finding(
                "words", "a training word is missing", "nothing is counted", "the loop"
            )
        extra = sorted(known & {"dogfish", "ran", "zebra"})
        if not extra:
            return None
        return Finding(
            "leak",
            f"the vocabulary holds {', '.join(extra)}, never seen in training",
            "it is built on validation or test texts too",
            "the texts that are counted",
        )

    return run("vocabulary", [("leak", leak)])
