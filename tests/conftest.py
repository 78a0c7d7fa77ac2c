"""What all tests share: the same threads, the same seed, the same examples."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

# Everything is repeatable: the examples depend on the test alone, not on the clock.
# `pytest --hypothesis-profile=explore` looks further, with new examples each time.
settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("explore", deadline=None, max_examples=500)
settings.load_profile("ci")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # several workers share the cores


@pytest.fixture(autouse=True)
def seed():
    """Start each test from the same random state, whatever ran before it."""
    torch.manual_seed(0)
