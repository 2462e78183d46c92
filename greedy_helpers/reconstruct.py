"""Recovery without retraining: refit a layer to the dense model's outputs by ridge least squares (sec. 3.3)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .moments import Moments
from .structure import set_weight, weight_of


def least_squares(
    moments: Moments, weight: Tensor, bias: Tensor | None = None, damp: float = 1e-2
) -> tuple[Tensor, Tensor | None]:
    """The weight [d_y, d_x] and bias [d_y] nearest to the targets: float64, from the moments alone.

    Minimises ||Y - X W' - b||^2 + lam ||W - W0||^2 with W0 the current `weight` and lam = `damp` times the mean
    diagonal of X'X. The paper states no damping (Algorithm 1), but its 16 x 128 tokens are fewer than LLaMA's 4,096
    features, so X'X is singular without one; pulling toward the current weight, not toward zero, makes no data mean
    no change. With a bias the moments are centred and the bias solves exactly, undamped.

    At W0 the penalty is zero, so the error on the calibration tokens can only go down.

    Raises:
        ValueError: damp < 0, or damp = 0 with fewer tokens than features.
        FloatingPointError: the solve gave NaN or Inf, or X'X + lam I is not positive definite.
    """
    d_x = moments.xx.shape[0]
    if damp < 0:
        raise ValueError(f"{moments.name}: expected damp >= 0, found {damp}")
    if moments.n < d_x + (bias is not None):
        numbers = f"{moments.name}: {moments.n} calibration tokens for {d_x} input features"
        if damp == 0:
            raise ValueError(f"{numbers}; expected at least as many tokens as features, or damp > 0")
        warnings.warn(f"{numbers}: the refit is determined by the damping ({damp}) as much as by data", stacklevel=2)
    w0 = weight.to(moments.xx)
    xx, xy = moments.xx, moments.xy
    if bias is not None:
        xx = xx - torch.outer(moments.x, moments.x) / moments.n
        xy = xy - torch.outer(moments.x, moments.y) / moments.n
    lam = damp * xx.diagonal().mean()
    new = w0
    if xx.diagonal().mean() > 0:  # an input that is always zero teaches nothing
        factor, failed = torch.linalg.cholesky_ex(xx + lam * torch.eye(d_x).to(xx))
        # Whether a singular matrix fails to factor is a matter of rounding; a vanishing pivot shows it anyway.
        if failed or factor.diagonal().min() ** 2 <= torch.finfo(xx.dtype).eps * d_x * xx.diagonal().max():
            raise FloatingPointError(f"{moments.name}: X'X is singular with damp={damp}; expected a larger one")
        new = w0 + torch.cholesky_solve(xy - xx @ w0.T, factor).T
    if not new.isfinite().all():
        raise FloatingPointError(f"{moments.name}: the least-squares solution holds NaN or Inf (damp={damp})")
    return new, None if bias is None else (moments.y - new @ moments.x) / moments.n


def refit(linears: Sequence[nn.Module], moments: Moments, damp: float = 1e-2) -> None:
    """Refit linears that read the same input X to the targets Y, in place, with one factorisation.

    `moments` pairs X [tokens, d_in] with the linears' targets side by side, Y [tokens, sum of d_out].

    Raises:
        ValueError, FloatingPointError: see :func:`least_squares`; the linears are then untouched.
    """
    biases = [linear.bias for linear in linears]
    weight = torch.cat([weight_of(linear) for linear in linears])
    bias = None if biases[0] is None else torch.cat(biases)
    weight, bias = least_squares(moments, weight, bias, damp)
    sizes = [weight_of(linear).shape[0] for linear in linears]
    new_biases = [None] * len(sizes) if bias is None else bias.split(sizes)
    for linear, w, b in zip(linears, weight.split(sizes), new_biases, strict=True):
        set_weight(linear, w, b)
