"""The Vision Transformer: an image is cut into patches, and patches are tokens.

Copy this file together with encoder.py, attention.py and layers.py into one folder.

Letters for shapes: B batch, C channels, P patch side, N patches, E embed, K classes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .encoder import Encoder

__all__ = [
    "PatchEmbed",
    "ViT",
    "patchify",
    "unpatchify",
    "vit_b_16",
    "vit_b_32",
    "vit_l_16",
    "vit_s_4",
    "vit_s_16",
    "vit_ti_16",
]

Size = int | tuple[int, int]


# What `vit_b_16()` and its like build, and where `python -m minivit.train` begins.
SIZES: dict[str, dict[str, Any]] = {
    name: {
        "image_size": image_size,
        "patch_size": patch_size,
        "num_classes": num_classes,
        "embed_dim": embed_dim,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "mlp_dim": 4 * embed_dim,
    }
    for name, image_size, patch_size, num_classes, embed_dim, num_layers, num_heads in [
        ("vit_ti_16", 224, 16, 1000, 192, 12, 3),
        ("vit_s_16", 224, 16, 1000, 384, 12, 6),
        ("vit_b_16", 224, 16, 1000, 768, 12, 12),
        ("vit_b_32", 224, 32, 1000, 768, 12, 12),
        ("vit_l_16", 224, 16, 1000, 1024, 24, 16),
        ("vit_s_4", 32, 4, 10, 384, 9, 6),
    ]
}


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images into square patches, row by row, and flatten each.

    Args:
        images: (B, C, height, width); both sides divisible by the patch size.
        patch_size: P, side of a patch in pixels.

    Returns:
        (B, N, P·P·C) with N = (height / P) · (width / P); inside a patch the order is
        row, column, channel.

    Raises:
        ValueError: the patch size does not divide the image size.

    Source:
        Dosovitskiy et al. 2021, section 3.1.
    """
    rows, columns = _grid(images.shape[2:], patch_size)
    grid = (
        images.unflatten(3, (columns, patch_size))  # (B, C, height, columns, P)
        .unflatten(2, (rows, patch_size))  # (B, C, rows, P, columns, P)
        .permute(0, 2, 4, 3, 5, 1)  # (B, rows, columns, P, P, C)
    )
    return grid.flatten(3).flatten(1, 2)  # (B, N, P·P·C)


def unpatchify(patches: Tensor, patch_size: int, image_size: Size) -> Tensor:
    """Put the patches of `patchify` back together.

    Args:
        patches: (B, N, P·P·C).
        patch_size: P, side of a patch in pixels.
        image_size: side of the square images, or (height, width).

    Returns:
        (B, C, height, width).

    Raises:
        ValueError: the patch size does not divide the image size.
    """
    rows, columns = _grid(_pair(image_size), patch_size)
    grid = (
        patches.unflatten(2, (patch_size, patch_size, -1))  # (B, N, P, P, C)
        .unflatten(1, (rows, columns))  # (B, rows, columns, P, P, C)
        .permute(0, 5, 1, 3, 2, 4)  # (B, C, rows, P, columns, P)
    )
    return grid.flatten(4).flatten(2, 3)  # (B, C, height, width)


class PatchEmbed(nn.Module):
    """Turn an image into tokens: cut it into patches, map each to the model's width.

    Args:
        image_size: side of the square images, or (height, width).
        patch_size: P, side of a patch in pixels.
        in_channels: C.
        embed_dim: E, width of the tokens.

    Raises:
        ValueError: the patch size does not divide the image size.

    Source:
        Dosovitskiy et al. 2021, equation 1.
    """

    def __init__(
        self,
        *,
        image_size: Size,
        patch_size: int,
        in_channels: int = 3,
        embed_dim: int,
    ) -> None:
        super().__init__()
        self.image_size = _pair(image_size)
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.grid_size = _grid(self.image_size, patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.proj = nn.Linear(patch_size**2 * in_channels, embed_dim)
        nn.init.trunc_normal_(self.proj.weight, std=self.proj.in_features**-0.5)
        nn.init.zeros_(self.proj.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Embed the patches.

        Args:
            images: (B, C, height, width).

        Returns:
            (B, N, E).

        Raises:
            TypeError: the images are integers, as a file holds them.
            ValueError: the images have another size or number of channels.
        """
        if not images.is_floating_point():
            raise TypeError(f"images must be floats (bytes / 255), got {images.dtype}")
        if images.shape[1:] != (self.in_channels, *self.image_size):
            expected = "B, {}, {}, {}".format(self.in_channels, *self.image_size)
            raise ValueError(f"images must be ({expected}), got {tuple(images.shape)}")
        return self.proj(patchify(images, self.patch_size))


class ViT(nn.Module):
    """A Transformer encoder that reads patches and names what the image shows.

    Args:
        image_size: side of the square images, or (height, width).
        patch_size: P, side of a patch in pixels.
        in_channels: C.
        num_classes: K.
        embed_dim: E, width of the tokens.
        num_layers: depth of the encoder.
        num_heads: H, must divide E.
        mlp_dim: width inside the feed-forward networks.
        dropout: probability, on embeddings and as in the layers.
        pool: "cls" reads the class from an extra token, "mean" from the average of
            the patch tokens (there is no CLS token then).
        drop_path: stochastic depth, as `Encoder`.
        layer_scale: as `Encoder`.
        norm_eps: eps of the layer normalisations.
        gradient_checkpointing: as `Encoder`.

    Raises:
        ValueError: sizes that do not fit, or an unknown `pool`.

    Source:
        Dosovitskiy et al. 2021, equations 1 to 4.
    """

    def __init__(
        self,
        *,
        image_size: Size,
        patch_size: int,
        in_channels: int = 3,
        num_classes: int,
        embed_dim: int,
        num_layers: int,
        num_heads: int,
        mlp_dim: int,
        dropout: float = 0.0,
        pool: str = "cls",
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        norm_eps: float = 1e-6,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if pool not in ("cls", "mean"):
            raise ValueError(f"pool must be 'cls' or 'mean', got {pool!r}")
        self.pool = pool
        self.patch_embed = PatchEmbed(
            image_size=image_size,
            patch_size=patch_size,
            in_channels=in_channels,
            embed_dim=embed_dim,
        )
        num_tokens = self.patch_embed.num_patches
        if pool == "cls":
            num_tokens += 1
            self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, num_tokens, embed_dim))
        # Half as loud as the patches of digits. A table that began at the usual 0.02
        # ended a point lower on them: book/experiments/from_scratch.py.
        nn.init.normal_(self.pos_embed, std=0.2)
        self.dropout = nn.Dropout(dropout)
        self.encoder = Encoder(
            embed_dim,
            num_layers,
            num_heads,
            mlp_dim,
            dropout=dropout,
            activation="gelu",
            norm_first=True,
            norm_eps=norm_eps,
            drop_path=drop_path,
            layer_scale=layer_scale,
            gradient_checkpointing=gradient_checkpointing,
        )
        self.head = nn.Linear(embed_dim, num_classes)
        # All classes equally likely at first: the loss begins at ln K.
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Score every class.

        Args:
            images: (B, C, height, width).

        Returns:
            (B, K) logits.

        Raises:
            TypeError: as `PatchEmbed`.
            ValueError: the images have another size or number of channels.
        """
        tokens = self.features(images)
        pooled = tokens[:, 0] if self.pool == "cls" else tokens.mean(dim=1)  # (B, E)
        return self.head(pooled)

    def features(self, images: Tensor) -> Tensor:
        """Describe the image by its tokens, as they leave the final normalisation.

        Args:
            images: (B, C, height, width).

        Returns:
            (B, 1+N, E), CLS first; (B, N, E) with mean pooling.

        Raises:
            TypeError: as `PatchEmbed`.
            ValueError: the images have another size or number of channels.
        """
        x = self.patch_embed(images)  # (B, N, E)
        if self.pool == "cls":
            cls = self.cls_token.expand(x.size(0), -1, -1)  # (B, 1, E)
            x = torch.cat([cls, x], dim=1)  # (B, 1+N, E)
        return self.encoder(self.dropout(x + self.pos_embed))


def vit_ti_16(**changes: Any) -> ViT:
    """ViT-Ti/16 (tiny) of Touvron et al. 2021, table 1: 5.7 million parameters.

    For 224 pixels and 1000 classes, as all of these but `vit_s_4`.

    Args:
        changes: arguments of `ViT` that shall differ; `mlp_dim` does not follow
            `embed_dim`.
    """
    return ViT(**SIZES["vit_ti_16"] | changes)


def vit_s_16(**changes: Any) -> ViT:
    """ViT-S/16 (small) of Touvron et al. 2021, table 1: 22 million parameters.

    Args:
        changes: arguments of `ViT` that shall differ; `mlp_dim` does not follow
            `embed_dim`.
    """
    return ViT(**SIZES["vit_s_16"] | changes)


def vit_b_16(**changes: Any) -> ViT:
    """ViT-B/16 (base) of Dosovitskiy et al. 2021, table 1: 86 million parameters.

    Args:
        changes: arguments of `ViT` that shall differ; `mlp_dim` does not follow
            `embed_dim`.
    """
    return ViT(**SIZES["vit_b_16"] | changes)


def vit_b_32(**changes: Any) -> ViT:
    """ViT-B/32 (base, large patches) of Dosovitskiy et al. 2021: 88 million parameters.

    Args:
        changes: arguments of `ViT` that shall differ; `mlp_dim` does not follow
            `embed_dim`.
    """
    return ViT(**SIZES["vit_b_32"] | changes)


def vit_l_16(**changes: Any) -> ViT:
    """ViT-L/16 (large) of Dosovitskiy et al. 2021: 304 million parameters.

    The paper's table 1 says 307 million.

    Args:
        changes: arguments of `ViT` that shall differ; `mlp_dim` does not follow
            `embed_dim`.
    """
    return ViT(**SIZES["vit_l_16"] | changes)


def vit_s_4(**changes: Any) -> ViT:
    """ViT for 32 pixels and 10 classes: patches of 4, width 384, 9 layers, 6 heads.

    16 million parameters.

    Args:
        changes: arguments of `ViT` that shall differ; `mlp_dim` does not follow
            `embed_dim`.
    """
    return ViT(**SIZES["vit_s_4"] | changes)


def _pair(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _grid(image_size: Sequence[int], patch_size: int) -> tuple[int, int]:
    height, width = image_size
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"image size {height} x {width} must be divisible by {patch_size=}"
        )
    return height // patch_size, width // patch_size
