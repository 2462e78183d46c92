"""The main job: walk the model once, module by module; refit, score, cut, refit."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Literal

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .allocation import check_ratio, keep_top
from .capture import BlockStream
from .criteria import Criterion, Seen, second_moment
from .evaluate import check_tokens
from .moments import Moments
from .reconstruct import refit as refit_linears
from .structure import ChannelGroup, Depth2Module, blocks_of, depth2_modules, weight_of
from .surgery import remove_units, undone_on_error

Refit = Literal[None, "pre", "post", "both"]


@dataclass(frozen=True)
class PruneStep:
    """What happened to one module.

    Attributes:
        scores: the criterion's values, [units_before]; keep: the surviving units.
        error_cut, error: relative squared error of the module's output against the dense model's on the calibration
            tokens (0 = equal, 1 = as bad as silence), after the cut and after the last refit. It contains what the
            pruned prefix already broke.
    """

    name: str
    kind: str
    block: int
    units_before: int
    units_after: int
    error_cut: float
    error: float
    seconds: float
    scores: Tensor = field(repr=False)
    keep: Tensor = field(repr=False)


@dataclass(frozen=True)
class PruneReport:
    """What :func:`prune` did: its settings and one step per module, in order."""

    ratio: float
    criterion: str
    refit: Refit
    damp: float
    tokens: int
    steps: list[PruneStep]

    @property
    def seconds(self) -> float:
        return sum(step.seconds for step in self.steps)

    def to_frame(self) -> pd.DataFrame:
        """One row per module, without the tensors."""
        rows = [{k: v for k, v in vars(step).items() if k not in ("scores", "keep")} for step in self.steps]
        return pd.DataFrame(rows)

    def to_dict(self) -> dict:
        """Plain numbers, strings and lists, ready for JSON."""
        steps = [
            {k: v.tolist() if isinstance(v, Tensor) else v for k, v in asdict(step).items()} for step in self.steps
        ]
        return {**{k: v for k, v in vars(self).items() if k != "steps"}, "steps": steps}


def prune(
    model: PreTrainedModel,
    calibration: Tensor,
    ratio: float,
    *,
    criterion: Criterion = second_moment,
    refit: Refit = None,
    blocks: Iterable[int] | None = None,
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

    Args:
        calibration: long [n, seq], packed and never padded.
        ratio: share of units to remove from each module, in [0, 1); floor(ratio * units) go.
        criterion: (module, seen) -> scores [units], higher = keep.
        blocks: the blocks to prune (default: all). The paper leaves LLaMA's first four and last two alone.
        damp: see :func:`~greedy_helpers.reconstruct.least_squares`.
        batch_size: windows per forward pass; changes memory and speed, not the result.

    Returns:
        A report with one step per module.

    Raises:
        UnknownFamily, TypeError, ValueError, IndexError: bad arguments, before anything is touched.
        FloatingPointError: NaN or Inf in weights or activations, naming the layer.
        Whatever is raised, or interrupted, the model is left as it was.
    """
    check_ratio(ratio)
    check_tokens(model, calibration)
    if refit not in (None, "pre", "post", "both"):
        raise ValueError(f"prune: expected refit None, 'pre', 'post' or 'both', found {refit!r}")
    chosen = sorted(set(range(len(blocks_of(model))) if blocks is None else blocks))
    modules = depth2_modules(model, chosen)  # refuses unknown families and blocks
    _check_weights(model)

    was_training = model.training
    model.eval()
    steps: list[PruneStep] = []
    bar = tqdm(total=len(modules), desc=f"prune {ratio:.0%}", unit="module", disable=not progress)
    try:
        with undone_on_error(model), bar:
            pruned = BlockStream(model, calibration, batch_size)
            dense = pruned.share()
            for index, block in enumerate(blocks_of(model)):
                if index > max(chosen, default=-1):
                    break
                original = copy.deepcopy(block)  # the only second copy: one block, the source of all targets
                for module in depth2_modules(model, [index]) if index in chosen else []:
                    step = _prune_module(module, block, original, pruned, dense, ratio, criterion, refit, damp)
                    steps.append(step)
                    bar.set_postfix_str(f"{module.name}: error {step.error:.3f}")
                    bar.update()
                pruned.advance(block, index)
                dense.advance(original, index)
    finally:
        model.train(was_training)
    name = getattr(criterion, "__name__", repr(criterion))
    return PruneReport(float(ratio), name, refit, damp, calibration.numel(), steps)


def _prune_module(
    module: Depth2Module,
    block: nn.Module,
    original: nn.Module,
    pruned: BlockStream,
    dense: BlockStream,
    ratio: float,
    criterion: Criterion,
    refit: Refit,
    damp: float,
) -> PruneStep:
    started = time.perf_counter()
    level1, level2 = list(module.level1.values()), module.level2

    inputs = paired_moments(block, original, pruned, dense, module, level1)
    if refit in ("pre", "both"):
        refit_linears([group.linear for group in level1], inputs, damp)
    hidden = paired_moments(block, original, pruned, dense, module, [level2])
    if refit in ("pre", "both"):
        refit_linears([level2.linear], hidden, damp)

    scores = criterion(module, Seen(inputs, hidden))
    if scores.shape != (module.n_units,):
        raise ValueError(f"{module.name}: expected scores of shape [{module.n_units}], found {list(scores.shape)}")
    keep = keep_top(scores, ratio)
    remove_units(module, keep)

    # A unit's channels do not depend on the other units, so the survivors' moments are already known.
    hidden = hidden.select(torch.sort(level2.index[keep].flatten()).values)
    error_cut = error = hidden.relative_error(weight_of(level2.linear), level2.linear.bias)
    if refit in ("post", "both"):
        refit_linears([level2.linear], hidden, damp)
        error = hidden.relative_error(weight_of(level2.linear), level2.linear.bias)
    seconds = time.perf_counter() - started
    return PruneStep(
        module.name, module.kind, module.block, module.n_units, len(keep), error_cut, error, seconds, scores.cpu(), keep
    )


def paired_moments(
    block: nn.Module,
    original: nn.Module,
    pruned: BlockStream,
    dense: BlockStream,
    module: Depth2Module,
    groups: list[ChannelGroup],
) -> Moments:
    """Moments of (what these linears read in the pruned model, what they put out in the dense one).

    `groups` are linears of `module` that read the same input; their dense outputs stand side by side. The same
    tokens go through `block` behind the pruned prefix and through `original` behind the dense one.
    """
    targets = [original.get_submodule(group.inside) for group in groups]
    moments = Moments(groups[0].path)
    seen = pruned.inputs(block, module.block, groups[0].linear)
    meant = dense.inputs(original, module.block, targets[0])
    for x_hat, x in zip(seen, meant, strict=True):
        outputs = [F.linear(x, weight_of(target), target.bias) for target in targets]
        moments.update(x_hat, torch.cat(outputs, dim=1))
    return moments


def _check_weights(model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise FloatingPointError(f"{name}: expected finite weights, found NaN or Inf")
