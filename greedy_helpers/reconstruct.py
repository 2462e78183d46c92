"""Recovery without retraining: refit a layer to the dense model's outputs by ridge least squares (sec. 3.3)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .moments import Moments
from .structure import set_weight, weight_of

# In the place of a damping: choose one for every refit, see `choose_damp`.
HELD_OUT = "held out"
DAMPS = (1e-3, 1e-2, 1e-1, 1.0, 10.0, math.inf)


@dataclass(frozen=True)
class Solution:
    """A ridge solution and how well its data determined it.

    Attributes:
        weight, bias: float64 [d_y, d_x] and [d_y] (None for a layer without a bias).
        damp: the damping as a share of the mean diagonal of X'X; infinite: nothing was changed.
        lam: the absolute damping, `damp` times the mean diagonal of X'X.
        tokens, features: rows of X, and columns of X that are not always zero.
        rank: of X'X: at most the smaller of the two; counted from eigenvalues where they were computed.
        condition: estimated condition number of X'X + lam I (largest over smallest eigenvalue).
        method: `"cholesky"`, `"eigen"` where rounding left no positive pivots, or `"none"`.
    """

    weight: Tensor = field(repr=False)
    bias: Tensor | None = field(repr=False)
    damp: float
    lam: float
    tokens: int
    features: int
    rank: int
    condition: float
    method: str


class Ridge:
    """H = X'X + lam I, factorised once for everything that is solved with it.

    The factorisation is Cholesky's, which does not care how the features are scaled: a channel that is a hundred times
    as loud as the rest costs the others no digit, in float32 either. Where rounding leaves a pivot that vanishes beside
    its own diagonal entry, a float32 H is factorised again in float64: loud features that agree, such as those that are
    on at the first token only, need it. Where that fails too (equal features, no damping), the eigenvectors are taken
    instead, of H scaled to a unit diagonal; then directions that the data do not determine are left out.

    Attributes:
        h: [d, d]; with `centred` X'X is taken about the mean. lam: `damp` times its mean diagonal.
        constant: bool [d], with `centred`: features that do not vary. They teach nothing, so their weights stay.
        factor: H = L L', lower [d, d]; None where the eigenvectors serve.
        rank: of X'X. condition: of H. Both are bounds with Cholesky, see :class:`Solution`.
    """

    def __init__(self, moments: Moments, damp: float, centred: bool, dtype: torch.dtype | None = None) -> None:
        self.name, self.damp = moments.name, damp
        self.h = h = moments.xx.to(dtype, copy=True)
        self.constant: Tensor | None = None
        if centred:
            x = moments.x.to(h)
            h.addr_(x, x, alpha=-1 / moments.n)
            # The sums' own rounding, whatever the precision in which they are solved now; in single precision it does
            # not grow, as only some ten thousand tokens are added up at a time.
            single = moments.xx.dtype == torch.float32
            rounding = torch.finfo(moments.xx.dtype).eps * (256 if single else 8 * (len(h) + moments.n**0.5))
            self.constant = h.diagonal() <= rounding * moments.xx.diagonal()
            # what is left of features that do not vary is rounding
            h[self.constant], h[:, self.constant] = 0, 0
        self.features = int((moments.xx.diagonal() > 0).sum())
        self.rank = min(self.features, moments.n - centred)
        self.lam = (damp * h.diagonal().mean()).item()
        h.diagonal().add_(self.lam)
        floor = torch.finfo(h.dtype).eps * len(h)
        if moments.xx.dtype != torch.float64:
            floor = max(floor, 8 * torch.finfo(moments.xx.dtype).eps)  # what its sums are known to
        self.factor = _cholesky(h, floor)
        if self.factor is None and h.dtype == torch.float32 and h.device.type != "mps":  # which has no float64
            self.h = h = h.double()
            floor = 8 * torch.finfo(torch.float32).eps
            self.factor = _cholesky(h, floor)
        if self.factor is None:
            self._scale = torch.where(h.diagonal() > 0, h.diagonal(), 1).rsqrt()  # of a channel that is never on: 1
            values, vectors = torch.linalg.eigh(h * self._scale * self._scale[:, None])
            known = values > floor * values[-1]
            self._values, self._vectors = values[known], vectors[:, known]
            self.rank = min(self.rank, int(known.sum())) if damp == 0 else self.rank

    @property
    def method(self) -> str:
        return "eigen" if self.factor is None else "cholesky"

    def solve(self, rest: Tensor) -> Tensor:
        """H^-1 R for R [d, d_y], in H's dtype; zero where R is."""
        rest = rest.to(self.h)
        if self.factor is not None:
            return torch.cholesky_solve(rest, self.factor)
        scale, vectors = self._scale[:, None], self._vectors
        return scale * (vectors @ ((vectors.T @ (scale * rest)) / self._values[:, None]))

    def inverse(self) -> Tensor:
        """H^-1: [d, d].

        Raises:
            ValueError: H is singular; what its pseudo-inverse says of removing a feature is wrong.
        """
        if self.factor is None:
            raise ValueError(
                f"{self.name}: the {len(self.h)} channels are not independent on the calibration tokens (one is never "
                f"on, or two are equal); expected a larger damp, e.g. 0.01, found {self.damp:g}"
            )
        return torch.cholesky_inverse(self.factor)

    def condition(self, iterations: int = 4) -> float:
        """Power iterations on H and on H^-1: a lower bound, usually within some percent."""
        start = torch.randn(len(self.h), 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(self.h)
        sizes = []
        for apply in (self.h.matmul, self.solve):
            v = start / start.norm()
            for _ in range(iterations):
                v = apply(v)
                size = v.norm()
                v = v / size
            sizes.append(size)
        return max(1.0, (sizes[0] * sizes[1]).item())


def _cholesky(h: Tensor, floor: float) -> Tensor | None:
    """The lower factor; None if a pivot vanishes, up to `floor`, beside its diagonal entry."""
    factor, failed = torch.linalg.cholesky_ex(h)
    return None if failed or (factor.diagonal().square() <= floor * h.diagonal()).any() else factor


def ridge(moments: Moments, damp: float, centred: bool, dtype: torch.dtype | None = None) -> Ridge:
    """The factorised H of these moments, in their dtype or in `dtype`; made once, and kept with them.

    Raises:
        ValueError: damp < 0, or damp = 0 with fewer tokens than features.
    """
    d_x = len(moments.xx)
    if damp < 0:
        raise ValueError(f"{moments.name}: expected damp >= 0, found {damp}")
    if moments.n < d_x + centred and damp == 0:
        raise ValueError(
            f"{moments.name}: {moments.n} calibration tokens for {d_x} input features; expected at least as many "
            "tokens as features, or damp > 0"
        )
    key = ("ridge", damp, centred, dtype or moments.xx.dtype)
    if key not in moments.solved:
        moments.solved[key] = Ridge(moments, damp, centred, dtype)
    return moments.solved[key]


def normal_equations(
    moments: Moments,
    weight: Tensor,
    bias: Tensor | None = None,
    damp: float = 1e-2,
    *,
    through: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Ridge, Tensor]:
    """(H, R) with H = X'X + lam I and R = X'(Y - X W0'): the ridge solution is W0 + (H^-1 R)'.

    Without targets in `moments` they are the layer's own outputs, so R = 0. With a bias the moments are centred.
    `through`: see :func:`solve`. `dtype`: see :func:`ridge`.

    Raises:
        ValueError: see :func:`ridge`.
    """
    system = ridge(moments, damp, bias is not None, dtype)
    w = weight.to(system.h).T
    if moments.xy is None:
        if through:
            raise ValueError(f"{moments.name}: expected what the layer reads in the dense model (Remedy.refits_level1)")
        return system, torch.zeros_like(w)
    xx, xy, x, y = (part.to(system.h) for part in (moments.xx, moments.xy, moments.x, moments.y))
    if through:
        rest = xy - xx
        if bias is not None:
            rest.addr_(x, y - x, alpha=-1 / moments.n)
            rest[system.constant] = 0
        return system, rest @ w
    rest = torch.addmm(xy, xx, w, alpha=-1)
    if bias is not None:
        rest.addr_(x, y - x @ w, alpha=-1 / moments.n)
        rest[system.constant] = 0
    return system, rest


def solve(
    moments: Moments, weight: Tensor, bias: Tensor | None = None, damp: float | str = 1e-2, *, through: bool = False
) -> Solution:
    """The weight [d_y, d_x] and bias [d_y] nearest to the targets, from the moments alone.

    Minimises ||Y - X W' - b||^2 + lam ||W - W0||^2 with W0 the current `weight` and lam = `damp` times the mean
    diagonal of X'X. The paper states no damping (Algorithm 1), but its 16 x 128 tokens are fewer than LLaMA's 4,096
    features, so X'X is singular without one; pulling toward the current weight, not toward zero, makes no data mean
    no change. With a bias the moments are centred and the bias solves exactly, undamped.

    At W0 the penalty is zero, so the error on the calibration tokens can only go down.

    Args:
        damp: or :data:`HELD_OUT`, see :func:`choose_damp`.
        through: the moments' y is not the target but another input of the same layer (the dense model's), and the
            targets are what the layer, as it is now, makes of it: X'Y = (X'y) W0', so no output is ever computed.

    Raises:
        ValueError: damp < 0, or damp = 0 with fewer tokens than features.
        FloatingPointError: the solution holds NaN or Inf.
    """
    d_x = len(moments.xx)
    if damp == HELD_OUT:
        damp = choose_damp(moments, weight, bias, through=through)
    if math.isinf(damp):
        features = int((moments.xx.diagonal() > 0).sum())
        return Solution(weight, bias, damp, damp, moments.n, features, min(features, moments.n), 1.0, "none")
    system, rest = normal_equations(moments, weight, bias, damp, through=through)
    if moments.n < d_x + (bias is not None):
        warnings.warn(
            f"{moments.name}: {moments.n} calibration tokens for {d_x} input features: the refit is determined by the "
            f"damping ({damp}) as much as by data",
            stacklevel=3,
        )
    new, condition = weight.to(system.h), 1.0
    new_bias = None
    if system.features:  # an input that is always zero teaches nothing
        new, condition = new + system.solve(rest).T, system.condition()
    if not new.isfinite().all():
        raise FloatingPointError(f"{moments.name}: the least-squares solution holds NaN or Inf (damp={damp})")
    if bias is not None:
        new_bias = _bias_of(new, moments, weight, bias, through)
    return Solution(new, new_bias, damp, system.lam, moments.n, system.features, system.rank, condition, system.method)


def _bias_of(new: Tensor, moments: Moments, weight: Tensor, bias: Tensor, through: bool) -> Tensor:
    """The bias that takes the mean of `new`'s outputs to the targets' mean."""
    aim = moments.y
    if through or aim is None:  # what the layer, as it is now, makes of an input
        aim = weight.to(new) @ (moments.y if through else moments.x).to(new) + moments.n * bias.to(new)
    return (aim.to(new) - new @ moments.x.to(new)) / moments.n


@torch.no_grad()
def choose_damp(
    moments: Moments,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    through: bool = False,
    candidates: Sequence[float] = DAMPS,
) -> float:
    """The damping whose solution from the other tokens is nearest to the targets on the held-out ones.

    From moments alone, without another pass: the error of W is tr(W H W') - 2 tr(W R') and a constant, with the
    held-out tokens' H = X'X and R = Y'X. Infinity, which is to leave the layer as it is, is among the candidates, so a
    refit that does not carry over to text it has not seen is not made.

    Raises:
        ValueError: the moments hold no tokens out.
    """
    held = moments.held_out
    if held is None or not 0 < held.n < moments.n:
        raise ValueError(
            f"{moments.name}: expected calibration windows that are held out, to choose a damping by, found "
            f"{0 if held is None else held.n} of {moments.n} tokens"
        )
    fitted = moments.fitted()
    held = held.aim_through(weight, bias) if through else held
    _, rest = normal_equations(fitted, weight, bias, max(candidates, key=math.isfinite), through=through)
    fitted.solved.clear()  # one factor of that size at a time
    errors = {}
    for damp in candidates:
        new, new_bias = weight.to(rest), bias
        if math.isfinite(damp):
            new = new + Ridge(fitted, damp, bias is not None).solve(rest).T
            new_bias = None if bias is None else _bias_of(new, fitted, weight, bias, through)
        errors[damp] = held.squared_error(new, new_bias).item()
    return min(errors, key=lambda damp: (errors[damp], -damp))


@torch.no_grad()
def refit(
    linears: Sequence[nn.Module], moments: Moments, damp: float | str = 1e-2, *, through: bool = False
) -> Solution:
    """Refit linears that read the same input X to the targets Y, in place, with one factorisation.

    `moments` pairs X [tokens, d_in] with the linears' targets side by side, Y [tokens, sum of d_out]; or, with
    `through`, with what the same linears read in the dense model, [tokens, d_in].

    Raises:
        ValueError, FloatingPointError: see :func:`solve`; the linears are then untouched.
    """
    biases = [linear.bias for linear in linears]
    weight = torch.cat([weight_of(linear) for linear in linears])
    solution = solve(moments, weight, None if biases[0] is None else torch.cat(biases), damp, through=through)
    sizes = [weight_of(linear).shape[0] for linear in linears]
    new_biases = [None] * len(sizes) if solution.bias is None else solution.bias.split(sizes)
    for linear, w, b in zip(linears, solution.weight.split(sizes), new_biases, strict=True):
        set_weight(linear, w, b)
    return solution


@torch.no_grad()
def add_to_bias(linear: nn.Module, shift: Tensor) -> None:
    """Add `shift` [d_out] to a layer's bias; a layer without one gets one (`nn.Linear` of Llama, Mistral, Qwen).

    FLAP's remedy (An et al., section 3.4): the mean of what was removed becomes a constant.
    """
    weight = weight_of(linear)
    if linear.bias is None:
        linear.bias = nn.Parameter(shift.to(weight), requires_grad=linear.weight.requires_grad)
    else:
        set_weight(linear, weight, linear.bias.to(shift) + shift)
