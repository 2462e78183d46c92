"""The main job: walk the model once, module by module; refit, score, cut, refit."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import repeat
from typing import TYPE_CHECKING, Literal

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .allocation import Plan, check_plan, check_ratio, keep_best, n_removed
from .capture import BlockStream
from .criteria import Criterion, Seen, second_moment
from .evaluate import check_tokens, count_parameters
from .families import Kind
from .moments import Moments
from .reconstruct import Solution, add_to_bias
from .reconstruct import refit as refit_linears
from .structure import Depth2Module, UnsupportedModule, blocks_of, depth2_modules, family_of, weight_of
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
        """Units left and errors per module: see :func:`~greedy_helpers.plots.prune_steps`."""
        from matplotlib import pyplot as plt  # here, so that importing the package does not import matplotlib

        from . import plots

        fig, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained", facecolor="white")
        plots.prune_steps(axes, self.to_frame())
        plt.close(fig)  # shown where it is returned to, and not a second time
        return fig

    def to_dict(self, tensors: bool = True) -> dict:
        """Plain numbers, strings and lists, ready for JSON; without scores and kept units if not `tensors`."""
        steps = [
            {k: v.tolist() if isinstance(v, Tensor) else v for k, v in asdict(step).items()} for step in self.steps
        ]
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
        batch_size: windows per forward pass; changes memory and speed, not the result.

    Returns:
        A report with one step per module.

    Raises:
        UnknownFamily, UnsupportedModule, TypeError, ValueError, IndexError: bad arguments, before anything is touched.
        FloatingPointError: NaN or Inf in weights or activations, naming the layer.
        Whatever is raised, or interrupted, the model is left as it was.
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
    modules = depth2_modules(model, chosen, kinds)  # refuses unknown families, blocks and kinds
    if kinds is None:
        for path, reason in family_of(model).whole.items():
            warnings.warn(f"{model.config.model_type}: {path} stays whole: {reason}", stacklevel=2)
    _check_weights(model)

    was_training = model.training
    model.eval()
    steps: list[PruneStep] = []
    stream_errors: list[float] = []
    bar = tqdm(total=len(modules), desc="prune", unit="module", disable=not progress)
    try:
        with undone_on_error(model), bar:
            pruned = BlockStream(model, calibration, batch_size)
            dense = pruned.share()
            for index in range(max(chosen, default=-1) + 1):
                block = blocks_of(model)[index]
                chosen_here = depth2_modules(model, [index], kinds) if index in chosen else []
                names = {module.name for module in chosen_here}
                # the residual target follows the stream through all modules of the block, cut or not
                modules = depth2_modules(model, [index]) if names and target == "residual" else chosen_here
                targets = [DenseTargets(module, means=refit == "bias") for module in modules]
                in_front = dense.hidden
                advance_dense(dense, block, index, targets)  # before anything in the block changes: no second copy
                if names and target == "residual":
                    _check_additive(index, in_front, dense.hidden, targets)
                    drift = [(d - p).flatten(0, -2) for d, p in zip(in_front, pruned.hidden, strict=True)]
                    for dense_targets in targets:
                        dense_targets.drift = drift  # one list: what the stream lacks now
                for module, dense_targets in zip(modules, targets, strict=True):
                    if module.name in names:
                        how = (_n_keep(module, ratio), criterion, refit, target, damp)
                        steps.append(_prune_module(module, block, pruned, dense_targets, *how))
                        bar.set_postfix_str(f"{module.name}: error {steps[-1].error:.3f}")
                        bar.update()
                    if dense_targets.drift is not None and module is not modules[-1]:
                        dense_targets.move_drift(pruned, block, module)
                pruned.advance(block, index)
                stream_errors.append(_stream_error(dense.hidden, pruned.hidden))
    finally:
        model.train(was_training)
    after = count_parameters(model)
    return PruneReport(
        None if isinstance(ratio, Mapping) else float(ratio),
        getattr(criterion, "__name__", repr(criterion)),
        refit,
        target,
        damp,
        calibration.numel(),
        {key: [before[key], after[key]] for key in before},
        stream_errors,
        steps,
    )


def _n_keep(module: Depth2Module, ratio: float | Plan) -> int:
    if isinstance(ratio, Mapping):
        return ratio.get(module.name, module.n_units)
    return module.n_units - n_removed(module.n_units, ratio)


def _stream_error(dense: Sequence[Tensor], pruned: Sequence[Tensor]) -> float:
    pairs = list(zip(dense, pruned, strict=True))
    lost = sum((d - p).float().square().sum(dtype=torch.float64).item() for d, p in pairs)
    return lost / sum(d.float().square().sum(dtype=torch.float64).item() for d, _ in pairs)


def _check_additive(index: int, before: Sequence[Tensor], after: Sequence[Tensor], targets: list[DenseTargets]) -> None:
    """The block's output has to be its input plus its modules' outputs, or the residual target means nothing."""
    made = before[0].flatten(0, -2) + sum(target.level2[0] for target in targets)
    wanted = after[0].flatten(0, -2)
    error = ((made - wanted).float().norm() / (wanted - before[0].flatten(0, -2)).float().norm()).item()
    if not error < 0.05:  # half precision rounds at a few 1e-3 of the stream; a norm or a multiplier is far off
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
) -> dict[str, Tensor]:
    """Every module's scores on the model as it is: name -> [n_units], on the CPU. Nothing is changed.

    For plans over the whole model, for looking at criteria side by side, and for methods that score the dense model
    once (FLAP, LLM-Pruner) rather than each module behind the already pruned prefix.

    Raises:
        As :func:`prune`.
    """
    check_tokens(model, calibration)
    found: dict[str, Tensor] = {}
    was_training = model.training
    model.eval()
    try:
        stream = BlockStream(model, calibration, batch_size)
        chosen = sorted({module.block for module in depth2_modules(model, blocks, kinds)})
        for index in range(max(chosen, default=-1) + 1):
            block = blocks_of(model)[index]
            for module in depth2_modules(model, [index], kinds) if index in chosen else []:
                inputs, hidden = module_moments(stream, block, module, repeat(None), repeat(None))
                found[module.name] = _checked_scores(criterion, module, seen_by(stream, block, module, inputs, hidden))
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
    """What a criterion may ask about a module: its moments, and further passes over its block on demand."""

    def windows() -> Iterator[Tensor]:
        batches = stream.inputs(block, module.block, [module.level2.linear])
        for states, (z,) in zip(stream.hidden, batches, strict=True):
            yield z.unflatten(0, states.shape[:2])

    return Seen(inputs, hidden, lambda: stream.attention_maps(block, module.block, module.owner), windows, n_keep)


def _checked_scores(criterion: Criterion, module: Depth2Module, seen: Seen) -> Tensor:
    scores = criterion(module, seen)
    if scores.shape != (module.n_units,):
        raise ValueError(f"{module.name}: expected scores of shape [{module.n_units}], found {list(scores.shape)}")
    return scores.cpu()


class DenseTargets:
    """What one module reads and puts out in the dense model, batch by batch: the targets of its refits.

    Kept for the modules of one block at a time: two tensors [tokens, d] per module, no inner activations.
    """

    def __init__(self, module: Depth2Module, means: bool = False) -> None:
        self._means = means
        self._level1 = [group.linear for group in module.level1.values()]
        self._level2 = module.level2.linear
        self.linears = [self._level1[0], self._level2]
        self._x: list[Tensor] = []
        self._n, self._z_sum = 0, torch.zeros(())
        self.level2: list[Tensor] = []  # dense level-2 outputs, [tokens, d] per batch
        self.drift: list[Tensor] | None = None  # dense minus pruned residual stream in front of the module

    def record(self, x: Tensor, z: Tensor) -> None:
        """Add one batch of the dense linears' inputs: level 1's x [tokens, d] and level 2's z [tokens, channels]."""
        self._x.append(x)
        self.level2.append(_apply(self._level2, z))
        if self._means:
            self._n, self._z_sum = self._n + len(z), self._z_sum + z.sum(0, dtype=torch.float64)

    @property
    def hidden_mean(self) -> Tensor:
        """Mean of level 2's input in the dense model, float64 [channels]; only with `means`."""
        return self._z_sum / self._n

    @property
    def residual(self) -> Iterator[Tensor]:
        """Dense level-2 outputs plus what the residual stream lacks in front of the module."""
        return (y + lacking for y, lacking in zip(self.level2, self.drift, strict=True))

    @torch.no_grad()
    def move_drift(self, pruned: BlockStream, block: nn.Module, module: Depth2Module) -> None:
        """Move the drift behind the module: what it puts out in the dense model, less what it puts out now."""
        for place, (z,) in enumerate(pruned.inputs(block, module.block, [self._level2])):
            self.drift[place] = self.drift[place] + self.level2[place] - _apply(self._level2, z)

    @property
    def level1(self) -> Iterator[Tensor]:
        """Dense level-1 outputs side by side, [tokens, sum of d_out] per batch.

        Computed from the inputs when asked for, so ask before this module's own level 1 is refitted.
        """
        return (torch.cat([_apply(linear, x) for linear in self._level1], dim=1) for x in self._x)


@torch.no_grad()
def advance_dense(dense: BlockStream, block: nn.Module, index: int, targets: Sequence[DenseTargets]) -> None:
    """Move the dense stream behind the still dense block and fill the `targets` on the way, all in one pass."""
    linears = [linear for target in targets for linear in target.linears]
    hidden = []
    for output, inputs in dense.run(block, index, linears):
        hidden.append(output)
        for target, x, z in zip(targets, inputs[::2], inputs[1::2], strict=True):
            target.record(x, z)
    dense.hidden = hidden


def _apply(linear: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x, weight_of(linear), linear.bias)


def module_moments(
    stream: BlockStream,
    block: nn.Module,
    module: Depth2Module,
    level1: Iterable[Tensor | None] | None = None,
    level2: Iterable[Tensor | None] | None = None,
) -> list[Moments]:
    """Moments of what the module's levels read, paired with targets: one pass over the block for both.

    Args:
        stream: hidden states in front of `block`.
        level1, level2: targets per batch ([tokens, d_y]), or `itertools.repeat(None)` for moments without targets;
            a level that is not given is left out.

    Returns:
        The moments of level 1's and of level 2's input, as far as asked for.
    """
    wanted = [(next(iter(module.level1.values())), level1), (module.level2, level2)]
    wanted = [(group, targets) for group, targets in wanted if targets is not None]
    found = [Moments(group.path) for group, _ in wanted]
    batches = stream.inputs(block, module.block, [group.linear for group, _ in wanted])
    for inputs, *targets in zip(batches, *(targets for _, targets in wanted), strict=False):
        for moments, x, y in zip(found, inputs, targets, strict=True):
            moments.update(x, y)
    return found


def _prune_module(
    module: Depth2Module,
    block: nn.Module,
    pruned: BlockStream,
    targets: DenseTargets,
    n_keep: int,
    criterion: Criterion,
    refit: Refit,
    target: Target,
    damp: float,
) -> PruneStep:
    started = time.perf_counter()
    level1, level2 = [group.linear for group in module.level1.values()], module.level2
    aims = {"dense": lambda: targets.level2, "residual": lambda: targets.residual, "local": lambda: repeat(None)}
    found: Solution | None = None
    if refit in ("pre", "both"):
        (inputs,) = module_moments(pruned, block, module, level1=targets.level1)
        refit_linears(level1, inputs, damp)
        # the refit changed what level 2 reads, so its moments take a pass of their own
        (hidden,) = module_moments(pruned, block, module, level2=aims[target]())
        found = refit_linears([level2.linear], hidden, damp)
    else:
        inputs, hidden = module_moments(pruned, block, module, level1=repeat(None), level2=aims[target]())
        if target == "local":
            hidden = hidden.aim_at(weight_of(level2.linear), level2.linear.bias)

    scores = _checked_scores(criterion, module, seen_by(pruned, block, module, inputs, hidden, n_keep))
    keep = keep_best(scores, n_keep)
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


def _check_weights(model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise FloatingPointError(f"{name}: expected finite weights, found NaN or Inf")
