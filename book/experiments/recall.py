"""Which network can fetch a token from far away, soon or in the end?"""

import torch
import torch.nn.functional as F
from torch import nn

from minivit import Encoder

V, n = 8, 16


def recall_batch(size, generator):
    """Random tokens and a question; the answer; the distance."""
    tokens = torch.randint(V, (size, n), generator=generator)  # (B, n)
    d = torch.randint(1, n + 1, (size,), generator=generator)  # (B,)
    answer = tokens.gather(1, (n - d)[:, None])[:, 0]  # (B,)
    question = (V + d - 1)[:, None]  # (B, 1), ids 8, 9, …: one for each d
    return torch.cat([tokens, question], dim=1), answer, d  # (B, n + 1)


class Recurrent(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gru = nn.GRU(width, width, batch_first=True)

    def forward(self, x):
        return self.gru(x)[0]  # (B, L, E)


class Convolutional(nn.Module):
    def __init__(self, width, dilations=(1, 1, 1)):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Conv1d(width, width, 3, dilation=step) for step in dilations
        )

    def forward(self, x):
        x = x.transpose(1, 2)  # (B, E, L)
        for conv in self.layers:
            past = F.pad(x, (2 * conv.dilation[0], 0))
            x = x + conv(past).relu()
        return x.transpose(1, 2)  # (B, L, E)


class Attentive(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.positions = nn.Parameter(0.3 * torch.randn(n + 1, width))
        self.encoder = Encoder(width, 1, 4, width)

    def forward(self, x):
        return self.encoder(x + self.positions)  # (B, L, E)


def recall_model(width, body):
    embed, mixer = nn.Embedding(V + n, width), body(width)
    return nn.Sequential(embed, mixer, nn.Linear(width, V))


MAKERS = {
    "GRU": lambda: recall_model(48, Recurrent),
    "CNN": lambda: recall_model(40, Convolutional),
    "Transformer": lambda: recall_model(48, Attentive),
}


def train_recall(make, seed, updates=250, lr=5e-3):
    """Train one model; return its accuracy at each distance, (n,)."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    one_cycle = torch.optim.lr_scheduler.OneCycleLR
    schedule = one_cycle(optimizer, lr, total_steps=updates)
    for _ in range(updates):
        x, answer, _ = recall_batch(128, generator)
        loss = F.cross_entropy(model(x)[:, -1], answer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    x, answer, d = recall_batch(4_000, torch.Generator().manual_seed(99))
    with torch.no_grad():
        right = (model(x)[:, -1].argmax(dim=-1) == answer).float()  # (B,)
    return torch.stack([right[d == i].mean() for i in range(1, n + 1)])


UPDATES = {"GRU": (250, 8000), "CNN": (250, 2000), "Transformer": (250,)}


def run(seed, updates=UPDATES):
    """Accuracy in per cent at each distance, up to 6 and from 8 on."""
    figures = {}
    for name, numbers in updates.items():
        for number in numbers:
            found = 100 * train_recall(MAKERS[name], seed, number)
            key = f"{name}, {number} updates"
            figures[f"{key}: near"] = found[:6].mean().item()
            figures[f"{key}: far"] = found[7:].mean().item()
            for d, value in enumerate(found.tolist(), 1):
                figures[f"{key}, d = {d}"] = value
    return figures
