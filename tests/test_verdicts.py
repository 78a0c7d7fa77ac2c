"""What the checker says depends on the code it is shown, and on nothing else.

Not on the seed of the weights, nor on the processor's instructions or threads: those
decide the last bit of a float, which no verdict may rest on.
"""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from machines import MACHINES, can_be_played, environment, twin
from rounding import Rounding, round_updates_otherwise
from torch import nn
from verdicts import SUBJECTS, verdict

from minivit import EncoderLayer, MultiHeadAttention, check


@pytest.mark.parametrize("subject", SUBJECTS)
def test_one_verdict(subject):
    """With other weights, and with the rounding of another processor, the same."""
    assert verdict(subject, 0) == verdict(subject, 1, machine=1)


# The whole sweep: twenty seeds on each machine that this one can play.


def sweep(machine, *rounding):
    """The verdicts on all subjects, computed by a process of that machine."""
    file = Path(__file__).with_name("verdicts.py")
    done = subprocess.run(
        [sys.executable, file, "0", "19", *rounding],
        env=environment(machine),
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def here():
    return sweep("as it is")


@pytest.mark.slow
def test_one_verdict_for_all_seeds(here):
    assert not {subject: said for subject, said in here.items() if len(said) > 1}


@pytest.mark.slow
@pytest.mark.parametrize("machine", list(MACHINES)[1:])
def test_one_verdict_on_every_machine(machine, here):
    if not can_be_played(machine):
        pytest.skip("this processor lacks the instructions")
    if twin(machine):
        pytest.skip(f"a probe computes as on {twin(machine)!r}, bit for bit")
    assert sweep(machine) == here


@pytest.mark.slow
@pytest.mark.parametrize("rounding", ["1", "2"])
def test_one_verdict_with_every_operation_rounded_otherwise(rounding, here):
    assert sweep("as it is", rounding) == here


# The defects that this was made for ---------------------------------------------------


@pytest.mark.parametrize("machine", [contextlib.nullcontext(), Rounding(1)])
@pytest.mark.parametrize(("dim", "heads"), [(24, 4), (8, 2), (8, 1), (32, 8)])
def test_biases_of_keys_are_no_finding(dim, heads, machine):
    """Their gradient is zero but for rounding; exact zeros were taken for a mistake."""
    options = {"mask_name": "attn_mask", "mask_means": "hide"}
    for seed in range(8):
        torch.manual_seed(seed)
        module = nn.MultiheadAttention(dim, heads, batch_first=True)
        with machine:
            report = check.multi_head_attention(module, **options)
        assert report, report


@pytest.mark.parametrize("machine", [contextlib.nullcontext(), Rounding(1)])
def test_a_missing_projection_is_one_finding(machine):
    """On one processor it was two: the biases of the keys took part."""
    for seed in range(20):
        torch.manual_seed(seed)
        module = MultiHeadAttention(8, 2)
        module.out_proj = nn.Identity()
        with machine:
            report = check.multi_head_attention(module)
        assert [f.check for f in report.findings] == ["projection"], report


def test_weights_that_get_no_gradient_are_still_found():
    """The scale that zero is held against must not hide a weight without one."""

    class ThrownAway(EncoderLayer):
        def forward(self, x, *, mask=None):
            return x + 0.0 * super().forward(x, mask=mask)

    report = check.encoder_layer(ThrownAway(24, 4, 48))
    found = {f.check: f.symptom for f in report.findings}
    assert found["gradients"].endswith("is zero everywhere"), report


# The emulation itself -----------------------------------------------------------------


def test_rounding_changes_last_bits_and_repeats_itself():
    a, b = torch.randn(30, 40), torch.randn(40, 20)
    plain = a @ b
    with Rounding(1):
        one, again = a @ b, a @ b
    with Rounding(2):
        other = a @ b
    assert torch.equal(one, again)
    assert not torch.equal(one, plain)
    assert not torch.equal(one, other)
    torch.testing.assert_close(one, plain, rtol=3e-7, atol=0.0)
    with Rounding(1):
        assert torch.equal(a.T.clone(), a.T)


def test_updates_are_rounded_otherwise_until_it_is_removed():
    def trained():
        torch.manual_seed(0)
        layer = nn.Linear(20, 20)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        layer(torch.ones(1, 20)).square().sum().backward()
        optimizer.step()
        return layer.weight.detach()

    plain = trained()
    handle = round_updates_otherwise(1)
    other = trained()
    handle.remove()
    assert not torch.equal(plain, other)
    torch.testing.assert_close(plain, other, rtol=3e-7, atol=0.0)
    assert torch.equal(plain, trained())
