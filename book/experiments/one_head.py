"""What can one head not do, and what changes that?"""

import torch
import torch.nn.functional as F
from torch import nn

import minivit

ask = torch.zeros(1, 1, 16)
ask[..., 15] = 1  # (1, L, E) with L = 1: the query token
NOTHING = nn.Identity()


def batch(B, S=6):
    content = torch.randn(B, S, 4)
    order, rows = torch.rand(B, S).argsort(dim=1), torch.arange(B)
    chaser, chased = order[:, 0], order[:, 1]  # (B,) two different places
    x = torch.zeros(B, S, 16)  # (B, S, E)
    x[rows, chaser, 0] = x[rows, chased, 1] = 1
    x[:, :, 2:6] = content
    target = torch.cat([content[rows, chaser], content[rows, chased]], dim=1)
    return x, target  # (B, S, E), (B, 8)


class Added(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


def network():
    return Added(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))


def straight():  # as many parameters, but without the bend
    return Added(nn.Linear(16, 64), nn.Linear(64, 16))


def answer(x, layer, before, after):
    x = before(x)  # (B, S, E) each token by itself
    found = layer(ask.expand(len(x), 1, 16), x, x)  # (B, L, E)
    return after(found)[:, 0, :8]  # (B, 8)


def train(num_heads, seed, *, before=None, after=None, steps=400, B=128):
    torch.manual_seed(seed)
    layer = minivit.MultiHeadAttention(16, num_heads)
    before = before() if before else NOTHING
    after = after() if after else NOTHING
    model = nn.ModuleList([layer, before, after])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        x, target = batch(B)
        loss = F.mse_loss(answer(x, *model), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, torch.tensor(losses)


def error(layer, before=NOTHING, after=NOTHING, B=2000):
    torch.manual_seed(99)  # fresh examples, the same for every model
    x, target = batch(B)
    with torch.no_grad():
        output = answer(x, layer, before, after)
    return F.mse_loss(output, target).item()


def run(seed):
    """The error on fresh examples: heads, and a network before or after."""
    versions = {
        "one head": (1, {}),
        "two heads": (2, {}),
        "one head, network before": (1, {"before": network}),
        "one head, no bend before": (1, {"before": straight}),
        "one head, network after": (1, {"after": network}),
    }
    figures = {}
    for name, (num_heads, parts) in versions.items():
        model, _ = train(num_heads, seed, **parts)
        figures[name] = error(*model)
    return figures
