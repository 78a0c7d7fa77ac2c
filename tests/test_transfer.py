"""Published weights: what a reader sees with a network, without one, and after damage.

Nothing is downloaded: the file, its address and the network are stand-ins.
"""

import copy
import hashlib
import re
import urllib.error
import urllib.request

import pytest
import torch
import torch.nn.functional as F
from models import images, randomise, vit
from torchvision.models import ViT_B_16_Weights, vision_transformer

import minivit
from minivit import pretrained
from minivit.transfer import freeze_all_but, new_head

ADDRESS = ViT_B_16_Weights.IMAGENET1K_V1.url


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder of torch's."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("TORCH_MODEL_ZOO", raising=False)
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def offline(monkeypatch):
    def urlopen(*args, **kwargs):
        raise urllib.error.URLError("Temporary failure in name resolution")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(torch.hub, "urlopen", urlopen)


@pytest.fixture(scope="module")
def published():
    """Random weights in the form of torchvision's file: its names are the old ones."""
    with torch.device("meta"):
        model = vision_transformer.vit_b_16(image_size=32)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    weights = model.state_dict()
    weights["encoder.pos_embedding"] = torch.randn(1, 1 + 14 * 14, 768)
    return {
        name.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"): x
        for name, x in weights.items()
    }


@pytest.fixture
def online(monkeypatch, published):
    """torchvision's loader hands out the stand-in and notes how it was asked."""
    asked = []

    def load(url, **options):
        asked.append((url, options))
        return dict(published)

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", load)
    return asked


def test_known_names_have_weights_at_torchvision():
    from torchvision.models import get_weight

    from minivit.transfer import MODELS

    assert {"vit_b_16", "vit_b_32", "vit_l_16"} <= MODELS.keys()
    for name, (build, weights_name) in MODELS.items():
        weights = get_weight(weights_name)
        assert build is getattr(minivit, name)
        with torch.device("meta"):
            count = sum(p.numel() for p in build().parameters())
        assert weights.meta["num_params"] == count
        assert weights.transforms().crop_size == [224]
        assert weights.url.endswith(".pth")


def test_unknown_name():
    with pytest.raises(ValueError, match=r"'vit_b_16', 'vit_b_32', 'vit_l_16'.*'vit'"):
        pretrained("vit")


def test_equals_torchvision(cache, online, published):
    model = pretrained("vit_b_16")
    assert not model.training
    theirs = vision_transformer.vit_b_16().eval()
    theirs.load_state_dict(dict(published))
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(model(images), theirs(images), atol=1e-4, rtol=0)
    ((url, options),) = online
    assert url == ADDRESS
    assert options["check_hash"] is True
    assert options["weights_only"] is True


def test_another_resolution_and_head(cache, online, published):
    model = pretrained("vit_b_16", image_size=(32, 64), num_classes=3, progress=False)
    assert online[0][1]["progress"] is False
    assert model.head.weight.shape == (3, 768)
    assert model.head.weight.eq(0).all()
    expected = minivit.resample_positions(published["encoder.pos_embedding"], (2, 4))
    assert model.pos_embed.equal(expected)
    assert model(torch.randn(1, 3, 32, 64)).shape == (1, 3)


def test_no_classes_at_all(cache, online, published):
    model = pretrained("vit_b_16", image_size=32, num_classes=0, progress=False)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 0)


def test_no_network(cache, offline):
    with pytest.raises(OSError) as caught:
        pretrained("vit_b_16")
    message = str(caught.value)
    assert "could not be downloaded" in message
    assert "Temporary failure in name resolution" in message
    assert ADDRESS in message
    assert str(cache / "vit_b_16-c867db91.pth") in message
    assert "TORCH_HOME" in message
    assert list(cache.iterdir()) == []


def test_damaged_download(cache, monkeypatch):
    """torchvision's own loader finds it out; what it fetched is not kept."""
    served = cache.parent / "served.pth"
    served.write_bytes(b"not what was published")
    genuine = urllib.request.urlopen
    monkeypatch.setattr(
        torch.hub, "urlopen", lambda *args, **kwargs: genuine(served.as_uri())
    )
    with pytest.raises(RuntimeError) as caught:
        pretrained("vit_b_16", progress=False)
    digest = hashlib.sha256(served.read_bytes()).hexdigest()
    assert "damaged or replaced" in str(caught.value)
    assert "c867db91" in str(caught.value)
    assert digest in str(caught.value)
    assert ADDRESS in str(caught.value)
    assert list(cache.iterdir()) == []


def test_damaged_file_in_the_cache(cache, offline):
    """A broken file from an earlier day is named, not read."""
    file = cache / "vit_b_16-c867db91.pth"
    torch.save({"class_token": torch.zeros(1)}, file)
    with pytest.raises(RuntimeError) as caught:
        pretrained("vit_b_16")
    assert "expected c867db91" in str(caught.value)
    assert "Delete it" in str(caught.value)
    assert str(file) in str(caught.value)


def test_file_in_the_cache_needs_no_network(cache, offline, published, monkeypatch):
    """Whoever has fetched the file elsewhere can put it there."""
    import io

    buffer = io.BytesIO()
    torch.save(published, buffer)
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()[:8]
    # The stand-in has another hash than the published file: give it its own address.
    address = ADDRESS.replace("c867db91", digest)
    monkeypatch.setattr(type(ViT_B_16_Weights.IMAGENET1K_V1), "url", address)
    (cache / f"vit_b_16-{digest}.pth").write_bytes(buffer.getvalue())
    model = pretrained("vit_b_16")
    assert model.cls_token.equal(published["class_token"])


# --- fine-tuning ---------------------------------------------------------------------


def a_step(model, parameters):
    optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1)
    for _ in range(2):  # the zero head lets nothing through at first
        loss = F.cross_entropy(model(images(3)), torch.tensor([0, 1, 4]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_a_new_head_knows_nothing_yet():
    model = randomise(vit()).double()
    x = images(2).double()
    body = model.features(x)
    assert new_head(model, 5) is model
    assert torch.equal(model.features(x), body)
    assert model(x).tolist() == [[0.0] * 5] * 2


@pytest.mark.parametrize(
    ("parts", "moves"),
    [
        (lambda m: [m.head], r"head\."),
        (
            lambda m: [m.encoder.layers[-1], m.encoder.norm, m.head],
            r"head\.|encoder\.norm|encoder\.layers\.1",
        ),
        (lambda m: [m], ""),
        (lambda m: [], "nothing"),
    ],
    ids=["probe", "partial", "full", "none"],
)
def test_what_is_frozen_stays_to_the_last_bit(parts, moves):
    model = new_head(randomise(vit()), 5)
    learning = freeze_all_but(model, *parts(model))
    before = copy.deepcopy(model.state_dict())
    if learning:
        a_step(model, learning)
    moved = {k for k, x in model.state_dict().items() if not x.equal(before[k])}
    assert moved == {name for name in before if re.match(moves, name)}


def test_a_part_of_another_copy_is_refused():
    model = vit()
    twin = copy.deepcopy(model)
    with pytest.raises(ValueError, match="Linear is no part of this model"):
        freeze_all_but(model, twin.head)
    assert all(p.requires_grad for p in model.parameters())
