"""Pictures for training: whole sets, any folder, and clear words about mistakes."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from minivit.data import load_digits
from minivit.images import (
    InMemory,
    OnDisk,
    load_pictures,
    normalise,
    read,
    seed_from,
    square,
    statistics,
)
from minivit.train.augment import crop_file


@pytest.fixture
def folder(tmp_path):
    """Two classes of small noisy pictures, one red and one blue, in several formats."""
    draw = np.random.default_rng(0)
    for name, channel in (("blue", 2), ("red", 0)):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(20):
            pixels = draw.integers(0, 60, (9 + i % 3, 12, 3), dtype=np.uint8)
            pixels[..., channel] += 150
            kind = ("png", "jpg", "bmp")[i % 3]
            Image.fromarray(pixels).save(tmp_path / "set" / name / f"{i:02}.{kind}")
    return tmp_path / "set"


def test_a_folder_is_read(folder):
    train, val, classes = load_pictures(folder, image_size=8, val_size=0.25)
    assert classes == ["blue", "red"]
    assert (len(train), len(val)) == (30, 10)
    assert isinstance(train, InMemory)
    assert train.images.shape == (30, 3, 8, 8)
    assert train.images.dtype == torch.uint8
    for part in (train, val):
        red, _, blue = part.images.float().mean((2, 3)).unbind(1)
        assert torch.equal(red > blue, part.labels == 1), "labels belong to the images"
        assert part.labels.float().mean() == 0.5, "each class in its proportion"


def test_train_and_val_are_used_as_they_are(folder):
    for part in ("train", "val"):
        (folder / part).mkdir()
    for name in ("blue", "red"):
        (folder / name).rename(folder / "train" / name)
        (folder / "val" / name).mkdir()
        for i in (0, 3):
            file = folder / "train" / name / f"{i:02}.png"
            file.rename(folder / "val" / name / file.name)
    train, val, classes = load_pictures(folder, image_size=8)
    assert (len(train), len(val), classes) == (36, 4, ["blue", "red"])
    assert len(load_pictures(folder, image_size=8, max_train_images=10).train) == 10
    (folder / "val" / "red").rename(folder / "val" / "rot")
    with pytest.raises(ValueError, match="must have the same classes"):
        load_pictures(folder, image_size=8)


def test_memory_and_disk_hold_the_same(folder):
    rows = [torch.tensor([3, 1]), torch.tensor([29])]
    for part in (0, 1):
        kept = [
            load_pictures(folder, image_size=8, val_size=0.25, cache=cache)[part]
            for cache in ("memory", "disk")
        ]
        assert [type(one) for one in kept] == [InMemory, OnDisk]
        some = rows if part == 0 else rows[:1]
        for a, b in zip(*(one.batches(some) for one in kept), strict=True):
            assert torch.equal(a[0], b[0])
            assert torch.equal(a[1], b[1])


def test_no_image_is_on_both_sides(folder):
    train, val, _ = load_pictures(folder, image_size=8, cache="disk")
    assert not set(train.files) & set(val.files)
    assert len(set(train.files) | set(val.files)) == 40
    again = load_pictures(folder, image_size=8, cache="disk")
    other = load_pictures(folder, image_size=8, cache="disk", seed=1)
    assert again.val.files == val.files
    assert other.val.files != val.files


def test_the_limit_keeps_proportions_and_what_is_held_out(folder):
    whole = load_pictures(folder, image_size=8, cache="disk")
    some = load_pictures(folder, image_size=8, cache="disk", max_train_images=8)
    assert some.val.files == whole.val.files
    assert len(some.train) == 8
    assert set(some.train.files) < set(whole.train.files)
    assert some.train.labels.sum() == 4
    with pytest.raises(
        ValueError, match="max_train_images=1 must lie between the 2 classes and 34"
    ):
        load_pictures(folder, image_size=8, max_train_images=1)


def crop_and_shift(image):
    """Stand beside the tests, so that processes that are not forked find it too."""
    return square(8)(image)[:, :4] + torch.randint(9, (1,))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_random_crops_depend_on_the_seed_alone(folder, num_workers):
    """Not on the number of processes, nor on what else was drawn before."""

    def draw(seed, num_workers, rows):
        train = load_pictures(
            folder, image_size=8, cache="disk", num_workers=num_workers
        ).train
        train.transform = crop_and_shift
        torch.rand(seed)
        return torch.cat([images for images, _ in train.batches(rows, seed)])

    rows = torch.arange(12)
    expected = draw(1, 0, rows.split(4))
    assert torch.equal(draw(1, num_workers, rows.split(4)), expected)
    assert torch.equal(draw(1, num_workers, rows[4:].split(8)), expected[4:])
    assert not torch.equal(draw(2, num_workers, rows.split(4)), expected)


@pytest.mark.parametrize("transform", [square(8), square(8, 1), crop_file(8)])
def test_pictures_on_disk_travel_to_other_processes(folder, transform):
    """Only where processes are forked do they inherit; elsewhere all is pickled."""
    train = load_pictures(folder, image_size=8, cache="disk").train
    train.transform = transform
    for (image, _), (same, _) in zip(train, pickle.loads(pickle.dumps(train))):
        assert torch.equal(image, same)


# --- what can be wrong --------------------------------------------------------------


def read_all(folder, cache):
    for part in load_pictures(folder, image_size=8, cache=cache)[:2]:
        list(part.batches(torch.arange(len(part)).split(5)))


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_a_file_that_is_no_picture_is_named(folder, cache):
    file = folder / "red" / "00.png"
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"00\.png cannot be read as a picture"):
        read_all(folder, cache)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_name_comes_through_from_other_processes(folder, num_workers):
    (folder / "red" / "00.png").write_text("no picture", "utf-8")
    with pytest.raises(ValueError, match=r"00\.png cannot be read as") as caught:
        load_pictures(folder, image_size=8, cache="memory", num_workers=num_workers)
    assert "Traceback" not in str(caught.value)


def test_an_empty_class_is_named(folder):
    (folder / "green").mkdir()
    with pytest.raises(ValueError, match="green"):
        load_pictures(folder)


def test_no_class_at_all(tmp_path):
    with pytest.raises(ValueError, match="Couldn't find any class folder"):
        load_pictures(tmp_path)


def test_one_class_is_none(tmp_path):
    """Nothing could be told apart, and all answers would be right."""
    (tmp_path / "red").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "red" / "a.png")
    with pytest.raises(ValueError, match=r"has one class only, \['red'\]"):
        load_pictures(tmp_path)


def test_no_such_set():
    with pytest.raises(ValueError, match=r"neither a folder nor one of .*cifar10"):
        load_pictures("imagenet")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_size": 0.0}, "val_size must lie between 0 and 1, got 0.0"),
        ({"val_size": 1.0}, "val_size must lie between 0 and 1, got 1.0"),
        ({"cache": "cloud"}, "cache must be 'auto', 'memory' or 'disk', got 'cloud'"),
        ({"image_size": 9}, "digits has images of 8 pixels, got image_size=9"),
        ({"max_train_images": 9}, "max_train_images=9 must lie between the 10 classes"),
        ({"max_train_images": 1210}, "max_train_images=1210 must lie .* and 1202"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        load_pictures("digits", **options)


# --- pixels -------------------------------------------------------------------------


def test_digits_are_the_digits():
    train, val, classes = load_pictures("digits")
    assert classes == list("0123456789")
    assert (len(train), len(val)) == (1212, 135)
    original = {
        (image * 16).byte().numpy().tobytes(): int(label)
        for image, label in zip(*load_digits(), strict=True)
    }
    for image, label in zip(val.images, val.labels, strict=True):
        levels = (image.float() * 16 / 255).round().byte()  # nothing was lost
        assert original[levels.numpy().tobytes()] == label


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "LA", "I;16"])
def test_pictures_of_all_kinds_become_colour_or_grey(tmp_path, mode):
    image = Image.new("I;16", (20, 10)) if mode == "I;16" else Image.new(mode, (20, 10))
    kind = "tiff" if mode in ("CMYK", "LA") else "png"
    image.save(tmp_path / f"a.{kind}")
    colour = square(6)(read(tmp_path / f"a.{kind}"))
    grey = square(6, channels=1)(read(tmp_path / f"a.{kind}"))
    assert (colour.shape, grey.shape) == ((3, 6, 6), (1, 6, 6))


@pytest.mark.parametrize("mode", ["P", "1", "L", "LA", "RGBA", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_numbers_of_a_palette_are_no_colours(mode, channels):
    """A picture that was not opened by `read` is understood as well."""
    pixels = torch.randint(0, 256, (9, 12, 3), dtype=torch.uint8).numpy()
    picture = Image.fromarray(pixels).convert(mode)
    same = picture.convert("RGB" if channels == 3 else "L")
    found = square(6, channels)(picture)
    assert torch.equal(found, square(6, channels)(same))


def test_a_square_is_the_middle_of_the_picture():
    pixels = np.zeros((10, 30, 3), dtype=np.uint8)
    pixels[:, 10:20] = 200
    assert (square(10)(Image.fromarray(pixels)) == 200).all()


def test_statistics_are_those_of_the_pixels():
    images = torch.randint(0, 256, (50, 3, 5, 4), dtype=torch.uint8)
    images[:, 2] = 7
    mean, std = statistics(InMemory(images, torch.zeros(50)))
    pixels = images.numpy() / 255
    np.testing.assert_allclose(mean, pixels.mean((0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(std[:2], pixels.std((0, 2, 3))[:2], rtol=1e-5)
    assert std[2] == 1.0, "a channel that is constant is not divided by zero"
    x = normalise(mean, std)(images)
    assert x[:, :2].mean((0, 2, 3)).abs().max() < 1e-5
    assert (x[:, :2].std((0, 2, 3), correction=0) - 1).abs().max() < 1e-5


def test_seeds_differ_and_stay():
    seeds = {seed_from(run, step) for run in range(50) for step in range(50)}
    assert len(seeds) == 2500
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seed_from(0, 1) == 4499712255002397205, "the same on every machine"
