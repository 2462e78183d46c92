"""Criteria: how much each unit of a module matters. A criterion is a function (module, seen) -> scores [n_units].

Higher means keep. Scores are compared inside one module only. Writing your own takes one function; pass it to
:func:`~greedy_helpers.prune.prune` like the ones here.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .moments import Moments
from .structure import Depth2Module, check_tokens, depth2_modules, weight_of


@dataclass(frozen=True)
class Seen:
    """What the calibration tokens show about one module, measured behind the already pruned prefix.

    Attributes:
        level1: moments of the module's input x (read by every level-1 linear): Sigma = level1.xx / level1.n.
        level2: moments of level 2's input z; `level2.mean_square` is E[z_j^2].
        maps: makes an iterator over the attention maps [batch, heads, query, key]; see :meth:`attention_maps`.
        windows: makes an iterator over level 2's inputs per window, [batch, seq, channels]; see
            :meth:`level2_windows`.
        n_keep: how many units will stay, where that is already known.
    """

    level1: Moments
    level2: Moments
    maps: Callable[[], Iterator[Tensor]] | None = None
    windows: Callable[[], Iterator[Tensor]] | None = None
    n_keep: int | None = None

    def attention_maps(self) -> Iterator[Tensor]:
        """Softmax maps [batch, heads, query, key], one batch at a time: one more pass over the block.

        Raises:
            ValueError: nothing to replay, or an attention implementation that computes no maps.
        """
        if self.maps is None:
            raise ValueError(
                f"{self.level1.name}: this criterion needs attention maps; run it through prune or scores_of"
            )
        return self.maps()

    def level2_windows(self) -> Iterator[Tensor]:
        """Level 2's inputs z [batch, seq, channels], one batch at a time: one more pass over the block."""
        if self.windows is None:
            raise ValueError(f"{self.level2.name}: this criterion needs windows; run it through prune or scores_of")
        return self.windows()


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

    Every family of the table stores queries, keys and values in this order, in one linear or in three, so a unit's
    values are the last `dim` channels of its row in the last linear's index. Shared values (multi-query) are the last
    `dim` channels of the layer, the same for all units.
    """
    group, dim = list(module.level1.values())[-1], module.sizes["dim"]
    weight = weight_of(group.linear)
    owned = group.index.numel()
    if owned < group.n_channels:
        return weight[-dim:].expand(module.n_units, -1, -1)
    return weight[group.index[:, -dim:].to(weight.device)]


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
    (`refit="bias"`) it undervalues channels with a large mean.

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


def by_kind(attention: Criterion, ffn: Criterion) -> Criterion:
    """One criterion for heads, another for FFN channels."""

    def criterion(module: Depth2Module, seen: Seen) -> Tensor:
        return (attention if module.kind == "attention" else ffn)(module, seen)

    names = [getattr(part, "__name__", repr(part)) for part in (attention, ffn)]
    criterion.__name__ = f"heads: {names[0]}, channels: {names[1]}"
    return criterion


@torch.no_grad()
def obs_cost(module: Depth2Module, seen: Seen, damp: float = 1e-2) -> Tensor:
    """What removing one unit costs *after* all others were refitted: the optimal brain surgeon's exact price.

    tr(B_u ([H^-1]_uu)^-1 B_u') / n with H = Z'Z + damp * mean diagonal * I: the increase of ||Y - Z B'||^2 per token
    when unit u goes and level 2 is solved again. A unit that others can imitate is cheap however loud it is. Exact for
    one unit at a time; two cheap twins cannot both go (see exact greedy search). Float64 [n_units].

    Raises:
        ValueError: damp <= 0 with fewer tokens than channels (H is singular).
    """
    h = seen.level2.xx
    if damp <= 0 and seen.level2.n < len(h):
        raise ValueError(f"{seen.level2.name}: {seen.level2.n} tokens for {len(h)} channels; expected damp > 0")
    h = h + damp * h.diagonal().mean() * torch.eye(len(h)).to(h)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    weight = weight_of(module.level2.linear).to(h)
    return removal_costs(inverse, weight.T, module.level2.index.to(h.device)) / seen.level2.n


def removal_costs(inverse: Tensor, solution: Tensor, index: Tensor) -> Tensor:
    """tr(B_g' ([H^-1]_gg)^-1 B_g) for the channels g of every unit: [n_units].

    Args:
        inverse: [n, n], H^-1; solution: [n, d_y], B, the minimiser on all n channels.
        index: long [n_units, width].
    """
    blocks = inverse[index[:, :, None], index[:, None, :]]  # [n_units, width, width]
    b = solution[index]  # [n_units, width, d_y]
    return (torch.linalg.solve(blocks, b) * b).sum((1, 2))


def taylor(model: PreTrainedModel, tokens: Tensor, kind: str = "element1", batch_size: int = 1) -> Criterion:
    """LLM-Pruner's criterion (Ma et al., arXiv 2305.11627): the first or second order change of the loss.

    Objective approximation: one backward pass per batch over the *dense* model, so it needs the memory of training.
    With g = dL/dW of the mean loss and a = mean over windows of the squared per-window gradients (diagonal Fisher):

    - `"vector"`: |sum_k w_k g_k| over a channel's weights, the sign kept until the end,
    - `"element1"`: sum_k |w_k g_k|,
    - `"element2"`: sum_k w_k^2 a_k,
    - `"mix"`: sum_k |w_k g_k - w_k^2 a_k / 2|.

    A channel's weights are its row in each level-1 linear and its column of level 2; a unit is the sum over its
    channels. With grouped-query attention each query head is counted for the KV head that it really shares; the
    published code folds heads with a stride and credits others.

    Args:
        tokens: long [n, seq], the text whose loss is differentiated.
        batch_size: windows per backward pass for g; a is always taken window by window.

    Returns:
        A criterion that looks its scores up by module name; the model it is used on has to have the same modules,
        not pruned yet.

    Raises:
        ValueError: another kind.
    """
    if kind not in ("vector", "element1", "element2", "mix"):
        raise ValueError(f"taylor: expected kind 'vector', 'element1', 'element2' or 'mix', found {kind!r}")
    check_tokens(model, tokens)
    modules = depth2_modules(model)
    weights = {group.path: group.linear.weight for module in modules for group in module.groups}
    gradient = {path: torch.zeros_like(weight, dtype=torch.float64) for path, weight in weights.items()}
    fisher = {path: torch.zeros_like(weight, dtype=torch.float64) for path, weight in weights.items()}
    second_order = kind in ("element2", "mix")
    with torch.enable_grad():
        for window in tokens.split(1 if second_order else batch_size):
            window = window.to(model.device)
            logits = model(input_ids=window, use_cache=False).logits[:, :-1].float()
            loss = F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten().long())
            for (path, _), g in zip(weights.items(), torch.autograd.grad(loss, list(weights.values())), strict=True):
                gradient[path] += g.double() * (len(window) / len(tokens))
                if second_order:
                    fisher[path] += g.double().square() / len(tokens)
    scores = {}
    for module in modules:
        total = torch.zeros(module.n_units, dtype=torch.float64, device=model.device)
        for group in module.groups:
            w, g, a = weights[group.path].detach().double(), gradient[group.path], fisher[group.path]
            change = {"element2": w.square() * a, "mix": (w * g - w.square() * a / 2).abs()}.get(kind, w * g)
            if isinstance(group.linear, Conv1D):
                change = change.t()
            over = 1 if group.side == "out" else 0
            channels = change.sum(over).abs() if kind == "vector" else change.abs().sum(over)
            total += channels[group.index.to(channels.device)].sum(1)
        scores[module.name] = total

    def criterion(module: Depth2Module, seen: Seen | None = None) -> Tensor:
        found = scores.get(module.name)
        if found is None or len(found) != module.n_units:
            raise ValueError(
                f"{module.name}: Taylor scores were taken for {0 if found is None else len(found)} units, "
                f"found {module.n_units}; take them on the model as it is"
            )
        return found

    criterion.__name__ = f"taylor_{kind}"
    return criterion


def random_scores(module: Depth2Module, seen: Seen | None = None, seed: int = 0) -> Tensor:
    """Chance, the baseline to beat: the same scores for the same seed and module name. Float64 [n_units]."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{module.name}".encode()))
    return torch.rand(module.n_units, generator=generator, dtype=torch.float64)
