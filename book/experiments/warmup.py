"""Where the norm stands, and warm-up: who trains at which rate?"""

import torch
import torch.nn.functional as F
from torch import nn

from minivit import Encoder, LearnedPositions
from minivit.data import load_digits, split

RATES = (1e-3, 2e-3, 4e-3, 8e-3)
VERSIONS = {  # pre-norm? how many steps of warm-up?
    "pre-norm": (True, 0),
    "pre-norm, warm-up": (True, 50),
    "post-norm": (False, 0),
    "post-norm, warm-up": (False, 50),
}


class RowReader(nn.Module):
    """Digits as sequences of eight rows with eight pixels each."""

    def __init__(self, norm_first):
        super().__init__()
        width = 32  # E
        self.embed = nn.Linear(8, width)
        self.positions = LearnedPositions(8, width)
        self.encoder = Encoder(width, 8, 4, 2 * width, norm_first=norm_first)
        self.head = nn.Linear(width, 10)

    def forward(self, rows):  # (B, L, 8)
        x = self.positions(self.embed(rows))  # (B, L, E)
        return self.head(self.encoder(x).mean(dim=1))  # (B, K)


def train(norm_first, warmup, lr, seed, steps=100):
    learn, held_out = split(*load_digits(), seed=seed)
    rows, labels = learn[0].squeeze(1), learn[1]  # (B, L, 8), (B,)
    torch.manual_seed(seed)
    model = RowReader(norm_first)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / max(warmup, 1))
        batch = torch.randint(len(rows), (64,))  # (B,)
        loss = F.cross_entropy(model(rows[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        guess = model(held_out[0].squeeze(1)).argmax(dim=-1)  # (B,)
    return losses, (guess == held_out[1]).float().mean().item()


def run(seed):
    """The share of held-out digits that is read correctly."""
    figures = {}
    for name, (norm_first, warmup) in VERSIONS.items():
        for lr in RATES:
            _, right = train(norm_first, warmup, lr, seed)
            figures[f"{name}, {lr:g}"] = right
    return figures
