"""Functions that compute a formula: positions, layer normalisation, patches."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..vit import patchify as _patchify
from .properties import (
    changed_in_place,
    copy_of,
    eval_copy,
    not_repeatable,
    random_input,
    wrong_shape,
)
from .report import Finding, Report, checker, close
from .subject import Check, Mistake, Subject, check, expect


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
    return SinusoidalPositions(fn).report()


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
    return LayerNorm(eval_copy(fn, torch.float32), expected).report()


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
    return Patchify(fn, channels_first).report()


# Positions ----------------------------------------------------------------------------

Exponent = Callable[[Tensor, int], Tensor]  # of i, which counts pairs, and d


def waves(
    sines: Exponent,
    cosines: Exponent | None = None,
    *,
    base: float = 10000.0,
    first: int = 0,
) -> Callable[[int, int], Tensor]:
    """Build a table of sines and cosines of p / base^exponent, interleaved."""

    def fn(length: int, dim: int) -> Tensor:
        p = torch.arange(first, first + length, dtype=torch.float64)[:, None]  # (L, 1)
        i = torch.arange(dim // 2, dtype=torch.float64)  # (E/2,)
        a, b = (p / base ** exponent(i, dim) for exponent in (sines, cosines or sines))
        return torch.stack([a.sin(), b.cos()], dim=-1).flatten(1)  # (L, E)

    return fn


def sines_first(table: Tensor) -> Tensor:
    return torch.cat([table[:, 0::2], table[:, 1::2]], dim=1)


def exchanged(table: Tensor) -> Tensor:
    return table.unflatten(1, (-1, 2)).flip(-1).flatten(1)


paper = waves(lambda i, d: 2 * i / d)
fairseq = waves(lambda i, d: i / (d // 2 - 1))
EXPONENT = "the exponent"

POSITION_MISTAKES = [
    Mistake("values", symptom, cause, look_at, fn)
    for cause, (symptom, look_at, fn) in {
        "the exponent is 2i/d where i already runs over sines and cosines": (
            "frequencies fall twice as fast as they should",
            EXPONENT,
            waves(lambda i, d: 4 * i / d, lambda i, d: 2 * (2 * i + 1) / d),
        ),
        "the exponent is doubled: 2 · (2i)/d": (
            "frequencies fall twice as fast as they should",
            EXPONENT,
            waves(lambda i, d: 4 * i / d),
        ),
        "each feature has its own exponent i/d; the two of a pair share one": (
            "a sine and its cosine turn at different speeds",
            EXPONENT,
            waves(lambda i, d: 2 * i / d, lambda i, d: (2 * i + 1) / d),
        ),
        "the cosine's exponent is 2(i+1)/d instead of the sine's 2i/d": (
            "a sine and its cosine turn at different speeds",
            EXPONENT,
            waves(lambda i, d: 2 * i / d, lambda i, d: 2 * (i + 1) / d),
        ),
        "the angle is p · 10000^(2i/d): multiplied, not divided": (
            "frequencies grow instead of falling",
            EXPONENT,
            waves(lambda i, d: -2 * i / d),
        ),
        "even features must be sines, odd ones cosines": (
            "sine and cosine are exchanged",
            "the two assignments",
            lambda length, dim: exchanged(paper(length, dim)),
        ),
        "the exponent is i/d where i counts pairs; it must be 2i/d": (
            "frequencies fall half as fast as they should",
            EXPONENT,
            waves(lambda i, d: i / d),
        ),
        "the exponent is i/(d/2 - 1), as in Tensor2Tensor and fairseq; the paper has "
        "2i/d": (
            "the last frequency is reached half a step early",
            EXPONENT,
            lambda length, dim: sines_first(fairseq(length, dim)),
        ),
        "the base is 1000, not 10000": (
            "the wavelengths are too short",
            EXPONENT,
            waves(lambda i, d: 2 * i / d, base=1000.0),
        ),
        "positions begin at 1, not at 0": (
            "the table is shifted by one position",
            "the range of positions",
            waves(lambda i, d: 2 * i / d, first=1),
        ),
    }.items()
]


@dataclass
class SinusoidalPositions(Subject):
    """The function, and the size of the table to ask for."""

    fn: Callable[[int, int], Tensor]
    name = "sinusoidal_positions"
    size = 40, 16

    def table(self) -> Tensor:
        t = torch.as_tensor(self.fn(*self.size)).detach().double()
        while t.dim() > 2 and t.size(0) == 1:
            t = t[0]
        return t

    shape = Check("shape", lambda self: wrong_shape(self.table(), self.size))

    @check("values")
    def values(self) -> None:
        """The numbers are the paper's, in its order or with all sines first."""
        got, want = self.table(), paper(*self.size)
        expect(
            not close(got[1:], got[:1].expand_as(got[1:])),
            "all positions have the same vector",
            "the table is read at one place, [n], instead of up to it, [:n]",
            "the index into the table",
        )
        expect(
            any(close(got, w, 1e-4) for w in (want, sines_first(want))),
            "the table differs from the paper's and from every known mistake",
            "sin and cos of p / 10000^(2i/d), i counting pairs, are expected",
            "the whole function, step by step",
            known=(m for m in POSITION_MISTAKES if close(got, m.fn(*self.size), 1e-4)),
        )

    repeatable = Check("repeatable", lambda self: not_repeatable(self.table))


# Layer normalisation ------------------------------------------------------------------


def norm(
    over: tuple[int, ...] = (-1,),
    unbiased: bool = False,
    root: Callable[[Tensor, float], Tensor] = lambda var, eps: (var + eps).sqrt(),
) -> Callable[..., Tensor]:
    """Build a normalisation with one step replaced."""

    def fn(x: Tensor, eps: float = 1e-5) -> Tensor:
        variance = x.var(over, keepdim=True, unbiased=unbiased)
        return (x - x.mean(over, keepdim=True)) / root(variance, eps)

    return fn


def outside(variance: Tensor, eps: float) -> Tensor:
    return variance.sqrt() + eps


ROOT, AXIS, AXES = (
    "the line with the square root",
    "the axis of mean and var",
    "the axes of mean and var",
)

LAYER_NORM_MISTAKES = [
    Mistake("values", "outputs differ from nn.LayerNorm", cause, look_at, fn)
    for cause, (look_at, fn) in {
        "the deviation is the unbiased one (divided by E - 1), and eps stands outside "
        "the root": (ROOT, norm(unbiased=True, root=outside)),
        "the variance is the unbiased one, divided by E - 1 instead of E": (
            "var or std: unbiased=False",
            norm(unbiased=True),
        ),
        "eps is added to the deviation, outside the root": (ROOT, norm(root=outside)),
        "the square root of the variance is missing": (ROOT, norm(root=torch.add)),
        "mean and variance are taken over tokens and features together": (
            AXES,
            norm((1, 2)),
        ),
        "mean and variance are taken over tokens, not features": (AXIS, norm((1,))),
        "mean and variance are taken over the batch": (AXIS, norm((0,))),
        "mean and variance are taken over batch and tokens (batch norm)": (
            AXES,
            norm((0, 1)),
        ),
        "the mean is not subtracted (RMS norm)": (
            "the numerator",
            lambda x, eps=1e-5: x * (x.square().mean(-1, True) + eps).rsqrt(),
        ),
        "x is divided by √E: nothing is normalised": (
            "the whole function",
            lambda x, eps=0.0: x / math.sqrt(x.size(-1)),
        ),
    }.items()
]


@dataclass
class LayerNorm(Subject):
    """The function or module, its eps, and an input."""

    fn: Callable[[Tensor], Tensor]
    eps: float
    name = "layer_norm"

    def __post_init__(self) -> None:
        # Small numbers, so that the place of eps shows. Their mean is as small as their
        # deviation: E[x²] - E[x]² would lose its digits otherwise.
        self.x = random_input(4, 5, 6) * 0.01 + 0.01

    def alike(self, got: Tensor, fn: Callable[..., Tensor]) -> bool:
        """Whether an output is that of another function."""
        return close(got, fn(self.x, self.eps), 1e-4)

    shape = Check("shape", lambda self: wrong_shape(self.fn(self.x.clone()), (4, 5, 6)))

    @check("values")
    def values(self) -> None:
        """With gain one and shift zero, outputs are those of nn.LayerNorm."""
        got, constant = self.fn(self.x.clone()), self.fn(torch.zeros_like(self.x))
        expect(
            bool(constant.isfinite().all()),
            "a constant input gives NaN or inf",
            "eps is missing: a constant input is 0/0",
            ROOT,
        )
        right = self.alike(got, norm())
        for eps in () if right else (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 0.0):
            expect(
                not close(got, norm()(self.x, eps), 1e-4),
                "outputs differ from nn.LayerNorm's, but for another eps they do not",
                f"eps is {eps or 'smaller than 1e-7'}, not {self.eps} (or say eps=…)",
                ROOT,
            )
        expect(
            right,
            "outputs differ from nn.LayerNorm and from every known mistake",
            "(x - mean) / √(variance + eps) over the features is expected",
            "the whole function, step by step",
            known=(m for m in LAYER_NORM_MISTAKES if self.alike(got, m.fn)),
        )

    @check("gain")
    def gain_and_shift(self) -> None:
        """With another gain and shift, too."""
        if not isinstance(self.fn, nn.Module) or len(list(self.fn.parameters())) != 2:
            return
        if not self.alike(self.fn(self.x.clone()), norm()):
            return  # said already
        own = copy_of(self.fn)
        one, two = own.parameters()
        if one.numel() != 6 or two.numel() != 6:
            return
        with torch.no_grad():
            one.copy_(torch.linspace(1, 2, 6).view_as(one))
            two.copy_(torch.linspace(-3, 5, 6).view_as(two))
        got = own(self.x.clone())
        wants = (
            F.layer_norm(self.x, (6,), gain.flatten(), shift.flatten(), self.eps)
            for gain, shift in ((one, two), (two, one))
        )
        expect(
            any(close(got, want, 1e-4) for want in wants),
            "with other gains and shifts the outputs differ from nn.LayerNorm",
            "gain · normalised + shift is expected, one number a feature each",
            "the last line",
        )

    untouched = Check("in place", lambda self: changed_in_place(self.fn, self.x))


# Patches ------------------------------------------------------------------------------


def cut(images: Tensor, p: int, channels_first: bool = False) -> Tensor:
    """Cut into patches, in one of the two orders that are right inside a patch."""
    if channels_first:
        return F.unfold(images, p, stride=p).transpose(1, 2)  # (B, N, C·P·P)
    return _patchify(images, p)  # (B, N, P·P·C)


PATCHIFY_MISTAKES = [
    Mistake("values", symptom, cause, "the permutation of the axes", fn)
    for symptom, cause, fn in (
        (
            "patches match a bare reshape: each is a run of rows, not a square",
            "reshape alone does not move pixels; permute must come in between",
            lambda images, p, *_: images.reshape(cut(images, p).shape),
        ),
        (
            "patches match a bare reshape of (B, height, width, C)",
            "reshape alone does not move pixels; permute must come in between",
            lambda images, p, *_: images.permute(0, 2, 3, 1).reshape(
                cut(images, p).shape
            ),
        ),
        (
            "the patches are right, the order inside a patch is another",
            "channels come last in a patch (or first, with channels_first=True)",
            lambda images, p, channels_first=False: cut(images, p, not channels_first),
        ),
        (
            "the patches come column by column, or transposed",
            "the axes of rows and columns are exchanged",
            lambda images, p, *_: cut(images.transpose(2, 3), p),
        ),
    )
]


@dataclass
class Patchify(Subject):
    """The function, the order inside its patches, and images whose pixels count up."""

    fn: Callable[[Tensor, int], Tensor]
    channels_first: bool
    name = "patchify"

    def __post_init__(self) -> None:
        self.x = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)  # (B, C, height, width)

    @check("shape")
    def shape(self) -> Finding | None:
        """Each patch is one row of all its numbers."""
        return wrong_shape(self.fn(self.x.clone(), 2), (2, 6, 12))

    @check("values")
    def values(self) -> None:
        """Patches come row by row, and so do the pixels in them."""
        got = self.fn(self.x.clone(), 2)
        given = self.x, 2, self.channels_first
        right = torch.equal(got, cut(*given))
        known = [m for m in PATCHIFY_MISTAKES if torch.equal(got, m.fn(*given))]
        pixels = torch.equal(got.sort(-1).values, cut(*given).sort(-1).values)
        expect(
            right or not pixels,
            "each patch holds the right pixels in an unknown order",
            "row, column, channel is expected",
            "the last reshape",
            known=known,
        )
        expect(
            right,
            "patches do not hold the pixels of one square each",
            "the image is taken apart along the wrong axes",
            "the permutation of the axes",
            known=known,
        )

    @check("in place")
    def untouched(self) -> Finding | None:
        """The images stay as they are."""
        return changed_in_place(lambda images: self.fn(images, 2), self.x)
