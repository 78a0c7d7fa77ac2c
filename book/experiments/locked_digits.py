"""How well do ViT, CNN and SVM read the digits that were locked away?"""

import torch
from sklearn.model_selection import GridSearchCV
from sklearn.svm import SVC
from torch import nn

import minivit
from minivit import data
from minivit.experiments.cures import train_vit, vote, wobble


def make_cnn(seed):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.MaxPool2d(2),  # (B, 32, 4, 4)
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def tune_svm(images, labels):
    grid = {"C": [1, 10, 100], "gamma": [0.01, 0.03, 0.1, 0.3]}
    svm = GridSearchCV(SVC(), grid, cv=5)
    return svm.fit(images.flatten(1).numpy(), labels.numpy())


def percent(answers, labels):
    return 100 * (answers == labels).float().mean().item()


def run(seed):
    """Train on all digits but the locked ones, and read those."""
    learn, locked = data.load_digits(), data.load_digits(locked=True)
    vit, _ = train_vit(learn, seed=seed, transform=wobble)
    cnn = make_cnn(seed)
    minivit.fit(
        cnn, learn, epochs=40, lr=5e-3, batch_size=128, weight_decay=0.0,
        transform=wobble, seed=seed,
    )  # fmt: skip
    svm = tune_svm(*learn)
    answers = torch.from_numpy(svm.predict(locked[0].flatten(1).numpy()))
    figures = {"SVM": percent(answers, locked[1])}
    for name, model in (("ViT", vit), ("CNN", cnn)):
        figures[name] = percent(vote(model, locked[0]), locked[1])
        one_look = 100 * minivit.evaluate(model, locked)["accuracy"]
        figures[f"{name}, one look"] = one_look
    return figures
