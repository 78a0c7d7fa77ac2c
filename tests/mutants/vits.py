"""Vision Transformers with one mistake each."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from . import mutant
from .modules import E, Layer

SIZE, P, K = 16, 4, 6
N = (SIZE // P) ** 2
sizes = {"image_size": SIZE, "num_classes": K}


class Vision(nn.Module):
    """A right small ViT, for mutants to break one step of."""

    tokens = N + 1

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(P * P * 3, E)
        self.cls = nn.Parameter(torch.zeros(1, 1, E))
        self.pos = nn.Parameter(torch.randn(1, self.tokens, E) * 0.1)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.norm, self.head = nn.LayerNorm(E), nn.Linear(E, K)

    def cut(self, images):
        x = images.unfold(2, P, P).unfold(3, P, P)
        return x.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)

    def embed(self, images):
        x = self.project(self.cut(images))
        return torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1) + self.pos

    def encode(self, x):
        for layer in self.layers:
            x = layer(x)
        return x

    def read(self, x):
        return self.head(self.norm(x)[:, 0])

    def forward(self, images):
        return self.read(self.encode(self.embed(images)))


@mutant("vit", "patches", "bare reshape", **sizes)
class PatchesByReshape(Vision):
    def cut(self, images):
        return images.reshape(len(images), N, -1)


@mutant("vit", "patches", "bare reshape", **sizes)
class PatchesByReshapeChannelsLast(Vision):
    def cut(self, images):
        return images.permute(0, 2, 3, 1).reshape(len(images), N, -1)


@mutant("vit", "patches", "", **sizes)
class RowsInsteadOfPatches(Vision):
    tokens = SIZE + 1

    def cut(self, images):
        return images.transpose(1, 2).flatten(2)  # one token a row of pixels


@mutant("vit", "positions", "missing", **sizes)
class WithoutPositions(Vision):
    def embed(self, images):
        x = self.project(self.cut(images))
        return torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1)


@mutant("vit", "positions", "[n]", **sizes)
class PositionsReadAtOnePlace(Vision):
    def embed(self, images):
        x = self.project(self.cut(images))
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1)
        return x + self.pos[:, x.size(1) - 1]


@mutant("vit", "gradients", "CLS joined after", **sizes)
class ClsAfterPositions(Vision):
    def embed(self, images):
        x = self.project(self.cut(images))
        x = x + self.pos[:, : x.size(1)]
        return torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1)


@mutant("vit", "logits", "CrossEntropyLoss", **sizes)
class SoftmaxAtTheEnd(Vision):
    def read(self, x):
        return super().read(x).softmax(-1)


@mutant("vit", "pixels", "batch_first", **sizes)
class BatchFirstForgotten(Vision):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.TransformerEncoderLayer(E, 4, 2 * E)])


@mutant("vit", "norm", "after the pooling", norm_before_pool=True, **sizes)
class NormAfterPooling(Vision):
    def read(self, x):
        return self.head(self.norm(x.mean(dim=1)))


class PlainAttention(Vision):
    """A right ViT whose attention is written out, for mutants to break one step of."""

    def mix(self, q, k, v):
        return ((q @ k.mT / math.sqrt(q.size(-1))).softmax(-1) @ v).transpose(1, 2)

    def encode(self, x):
        for layer in self.layers:
            y = layer.norm1(x)
            weight, bias = layer.attention.in_proj_weight, layer.attention.in_proj_bias
            qkv = F.linear(y, weight, bias).unflatten(-1, (3, 4, -1))
            mixed = self.mix(*qkv.permute(2, 0, 3, 1, 4)).reshape(x.shape)
            x = x + layer.attention.out_proj(mixed)
            x = x + layer.think(layer.norm2(x))
        return x


@mutant("vit", "scale", "root of 24", **sizes)
class ScaledByModelWidth(PlainAttention):
    def mix(self, q, k, v):
        return ((q @ k.mT / math.sqrt(E)).softmax(-1) @ v).transpose(1, 2)


@mutant("vit", "softmax", "another axis", **sizes)
class SoftmaxOverQueries(PlainAttention):
    def mix(self, q, k, v):
        return ((q @ k.mT / math.sqrt(q.size(-1))).softmax(-2) @ v).transpose(1, 2)


@mutant("vit", "scale", "after the softmax", **sizes)
class ScaledAfterSoftmax(PlainAttention):
    def mix(self, q, k, v):
        weights = (q @ k.mT).softmax(-1) / math.sqrt(q.size(-1))
        return (weights @ v).transpose(1, 2)


@mutant("vit", "order", "a reshape mixes", **sizes)
class MergedWithoutTranspose(PlainAttention):
    def mix(self, q, k, v):
        return (q @ k.mT / math.sqrt(q.size(-1))).softmax(-1) @ v


@mutant("vit", "pixels", "left out", **sizes)
class LastPatchesLeftOut(Vision):
    def embed(self, images):
        return super().embed(images)[:, : N // 2]


@mutant("vit", "gradients", "never used", **sizes)
class LastLayerSkipped(Vision):
    def encode(self, x):
        return self.layers[0](x)


@mutant("vit", "pixels", "", **sizes)
class ReadsWithoutAttention(Vision):
    def encode(self, x):
        for layer in self.layers:
            x = x + layer.think(layer.norm2(x))
        return x


@mutant("vit", "repeatable", "dropout", **sizes)
class DropoutInEval(Vision):
    def encode(self, x):
        return nn.functional.dropout(super().encode(x), 0.2)


@mutant("vit", "overfit|gradients", "", **sizes)
class FeaturesDetached(Vision):
    def encode(self, x):
        return super().encode(x).detach()


@mutant("vit", "first loss", "too large", **sizes)
class LogitsTooLarge(Vision):
    def read(self, x):
        return 30 * super().read(x)


@mutant("vit", "shape", "expected", **sizes)
class HeadOfTheFirstSample(Vision):
    def read(self, x):
        return self.head(self.norm(x)[0])


@mutant("vit", "repeatable", "state", **sizes)
class RunningMean(Vision):
    def encode(self, x):
        x = super().encode(x)
        previous = getattr(self, "mean", torch.zeros(E))
        self.mean = x.detach().mean(dim=(0, 1))
        return x - previous


@mutant("vit", "read", "class token", **sizes)
class ReadsTheLastPatch(Vision):
    def read(self, x):
        return self.head(self.norm(x)[:, -1])


@mutant("vit", "residual", "no residual", **sizes)
class WithoutResiduals(Vision):
    def encode(self, x):
        for layer in self.layers:
            x = layer.think(layer.norm2(layer.attend(layer.norm1(x), None)))
        return x


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Layer()

    def forward(self, x):
        layer = self.inner
        return layer.think(layer.norm2(layer.attend(layer.norm1(x), None)))


@mutant("vit", "residual", "no residual", **sizes)
class WithoutResidualsInside(Vision):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Blocks(), Blocks()])


@mutant("vit", "registered", "nn.ModuleList|no optimiser", **sizes)
class LayersInAList(Vision):
    def __init__(self):
        super().__init__()
        layers = list(self.layers)
        del self.layers
        self.layers = layers


@mutant("vit", "layers", "same object", **sizes)
class OneLayerTwice(Vision):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Layer()] * 2)


@mutant("vit", "logits", "sigmoid", **sizes)
class SigmoidAtTheEnd(Vision):
    def read(self, x):
        return super().read(x).sigmoid()


@mutant("vit", "overfit", "by heart", **sizes)
class LogitsTooSmallToLearn(Vision):
    def read(self, x):
        return super().read(x) / 10_000


@mutant("vit", "batch", "x.size\\(0\\)", **sizes)
class PositionsOverTheBatch(Vision):
    def embed(self, images):
        x = self.project(self.cut(images))
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1)
        return x + self.pos[0, : len(x), None]


class NoActivation(Layer):
    def think(self, x):
        return self.linear2(self.linear1(x))


@mutant("vit", "activation", "no activation", **sizes)
class WithoutActivation(Vision):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([NoActivation(), NoActivation()])


@mutant("vit", "pixels", "", **sizes)
class OnlyRed(Vision):
    def cut(self, images):
        return super().cut(images[:, :1].expand_as(images))
