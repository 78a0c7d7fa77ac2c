"""How are the scores scaled? Watch the operations of a model while it runs."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .report import SCALE_LINE, Finding


def wrong_scale(call: Callable[[], Tensor]) -> Finding | None:
    """Watch the operations of one call and compare each attention's scale with 1/√D."""
    trace = _ScaleTrace()
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one opaque operation otherwise
    try:
        with torch.no_grad(), trace:
            call()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    for factor, dim, after in trace.found:
        want = dim**-0.5
        if abs(factor - want) > 1e-3 * want:
            ratio = 1.0 / factor
            return Finding(
                "scale",
                f"the scores are divided by {ratio:.4g} where heads are {dim} wide",
                f"√{dim} = {math.sqrt(dim):.4g} is expected"
                + (
                    f"; {ratio:.4g} is the root of {round(ratio**2)}"
                    if ratio > 1.001
                    else ""
                ),
                SCALE_LINE,
            )
        if abs(after - 1.0) > 1e-3:
            return Finding(
                "scale",
                f"the weights are multiplied by {after:.4g} after the softmax",
                "the scaling comes after the softmax instead of before",
                SCALE_LINE,
            )
    if trace.stray_softmax:
        return Finding(
            "stray softmax",
            "a softmax runs over something that is not attention scores",
            "a feed-forward network or another layer ends in a softmax",
            "every softmax outside the attention",
        )
    return None


# Operations whose result carries the tag of their input.
KEEP = {
    *("view", "_unsafe_view", "reshape", "transpose", "permute", "t", "unflatten"),
    *("expand", "clone", "contiguous", "copy_", "detach", "alias", "_to_copy"),
    *("slice", "select", "split", "split_with_sizes", "chunk", "unbind"),
    *("unsqueeze", "squeeze", "masked_fill", "masked_fill_", "where"),
}
# Operations from which queries, keys and values come.
SOURCE = {"mm", "addmm", "convolution", "native_layer_norm", "embedding", "linear"}


class _ScaleTrace(TorchDispatchMode):
    """Follow constant factors through the operations of a model.

    Each tensor may carry a tag: ("source", factor) for what came out of a linear map
    and was multiplied by `factor` since; ("scores", factor, D) for a product of two
    sources of width D; ("weights", factor) behind the softmax of scores. Reshapes
    keep tags.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tags: dict[int, tuple] = {}
        self.alive: list[Tensor] = []  # so that no id is used twice
        self.found: list[tuple[float, int, float]] = []
        self.stray_softmax = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ):
        kwargs = kwargs or {}
        before = [self.tags.get(id(a)) for a in args]
        out = func(*args, **kwargs)
        tag = self._tag(func._schema.name.split("::")[1], args, kwargs, before)
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor):
                self.alive.append(t)
                if tag is None:
                    self.tags.pop(id(t), None)
                else:
                    self.tags[id(t)] = tag
        return out

    def _tag(self, name: str, args: Any, kwargs: Any, tags: list) -> tuple | None:
        first = tags[0] if tags else None
        second = tags[1] if len(tags) > 1 else None
        if name in KEEP:
            if name == "where":  # where(mask, scores, fill): the scores' tag
                return next((t for t in tags if t is not None), None)
            return first
        if name in ("add", "add_", "sub", "sub_"):
            return (
                first
                if first and first[0] == "scores"
                else second
                if (second and second[0] == "scores")
                else (("source", 1.0) if first else None)
            )
        if name in ("mul", "mul_", "div", "div_"):
            return self._scaled(name, args, tags)
        if name in ("bmm", "baddbmm", "baddbmm_"):
            a, b = (0, 1) if name == "bmm" else (1, 2)
            left, right = tags[a], tags[b]
            if left and right and left[0] == right[0] == "source":
                factor = left[1] * right[1] * kwargs.get("alpha", 1.0)
                return ("scores", factor, args[a].size(-1))
            if left and left[0] == "weights":
                self.found[left[2]] = (*self.found[left[2]][:2], left[1])
                return ("source", 1.0)
            return None
        if name == "_softmax":
            if first is None:
                return None
            if first[0] == "scores":
                self.found.append((first[1], first[2], 1.0))
                return ("weights", 1.0, len(self.found) - 1)
            self.stray_softmax |= first[0] == "source" and args[0].dim() == 3
            return None
        if name.startswith("_scaled_dot_product"):
            if first and second and first[0] == second[0] == "source":
                dim = args[0].size(-1)
                scale = kwargs.get("scale")
                scale = dim**-0.5 if scale is None else scale
                self.found.append((first[1] * second[1] * scale, dim, 1.0))
            return ("source", 1.0)
        if name in SOURCE:
            return ("source", 1.0)
        return None

    def _scaled(self, name: str, args: Any, tags: list) -> tuple | None:
        for this, other in ((0, 1), (1, 0)):
            tag, by = tags[this], args[other]
            if tag is None or (this == 1 and name.startswith("div")):
                continue
            if isinstance(by, Tensor):
                if by.numel() != 1 or by.requires_grad:
                    return None  # no constant: nothing is known from here on
                by = float(by)
            factor = tag[1] / by if name.startswith("div") else tag[1] * by
            return (tag[0], factor, *tag[2:])
        return None
