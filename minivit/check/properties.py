"""Properties that hold for any weights, and what the checkers share."""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import MultiHeadAttention
from ..attention import causal_mask as _causal_mask
from .report import MASK_LINE, Finding, close


def check_means(mask_means: str) -> None:
    if mask_means not in ("look", "hide"):
        raise ValueError(f"mask_means must be 'look' or 'hide', got {mask_means!r}")


def random_input(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def change_of(x: Tensor) -> Tensor:
    """Make a change that no normalisation removes, of the shape of x."""
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)


def copy_of(module: Any) -> Any:
    """Copy a module, also one that keeps tensors of its last call as attributes."""
    kept = [value for m in module.modules() for value in vars(m).values()]
    for value in list(kept):
        if isinstance(value, (list, tuple)):
            kept.extend(value)
    tensors = [t for t in kept if isinstance(t, Tensor) and not t.is_leaf]
    return copy.deepcopy(module, {id(t): t.detach() for t in tensors})


def moved_copy(module: Any) -> Any:
    """Copy a module in eval mode, with every weight moved a little.

    The user's module stays as it is; weights that begin at zero wake up.
    """
    if not isinstance(module, nn.Module):
        return module
    own = copy_of(module).float().cpu().eval()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in own.parameters():
            # at least a tenth of what fan-in scaling gives, for zeros and LayerScale
            spread = 0.3 / math.sqrt(p.size(-1)) if p.ndim >= 2 else 0.1
            p.add_(torch.randn(p.shape, generator=g) * spread)
            p.requires_grad_()
    return own


def without_positions(own: Any) -> Any:
    """Copy a model with its tables of positions at zero; None if it shows none."""
    if not isinstance(own, nn.Module):
        return None
    plain = copy_of(own)
    tables = [
        t
        for name, t in [*plain.named_parameters(), *plain.named_buffers()]
        if "pos" in name.rsplit(".", 1)[-1] and t.is_floating_point() and t.ndim >= 2
    ]
    with torch.no_grad():
        for t in tables:
            t.zero_()
    return plain if tables else None


def eval_copy(model: Any) -> Any:
    """Copy a module as it is, in eval mode."""
    if isinstance(model, nn.Module):
        return copy_of(model).float().cpu().eval()
    return model


def tensor_in(result: Any) -> Tensor:
    """Find the tensor in what a model returns."""
    if isinstance(result, Tensor):
        return result
    if hasattr(result, "logits"):
        return result.logits
    return result[0]


def flip(x: Tensor, batch_first: bool) -> Tensor:
    return x if batch_first else x.transpose(0, 1)


def mask_argument(name: str | None, mask: Tensor | None, means: str) -> dict[str, Any]:
    if name is None or mask is None:
        return {}
    return {name: mask if means == "look" else ~mask}


def size_of(module: Any, name: str, given: int | None) -> int:
    found = getattr(module, name, None) if given is None else given
    if found is None and name == "num_classes":
        found = getattr(getattr(module, "head", None), "out_features", None)
    if not isinstance(found, int):
        raise ValueError(f"{name} is needed: the module has no such attribute")
    return found


def width_of(module: nn.Module) -> int:
    for p in module.parameters():
        if p.ndim >= 2:
            return p.size(-1)
    raise ValueError("embed_dim is needed: the module has no matrix to read it from")


def wrong_shape(got: Tensor, want: tuple[int, ...]) -> Finding | None:
    if tuple(got.shape) == want:
        return None
    return Finding(
        "shape",
        f"the output has shape {tuple(got.shape)}",
        f"expected {want}",
        "the last reshape, and the axes of every transpose",
    )


def changed_in_place(fn: Callable[..., Any], *inputs: Tensor) -> Finding | None:
    given = [t.clone() for t in inputs]
    fn(*given)
    if all(torch.equal(a, b) for a, b in zip(given, inputs, strict=True)):
        return None
    return Finding(
        "in place",
        "an input tensor was changed",
        "something is computed in place",
        "+=, *= and methods that end in _",
    )


def not_repeatable(
    call: Callable[[], Tensor], other: Callable[[], Any] | None = None
) -> Finding | None:
    with torch.no_grad():
        before = call()
        again = call()
        if not torch.allclose(before, again, rtol=1e-4, atol=1e-5):
            return Finding(
                "repeatable",
                "the same input gives another output the second time, in eval mode",
                "dropout is active in eval mode, or state is carried between calls",
                "F.dropout without training=self.training; attributes set in forward",
            )
        if other is not None:
            other()
            if not torch.allclose(before, call(), rtol=1e-4, atol=1e-5):
                return Finding(
                    "repeatable",
                    "a call changes the result of a later one",
                    "state is carried between calls",
                    "attributes set in forward",
                )
    return None


@torch.no_grad()
def batch_leak(
    call: Callable[[Tensor], Tensor], x: Tensor, changed: Tensor | None = None
) -> Finding | None:
    other = x.clone()
    other[1:] = x[1:] * 0.5 + 1.0 if changed is None else changed[1:]
    if close(call(x)[0], call(other)[0], 1e-4):
        return None
    return Finding(
        "batch",
        "a sample's output changes when another sample of the batch changes",
        "batch and length are exchanged (batch_first=True missing?), a reshape mixes "
        "them, or a softmax or norm runs over the batch",
        "batch_first, every reshape, the axes of softmax and norm",
    )


@torch.no_grad()
def order_matters(call: Callable[..., Tensor], x: Tensor) -> Finding | None:
    order = torch.tensor([2, 0, 4, 1, 3])
    if close(call(x)[:, order], call(x[:, order]), 1e-4):
        return None
    return Finding(
        "order",
        "reordering the tokens does more than reorder the output",
        "a reshape mixes positions and heads: split with unflatten and transpose, "
        "merge with transpose and flatten",
        "the reshapes around the heads",
    )


def mask_finding(hidden_ok: Tensor, visible_ok: Tensor) -> Finding | None:
    hidden, visible = bool(hidden_ok.all()), bool(visible_ok.all())
    if hidden and visible:
        return None
    cause = {
        (False, False): "the mask is inverted: True and False are exchanged",
        (False, True): "the mask is not applied, or not to the keys",
        (True, False): "the mask hides more than it should",
    }[hidden, visible]
    return Finding(
        "mask",
        "a hidden key changes the output" if not hidden else "a visible key does not",
        cause,
        MASK_LINE,
    )


def hidden_in_maps(weights: Tensor | None) -> Finding | None:
    """Look for weight on future keys in maps (..., L, L) made with a causal mask."""
    if weights is None:
        return None
    future = ~_causal_mask(weights.size(-1))
    if bool((weights.detach()[..., future].abs() < 1e-6).all()):
        return None
    return Finding(
        "map",
        "the attention maps show keys that are hidden",
        "the maps are collected without the mask",
        "where the maps are collected",
    )


def leak_finding(training: bool) -> Finding:
    mode = "train" if training else "eval"
    return Finding(
        "causality",
        f"in {mode} mode the past changes when the future changes",
        "there is no causal mask, it is inverted, or it is left out in this mode",
        "where the causal mask is made and whether it depends on self.training",
    )


@torch.no_grad()
def future_leak(own: Any, call: Callable[..., Tensor], x: Tensor) -> Finding | None:
    mask = _causal_mask(x.size(1))
    try:
        for training in (False, True):
            if isinstance(own, nn.Module):
                own.train(training)
            for t in (1, 3):
                other = x.clone()
                other[:, t:] += change_of(other[:, t:])
                torch.manual_seed(1)
                before = call(x, mask)[:, :t]
                torch.manual_seed(1)
                if not close(before, call(other, mask)[:, :t], 1e-4):
                    return leak_finding(training)
    finally:
        if isinstance(own, nn.Module):
            own.eval()
    other = x.clone()
    other[:, 0] += change_of(other[:, 0])
    if close(call(x, mask)[:, -1], call(other, mask)[:, -1], 1e-6):
        return Finding(
            "causality",
            "the last token does not change with the first",
            "the mask hides the past",
            MASK_LINE,
        )
    return None


@torch.no_grad()
def half_overflow(own: Any, call: Callable[..., Tensor], x: Tensor) -> Finding | None:
    if not isinstance(own, nn.Module):
        return None
    mask = _causal_mask(x.size(1))
    for dtype in (torch.bfloat16, torch.float16):
        m = copy_of(own).to(dtype)
        if not call(m, x.to(dtype), mask).isfinite().all():
            return Finding(
                "half",
                f"the output under a mask is not finite in {dtype}",
                "a constant is too large for half precision",
                "the value that hidden scores are filled with",
            )
    return None


def unreached(
    own: Any, call: Callable[[], Tensor], *, tables: bool = True
) -> Finding | None:
    """Look for parameters, or rows of a table of positions, that get no gradient."""
    if not isinstance(own, nn.Module):
        return None
    own.zero_grad(set_to_none=True)
    out = call()
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    (out * weight).sum().backward()
    for name, p in own.named_parameters():
        if p.grad is None:
            return Finding(
                "gradients",
                f"no gradient reaches {name}",
                "it is never used, or the graph is cut (detach, .data, no_grad)",
                f"where {name} is used",
            )
        if p.ndim >= 2 and p.numel() and not p.grad.any():
            return Finding(
                "gradients",
                f"the gradient of {name} is zero everywhere",
                "what it makes is thrown away or multiplied by zero",
                f"where {name} is used",
            )
        if tables and "pos" in name and p.ndim in (2, 3) and p.size(-2) > 1:
            rows = p.grad.abs().sum(-1).flatten()  # one number a position
            dead = (rows == 0).nonzero().flatten().tolist()
            if dead:
                return Finding(
                    "gradients",
                    f"rows {dead[:4]} of {name} are never used",
                    "a token gets no position: CLS joined after the positions were "
                    "added, or the table is too long",
                    f"where {name} is added",
                )
    own.zero_grad(set_to_none=True)
    return None


@torch.no_grad()
def broken_residual(own: Any, call: Callable[..., Tensor], x: Tensor) -> Finding | None:
    """With every matrix at zero the branches are silent: only the residual remains."""
    if not isinstance(own, nn.Module):
        return None
    plain = copy_of(own)
    for name, p in plain.named_parameters():
        if p.ndim < 2:
            p.fill_(0.0 if name.endswith("bias") else 1.0)
    normal = call(plain, x)
    centred = normal.mean(-1).abs().max() < 1e-3
    post_norm = bool(
        centred and (normal.var(-1, unbiased=False) - 1).abs().max() < 1e-2
    )
    for p in plain.parameters():
        if p.ndim >= 2:
            p.zero_()
    out = call(plain, x)
    want = F.layer_norm(x, x.shape[-1:]) if post_norm else x
    if close(out, want, 1e-3):
        return None
    silent = bool((out - out.mean(-1, keepdim=True)).abs().max() < 1e-4)
    if silent:
        cause = "there is no residual connection around the branches"
    elif close(out, F.layer_norm(x, x.shape[-1:]), 1e-2):
        cause = "the residual adds the normalised input instead of the input itself"
    elif close(out, x.relu(), 1e-3) or bool((out >= 0).all()):
        cause = "an activation is applied to the sum; x must pass through unchanged"
    else:
        cause = "x does not pass through unchanged"
    return Finding(
        "residual",
        "with all matrices at zero the layer does not hand its input through",
        cause,
        "the lines with x + …",
    )


def probabilities(out: Tensor) -> Finding | None:
    sums = out.sum(-1)
    if (
        out.size(-1) > 1
        and bool((out >= 0).all())
        and close(sums, torch.ones_like(sums))
    ):
        return Finding(
            "logits",
            "the outputs are probabilities: they sum to one",
            "there is a softmax at the end; CrossEntropyLoss has its own",
            "the last line of forward",
        )
    return None


def large_first_loss(logits: Tensor, fresh: bool, slack: float = 1.5) -> Finding | None:
    """Compare the loss with that of guessing, ln K, plus some slack."""
    if not fresh:
        return None
    flat = logits.detach().flatten(0, -2)
    every = torch.arange(flat.size(-1)).repeat(len(flat), 1)  # each class once a row
    loss = float(F.cross_entropy(flat[:, :, None].expand(-1, -1, every.size(1)), every))
    expected = math.log(flat.size(-1))
    if loss < expected + slack:
        return None
    return Finding(
        "first loss",
        f"before training the loss is {loss:.1f}; guessing gives ln K = {expected:.1f}",
        "the logits begin too large",
        "the initialisation of the head, a missing last norm",
    )


def cannot_overfit(
    model: Any, inputs: tuple[Tensor, ...], labels: Tensor
) -> Finding | None:
    """Train a copy on one batch: whatever can learn at all can learn that by heart."""
    if not isinstance(model, nn.Module):
        return None
    own = copy_of(model).float().cpu().train()
    own.requires_grad_(True)
    large = sum(p.numel() for p in own.parameters()) > 20_000_000
    steps, lr = (12, 1e-4) if large else (60, 2e-3)
    optimizer = torch.optim.AdamW(own.parameters(), lr=lr, weight_decay=0.0)
    first = last = math.inf
    for step in range(steps):
        out = tensor_in(own(*inputs))
        loss = F.cross_entropy(out.flatten(0, -2), labels.flatten())
        last = loss.item()
        if step == 0:
            first = last
        if last < 0.5 * first:
            return None
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return Finding(
        "overfit",
        f"after {steps} steps on one batch the loss is {last:.2f}, from {first:.2f}",
        "the model cannot learn even one batch by heart",
        "softmax before the loss, detached tensors, missing residual or norm",
    )


def shown_weights(own: Any, x: Tensor, mask: dict[str, Any]) -> Tensor | None:
    """The attention maps that a module shows: by `attend`, or second in a tuple."""
    if isinstance(own, MultiHeadAttention):
        return own.attend(x, x, x, **mask)[1]
    result = own(x, x, x, **mask)
    if isinstance(result, tuple) and len(result) > 1 and isinstance(result[1], Tensor):
        return result[1]
    return None


def house_cached(own: Any) -> Callable[[Tensor, Tensor], Tensor] | None:
    if not all(hasattr(own, name) for name in ("encode", "decode", "new_cache")):
        return None

    @torch.no_grad()
    def step(src: Tensor, tgt: Tensor) -> Tensor:
        memory, cache = own.encode(src), own.new_cache()
        logits = [
            own.decode(tgt[:, : t + 1], memory, src, cache=cache)[:, -1:]
            for t in range(tgt.size(1))
        ]
        return torch.cat(logits, dim=1)

    return step
