"""The main job: walk the model once, module by module; refit, score, cut, refit."""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .allocation import Plan, check_plan, check_ratio, keep_best, n_removed
from .capture import BlockStream
from .cost import count_parameters
from .criteria import Criterion, Seen, second_moment
from .distributed import all_sum, all_sums, all_windows, check_same, is_first, rank_and_size, share_of
from .evaluate import check_tokens
from .families import Kind
from .large import WorkFolder, fingerprint, is_lazy, resident, with_smaller_batches
from .moments import Moments
from .reconstruct import Solution, add_to_bias
from .reconstruct import refit as refit_linears
from .structure import Depth2Module, UnsupportedModule, blocks_of, blocks_path, depth2_modules, family_of, weight_of
from .surgery import remove_units, undone_on_error

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Refit = Literal[None, "pre", "post", "both", "bias"]
Target = Literal["dense", "local", "residual"]


@dataclass(frozen=True)
class PruneStep:
    """What happened to one module.

    Attributes:
        scores: the criterion's values, [units_before]; keep: the surviving units.
        error_cut, error: relative squared error of the module's output against the targets on the calibration tokens
            (0 = equal, 1 = as bad as silence), after the cut and after the last refit. With the dense model's outputs
            as targets it contains what the pruned prefix already broke.
        rank, condition: of the last refit's X'X and X'X + lam I, see :class:`~greedy_helpers.reconstruct.Solution`;
            None without a refit.
    """

    name: str
    kind: str
    block: int
    units_before: int
    units_after: int
    error_cut: float
    error: float
    seconds: float
    rank: int | None
    condition: float | None
    scores: Tensor = field(repr=False)
    keep: Tensor = field(repr=False)


@dataclass(frozen=True)
class PruneReport:
    """What :func:`prune` did: its settings and one step per module, in order.

    Attributes:
        ratio: the share of units asked for, None if a plan said it.
        parameters: `"blocks"` and `"total"` -> [before, after]: the same cut is a smaller share of the whole model.
        stream_errors: relative squared error of the residual stream behind every block that was visited, against the
            dense model's: what all modules up to there have broken together, whatever their targets.
    """

    ratio: float | None
    criterion: str
    refit: Refit
    target: Target
    damp: float
    tokens: int
    parameters: dict[str, list[int]]
    stream_errors: list[float]
    steps: list[PruneStep]

    @property
    def seconds(self) -> float:
        return sum(step.seconds for step in self.steps)

    def to_frame(self) -> pd.DataFrame:
        """One row per module, without the tensors."""
        rows = [{k: v for k, v in vars(step).items() if k not in ("scores", "keep")} for step in self.steps]
        return pd.DataFrame(rows)

    def figure(self) -> Figure:
        """Units left and errors per module: see :func:`~greedy_helpers.course.plots.prune_steps`."""
        from matplotlib import pyplot as plt  # here, so that importing the package does not import matplotlib

        from .course import plots

        fig, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained", facecolor="white")
        plots.prune_steps(axes, self.to_frame())
        plt.close(fig)  # shown where it is returned to, and not a second time
        return fig

    def to_dict(self, tensors: bool = True) -> dict:
        """Plain numbers, strings and lists, ready for JSON; without scores and kept units if not `tensors`."""
        steps = [_plain(step) for step in self.steps]
        if not tensors:
            steps = [{k: v for k, v in step.items() if k not in ("scores", "keep")} for step in steps]
        return {**{k: v for k, v in vars(self).items() if k != "steps"}, "steps": steps}

    def to_json(self, tensors: bool = False) -> str:
        """:meth:`to_dict` as text."""
        return json.dumps(self.to_dict(tensors), indent=1)


def prune(
    model: PreTrainedModel,
    calibration: Tensor,
    ratio: float | Plan,
    *,
    criterion: Criterion = second_moment,
    refit: Refit = None,
    target: Target = "dense",
    blocks: Iterable[int] | None = None,
    kinds: Iterable[Kind] | None = None,
    damp: float = 1e-2,
    batch_size: int = 16,
    device: torch.device | str | None = None,
    store: torch.device | str | None = None,
    precision: torch.dtype = torch.float64,
    work_dir: str | Path | None = None,
    progress: bool = True,
) -> PruneReport:
    """Remove a share of the units of every depth-2 module, in place, without training (Algorithms 1, 3 and 4).

    Modules are visited in execution order, so each one is scored and refitted on the inputs that the already pruned
    prefix gives it. `refit` chooses the recovery:

    - `None`: cut only.
    - `"pre"` (the paper's section 3.3): level 1 is refitted to the dense level-1 outputs, level 2 to the dense level-2
      outputs, then scores are taken and units cut.
    - `"post"`: units are cut first, then level 2 is refitted on its surviving inputs.
    - `"both"`: pre, cut, post.
    - `"bias"` (FLAP's remedy): after the cut, the dense mean of what was removed becomes part of level 2's bias.

    `target` says what level 2 shall put out:

    - `"dense"` (the paper): what the module puts out in the dense model.
    - `"local"`: what the module, still whole, puts out behind the pruned prefix (only with `refit="post"`).
    - `"residual"`: the dense output plus what the residual stream lacks in front of the module, so that it also repairs
      what the prefix broke. For blocks that add their modules' outputs to the stream as they are.

    Args:
        calibration: long [n, seq], packed and never padded.
        ratio: share of units to remove from each module, in [0, 1); floor(ratio * units) go. Or a plan, module name
            -> units to keep, as the functions in `allocation.py` make it; modules it does not name keep all.
        criterion: (module, seen) -> scores [units], higher = keep.
        blocks: the blocks to prune (default: all). The paper leaves LLaMA's first four and last two alone.
        kinds: the kinds of modules to prune, among `"attention"`, `"ffn"`, `"gated_ffn"`; default: all that can be
            cut, with a warning if a kind has to stay whole in this family.
        damp: see :func:`~greedy_helpers.reconstruct.least_squares`.
        batch_size: windows per forward pass; changes memory and speed, not the result. It is halved, with a warning,
            when memory runs out.
        device: where the block at hand and one batch are worked on; default: where the model is. With another device
            than the model's, one block at a time is there; so a model in the CPU's memory, or on the disk
            (`load_model(..., lazy=True)`), can be pruned on a GPU that has room for one of its blocks.
        store: where the hidden states of all tokens wait; default: `device`. `"cpu"` saves memory on a GPU.
        precision: dtype of the summed moments and of the solves, see :class:`~greedy_helpers.moments.Moments`.
        work_dir: a folder to which every finished block is committed. A call with the same model, tokens and settings
            goes on behind the last one and ends with the same bits as if nothing had happened. A lazy model needs one:
            its pruned blocks live there until :func:`~greedy_helpers.checkpoint.save_pruned` collects them.

    Under `torchrun` (see :mod:`greedy_helpers.distributed`) every process gives the same arguments; each runs its share
    of the windows, and all end with the same model.

    Returns:
        A report with one step per module.

    Raises:
        UnknownFamily, UnsupportedModule, TypeError, ValueError, IndexError: bad arguments, before anything is touched.
        FloatingPointError: NaN or Inf in weights or activations, naming the layer.
        Whatever is raised, or interrupted, the model is left as it was. What `work_dir` holds, stays.
    """
    if isinstance(ratio, Mapping):
        check_plan(model, ratio)
    else:
        check_ratio(ratio)
    check_tokens(model, calibration)
    before = count_parameters(model)
    if refit not in (None, "pre", "post", "both", "bias"):
        raise ValueError(f"prune: expected refit None, 'pre', 'post', 'both' or 'bias', found {refit!r}")
    if target not in ("dense", "local", "residual"):
        raise ValueError(f"prune: expected target 'dense', 'local' or 'residual', found {target!r}")
    if target == "local" and refit in ("pre", "both"):
        raise ValueError(
            "prune: target='local' is what the module puts out before the cut, so a refit before it would change "
            f"nothing; expected refit='post', found {refit!r}"
        )
    chosen = sorted(set(range(len(blocks_of(model))) if blocks is None else blocks))
    found = [(m.block, m.name, m.kind) for m in depth2_modules(model, chosen, kinds)]  # refuses what does not exist
    if kinds is None:
        for path, reason in family_of(model).whole.items():
            warnings.warn(f"{model.config.model_type}: {path} stays whole: {reason}", stacklevel=2)
    if len(places := sorted({str(place) for place in getattr(model, "hf_device_map", {}).values()})) > 1:
        raise ValueError(
            f"prune: accelerate has spread the model over {', '.join(places)}; expected one place: load it without "
            "device_map, or with lazy=True and a work_dir if that is too small"
        )
    if is_lazy(model) and work_dir is None:
        raise ValueError(
            "prune: the model's blocks are on the disk; expected a work_dir for the pruned ones, found None"
        )
    _check_weights(model)
    method = _Method(ratio, criterion, refit, target, damp, precision)
    work = None
    if work_dir is not None:
        settings = _settings(model, calibration, method, chosen, sorted({kind for *_, kind in found}), batch_size)
        work = WorkFolder(work_dir, settings)

    was_training = model.training
    model.eval()
    steps: list[PruneStep] = []
    stream_errors: list[float] = []
    bar = tqdm(total=len(found), desc="prune", unit="module", disable=not progress or not is_first())
    try:
        with undone_on_error(model), bar:
            pruned = BlockStream(model, share_of(calibration), batch_size, device=device, store=store)
            dense = pruned.share()
            streams = {"dense": dense, "pruned": pruned}
            for index in range(max(chosen, default=-1) + 1):
                here = [name for number, name, _ in found if number == index]
                with resident(model, index, pruned.device) as block:
                    if is_lazy(model):
                        _check_weights(block, f"{blocks_path(model)}.{index}.")
                    if work is not None and index < work.finished:
                        done, stream_error = _replay(work, model, index, block, **streams)
                    else:
                        how = partial(_prune_block, model, index, block, here, method, bar=bar, **streams)
                        done, stream_error = with_smaller_batches(how, block, streams, f"prune: block {index}")
                        if work is not None:
                            work.commit(model, index, _to_record(done, stream_error, pruned))
                steps += done
                stream_errors.append(stream_error)
                bar.update(len(steps) - bar.n)
    finally:
        model.train(was_training)
    after = count_parameters(model)
    return PruneReport(
        None if isinstance(ratio, Mapping) else float(ratio),
        _name_of(criterion),
        refit,
        target,
        damp,
        calibration.numel(),
        {key: [before[key], after[key]] for key in before},
        stream_errors,
        steps,
    )


@dataclass(frozen=True)
class _Method:
    """What :func:`prune` does to a module: its arguments of the same names."""

    ratio: float | Plan
    criterion: Criterion
    refit: Refit
    target: Target
    damp: float
    precision: torch.dtype

    def n_keep(self, module: Depth2Module) -> int:
        if isinstance(self.ratio, Mapping):
            return self.ratio.get(module.name, module.n_units)
        return module.n_units - n_removed(module.n_units, self.ratio)


def _prune_block(
    model: PreTrainedModel,
    index: int,
    block: nn.Module,
    names: Sequence[str],
    method: _Method,
    *,
    dense: BlockStream,
    pruned: BlockStream,
    bar: tqdm,
) -> tuple[list[PruneStep], float]:
    """Prune the modules `names` of one block and move both streams behind it: the steps and the stream's error."""
    steps = []
    # the residual target follows the stream through all modules of the block, cut or not
    modules = [m for m in depth2_modules(model, [index]) if names and (method.target == "residual" or m.name in names)]
    targets = [DenseTargets(module, means=method.refit == "bias", keep=dense.keep) for module in modules]
    in_front = dense.hidden
    advance_dense(dense, block, index, targets)  # before anything in the block changes: no second copy
    if names and method.target == "residual":
        _check_additive(index, in_front, dense.hidden, targets)
        pairs = zip(in_front, pruned.hidden, strict=True)
        drift = [dense.keep((d.to(dense.device) - p.to(dense.device)).flatten(0, -2)) for d, p in pairs]
        for dense_targets in targets:
            dense_targets.drift = drift  # one list: what the stream lacks now
    for module, dense_targets in zip(modules, targets, strict=True):
        if module.name in names:
            steps.append(_prune_module(module, block, pruned, dense_targets, method))
            bar.set_postfix_str(f"{module.name}: error {steps[-1].error:.3f}")
            bar.update()
        if dense_targets.drift is not None and module is not modules[-1]:
            dense_targets.move_drift(pruned, block, module)
    pruned.advance(block, index)
    return steps, _stream_error(dense.hidden, pruned.hidden, pruned.device)


def _replay(
    work: WorkFolder, model: PreTrainedModel, index: int, block: nn.Module, *, dense: BlockStream, pruned: BlockStream
) -> tuple[list[PruneStep], float]:
    """What :func:`_prune_block` did, from the work folder: the same batches give the streams the same bits."""
    record = work.record(index)
    for stream in (dense, pruned):
        if record["batch_size"] < max(len(hidden) for hidden in stream.hidden):  # memory ran out in this block
            stream.rebatch(record["batch_size"])
    dense.advance(block, index)
    work.restore(model, index)
    pruned.advance(block, index)
    return [_from_record(step) for step in record["steps"]], record["stream_error"]


def _to_record(steps: Sequence[PruneStep], stream_error: float, stream: BlockStream) -> dict[str, Any]:
    return {
        "steps": [_plain(step) | {"scores dtype": str(step.scores.dtype).removeprefix("torch.")} for step in steps],
        "stream_error": stream_error,
        "batch_size": max(len(hidden) for hidden in stream.hidden),
    }


def _from_record(step: dict[str, Any]) -> PruneStep:
    scores = torch.tensor(step["scores"], dtype=getattr(torch, step.pop("scores dtype")), device="cpu")
    keep = torch.tensor(step["keep"], dtype=torch.long, device="cpu")
    return PruneStep(**step | {"scores": scores, "keep": keep})


def _plain(step: PruneStep) -> dict[str, Any]:
    return {k: v.tolist() if isinstance(v, Tensor) else v for k, v in asdict(step).items()}


def _settings(
    model: PreTrainedModel,
    calibration: Tensor,
    method: _Method,
    blocks: Sequence[int],
    kinds: Sequence[Kind],
    batch_size: int,
) -> dict[str, Any]:
    """All that the result of a run depends on, as far as it can be told from outside; a criterion by its name."""
    return {
        **{key: value for key, value in vars(method).items() if key in ("refit", "target", "damp")},
        "ratio": dict(method.ratio) if isinstance(method.ratio, Mapping) else method.ratio,
        "criterion": _name_of(method.criterion),
        "precision": str(method.precision),
        "blocks": list(blocks),
        "kinds": list(kinds),
        "batch_size": batch_size,
        "calibration": f"{list(calibration.shape)} {hashlib.sha256(calibration.cpu().numpy().tobytes()).hexdigest()}",
        "model": fingerprint(model),
        "attention": model.config._attn_implementation,
        "processes": rank_and_size()[1],
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }


def _name_of(criterion: Callable) -> str:
    if isinstance(criterion, partial):
        given = [*map(repr, criterion.args), *(f"{key}={value!r}" for key, value in criterion.keywords.items())]
        return f"{_name_of(criterion.func)}({', '.join(given)})"
    return getattr(criterion, "__name__", repr(criterion))


def _stream_error(dense: Sequence[Tensor], pruned: Sequence[Tensor], device: torch.device) -> float:
    lost = everything = 0.0
    for d, p in zip(dense, pruned, strict=True):
        d, p = d.to(device), p.to(device)
        lost += (d - p).float().square().sum(dtype=torch.float64).item()
        everything += d.float().square().sum(dtype=torch.float64).item()
    lost, everything = all_sums(lost, everything)
    return lost / everything


def _check_additive(index: int, before: Sequence[Tensor], after: Sequence[Tensor], targets: list[DenseTargets]) -> None:
    """The block's output has to be its input plus its modules' outputs, or the residual target means nothing."""
    made = before[0].flatten(0, -2) + sum(target.level2[0] for target in targets)
    wanted = after[0].flatten(0, -2)
    error = ((made - wanted).float().norm() / (wanted - before[0].flatten(0, -2)).float().norm()).item()
    (refused,) = all_sums(float(not error < 0.05))  # all processes come to the same verdict
    if refused:  # half precision rounds at a few 1e-3 of the stream; a norm or a multiplier is far off
        raise UnsupportedModule(
            "prune: target='residual' needs blocks that add their modules' outputs to the residual stream as they are; "
            f"block {index} does not (relative difference {error:.2g}: a norm or multiplier behind level 2, or "
            "attention that has to stay whole). Use target='dense'"
        )


def fixed_scores(scores: Mapping[str, Tensor], name: str = "fixed_scores") -> Criterion:
    """A criterion that looks its scores up by module name, e.g. those of :func:`scores_of` on the dense model.

    For methods that score once before anything is cut (FLAP), and for scores from other text than the refit's.

    Raises (when used):
        KeyError: a module without scores.
        ValueError: scores for another number of units.
    """

    def criterion(module: Depth2Module, seen: Seen | None = None) -> Tensor:
        if module.name not in scores:
            raise KeyError(f"{module.name}: no scores; there are some for {', '.join(list(scores)[:3])}, ...")
        if len(scores[module.name]) != module.n_units:
            raise ValueError(
                f"{module.name}: the scores are for {len(scores[module.name])} units, found {module.n_units}; take "
                "them on the model as it is"
            )
        return scores[module.name]

    criterion.__name__ = name
    return criterion


def scores_of(
    model: PreTrainedModel,
    calibration: Tensor,
    criterion: Criterion = second_moment,
    *,
    blocks: Iterable[int] | None = None,
    kinds: Iterable[Kind] | None = None,
    batch_size: int = 16,
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """Every module's scores on the model as it is: name -> [n_units], on the CPU. Nothing is changed.

    For plans over the whole model, for looking at criteria side by side, and for methods that score the dense model
    once (FLAP, LLM-Pruner) rather than each module behind the already pruned prefix. `device` and several processes: as
    in :func:`prune`.

    Raises:
        As :func:`prune`.
    """
    check_tokens(model, calibration)
    found: dict[str, Tensor] = {}
    was_training = model.training
    model.eval()
    try:
        stream = BlockStream(model, share_of(calibration), batch_size, device=device)
        chosen = sorted({module.block for module in depth2_modules(model, blocks, kinds)})
        for index in range(max(chosen, default=-1) + 1):
            with resident(model, index, stream.device) as block:
                for module in depth2_modules(model, [index], kinds) if index in chosen else []:
                    seen = seen_by(
                        stream, block, module, *module_moments(stream, block, module, repeat(None), repeat(None))
                    )
                    found[module.name] = _checked_scores(criterion, module, seen)
                stream.advance(block, index)
    finally:
        model.train(was_training)
    return found


def seen_by(
    stream: BlockStream,
    block: nn.Module,
    module: Depth2Module,
    inputs: Moments,
    hidden: Moments,
    n_keep: int | None = None,
) -> Seen:
    """What a criterion may ask about a module: its moments, and further passes over its block on demand.

    With several processes the passes show the windows of all of them, to each of them.
    """

    def windows() -> Iterator[Tensor]:
        batches = stream.inputs(block, module.block, [module.level2.linear])
        for states, (z,) in zip(stream.hidden, batches, strict=True):
            yield z.unflatten(0, states.shape[:2])

    def maps() -> Iterator[Tensor]:
        return all_windows(stream.attention_maps(block, module.block, module.owner))

    return Seen(inputs, hidden, maps, lambda: all_windows(windows()), n_keep)


def _checked_scores(criterion: Criterion, module: Depth2Module, seen: Seen) -> Tensor:
    scores = criterion(module, seen)
    if scores.shape != (module.n_units,):
        raise ValueError(f"{module.name}: expected scores of shape [{module.n_units}], found {list(scores.shape)}")
    return scores.cpu()


class DenseTargets:
    """What one module reads and puts out in the dense model, batch by batch: the targets of its refits.

    Kept for the modules of one block at a time: two tensors [tokens, d] per module, no inner activations. `keep` puts
    them where they wait, see :meth:`~greedy_helpers.capture.BlockStream.keep`.
    """

    def __init__(
        self, module: Depth2Module, means: bool = False, keep: Callable[[Tensor], Tensor] = lambda value: value
    ) -> None:
        self._means, self._keep = means, keep
        self._level1 = [group.linear for group in module.level1.values()]
        self._level2 = module.level2.linear
        self.linears = [self._level1[0], self._level2]
        self._x: list[Tensor] = []
        self._n, self._z_sum = 0, torch.zeros(())
        self.level2: list[Tensor] = []  # dense level-2 outputs, [tokens, d] per batch
        self.drift: list[Tensor] | None = None  # dense minus pruned residual stream in front of the module

    def record(self, x: Tensor, z: Tensor) -> None:
        """Add one batch of the dense linears' inputs: level 1's x [tokens, d] and level 2's z [tokens, channels]."""
        self._x.append(self._keep(x))
        self.level2.append(self._keep(_apply(self._level2, z)))
        if self._means:
            self._n, self._z_sum = self._n + len(z), self._z_sum + z.sum(0, dtype=torch.float64)

    @property
    def hidden_mean(self) -> Tensor:
        """Mean of level 2's input in the dense model, float64 [channels]; only with `means`. Over all processes."""
        total, count = self._z_sum.clone(), self._z_sum.new_tensor(self._n)
        all_sum(total, count)
        return total / count

    @property
    def residual(self) -> Iterator[Tensor]:
        """Dense level-2 outputs plus what the residual stream lacks in front of the module."""
        device = self._level2.weight.device
        return (y.to(device) + lacking.to(device) for y, lacking in zip(self.level2, self.drift, strict=True))

    @torch.no_grad()
    def move_drift(self, pruned: BlockStream, block: nn.Module, module: Depth2Module) -> None:
        """Move the drift behind the module: what it puts out in the dense model, less what it puts out now."""
        for place, (z,) in enumerate(pruned.inputs(block, module.block, [self._level2])):
            drift, added = self.drift[place].to(z.device), self.level2[place].to(z.device)
            self.drift[place] = self._keep(drift + added - _apply(self._level2, z))

    @property
    def level1(self) -> Iterator[Tensor]:
        """Dense level-1 outputs side by side, [tokens, sum of d_out] per batch.

        Computed from the inputs when asked for, so ask before this module's own level 1 is refitted.
        """
        device = self._level2.weight.device
        return (torch.cat([_apply(linear, x.to(device)) for linear in self._level1], dim=1) for x in self._x)


@torch.no_grad()
def advance_dense(dense: BlockStream, block: nn.Module, index: int, targets: Sequence[DenseTargets]) -> None:
    """Move the dense stream behind the still dense block and fill the `targets` on the way, all in one pass."""
    linears = [linear for target in targets for linear in target.linears]
    hidden = []
    for output, inputs in dense.run(block, index, linears):
        hidden.append(dense.keep(output))
        for target, x, z in zip(targets, inputs[::2], inputs[1::2], strict=True):
            target.record(x, z)
    dense.hidden = hidden


def _apply(linear: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x, weight_of(linear), linear.bias)


@torch.no_grad()  # the targets are computed in here, batch by batch
def module_moments(
    stream: BlockStream,
    block: nn.Module,
    module: Depth2Module,
    level1: Iterable[Tensor | None] | None = None,
    level2: Iterable[Tensor | None] | None = None,
    precision: torch.dtype = torch.float64,
) -> list[Moments]:
    """Moments of what the module's levels read, paired with targets: one pass over the block for both.

    With several processes: over the tokens of all of them.

    Args:
        stream: hidden states in front of `block`.
        level1, level2: targets per batch ([tokens, d_y]), or `itertools.repeat(None)` for moments without targets;
            a level that is not given is left out.
        precision: see :class:`~greedy_helpers.moments.Moments`.

    Returns:
        The moments of level 1's and of level 2's input, as far as asked for.
    """
    wanted = [(next(iter(module.level1.values())), level1), (module.level2, level2)]
    wanted = [(group, targets) for group, targets in wanted if targets is not None]
    found = [Moments(group.path, precision) for group, _ in wanted]
    batches = stream.inputs(block, module.block, [group.linear for group, _ in wanted])
    for inputs, *targets in zip(batches, *(targets for _, targets in wanted), strict=False):
        for moments, x, y in zip(found, inputs, targets, strict=True):
            moments.update(x, y)
    for moments in found:
        moments.reduce()
    return found


def _prune_module(
    module: Depth2Module,
    block: nn.Module,
    pruned: BlockStream,
    targets: DenseTargets,
    method: _Method,
) -> PruneStep:
    started = time.perf_counter()
    refit, target, damp, n_keep = method.refit, method.target, method.damp, method.n_keep(module)
    level1, level2 = [group.linear for group in module.level1.values()], module.level2
    aims = {"dense": lambda: targets.level2, "residual": lambda: targets.residual, "local": lambda: repeat(None)}
    found: Solution | None = None
    if refit in ("pre", "both"):
        (inputs,) = module_moments(pruned, block, module, level1=targets.level1, precision=method.precision)
        refit_linears(level1, inputs, damp)
        # the refit changed what level 2 reads, so its moments take a pass of their own
        (hidden,) = module_moments(pruned, block, module, level2=aims[target](), precision=method.precision)
        found = refit_linears([level2.linear], hidden, damp)
    else:
        wanted = {"level1": repeat(None), "level2": aims[target]()}
        inputs, hidden = module_moments(pruned, block, module, **wanted, precision=method.precision)
        if target == "local":
            hidden = hidden.aim_at(weight_of(level2.linear), level2.linear.bias)

    scores = _checked_scores(method.criterion, module, seen_by(pruned, block, module, inputs, hidden, n_keep))
    keep = keep_best(scores, n_keep)
    check_same(f"{module.name}: the units to keep", keep)
    whole = weight_of(level2.linear)
    remove_units(module, keep)

    # A unit's channels do not depend on the other units, so the survivors' moments are already known.
    stays = torch.sort(level2.index[keep].flatten()).values
    hidden = hidden.select(stays)
    error_cut = error = hidden.relative_error(weight_of(level2.linear), level2.linear.bias)
    if refit in ("post", "both"):
        found = refit_linears([level2.linear], hidden, damp)
    elif refit == "bias":
        mean = targets.hidden_mean.clone()
        mean[stays.to(mean.device)] = 0
        add_to_bias(level2.linear, whole.to(mean) @ mean)
    if refit in ("post", "both", "bias"):
        error = hidden.relative_error(weight_of(level2.linear), level2.linear.bias)
    return PruneStep(
        module.name,
        module.kind,
        module.block,
        module.n_units,
        len(keep),
        error_cut,
        error,
        time.perf_counter() - started,
        None if found is None else found.rank,
        None if found is None else found.condition,
        scores,
        keep,
    )


def _check_weights(module: nn.Module, prefix: str = "") -> None:
    for name, parameter in module.named_parameters():
        if not parameter.is_meta and not parameter.isfinite().all():
            raise FloatingPointError(f"{prefix}{name}: expected finite weights, found NaN or Inf")
