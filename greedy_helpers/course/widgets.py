"""Pictures with a slider, over results that are there already; still pictures where nobody can move one.

An explorer computes its numbers when it is made, so moving the slider only draws. As the last line of a cell it shows
the slider in a live notebook (JupyterLab, Colab) and its still picture everywhere else: on GitHub, in exported HTML, in
a committed notebook, and where ipywidgets is not installed.
"""

from __future__ import annotations

import base64
import io
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from ..moments import Moments
from ..reconstruct import solve
from ..similarity import redundant_heads
from .graphs import similarity_graph
from .plots import PALETTE

_MARKERS = "osD^vPX*"
_TICKS = [digit * 10**power for power in range(6) for digit in (1, 1.5, 2, 3, 5, 7)]  # for perplexities
_WIDGET = "application/vnd.jupyter.widget-view+json"


class Explorer:
    """A slider, a picture and one sentence about it.

    Attributes:
        values: the positions of the slider.
        value: where it stands. Setting it moves the slider and redraws.
        widget: the ipywidgets box for the front end, made when first asked for; None if ipywidgets is not installed.
    """

    def __init__(
        self,
        draw: Callable[[Figure, int], str],
        values: Sequence[float],
        start: float,
        name: str,
        form: str = "{:g}",
        size: tuple[float, float] = (9.0, 3.8),
    ) -> None:
        """`draw(figure, i)` draws `values[i]` on an empty figure of `size` inches and returns the sentence about it.

        Args:
            start: the first position: the nearest of `values`.
            name, form: the slider's label, and how its values are written.

        Raises:
            ValueError: no values.
        """
        if not len(values):
            raise ValueError(f"{name}: expected at least one value for the slider, found none")
        self.values = [float(value) for value in values]
        self._draw, self._name, self._form, self._size = draw, name, form, size
        self._drawn: dict[int, tuple[bytes, str]] = {}
        self._at = self._start = min(range(len(self.values)), key=lambda i: abs(self.values[i] - start))
        self._box: Any = None

    @property
    def value(self) -> float:
        return self.values[self._at]

    @value.setter
    def value(self, value: float) -> None:
        at = self._index(value)
        if self.widget is None:
            self._at = at
        else:
            self._slider.value = at

    def picture(self, value: float) -> bytes:
        """The picture at one of `values`, as a PNG.

        Raises:
            ValueError: the slider has no such position.
        """
        return self._look(self._index(value))[0]

    def sentence(self, value: float) -> str:
        """What the picture at one of `values` says, in words.

        Raises:
            ValueError: the slider has no such position.
        """
        return self._look(self._index(value))[1]

    @property
    def widget(self) -> Any:
        if self._box is None:
            try:
                import ipywidgets
            except ImportError:
                return None
            options = [(self._form.format(value), i) for i, value in enumerate(self.values)]
            look = {"description": self._name, "layout": {"width": "36em"}, "style": {"description_width": "initial"}}
            self._slider = ipywidgets.SelectionSlider(options=options, value=self._at, **look)
            png, sentence = self._look(self._at)
            self._image = ipywidgets.Image(value=png, format="png")
            self._label = ipywidgets.Label(value=sentence)
            self._slider.observe(self._moved, names="value")
            self._box = ipywidgets.VBox([self._slider, self._image, self._label])
        return self._box

    def _moved(self, change: Mapping[str, Any]) -> None:
        self._at = change["new"]
        self._image.value, self._label.value = self._look(self._at)

    def _index(self, value: float) -> int:
        for i, known in enumerate(self.values):
            if math.isclose(known, value, rel_tol=1e-9, abs_tol=1e-12):
                return i
        known = ", ".join(self._form.format(value) for value in self.values)
        raise ValueError(f"{self._name}: expected one of {known}, found {value}")

    def _look(self, i: int) -> tuple[bytes, str]:
        if i not in self._drawn:
            figure = Figure(figsize=self._size, facecolor="white", dpi=100)  # no automatic layout: it is slow
            sentence = self._draw(figure, i)
            file = io.BytesIO()
            figure.savefig(file, format="png")
            self._drawn[i] = file.getvalue(), sentence
        return self._drawn[i]

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> tuple[dict, dict]:
        """Front ends take the richest form they know: the widget where one can live, else the picture."""
        png, sentence = self._look(self._start)
        data = {"text/plain": sentence, "image/png": base64.b64encode(png).decode()}
        if self.widget is not None:
            data[_WIDGET] = {"version_major": 2, "version_minor": 0, "model_id": self.widget.model_id}
        return data, {"image/png": {"alt": sentence}}


def tau_explorer(
    divergence: Tensor | Mapping[str, Tensor],
    taus: Sequence[float] | None = None,
    *,
    start: float = 0.25,
    title: str = "",
) -> Explorer:
    """The graph of similar heads and what Algorithm 2 removes, as the threshold tau moves (notebook 03).

    Args:
        divergence: [heads, heads] in nats, or one such per module as `divergences_of` returns them: at most six of the
            modules are drawn, evenly spread; the counts are over all.
        taus: positions of the slider in nats; default 0.02 to 0.6.

    Raises:
        ValueError: no module, a divergence that is not square, or a negative tau.
    """
    modules = dict(divergence) if isinstance(divergence, Mapping) else {"": divergence}
    if not modules:
        raise ValueError("tau_explorer: expected the divergences of at least one module, found none")
    taus = [float(tau) for tau in (np.arange(1, 31) / 50 if taus is None else taus)]
    marked = [{name: redundant_heads(values, tau) for name, values in modules.items()} for tau in taus]
    graphs = [{name: similarity_graph(values, tau) for name, values in modules.items()} for tau in taus]
    orphans = [
        {name: [head for head in gone if set(graph[name][head]) <= set(gone)] for name, gone in heads.items()}
        for heads, graph in zip(marked, graphs, strict=True)
    ]
    counts = [sum(map(len, heads.values())) for heads in marked]
    n_heads = sum(len(values) for values in modules.values())
    numbers = np.unique(np.linspace(0, len(modules) - 1, min(6, len(modules))).round().astype(int)).tolist()

    def draw(figure: Figure, i: int) -> str:
        rows = 1 + (len(numbers) > 3)
        columns = math.ceil(len(numbers) / rows)
        grid = figure.add_gridspec(rows, columns, left=0.42, right=0.99, bottom=0.02, top=0.84, wspace=0.05, hspace=0.2)
        ax = figure.add_axes((0.08, 0.15, 0.29, 0.74))
        ax.step(taus, counts, where="post", color=PALETTE[0])
        _here(ax, taus[i], counts[i])
        ax.set(xlabel=r"threshold $\tau$ in nats", ylabel=f"heads that go, of {n_heads}", ylim=(0, n_heads))
        ax.set_title(title or "all modules" * (len(modules) > 1), fontsize=11)
        for place, number in enumerate(numbers):
            ax, name = figure.add_subplot(grid[place]), list(modules)[number]
            _draw_graph(ax, graphs[i][name], marked[i][name], orphans[i][name])
            gone = f"{len(marked[i][name])} go"
            ax.set_title(f"module {number}: {gone}" if len(modules) > 1 else gone, fontsize=10)
        figure.text(0.7, 0.94, "light blue stays, orange goes; thick rim: no neighbour stays", ha="center", fontsize=10)
        alone = sum(map(len, orphans[i].values()))
        return (
            f"tau = {taus[i]:g} nats: {counts[i]} of {n_heads} heads go, "
            f"{alone} of them with no similar head among those that stay"
        )

    return Explorer(draw, taus, start, "tau in nats", "{:.2f}")


def _draw_graph(ax: Axes, graph: Any, gone: Sequence[int], lonely: Sequence[int]) -> None:
    import networkx as nx

    where = nx.circular_layout(graph)
    look = {"node_size": 130, "edge_color": "#666666", "font_size": 8}
    colors = [PALETTE[1] if head in gone else "#bfe3f5" for head in graph]
    rims = [2.2 if head in lonely else 0.0 for head in graph]
    nx.draw_networkx(graph, where, ax=ax, node_color=colors, edgecolors="black", linewidths=rims, **look)
    ax.set(xlim=(-1.35, 1.35), ylim=(-1.35, 1.35))
    ax.set_aspect("equal")
    ax.axis("off")


def ratio_explorer(table: pd.DataFrame, dense: float | None = None, *, start: float = 0.25) -> Explorer:
    """Recorded perplexities of several recipes, as the share of removed units moves (notebooks 05 and 08).

    The slider stops at recorded ratios only: nothing is interpolated.

    Args:
        table: perplexity, one row per ratio (index in (0, 1)) and one column per recipe; NaN where nothing was
            measured.
        dense: perplexity of the dense model on the same text, drawn as a dashed line.

    Raises:
        ValueError: an empty table, ratios outside (0, 1) or twice, or perplexities that are not positive.
    """
    table = table.sort_index().astype(float)
    ratios, found = table.index.to_numpy(dtype=float), table.to_numpy()
    if not table.size or not table.index.is_unique or not ((ratios > 0) & (ratios < 1)).all():
        raise ValueError(f"ratio_explorer: expected different ratios in (0, 1) as rows, found {table.index.tolist()}")
    if not (np.isnan(found) | (found > 0)).all() or np.isnan(found).all(axis=1).any():
        raise ValueError("ratio_explorer: expected positive perplexities, at least one per ratio")
    colors = (*PALETTE[:6], PALETTE[7], PALETTE[6])  # yellow lines are hard to see: last
    looks = {
        name: {"color": colors[v % len(colors)], "marker": _MARKERS[v % len(_MARKERS)]}
        for v, name in enumerate(table.columns)
    }

    def draw(figure: Figure, i: int) -> str:
        left, right = figure.add_axes((0.07, 0.15, 0.36, 0.74)), figure.add_axes((0.66, 0.15, 0.31, 0.74))
        for name, look in looks.items():
            known = table[name].dropna()
            left.plot(100 * known.index, known, **look)
        left.axvline(100 * ratios[i], color="black", linewidth=6, alpha=0.15)
        left.set(xlabel="units removed (%)", ylabel="perplexity", yscale="log")
        left.set_xticks(100 * ratios, [f"{100 * ratio:g}" for ratio in ratios])
        now = table.iloc[i].dropna().sort_values(ascending=False)
        bars = right.barh(range(len(now)), now, color=[looks[name]["color"] for name in now.index])
        right.bar_label(bars, fmt="%.1f", padding=3, fontsize=9)
        for place, name in enumerate(now.index):  # the line's marker, so that colour is not the only link
            sign = {"marker": looks[name]["marker"], "color": "white", "markeredgecolor": "black"}
            right.plot(0.05, place, transform=right.get_yaxis_transform(), **sign)
        right.set_yticks(range(len(now)), now.index, fontsize=9)
        right.set(xlabel="perplexity, lower is better" + " (dashed: dense)" * (dense is not None), xscale="log")
        right.set_title(f"{ratios[i]:.0%} removed", fontsize=11)
        lowest = now.min() if dense is None else min(now.min(), dense)
        right.set_xlim(lowest / 1.3, now.max() * 1.6)
        if dense is not None:
            left.axhline(dense, color="black", linestyle="--", linewidth=1)
            right.axvline(dense, color="black", linestyle="--", linewidth=1)
        for axis in (left.yaxis, right.xaxis):
            low, high = axis.get_view_interval()
            axis.set_ticks([tick for tick in _TICKS if low <= tick <= high])
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("")
        best, worst = now.index[-1], now.index[0]
        sentence = f"{ratios[i]:.0%} removed: perplexity {now.min():.1f} with {best}"
        sentence += f", {now.max():.1f} with {worst}" * (len(now) > 1)
        return sentence + ("" if dense is None else f"; dense {dense:.1f}")

    return Explorer(draw, ratios.tolist(), start, "share removed", "{:.0%}")


def ridge_explorer(
    seen: Moments,
    unseen: Mapping[str, Moments],
    weight: Tensor,
    damps: Sequence[float] | None = None,
    *,
    start: float = 1e-2,
) -> Explorer:
    """What the damping of a refit does to the errors, and which directions the data decide (notebook 06).

    Left the relative output error on the calibration text and on other texts. Right, for every principal direction of
    the layer's input with eigenvalue s of X'X, the share s / (s + lam) of the way from the current weight to the
    undamped solution that the refit goes there: 1 is all data, 0 leaves the weight as it is.

    Args:
        seen: moments of the calibration tokens, with targets.
        unseen: name -> moments of other text with the same features and targets.
        weight: the current weight [d_y, d_x].
        damps: positions of the slider, all > 0; default 1e-6 to 100.

    Raises:
        ValueError: moments without targets or of another size than `weight`, or damps that are not positive.
    """
    damps = [float(damp) for damp in (10.0 ** (np.arange(-12, 5) / 2) if damps is None else damps)]
    if not all(damp > 0 for damp in damps):
        raise ValueError(f"ridge_explorer: expected damps > 0 for a logarithmic axis, found {damps}")
    for moments in (seen, *unseen.values()):
        if moments.xy is None or tuple(moments.xy.T.shape) != tuple(weight.shape):
            size = "no targets" if moments.xy is None else list(moments.xy.T.shape)
            raise ValueError(
                f"ridge_explorer: expected moments of a layer {list(weight.shape)} with its targets, "
                f"found {size} in {moments.name!r}"
            )
    texts = {"calibration": seen, **unseen}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # few tokens are what one may want to look at
        solutions = [solve(seen, weight, damp=damp) for damp in damps]
    errors = {name: [text.relative_error(s.weight) for s in solutions] for name, text in texts.items()}
    before = {name: text.relative_error(weight) for name, text in texts.items()}
    strength = torch.linalg.eigvalsh(seen.xx).flip(0).clamp(min=0).cpu().numpy()
    shares = [strength / (strength + s.lam) for s in solutions]
    colors = (PALETTE[2], PALETTE[0], PALETTE[1], *PALETTE[3:])  # other texts as everywhere: code blue, prose orange

    def draw(figure: Figure, i: int) -> str:
        left, right = figure.add_axes((0.12, 0.15, 0.37, 0.73)), figure.add_axes((0.6, 0.15, 0.37, 0.73))
        for v, (name, values) in enumerate(errors.items()):
            left.plot(damps, values, color=colors[v], marker=_MARKERS[v], markersize=4, label=name)
            left.axhline(before[name], color=colors[v], linestyle="--", linewidth=1)
            _here(left, damps[i], values[i])
        left.set(xscale="log", yscale="log", xlabel="damping (share of the mean diagonal)")
        left.set_ylabel("relative error (dashed: no refit)")
        place = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncols": len(errors)}
        left.legend(frameon=False, fontsize=9, handletextpad=0.3, columnspacing=1, **place)
        right.fill_between(range(1, len(strength) + 1), shares[i], step="mid", color=PALETTE[2], alpha=0.6)
        right.set(xlim=(0, len(strength) + 1), ylim=(0, 1.02), xlabel="directions of the input, strongest first")
        right.set_ylabel("share that the data decide")
        found = ", ".join(f"{values[i]:.3g} on {name}" for name, values in errors.items())
        decided = int((shares[i] > 0.5).sum())
        return (
            f"damping {damps[i]:.1e}: relative error {found}; "
            f"the data decide more than half in {decided} of {len(strength)} directions"
        )

    return Explorer(draw, damps, start, "damping", "{:.1e}")


def _here(ax: Axes, x: float, y: float) -> None:
    """Mark where the slider stands."""
    ax.plot([x], [y], marker="o", markersize=11, markerfacecolor="none", markeredgecolor="black", markeredgewidth=1.6)
