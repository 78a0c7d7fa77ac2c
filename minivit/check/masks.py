"""Masks, made by functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention import causal_mask as _causal_mask
from .properties import check_means, not_repeatable, wrong_shape
from .report import Finding, Report, checker
from .subject import Mistake, Subject, check, expect


@checker
def causal_mask(fn: Callable[..., Tensor], *, mask_means: str = "look") -> Report:
    """Check a function that makes a causal mask.

    Args:
        fn: called as fn(length), and as fn(query_len, key_len) if it takes two numbers;
            returns a mask that broadcasts to (L, S): bool, or float with -inf where
            hidden.
        mask_means: "look" if True lets a query see a key, "hide" if it hides it, "add"
            if the mask is added to the scores (0 or -inf).

    Returns:
        The report.

    Raises:
        ValueError: another `mask_means`.
    """
    check_means(mask_means)
    return CausalMask(fn, mask_means).report()


@checker
def padding_mask(fn: Callable[..., Tensor], *, mask_means: str = "look") -> Report:
    """Check a function that makes a padding mask from lengths.

    Args:
        fn: called as fn(lengths, max_len) with integers (B,); returns a mask with B·S
            cells that broadcasts over heads and queries, such as (B, 1, 1, S).
        mask_means: "look" if True lets a query see a key, "hide" if it hides it, "add"
            if the mask is added to the scores (0 or -inf).

    Returns:
        The report.

    Raises:
        ValueError: another `mask_means`.
    """
    check_means(mask_means)
    return PaddingMask(fn, mask_means).report()


CAUSAL_MASK_MISTAKES = [
    Mistake("values", "the mask differs", cause, "tril, triu and their diagonal", fn)
    for cause, fn in {
        "True and False are exchanged": lambda n: ~_causal_mask(n),
        "each query sees the future instead of the past": lambda n: _causal_mask(n).T,
        "a query does not see itself": lambda n: _causal_mask(n).tril(-1),
        "one token of the future is visible": lambda n: torch.ones(n, n).tril(1).bool(),
        "everything is visible": lambda n: torch.ones(n, n).bool(),
        "everything is hidden": lambda n: torch.zeros(n, n).bool(),
    }.items()
]


@dataclass
class CausalMask(Subject):
    """The function, and how its masks are meant."""

    fn: Callable[..., Tensor]
    mask_means: str
    name = "causal_mask"

    def mask(self, *lengths: int) -> Tensor:
        m = torch.as_tensor(self.fn(*lengths))
        while m.dim() > 2 and m.size(0) == 1:
            m = m[0]
        if m.is_floating_point() and bool((m == 0).any() and (m < -1e3).any()):
            return m == 0  # to be added to the scores
        return m.bool() if self.mask_means == "look" else ~m.bool()

    @check("values")
    def values(self) -> Finding | None:
        """Query i sees keys 0 … i."""
        got, want = self.mask(5), _causal_mask(5)
        if got.shape != want.shape:
            return wrong_shape(got, tuple(want.shape))
        expect(
            torch.equal(got, want),
            f"{int((got != want).sum())} of 25 cells differ",
            "query i must see keys 0 … i and no others",
            "the comparison of row and column numbers",
            known=(m for m in CAUSAL_MASK_MISTAKES if torch.equal(got, m.fn(5))),
        )

    @check("aligned")
    def aligned(self) -> None:
        """If it takes two lengths, the last query sees all keys."""
        try:
            got = self.mask(2, 5)
        except TypeError:
            return  # takes one length only
        expect(
            torch.equal(got, _causal_mask(2, 5)),
            "with 2 queries and 5 keys, the last query does not see all keys",
            "the mask is aligned with the first key; in cached decoding the queries "
            "are the newest tokens",
            "the diagonal, which must be S - L",
        )

    @check("repeatable")
    def repeatable(self) -> Finding | None:
        """It gives the same mask again."""
        return not_repeatable(lambda: self.mask(4).float())


def shown(sees: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """Make a mask (B, 1, 1, S) by comparing positions (S,) with lengths (B, 1)."""

    def fn(lengths: Tensor, max_len: int) -> Tensor:
        return sees(torch.arange(max_len), lengths[:, None])[:, None, None]

    return fn


PADDING_MASK_MISTAKES = [
    Mistake(
        "values", "the mask differs", cause, "the comparison with lengths", shown(sees)
    )
    for cause, sees in {
        "True and False are exchanged": lambda p, n: p >= n,
        "one padded key too many is visible": lambda p, n: p <= n,
        "the last real key is hidden": lambda p, n: p < n - 1,
        "the padding is taken to stand in front": lambda p, n: p >= len(p) - n,
        "everything is visible": lambda p, n: p >= 0 * n,
    }.items()
]


@dataclass
class PaddingMask(Subject):
    """The function, and how its masks are meant."""

    fn: Callable[..., Tensor]
    mask_means: str
    name = "padding_mask"
    lengths = torch.tensor([3, 1, 5])

    def mask(self) -> Tensor:
        m = self.fn(self.lengths.clone(), 5).bool()
        return m if self.mask_means == "look" else ~m

    @check("shape")
    def shape(self) -> Finding | None:
        """It has an axis for heads and one for queries."""
        m = self.mask()
        expect(
            m.shape != (3, 1, 5, 1),
            "the mask has shape (B, 1, L, 1)",
            "it hides rows (queries), and hidden keys still reach the others",
            "the axis along which positions are compared with lengths",
        )
        expect(
            m.shape not in ((3, 5), (3, 1, 5)),
            f"the mask has shape {tuple(m.shape)}",
            "against scores (B, H, L, S) it does not broadcast over heads and "
            "queries: the batch meets another axis",
            "the result: add axes, (B, 1, 1, S)",
        )
        return wrong_shape(m, (3, 1, 1, 5))

    @check("values")
    def values(self) -> None:
        """Of a sequence of length n, keys 0 … n-1 are visible."""
        got, want = self.mask(), shown(torch.lt)(self.lengths, 5)
        made = (
            m for m in PADDING_MASK_MISTAKES if torch.equal(got, m.fn(self.lengths, 5))
        )
        expect(
            torch.equal(got, want),
            f"{int((got != want).sum())} of 15 cells differ",
            "keys 0 … length-1 must be visible and no others",
            "the comparison with lengths",
            known=made,
        )
