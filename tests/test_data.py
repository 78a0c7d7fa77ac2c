"""Data: shapes, ranges, proportions, and that seeds repeat."""

import hashlib
import random
import re
from datetime import date, datetime, timedelta

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minivit.data import (
    DATE_FORMS,
    Characters,
    check_finite,
    date_pairs,
    load_digits,
    load_photograph,
    split,
    write_date,
)

# --- images -------------------------------------------------------------------------


def test_locked_digits_are_a_quarter_that_nobody_else_gets():
    rest, locked = load_digits(), load_digits(locked=True)
    assert (len(rest[1]), len(locked[1])) == (1347, 450)
    share = locked[1].bincount() / (rest[1].bincount() + locked[1].bincount())
    assert (share - 0.25).abs().max() < 0.01
    pixels = (locked[0] * 16).to(torch.uint8).numpy().tobytes()
    found = hashlib.sha256(pixels).hexdigest()
    assert found.startswith("5a5bea3c9e8a509e"), "other digits would be locked away"


def test_digits_are_those_of_scikit_learn():
    from sklearn import datasets

    theirs = datasets.load_digits()
    ours = []
    for images, labels in (load_digits(), load_digits(locked=True)):
        assert images.shape[1:] == (1, 8, 8)
        assert images.dtype == torch.float32
        assert labels.shape == images.shape[:1]
        assert labels.dtype == torch.long
        assert (images.min(), images.max()) == (0.0, 1.0)
        pixels = images.flatten(1).double() * 16
        ours += zip(pixels.tolist(), labels.tolist(), strict=True)
    rows = zip(theirs.data.tolist(), theirs.target.tolist(), strict=True)
    assert sorted(ours) == sorted(rows), "each once, with its own label"


@pytest.mark.parametrize("name", ["china", "flower"])
def test_photographs(name):
    from sklearn.datasets import load_sample_image

    image = load_photograph(name)
    assert image.shape == (3, 427, 640)
    assert image.dtype == torch.float32
    assert 0.0 <= image.min() < 0.1
    assert 0.9 < image.max() <= 1.0
    theirs = load_sample_image(f"{name}.jpg")
    for row, column in ((0, 0), (100, 200), (426, 639)):
        found = (image[:, row, column] * 255).round().tolist()
        assert found == theirs[row, column].tolist()


def test_the_photographs_differ():
    assert not torch.equal(load_photograph("china"), load_photograph("flower"))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_split_keeps_the_proportions(seed):
    _, labels = load_digits()
    numbered = torch.arange(1347)[:, None] + torch.zeros(1, 3)
    (train, train_labels), (test, test_labels) = split(numbered, labels, seed=seed)
    assert (len(train), len(test)) == (1010, 337)
    together = torch.cat([train, test])[:, 0].long()
    assert sorted(together.tolist()) == list(range(1347)), "each sample once"
    assert torch.equal(labels[train[:, 0].long()], train_labels)
    assert torch.equal(labels[test[:, 0].long()], test_labels)
    whole, part = torch.bincount(labels), torch.bincount(test_labels)
    assert (part - whole * 337 / 1347).abs().max() < 1, "as even as whole numbers allow"


def test_seeds_of_a_split():
    images, labels = load_digits()
    first = split(images, labels, seed=3)[1][0]
    assert torch.equal(first, split(images, labels, seed=3)[1][0])
    assert not torch.equal(first, split(images, labels, seed=4)[1][0])


def test_a_split_by_number():
    images, labels = load_digits()
    train, test = split(images, labels, val_size=100)
    assert (len(train[0]), len(test[0])) == (1247, 100)
    assert torch.bincount(test[1]).min() >= 9


def test_loading_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    split(*load_digits())
    date_pairs(5, 5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.long, torch.bool]
)
def test_finite_numbers_pass(dtype):
    x = torch.ones(2, 3).to(dtype)
    assert check_finite(x) is x


# --- dates --------------------------------------------------------------------------

STRPTIME = dict(
    zip(
        DATE_FORMS,
        [
            "%d %B %Y",
            "%B %d, %Y",
            "the %d of %B, %Y",
            "%b %d %Y",
            "%A, %d %B %Y",
            "%a %d %b %Y",
            "%d.%m.%Y",
            "%Y/%m/%d",
        ],
        strict=True,
    )
)
days = st.dates(date(1900, 1, 1), date(2099, 12, 31))


@pytest.mark.parametrize("form", DATE_FORMS)
@given(day=days)
def test_dates_are_read_back_by_the_standard_library(form, day):
    text = write_date(day, form)
    plain = re.sub(r"(?<=\d)(st|nd|rd|th)\b", "", text)
    assert datetime.strptime(plain, STRPTIME[form]).date() == day
    if "weekday" in form:
        name = day.strftime("%A" if STRPTIME[form].startswith("%A") else "%a")
        assert text.startswith(name)


def test_ordinals():
    endings = {1: "st", 2: "nd", 3: "rd", 21: "st", 22: "nd", 23: "rd", 31: "st"}
    for number in range(1, 32):
        text = write_date(date(2021, 1, number), "{ordinal}")
        assert text == f"{number}{endings.get(number, 'th')}"


def test_no_two_forms_of_different_dates_look_alike():
    """Otherwise some test date could not be read, however good the model."""
    seen = {}
    day = date(2019, 1, 1)
    while day < date(2022, 1, 1):
        for form in DATE_FORMS:
            assert seen.setdefault(write_date(day, form), day) == day
        day += timedelta(1)


def test_date_pairs():
    train, test = date_pairs(300, 100, seed=1)
    assert (len(train), len(test)) == (300, 100)
    targets = [target for _, target in train + test]
    assert len(set(targets)) == 400, "no date twice"
    forms = set()
    for text, target in train + test:
        day = date.fromisoformat(target)
        fitting = {form for form in DATE_FORMS if write_date(day, form) == text}
        assert fitting
        forms |= fitting
    assert forms == set(DATE_FORMS)
    years = {int(target[:4]) for target in targets}
    assert min(years) < 1920
    assert max(years) > 2080
    assert date_pairs(300, 100, seed=1) == (train, test)
    assert date_pairs(300, 100, seed=2) != (train, test)


def test_date_pairs_leave_pythons_random_state_alone():
    before = random.getstate()
    date_pairs(5, 5)
    assert random.getstate() == before


@given(st.lists(st.text("abcxyz 0,", max_size=8), min_size=1, max_size=5))
def test_characters_round_trip(texts):
    vocab = Characters(["abcxyz 0,"])
    assert len(vocab) == 12
    framed = vocab.encode(texts, frame=True)
    assert framed.shape == (len(texts), 2 + max(map(len, texts)))
    assert (framed[:, 0] == vocab.bos_id).all()
    assert ((framed == vocab.eos_id).sum(1) == 1).all()
    assert vocab.decode(framed) == texts
    assert vocab.decode(framed[:, 1:]) == texts
    assert vocab.decode(vocab.encode(texts)) == texts
    for row, text in zip(framed, texts, strict=True):
        assert (row[len(text) + 2 :] == vocab.pad_id).all()


def test_characters_are_in_alphabetical_order():
    assert Characters(["b", "ca"]).tokens == ["<pad>", "<s>", "</s>", "a", "b", "c"]
    assert Characters(["abc"]).encode(["cab"]).tolist() == [[5, 3, 4]]
    assert Characters(["abc"]).encode(["cab"]).dtype == torch.long
