"""Modules with the user's weights: checked by properties that hold for any weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import vit as _vit
from ..attention import causal_mask as _causal_mask
from .footprint import patch_footprints
from .identity import wrong_heads
from .properties import (
    batch_leak,
    broken_residual,
    cannot_overfit,
    change_of,
    changed_in_place,
    check_means,
    eval_copy,
    flip,
    future_leak,
    half_overflow,
    hidden_in_maps,
    house_cached,
    large_first_loss,
    leak_finding,
    mask_argument,
    mask_finding,
    moved_copy,
    not_repeatable,
    order_matters,
    probabilities,
    random_input,
    shown_weights,
    size_of,
    tensor_in,
    unreached,
    width_of,
    without_positions,
    wrong_shape,
)
from .report import MASK_LINE, SOFTMAX_LINE, Finding, Report, close, run
from .scores import wrong_scores


def multi_head_attention(
    module: nn.Module,
    *,
    embed_dim: int | None = None,
    num_heads: int | None = None,
    arguments: str = "query key value",
    mask_name: str | None = "mask",
    mask_means: str = "look",
    batch_first: bool = True,
    weights: Callable[..., Tensor] | None = None,
) -> Report:
    """Check a multi-head attention, any class with any weights.

    Args:
        module: called with (B, L, E), (B, S, E), (B, S, E); returns (B, L, E), alone
            or first in a tuple.
        embed_dim: E; read from the module's attribute if not given.
        num_heads: H; read from the module's attribute if not given.
        arguments: order of its inputs, as "query key value"; "x" for self-attention.
        mask_name: name of its mask argument, of shape (L, S); None if it has none.
        mask_means: "look" if True lets a query see a key, "hide" if it hides it.
        batch_first: False if it takes (L, B, E).
        weights: called as weights(x, mask), returns maps (B, H, L, L), if the class can
            show them; by default `module.attend` of the house is used where it exists.

    Returns:
        The report.

    Raises:
        ValueError: a size that is needed is neither given nor an attribute.
    """
    check_means(mask_means)
    dim = size_of(module, "embed_dim", embed_dim)
    heads = size_of(module, "num_heads", num_heads)
    own = moved_copy(module)
    names = arguments.split()

    def call_on(m: Any) -> Callable[..., Tensor]:
        def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
            given = {"query": q, "key": k, "value": v, "x": q}
            inputs = [flip(given[name], batch_first) for name in names]
            extra = mask_argument(mask_name, mask, mask_means)
            return flip(tensor_in(m(*inputs, **extra)), batch_first)

        return call

    call = call_on(own)

    def self_call(x: Tensor, mask: Tensor | None = None) -> Tensor:
        return call(x, x, x, mask)

    x = random_input(3, 5, dim)
    memory = random_input(3, 7, dim)
    cross = "key" in names

    def values() -> Finding | None:
        return wrong_heads(own, call_on, dim, heads)

    def output_projection() -> Finding | None:
        matrices = [p for p in own.parameters() if p.ndim >= 2]
        if sum(p.numel() for p in matrices) != 3 * dim * dim:
            return None
        return Finding(
            "projection",
            f"the matrices hold 3·E² = {3 * dim * dim} numbers; 4·E² are expected",
            "the output projection is missing: heads never mix",
            "the last line of forward",
        )

    def doubled() -> Finding | None:
        twice = torch.cat([memory, memory], dim=1)
        if cross:
            a, b = call(x, memory, memory), call(x, twice, twice)
        else:
            a, b = self_call(memory), self_call(twice)[:, : memory.size(1)]
        if close(a, b, 1e-4):
            return None
        return Finding(
            "softmax",
            "giving every key and value twice changes the output",
            "the weights of a query do not sum to one over the keys: no softmax, or "
            "over another axis than the keys",
            SOFTMAX_LINE,
        )

    def queries_apart() -> Finding | None:
        if not cross:
            return None
        other = x.clone()
        other[:, 2:] += change_of(other[:, 2:])
        if close(call(x, memory, memory)[:, :2], call(other, memory, memory)[:, :2]):
            return None
        return Finding(
            "queries",
            "a query's output changes when another query changes",
            "the softmax runs over the queries, or a reshape mixes positions",
            SOFTMAX_LINE + ", and every reshape",
        )

    def hidden() -> Finding | None:
        mask = torch.ones(5, 5, dtype=torch.bool)
        mask[:, 3] = False
        mask[3, 3] = True
        other = x.clone()
        other[:, 3] += change_of(other[:, 3])
        change = (self_call(x, mask) - self_call(other, mask)).abs().amax((0, 2))
        return mask_finding(change[[0, 1, 2, 4]] < 1e-5, change[3] > 1e-5)

    def maps() -> Finding | None:
        extra = mask_argument(mask_name, _causal_mask(5), mask_means)
        if weights is not None:
            return hidden_in_maps(weights(x, *extra.values()))
        if names != ["query", "key", "value"] or not batch_first:
            return None
        return hidden_in_maps(shown_weights(own, x, extra))

    checks = [
        ("shape", lambda: wrong_shape(self_call(x), (3, 5, dim))),
        ("values", values),
        ("projection", output_projection),
        ("scores", lambda: wrong_scores(lambda: self_call(x))),
        ("softmax", doubled),
        ("queries", queries_apart),
        ("batch", lambda: batch_leak(self_call, x)),
        ("order", lambda: order_matters(self_call, x)),
        (
            "repeatable",
            lambda: not_repeatable(lambda: self_call(x), lambda: self_call(x * 2)),
        ),
        ("in place", lambda: changed_in_place(self_call, x)),
        ("gradients", lambda: unreached(own, lambda: self_call(x))),
    ]
    if mask_name is not None:
        checks += [
            ("mask", hidden),
            ("causality", lambda: future_leak(own, self_call, x)),
            (
                "half",
                lambda: half_overflow(own, lambda m, t, k: call_on(m)(t, t, t, k), x),
            ),
            ("map", maps),
        ]
    return run("multi_head_attention", checks)


def encoder_layer(
    layer: nn.Module,
    *,
    embed_dim: int | None = None,
    mask_name: str | None = "mask",
    mask_means: str = "look",
    batch_first: bool = True,
    maps: Callable[..., Tensor] | None = None,
) -> Report:
    """Check an encoder layer, pre- or post-norm, any class with any weights.

    Args:
        layer: called with (B, L, E), returns the same, alone or first in a tuple.
        embed_dim: E; found in its parameters if not given.
        mask_name: name of its mask argument, of shape (L, L); None if it has none.
        mask_means: "look" if True lets a query see a key, "hide" if it hides it.
        batch_first: False if it takes (L, B, E).
        maps: called as maps(x, mask), returns its attention maps (B, H, L, L).

    Returns:
        The report.

    Raises:
        ValueError: E is neither given nor to be found.
    """
    check_means(mask_means)
    dim = embed_dim or width_of(layer)
    own = moved_copy(layer)

    def call_on(m: Any) -> Callable[..., Tensor]:
        def call(x: Tensor, mask: Tensor | None = None) -> Tensor:
            extra = mask_argument(mask_name, mask, mask_means)
            return flip(tensor_in(m(flip(x, batch_first), **extra)), batch_first)

        return call

    call = call_on(own)
    x = random_input(3, 5, dim)

    def alone() -> Finding | None:
        mask = torch.eye(5, dtype=torch.bool)
        other = x.clone()
        other[:, 3] += change_of(other[:, 3])

        def reaches_others(mask: Tensor) -> bool:
            change = (call(x, mask) - call(other, mask)).abs().amax((0, 2))
            return bool((change[[0, 1, 2, 4]] > 1e-5).any())

        hidden, visible = not reaches_others(mask), reaches_others(~mask)
        return mask_finding(torch.tensor(hidden), torch.tensor(visible))

    def attends() -> Finding | None:
        other = x.clone()
        other[:, 3] += change_of(other[:, 3])
        change = (call(x) - call(other)).abs().amax((0, 2))
        if bool((change > 1e-6).all()):
            return None
        return Finding(
            "attention",
            "a token does not change when another one changes",
            "tokens do not look at each other",
            "the call of the attention",
        )

    def seen() -> Finding | None:
        if maps is None:
            return None
        extra = mask_argument(mask_name, _causal_mask(5), mask_means)
        return hidden_in_maps(maps(x, *extra.values()))

    checks = [
        ("shape", lambda: wrong_shape(call(x), (3, 5, dim))),
        ("attention", attends),
        ("residual", lambda: broken_residual(own, lambda m, t: call_on(m)(t), x)),
        ("scores", lambda: wrong_scores(lambda: call(x))),
        ("batch", lambda: batch_leak(call, x)),
        ("order", lambda: order_matters(call, x)),
        ("repeatable", lambda: not_repeatable(lambda: call(x), lambda: call(x * 2))),
        ("in place", lambda: changed_in_place(call, x)),
        ("gradients", lambda: unreached(own, lambda: call(x))),
    ]
    if mask_name is not None:
        checks += [
            ("mask", alone),
            ("causality", lambda: future_leak(own, call, x)),
            ("half", lambda: half_overflow(own, lambda m, t, k: call_on(m)(t, k), x)),
            ("map", seen),
        ]
    return run("encoder_layer", checks)


def decoder_layer(
    layer: nn.Module,
    *,
    embed_dim: int | None = None,
    mask_name: str | None = "mask",
    memory_mask_name: str | None = "memory_mask",
    mask_means: str = "look",
    batch_first: bool = True,
) -> Report:
    """Check a decoder layer, pre- or post-norm, any class with any weights.

    Args:
        layer: called with x (B, L, E) and memory (B, S, E); returns (B, L, E), alone or
            first in a tuple.
        embed_dim: E; found in its parameters if not given.
        mask_name: name of the argument for the mask (L, L) of the self-attention.
        memory_mask_name: the same for the mask (L, S) of the cross-attention.
        mask_means: "look" if True lets a query see a key, "hide" if it hides it.
        batch_first: False if it takes (L, B, E).

    Returns:
        The report.

    Raises:
        ValueError: E is neither given nor to be found.
    """
    check_means(mask_means)
    dim = embed_dim or width_of(layer)
    own = moved_copy(layer)
    x, memory = random_input(3, 5, dim), random_input(3, 7, dim)

    def call_on(m: Any) -> Callable[..., Tensor]:
        def call(
            x: Tensor,
            mask: Tensor | None = None,
            memory: Tensor = memory,
            memory_mask: Tensor | None = None,
        ) -> Tensor:
            extra = mask_argument(mask_name, mask, mask_means)
            extra |= mask_argument(memory_mask_name, memory_mask, mask_means)
            inputs = flip(x, batch_first), flip(memory.to(x.dtype), batch_first)
            return flip(tensor_in(m(*inputs, **extra)), batch_first)

        return call

    call = call_on(own)

    def cross() -> Finding | None:
        other = memory.clone()
        other[:, 4] += change_of(other[:, 4])
        change = (call(x) - call(x, memory=other)).abs().amax((0, 2))
        if bool((change > 1e-6).all()):
            return None
        return Finding(
            "memory",
            "the output does not change with the memory",
            "there is no cross-attention, or its keys come from the target",
            "the second attention: queries from x, keys and values from memory",
        )

    def memory_mask() -> Finding | None:
        mask = torch.ones(5, 7, dtype=torch.bool)
        mask[:, 4] = False
        other, seen = memory.clone(), memory.clone()
        other[:, 4] += change_of(other[:, 4])
        seen[:, 2] += change_of(seen[:, 2])
        out = call(x, memory=memory, memory_mask=mask)
        hidden = (out - call(x, memory=other, memory_mask=mask)).abs().amax()
        visible = (out - call(x, memory=seen, memory_mask=mask)).abs().amax()
        finding = mask_finding(hidden < 1e-5, visible > 1e-6)
        if finding is None:
            return None
        return Finding(
            "memory mask",
            finding.symptom,
            finding.cause,
            "the mask of the second attention",
        )

    def memory_order() -> Finding | None:
        turned = memory.flip(1)
        if close(call(x), call(x, memory=turned), 1e-4):
            return None
        return Finding(
            "memory order",
            "reordering the memory changes the output",
            "a reshape mixes positions",
            "every reshape of the second attention",
        )

    checks = [
        ("shape", lambda: wrong_shape(call(x), (3, 5, dim))),
        ("memory", cross),
        ("memory order", memory_order),
        ("residual", lambda: broken_residual(own, lambda m, t: call_on(m)(t), x)),
        ("scores", lambda: wrong_scores(lambda: call(x))),
        ("batch", lambda: batch_leak(call, x)),
        ("order", lambda: order_matters(call, x)),
        ("repeatable", lambda: not_repeatable(lambda: call(x), lambda: call(x * 2))),
        ("in place", lambda: changed_in_place(call, x)),
        ("gradients", lambda: unreached(own, lambda: call(x))),
    ]
    if mask_name is not None:
        checks += [
            ("causality", lambda: future_leak(own, call, x)),
            ("half", lambda: half_overflow(own, lambda m, t, k: call_on(m)(t, k), x)),
        ]
    if memory_mask_name is not None:
        checks.append(("memory mask", memory_mask))
    return run("decoder_layer", checks)


def transformer(
    model: nn.Module,
    *,
    src_vocab_size: int | None = None,
    tgt_vocab_size: int | None = None,
    pad_id: int = 0,
    fresh: bool = True,
    cached: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Report:
    """Check a sequence-to-sequence Transformer, any class.

    Args:
        model: called as model(src, tgt) with token ids (B, S) and (B, L); returns
            logits (B, L, V), alone, first in a tuple, or as `.logits`.
        src_vocab_size: number of source tokens; an attribute of the model if not given.
        tgt_vocab_size: V; an attribute of the model if not given.
        pad_id: id of the padding.
        fresh: the model is not trained yet, so that its loss should be near ln V.
        cached: called as cached(src, tgt), returns the logits (B, L, V) as step-by-step
            decoding with the model's cache computes them. Models with `encode`,
            `decode(…, cache=…)` and `new_cache` as the house's need none.

    Returns:
        The report.

    Raises:
        ValueError: a size that is needed is neither given nor an attribute.
    """
    src_vocab = size_of(model, "src_vocab_size", src_vocab_size)
    vocab = size_of(model, "tgt_vocab_size", tgt_vocab_size)
    own = moved_copy(model)
    usable = torch.tensor([i for i in range(min(src_vocab, vocab)) if i != pad_id])
    g = torch.Generator().manual_seed(0)

    def ids(*shape: int) -> Tensor:
        return usable[torch.randint(len(usable), shape, generator=g)]

    src, tgt = ids(3, 6), ids(3, 5)
    src[:, 1] = usable[1]
    src[:, 2] = usable[2]
    tgt[:, 0], tgt[:, 1], tgt[:, 2] = usable[0], usable[1], usable[2]

    def call(src: Tensor, tgt: Tensor) -> Tensor:
        return tensor_in(own(src, tgt))

    def shifted(tokens: Tensor, column: int) -> Tensor:
        other = tokens.clone()
        place = torch.searchsorted(usable, other[:, column].contiguous())
        other[:, column] = usable[(place + 1) % len(usable)]
        return other

    def causality() -> Finding | None:
        for training in (False, True):
            own.train(training)
            for t in (4, 2):
                torch.manual_seed(1)
                before = call(src, tgt)[:, :t]
                torch.manual_seed(1)
                if not close(before, call(src, shifted(tgt, t))[:, :t], 1e-4):
                    own.eval()
                    return leak_finding(training)
        own.eval()
        late = call(src, shifted(tgt, 1))[:, -1]
        if close(late, call(src, tgt)[:, -1], 1e-6):
            return Finding(
                "causality",
                "the last logits do not change with an earlier target token",
                "the mask hides the past (inverted polarity), or targets do not attend",
                MASK_LINE,
            )
        return None

    def order(which: str) -> Finding | None:
        swapped = [0, 2, 1, 3, 4]
        if which == "target":
            a, b = call(src, tgt)[:, -1], call(src, tgt[:, swapped])[:, -1]
        else:
            a, b = call(src, tgt), call(src[:, [*swapped, 5]], tgt)
        if not close(a, b, 1e-6):
            return None
        return Finding(
            f"{which} order",
            f"exchanging two {which} tokens changes nothing",
            "positions are missing, or the same for all tokens",
            f"where positions are added to the {which}",
        )

    def source_used() -> Finding | None:
        if not close(call(src, tgt), call(shifted(src, 3), tgt), 1e-6):
            return None
        return Finding(
            "source",
            "the logits do not change with the source",
            "there is no cross-attention, or its mask hides everything",
            "the decoder's second attention",
        )

    def padding() -> Finding | None:
        plain = call(src, tgt)

        def with_fill(token: int) -> Tensor:
            return torch.cat([src, torch.full((3, 2), token)], dim=1)

        if close(plain, call(with_fill(pad_id), tgt), 1e-4):
            return None
        for other in usable.tolist()[:40]:
            if close(plain, call(with_fill(other), tgt), 1e-4):
                return Finding(
                    "padding",
                    f"token {other} is ignored, padding (pad_id={pad_id}) is not",
                    "the mask compares with the wrong id",
                    "where the padding mask is made",
                )
        cause = "padding in the source is not hidden from the encoder or the decoder"
        if hasattr(own, "encode"):
            memory = own.encode(src)
            longer = own.encode(with_fill(pad_id))[:, : src.size(1)]
            cause = (
                "the cross-attention looks at the source's padding"
                if close(memory, longer, 1e-4)
                else "the encoder looks at the source's padding (or the mask hides "
                "rows instead of columns)"
            )
        return Finding(
            "padding",
            "appending padding to the source changes the logits",
            cause,
            "the padding mask and where it is handed over",
        )

    def target_padding() -> Finding | None:
        longer = torch.cat([tgt, torch.full((3, 2), pad_id)], dim=1)
        if close(call(src, tgt), call(src, longer)[:, : tgt.size(1)], 1e-4):
            return None
        return Finding(
            "target padding",
            "appending padding to the target changes the logits before it",
            "earlier positions see the padding",
            "the target's masks",
        )

    def batch() -> Finding | None:
        return batch_leak(lambda t: call(src, t), tgt, shifted(tgt, 1)) or (
            batch_leak(lambda s: call(s, tgt), src, shifted(src, 1))
        )

    def decoding() -> Finding | None:
        step = cached or house_cached(own)
        if step is None or close(step(src, tgt), call(src, tgt), 1e-4):
            return None
        got, want = step(src, tgt), call(src, tgt)
        first = bool(close(got[:, 0], want[:, 0], 1e-4))
        return Finding(
            "cache",
            "cached decoding gives other logits than reading the whole target"
            + (", from the second token on" if first else ""),
            "each new token is put at position 0, or the cache misses keys"
            if first
            else "the cached path computes something else",
            "the position of the new token, and what the cache keeps",
        )

    def labels() -> Tensor:
        return ids(3, 5)

    slack = 4.0  # a head tied to the embedding first expects the token just read

    return run(
        "transformer",
        [
            ("shape", lambda: wrong_shape(call(src, tgt), (3, 5, vocab))),
            ("causality", causality),
            ("source", source_used),
            ("source order", lambda: order("source")),
            ("target order", lambda: order("target")),
            ("padding", padding),
            ("target padding", target_padding),
            ("batch", batch),
            ("scores", lambda: wrong_scores(lambda: call(src, tgt))),
            ("cache", decoding),
            (
                "repeatable",
                lambda: not_repeatable(
                    lambda: call(src, tgt), lambda: call(src, labels())
                ),
            ),
            ("logits", lambda: probabilities(call(src, tgt))),
            ("gradients", lambda: unreached(own, lambda: call(src, tgt), tables=False)),
            (
                "first loss",
                lambda: large_first_loss(
                    tensor_in(eval_copy(model)(src, tgt)), fresh, slack
                ),
            ),
            ("overfit", lambda: cannot_overfit(model, (src, tgt), labels())),
        ],
    )


def vit(
    model: Callable[..., Any],
    *,
    image_size: int | tuple[int, int] | None = None,
    in_channels: int | None = None,
    num_classes: int | None = None,
    fresh: bool = True,
    norm_before_pool: bool | None = None,
) -> Report:
    """Check a Vision Transformer, any class of any library.

    Args:
        model: called with images (B, C, height, width); returns logits (B, K), alone,
            first in a tuple, or as `.logits`.
        image_size: side of the images, or (height, width); an attribute if not given.
        in_channels: C; 3 if neither given nor an attribute.
        num_classes: K; an attribute if not given.
        fresh: the model is not trained yet, so that its loss should be near ln K.
        norm_before_pool: whether the last normalisation is meant to come before the
            tokens are pooled (as in the paper) or after; None accepts both.

    Returns:
        The report.

    Raises:
        ValueError: a size that is needed is neither given nor to be found.
    """
    house = getattr(model, "patch_embed", None)
    if image_size is None and isinstance(model, _vit.ViT):
        image_size = model.patch_embed.image_size
        in_channels, num_classes = (
            model.patch_embed.in_channels,
            model.head.out_features,
        )
    size = image_size or getattr(model, "image_size", getattr(house, "img_size", None))
    if size is None:
        raise ValueError("image_size is needed: the model has no such attribute")
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    channels = in_channels or 3
    classes = size_of(model, "num_classes", num_classes)
    own = moved_copy(model)
    x = random_input(2, channels, height, width)

    def call(x: Tensor) -> Tensor:
        return tensor_in(own(x))

    def patches() -> Finding | None:
        return patch_footprints(call, x)[1]

    def positions() -> Finding | None:
        p = patch_footprints(call, x)[0]
        if p is None or height % p or width % p or height * width == p * p:
            return None
        tokens = _vit.patchify(x, p)
        order = torch.randperm(
            tokens.size(1), generator=torch.Generator().manual_seed(0)
        )
        shuffled = _vit.unpatchify(tokens[:, order], p, (height, width))
        if not close(call(x), call(shuffled), 1e-5):
            return None
        return Finding(
            "positions",
            "shuffling the patches changes nothing",
            "positions are missing, or the same for every patch ([n] instead of [:n])",
            "where positions are added",
        )

    def order() -> Finding | None:
        p = patch_footprints(call, x)[0]
        plain = without_positions(own)
        if p is None or plain is None:
            return None
        tokens = _vit.patchify(x, p)
        turned = _vit.unpatchify(tokens.flip(1), p, (height, width))
        if close(tensor_in(plain(x)), tensor_in(plain(turned)), 1e-3):
            return None
        return Finding(
            "order",
            "with positions at zero, shuffling the patches still changes the logits",
            "a reshape mixes tokens with heads: merge heads with transpose and flatten",
            "the reshapes around the heads",
        )

    def pixels() -> Finding | None:
        image = x[:1].clone().requires_grad_()
        out = call(image)
        direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
        (gradient,) = torch.autograd.grad((out * direction).sum(), image)
        dead = int((gradient == 0).sum())
        if dead <= image.numel() // 1000:
            return None
        return Finding(
            "pixels",
            f"{dead} of {image.numel()} pixels do not reach the logits",
            "patches are left out, or tokens never look at each other, so that the "
            "head cannot see them (batch_first=True missing?)",
            "the cutting into patches, the attention, the token that the head reads",
        )

    def norm() -> Finding | None:
        if norm_before_pool is None or not isinstance(own, nn.Module):
            return None
        dims: list[int] = []
        hooks = [
            m.register_forward_hook(lambda module, args, out: dims.append(out.dim()))
            for m in own.modules()
            if "norm" in type(m).__name__.lower()
        ]
        call(x)
        for hook in hooks:
            hook.remove()
        if not dims or (dims[-1] == 3) == norm_before_pool:
            return None
        return Finding(
            "norm",
            "the last normalisation sees pooled tokens (B, E)"
            if norm_before_pool
            else "the last normalisation sees all tokens (B, N, E)",
            "it comes after the pooling, not before"
            if norm_before_pool
            else "it comes before the pooling, not after",
            "the end of forward",
        )

    labels = torch.arange(len(x)) % classes
    return run(
        "vit",
        [
            ("shape", lambda: wrong_shape(call(x), (2, classes))),
            ("patches", patches),
            ("positions", positions),
            ("order", order),
            ("pixels", pixels),
            ("norm", norm),
            ("batch", lambda: batch_leak(call, x)),
            ("scores", lambda: wrong_scores(lambda: call(x))),
            (
                "repeatable",
                lambda: not_repeatable(lambda: call(x), lambda: call(x.flip(3))),
            ),
            ("in place", lambda: changed_in_place(call, x)),
            ("logits", lambda: probabilities(call(x))),
            ("gradients", lambda: unreached(own, lambda: call(x))),
            (
                "first loss",
                lambda: large_first_loss(tensor_in(eval_copy(model)(x)), fresh),
            ),
            ("overfit", lambda: cannot_overfit(model, (x,), labels)),
        ],
    )
