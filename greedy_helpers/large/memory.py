"""Memory that runs out: the same work again, with batches half as large."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from ..surgery import undone_on_error
from . import distributed


def with_smaller_batches(step: Callable[..., Any]) -> Callable[..., Any]:
    """`step(model, block, streams, job)`, again with batches half as large whenever memory runs out.

    The block and the streams are put back before.

    Raises:
        What `step` raises; out of memory with one window per batch, or with several processes (whose batches have to
        go on in step), says what could be done.
    """

    @wraps(step)
    def repeated(model: Any, block: Any, streams: Any, job: Any) -> Any:
        while True:
            both = (streams.dense, streams.pruned)
            before = [(stream.hidden, stream.position) for stream in both]
            where = f"prune: block {streams.pruned.position}"
            try:
                with undone_on_error(block):
                    return step(model, block, streams, job)
            except RuntimeError as error:
                size = _halved(error, max(len(hidden) for hidden in before[0][0]), where)
            # here the error is gone, and with it the tensors that its traceback held
            _free()
            for stream, (hidden, position) in zip(both, before, strict=True):
                stream.move(hidden, position)
            together = streams.are_one
            streams.pruned.rebatch(size)
            if together:
                streams.dense.move(streams.pruned.hidden, streams.pruned.position)
            else:
                streams.dense.rebatch(size)

    return repeated


def at_smaller_batches(work: Callable[[int], Any], batch_size: int, where: str) -> Any:
    """`work(batch_size)`, from its beginning with half as many windows per batch whenever memory runs out."""
    while True:
        try:
            return work(batch_size)
        except RuntimeError as error:
            batch_size = _halved(error, batch_size, where)
        _free()


def _halved(error: RuntimeError, batch_size: int, where: str) -> int:
    """Half the batch, with a warning; or the error again, if it is another one or nothing can be halved."""
    if not _out_of_memory(error):
        raise error
    if batch_size == 1 or distributed.rank_and_size()[1] > 1:
        error.add_note(
            f"{where}: out of memory with {batch_size} windows per batch; expected a smaller batch_size, shorter "
            "windows, store='cpu' (hidden states), precision=torch.float32 (moments), or a larger device"
        )
        raise error
    message = str(error).splitlines()[0]
    warnings.warn(
        f"{where}: out of memory ({message}); going on with {batch_size // 2} windows per batch", stacklevel=4
    )
    return batch_size // 2


def _free() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _out_of_memory(error: RuntimeError) -> bool:
    from accelerate.utils.memory import should_reduce_batch_size  # knows the messages of every backend

    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)
