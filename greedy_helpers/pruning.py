"""The algorithm: walk the model once; in every module refit, score, cut, refit."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .allocation import Plan, check_plan, check_ratio, keep_best, module_parameters, removed_parameters
from .criteria import Criterion, Seen, second_moment
from .doors import check_own_weights
from .families import Kind
from .greedy import whole_path
from .large.distributed import all_sums, check_same, is_first
from .large.lazy import check_weights, is_lazy
from .large.memory import at_smaller_batches, with_smaller_batches
from .large.resume import WorkFolder, resumed, settings_of
from .measure import DenseRecord, Drift, ModulePasses, advance_dense
from .prices import loss_metric, stream_energy
from .recipes import ALLOCATIONS, RECOMMENDED, Dense, Recipe
from .reconstruct import HELD_OUT
from .remedies import Cut, Remedy
from .report import PruneReport, PruneStep
from .stream import Streams, walk, windows_per_batch
from .structure import (
    Depth2Module,
    UnitChoice,
    UnsupportedModule,
    blocks_of,
    blocks_path,
    check_tokens,
    count_parameters,
    depth2_modules,
    family_of,
    weight_of,
)
from .surgery import remove_units, undone_on_error


@dataclass(frozen=True)
class Job:
    """What :func:`prune` does to every module: criterion and remedy as functions, and how many units each keeps."""

    criterion: Criterion
    remedy: Remedy
    damp: float | str
    plan: Plan
    unit: UnitChoice = "query"
    precision: torch.dtype = torch.float64


def prune_module(module: Depth2Module, seen: Seen, job: Job) -> PruneStep:
    """Refit, score, cut, refit one module, in place."""
    started = time.perf_counter()
    level2, fit = module.level2, job.remedy.before and job.remedy.before(module, seen)

    scores = _checked_scores(job.criterion, module, seen)
    keep = keep_best(scores, job.plan[module.name], module.n_sets)
    check_same(f"{module.name}: the units to keep", keep)

    # a unit's channels do not depend on the other units, so the survivors' moments are already known
    stays = level2.stays(keep)
    cut = Cut(seen.level2.select(stays.nonzero().flatten()), weight_of(level2.linear), (~stays).nonzero().flatten())
    remove_units(module, keep)
    error = error_cut = cut.survivors.relative_error(weight_of(level2.linear), level2.linear.bias)
    if job.remedy.after:
        fit = job.remedy.after(module, cut, seen) or fit
        error = cut.survivors.relative_error(weight_of(level2.linear), level2.linear.bias)
    return PruneStep(
        name=module.name, kind=module.kind, unit=module.unit, block=module.block, units_before=module.n_units,
        units_after=len(keep), error_cut=error_cut, error=error, seconds=time.perf_counter() - started,
        damp=fit and fit.damp, rank=fit and fit.rank, condition=fit and fit.condition, scores=scores, keep=keep,
    )  # fmt: skip


def prune_block(model: PreTrainedModel, block: nn.Module, streams: Streams, job: Job) -> tuple[list[PruneStep], float]:
    """Prune one block's modules in order and move both streams behind it: the steps, and the stream's error there."""
    index, steps, remedy = streams.pruned.position, [], job.remedy
    modules = depth2_modules(model, [index], unit=job.unit)
    if not any(module.name in job.plan for module in modules):
        modules = []
    elif remedy.target != "residual":  # that target follows the stream through all modules, cut or not
        modules = [module for module in modules if module.name in job.plan]
    wanted = {"inputs": remedy.refits_level1, "outputs": remedy.target != "local", "means": remedy.reads_means}
    records = [DenseRecord(module, **wanted) for module in modules]
    before, one = streams.dense.hidden, streams.are_one
    advance_dense(streams.dense, block, records)  # before anything in the block changes: no second copy
    if not modules and one:  # nothing has been cut yet
        streams.pruned.move(streams.dense.hidden, index + 1)
        return [], 0.0
    drift = None
    if modules and remedy.target == "residual":
        _check_additive(index, before, streams.dense.hidden, records)
        drift = Drift(before, streams.pruned.hidden, streams.pruned)
    before = None  # so that it is not kept through what follows
    for module, record in zip(modules, records, strict=True):
        if module.name in job.plan:
            how = {"target": remedy.target, "hold_out": job.damp == HELD_OUT, "precision": job.precision}
            passes = ModulePasses(streams.pruned, block, module, record, drift, **how)
            seen = Seen(damp=job.damp, n_keep=job.plan[module.name], passes=passes, both=True)
            steps.append(prune_module(module, seen, job))
        if drift is not None:
            drift.passed.append(record)
        record.inputs.clear()
        if module is not modules[-1] and module.owner is not block:
            streams.pruned.finish(module.owner)
    streams.pruned.advance(block)
    return steps, _stream_error(streams)


def prune(
    model: PreTrainedModel,
    calibration: Tensor,
    ratio: float | None = None,
    recipe: Recipe = RECOMMENDED,
    *,
    plan: Plan | None = None,
    blocks: Iterable[int] | None = None,
    kinds: Iterable[Kind] | None = None,
    unit: UnitChoice = "query",
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    store: torch.device | str | None = None,
    precision: torch.dtype = torch.float64,
    work_dir: str | Path | None = None,
    progress: bool = True,
) -> PruneReport:
    """Remove a share of the parameters of all depth-2 modules, in place, without training (Algorithms 1, 3 and 4).

    Modules are visited in execution order, so each one is scored and refitted on the inputs that the already pruned
    prefix gives it.

    Args:
        calibration: long [n, seq], packed and never padded.
        ratio: share to remove, in [0, 1): of the parameters of the modules to be pruned, which are the weights and
            biases of their linears, keys and values that query heads share included; norms, about a thousandth of a
            block, do not count. The default recipe spends it where it costs the loss least, `"loss prices"`. By
            `"uniform"` every attention module loses the nearest number of heads and the FFNs the rest, so that the
            ratio is met to within one channel per FFN (:func:`~greedy_helpers.allocation.uniform_plan`).
        recipe: which units go and how the rest is repaired: :data:`~greedy_helpers.recipes.RECOMMENDED`, `PAPER`,
            `FLAP`, `OSSCAR`, or a :class:`~greedy_helpers.recipes.Recipe` of your own.
        plan: in the place of a ratio: module name -> units to keep, as the functions in `allocation.py` make it.
            Modules it does not name stay whole.
        blocks: the blocks to prune (default: all). The paper leaves LLaMA's first four and last two alone.
        kinds: the kinds of modules to prune, among `"attention"`, `"ffn"`, `"gated_ffn"`; default: all, with a warning
            if one has to stay whole in this family.
        unit: of attention whose query heads share KV heads: `"query"` heads, the same number of every KV head; or
            `"kv"` heads with all their query heads, which shrinks the cache; or module name -> one of the two.
        batch_size: windows per pass; memory grows with batch_size * seq, the result does not depend on it. Default: as
            many as make up 4,096 tokens. It is halved, with a warning, when memory runs out.
        device: where the block at hand and one batch are worked on; default: where the model is. So a model in the
            CPU's memory, or on the disk (`load_model(..., lazy=True)`), fits a GPU with room for one of its blocks.
        store: where the hidden states of all tokens wait; default: `device`. `"cpu"` saves memory on a GPU.
        precision: dtype of the summed moments and of the solves, see :class:`~greedy_helpers.moments.Moments`.
        work_dir: a folder to which every finished block is committed. A call with the same model, tokens and settings
            continues after the last finished block and ends with the same bits. A lazy model needs one: its pruned
            blocks are there until :func:`~greedy_helpers.checkpoint.save_pruned` collects them.

    Under `torchrun` (see :mod:`greedy_helpers.large.distributed`) every process gives the same arguments; each runs its
    share of the windows, and all end with the same model.

    Raises:
        UnknownFamily, UnsupportedModule, TypeError, ValueError, LookupError: bad arguments; nothing was touched yet.
        FloatingPointError: NaN or Inf in weights or activations, naming the layer.
        Whatever is raised, or interrupted, the model is left as it was. What `work_dir` holds, stays.
    """
    started, before = time.perf_counter(), count_parameters(model)
    modules = _check_arguments(model, calibration, ratio, recipe, plan, blocks, kinds, unit, work_dir)
    where = {"batch_size": batch_size, "device": device, "store": store}
    job = _job(model, calibration, ratio, recipe, plan, modules, unit, precision, where)
    of_modules = sum(map(module_parameters, modules))
    parameters = {"modules": [of_modules, of_modules - removed_parameters(modules, job.plan)]}
    last = max((module.block for module in modules), default=-1)
    step = with_smaller_batches(prune_block)
    if work_dir is not None:
        settings = _settings(ratio, recipe, job, modules) | {"batch_size": batch_size}
        step = resumed(step, WorkFolder(work_dir, settings_of(model, calibration, **settings)))
    del modules  # their indices would grow with the model's depth
    names = recipe.names | ({"allocation": "plan"} if ratio is None else {})
    steps, stream_errors, streams = [], [], None
    bar = tqdm(total=len(job.plan), desc="prune", unit="module", disable=not progress or not is_first())
    with undone_on_error(model), bar, closing(walk(model, calibration, last, **where)) as walked:
        for block, stream in walked:
            streams = streams or Streams(stream.share(), stream)
            new_steps, stream_error = step(model, block, streams, job)
            steps += new_steps
            stream_errors.append(stream_error)
            bar.update(len(new_steps))
        parameters |= {part: [before[part], after] for part, after in count_parameters(model).items()}
        took = {"tokens": calibration.numel(), "seconds": time.perf_counter() - started}
        return PruneReport(ratio, **names, **took, parameters=parameters, stream_errors=stream_errors, steps=steps)


def scores_of(
    model: PreTrainedModel,
    calibration: Tensor,
    criterion: Criterion = second_moment,
    *,
    blocks: Iterable[int] | None = None,
    kinds: Iterable[Kind] | None = None,
    unit: UnitChoice = "query",
    damp: float | str = 1e-2,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    store: torch.device | str | None = None,
    precision: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """Every module's scores on the model as it is: name -> [n_units], on the CPU. Nothing is changed.

    For plans over the whole model, for looking at criteria side by side, and for methods that score the dense model
    once (FLAP, LLM-Pruner) rather than each module behind the already pruned prefix. Level 2's moments have no targets.
    `device`, `store`, `precision`, smaller batches and several processes: as in :func:`prune`.

    Raises:
        As :func:`prune`.
    """
    check_tokens(model, calibration, packed=True)
    kinds = kinds if kinds is None or isinstance(kinds, str) else set(kinds)
    chosen = {module.block for module in depth2_modules(model, blocks, kinds, unit=unit)}

    def measured(batch_size: int) -> dict[str, Tensor]:
        scores, where = {}, {"batch_size": batch_size, "device": device, "store": store}
        with closing(walk(model, calibration, max(chosen, default=-1), **where)) as walked:
            for block, stream in walked:
                here = [stream.position] if stream.position in chosen else []
                for module in depth2_modules(model, here, kinds, unit=unit):
                    passes = ModulePasses(stream, block, module, precision=precision)
                    scores[module.name] = _checked_scores(criterion, module, Seen(damp=damp, passes=passes))
        return scores

    return at_smaller_batches(
        measured, min(len(calibration), windows_per_batch(batch_size, calibration.shape[1])), "scores_of"
    )


def loss_prices(
    model: PreTrainedModel,
    calibration: Tensor,
    *,
    unit: UnitChoice = "query",
    damp: float | str = 1e-2,
    metric: Mapping[str, Tensor] | None = None,
    **where: int | torch.device | str | None,
) -> dict[str, Tensor]:
    """What removing units costs the whole model, in nats per token: module name -> [n_units], cumulative.

    The prices behind the allocation `"loss prices"`, for plans of your own: exact greedy's whole path in every module
    of the dense model, each error counted as the rise of the loss that it causes, to second order
    (:func:`~greedy_helpers.prices.loss_metric`). A unit's entry is what it costs that this unit and all with lower
    entries of its module are gone and the rest is refitted. :func:`~greedy_helpers.allocation.cost_plan` and
    :func:`~greedy_helpers.allocation.shape_plan` spend a budget by them.

    Args:
        unit, damp: see :func:`prune`.
        metric: from :func:`~greedy_helpers.prices.loss_metric`, where it is known already; it depends on the model and
            the calibration text only.
        where: batch_size, device, store.

    Raises:
        As :func:`prune`, and ValueError: a model without a causal head.
    """
    metric = loss_metric(model, calibration, **where) if metric is None else metric
    return scores_of(model, calibration, whole_path(metric), unit=unit, damp=damp, **where)


def _checked_scores(criterion: Criterion, module: Depth2Module, seen: Seen) -> Tensor:
    scores = criterion(module, seen)
    if scores.shape != (module.n_units,):
        raise ValueError(f"{module.name}: expected scores of shape [{module.n_units}], found {list(scores.shape)}")
    return scores.detach().to("cpu", copy=True)  # a view or a graph would keep what it was made from


def _check_arguments(
    model: PreTrainedModel,
    calibration: Tensor,
    ratio: float | None,
    recipe: Recipe,
    plan: Plan | None,
    blocks: Iterable[int] | None,
    kinds: Iterable[Kind] | None,
    unit: UnitChoice,
    work_dir: str | Path | None,
) -> list[Depth2Module]:
    """The modules to prune, or the reason why not: see :func:`prune`."""
    if not isinstance(recipe, Recipe):
        raise TypeError(f"prune: expected a Recipe, e.g. gh.PAPER or gh.Recipe(gh.second_moment), found {recipe!r}")
    if (ratio is None) == (plan is None):
        raise ValueError(f"prune: expected a ratio or a plan, found {'neither' if plan is None else 'both'}")
    if isinstance(ratio, Mapping):
        raise TypeError("prune: expected a ratio as a number, found a mapping; pass it as plan=")
    check_tokens(model, calibration, packed=True)
    chosen = sorted(set(range(len(blocks_of(model))) if blocks is None else blocks))
    modules = depth2_modules(model, chosen, kinds, unit=unit)  # refuses what does not exist
    if chosen and not modules:
        warnings.warn(f"prune: the model has no modules of the kinds {kinds}: nothing is removed", stacklevel=3)
    check_own_weights({group.path: group.linear for module in modules for group in module.groups})
    if ratio is not None:
        check_ratio(ratio)
    else:
        check_plan(model, plan, {module.name for module in modules}, unit)
    if kinds is None:
        for path, reason in family_of(model).whole.items():
            warnings.warn(f"{model.config.model_type}: {path} stays whole: {reason}", stacklevel=3)
    if len(places := sorted({str(place) for place in getattr(model, "hf_device_map", {}).values()})) > 1:
        raise ValueError(
            f"prune: accelerate has spread the model over {', '.join(places)}; expected one place: load it without "
            "device_map, or with lazy=True and a work_dir if that is too small"
        )
    if is_lazy(model) and work_dir is None:
        raise ValueError(
            "prune: the model's blocks are on the disk; expected a work_dir for the pruned ones, found None"
        )
    check_weights(model, skip=f"{blocks_path(model)}.")
    return modules


def _job(
    model: PreTrainedModel,
    calibration: Tensor,
    ratio: float | None,
    recipe: Recipe,
    plan: Plan | None,
    modules: list[Depth2Module],
    unit: UnitChoice,
    precision: torch.dtype,
    where: dict[str, Any],
) -> Job:
    """The recipe's functions, and the plan: the one that was given, or what the recipe makes of the ratio."""
    same = {"blocks": {m.block for m in modules}, "kinds": {m.kind for m in modules}, "unit": unit}
    score = partial(scores_of, model, calibration, damp=recipe.damp, precision=precision, **same, **where)
    metric = cache(partial(loss_metric, model, calibration, **where))
    energy = partial(stream_energy, model, calibration, **where)
    dense = Dense(model, calibration, unit, score, metric, energy)
    criterion, remedy = recipe.resolved(dense)
    if plan is None:
        plan, criterion = ALLOCATIONS[recipe.allocation](modules, ratio, criterion, dense)
    plan = {m.name: plan.get(m.name, m.n_units) for m in modules}
    return Job(criterion, remedy, recipe.damp, plan, unit, precision)


def _settings(ratio: float | None, recipe: Recipe, job: Job, modules: list[Depth2Module]) -> dict[str, Any]:
    """What a run was asked for, in words and numbers."""
    asked = {"plan": dict(job.plan)} if ratio is None else {"ratio": ratio}
    chosen = {"blocks": sorted({m.block for m in modules}), "kinds": sorted({m.kind for m in modules})}
    chosen["unit"] = job.unit if isinstance(job.unit, str) else dict(job.unit)
    return {**asked, **chosen, **recipe.names, "precision": str(job.precision)}


def _check_additive(index: int, before: list[Tensor], after: list[Tensor], records: list[DenseRecord]) -> None:
    """The block's output has to be its input plus its modules' outputs, or the residual target means nothing."""
    made = before[0].flatten(0, -2) + sum(record.outputs[0] for record in records)
    wanted = after[0].flatten(0, -2)
    size = (wanted - before[0].flatten(0, -2)).float().norm().item()
    error = (made - wanted).float().norm().item() / (size or 1.0)  # a block that adds nothing is additive, too
    (refused,) = all_sums(float(not error < 0.05))  # all processes come to the same verdict
    if refused:  # half precision rounds at a few 1e-3 of the stream; a norm or a multiplier is far off
        raise UnsupportedModule(
            "prune: the target 'residual' needs blocks that add their modules' outputs to the residual stream as they "
            f"are; block {index} does not (relative difference {error:.2g}: a norm or multiplier behind level 2, or "
            "attention that has to stay whole). Use a remedy with the dense target, e.g. 'both'"
        )


def _stream_error(streams: Streams) -> float:
    device = streams.pruned.device
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # added up there: nothing waits for the CPU
    for d, p in zip(streams.dense.hidden, streams.pruned.hidden, strict=True):
        d, p = d.to(device), p.to(device)
        sums += torch.stack([part.float().square().sum(dtype=torch.float64) for part in (d - p, d)])
    lost, everything = all_sums(*sums.tolist())
    return lost / everything
