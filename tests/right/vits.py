"""Vision Transformers."""

import timm
import torch
import torch.nn.functional as F
from torch import nn
from vit_pytorch.parallel_vit import ViT as ParallelViT
from vit_pytorch.simple_flash_attn_vit import SimpleViT as FlashViT
from vit_pytorch.simple_vit_with_patch_dropout import SimpleViT as DropViT

from minivit import sinusoidal_positions_2d

from . import STYLES, right
from .attentions import E, H
from .layers import Parts, ReZero, RootMeanSquare, RotaryLayer

K = 5
square = {"image_size": 16, "num_classes": K}


class Small(nn.Module):
    """A ViT of parts: convolution, CLS token, learned positions."""

    layer, extra, channels, size, patch = RootMeanSquare, 1, 3, (16, 16), (4, 4)
    classes, depth = K, 2

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(self.channels, E, self.patch, self.patch)
        self.n = (self.size[0] // self.patch[0]) * (self.size[1] // self.patch[1])
        if self.extra:
            self.cls = nn.Parameter(torch.zeros(1, self.extra, E))
        self.positions = nn.Parameter(torch.randn(1, self.n + self.extra, E) * 0.02)
        self.blocks = nn.Sequential(*[self.layer() for _ in range(self.depth)])
        self.norm, self.head = nn.LayerNorm(E), nn.Linear(E, self.classes)

    def cut(self, x):
        return self.embed(x).flatten(2).transpose(1, 2)

    def place(self, x):
        return x + self.positions

    def pool(self, x):
        return x[:, 0] if self.extra else x.mean(1)

    def forward(self, x):
        x = self.cut(x)
        if self.extra:
            x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1)
        return self.head(self.pool(self.norm(self.blocks(self.place(x)))))


right("vit", **square)(Small)


@right("vit", image_size=(8, 24), num_classes=K, in_channels=1)
class WideGrey(Small):
    channels, size = 1, (8, 24)


@right("vit", image_size=(16, 16), num_classes=K, in_channels=1, patch_size=(8, 2))
class TallPatches(Small):
    """As for spectrograms."""

    channels, patch = 1, (8, 2)


@right("vit", image_size=16, num_classes=1)
class OneClass(Small):
    classes, depth = 1, 1


@right("vit", **square)
class OnePatch(Small):
    patch = (16, 16)


@right("vit", **square)
class MeanPooled(Small):
    extra = 0


@right("vit", **square)
class OnePatchOnly(Small):
    patch, extra = (16, 16), 0


@right("vit", **square)
class BeginsAtZero(Small):
    """Branches and head begin at zero."""

    layer = ReZero

    def __init__(self):
        super().__init__()
        nn.init.zeros_(self.head.weight)


@right("vit", **square)
class RotaryOnly(Small):
    layer = RotaryLayer

    def __init__(self):
        super().__init__()
        del self.positions

    def place(self, x):
        return x


@right("vit", **square)
class RotaryAndTable(Small):
    layer = RotaryLayer


@right("vit", **square)
class BiasTable(Small):
    """Relative positions: a learned number a head and distance, and a table."""

    class layer(RootMeanSquare):
        def __init__(self):
            super().__init__()
            self.rel_pos = nn.Parameter(torch.zeros(2 * 17 - 1, H))

        def forward(self, x):
            q, k, v = (t.transpose(1, 2) for t in self.attn.heads(self.norm1(x)))
            i = torch.arange(x.size(1))
            bias = self.rel_pos[i[:, None] - i + 16].permute(2, 0, 1)
            w = (q @ k.mT * q.size(-1) ** -0.5 + bias).softmax(-1)
            x = x + self.attn.proj((w @ v).transpose(1, 2).flatten(2))
            return x + self.ff(self.norm2(x))


@right("vit", **square)
class FixedPlaces(Small):
    """Sinusoids in two directions, in a buffer; patches (c p1 p2) and a linear map."""

    extra = 0

    def __init__(self):
        super().__init__()
        del self.positions
        self.embed = nn.Sequential(nn.LayerNorm(48), nn.Linear(48, E), nn.LayerNorm(E))
        self.register_buffer("places", sinusoidal_positions_2d(4, 4, E))

    def cut(self, x):
        x = x.unflatten(2, (4, 4)).unflatten(4, (4, 4))  # b c h p1 w p2
        return self.embed(x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2))

    def place(self, x):
        return x + self.places


@right("vit", **square)
class ByUnfold(FixedPlaces):
    def cut(self, x):
        return self.embed(F.unfold(x, 4, stride=4).mT)


@right("vit", **square)
class OverlappingStem(Small):
    """Convolutions of three pixels, two apart, instead of patches."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Sequential(
            nn.Conv2d(3, 12, 3, 2, 1),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Conv2d(12, E, 3, 2, 1),
        )


@right("vit", **square)
class ColoursMixedFirst(Small):
    """A convolution of one pixel before the patches."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, E, 4, 4))


@right("vit", **square)
class PlacesJoined(Small):
    """Positions beside the features instead of on top."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, E - 8, 4, 4)
        self.cls = nn.Parameter(torch.zeros(1, 1, E - 8))
        self.positions = nn.Parameter(torch.randn(1, 17, 8))

    def place(self, x):
        return torch.cat([x, self.positions.expand(len(x), -1, -1)], dim=-1)


@right("vit", **square)
class LongTable(Small):
    """A table for up to 100 tokens."""

    def __init__(self):
        super().__init__()
        self.positions = nn.Parameter(torch.randn(1, 100, E) * 0.02)

    def place(self, x):
        return x + self.positions[:, : x.size(1)]


@right("vit", **square)
class SequencePooled(Small):
    """Tokens weighed by a softmax over a learned number each."""

    extra = 0

    def __init__(self):
        super().__init__()
        self.score = nn.Linear(E, 1)

    def pool(self, x):
        return (self.score(x).softmax(dim=1) * x).sum(1)


@right("vit", **square)
class AttentionPooled(Small):
    extra = 0

    def __init__(self):
        super().__init__()
        self.probe = nn.Parameter(torch.randn(1, 1, E))
        self.attend = nn.MultiheadAttention(E, 3, batch_first=True)

    def pool(self, x):
        return self.attend(self.probe.expand(len(x), -1, -1), x, x)[0][:, 0]


@right("vit", **square)
class Distilled(Small):
    """Two tokens and two heads; both outputs while training, their mean after."""

    extra = 2

    def __init__(self):
        super().__init__()
        self.other = nn.Linear(E, K)

    def forward(self, x):
        x = torch.cat([self.cls.expand(len(x), -1, -1), self.cut(x)], dim=1)
        x = self.norm(self.blocks(self.place(x)))
        a, b = self.head(x[:, 0]), self.other(x[:, 1])
        return (a, b) if self.training else (a + b) / 2


@right("vit", **square)
class LastTokenIsCls(Small):
    def forward(self, x):
        x = self.cut(x)
        x = torch.cat([x, self.cls.expand(len(x), -1, -1)], dim=1)
        return {"logits": self.head(self.norm(self.blocks(self.place(x)))[:, -1])}


@right("vit", **square)
class Wrapped(nn.Module):
    """A model inside a module, images brought into range first, a list out."""

    def __init__(self):
        super().__init__()
        self.module = Small()
        self.register_buffer("mean", torch.full((1, 3, 1, 1), 0.5))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, E))  # of the pre-training

    def forward(self, x):
        return [self.module((x - self.mean) / 0.25)]


@right("vit", **square)
class ResidualOutside(Small):
    """Attentions and feed-forwards in two lists; forward adds the residuals."""

    def __init__(self):
        super().__init__()
        parts = [Parts() for _ in range(2)]
        del self.blocks
        self.attns = nn.ModuleList([p.attn for p in parts])
        self.ffs = nn.ModuleList([p.ff for p in parts])
        self.norms = nn.ModuleList([nn.LayerNorm(E) for _ in range(4)])

    def blocks(self, x):
        for i, (attend, think) in enumerate(zip(self.attns, self.ffs, strict=True)):
            x = x + attend(self.norms[2 * i](x))
            x = x + think(self.norms[2 * i + 1](x))
        return x


def timms(name, **options):
    options = {"img_size": 32, "patch_size": 8, "num_classes": K, "depth": 2} | options
    return lambda: timm.create_model(name, **options)


def lucid(cls, **options):
    sizes = {"dim": 48, "depth": 2, "heads": 3, "mlp_dim": 96, "num_classes": K}
    return lambda: cls(image_size=32, patch_size=8, **sizes, **options)


for make in (
    timms("vit_small_patch16_224", class_token=False, global_pool="map"),
    timms("deit3_small_patch16_224"),
    timms("deit_tiny_distilled_patch16_224"),
    timms("eva02_tiny_patch14_224"),
    timms("beit_base_patch16_224", depth=1),
    timms("vit_base_patch16_clip_224", depth=1),
    timms("vit_tiny_patch16_224", fc_norm=True, drop_path_rate=0.2, proj_drop_rate=0.1),
    timms("vit_small_patch16_rope_224"),
    timms("vit_base_patch16_siglip_224", depth=1, fix_init=True),
    lucid(FlashViT),
    lucid(DropViT),
    lucid(ParallelViT, num_parallel_branches=2),
):
    STYLES.append(("vit", make, {"image_size": 32, "num_classes": K}))
