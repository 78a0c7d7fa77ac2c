"""Training: repeatable, honest about its figures, and it learns."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minivit import LearnedPositions, ViT, evaluate, fit
from minivit.train import parameter_groups, warmup_cosine


def blobs(number=240, classes=3, seed=0):
    """Three clouds of points that a straight line tells apart."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(number) % classes
    centres = 3 * torch.eye(classes, 4)
    return centres[labels] + torch.randn(number, 4, generator=generator), labels


def network(dropout=0.2, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(4, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 3)
    )


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


SETTINGS = {"epochs": 3, "batch_size": 32, "lr": 0.01, "progress": False}


# --- repeatability ------------------------------------------------------------------


def test_the_same_seed_gives_the_same_weights():
    results = []
    for noise in (1, 2):
        model = network()
        torch.manual_seed(noise)  # what was drawn before must not matter
        history = fit(model, blobs(), val=blobs(seed=1), **SETTINGS)
        results.append((weights(model), history))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    other = network()
    fit(other, blobs(), seed=1, **SETTINGS)
    assert not torch.equal(weights(other), results[0][0])


def test_the_random_state_outside_is_left_alone():
    model = network()
    before = torch.get_rng_state()
    fit(model, blobs(), **SETTINGS)
    assert torch.equal(torch.get_rng_state(), before)
    evaluate(model, blobs())
    assert torch.equal(torch.get_rng_state(), before)


def test_every_sample_is_seen_once_an_epoch_in_another_order():
    seen = []

    def watch(x, y):
        seen.append(x[:, 0].int().tolist())
        return x, y

    x = torch.arange(10.0)[:, None].expand(10, 4)
    fit(nn.Linear(4, 3), (x, torch.zeros(10).long()), epochs=2, batch_size=4,
        progress=False, transform=watch)  # fmt: skip
    assert [len(batch) for batch in seen] == [4, 4, 2] * 2
    epochs = [[i for batch in part for i in batch] for part in (seen[:3], seen[3:])]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 2
    assert epochs[0] != epochs[1]
    assert epochs[0] != list(range(10))


# --- learning -----------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_fit_learns_what_can_be_learnt(seed):
    model = network(seed=seed)
    history = fit(
        model, blobs(), val=blobs(seed=9), epochs=15, lr=0.02, seed=seed, progress=False
    )
    assert history["val_accuracy"][-1] > 0.93
    assert history["train_loss"][-1] < 0.5 * history["train_loss"][0]


def test_fit_trains_a_vit():
    """Where the bright patch stands is the class: positions are needed."""
    torch.manual_seed(0)
    labels = torch.arange(160) % 4
    images = 0.1 * torch.randn(160, 1, 4, 4)
    for image, label in zip(images, labels, strict=True):
        row, column = divmod(int(label), 2)
        image[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] += 1.0
    model = ViT(
        image_size=4,
        patch_size=2,
        in_channels=1,
        num_classes=4,
        embed_dim=16,
        num_layers=1,
        num_heads=2,
        mlp_dim=32,
    )
    fit(model, (images, labels), epochs=12, batch_size=16, lr=5e-3, progress=False)
    assert evaluate(model, (images, labels))["accuracy"] > 0.95


def test_history_has_an_entry_an_epoch():
    history = fit(network(), blobs(), val=blobs(seed=1), **SETTINGS)
    assert set(history) == {
        "epoch",
        "lr",
        "train_loss",
        "train_accuracy",
        "val_loss",
        "val_accuracy",
    }
    assert {len(values) for values in history.values()} == {3}
    assert history["epoch"] == [1, 2, 3]
    assert history["lr"][-1] == 0.0
    assert "val_loss" not in fit(network(), blobs(), **SETTINGS)


def test_figures_of_training_are_means_over_the_samples():
    """With a learning rate of zero the model stands still, and both must agree."""
    model, data = network(dropout=0.0), blobs(100)
    before = weights(model)
    history = fit(model, data, epochs=1, batch_size=32, lr=0.0, progress=False)
    torch.testing.assert_close(weights(model), before)
    result = evaluate(model, data)
    assert history["train_loss"][0] == pytest.approx(result["loss"], rel=1e-5)
    assert history["train_accuracy"][0] == pytest.approx(result["accuracy"])


def test_fit_equals_the_plain_loop():
    model, data = network(dropout=0.0), blobs(64)
    fit(model, data, epochs=3, batch_size=64, lr=0.01, weight_decay=0.1,
        warmup_ratio=0.0, clip_grad=0.5, label_smoothing=0.1,
        progress=False)  # fmt: skip
    plain = network(dropout=0.0)
    matrices = [plain[0].weight, plain[3].weight]
    others = [plain[0].bias, plain[3].bias]
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": others, "weight_decay": 0.0}],
        lr=0.01,
        weight_decay=0.1,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=3)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(plain(data[0]), data[1], label_smoothing=0.1).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        schedule.step()
    torch.testing.assert_close(weights(model), weights(plain), atol=1e-6, rtol=1e-5)


def test_clipping_can_be_left_out():
    results = []
    for clip_grad in (0.0, 1e-3, 1e9):
        model = network(dropout=0.0)
        # One large sample: Adam forgets the scale, but not that of the first step.
        x, y = blobs(64)
        x = torch.cat([100 * x[:32], x[32:]])
        fit(model, (x, y), clip_grad=clip_grad, **SETTINGS)
        results.append(weights(model))
    assert torch.equal(results[0], results[2])
    assert not torch.allclose(results[0], results[1], atol=1e-4)


# --- schedule and weight decay ------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "warmup"), [(50, 0.1), (40, 0.25), (10, 0.2), (7, 0.5)]
)
def test_schedule_equals_torchs(steps, warmup):
    from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

    rising = round(steps * warmup)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    up = LinearLR(optimizer, start_factor=1 / rising, total_iters=rising - 1)
    down = CosineAnnealingLR(optimizer, T_max=steps - rising)
    theirs = SequentialLR(optimizer, [up, down], milestones=[rising])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SequentialLR passes a deprecated argument
        for step in range(steps + 1):
            expected = theirs.get_last_lr()[0]
            assert warmup_cosine(step, steps, warmup) == pytest.approx(expected)
            optimizer.step()
            theirs.step()


def test_schedule_without_warm_up():
    assert warmup_cosine(0, 10, 0.0) == 1.0
    assert warmup_cosine(5, 10, 0.0) == pytest.approx(0.5)
    assert warmup_cosine(10, 10, 0.0) == pytest.approx(0.0)


def test_fit_follows_the_schedule():
    history = fit(network(), blobs(64), epochs=10, batch_size=32, lr=0.3,
                  warmup_ratio=0.2, progress=False)  # fmt: skip
    expected = [0.3 * warmup_cosine(2 * epoch, 20, 0.2) for epoch in range(1, 11)]
    assert history["lr"] == pytest.approx(expected)
    assert history["lr"][1] == pytest.approx(0.3)


def test_weight_decay_spares_positions_and_reaches_convolutions():
    table, conv = LearnedPositions(5, 8), nn.Conv2d(1, 4, 3)
    decayed, free = parameter_groups(nn.ModuleList([table, conv]), 0.3)
    assert [p is conv.weight for p in decayed["params"]] == [True]
    assert {id(p) for p in free["params"]} == {id(table.table), id(conv.bias)}


def test_weight_decay_on_matrices_only():
    model = ViT(
        image_size=4,
        patch_size=2,
        num_classes=3,
        embed_dim=8,
        num_layers=1,
        num_heads=2,
        mlp_dim=8,
    )
    decayed, free = parameter_groups(model, 0.3)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.3, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed = {names[id(p)] for p in decayed["params"]}
    free = {names[id(p)] for p in free["params"]}
    assert decayed.isdisjoint(free)
    assert decayed | free == set(names.values())
    for name in names.values():
        plain = (
            name.endswith("bias") or "norm" in name or "cls" in name or "pos" in name
        )
        assert (name in free) == plain, name


def test_frozen_parameters_stay():
    model = network()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    fit(model, blobs(), **SETTINGS)
    assert torch.equal(model[0].weight, before)


# --- targets ------------------------------------------------------------------------


def test_soft_targets_from_mixup():
    x, y = blobs()
    hard, soft = network(), network()
    fit(hard, (x, y), **SETTINGS)
    fit(soft, (x, F.one_hot(y, 3).float()), **SETTINGS)
    torch.testing.assert_close(weights(soft), weights(hard), atol=1e-5, rtol=1e-4)

    def mixup(x, y):
        share, order = 0.8, torch.randperm(len(x))
        y = F.one_hot(y, 3).float()
        return share * x + (1 - share) * x[order], share * y + (1 - share) * y[order]

    mixed = network()
    history = fit(mixed, (x, y), epochs=15, lr=0.02, transform=mixup, progress=False)
    assert evaluate(mixed, (x, y))["accuracy"] > 0.9
    entropy = -(0.8 * math.log(0.8) + 0.2 * math.log(0.2)) * 2 / 3
    assert history["train_loss"][-1] > 0.6 * entropy, "mixed targets are never certain"


def test_ignored_targets_do_not_count():
    """Padding of sequences: neither in the loss, nor in the accuracy, nor learnt."""
    x, y = torch.randn(20, 6, 4), torch.randint(3, (20, 6))
    masked = y.clone()
    masked[:, 4:] = -1
    model = network(dropout=0.0)
    found = evaluate(model, (x, masked), ignore_index=-1, batch_size=7)
    seen = model(x[:, :4]).flatten(0, 1)
    expected = F.cross_entropy(seen, y[:, :4].flatten()).item()
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    hits = (seen.argmax(-1) == y[:, :4].flatten()).float().mean().item()
    assert found["accuracy"] == pytest.approx(hits)
    other = x.clone()
    other[:, 4:] = torch.randn(20, 2, 4)
    results = []
    for inputs in (x, other):
        model = network(dropout=0.0)
        fit(model, (inputs, masked), ignore_index=-1, **SETTINGS)
        results.append(weights(model))
    torch.testing.assert_close(*results)


def test_models_with_several_inputs():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, a, b):
            return self.linear(a + b)

    x, y = blobs()
    noise = torch.randn_like(x)
    model = Sum()
    fit(model, (x - noise, noise, y), epochs=15, lr=0.02, progress=False)
    assert evaluate(model, (x - noise, noise, y))["accuracy"] > 0.9


# --- evaluation ---------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 7, 100, 1000])
def test_evaluation_is_exact(batch_size):
    from sklearn.metrics import accuracy_score, log_loss

    model, (x, y) = network(dropout=0.5), blobs(100)
    found = evaluate(model, (x, y), batch_size=batch_size)
    with torch.no_grad():
        shares = model.eval()(x).double().softmax(-1)
    predictions = shares.argmax(-1)
    assert found["accuracy"] == pytest.approx(accuracy_score(y, predictions), abs=1e-12)
    assert found["loss"] == pytest.approx(log_loss(y, shares), rel=1e-4)
    assert 0.1 < found["accuracy"] < 0.9, "an easy case would test little"


@pytest.mark.parametrize("use", [lambda *a: fit(*a, epochs=1), evaluate])
def test_targets_that_are_columns_are_refused(use):
    """They would be compared with each other's answers."""
    data = torch.randn(6, 4), torch.randint(3, (6, 1))
    with pytest.raises(ValueError, match=r"logits \(6, 3\) need targets \(6,\), got"):
        use(nn.Linear(4, 3), data)


def test_sums_in_half_precision_do_not_overflow():
    model = nn.Linear(4, 3).half()
    data = 1000 * torch.randn(5000, 4).half(), torch.randint(3, (5000,))
    expected = F.cross_entropy(model(data[0]).float(), data[1]).item()
    found = evaluate(model, data, batch_size=5000)["loss"]
    assert math.isclose(found, expected, rel_tol=1e-4)


def test_what_to_measure_with_is_looked_at_before_training():
    model = nn.Linear(4, 3)
    before = model.weight.clone()
    good = torch.randn(6, 4), torch.randint(3, (6,))
    with pytest.raises(ValueError, match=r"val must hold .* lengths \[5, 6\]"):
        fit(model, good, epochs=1, val=(good[0][:5], good[1]))
    assert torch.equal(model.weight, before)


def test_evaluation_restores_the_modes():
    model = network()
    model[2].eval()  # a frozen part
    evaluate(model, blobs())
    assert [module.training for module in model.modules()] == [True] * 3 + [False, True]
    with pytest.raises(RuntimeError):
        evaluate(model, (torch.randn(5, 9), torch.zeros(5).long()))
    assert [module.training for module in model.modules()] == [True] * 3 + [False, True]
    model.eval()
    evaluate(model, blobs())
    assert not model.training


def test_a_batch_without_counting_targets_changes_nothing():
    model, (x, y) = network(), blobs(20)
    hidden = torch.cat([y, torch.full((20,), -100)])
    both = evaluate(model, (torch.cat([x, x]), hidden), batch_size=10)
    assert both == pytest.approx(evaluate(model, (x, y), batch_size=10))


def test_evaluation_builds_no_graph():
    kept = []

    class Watch(nn.Linear):
        def forward(self, x):
            kept.append(super().forward(x))
            return kept[-1]

    evaluate(Watch(4, 3), blobs())
    assert not any(logits.requires_grad for logits in kept)


# --- the progress bar ---------------------------------------------------------------


def test_the_progress_bar_goes_to_stderr_when_asked(capsys):
    fit(network(), blobs(), **{**SETTINGS, "progress": True})
    out, err = capsys.readouterr()
    assert out == ""
    assert "train_loss" in err
    assert "24/24" in err


@pytest.mark.parametrize("progress", [False, None])
def test_nothing_is_printed_outside_a_terminal(capsys, progress):
    fit(network(), blobs(), **{**SETTINGS, "progress": progress})
    assert capsys.readouterr() == ("", "")
