"""The small layers; parity of LayerNorm with torch's is in test_parity.py."""

import pytest
import torch
import torch.nn.functional as F

from minivit import DropPath, FeedForward, LayerNorm, LayerScale


@pytest.mark.parametrize("method", ["forward", "explain"])
def test_layer_norm_gives_mean_zero_and_variance_one(method):
    x = 5 + 3 * torch.randn(4, 6, 32)
    y = getattr(LayerNorm(32), method)(x)
    torch.testing.assert_close(y.mean(-1), torch.zeros(4, 6), atol=1e-5, rtol=0)
    variance = y.var(-1, correction=0)  # the biased one
    torch.testing.assert_close(variance, torch.ones(4, 6), atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", ["forward", "explain"])
def test_layer_norm_of_equal_features_is_finite(method):
    x = torch.full((2, 8), 3.0, requires_grad=True)
    y = getattr(LayerNorm(8, eps=1e-6), method)(x)
    assert (y == 0).all()
    y.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_feed_forward_is_two_linear_maps_around_a_bend(activation):
    module, x = FeedForward(4, 9, activation=activation), torch.randn(2, 3, 4)
    bend = {"relu": F.relu, "gelu": F.gelu}[activation]
    first, second = module.linear1, module.linear2
    expected = bend(x @ first.weight.T + first.bias) @ second.weight.T + second.bias
    torch.testing.assert_close(module(x), expected)
    assert first.weight.shape == (9, 4)
    # Exact GELU, not the approximation by tanh.
    if activation == "gelu":
        value = module.activation(torch.tensor(1.0, dtype=torch.float64)).item()
        assert value == pytest.approx(0.841344746068543, abs=1e-12)


def test_feed_forward_treats_each_token_by_itself():
    module, x = FeedForward(4, 9), torch.randn(2, 3, 4)
    torch.testing.assert_close(module(x)[1, 2], module(x[1, 2]))


def test_feed_forward_drops_in_between():
    module = FeedForward(4, 1000, dropout=0.25)
    seen = []
    module.linear2.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    torch.nn.init.ones_(module.linear1.bias)
    module(torch.zeros(1, 4))
    share = (seen[0] == 0).float().mean().item()
    assert share == pytest.approx(0.25, abs=0.06)
    assert seen[0].max().item() == pytest.approx(1 / 0.75)


@pytest.mark.parametrize("p", [0.2, 0.7])
def test_drop_path_drops_whole_samples_and_keeps_the_mean(p):
    x = torch.randn(4000, 3, 2)
    y = DropPath(p)(x)
    dropped = (y == 0).flatten(1).all(1)
    assert dropped.float().mean().item() == pytest.approx(p, abs=0.04)
    torch.testing.assert_close(y[~dropped], x[~dropped] / (1 - p))
    ones = DropPath(p)(torch.ones(4000, 1))
    assert ones.mean().item() == pytest.approx(1.0, abs=0.12)


def test_drop_path_does_nothing_in_eval_or_at_zero():
    x = torch.randn(50, 3)
    assert DropPath(0.5).eval()(x) is x
    assert DropPath(0.0)(x) is x


def test_drop_path_keeps_half_precision():
    assert DropPath(0.5)(torch.ones(3, 2, dtype=torch.float16)).dtype == torch.float16


def test_layer_scale_equals_timm():
    from timm.layers import LayerScale as Theirs

    ours, theirs = LayerScale(6, 0.1), Theirs(6, init_values=0.1)
    x = torch.randn(2, 3, 6)
    torch.testing.assert_close(ours(x), theirs(x))
    ours(x).sum().backward()
    theirs(x).sum().backward()
    torch.testing.assert_close(ours.weight.grad, theirs.gamma.grad)
