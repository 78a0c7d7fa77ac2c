"""Dates in words: right by `datetime`, the same on every machine, fairly divided."""

import locale
import random
from datetime import date, datetime

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minivit.data import DATE_FORMS, Characters, date_pairs, write_date

# The same forms in the language of `strptime`, which reads what `write_date` wrote.
# It does not know ordinals: their ending is cut off first.
STRPTIME = [
    "%d %B %Y",
    "%B %d, %Y",
    "the %d of %B, %Y",
    "%b %d %Y",
    "%A, %d %B %Y",
    "%a %d %b %Y",
    "%d.%m.%Y",
    "%Y/%m/%d",
]
EXAMPLES = [
    "3 March 2021",
    "March 3, 2021",
    "the 3rd of March, 2021",
    "Mar 3rd 2021",
    "Wednesday, 3 March 2021",
    "Wed 3 Mar 2021",
    "03.03.2021",
    "2021/3/3",
]
days = st.dates(date(1900, 1, 1), date(2099, 12, 31))


def read(text):
    """Find the forms of a text, and the dates that it means in each."""
    words = text.split(" ")
    for i, word in enumerate(words):
        if word[0].isdigit() and word[-2:] in ("st", "nd", "rd", "th"):
            words[i] = word[:-2]
    found = {}
    for form, pattern in zip(DATE_FORMS, STRPTIME, strict=True):
        if ("{ordinal}" in form) != (words != text.split(" ")):
            continue
        try:
            found[form] = datetime.strptime(" ".join(words), pattern).date()
        except ValueError:
            continue
    return found


def test_examples():
    written = [write_date(date(2021, 3, 3), form) for form in DATE_FORMS]
    assert written == EXAMPLES


@pytest.mark.skipif(
    not (locale.getlocale(locale.LC_TIME)[0] or "C").startswith(("C", "en")),
    reason="strptime reads the month names of the machine's language",
)
@given(day=days, form=st.sampled_from(DATE_FORMS))
def test_means_one_date(day, form):
    """Whatever form a text is read in, it means the date that was written."""
    found = read(write_date(day, form))
    assert found[form] == day
    assert set(found.values()) == {day}


@pytest.mark.parametrize(
    ("number", "ordinal"),
    [
        *((1, "1st"), (2, "2nd"), (3, "3rd"), (4, "4th"), (10, "10th")),
        *((11, "11th"), (12, "12th"), (13, "13th"), (20, "20th")),
        *((21, "21st"), (22, "22nd"), (23, "23rd"), (30, "30th"), (31, "31st")),
    ],
)
def test_ordinals(number, ordinal):
    assert write_date(date(2020, 1, number), "{ordinal}") == ordinal


def test_targets_are_iso():
    train, test = date_pairs(300, 100)
    for text, iso in train + test:
        day = datetime.strptime(iso, "%Y-%m-%d").date()
        assert text in [write_date(day, form) for form in DATE_FORMS]


@pytest.mark.parametrize("seed", range(5))
def test_test_dates_are_new(seed):
    train, test = date_pairs(4000, 1000, seed=seed)
    assert (len(train), len(test)) == (4000, 1000)
    seen, val = {iso for _, iso in train}, {iso for _, iso in test}
    assert len(seen) == 4000
    assert len(val) == 1000
    assert not seen & val


def test_deterministic():
    random.seed(7)
    torch.manual_seed(7)
    first = date_pairs(200, 50, seed=3)
    state = random.getstate()
    assert date_pairs(200, 50, seed=3) == first
    assert random.getstate() == state, "the global generator was used"
    assert date_pairs(200, 50, seed=4) != first


def test_forms_and_years_are_covered():
    train, test = date_pairs(4000, 1000)
    for pairs in (train, test):
        counts = dict.fromkeys(DATE_FORMS, 0)
        for text, iso in pairs:
            day = date.fromisoformat(iso)
            (form,) = [form for form in DATE_FORMS if write_date(day, form) == text]
            counts[form] += 1
        share = len(pairs) / len(DATE_FORMS)
        assert all(0.7 * share < count < 1.3 * share for count in counts.values())
        assert {iso[:3] for _, iso in pairs} == {str(n) for n in range(190, 210)}
        assert {iso[5:7] for _, iso in pairs} == {f"{n:02}" for n in range(1, 13)}


def test_every_day_of_two_centuries():
    """All 73,049 dates can be drawn: leap days too, but not 29 February 1900."""
    train, test = date_pairs(73_048, 1)
    drawn = {iso for _, iso in train + test}
    assert len(drawn) == 73_049
    assert {"1900-01-01", "2000-02-29", "2096-02-29", "2099-12-31"} <= drawn
    assert "1900-02-29" not in drawn
    assert sum(iso.endswith("02-29") for iso in drawn) == 49


@pytest.mark.parametrize("sizes", [(0, 1), (1, 0), (-1, 5), (73_049, 1)])
def test_refuses_sizes(sizes):
    with pytest.raises(ValueError, match=f"73049, got {sizes[0]} and {sizes[1]}"):
        date_pairs(*sizes)


@given(st.lists(st.text("abc 0", max_size=6), min_size=1, max_size=4), st.booleans())
def test_round_trip(texts, frame):
    vocab = Characters(["abc 0"])
    ids = vocab.encode(texts, frame=frame)
    assert ids.dtype == torch.long
    assert ids.shape == (len(texts), max(map(len, texts)) + 2 * frame)
    assert vocab.decode(ids) == texts
    assert (ids == vocab.pad_id).sum() == sum(
        ids.size(1) - 2 * frame - len(t) for t in texts
    )


def test_special_tokens():
    vocab = Characters(["ba"])
    assert vocab.tokens == ["<pad>", "<s>", "</s>", "a", "b"]
    assert len(vocab) == 5
    assert vocab.encode(["ab", "b"], frame=True).tolist() == [
        [1, 3, 4, 2],
        [1, 4, 2, 0],
    ]
    # What a model writes after the end token is not part of the text.
    assert vocab.decode(torch.tensor([[3, 2, 4, 4], [4, 3, 4, 3]])) == ["a", "baba"]


def test_refuses_unknown_characters():
    with pytest.raises(ValueError, match=r"does not have \['q', 'ü'\]"):
        Characters(["abc"]).encode(["aqü"])
    with pytest.raises(ValueError, match="no text"):
        Characters(["abc"]).encode([])
