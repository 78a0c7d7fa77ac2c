"""A Vision Transformer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from .. import vit as _vit
from .footprint import patch_footprints
from .modules import Model
from .properties import (
    another,
    batch_leak,
    cannot_overfit,
    change_of,
    changed_in_place,
    in_double,
    moved_copy,
    no_activation,
    not_repeatable,
    random_input,
    size_of,
    unreached,
    without_positions,
    wrong_shape,
)
from .report import Finding, Report, checker, close, max_abs, negligible
from .scores import positions_inside
from .stream import broken_stream
from .subject import check, expect


@checker
def vit(
    model: nn.Module,
    *,
    image_size: int | tuple[int, int] | None = None,
    in_channels: int | None = None,
    num_classes: int | None = None,
    patch_size: tuple[int, int] | None = None,
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
        patch_size: (height, width) of its patches, if they are not square.
        fresh: the model is not trained yet, so that its loss should be near ln K;
            judged by its weights as they are.
        norm_before_pool: whether the last normalisation is meant to come before the
            tokens are pooled (as in the paper) or after; None accepts both.

    Returns:
        The report.

    Raises:
        TypeError: the model is no `nn.Module`.
        ValueError: a size that is needed is neither given nor to be found.
    """
    return ImageModel(
        model,
        fresh=fresh,
        image_size=image_size,
        in_channels=in_channels,
        num_classes=num_classes,
        patch_size=patch_size,
        norm_before_pool=norm_before_pool,
    ).report()


@dataclass
class ImageModel(Model):
    """The model, two images `x` (2, C, height, width), and the side of its patches."""

    image_size: int | tuple[int, int] | None
    in_channels: int | None
    num_classes: int | None
    patch_size: tuple[int, int] | None
    norm_before_pool: bool | None
    name = "vit"

    def __post_init__(self) -> None:
        self.read_sizes()
        own = moved_copy(self.module)
        x = random_input(2, self.channels, *self.size)
        self.own, self.x = in_double(own, lambda m, x: [self.on(m, x)], x)
        self.inputs = (self.x,)

    def read_sizes(self) -> None:
        """Find the sizes that are not given in the model.

        Raises:
            ValueError: there is no such attribute.
        """
        model, side = self.module, self.image_size
        embed = getattr(model, "patch_embed", None)  # where timm and we keep them
        for owner, name in (
            (model, "image_size"),
            (embed, "image_size"),
            (embed, "img_size"),
        ):
            side = side or getattr(owner, name, None)
        if side is None:
            raise ValueError("image_size is needed: the model has no such attribute")
        height, width = (side, side) if isinstance(side, int) else side
        self.size = height, width
        channels = getattr(model, "in_channels", getattr(embed, "in_channels", 3))
        self.channels = self.in_channels or channels
        self.classes = size_of(model, "num_classes", self.num_classes)

    @cached_property
    def footprints(self) -> tuple[int | None, Finding | None]:
        """The side of the patches, if they are squares, and what is wrong with them."""
        return patch_footprints(self.call, self.x, self.patch_size)

    def reordered(self, side: int, order: Tensor) -> Tensor:
        """Put the patches of the images into another order."""
        tokens = _vit.patchify(self.x, side)[:, order]
        return _vit.unpatchify(tokens, side, self.size)

    @check("shape")
    def shape(self) -> Finding | None:
        """One row of logits comes out for each image."""
        return wrong_shape(self.logits(), (2, self.classes))

    @check("in place")
    def untouched(self) -> Finding | None:
        """The images stay as they are."""
        return changed_in_place(self.call, self.x)

    @check("repeatable")
    def repeatable(self) -> Finding | None:
        """The same again gives the same, also after other images."""
        return not_repeatable(self.logits, lambda: self.call(self.x.flip(3)), self.own)

    @check("patches")
    def patches(self) -> Finding | None:
        """Each token depends on the pixels of one square."""
        return self.footprints[1]

    @check("positions")
    def positions(self) -> None:
        """The model sees where a patch was."""
        side, (height, width) = self.footprints[0], self.size
        if side is None or height % side or width % side or height * width == side**2:
            return
        g = torch.Generator().manual_seed(0)
        order = torch.randperm(height * width // side**2, generator=g)
        expect(
            not close(self.logits(), self.call(self.reordered(side, order)), 1e-5),
            "shuffling the patches changes nothing",
            "positions are missing, or the same for every patch ([n] instead of [:n])",
            "where positions are added",
        )

    @check("order")
    def order(self) -> None:
        """By its positions alone: without them it sees a set of patches."""
        side, plain = self.footprints[0], without_positions(self.own)
        if side is None or plain is None:
            return
        order = torch.arange(self.x[0, 0].numel() // side**2).flip(0)
        turned = self.reordered(side, order)
        expect(
            close(self.on(plain, self.x), self.on(plain, turned), 1e-3)
            or positions_inside(self.logits),  # rotary, or relative ones
            "with positions at zero, shuffling the patches still changes the logits",
            "a reshape mixes tokens with heads: merge heads with transpose and flatten",
            "the reshapes around the heads",
        )

    @check("pixels")
    def pixels(self) -> None:
        """Every pixel reaches the logits, of one image at least."""
        images = self.x.clone().requires_grad_()
        out = self.call(images)
        (gradient,) = torch.autograd.grad((out * change_of(out)).sum(), images)
        dead = negligible(gradient, max_abs(gradient)).all(dim=0)  # (C, height, width)
        expect(
            int(dead.sum()) <= dead.numel() // 1000,
            f"{int(dead.sum())} of {dead.numel()} pixels do not reach the logits",
            "patches are left out, or tokens never look at each other, so that the "
            "head cannot see them (batch_first=True missing?)",
            "the cutting into patches, the attention, the token that the head reads",
        )

    @check("norm")
    def norm(self) -> None:
        """The last normalisation stands where it is meant to."""
        before = self.norm_before_pool
        if before is None:
            return
        dims = self.normalised_dims()
        expect(
            not dims or (dims[-1] == 3) == before,
            "the last normalisation sees pooled tokens (B, E)"
            if before
            else "the last normalisation sees all tokens (B, N, E)",
            "it comes after the pooling, not before"
            if before
            else "it comes before the pooling, not after",
            "the end of forward",
        )

    def normalised_dims(self) -> list[int]:
        """Numbers of axes of what the normalisations make, one after the other."""
        dims: list[int] = []
        hooks = [
            m.register_forward_hook(lambda module, args, out: dims.append(out.dim()))
            for m in self.own.modules()
            if "norm" in type(m).__name__.lower()
        ]
        self.logits()
        for hook in hooks:
            hook.remove()
        return dims

    @check("batch")
    def batch(self) -> Finding | None:
        """An image depends on no other, nor on its place."""
        return batch_leak(self.call, self.x)

    scores, plain_logits, layers = Model.scores, Model.plain_logits, Model.layers

    @check("stream")
    def stream(self) -> Finding | None:
        """Tokens pass silent layers, and the head reads the right one."""
        return broken_stream(self.own, self.x)

    @check("activation")
    def activation(self) -> Finding | None:
        """The model is no odd function."""
        plain = without_positions(self.own, tokens=True) or self.own
        return no_activation(plain, lambda m, sign: self.on(m, sign * self.x))

    @check("gradients")
    def gradients(self) -> Finding | None:
        """Every weight gets a gradient."""
        return unreached(self.own, lambda n: self.call(another(self.x, n)))

    first_loss = Model.first_loss

    @check("overfit")
    def overfit(self) -> Finding | None:
        """The model can learn two images by heart."""
        labels = torch.arange(len(self.x)) % self.classes
        return cannot_overfit(self.module, (self.x.float(),), labels)
