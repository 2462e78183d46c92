"""Models that are larger than the device, and runs that are longer than the patience of a machine.

*Residency*: pruning works on one block at a time, so only that block has to be on the device. The others stay where
they are at home, in the CPU's memory or, after `load_model(..., lazy=True)`, in the safetensors files on the disk.
*Work folder*: every finished block is committed to a folder at once and for good; a killed run goes on behind it.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from . import distributed
from .structure import blocks_of, blocks_path, depth2_modules, input_device
from .surgery import remove_units, undone_on_error

T = TypeVar("T")

# --- residency


def entries(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, dict[str, Any], str, Tensor]]:
    """Every parameter and buffer below `module`: (full name, the dict that holds it, its key there, the tensor)."""
    for path, part in module.named_modules(prefix=prefix):
        for holder in (part._parameters, part._buffers):
            for key, value in list(holder.items()):
                if value is not None:
                    yield f"{path}.{key}".lstrip("."), holder, key, value


def is_lazy(model: PreTrainedModel) -> bool:
    """Whether the weights of the model's blocks are on the disk (:func:`~greedy_helpers.checkpoint.load_model`)."""
    return hasattr(model, "weights_on_disk")


def read_weight(model: PreTrainedModel, name: str, device: torch.device | str | None = None) -> Tensor:
    """One weight of a lazy model, in the model's dtype: memory of its own, not a view of the file."""
    file, key = model.weights_on_disk[name]
    with safe_open(file, "pt") as weights:
        return weights.get_tensor(key).to(device or "cpu", model.get_parameter(name).dtype, copy=True)


@contextmanager
def resident(model: PreTrainedModel, index: int, device: torch.device | str | None = None) -> Iterator[nn.Module]:
    """Block `index` with all its weights on `device`; afterwards it is at home again, with whatever was changed.

    Home is the device on which it was found, and the disk for a lazy model: there weights are dropped when they leave,
    so what was changed has to be written before (:meth:`WorkFolder.commit`). Weights that nobody replaced are not
    copied back. A block that is on `device` already is left as it is.

    Raises:
        RuntimeError: weights on the meta device of a model that was not loaded with `lazy=True`.
    """
    block = blocks_of(model)[index]
    prefix = f"{blocks_path(model)}.{index}"
    lazy, moved = is_lazy(model), {}
    home = next(block.parameters()).device
    device = input_device(model) if device is None else torch.device(device)
    try:
        for name, holder, key, value in entries(block, prefix):
            if value.is_meta and not lazy:
                raise RuntimeError(
                    f"{name}: expected a weight, found a placeholder (a model that accelerate offloaded?); load the "
                    "model with lazy=True to leave its blocks on the disk"
                )
            here = read_weight(model, name, device) if value.is_meta else value.to(device)
            if here is not value:
                holder[key] = same_kind(value, here)
                moved[id(holder[key])] = holder[key], value  # both kept alive, so that ids stay unique
        yield block
    finally:
        for _, holder, key, value in entries(block, prefix):
            if id(value) in moved:
                holder[key] = moved[id(value)][1]
            elif moved and not value.is_meta:  # replaced while it was here
                holder[key] = same_kind(value, value.to(home if isinstance(value, nn.Parameter) or not lazy else "cpu"))


def same_kind(old: Tensor, value: Tensor) -> Tensor:
    """`value` as what `old` is: a parameter, or a plain tensor (a buffer)."""
    return nn.Parameter(value.detach(), requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else value


def with_smaller_batches(work: Callable[[], T], block: nn.Module, streams: Mapping[str, Any], where: str) -> T:
    """`work()`, again with batches half as large whenever memory runs out; `block` and streams are put back before.

    Args:
        streams: things with `hidden` and `rebatch`, see :class:`~greedy_helpers.capture.BlockStream`.
        where: what to call the work in messages.

    Raises:
        What `work` raises; out of memory with one window per batch, or with several processes (whose batches have to
        go on in step), says what could be done.
    """
    while True:
        before = [stream.hidden for stream in streams.values()]
        try:
            with undone_on_error(block):
                return work()
        except RuntimeError as error:
            if not _out_of_memory(error):
                raise
            largest = max(len(hidden) for hidden in before[0])
            if largest == 1 or distributed.rank_and_size()[1] > 1:
                error.add_note(
                    f"{where}: out of memory with {largest} windows per batch; expected a smaller batch_size, shorter "
                    "windows, store='cpu' (hidden states), precision=torch.float32 (moments), or a larger device"
                )
                raise
            found = str(error).splitlines()[0]
        # here the error is gone, and with it the tensors that its traceback held
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        warnings.warn(f"{where}: out of memory ({found}); going on with {largest // 2} windows per batch", stacklevel=3)
        for stream, hidden in zip(streams.values(), before, strict=True):
            stream.hidden = hidden
            stream.rebatch(largest // 2)


def _out_of_memory(error: RuntimeError) -> bool:
    from accelerate.utils.memory import should_reduce_batch_size  # knows the messages of every backend

    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)


# --- work folder


class WorkFolder:
    """The finished blocks of one run of :func:`~greedy_helpers.prune.prune`, in a folder.

    A block counts as finished when its record is there, which is written last; each file is written under another name,
    forced to the disk and renamed. So whenever the process dies, the folder holds whole blocks and nothing else, and
    what the run needs to go on (the hidden states behind them) follows from them by running them once more.

    With several processes the first one writes, and all of them read.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]) -> None:
        """Opens a folder for a run with `settings` (JSON values), or the one that such a run has left.

        Raises:
            ValueError: it holds a run with other settings, naming those that differ.
            FileExistsError: `folder` is a file.
        """
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise FileExistsError(f"work_dir: expected a folder, or nothing, at {self.folder}, found a file")
        if distributed.is_first():
            self.folder.mkdir(parents=True, exist_ok=True)
            for left_over in self.folder.glob(".*.partial"):
                left_over.unlink()
            if not self._settings.exists():
                _write_json(self._settings, settings)
        self.finished = distributed.from_first(self._count_finished())
        found, expected = json.loads(self._settings.read_text()), json.loads(json.dumps(settings))
        if differing := [key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key)]:
            changes = "; ".join(f"{k} was {found.get(k)!r}, is now {expected.get(k)!r}" for k in sorted(differing))
            raise ValueError(f"{self.folder} holds a run with other settings: {changes}. Name another work_dir")

    @property
    def _settings(self) -> Path:
        return self.folder / "settings.json"

    def _record(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.json"

    def _weights(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.safetensors"

    def _count_finished(self) -> int:
        count = 0
        while self._record(count).exists():
            count += 1
        return count

    def commit(self, model: PreTrainedModel, index: int, record: Mapping[str, Any]) -> None:
        """Write block `index`, with all its weights in memory, and its `record`; a lazy model's block is then there."""
        block, record = blocks_of(model)[index], dict(record)
        weights = block.state_dict(prefix=f"{blocks_path(model)}.{index}.")
        if distributed.is_first():
            if record["steps"]:  # else the block is as it was
                partial = _partial(self._weights(index))
                save_file({name: value.detach().cpu().contiguous() for name, value in weights.items()}, partial)
                record["sha256"] = sha256_of(partial)
                _put_in_place(partial, self._weights(index))
            _write_json(self._record(index), record)
        self.finished = distributed.from_first(index + 1)
        if record["steps"]:
            self._now_here(model, index, weights)

    def record(self, index: int) -> dict[str, Any]:
        """What was committed with block `index`."""
        return json.loads(self._record(index).read_text())

    def restore(self, model: PreTrainedModel, index: int) -> None:
        """Give the still dense block `index` the sizes and weights that were committed.

        Raises:
            ValueError: the file is not the one that was written.
        """
        record, file = self.record(index), self._weights(index)
        if not record["steps"]:
            return
        if sha256_of(file) != record["sha256"]:
            raise ValueError(f"{file} is not the file that was written; delete {self.folder} to start again")
        modules = {module.name: module for module in depth2_modules(model, [index])}
        for step in record["steps"]:
            remove_units(modules[step["name"]], torch.tensor(step["keep"], dtype=torch.long, device="cpu"))
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118, not a dict
                path, _, key = name.rpartition(".")
                owner = model.get_submodule(path)
                old = getattr(owner, key)
                like = owner.weight if old is None else old  # a bias that the dense layer has not
                value = weights.get_tensor(name).to(like.device, copy=True)
                setattr(owner, key, value if key in owner._buffers else same_kind(like, value))
            self._now_here(model, index, weights.keys())

    def _now_here(self, model: PreTrainedModel, index: int, names: Iterable[str]) -> None:
        if is_lazy(model):
            model.weights_on_disk.update({name: (str(self._weights(index)), name) for name in names})


def fingerprint(model: PreTrainedModel) -> str:
    """A digest of a model's weights: changes when one of them does. One pass over them, on their device.

    Of a lazy model only samples of its files are read.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {list(parameter.shape)} {parameter.dtype}".encode())
        if not parameter.is_meta:
            flat = parameter.detach().flatten()
            bits = flat.view(_BITS[flat.dtype.itemsize])
            # sums of integers do not depend on their order, so not on the number of threads either
            digest.update(str(bits.sum(dtype=torch.int64).item()).encode())
            digest.update(bits[:: max(1, len(bits) // 1024)].cpu().numpy().tobytes())
    for file in sorted({file for file, _ in getattr(model, "weights_on_disk", {}).values()}):
        size = os.path.getsize(file)
        digest.update(f"{Path(file).name} {size}".encode())
        with open(file, "rb") as content:
            for place in range(0, size, max(4096, size // 256)):
                content.seek(place)
                digest.update(content.read(4096))
    return digest.hexdigest()


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def sha256_of(path: Path) -> str:
    """The checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def _put_in_place(partial: Path, path: Path) -> None:
    """Rename, with the content forced to the disk before and the new name after."""
    for what, then in ((partial, lambda: os.replace(partial, path)), (path.parent, lambda: None)):
        handle = os.open(what, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        then()


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    partial = _partial(path)
    partial.write_text(json.dumps(value, indent=1) + "\n")
    _put_in_place(partial, path)
