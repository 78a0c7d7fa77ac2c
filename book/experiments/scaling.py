"""Does attention learn a lookup without dividing the scores by √D?"""

import math

import torch
import torch.nn.functional as F

from minivit.attention import attention


def learn(seed, width=16, scaled=True, lr=1e-2, steps=300, B=64):
    torch.manual_seed(seed)
    codes, partner = torch.randn(8, width), torch.randperm(8)
    W_q = torch.nn.Linear(width, width, bias=False)
    W_k = torch.nn.Linear(width, width, bias=False)
    projections = [*W_q.parameters(), *W_k.parameters()]
    optimizer = torch.optim.Adam(projections, lr=lr)

    def weights():  # rows: code asked for; columns: the partner of 0, 1, ...
        with torch.no_grad():
            q, k = W_q(codes), W_k(codes[partner])
            return attention(q, k, k)[1]  # (8, 8)

    maps, losses = [weights()], []
    for _ in range(steps):
        shown = torch.rand(B, 8).argsort(dim=1)  # (B, S) codes in any order
        asked = torch.randint(8, (B, 1))  # (B, L) with L = 1
        value = torch.randn(B, 8, 4)  # (B, S, Dv)
        q, k = W_q(codes[asked]), W_k(codes[shown])  # (B, L, D), (B, S, D)
        q = q if scaled else q * math.sqrt(width)  # undoes the division
        output, _ = attention(q, k, value)
        where = (shown == partner[asked]).int().argmax(dim=1)  # (B,)
        target = value[torch.arange(B), where].unsqueeze(1)  # (B, 1, Dv)
        loss = F.mse_loss(output, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, [*maps, weights()]


def run(seed):
    """The error over the last twenty steps, with and without the division.

    At the learning rate of 0.01, and (slow) at 0.001.
    """
    figures = {}
    for width in (16, 64, 256):
        for name, scaled in (("divided", True), ("not divided", False)):
            losses, _ = learn(seed, width, scaled)
            figures[f"{name}, D = {width}"] = sum(losses[-20:]) / 20
            losses, _ = learn(seed, width, scaled, lr=1e-3)
            figures[f"{name}, D = {width}, slow"] = sum(losses[-20:]) / 20
    return figures
