"""What is a body trained on digits 0 to 4 worth for 5 to 9, and what is lost?

The rates of `RATE` were chosen on 2026-11-22, before any run on record, by
`choose` with seeds 100 to 102: for each method the one of `GRID` with the
highest mean accuracy over the seeds and 5, 10 and 50 labels a class, on a
quarter of the training images of the new digits. No test image of these seeds
was looked at; but the seeds divide the same 1,347 digits. All methods
keep the recipe (60 updates, batches of 25) that the chapter always had, and
`RATES` are the rates that its last figure always showed.
"""

import copy
import itertools
import statistics

import torch
from sklearn.linear_model import LogisticRegression

import minivit
from minivit.data import load_digits, split
from minivit.transfer import freeze_all_but, new_head
from minivit.vit import ViT

LABELS = [5, 10, 50]
RATE = {"probe": 1e-1, "partial": 3e-3, "full": 3e-3, "from scratch": 3e-3}
RATES = [1e-4, 1e-3, 1e-2, 5e-2]
GRID = {
    "probe": [1e-2, 3e-2, 1e-1, 3e-1],
    "partial": [1e-3, 3e-3, 1e-2, 3e-2],
    "full": [3e-4, 1e-3, 3e-3, 1e-2],
    "from scratch": [3e-4, 1e-3, 3e-3, 1e-2],
}
METHODS = {
    "probe": lambda model: [model.head],
    "partial": lambda model: [
        model.encoder.layers[-1], model.encoder.norm, model.head
    ],
    "full": lambda model: [model],
}  # fmt: skip


def task(lowest, seed):
    """Five digits from `lowest` on, called 0 to 4, in two parts."""
    images, labels = load_digits()
    keep = (labels >= lowest) & (labels < lowest + 5)
    return split(images[keep], labels[keep] - lowest, seed=seed)


def build(seed):
    torch.manual_seed(seed)
    return ViT(
        image_size=8, patch_size=2, in_channels=1, num_classes=5,
        embed_dim=64, num_layers=3, num_heads=4, mlp_dim=128,
    )  # fmt: skip


def pretrain(data, seed):
    model = build(seed)
    options = {"lr": 2e-3, "seed": seed, "progress": False}
    minivit.fit(model, data, epochs=20, **options)
    return model


def few(data, per_class, seed):
    """Draw the labelled images that we may use."""
    x, y = data
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(y), generator=generator)
    rows = [order[y[order] == k][:per_class] for k in range(5)]
    rows = torch.cat(rows)  # (5 · per_class,)
    return x[rows], y[rows]


def adapt(start, method, data, *, lr, seed, updates=60):
    model = new_head(copy.deepcopy(start), num_classes=5)
    freeze_all_but(model, *METHODS[method](model))
    epochs = updates * 25 // len(data[0])
    minivit.fit(
        model, data, epochs=epochs, batch_size=25, lr=lr, seed=seed,
        progress=False,
    )  # fmt: skip
    return model


def accuracy(model, data):
    return 100 * minivit.evaluate(model, data)["accuracy"]


def try_method(method, body, train, test, *, seed, lr):
    """Accuracy of one method; "from scratch" makes no use of the body."""
    if method == "from scratch":
        body, method = build(seed), "full"
    return accuracy(adapt(body, method, train, lr=lr, seed=seed), test)


@torch.no_grad()
def read(model, images):
    """What the head reads: CLS behind the last layer and norm, (B, E)."""
    return model.eval().features(images)[:, 0]


def fitted(view, train, test):
    """Accuracy of a logistic regression that is fitted to the end."""
    (x, y), (test_x, test_y) = train, test
    regression = LogisticRegression(max_iter=5000)
    regression.fit(view(x).numpy(), y.numpy())
    return 100 * regression.score(view(test_x).numpy(), test_y.numpy())


def compare(body, seed):
    """Accuracies in percent on the new digits, with n labels a class."""
    train, test = task(5, seed)
    untrained = build(seed)
    views = {
        "pixels": lambda images: images.flatten(1),
        "random body": lambda images: read(untrained, images),
        "probe, to the end": lambda images: read(body, images),
    }
    figures = {}
    for n in LABELS:
        drawn = few(train, n, seed)
        for method, lr in RATE.items():
            figures[f"{method}, {n}"] = try_method(
                method, body, drawn, test, seed=seed, lr=lr
            )
        for name, view in views.items():
            figures[f"{name}, {n}"] = fitted(view, drawn, test)
    return figures


def left_over(body, seed):
    """Accuracies after full fine-tuning with 10 labels: new digits and old."""
    (old, old_test), (train, test) = task(0, seed), task(5, seed)
    drawn = few(train, 10, seed)

    def refitted(model):  # a new head for the old digits, fitted to the end
        return fitted(lambda images: read(model, images), old, old_test)

    figures = {"random body: refitted": refitted(build(seed))}
    for lr in RATES:
        model = adapt(body, "full", drawn, lr=lr, seed=seed)
        figures[f"{lr:g}: new"] = accuracy(model, test)
        figures[f"{lr:g}: refitted"] = refitted(model)
        model.head = body.head  # only to look: what is left?
        figures[f"{lr:g}: old head"] = accuracy(model, old_test)
    return figures


def choose(seeds=(100, 101, 102)):
    """Mean accuracy with each rate in `GRID`, on inner splits."""
    found = {}
    for seed in seeds:
        body = pretrain(task(0, seed)[0], seed)
        train, held_out = split(*task(5, seed)[0], seed=seed)
        for method, rates in GRID.items():
            for lr, n in itertools.product(rates, LABELS):
                drawn = few(train, n, seed)
                reached = try_method(
                    method, body, drawn, held_out, seed=seed, lr=lr
                )
                found.setdefault((method, lr), []).append(reached)
    return {key: statistics.fmean(values) for key, values in found.items()}


def run(seed):
    """Accuracies in percent: of all methods, and after rates low to high."""
    old, old_test = task(0, seed)
    body = pretrain(old, seed)
    figures = {"pre-trained": accuracy(body, old_test)}
    return figures | compare(body, seed) | left_over(body, seed)
