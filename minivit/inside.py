"""Looking inside: what attends to what, and whether that means anything.

Copy this file together with vit.py, encoder.py, attention.py and layers.py into one
folder.

Letters for shapes: B batch, H heads, L queries, S keys, N patches, E embed, C channels.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import MultiHeadAttention, attention
from .vit import ViT, patchify, unpatchify

__all__ = [
    "attention_maps",
    "cls_attention",
    "deletion_curve",
    "only_patches",
    "patch_filters",
    "position_similarity",
    "relevance",
    "rollout",
]


@torch.no_grad()
def attention_maps(model: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """Record the weights of every attention of a model while it runs.

    Each attention is asked again with what it was given, its mask included, so that
    the weights are those the model used.

    Args:
        model: any model built with `MultiHeadAttention`.
        inputs: what the model is called with.

    Returns:
        One tensor (B, H, L, S) an attention, in the order in which they ran; rows sum
        to one (or to zero where a mask hides everything).

    Raises:
        ValueError: the model has no `MultiHeadAttention`, or runs none (a compiled
            model has forgotten them).
    """
    modules = [m for m in model.modules() if isinstance(m, MultiHeadAttention)]
    if not modules:
        raise ValueError(f"{type(model).__name__} has no MultiHeadAttention to look at")
    maps: list[Tensor] = []

    def look(module: nn.Module, args: tuple, kwargs: dict) -> None:
        assert isinstance(module, MultiHeadAttention)
        given = {name: x for name, x in kwargs.items() if name != "mask"}
        q, k, v = module.project(*args, **given)
        maps.append(attention(q, k, v, mask=kwargs.get("mask"))[1])

    with ExitStack() as hooks, _evaluating(model):
        for m in modules:
            hooks.enter_context(m.register_forward_pre_hook(look, with_kwargs=True))
        model(*inputs)
    if not maps:
        raise ValueError("no attention ran: look inside before torch.compile")
    return maps


def cls_attention(weights: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Lay out what the CLS token attends to as a picture over the patches.

    Args:
        weights: (..., 1+N, 1+N), an attention map or a rollout, CLS first.
        grid_size: rows and columns of patches, with rows · columns = N.

    Returns:
        (..., rows, columns); what CLS gives to itself is left out.

    Raises:
        ValueError: the number of tokens does not fit the grid.
    """
    rows, columns = grid_size
    if weights.size(-1) != 1 + rows * columns:
        raise ValueError(
            f"a grid of {rows} x {columns} patches and CLS makes "
            f"{1 + rows * columns} tokens, got {weights.size(-1)}"
        )
    return weights[..., 0, 1:].unflatten(-1, (rows, columns))


def rollout(maps: Sequence[Tensor]) -> Tensor:
    """Follow attention through all layers, residual connections included.

    Heads are averaged; half of each token is taken to come from the residual stream.

    Args:
        maps: (B, H, L, L) of each layer, first layer first.

    Returns:
        (B, L, L): how much of each input token (columns) is in each output (rows);
        rows sum to one.

    Raises:
        ValueError: no maps, or maps that are not square and of one shape.

    Source:
        Abnar and Zuidema 2020, "Quantifying Attention Flow in Transformers",
        equation 1.
    """
    shapes = {tuple(m.shape) for m in maps}
    if len(shapes) != 1 or maps[0].dim() != 4 or maps[0].size(-1) != maps[0].size(-2):
        raise ValueError(
            f"rollout needs maps of one shape (B, H, L, L), got {sorted(shapes)}"
        )
    identity = torch.eye(maps[0].size(-1), device=maps[0].device, dtype=maps[0].dtype)
    flow = identity.expand(maps[0].size(0), -1, -1)  # (B, L, L)
    for weights in maps:
        flow = (0.5 * weights.mean(dim=1) + 0.5 * identity) @ flow  # (B, L, L)
    return flow


@torch.enable_grad()
def relevance(
    model: nn.Module, inputs: Tensor, classes: Tensor | None = None
) -> Tensor:
    """Follow attention through all layers as far as it speaks for one class.

    Each weight counts by how much it would raise the class's score, if it would at all;
    heads are averaged.

    Args:
        model: inputs -> logits (B, K), built of self-attention.
        inputs: (B, ...) what the model is called with.
        classes: (B,) which class; by default the one with the highest score.

    Returns:
        (B, L, L): what each input token (columns) gave to each output (rows).

    Raises:
        ValueError: the model runs no `MultiHeadAttention`, or there is not one class
            for each input.

    Source:
        Chefer, Gur and Wolf 2021, "Generic Attention-model Explainability for
        Interpreting Bi-Modal and Encoder-Decoder Transformers", equations 5 and 6.
    """
    maps: list[Tensor] = []
    if inputs.is_floating_point():  # all weights may be frozen
        inputs = inputs.detach().requires_grad_()

    def attend(module: nn.Module, args: tuple, kwargs: dict, _: Tensor) -> Tensor:
        assert isinstance(module, MultiHeadAttention)
        output, weights = module.attend(*args, **kwargs)
        maps.append(weights)  # (B, H, L, L), now between input and score
        return output

    modules = [m for m in model.modules() if isinstance(m, MultiHeadAttention)]
    with ExitStack() as hooks, _evaluating(model):
        for m in modules:
            hooks.enter_context(m.register_forward_hook(attend, with_kwargs=True))
        logits = model(inputs)  # (B, K)
        if not maps:
            raise ValueError(f"{type(model).__name__} runs no MultiHeadAttention")
        chosen = logits.argmax(dim=1) if classes is None else classes  # (B,)
        if chosen.shape != logits.shape[:1]:  # fewer would leave images without a score
            wanted, came = tuple(logits.shape[:1]), tuple(chosen.shape)
            raise ValueError(f"classes must be {wanted}, got {came}")
        score = logits.gather(1, chosen[:, None]).sum()
        slopes = torch.autograd.grad(score, maps)
    flow = torch.eye(maps[0].size(-1)).to(maps[0])  # (L, L)
    for weights, slope in zip(maps, slopes):
        flow = flow + (weights * slope).clamp(min=0).mean(dim=1) @ flow  # (B, L, L)
    return flow.detach()


def position_similarity(model: ViT) -> Tensor:
    """Compare the learned positions of all patches with each other.

    Args:
        model: a `ViT`.

    Returns:
        (rows, columns, rows, columns): cosine similarity of the position at the first
        two indices with that at the last two.
    """
    grid = model.patch_embed.grid_size
    positions = model.pos_embed.detach()[0, -grid[0] * grid[1] :]  # (N, E)
    positions = F.normalize(positions, dim=-1)
    return (positions @ positions.T).unflatten(1, grid).unflatten(0, grid)


def patch_filters(model: ViT, number: int) -> Tensor:
    """Show the patterns that the patch projection is most sensitive to.

    They are the leading right singular vectors of its weight: the directions in the
    space of patches along which the tokens change most. A direction has no sign; here
    its largest entry is positive, so that every machine draws the same picture.

    Args:
        model: a `ViT`.
        number: how many.

    Returns:
        (number, C, P, P), each of length one, most important first.

    Raises:
        ValueError: there are fewer than `number`.

    Source:
        Dosovitskiy et al. 2021, figure 7 (left).
    """
    embed = model.patch_embed
    most = min(embed.proj.weight.shape)
    if not 1 <= number <= most:
        raise ValueError(f"number must lie between 1 and {most}, got {number}")
    directions = torch.linalg.svd(embed.proj.weight.detach(), full_matrices=False).Vh
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    directions = directions * largest.sign()  # (min(E, P·P·C), P·P·C)
    return unpatchify(directions[:number, None], embed.patch_size, embed.patch_size)


@contextmanager
def only_patches(model: nn.Module, kept: Tensor) -> Iterator[None]:
    """Within this context the encoder is given CLS and these patches, no others.

    They keep their positions: nothing is painted, the tokens are left out.

    Args:
        model: a `ViT` with CLS.
        kept: (B, n), the numbers of the patches that each image keeps.

    Raises:
        TypeError: the model has no CLS, which must remain.
        ValueError: `kept` are no numbers of patches, or the encoder was not called (a
            compiled model has forgotten how to look).
    """
    if not (isinstance(model, ViT) and model.pool == "cls"):
        raise TypeError(f"leaving out needs a ViT with CLS, got {type(model).__name__}")
    most = model.patch_embed.num_patches
    if kept.dtype != torch.long or ((kept < 0) | (kept >= most)).any():
        raise ValueError(f"kept must be integers from 0 to {most - 1}, got {kept}")
    tokens = F.pad(1 + kept, (1, 0))  # (B, 1+n): CLS is number 0
    ran = False

    def choose(_: nn.Module, args: tuple[Tensor]) -> Tensor:
        nonlocal ran
        ran = True
        return args[0].take_along_dim(tokens[..., None], dim=1)  # (B, 1+n, E)

    with model.encoder.register_forward_pre_hook(choose):
        yield
    if not ran:
        raise ValueError("no patch was left out: look inside before torch.compile")


@torch.no_grad()
def deletion_curve(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    scores: Tensor,
    *,
    patch_size: int,
    fill: float | None = 0.0,
) -> Tensor:
    """Take patches away one after the other, highest score first, and watch.

    A ranking that knows what matters makes the accuracy fall early. Of equal scores
    the first patch goes first.

    Args:
        model: images -> logits (B, K).
        images: (B, C, height, width).
        labels: (B,).
        scores: (B, N), or (B, rows, columns): what each patch is worth.
        patch_size: P.
        fill: value of a blank pixel. None blanks nothing: a `ViT` is given the
            tokens of the other patches only.

    Returns:
        (N + 1,) accuracy without 0, 1, …, N patches.

    Raises:
        TypeError: tokens can only be left out of a `ViT`, and CLS must remain.
        ValueError: the scores or the labels do not fit the patches, or the model has
            other patches.
    """
    if fill is None and isinstance(model, ViT):
        own = model.patch_embed.patch_size
        if patch_size != own:
            raise ValueError(f"the model's patch_size is {own}, got {patch_size}")
    patches = patchify(images, patch_size).clone()  # (B, N, P·P·C)
    scores = scores.flatten(1)
    wanted = patches.shape[:2]
    if scores.shape != wanted or labels.shape != wanted[:1]:
        came = f"{tuple(scores.shape)} scores and {tuple(labels.shape)} labels"
        raise ValueError(
            f"scores must be {tuple(wanted)} and labels {tuple(wanted[:1])}, got {came}"
        )
    if scores.isnan().any():  # they would count as the highest
        raise ValueError(f"{int(scores.isnan().sum())} scores are NaN")
    order = scores.argsort(dim=1, descending=True, stable=True)  # (B, N)
    size = (images.size(2), images.size(3))
    rows = torch.arange(len(images), device=images.device)
    accuracy = []
    with _evaluating(model):
        for step in range(patches.size(1) + 1):
            if fill is None:
                with only_patches(model, order[:, step:]):
                    logits = model(images)
            else:
                patches[rows, order[:, :step].T] = fill
                logits = model(unpatchify(patches, patch_size, size))
            accuracy.append((logits.argmax(dim=-1) == labels).float().mean())
    return torch.stack(accuracy)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Set eval mode, and afterwards every part's own mode again: some may be frozen."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
