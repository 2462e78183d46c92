"""Tensors of two devices that meet are noticed without a GPU: on a device that is only pretended."""

import re
from dataclasses import replace

import pytest
import torch
from conftest import assert_same_model, assert_same_report, calibration
from test_field_text import per_layer
from tiny import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from greedy_helpers import FLAP, OSSCAR, PAPER, RECOMMENDED, BlockStream, prune

GPU = torch.device("cuda", 0)


aten = torch.ops.aten
# what may have operands on both: copies, and tensors of the GPU at indices that the CPU has
MOVES = (torch.Tensor.copy_, torch.Tensor.__getitem__, torch.Tensor.__setitem__, aten.copy_.default,
         aten._to_copy.default, aten.index.Tensor)  # fmt: skip


class OnGpu(torch.Tensor):
    """A tensor of the CPU that says it is on the GPU."""

    @staticmethod
    def __new__(cls, value):
        how = {"strides": value.stride(), "dtype": value.dtype, "device": GPU}
        self = torch.Tensor._make_wrapper_subclass(cls, value.shape, **how)
        self.value = value
        return self

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            try:
                return function(*args, **(kwargs or {}))
            except RuntimeError as error:  # some ask for the device itself before they come to the dispatch
                if not re.search("not linked with support|not supported for tensor subclasses", str(error)):
                    raise
            return computed(function, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return computed(function, args, kwargs or {})


class TwoDevices(TorchDispatchMode):
    """What is made without tensors, too, is where it was asked for."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return computed(function, args, kwargs or {})


def computed(function, args, kwargs):
    """The operation on the CPU, and its results on the device of its operands; refused where these are on two."""
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
    places = {isinstance(t, OnGpu) for t in tensors}
    numbers = all(t.ndim == 0 for t in tensors if not isinstance(t, OnGpu))  # of the CPU: they may meet everything
    if len(places) == 2 and not numbers and function not in MOVES:
        raise RuntimeError(f"{function}: operands on the CPU and on the GPU")
    on_gpu = True in places
    if kwargs.get("device") is not None:
        on_gpu = torch.device(kwargs["device"]).type == "cuda"
        kwargs = kwargs | {"device": torch.device("cpu")}
    kwargs = kwargs | ({"pin_memory": False} if kwargs.get("pin_memory") else {})
    inner_args, inner_kwargs = tree_map(lambda t: t.value if isinstance(t, OnGpu) else t, (args, kwargs))
    results = function(*inner_args, **inner_kwargs)
    if isinstance(function, torch._ops.OpOverload) and function._schema.name.endswith("_"):  # in place
        return args[0]
    return tree_map(lambda t: OnGpu(t) if isinstance(t, torch.Tensor) and on_gpu else t, results)


@pytest.fixture
def pretended(monkeypatch):
    torch._C._ensureCUDADeviceGuardSet()
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    with torch.no_grad(), TwoDevices():  # autograd would ask for streams of the GPU
        yield


# no prices in nats here: autograd would ask for streams of the GPU
UNPRICED = replace(RECOMMENDED, criterion="exact greedy", allocation="uniform")


@pytest.mark.parametrize("recipe", [PAPER, UNPRICED, FLAP, OSSCAR], ids=str)
@pytest.mark.parametrize("store", ["cpu", GPU], ids=str)
def test_a_run_with_its_blocks_on_another_device_gives_the_same_bits(recipe, store, pretended):
    model, expected = (tiny_model("llama", attention="eager", intermediate_size=20) for _ in range(2))
    report = prune(model, calibration(), 0.5, recipe, device=GPU, store=store, progress=False)
    assert not any(isinstance(parameter, OnGpu) for parameter in model.parameters()), "the blocks are at home again"
    assert_same_report(report, prune(expected, calibration(), 0.5, recipe, progress=False))
    assert_same_model(model, expected)


def test_what_one_batch_alone_is_called_with_waits_with_its_hidden_states(pretended):
    model, tokens = per_layer(), calibration()
    stream = BlockStream(model, tokens, 4, device=GPU, store="cpu")
    _, *others = (batch[1][1] for batch in stream._extra.values())
    for kwargs in others:
        assert not any(isinstance(extra, OnGpu) for extra in kwargs["extra"])
        assert all(isinstance(table, OnGpu) for table in kwargs["position_embeddings"])
    report = prune(model, tokens, 0.5, PAPER, batch_size=4, device=GPU, store="cpu", progress=False)
    expected = prune(per_layer(), tokens, 0.5, PAPER, batch_size=4, progress=False)
    assert [step.error for step in report.steps] == pytest.approx([step.error for step in expected.steps])


def test_operands_on_two_devices_are_refused(pretended):
    x, y = torch.ones(3, 3), torch.ones(3, 3, device=GPU)
    assert (y @ x.to(GPU)).device == GPU
    for meet in (lambda: x @ y, lambda: x + y, lambda: y[0].add_(x[0]), lambda: torch.cat([x, y])):
        with pytest.raises(RuntimeError, match="operands on the CPU and on the GPU"):
            meet()
