"""What happens to the scores? Watch the operations of a model while it runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .report import SCALE_LINE, SOFTMAX_LINE, Finding


def wrong_scores(call: Callable[[], Tensor]) -> Finding | None:
    """Run a model and look at each attention: its scale, its softmax's axis."""
    watch = _watched(call)
    findings = (wrong_attention(seen) for seen in watch.attentions)
    finding = next((found for found in findings if found), None)
    if finding:
        return finding
    if watch.stray == "softmax":
        return Finding(
            "stray softmax",
            "what is added to the residual comes straight out of a softmax",
            "a feed-forward network or another layer ends in a softmax",
            "every softmax outside the attention",
        )
    if watch.stray:
        return Finding(
            "activation",
            f"what is added to the residual comes straight out of {watch.stray}",
            "the second linear map of the feed-forward network has an activation too",
            "the end of the feed-forward network",
        )
    return None


def wrong_attention(seen: _Attention) -> Finding | None:
    """Hold its scale against √D, its softmax against the axis of the values."""
    if abs(seen.factor_after - 1.0) > 1e-3:
        return Finding(
            "scale",
            f"the weights are multiplied by {seen.factor_after:.4g} after the softmax",
            "the scaling comes after the softmax instead of before",
            SCALE_LINE,
        )
    divisor, root = 1.0 / seen.factor, math.sqrt(seen.width)
    if abs(divisor - root) > 1e-3 * root:
        square = round(divisor**2)
        hint = f"; {divisor:.4g} is the root of {square}" if square > 1 else ""
        return Finding(
            "scale",
            f"the scores are divided by {divisor:.4g} where heads are "
            f"{seen.width} wide",
            f"√{seen.width} = {root:.4g} is expected{hint}",
            SCALE_LINE,
        )
    if not seen.sums_to_one:
        return Finding(
            "softmax",
            "the values are not mixed along the axis of the softmax",
            "the weights of a query do not sum to one over the keys: the softmax "
            "runs over another axis",
            SOFTMAX_LINE,
        )
    return None


def plain_attention(call: Callable[[], Tensor]) -> bool:
    """Whether an attention is seen, and nothing in it but constants and masks."""
    watch = _watched(call)
    return bool(watch.attentions) and not watch.positions


def positions_inside(call: Callable[[], Tensor]) -> bool:
    """Whether positions enter the scores: rotary, or biases that are added."""
    return _watched(call).positions


def without_projection(call: Callable[[], Tensor]) -> bool:
    """Whether an attention is seen, and no product after it."""
    watch = _watched(call)
    return bool(watch.attentions) and not watch.product_after


def _watched(call: Callable[[], Tensor]) -> _Watch:
    watch = _Watch()
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one opaque operation otherwise
    try:
        with torch.no_grad(), watch:
            call()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return watch


@dataclass
class _Attention:
    """One attention that was seen.

    Attributes:
        factor: what the product of query and key was multiplied by.
        width: of a head.
        factor_after: what the weights were multiplied by after the softmax.
        sums_to_one: the values were mixed along the axis of the softmax.
    """

    factor: float
    width: int
    factor_after: float = 1.0
    sums_to_one: bool = True


@dataclass(frozen=True)
class _Tag:
    """What is known of a tensor.

    Attributes:
        kind: "source" for what came out of a linear map, "scores" for a product of two
            sources, "weights" for the softmax of scores, "data" for anything else that
            was made of these; "softmax", "relu" and so on for what just came from one.
        factor: the constants it was multiplied by since.
        width: of the heads, for scores.
        of: the attention that weights belong to.
        last_is_softmax: the softmax ran over what is now the last axis of the weights.
    """

    kind: str
    factor: float = 1.0
    width: int = 0
    of: _Attention | None = None
    last_is_softmax: bool = True


SOURCE, DATA = _Tag("source"), _Tag("data")
ACTIVATIONS = {"relu", "gelu", "silu"}

# Operations whose result carries the tag of their input.
KEEP = {
    *("view", "_unsafe_view", "reshape", "transpose", "permute", "t", "unflatten"),
    *("expand", "clone", "contiguous", "copy_", "detach", "alias", "_to_copy"),
    *("slice", "select", "split", "split_with_sizes", "chunk", "unbind"),
    *("unsqueeze", "squeeze", "masked_fill", "masked_fill_", "where", "clamp"),
}
# Operations from which queries, keys and values come.
MAKE = {"mm", "addmm", "convolution", "native_layer_norm", "embedding", "linear"}


class _Watch(TorchDispatchMode):
    """Follow constant factors through the operations of a model.

    An operation that is not understood leaves its result without a tag, and nothing is
    said of what comes from it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tags: dict[int, _Tag] = {}
        self.learned: set[int] = set()  # single numbers made of weights alone
        self.alive: list[Tensor] = []  # so that no id is used twice
        self.attentions: list[_Attention] = []
        self.stray = ""  # an operation whose result goes straight into a residual
        self.positions = False  # something that is not data meets queries or scores
        self.product_after = False  # there is a product after the last attention

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        tags = [self.tags.get(id(a)) for a in args]
        out = func(*args, **kwargs)
        name = func._schema.name.split("::")[1]
        tag = self._tag(name, args, kwargs, tags)
        flat = [a for arg in args for a in (arg if isinstance(arg, list) else [arg])]
        if tag is None and any(self.tags.get(id(a)) for a in flat):
            tag = DATA
        learned = tag is None and any(self._is_learned(a) for a in flat)
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, Tensor):
                if learned and t.numel() == 1:
                    self.learned.add(id(t))
                self.alive.append(t)
                self.tags.pop(id(t), None)
                if tag is not None:
                    self.tags[id(t)] = tag
        return out

    def _is_learned(self, a: Any) -> bool:
        return isinstance(a, Tensor) and (a.requires_grad or id(a) in self.learned)

    def _tag(
        self, name: str, args: Any, kwargs: Any, tags: list[_Tag | None]
    ) -> _Tag | None:
        first = tags[0] if tags else None
        if name in ("mm", "addmm", "bmm", "baddbmm", "convolution", "linear"):
            self.product_after = True
        if name in MAKE:
            return SOURCE
        if name.rstrip("_") in ACTIVATIONS and first:
            return _Tag(name.rstrip("_"))
        if name in KEEP:
            tag = next((t for t in tags if t), None) if name == "where" else first
            return self._moved(name, args, tag)
        if name.rstrip("_") in ("add", "sub"):  # a mask on scores, a bias on the rest
            scores = next((t for t in tags if t and t.kind == "scores"), None)
            if scores:
                self.positions |= any(
                    isinstance(a, Tensor) and t is None and a.numel() > 1
                    for a, t in zip(args, tags, strict=True)
                )
                return scores
            a, b = args[:2]
            if first and tags[1] and a.dim() == 3 and a.shape == b.shape:
                kinds = {"softmax", *ACTIVATIONS} & {first.kind, tags[1].kind}
                self.stray = self.stray or next(iter(kinds), "")
            known = next((t for t in tags if t), None)
            return DATA if known == DATA else (SOURCE if known else None)
        if name.rstrip("_") in ("mul", "div"):
            return self._multiplied(name, args, tags)
        if name.startswith(("bmm", "baddbmm")):
            i = 0 if name == "bmm" else 1
            alpha = kwargs.get("alpha", 1.0)
            return self._product(args[i], tags[i], tags[i + 1], alpha)
        if name == "_softmax":
            return self._softmax(args, first)
        if name.startswith("_scaled_dot_product"):
            if first and tags[1] and first.kind == tags[1].kind == "source":
                width = args[0].size(-1)
                scale = kwargs.get("scale")
                scale = width**-0.5 if scale is None else scale
                factor = first.factor * tags[1].factor * scale
                self.attentions.append(_Attention(factor, width))
                self.product_after = False
            bias = args[3] if len(args) > 3 else kwargs.get("attn_mask")
            self.positions |= isinstance(bias, Tensor) and bias.is_floating_point()
            return SOURCE
        return None

    def _moved(self, name: str, args: Any, tag: _Tag | None) -> _Tag | None:
        """Forget weights whose last axis goes elsewhere; it may come back."""
        if tag is None or tag.kind != "weights":
            return tag
        last = args[0].dim() - 1
        if name == "transpose":
            stays = last not in (args[1] % (last + 1), args[2] % (last + 1))
        elif name == "permute":
            stays = args[1][-1] in (last, -1)
        else:
            stays = name != "t"
        return tag if stays else None

    def _multiplied(self, name: str, args: Any, tags: list[_Tag | None]) -> _Tag | None:
        for this, other in ((0, 1), (1, 0)):
            tag, by = tags[this], args[other]
            if tag is None or (this == 1 and name.startswith("div")):
                continue
            if isinstance(by, Tensor):
                if by.numel() != 1 or self._is_learned(by):
                    # No constant: nothing is known from here on. Cosines of places?
                    self.positions |= (
                        tags[other] is None and not by.requires_grad and by.dim() > 1
                    )
                    return DATA
                by = by.item()
            factor = tag.factor / by if name.startswith("div") else tag.factor * by
            return replace(tag, factor=factor)
        return None

    def _product(
        self, left: Tensor, a: _Tag | None, b: _Tag | None, alpha: float
    ) -> _Tag | None:
        if a and b and a.kind == b.kind == "source":
            return _Tag("scores", a.factor * b.factor * alpha, left.size(-1))
        if a and a.kind == "weights" and a.of:
            a.of.factor_after = a.factor
            a.of.sums_to_one = a.last_is_softmax
            self.product_after = False
            return SOURCE
        return None

    def _softmax(self, args: Any, tag: _Tag | None) -> _Tag | None:
        if tag is None:
            return None
        last = args[1] % args[0].dim() == args[0].dim() - 1
        if tag.kind == "scores":
            seen = _Attention(tag.factor, tag.width)
            self.attentions.append(seen)
            return _Tag("weights", of=seen, last_is_softmax=last)
        return _Tag("softmax")
