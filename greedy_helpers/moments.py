"""Second moments of activations, accumulated batch by batch: everything a score or a refit needs to know."""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """Streaming X'X, X'Y, their sums and Y's energy over all tokens seen so far (uncentred).

    Products are taken in the wider of float32 and the data's dtype and summed in float64, so neither the
    batch size nor float16 activations change the result beyond rounding. Nothing of size [tokens, d] is kept.

    Attributes:
        n: tokens seen.
        xx: float64 [d_x, d_x], sum of x x'.
        x: float64 [d_x], sum of x.
        xy, y, yy: float64 [d_x, d_y], [d_y] and a scalar: sums of x y', y and ||y||^2; None without targets.
    """

    def __init__(self, name: str = "input") -> None:
        self.name, self.n = name, 0
        self.xx = self.xy = self.x = self.y = self.yy = None

    def update(self, x: Tensor, y: Tensor | None = None) -> None:
        """Add tokens: x [tokens, d_x] and, if they have targets, y [tokens, d_y].

        Raises:
            FloatingPointError: x or y holds NaN or Inf; the layer is named.
        """
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        x = x.to(dtype)
        parts = {"xx": x.T @ x, "x": x.sum(0)}
        # One NaN or Inf anywhere in x or y reaches the squares, so two small checks replace two large ones.
        if not parts["xx"].diagonal().isfinite().all():
            raise FloatingPointError(f"{self.name}: NaN or Inf in the activations after {self.n} tokens")
        if y is not None:
            y = y.to(dtype)
            parts |= {"xy": x.T @ y, "y": y.sum(0), "yy": y.square().sum()}
            if not parts["yy"].isfinite():
                raise FloatingPointError(f"{self.name}: NaN or Inf in the target outputs after {self.n} tokens")
        self.n += len(x)
        for key, part in parts.items():
            total = getattr(self, key)
            setattr(self, key, part.double() if total is None else total + part)

    def select(self, channels: Tensor) -> Moments:
        """The moments of some of x's channels (long [k]): what a new pass over the cut module would find."""
        found = Moments(self.name)
        channels = channels.to(self.xx.device)
        found.n, found.y, found.yy = self.n, self.y, self.yy
        found.xx, found.x = self.xx[channels][:, channels], self.x[channels]
        found.xy = None if self.xy is None else self.xy[channels]
        return found

    def aim_at(self, weight: Tensor, bias: Tensor | None = None) -> Moments:
        """The same inputs with a layer's own outputs as targets: `weight` [d_y, d_x] and `bias` [d_y], no data needed.

        X'Y = X'X W' + X'1 b': what a layer puts out is known from what it reads.
        """
        found = Moments(self.name)
        w = weight.to(self.xx)
        found.n, found.xx, found.x = self.n, self.xx, self.x
        found.xy, found.y = self.xx @ w.T, w @ self.x
        found.yy = (w * found.xy.T).sum()
        if bias is not None:
            b = bias.to(self.xx)
            found.yy = found.yy + 2 * b @ found.y + self.n * b.square().sum()
            found.xy, found.y = found.xy + torch.outer(self.x, b), found.y + self.n * b
        return found

    @property
    def mean_square(self) -> Tensor:
        """E[x_j^2], float64 [d_x]."""
        return self.xx.diagonal() / self.n

    @property
    def variance(self) -> Tensor:
        """Var(x_j) over all tokens (divided by n), float64 [d_x]."""
        return (self.mean_square - (self.x / self.n).square()).clamp(min=0)

    def relative_error(self, weight: Tensor, bias: Tensor | None = None) -> float:
        """||Y - X W' - b||^2 / ||Y||^2 of a layer with `weight` [d_y, d_x] and `bias` [d_y], from the moments alone."""
        weight = weight.to(self.xx)
        error = self.yy + torch.trace(weight @ self.xx @ weight.T) - 2 * (weight.T * self.xy).sum()
        if bias is not None:
            bias = bias.to(self.xx)
            error = error + self.n * bias.square().sum() + 2 * bias @ (weight @ self.x) - 2 * bias @ self.y
        return max(0.0, (error / self.yy).item()) if self.yy > 0 else 0.0
