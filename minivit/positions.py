"""Positions: attention alone does not know the order of its tokens; these tell it.

Copy this file: it works alone and needs torch only.

Letters for shapes: B batch, L length, E embed, H heads, D head, N patches.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "LearnedPositions",
    "SinusoidalPositions",
    "resample_positions",
    "rotate",
    "sinusoidal_positions",
    "sinusoidal_positions_2d",
]


def sinusoidal_positions(length: int, embed_dim: int) -> Tensor:
    """Give each position a fixed vector of sines and cosines.

    Feature 2i of position p is sin(p / 10000^(2i/E)), feature 2i+1 the cosine of
    the same angle, for i = 0 … E/2 - 1.

    Args:
        length: L, number of positions.
        embed_dim: E, width of each vector; even.

    Returns:
        (L, E), sines and cosines interleaved.

    Raises:
        ValueError: `embed_dim` is not even.

    Source:
        Vaswani et al. 2017, section 3.5.
    """
    angles = torch.outer(
        torch.arange(length, dtype=torch.float64), _frequencies(embed_dim)
    )  # (L, E/2)
    table = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)  # (L, E)
    return table.to(torch.get_default_dtype())


def sinusoidal_positions_2d(height: int, width: int, embed_dim: int) -> Tensor:
    """Give each grid cell its row in one half of the vector, its column in the other.

    Args:
        height: number of rows.
        width: number of columns.
        embed_dim: E, width of each vector; divisible by 4.

    Returns:
        (height * width, E), row by row, as `patchify` orders patches.

    Raises:
        ValueError: `embed_dim` is not divisible by 4.
    """
    if embed_dim % 4:
        raise ValueError(f"embed_dim={embed_dim} must be divisible by 4")
    rows = sinusoidal_positions(height, embed_dim // 2)
    columns = sinusoidal_positions(width, embed_dim // 2)
    return torch.cat(
        [rows.repeat_interleave(width, dim=0), columns.repeat(height, 1)], dim=1
    )  # (height * width, E)


class SinusoidalPositions(nn.Module):
    """Add sinusoidal positions to a sequence.

    Args:
        max_len: longest sequence that will come.
        embed_dim: E, width of the tokens; even.

    Raises:
        ValueError: as `sinusoidal_positions`.
    """

    table: Tensor

    def __init__(self, max_len: int, embed_dim: int) -> None:
        super().__init__()
        table = sinusoidal_positions(max_len, embed_dim)
        self.register_buffer("table", table, persistent=False)
        self.register_load_state_dict_post_hook(_reset)

    def reset(self) -> None:
        """Compute the table again, as after `to_empty`: no state dict holds it."""
        device = None if self.table.is_meta else self.table.device
        table = sinusoidal_positions(*self.table.shape)
        self.table = table.to(device, self.table.dtype)

    def forward(self, x: Tensor, *, start: int = 0) -> Tensor:
        """Add the positions start, start + 1, … to the tokens.

        Args:
            x: (B, L, E).
            start: position of the first token; above zero in cached decoding.

        Returns:
            (B, L, E).

        Raises:
            ValueError: the sequence leaves the table.
        """
        return x + _slice(self.table, x, start).to(x)


class LearnedPositions(nn.Module):
    """Add a learned vector for each position to a sequence.

    Args:
        max_len: longest sequence that will come.
        embed_dim: E, width of the tokens.
    """

    def __init__(self, max_len: int, embed_dim: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(max_len, embed_dim))
        nn.init.normal_(self.table, std=0.02)

    def forward(self, x: Tensor, *, start: int = 0) -> Tensor:
        """Add the positions start, start + 1, … to the tokens.

        Args:
            x: (B, L, E).
            start: position of the first token; above zero in cached decoding.

        Returns:
            (B, L, E).

        Raises:
            ValueError: the sequence leaves the table.
        """
        return x + _slice(self.table, x, start)


def rotate(x: Tensor, positions: Tensor | None = None) -> Tensor:
    """Turn each pair of features by an angle that grows with the position (rotary).

    The pair (2i, 2i+1) of the vector at position p turns by p / 10000^(2i/D).
    Done to queries and keys, their scores depend on the distance only.

    Args:
        x: (..., L, D) queries or keys, D even.
        positions: (L,) positions, any real numbers; 0 … L-1 if not given.

    Returns:
        (..., L, D), each vector as long as before.

    Raises:
        ValueError: D is not even, or the positions do not match L.

    Source:
        Su et al. 2021, "RoFormer", equation 34.
    """
    length, dim = x.shape[-2:]
    if positions is None:
        positions = torch.arange(length, device=x.device)
    if positions.shape != (length,):
        raise ValueError(
            f"positions must have shape ({length},), got {tuple(positions.shape)}"
        )
    exact = torch.float32 if x.device.type == "mps" else torch.float64  # MPS lacks it
    frequencies = _frequencies(dim).to(x.device, exact)
    angles = torch.outer(positions.to(exact), frequencies)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)  # (L, D/2)
    even, odd = x[..., 0::2], x[..., 1::2]  # (..., L, D/2)
    turned = [even * cos - odd * sin, odd * cos + even * sin]
    return torch.stack(turned, dim=-1).flatten(-2)  # (..., L, D)


def resample_positions(
    pos_embed: Tensor,
    grid_size: int | tuple[int, int],
    *,
    old_grid_size: int | tuple[int, int] | None = None,
    num_prefix_tokens: int = 1,
) -> Tensor:
    """Stretch the learned positions of an image grid to another grid (bicubic).

    Args:
        pos_embed: (1, num_prefix_tokens + N, E).
        grid_size: patches per side of the new grid, or (rows, columns).
        old_grid_size: the same of the present grid; square if not given.
        num_prefix_tokens: tokens in front (CLS) whose positions are kept.

    Returns:
        (1, num_prefix_tokens + rows * columns, E).

    Raises:
        ValueError: the table does not have the size of the old grid, or the new grid
            has no patch.

    Source:
        Dosovitskiy et al. 2021, section 3.2 (fine-tuning at higher resolution).
    """
    if pos_embed.dim() != 3 or pos_embed.size(0) != 1:
        came = tuple(pos_embed.shape)
        raise ValueError(f"pos_embed must have shape (1, tokens, width), got {came}")
    num_patches = pos_embed.size(1) - num_prefix_tokens
    if not 0 < num_patches <= pos_embed.size(1):
        raise ValueError(
            f"{num_prefix_tokens=} must leave patches of {pos_embed.size(1)} tokens"
        )
    prefix, grid = pos_embed.split([num_prefix_tokens, num_patches], dim=1)
    old = _pair(round(num_patches**0.5) if old_grid_size is None else old_grid_size)
    new = _pair(grid_size)
    if old[0] * old[1] != num_patches:
        raise ValueError(
            f"{num_patches} patch positions do not form a grid of {old[0]} x {old[1]}"
        )
    if min(new) < 1:
        raise ValueError(f"the new grid must have a patch, got {new[0]} x {new[1]}")
    if new == old:
        return pos_embed
    grid = grid.unflatten(1, old).permute(0, 3, 1, 2)  # (1, E, rows, columns)
    exact = torch.promote_types(grid.dtype, torch.float32)  # half would be too coarse
    grid = F.interpolate(
        grid.to(exact), size=new, mode="bicubic", align_corners=False, antialias=True
    )  # (1, E, new rows, new columns)
    grid = grid.flatten(2).transpose(1, 2).to(pos_embed.dtype)  # (1, N, E)
    return torch.cat([prefix, grid], dim=1)  # (1, 1+N, E)


def _reset(module: SinusoidalPositions, _: object) -> None:
    """Reset the table, from a hook: a lambda there could not be pickled."""
    module.reset()


def _frequencies(dim: int) -> Tensor:
    if dim % 2:
        raise ValueError(f"the width must be even, got {dim}")
    return 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)  # (dim/2,)


def _slice(table: Tensor, x: Tensor, start: int) -> Tensor:
    end = start + x.size(-2)
    if start < 0 or end > len(table):
        asked = f"positions {start} to {end - 1}"
        raise ValueError(f"{asked} asked for, but the table has max_len={len(table)}")
    return table[start:end]  # (L, E)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
