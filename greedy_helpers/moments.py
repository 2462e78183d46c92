"""Second moments of activations, accumulated batch by batch: everything a score or a refit needs to know."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .distributed import all_sum


class Moments:
    """Streaming X'X, X'Y, their sums and Y's energy over all tokens seen so far (uncentred).

    Products are taken in the wider of float32 and the data's dtype and summed in float64, so neither the
    batch size nor float16 activations change the result beyond rounding. Nothing of size [tokens, d] is kept.

    On GPUs TF32 is off for products of float32 data, whatever the global setting. It is on for float16 and bfloat16
    data: their values fit into TF32's 10 bits exactly, so it only makes the same float32 sums faster.

    Attributes:
        n: tokens seen.
        dtype: of the sums, and so of everything that is solved from them. float64; float32 halves the memory, and is
            many times faster on cards without float64 units, where the solution needs no better than 1e-3 or so.
        xx: [d_x, d_x], sum of x x'.
        x: [d_x], sum of x.
        xy, y, yy: [d_x, d_y], [d_y] and a scalar: sums of x y', y and ||y||^2; None without targets.
    """

    def __init__(self, name: str = "input", dtype: torch.dtype = torch.float64) -> None:
        self.name, self.n, self.dtype = name, 0, dtype
        self.xx = self.xy = self.x = self.y = self.yy = None

    @torch.no_grad()  # else sums of what trainable weights made would keep all of it
    def update(self, x: Tensor, y: Tensor | None = None) -> None:
        """Add tokens: x [tokens, d_x] and, if they have targets, y [tokens, d_y] (moved to x's device).

        Raises:
            FloatingPointError: x or y holds NaN or Inf; the layer is named.
        """
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        half = x.dtype.itemsize == 2
        x = x.to(dtype)
        with _tf32(x.device, allowed=half):
            parts = {"xx": x.T @ x, "x": x.sum(0)}
        # One NaN or Inf anywhere in x or y reaches the squares, so two small checks replace two large ones.
        if not parts["xx"].diagonal().isfinite().all():
            raise FloatingPointError(f"{self.name}: NaN or Inf in the activations after {self.n} tokens")
        if y is not None:
            half = half and y.dtype.itemsize == 2
            y = y.to(x.device, dtype, non_blocking=True)
            with _tf32(x.device, allowed=half):
                parts |= {"xy": x.T @ y, "y": y.sum(0), "yy": y.square().sum()}
            if not parts["yy"].isfinite():
                raise FloatingPointError(f"{self.name}: NaN or Inf in the target outputs after {self.n} tokens")
        self.n += len(x)
        for key, part in parts.items():
            total = getattr(self, key)
            setattr(self, key, (part if total is None else total + part).to(self.dtype))

    def reduce(self) -> None:
        """Under `torch.distributed`: the sums over all processes, in every process. Alone: nothing."""
        count = self.xx.new_tensor(self.n, dtype=torch.float64)
        all_sum(count, *(total for total in (self.xx, self.x, self.xy, self.y, self.yy) if total is not None))
        self.n = int(count)

    def select(self, channels: Tensor) -> Moments:
        """The moments of some of x's channels (long [k]): what a new pass over the cut module would find."""
        found = Moments(self.name, self.dtype)
        channels = channels.to(self.xx.device)
        found.n, found.y, found.yy = self.n, self.y, self.yy
        found.xx, found.x = self.xx[channels][:, channels], self.x[channels]
        found.xy = None if self.xy is None else self.xy[channels]
        return found

    def aim_at(self, weight: Tensor, bias: Tensor | None = None) -> Moments:
        """The same inputs with a layer's own outputs as targets: `weight` [d_y, d_x] and `bias` [d_y], no data needed.

        X'Y = X'X W' + X'1 b': what a layer puts out is known from what it reads.
        """
        found = Moments(self.name, self.dtype)
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
        """E[x_j^2], [d_x]."""
        return self.xx.diagonal() / self.n

    @property
    def variance(self) -> Tensor:
        """Var(x_j) over all tokens (divided by n), [d_x]."""
        return (self.mean_square - (self.x / self.n).square()).clamp(min=0)

    def relative_error(self, weight: Tensor, bias: Tensor | None = None) -> float:
        """||Y - X W' - b||^2 / ||Y||^2 of a layer with `weight` [d_y, d_x] and `bias` [d_y], from the moments alone."""
        weight = weight.to(self.xx)
        error = self.yy + torch.trace(weight @ self.xx @ weight.T) - 2 * (weight.T * self.xy).sum()
        if bias is not None:
            bias = bias.to(self.xx)
            error = error + self.n * bias.square().sum() + 2 * bias @ (weight @ self.x) - 2 * bias @ self.y
        return max(0.0, (error / self.yy).item()) if self.yy > 0 else 0.0


@contextmanager
def _tf32(device: torch.device, allowed: bool) -> Iterator[None]:
    """Whether float32 products may be taken in TF32; on the CPU nothing is touched."""
    if device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
