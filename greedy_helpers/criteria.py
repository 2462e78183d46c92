"""Criteria: how much each unit of a module matters. A criterion is a function (module, seen) -> scores [n_units].

Higher means keep. Scores are compared inside one module only. Writing your own takes one function; pass it to
:func:`~greedy_helpers.pruning.prune` like the ones here.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .layouts import channel_index
from .moments import Moments
from .reconstruct import HELD_OUT, ridge
from .structure import (
    Depth2Module,
    UnitChoice,
    asking_for_gradients,
    check_tokens,
    depth2_modules,
    eval_mode,
    weight_of,
)


class Passes(Protocol):
    """What can measure one module: see :class:`~greedy_helpers.measure.ModulePasses`."""

    def moments(self, *levels: int) -> list[Moments]: ...
    def attention_maps(self) -> Iterator[Tensor]: ...
    def level2_windows(self) -> Iterator[Tensor]: ...
    def hidden_mean(self) -> Tensor: ...


class Seen:
    """What the calibration tokens show about one module, measured behind the already pruned prefix.

    In :func:`~greedy_helpers.pruning.prune` everything is measured when it is first read, so a criterion that asks for
    nothing costs nothing. Moments that are known already can be handed over instead, e.g. in a notebook:
    `Seen(level1, level2)`.

    Attributes:
        level1: moments of the module's input x (read by every level-1 linear): Sigma = level1.xx / level1.n. If the
            remedy refits level 1 they are paired with what the same linears read in the dense model.
        level2: moments of level 2's input z, paired with the remedy's targets; `level2.mean_square` is E[z_j^2].
        refit_damp: the damping of the remedy's refits, as a share of the mean diagonal; or `"held out"`.
        damp: the damping of criteria that solve: the same, and 0.01 where the refits choose theirs.
        n_keep: how many units will stay, where that is already known.
        hidden_mean: mean of level 2's input in the dense model, float64 [channels]; with a remedy that reads it.
    """

    def __init__(
        self,
        level1: Moments | None = None,
        level2: Moments | None = None,
        *,
        damp: float | str = 1e-2,
        n_keep: int | None = None,
        passes: Passes | None = None,
        both: bool = False,
    ) -> None:
        """
        Args:
            passes: measures what is not given.
            both: level 2's moments will be needed in any case, so the pass for level 1's takes them along.
        """
        self.refit_damp, self.damp = damp, 1e-2 if damp == HELD_OUT else damp
        self.n_keep, self._both = n_keep, both
        self._level1, self._level2, self._passes = level1, level2, passes

    @property
    def level1(self) -> Moments:
        if self._level1 is None:
            passes = self._need("moments of level 1")
            if self._level2 is None and self._both:
                self._level1, self._level2 = passes.moments(1, 2)
            else:
                (self._level1,) = passes.moments(1)
        return self._level1

    @property
    def level2(self) -> Moments:
        if self._level2 is None:
            (self._level2,) = self._need("moments of level 2").moments(2)
        return self._level2

    def only_level1(self) -> Moments:
        """Level 1's moments from a pass that stops there: level 1 is about to change, and with it level 2's input."""
        (self._level1,), self._level2 = self._need("moments of level 1").moments(1), None
        return self._level1

    @property
    def hidden_mean(self) -> Tensor:
        return self._need("the dense model's means").hidden_mean()

    def attention_maps(self) -> Iterator[Tensor]:
        """Softmax maps [batch, heads, query, key], one batch at a time: one more pass over the block.

        Raises:
            ValueError: nothing to replay, or an attention implementation that computes no maps.
        """
        return self._need("attention maps").attention_maps()

    def level2_windows(self) -> Iterator[Tensor]:
        """Level 2's inputs z [batch, seq, channels], one batch at a time: one more pass over the block."""
        return self._need("windows").level2_windows()

    def _need(self, what: str) -> Passes:
        if self._passes is None:
            name = next((m.name for m in (self._level1, self._level2) if m is not None), "module")
            raise ValueError(f"{name}: this criterion needs {what}; run it through prune or scores_of")
        return self._passes


Criterion = Callable[[Depth2Module, Seen], Tensor]


def _of_units(channels: Tensor, module: Depth2Module) -> Tensor:
    """Sums of a score per level-2 input channel over each unit's channels: [n_units]."""
    return channels[module.level2.index.to(channels.device)].sum(1)


def _columns(module: Depth2Module, p: int = 2) -> Tensor:
    """sum_i |B_ij|^p of every level-2 input channel, float64."""
    return weight_of(module.level2.linear).double().abs().pow(p).sum(0)


@torch.no_grad()
def second_moment(module: Depth2Module, seen: Seen, half: bool = False) -> Tensor:
    """The paper's criterion: the energy a unit sends to the residual stream (sec. 3.2.3, eq. 3-4, appendix B).

    Plain FFN, channel j: M_j = ||B_:,j||^2 E[(a_j' x)^2] with E[(a_j' x)^2] = a_j' Sigma a_j and Sigma = E[x x']
    uncentred. (Eq. 3-4 print ||B_i|| under a sum over i; the column j is meant. The factor 1/2 for ReLU changes no
    ranking inside a module and is left out unless `half`. Level 1's bias, if any, is part of the pre-activation.)

    Gated FFN: the product of that metric of the up path and that of the gate path, a heuristic of the paper's.

    Attention: behind the softmax a head is a linear module V -> O on the mixed input, and a_j' Sigma_mixed a_j is
    exactly the mean square of O's input channel j: the head's score is the sum of ||B_:,j||^2 E[z_j^2] over its
    channels.

    Wrong when channels are strongly correlated (it looks at each alone) and when the activation function is far
    from linear on the data. Float64 [n_units], on the moments' device.
    """
    columns = _columns(module)  # ||B_:,j||^2, [channels]
    if module.kind == "attention":
        return _of_units(columns * seen.level2.mean_square, module)
    columns = columns[module.level2.index[:, 0].to(columns.device)]  # [n_units]
    scores = torch.ones_like(columns)
    for group in module.level1.values():
        energy = _preactivation_energy(group.linear, seen.level1)
        for path in group.index.T.to(energy.device):  # a fused gate_up has two channels per unit
            scores = scores * columns * energy[path] * (0.5 if half else 1.0)
    return scores


def _preactivation_energy(linear, moments: Moments) -> Tensor:
    """E[(a_j' x + b_j)^2] of every output channel: diag(A Sigma A') + 2 b (A mu) + b^2."""
    a = weight_of(linear).to(moments.xx)
    energy = ((a @ moments.xx) * a).sum(1) / moments.n
    if linear.bias is not None:
        b = linear.bias.to(moments.xx)
        energy = energy + 2 * b * (a @ moments.x) / moments.n + b.square()
    return energy


@torch.no_grad()
def weight_norm(module: Depth2Module, seen: Seen | None = None, p: int = 2) -> Tensor:
    """Magnitude: sum of |w|^p over a unit's rows of level 1 and columns of level 2 (L2 for p=2, L1 for p=1).

    Looks at no data, so it keeps a channel with large weights that never fires. Function approximation in the
    paper's words (sec. 3.2.1). Float64 [n_units].
    """
    scores = torch.zeros(module.n_units, dtype=torch.float64, device=module.level2.linear.weight.device)
    for group in module.groups:
        size = weight_of(group.linear).double().abs().pow(p).sum(1 if group.side == "out" else 0)
        scores += size[group.index.to(size.device)].sum(1)
    return scores


@torch.no_grad()
def second_moment_identity(module: Depth2Module, seen: Seen | None = None) -> Tensor:
    """:func:`second_moment` when nothing is known about the input: Sigma = I, so a_j' Sigma a_j = ||a_j||^2.

    Gated FFN: product over the paths, as there. Attention: the value rows against the output columns, as if the mixed
    input were white. Uses no data; wrong where the input's energy lies in a few directions, as in every trained model.
    Float64 [n_units].
    """
    columns = _columns(module)
    if module.kind == "attention":
        rows = value_rows(module).double().square().sum(-1)  # [n_units, dim]
        group = module.level2.index.shape[1] // rows.shape[1]
        per_head = columns[module.level2.index.to(columns.device)].unflatten(1, (group, -1))  # [n_units, group, dim]
        return (per_head * rows[:, None]).sum((1, 2))
    scores = torch.ones(module.n_units, dtype=torch.float64, device=columns.device)
    for group in module.level1.values():
        energy = weight_of(group.linear).double().square().sum(1)
        for path in group.index.T.to(energy.device):
            scores = scores * columns[module.level2.index[:, 0].to(columns.device)] * energy[path]
    return scores


def value_rows(module: Depth2Module) -> Tensor:
    """The rows of level 1 that make the values of each unit: [n_units, dim, d].

    Every family of the table stores queries, keys and values in this order, in one linear or in three, so a KV head's
    values are the last `dim` channels of its row in the last linear's index; they are the values of its query heads,
    too. Shared values (multi-query) are the last `dim` channels of the layer, the same for all units.
    """
    name, group = list(module.level1.items())[-1]
    dim, weight = module.sizes["dim"], weight_of(group.linear)
    index = channel_index(module.layout.level1[name], group.n_channels, group.path, **module.sizes)
    if index.numel() < group.n_channels:
        return weight[-dim:].expand(module.n_units, -1, -1)
    rows = weight[index[:, -dim:].to(weight.device)]
    return rows.repeat_interleave(module.group, 0) if module.unit == "query head" else rows


@torch.no_grad()
def output_energy(module: Depth2Module, seen: Seen) -> Tensor:
    """The energy that a unit really sends to the residual stream: E||B_u z_u||^2, measured at level 2's input.

    Channel: ||B_:,j||^2 E[z_j^2]. Head: tr(B_u E[z_u z_u'] B_u'), with the correlations of its channels, which a sum
    over channels leaves out. What :func:`second_moment` estimates from level 1, nonlinearity and gate included.
    Wrong where units are correlated with one another: a unit with a twin costs less than its energy. Float64 [n_units].
    """
    index = module.level2.index.to(seen.level2.xx.device)
    b = weight_of(module.level2.linear).to(seen.level2.xx)
    sigma = seen.level2.xx[index[:, :, None], index[:, None, :]] / seen.level2.n  # [n_units, width, width]
    b = b[:, index].transpose(0, 1)  # [n_units, d, width]
    return ((b @ sigma) * b).sum((1, 2))


@torch.no_grad()
def wanda_sp(module: Depth2Module, seen: Seen) -> Tensor:
    """Wanda, structured as in FLAP's code: mean_i |B_ij| * ||z_j||_2 per channel, summed over a head's channels.

    Function approximation weighted by the input's size, an L1 norm where :func:`output_energy` has a squared L2.
    ||z_j|| is taken per token (the square root of the mean square); a constant changes no ranking. Sun et al.,
    arXiv 2306.11695. Float64 [n_units].
    """
    return _of_units(
        _columns(module, 1) / weight_of(module.level2.linear).shape[0] * seen.level2.mean_square.sqrt(), module
    )


@torch.no_grad()
def flap(module: Depth2Module, seen: Seen, metric: str = "WIFV", published_code: bool = False) -> Tensor:
    """FLAP (An et al., arXiv 2312.11983): how much a level-2 input *fluctuates*, as its mean can become a bias.

    `WIFV`: Var(z_j) ||B_:,j||^2; `IFV`: Var(z_j); `WIFN`: mean_i |B_ij| * ||z_j||. Variance over all tokens. Head: sum
    over its channels. WIFV is :func:`output_energy` per channel minus what a bias can restore; without that bias
    (the remedy `"bias"`) it undervalues channels with a large mean.

    Args:
        published_code: the arithmetic of the authors' repository instead: window after window, with a mean that is
            already updated when it is subtracted (an aliased tensor), the first window counting nothing, and the
            attention's metric squared before it is summed. With few windows the ranking differs.

    Raises:
        ValueError: another metric, or one window with `published_code` (its variance is then 0 everywhere).
    """
    if metric not in ("WIFV", "IFV", "WIFN"):
        raise ValueError(f"flap: expected metric 'WIFV', 'IFV' or 'WIFN', found {metric!r}")
    if metric == "WIFN":
        channels = _columns(module, 1) / weight_of(module.level2.linear).shape[0] * seen.level2.mean_square.sqrt()
    else:
        variance = _published_variance(seen) if published_code else seen.level2.variance
        channels = variance * _columns(module) if metric == "WIFV" else variance
    if published_code and module.kind == "attention":
        channels = channels.square()
    return _of_units(channels, module)


def _published_variance(seen: Seen) -> Tensor:
    """F_N = F_{N-1} (N-2)/(N-1) + s_N / N with s_N = sum_t (x_t - mu_N)^2: N counts windows, mu_N is the new mean."""
    mean = fluctuation = torch.zeros(())
    n = 0
    for batch in seen.level2_windows():
        for window in batch.double():  # [seq, channels]
            n += 1
            mean = (mean * (n - 1) + window.mean(0)) / n
            if n > 1:
                fluctuation = fluctuation * (n - 2) / (n - 1) + (window - mean).square().sum(0) / n
    if n < 2:
        raise ValueError(f"{seen.level2.name}: FLAP's published code needs at least 2 windows, found {n}")
    return fluctuation


def by_kind(
    module: Depth2Module, seen: Seen, attention: Criterion = output_energy, ffn: Criterion = output_energy
) -> Tensor:
    """One criterion for heads, another for FFN channels."""
    return (attention if module.kind == "attention" else ffn)(module, seen)


@torch.no_grad()
def obs_cost(module: Depth2Module, seen: Seen) -> Tensor:
    """What removing one unit costs *after* all others were refitted: the optimal brain surgeon's exact price.

    tr(B_u ([H^-1]_uu)^-1 B_u') / n with H = Z'Z + damp * mean diagonal * I (about the mean if level 2 has a bias, which
    the refit solves too): the increase of ||Y - Z B'||^2 per token when unit u goes and level 2 is solved again. A unit
    that others can imitate is cheap however loud it is. Exact for one unit at a time; two cheap twins cannot both go
    (see :func:`~greedy_helpers.greedy.exact_greedy`). Float64 [n_units].

    Raises:
        ValueError: damp <= 0 with fewer tokens than channels; no or hardly any damping with channels that are never on,
            or that equal each other (H is singular).
    """
    linear = module.level2.linear
    wide = None if seen.level2.xx.device.type == "mps" else torch.float64  # decides what goes; mps has no float64
    system = ridge(seen.level2, seen.damp, centred=linear.bias is not None, dtype=wide)
    solution = weight_of(linear).to(system.h).T
    return removal_costs(system.inverse(), solution, module.level2.index.to(system.h.device)) / seen.level2.n


def removal_costs(inverse: Tensor, solution: Tensor, index: Tensor) -> Tensor:
    """tr(B_g' ([H^-1]_gg)^-1 B_g) for the channels g of every unit: [n_units].

    Args:
        inverse: [n, n], H^-1; solution: [n, d_y], B, the minimiser on all n channels.
        index: long [n_units, width].
    """
    if index.shape[1] == 1:
        channels = index[:, 0]
        return solution[channels].square().sum(1) / inverse.diagonal()[channels]
    return weighted_square(inverse[index[:, :, None], index[:, None, :]], solution[index])


def weighted_square(blocks: Tensor, b: Tensor) -> Tensor:
    """tr(B_u' S_u^-1 B_u) for positive definite S [units, width, width] and B [units, width, d_y]: [units].

    By Cholesky, as ||L^-1 B||^2. Batched LU is wrong on some processors: see tests/test_numerics.py.
    """
    factor = torch.linalg.cholesky(blocks)
    return torch.linalg.solve_triangular(factor, b, upper=False).square().sum((1, 2))


def taylor_scores(
    model: PreTrainedModel,
    tokens: Tensor,
    kind: str = "element1",
    batch_size: int = 1,
    *,
    unit: UnitChoice = "query",
) -> dict[str, Tensor]:
    """LLM-Pruner's criterion (Ma et al., arXiv 2305.11627): the first or second order change of the loss.

    Objective approximation: one backward pass per batch over the *dense* model, so it needs the memory of training.
    With g = dL/dW of the mean loss and a = mean over windows of the squared per-window gradients (diagonal Fisher):

    - `"vector"`: |sum_k w_k g_k| over a channel's weights, the sign kept until the end,
    - `"element1"`: sum_k |w_k g_k|,
    - `"element2"`: sum_k w_k^2 a_k,
    - `"mix"`: sum_k |w_k g_k - w_k^2 a_k / 2|.

    A channel's weights are its row in each level-1 linear and its column of level 2; a unit is the sum over its
    channels. A KV head as a unit (`unit="kv"`) counts with the query heads that really share it; the published code
    folds heads with a stride and credits others.

    Args:
        tokens: long [n, seq], the text whose loss is differentiated.
        batch_size: windows per backward pass for g; a is always taken window by window.
        unit: see :func:`~greedy_helpers.structure.depth2_modules`.

    Returns:
        Module name -> scores, float64 [n_units], for :func:`fixed_scores`.

    Raises:
        ValueError: another kind, or a model whose blocks are on the disk.
    """
    if kind not in ("vector", "element1", "element2", "mix"):
        raise ValueError(f"taylor_scores: expected kind 'vector', 'element1', 'element2' or 'mix', found {kind!r}")
    check_tokens(model, tokens, packed=True)
    modules = depth2_modules(model, unit=unit)
    weights = {group.path: group.linear.weight for module in modules for group in module.groups}
    if absent := next((path for path, weight in weights.items() if weight.is_meta), None):
        raise ValueError(f"taylor_scores: expected the whole model in memory, found {absent} on the disk")
    first, second = kind != "element2", kind in ("element2", "mix")

    def zeros(wanted: bool) -> dict[str, Tensor]:
        wide = {path: torch.promote_types(weight.dtype, torch.float32) for path, weight in weights.items()}
        return {path: torch.zeros_like(weight, dtype=wide[path]) for path, weight in weights.items() if wanted}

    gradient, fisher = zeros(first), zeros(second)
    with eval_mode(model), torch.enable_grad(), asking_for_gradients(weights.values(), True):
        for window in tokens.split(1 if second else batch_size):
            window = window.to(model.device)
            logits = model(input_ids=window, use_cache=False).logits[:, :-1].float()
            loss = F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten().long())
            for path, g in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
                if first:
                    gradient[path].add_(g, alpha=len(window) / len(tokens))
                if second:
                    fisher[path].addcmul_(g.to(fisher[path]), g.to(fisher[path]), value=1 / len(tokens))
    scores = {}
    for module in modules:
        scores[module.name] = torch.zeros(module.n_units, dtype=torch.float64, device=model.device)
        for group in module.groups:
            w, path = group.linear.weight.detach().double(), group.path
            change = torch.zeros_like(w) if kind == "element2" else w * gradient[path].double()
            if second:
                curvature = w.square() * fisher[path].double()
                change = curvature if kind == "element2" else (change - curvature / 2).abs()
            if isinstance(group.linear, Conv1D):
                change = change.t()
            over = 1 if group.side == "out" else 0
            channels = change.sum(over).abs() if kind == "vector" else change.abs().sum(over)
            scores[module.name] += channels[group.index.to(channels.device)].sum(1)
    return scores


def fixed_scores(module: Depth2Module, seen: Seen | None = None, *, scores: Mapping[str, Tensor]) -> Tensor:
    """Scores that are known already, by module name: `partial(fixed_scores, scores=...)`.

    For methods that score the dense model once (FLAP, LLM-Pruner: :func:`taylor_scores`), and for scores from other
    text than the refit's (:func:`~greedy_helpers.pruning.scores_of`).

    Raises:
        KeyError: a module without scores.
        ValueError: scores for another number of units.
    """
    if module.name not in scores:
        raise KeyError(f"{module.name}: no scores; there are some for {', '.join(list(scores)[:3])}, ...")
    if len(scores[module.name]) != module.n_units:
        raise ValueError(
            f"{module.name}: the scores are for {len(scores[module.name])} units, found {module.n_units}; take "
            "them on the model as it is"
        )
    return scores[module.name]


def random_scores(module: Depth2Module, seen: Seen | None = None, seed: int = 0) -> Tensor:
    """Chance, the baseline to beat: the same scores for the same seed and module name. Float64 [n_units]."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{module.name}".encode()))
    return torch.rand(module.n_units, generator=generator, dtype=torch.float64)
