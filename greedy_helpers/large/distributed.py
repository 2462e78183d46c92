"""Several processes, one result: every process sees its share of the calibration windows, sums are taken over all.

Without `torch.distributed`, or alone in it, every function here does nothing. With it (`torchrun`), each process holds
the whole model, or one block of it at a time, takes every `size`-th window, and all of them come to the same weights.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


def start(device: str | torch.device | None = None, timeout: float = 600) -> torch.device | None:
    """Join the processes that `torchrun` started, and choose this one's device; without torchrun nothing happens.

    Args:
        device: `"cpu"` (gloo) or `"cuda"` (nccl, one GPU per process); default: CUDA where there is one.
        timeout: seconds that a process waits for the others before it gives up with an error.

    Returns:
        The device, e.g. `cuda:1`; `device` itself without torchrun.
    """
    device = None if device is None else torch.device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout))
    return device


def rank_and_size() -> tuple[int, int]:
    """(this process's rank, number of processes); (0, 1) without `torch.distributed`."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_first() -> bool:
    """Whether this process is the one that writes files and speaks."""
    return rank_and_size()[0] == 0


def finish() -> None:
    """Wait for the other processes (the first may still be writing) and leave them."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def share_of(windows: Tensor) -> Tensor:
    """This process's share of `windows` [n, ...]: every size-th one.

    Raises:
        ValueError: fewer windows than processes.
    """
    rank, size = rank_and_size()
    if len(windows) < size:
        raise ValueError(f"expected at least one calibration window for each of {size} processes, found {len(windows)}")
    return windows[rank::size]


def all_sum(*tensors: Tensor) -> None:
    """Replace each tensor, in place, by its sum over all processes. All of them get the same bits."""
    if rank_and_size()[1] > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def all_sums(*numbers: float) -> list[float]:
    """The sum of each number over all processes."""
    if rank_and_size()[1] == 1:
        return list(numbers)
    total = torch.tensor(numbers, dtype=torch.float64, device=_here())
    all_sum(total)
    return total.tolist()


def all_windows(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """The batches of all processes, in the order of the windows that :func:`share_of` dealt out.

    For what depends on single windows and not on sums. Every process has to go through them.
    """
    rank, size = rank_and_size()
    if size == 1:
        yield from batches
        return
    iterator = iter(batches)
    while True:
        mine = next(iterator, None)
        shapes: list = [None] * size
        dist.all_gather_object(shapes, None if mine is None else (mine.shape, mine.dtype))
        if not any(shapes):
            return
        parts = []
        for source, shape in enumerate(shapes):
            if shape is None:
                continue
            part = mine.contiguous() if source == rank else torch.empty(shape[0], dtype=shape[1], device=_here())
            dist.broadcast(part, source)
            parts.append(part)
        longest = max(len(part) for part in parts)
        yield torch.stack([part[i] for i in range(longest) for part in parts if i < len(part)])


def check_same(what: str, values: Tensor) -> None:
    """Refuse to go on where the processes came to different `values` (any dtype).

    Raises:
        RuntimeError: in every process.
    """
    size = rank_and_size()[1]
    if size == 1:
        return
    digest = hashlib.sha256(values.detach().cpu().numpy().tobytes()).digest()
    mine = torch.tensor(list(digest), dtype=torch.float64, device=_here())
    total = mine.clone()
    all_sum(total)
    if any(all_sums(float((total != mine * size).any()))):
        raise RuntimeError(
            f"{what}: expected the same in all {size} processes, found different ones: do they have the same model, "
            "calibration tokens, settings and hardware?"
        )


def from_first(value: object) -> object:
    """What the first process has, in all of them."""
    if rank_and_size()[1] == 1:
        return value
    found = [value]
    dist.broadcast_object_list(found, 0)
    return found[0]


def _here() -> torch.device:
    """Where the process group's tensors live."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
