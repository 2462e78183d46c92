"""Work folder: every finished block is committed to it at once; a killed run continues after the last of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..files import remove_partial, replace_file, sha256_of
from ..report import PruneStep
from ..stream import Streams
from ..structure import blocks_of, blocks_path, depth2_modules
from ..surgery import remove_units
from . import distributed
from .lazy import fingerprint, is_lazy, same_kind

Step = Callable[..., tuple[list[PruneStep], float]]


def resumed(step: Step, work: WorkFolder) -> Step:
    """`step(model, block, streams, job)`, committed to the folder; or, of a block that is there already, its result.

    The same batches give the streams the same bits.
    """

    @wraps(step)
    def committed(
        model: PreTrainedModel, block: nn.Module, streams: Streams, job: object
    ) -> tuple[list[PruneStep], float]:
        index = streams.pruned.position
        if index < work.finished:
            return _replay(work, model, block, streams)
        steps, stream_error = step(model, block, streams, job)
        record = {
            "steps": [s.to_dict() | {"scores dtype": str(s.scores.dtype).removeprefix("torch.")} for s in steps],
            "stream_error": stream_error,
            "batch_size": max(len(hidden) for hidden in streams.pruned.hidden),
        }
        work.commit(model, index, record)
        return steps, stream_error

    return committed


def _replay(
    work: WorkFolder, model: PreTrainedModel, block: nn.Module, streams: Streams
) -> tuple[list[PruneStep], float]:
    index = streams.pruned.position
    record, one = work.record(index), streams.are_one
    for stream in (streams.dense, streams.pruned):
        if record["batch_size"] < max(len(hidden) for hidden in stream.hidden):  # memory ran out in this block
            stream.rebatch(record["batch_size"])
    streams.dense.advance(block)
    if one and not record["steps"]:
        streams.pruned.move(streams.dense.hidden, index + 1)
    else:
        work.restore(model, index)
        streams.pruned.advance(block)
    return [_step_of(step) for step in record["steps"]], record["stream_error"]


def _step_of(step: dict[str, Any]) -> PruneStep:
    scores = torch.tensor(step["scores"], dtype=getattr(torch, step.pop("scores dtype")), device="cpu")
    return PruneStep(**step | {"scores": scores, "keep": torch.tensor(step["keep"], dtype=torch.long, device="cpu")})


def settings_of(model: PreTrainedModel, calibration: Tensor, **asked: Any) -> dict[str, Any]:
    """All that the result of a run depends on, as far as it can be known from outside; functions by their names."""
    return {
        **asked,
        "calibration": f"{list(calibration.shape)} {hashlib.sha256(calibration.cpu().numpy().tobytes()).hexdigest()}",
        "model": fingerprint(model),
        "attention": model.config._attn_implementation,
        "processes": distributed.rank_and_size()[1],
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }


class WorkFolder:
    """The finished blocks of one run of :func:`~greedy_helpers.pruning.prune`, in a folder.

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
            remove_partial(self.folder)
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
                tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}

                def write(partial: Path) -> None:
                    save_file(tensors, partial)
                    record["sha256"] = sha256_of(partial)

                replace_file(self._weights(index), write)
            _write_json(self._record(index), record)
        self.finished = distributed.from_first(index + 1)
        if record["steps"]:
            self._point_to_work_folder(model, index, weights)

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
        unit = {step["name"]: "kv" if step["unit"] == "KV head" else "query" for step in record["steps"]}
        modules = {module.name: module for module in depth2_modules(model, [index], unit=unit)}
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
            self._point_to_work_folder(model, index, weights.keys())

    def _point_to_work_folder(self, model: PreTrainedModel, index: int, names: Iterable[str]) -> None:
        if is_lazy(model):
            model.weights_on_disk.update({name: (str(self._weights(index)), name) for name in names})


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    replace_file(path, lambda partial: partial.write_text(json.dumps(value, indent=1) + "\n"))
