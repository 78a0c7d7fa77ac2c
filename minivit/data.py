"""Data that needs no download: scanned digits, two photographs, and dates in words.

Copy this file: it works alone; the loaders need scikit-learn, which carries the images.

Letters for shapes: B batch, C channels, L length.
"""

import random
from collections.abc import Iterable, Sequence
from datetime import date

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

__all__ = [
    "DATE_FORMS",
    "Characters",
    "check_finite",
    "date_pairs",
    "load_digits",
    "load_photograph",
    "split",
    "write_date",
]

# As people write dates. Left out is what no reader can decide: 3/4/2021 (April or
# March?) and 3 Mar '21 (which century?). With dots the day comes first.
DATE_FORMS = (
    "{day} {month} {year}",  # 3 March 2021
    "{month} {day}, {year}",  # March 3, 2021
    "the {ordinal} of {month}, {year}",  # the 3rd of March, 2021
    "{month:.3} {ordinal} {year}",  # Mar 3rd 2021
    "{weekday}, {day} {month} {year}",  # Wednesday, 3 March 2021
    "{weekday:.3} {day} {month:.3} {year}",  # Wed 3 Mar 2021
    "{day:02}.{number:02}.{year}",  # 03.03.2021
    "{year}/{number}/{day}",  # 2021/3/3
)
# Written out: the names that `strftime` gives depend on the machine's language.
MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]
WEEKDAYS = [
    "Monday",
    "Tuesday",
    "Wednesday",
    "Thursday",
    "Friday",
    "Saturday",
    "Sunday",
]

LOCK = 1998  # decides which digits are locked away; the year of their publication


def load_digits(*, locked: bool = False) -> tuple[Tensor, Tensor]:
    """Load the scanned digits that travel with scikit-learn.

    A quarter of them is locked away, every class in proportion, for a last figure and
    for nothing else: whoever chooses by images cannot measure with them.

    Args:
        locked: True gives the 450 that are locked away, False the 1,347 others.

    Returns:
        images: (B, 1, 8, 8) float, 0 paper to 1 ink.
        labels: (B,) integers 0 to 9.

    Source:
        Alpaydin and Kaynak 1998, "Optical Recognition of Handwritten Digits", UCI.
    """
    from sklearn.datasets import load_digits as load

    pixels, labels = load(return_X_y=True)
    images = torch.as_tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16.0
    labels = torch.as_tensor(labels, dtype=torch.long)
    return split(images, labels, val_size=450, seed=LOCK)[int(locked)]


def load_photograph(name: str) -> Tensor:
    """Load one of the two photographs that travel with scikit-learn.

    Args:
        name: "china" (a temple) or "flower" (a dahlia).

    Returns:
        (3, 427, 640) float, red, green and blue from 0 to 1.

    Raises:
        ValueError: another name.
    """
    from sklearn.datasets import load_sample_image

    names = ("china", "flower")
    if name not in names:
        raise ValueError(f"name must be one of {names}, got {name!r}")
    pixels = torch.tensor(load_sample_image(f"{name}.jpg"))  # (height, width, 3)
    return pixels.permute(2, 0, 1) / 255.0  # (3, height, width)


def split(
    images: Tensor,
    labels: Tensor,
    *,
    val_size: float | int = 0.25,
    seed: int = 0,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Divide data at random, every class in the same proportion on both sides.

    Args:
        images: (B, ...) inputs.
        labels: (B,) classes.
        val_size: share of the data that is held out, or their number.
        seed: the same seed gives the same division.

    Returns:
        (train_images, train_labels) and (val_images, val_labels).

    Raises:
        ValueError: lengths differ, an input is not finite, or a part would be empty.
    """
    from sklearn.model_selection import train_test_split

    if len(images) != len(labels):
        raise ValueError(f"got {len(images)} images but {len(labels)} labels")
    check_finite(images)
    train, val = train_test_split(
        torch.arange(len(labels)).numpy(),
        test_size=val_size,
        random_state=seed,
        stratify=labels.cpu().numpy(),
    )
    train, val = torch.from_numpy(train), torch.from_numpy(val)
    return (images[train], labels[train]), (images[val], labels[val])


def write_date(day: date, form: str) -> str:
    """Write a date as people do.

    Args:
        day: the date.
        form: one of `DATE_FORMS`, or another text with their fields.

    Returns:
        The date in words and numbers.

    >>> write_date(date(2021, 3, 3), "the {ordinal} of {month}, {year}")
    'the 3rd of March, 2021'
    """
    teens = 11 <= day.day <= 13
    ending = "th" if teens else {1: "st", 2: "nd", 3: "rd"}.get(day.day % 10, "th")
    return form.format(
        day=day.day,
        ordinal=f"{day.day}{ending}",
        month=MONTHS[day.month - 1],
        number=day.month,
        year=day.year,
        weekday=WEEKDAYS[day.weekday()],
    )


def date_pairs(
    train_size: int, val_size: int, *, seed: int = 0
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Draw different dates from 1900 to 2099, each in one form and in ISO 8601.

    No date occurs twice: none to measure with was seen in training, in whatever form.

    Args:
        train_size: number of training pairs.
        val_size: number of pairs to measure with.
        seed: the same seed gives the same pairs.

    Returns:
        Training pairs and the others, such as ("March 3, 2021", "2021-03-03").

    Raises:
        ValueError: a size is below one, or there are not so many dates.
    """
    first, last = date(1900, 1, 1).toordinal(), date(2099, 12, 31).toordinal()
    days = range(first, last + 1)
    if train_size < 1 or val_size < 1 or train_size + val_size > len(days):
        raise ValueError(
            f"train_size and val_size must be at least 1 and add up to at most "
            f"{len(days)}, got {train_size} and {val_size}"
        )
    draw = random.Random(seed)
    pairs = [
        (write_date(day, draw.choice(DATE_FORMS)), day.isoformat())
        for day in map(date.fromordinal, draw.sample(days, train_size + val_size))
    ]
    return pairs[:train_size], pairs[train_size:]


class Characters:
    """A vocabulary of single characters, behind three special tokens.

    Args:
        texts: every character in them gets an id, from 3 on, in alphabetical order.

    Attributes:
        pad_id: fills up short sequences (0).
        bos_id: begins a sequence (1).
        eos_id: ends it (2).
        tokens: what each id stands for.

    >>> vocab = Characters(["banana"])
    >>> vocab.encode(["ban", "an"], frame=True)
    tensor([[1, 4, 3, 5, 2],
            [1, 3, 5, 2, 0]])
    >>> vocab.decode(torch.tensor([[1, 3, 5, 2, 0]]))
    ['an']
    """

    pad_id, bos_id, eos_id = 0, 1, 2

    def __init__(self, texts: Iterable[str]) -> None:
        self.tokens = ["<pad>", "<s>", "</s>", *sorted(set("".join(texts)))]
        self._ids = {token: i for i, token in enumerate(self.tokens)}

    def __len__(self) -> int:
        """Count the tokens, the special ones included."""
        return len(self.tokens)

    def encode(self, texts: Sequence[str], *, frame: bool = False) -> Tensor:
        """Turn texts into ids, filled up to the longest.

        Args:
            texts: B texts.
            frame: put the start token before each and the end token after it.

        Returns:
            (B, L) integers.

        Raises:
            ValueError: no text, or a character that the vocabulary does not have.
        """
        if not texts:
            raise ValueError("there is no text to encode")
        unknown = sorted(set("".join(texts)) - self._ids.keys())
        if unknown:
            raise ValueError(f"the vocabulary does not have {unknown}")
        before, after = ([self.bos_id], [self.eos_id]) if frame else ([], [])
        rows = [[*before, *(self._ids[c] for c in text), *after] for text in texts]
        ids = [torch.tensor(row, dtype=torch.long) for row in rows]
        return pad_sequence(ids, batch_first=True, padding_value=self.pad_id)  # (B, L)

    def decode(self, ids: Tensor) -> list[str]:
        """Turn ids back into texts, each up to its end token.

        Args:
            ids: (B, L) integers; start token and padding are left out.

        Returns:
            B texts.
        """
        texts = []
        for row in ids.tolist():
            if self.eos_id in row:
                row = row[: row.index(self.eos_id)]
            skip = (self.pad_id, self.bos_id)
            texts.append("".join(self.tokens[i] for i in row if i not in skip))
        return texts


def check_finite(x: Tensor) -> Tensor:
    """Hand x through if every number in it is finite.

    Args:
        x: (B, ...).

    Returns:
        x itself.

    Raises:
        ValueError: it holds NaN or infinity; says how many and where first.
    """
    if x.is_floating_point() and not x.isfinite().all():
        bad = (~x.isfinite()).nonzero()
        raise ValueError(
            f"{len(bad)} of {x.numel()} numbers are NaN or infinite, "
            f"the first at index {tuple(bad[0].tolist())}"
        )
    return x
