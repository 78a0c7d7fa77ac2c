"""Who still reads a digit that is moved by a pixel or two?"""

from functools import partial
from statistics import fmean

import torch
import torch.nn.functional as F

from minivit import data, evaluate
from minivit.experiments.few_images import make_cnn, make_vit, trained


def shifted(images, down, right):
    """Move the content; what is uncovered is zero."""
    return F.pad(images, (right, -right, down, -down))


def random_shift(images, labels):
    """Move each image by -1, 0 or 1 pixel down and to the right."""
    moved = images.clone()
    choice = torch.randint(9, (len(images),))  # (B,)
    for i in range(9):
        rows = choice == i
        moved[rows] = shifted(images[rows], i // 3 - 1, i % 3 - 1)
    return moved, labels


def framed(part):
    """Put two empty pixels on every side, so that a shift loses no ink."""
    images, labels = part
    return F.pad(images, (2, 2, 2, 2)), labels  # (B, 1, 12, 12)


def shift_accuracy(model, part):
    """Accuracy in per cent on images shifted by 0, 1 and 2 pixels."""
    images, labels = part
    found = []
    for by in (0, 1, 2):
        moves = [(by, 0), (-by, 0), (0, by), (0, -by)]
        scores = [
            evaluate(model, (shifted(images, *move), labels))["accuracy"]
            for move in moves
        ]
        found.append(100 * fmean(scores))
    return found


LEARNERS = {  # how it is made, what it is taught, and for how many updates
    "CNN": (make_cnn, None, 600),
    "ViT": (partial(make_vit, 12), None, 600),
    "ViT, taught": (partial(make_vit, 12), random_shift, 1500),
}


def run(seed, names=LEARNERS):
    """Train on framed digits in place, read them out of place."""
    pool, val = data.split(*data.load_digits(), seed=seed)
    pool, val = framed(pool), framed(val)
    figures = {}
    for name in names:
        make, transform, updates = LEARNERS[name]
        model = trained(make, pool, seed, updates, transform=transform)
        for by, found in enumerate(shift_accuracy(model, val)):
            figures[f"{name}, {by} px"] = found
    return figures
