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
                if not _out_of_memory(error):
                    raise
                largest = max(len(hidden) for hidden in before[0][0])
                if largest == 1 or distributed.rank_and_size()[1] > 1:
                    error.add_note(
                        f"{where}: out of memory with {largest} windows per batch; expected a smaller batch_size, "
                        "shorter windows, store='cpu' (hidden states), precision=torch.float32 (moments), or a larger "
                        "device"
                    )
                    raise
                message = str(error).splitlines()[0]
            # here the error is gone, and with it the tensors that its traceback held
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            warnings.warn(
                f"{where}: out of memory ({message}); going on with {largest // 2} windows per batch", stacklevel=3
            )
            for stream, (hidden, position) in zip(both, before, strict=True):
                stream.move(hidden, position)
            together = streams.are_one
            streams.pruned.rebatch(largest // 2)
            if together:
                streams.dense.move(streams.pruned.hidden, streams.pruned.position)
            else:
                streams.dense.rebatch(largest // 2)

    return repeated


def _out_of_memory(error: RuntimeError) -> bool:
    from accelerate.utils.memory import should_reduce_batch_size  # knows the messages of every backend

    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)
