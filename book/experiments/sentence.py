"""What does "it" mean? Two lookups, one after the other, and what else."""

import torch
import torch.nn.functional as F
from torch import nn

from minivit import FeedForward, MultiHeadAttention

KINDS = {  # things of one kind, and what is said of no other kind
    "animal dog horse child": "tired hungry afraid asleep",
    "street river bridge road": "wide long busy narrow",
    "bag box trunk case": "heavy full bulky locked",
    "soup milk bread cheese": "hot salty sour stale",
    "coat shirt hat dress": "tight loose torn shabby",
    "song play film book": "dull sad short gloomy",
}
COLOURS = ["brown", "grey", "white", "black"]
LINE = "the THING did not cross the THING because it was too ENDING"
LINE = LINE.split()
THINGS, ENDINGS = " ".join(KINDS).split(), " ".join(KINDS.values()).split()
WORDS = sorted(set(LINE)) + THINGS + ENDINGS
FIRST, SECOND, IT, END = 1, 6, 8, 11  # places in the line
CUT = torch.arange(len(LINE))[None] != END  # (L, S), L = 1: a mask


def sentences(B, new=False):
    """Words (B, S), colours (B, S) with 0 for none, the colour of "it" (B,).

    A new sentence says of a thing what was said of no such thing before:
    thing and ending have one number in their kinds, else two.
    """
    rows = torch.arange(B)
    kinds = torch.rand(B, len(KINDS)).argsort(dim=1)[:, :2]  # (B, 2)
    number = torch.randint(4, (B, 2))  # which things of these kinds
    meant = torch.randint(2, (B,))  # the first thing or the second
    apart = 0 if new else torch.randint(1, 4, (B,))
    ending = 4 * kinds[rows, meant] + (number[rows, meant] + apart) % 4
    paint = torch.rand(B, len(COLOURS)).argsort(dim=1)[:, :2]  # (B, 2)

    words = torch.tensor([WORDS.index(word) for word in LINE]).repeat(B, 1)
    words[:, [FIRST, SECOND]] = WORDS.index(THINGS[0]) + 4 * kinds + number
    words[:, END] = WORDS.index(ENDINGS[0]) + ending
    colours = torch.zeros_like(words)
    colours[:, [FIRST, SECOND]] = 1 + paint
    return words, colours, paint[rows, meant]


class Reader(nn.Module):
    """Nothing but attention, in which "it" asks and all words answer."""

    def __init__(self, num_layers, num_heads, network=False):
        super().__init__()
        width = 32  # E
        self.words = nn.Embedding(len(WORDS), width)
        self.colours = nn.Embedding(1 + len(COLOURS), width)
        self.layers = nn.ModuleList(
            MultiHeadAttention(width, num_heads) for _ in range(num_layers)
        )
        self.network = nn.Identity()
        if network:
            self.network = FeedForward(width, 4 * width)
        self.answer = nn.Linear(width, len(COLOURS))

    def forward(self, words, colours, masks=(None, None)):
        x = self.words(words) + self.colours(colours)  # (B, S, E)
        it = x[:, [IT]]  # (B, 1, E)
        for layer, mask in zip(self.layers, masks):
            it = it + layer(it, x, x, mask=mask)  # (B, 1, E)
        return self.answer(self.network(it))[:, 0]  # (B, K)


def read(seed, num_layers, num_heads, masks=(None, None), **options):
    torch.manual_seed(seed)
    model = Reader(num_layers, num_heads, **options)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, fused=True)
    examples = [part.split(128) for part in sentences(900 * 128)]
    for words, colours, answer in zip(*examples):
        loss = F.cross_entropy(model(words, colours, masks), answer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@torch.no_grad()
def share_right(model, masks=(None, None), B=2000):
    torch.manual_seed(99)  # the same new sentences for every model
    words, colours, answer = sentences(B, new=True)
    guess = model(words, colours, masks).argmax(dim=-1)  # (B,)
    return (guess == answer).float().mean().item()


def run(seed):
    """The share of new sentences where the colour of "it" is found."""
    routed, free = read(seed, 2, 4, (None, CUT)), read(seed, 2, 4)
    return {
        "one layer, one head": share_right(read(seed, 1, 1)),
        "one layer": share_right(read(seed, 1, 4)),
        "one layer, network": share_right(read(seed, 1, 4, network=True)),
        "routed": share_right(routed, (None, CUT)),
        "routed, cut in 1": share_right(routed, (CUT, CUT)),
        "free": share_right(free),
        "free, cut in 1": share_right(free, (CUT, None)),
        "free, cut in 2": share_right(free, (None, CUT)),
    }
