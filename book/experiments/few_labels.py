"""What is a body trained on CIFAR-10 worth to somebody with few labels?"""

import copy

import skimage.data
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.svm import SVC

import minivit
from minivit.experiments.digits_to_digits import read
from minivit.transfer import new_head
from minivit.vit import ViT

FEW = (5, 10, 50)


def windows(seed, side=17):
    """Cut a window out of each picture, anywhere, and shuffle both classes."""
    pictures = torch.from_numpy(skimage.data.lfw_subset()).float()
    generator = torch.Generator().manual_seed(seed)
    room = pictures.size(-1) - side + 1
    corners = torch.randint(room, (len(pictures), 2), generator=generator)
    cut = torch.stack(
        [
            picture[y : y + side, x : x + side]
            for picture, (y, x) in zip(pictures, corners.tolist())
        ]
    )  # (200, side, side)
    faces, others = cut.unflatten(0, (2, 100))
    order = torch.randperm(100, generator=generator)
    return faces[order], others[order]


def labelled(faces, others):
    labels = torch.arange(2).repeat_interleave(len(faces))
    return torch.cat([others, faces]), labels


def for_vit(cut, about):
    """Make of grey windows what the model expects: 32 pixels, colours."""
    rgb = cut[:, None].expand(-1, 3, -1, -1)
    rgb = F.interpolate(rgb, size=32, mode="bilinear", antialias=True)
    mean, std = torch.tensor([about["mean"], about["std"]])[:, :, None, None]
    return (rgb - mean) / std  # (B, 3, 32, 32)


def roughness(cut):
    """How much neighbours differ on average, down and across, of 255 greys."""
    steps = (cut.diff(dim=d).abs().mean(dim=(1, 2)) for d in (1, 2))
    return 255 * torch.stack(list(steps), dim=1)  # (B, 2)


def tuned(train, test, kernel=False):
    """Accuracy of a classifier that chose its settings on its own labels."""
    grid = {"C": [0.01, 0.1, 1, 10, 100]}
    classifier = LogisticRegression(max_iter=5000)
    if kernel:
        grid |= {"gamma": [0.003, 0.01, 0.03, 0.1]}
        classifier = SVC()
    search = GridSearchCV(classifier, grid, cv=5)
    search.fit(*(x.numpy() for x in train))
    return search.score(*(x.numpy() for x in test))


def tune_all(start, train, test, *, seed, lr, updates):
    """Accuracy after fine-tuning everything, with a new head."""
    model = new_head(copy.deepcopy(start), num_classes=2)
    minivit.fit(  # each update sees all labelled windows
        model, train, epochs=updates, batch_size=len(train[0]), lr=lr,
        seed=seed, progress=False,
    )  # fmt: skip
    return minivit.evaluate(model, test)["accuracy"]


def bodies(seed):
    """The model that travels with minivit, and one never trained."""
    trained, _, _, about = minivit.load("vit_cifar10")
    torch.manual_seed(seed)
    return trained, ViT(**about["vit"]), about


def without_tuning(seed, side=17):
    """Accuracies in percent of all methods that leave the body as it is."""
    trained, untrained, about = bodies(seed)
    faces, others = windows(seed, side)
    views = {
        "two numbers": roughness,
        "pixels": lambda cut: cut.flatten(1),
        "SVM on pixels": lambda cut: cut.flatten(1),
        "random body": lambda cut: read(untrained, for_vit(cut, about)),
        "trained body": lambda cut: read(trained, for_vit(cut, about)),
    }
    figures = {}
    for name, view in views.items():
        seen, told = view(faces), view(others)
        test = labelled(seen[50:], told[50:])
        for n in FEW:
            train = labelled(seen[:n], told[:n])
            accuracy = tuned(train, test, kernel=name.startswith("SVM"))
            figures[f"{name}, {n}"] = 100 * accuracy
    return figures


def run(seed):
    """Accuracies in percent on 100 windows held out, with n labels a class."""
    figures = without_tuning(seed)
    trained, untrained, about = bodies(seed)
    faces, others = (for_vit(cut, about) for cut in windows(seed))
    train, test = (
        labelled(faces[part], others[part])
        for part in (slice(0, 10), slice(50, 100))
    )
    for name, start, recipe in (
        ("fine-tuned", trained, {"lr": 3e-4, "updates": 25}),
        ("from scratch", untrained, {"lr": 1e-3, "updates": 50}),
    ):
        accuracy = tune_all(start, train, test, seed=seed, **recipe)
        figures[f"{name}, 10"] = 100 * accuracy
    return figures
