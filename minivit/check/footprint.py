"""Which pixels does a token depend on?"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .properties import change_of
from .report import Finding, max_abs, negligible


class _FirstTokens(torch.overrides.TorchFunctionMode):
    """Catch the first linear map or convolution of an image that requires gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens: Tensor | None = None  # (B, N, E)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ):
        out = func(*args, **(kwargs or {}))
        is_map = func in (F.linear, torch.conv2d, F.conv2d)
        if is_map and self.tokens is None and out.requires_grad and out.dim() in (3, 4):
            linear = out.dim() == 3
            self.tokens = out if linear else out.flatten(2).transpose(1, 2)
        return out


def patch_footprints(
    call: Callable[[Tensor], Tensor],
    x: Tensor,
    patch: tuple[int, int] | None = None,
) -> tuple[int | None, Finding | None]:
    """Find the side of the patches, by the pixels that each token depends on."""
    image = x[:1].clone().requires_grad_()
    with _FirstTokens() as caught:
        call(image)
    tokens = caught.tokens
    if tokens is None or tokens.grad_fn is None or tokens.size(1) < 2:
        return None, None
    direction = change_of(tokens[0, 0])
    number = tokens.size(1)
    side = None
    for n in sorted({0, 1, number // 2, number - 1}):
        (gradient,) = torch.autograd.grad(
            (tokens[0, n] * direction).sum(),
            image,
            retain_graph=True,
            allow_unused=True,
        )
        if gradient is None:
            return None, None
        seen = ~negligible(gradient[0], max_abs(gradient))  # (C, height, width)
        if not seen.any():
            continue  # a token that is no patch
        if number * int(seen.sum()) != x[0].numel():
            return None, None  # overlapping patches: not ours to judge
        rows, columns = seen.any(0).any(1).nonzero(), seen.any(0).any(0).nonzero()
        height = int(rows.max() - rows.min()) + 1
        width = int(columns.max() - columns.min()) + 1
        if (height, width) == patch:
            return None, None
        if height != width or int(seen.sum()) < 0.9 * height * width * x.size(1):
            return None, Finding(
                "patches",
                f"token {n} depends on pixels that do not fill one square",
                "the image is cut by a bare reshape, without moving the axes (or say "
                "patch_size=(height, width))",
                "the cutting into patches",
            )
        side = height
    if side is None or side == 1:
        return None, None
    return side, None
