"""Small layers around attention: normalisation, feed-forward, two regularisers.

Copy this file: it works alone and needs torch only.

Letters for shapes: B batch, L length, E embed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["DropPath", "FeedForward", "LayerNorm", "LayerScale"]

ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU}


class LayerNorm(nn.Module):
    """Give each token mean 0 and variance 1 over its features, then scale and shift.

    (x - mean) / √(variance + eps) · weight + bias; the variance is the biased one
    (divided by E) and eps stands under the root.

    Args:
        embed_dim: E, width of the tokens.
        eps: small number that keeps the division finite.

    Source:
        Ba et al. 2016, "Layer Normalization", equation 4.
    """

    def __init__(self, embed_dim: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(embed_dim))
        self.bias = nn.Parameter(torch.zeros(embed_dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise with torch's fused kernel; `explain` shows what it computes.

        Args:
            x: (..., E).

        Returns:
            (..., E).
        """
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)

    def explain(self, x: Tensor) -> Tensor:
        """Do the same by the definition, for reading.

        Args:
            x: (..., E).

        Returns:
            (..., E).
        """
        mean = x.mean(dim=-1, keepdim=True)  # (..., 1)
        variance = (x - mean).square().mean(dim=-1, keepdim=True)  # (..., 1)
        normalised = (x - mean) / torch.sqrt(variance + self.eps)
        return normalised * self.weight + self.bias


class FeedForward(nn.Module):
    """Transform each token by itself: widen, bend, narrow.

    Args:
        embed_dim: E, width of the tokens.
        mlp_dim: width in between.
        activation: "relu" or "gelu".
        dropout: probability of dropping a feature in between while training.

    Raises:
        ValueError: an unknown activation.

    Source:
        Vaswani et al. 2017, equation 2 (ReLU); Hendrycks and Gimpel 2016 (GELU).
    """

    def __init__(
        self,
        embed_dim: int,
        mlp_dim: int,
        *,
        activation: str = "relu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"{activation=} must be one of {sorted(ACTIVATIONS)}")
        self.linear1 = nn.Linear(embed_dim, mlp_dim)
        self.activation = ACTIVATIONS[activation]()
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(mlp_dim, embed_dim)
        for linear in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the two layers to every token.

        Args:
            x: (..., E).

        Returns:
            (..., E).
        """
        return self.linear2(self.dropout(self.activation(self.linear1(x))))


class DropPath(nn.Dropout):
    """Drop a whole residual branch for some samples of the batch while training.

    What survives is divided by the probability of surviving, so that the mean stays.

    Args:
        p: probability of dropping the branch of a sample.
        inplace: without effect; it is `nn.Dropout`'s.

    Raises:
        ValueError: p is not in [0, 1].

    Source:
        Huang et al. 2016, "Deep Networks with Stochastic Depth".
    """

    def forward(self, input: Tensor) -> Tensor:
        """Drop samples while training; hand all through otherwise.

        Args:
            input: (B, ...).

        Returns:
            (B, ...).
        """
        if self.p == 0.0 or not self.training:
            return input
        keep = input.new_ones(input.size(0), *[1] * (input.dim() - 1))  # (B, 1, …, 1)
        return input * F.dropout(keep, self.p)


class LayerScale(nn.Module):
    """Multiply each feature by a learned factor that begins small.

    Args:
        embed_dim: E, width of the tokens.
        init: first value of every factor.

    Source:
        Touvron et al. 2021, "Going deeper with Image Transformers", equation 4.
    """

    def __init__(self, embed_dim: int, init: float = 1e-4) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((embed_dim,), float(init)))

    def forward(self, x: Tensor) -> Tensor:
        """Scale the features.

        Args:
            x: (..., E).

        Returns:
            (..., E).
        """
        return x * self.weight
