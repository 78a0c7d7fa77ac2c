"""What still flows from the tokens to the logits when the layers are silent?"""

from typing import Any

import torch
from torch import Tensor, nn

from .properties import (
    change_of,
    copy_of,
    is_shift,
    is_vector,
    leaves,
    tensor_in,
    weights_of,
)
from .report import Finding, max_abs, negligible


def broken_stream(own: Any, x: Tensor) -> Finding | None:
    """Silence all layers of a ViT: through the residuals the tokens still pass.

    The token that the head reads then shows, because no attention mixes it.
    """
    plain = copy_of(own)
    layers = _layers(plain)
    first: list[Tensor] = []

    def catch(module: nn.Module, args: tuple[Any, ...]) -> None:
        if not first and args and isinstance(args[0], Tensor) and args[0].dim() == 3:
            first.append(args[0])

    for layer in layers:
        for m in layer.modules():  # forward may call the parts of a layer itself
            m.register_forward_pre_hook(catch)
        with torch.no_grad():
            for name, p in weights_of(layer):
                if not is_vector(p) or is_shift(name):
                    p.zero_()
    image = x[:1].clone().requires_grad_()
    out = tensor_in(plain(image))
    if not first or not first[0].requires_grad:
        return None
    tokens = first[0]
    direction = change_of(out)
    # What made the tokens, such as the class token: does any of it still matter?
    made = [image, *leaves(tokens)]
    reach = torch.autograd.grad(
        (out * direction).sum(), [*made, tokens], retain_graph=True, allow_unused=True
    )
    if not any(_counts(g, out) for g in reach):
        return Finding(
            "residual",
            "with silent layers nothing of the tokens reaches the logits",
            "there is no residual connection around the layers",
            "the lines with x + …",
        )
    if reach[-1] is None or tokens.size(1) < 2:
        return None
    sizes = reach[-1][0].abs().sum(-1)  # (N,)
    read = (~negligible(sizes, max_abs(sizes))).nonzero().flatten().tolist()
    if len(read) != 1:
        return None
    (seen,) = torch.autograd.grad(
        tokens[0, read[0]].square().sum(), image, allow_unused=True
    )
    if not _counts(seen, tokens):
        return None
    return Finding(
        "read",
        f"the head reads token {read[0]} of {tokens.size(1)}, which is a patch",
        "the class token stands elsewhere, or there is none and the mean is meant",
        "the index before the head",
    )


def _counts(gradient: Tensor | None, of: Tensor) -> bool:
    """Whether the gradient of something is more than rounding beside its size."""
    return gradient is not None and not bool(negligible(gradient, max_abs(of)).all())


def _layers(own: nn.Module) -> list[nn.Module]:
    """Find the members of lists whose members are alike and have matrices."""
    found: list[nn.Module] = []
    for m in own.modules():
        if isinstance(m, nn.ModuleList | nn.Sequential) and len(m) > 1:
            kinds = {type(c) for c in m}
            heavy = all(
                sum(not is_vector(p) for p in c.parameters()) > 1 for c in m.children()
            )
            if len(kinds) == 1 and heavy:
                found.extend(m.children())
    return found
