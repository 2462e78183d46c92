"""Second moments of activations, accumulated batch by batch: everything a score or a refit needs to know."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .large.distributed import all_sum

_FOLD = 2**15  # tokens whose products are summed in the products' own dtype before they join the total
_STRIP = 512  # X'X is symmetric: it is computed in strips of so many rows, from the diagonal to the right


def _sum(name: str, meaning: str) -> property:
    """A running sum that is complete whenever somebody reads it; None if there is none."""

    def read(self: Moments) -> Tensor | None:
        self._fold()
        return self._total.get(name)

    def write(self: Moments, value: Tensor | None) -> None:
        self._fold()
        self._total[name] = value

    return property(read, write, doc=meaning)


class Moments:
    """Streaming X'X, X'Y, their sums and Y's energy over all tokens seen so far (uncentred).

    Products are taken in the wider of float32 and the data's dtype. They are summed in it over some ten thousand
    tokens, and then in float64, so neither the batch size nor float16 activations change the result beyond rounding.
    Nothing of size [tokens, d] is kept.

    On GPUs TF32 is off for products of float32 data, whatever the global setting. It is on for float16 and bfloat16
    data: their values fit into TF32's 10 bits exactly, so it only makes the same float32 sums faster.

    Attributes:
        n: tokens seen.
        dtype: of the sums, and so of everything that is solved from them. float64; float32 halves the memory, and is
            many times faster on cards without float64 units, where the solution needs no better than 1e-3 or so.
        held_out: moments of some of these tokens alone, for choosing between solutions; None if nobody asked for them.
        solved: what has been computed from the sums so far, such as a factorisation; emptied by :meth:`update`.
    """

    xx = _sum("xx", "[d_x, d_x], sum of x x'.")
    x = _sum("x", "[d_x], sum of x.")
    xy = _sum("xy", "[d_x, d_y], sum of x y'; None without targets.")
    y = _sum("y", "[d_y], sum of y; None without targets.")
    yy = _sum("yy", "A scalar, sum of ||y||^2; None without targets.")

    def __init__(self, name: str = "input", dtype: torch.dtype = torch.float64, *, hold_out: bool = False) -> None:
        self.name, self.n, self.dtype = name, 0, dtype
        self.held_out = Moments(name, dtype) if hold_out else None
        self.solved: dict[Hashable, Any] = {}
        self._total: dict[str, Tensor | None] = {}
        self._recent: dict[str, Tensor] = {}
        self._n_recent = 0

    @torch.no_grad()  # else sums of what trainable weights made would keep all of it
    def update(self, x: Tensor, y: Tensor | None = None, held_out: Tensor | None = None) -> None:
        """Add tokens: x [tokens, d_x] and, if they have targets, y [tokens, d_y] (moved to x's device).

        Args:
            held_out: bool [tokens], which of them are held out, where that is asked for.
        """
        self.solved.clear()
        if self.held_out is not None and held_out is not None and held_out.any():
            mask = held_out.to(x.device)
            self.held_out.update(x[mask], None if y is None else y.to(x.device)[mask])
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        half = x.dtype.itemsize == 2
        x = x.to(dtype)
        with _tf32(x.device, allowed=half):
            self._add_gram(x)
        self._add("x", x.sum(0))
        if y is not None:
            half = half and y.dtype.itemsize == 2
            y = y.to(x.device, dtype, non_blocking=True)
            with _tf32(x.device, allowed=half):
                self._add_product("xy", x, y)
            self._add("y", y.sum(0))
            self._add("yy", torch.linalg.vector_norm(y).square())
        self.n += len(x)
        self._n_recent += len(x)
        if self._n_recent >= _FOLD:
            self._fold()

    def _add(self, key: str, part: Tensor) -> None:
        self._recent[key] = part if key not in self._recent else self._recent[key].add_(part)

    def _add_product(self, key: str, x: Tensor, y: Tensor) -> None:
        if key in self._recent:
            self._recent[key].addmm_(x.T, y)
        else:
            self._recent[key] = x.T @ y

    def _add_gram(self, x: Tensor) -> None:
        """X'X right of the diagonal; :meth:`_fold` mirrors it."""
        if "xx" not in self._recent:
            self._recent["xx"] = x.new_zeros(x.shape[1], x.shape[1])
        for start in range(0, x.shape[1], _STRIP):
            strip = slice(start, start + _STRIP)
            self._recent["xx"][strip, start:].addmm_(x[:, strip].T, x[:, start:])

    def _fold(self) -> None:
        """Let the recent sums join the total.

        Raises:
            FloatingPointError: NaN or Inf in x or y; the layer is named.
        """
        if not self._n_recent:
            return
        recent = self._recent
        # One NaN or Inf anywhere in x or y reaches the squares, so two small checks replace two large ones.
        for key, squares in (("activations", recent["xx"].diagonal()), ("target outputs", recent.get("yy"))):
            if squares is not None and not squares.isfinite().all():
                raise FloatingPointError(f"{self.name}: NaN or Inf in the {key}")
        self._recent, self._n_recent = {}, 0  # not before: what is spoilt stays so, whoever reads next
        for start in range(0, len(recent["xx"]), _STRIP):
            end = start + _STRIP
            recent["xx"][end:, start:end] = recent["xx"][start:end, end:].T
            corner = recent["xx"][start:end, start:end]
            corner.copy_((corner + corner.T) / 2)
        for key, part in recent.items():
            total = self._total.get(key)
            # not in place: moments made from these (select, aim_at) share sums with them
            self._total[key] = part.to(self.dtype) if total is None else total + part

    def reduce(self) -> None:
        """Under `torch.distributed`: the sums over all processes, in every process. Alone: nothing."""
        count = self.xx.new_tensor(self.n, dtype=torch.float64)
        all_sum(count, *(total for total in self._total.values() if total is not None))
        self.n = int(count)
        if self.held_out is not None:
            self.held_out.reduce()

    def fitted(self) -> Moments:
        """The moments of the tokens that are not held out."""
        held = self.held_out
        self._fold()
        held._fold()
        rest = self._with(
            **{key: total if total is None else total - held._total[key] for key, total in self._total.items()}
        )
        rest.n = self.n - held.n
        return rest

    def _with(self, **sums: Tensor | None) -> Moments:
        """The same tokens with other sums."""
        other = Moments(self.name, self.dtype)
        other.n, other._total = self.n, sums
        return other

    def select(self, channels: Tensor) -> Moments:
        """The moments of some of x's channels (long [k]): what a new pass over the cut module would collect."""
        channels = channels.to(self.xx.device)
        xy = None if self.xy is None else self.xy[channels]
        chosen = self._with(xx=self.xx[channels][:, channels], x=self.x[channels], xy=xy, y=self.y, yy=self.yy)
        chosen.held_out = self.held_out and self.held_out.select(channels)
        return chosen

    def aim_at(self, weight: Tensor, bias: Tensor | None = None) -> Moments:
        """The same inputs with a layer's own outputs as targets: `weight` [d_y, d_x] and `bias` [d_y], no data needed.

        X'Y = X'X W' + X'1 b': what a layer puts out is known from what it reads.
        """
        w = weight.to(self.xx)
        xy, y = self.xx @ w.T, w @ self.x
        yy = (w * xy.T).sum()
        if bias is not None:
            b = bias.to(self.xx)
            yy = yy + 2 * b @ y + self.n * b.square().sum()
            xy, y = xy + torch.outer(self.x, b), y + self.n * b
        aimed = self._with(xx=self.xx, x=self.x, xy=xy, y=y, yy=yy)
        aimed.held_out = self.held_out and self.held_out.aim_at(weight, bias)
        return aimed

    @property
    def mean_square(self) -> Tensor:
        """E[x_j^2], [d_x]."""
        return self.xx.diagonal() / self.n

    @property
    def variance(self) -> Tensor:
        """Var(x_j) over all tokens (divided by n), [d_x]."""
        return (self.mean_square - (self.x / self.n).square()).clamp(min=0)

    def aim_through(self, weight: Tensor, bias: Tensor | None = None) -> Moments:
        """The same inputs, paired with what a layer makes of the y they are paired with now; without Y's energy."""
        w = weight.to(self.xx)
        xy, y = self.xy @ w.T, w @ self.y
        if bias is not None:
            b = bias.to(self.xx)
            xy, y = xy + torch.outer(self.x, b), y + self.n * b
        return self._with(xx=self.xx, x=self.x, xy=xy, y=y, yy=None)

    def squared_error(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """||Y - X W' - b||^2 - ||Y||^2 of a layer with `weight` [d_y, d_x] and `bias` [d_y], from the moments alone."""
        w = weight.to(self.xx)
        error = ((w @ self.xx - 2 * self.xy.T) * w).sum()
        if bias is not None:
            bias = bias.to(self.xx)
            error = error + self.n * bias.square().sum() + 2 * bias @ (w @ self.x) - 2 * bias @ self.y
        return error

    def relative_error(self, weight: Tensor, bias: Tensor | None = None) -> float:
        """||Y - X W' - b||^2 / ||Y||^2 of such a layer."""
        error = self.yy + self.squared_error(weight, bias)
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
