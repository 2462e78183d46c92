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
from functools import cache, cached_property
from typing import Any

import networkx as nx
import numpy as np
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


class Explorer:
    """A slider over `values`, a picture and one sentence about it.

    Attributes:
        look: position of the slider -> (PNG, sentence). Each picture is drawn once.
        start: the slider's first position.
        widget: the ipywidgets box for the front end, made when first asked for; None if ipywidgets is not installed.
    """

    def __init__(self, draw: Callable[[Figure, int], str], values: Sequence[float], start: float, name: str, form: str):
        """`draw(figure, i)` draws `values[i]` on an empty figure of 9 x 3.8 inches, and returns the sentence about it.

        Args:
            start: the slider starts at the nearest of `values`.
            name, form: the slider's label, and how its values are written.

        Raises:
            ValueError: no values.
        """
        if not len(values):
            raise ValueError(f"{name}: expected at least one value for the slider, found none")
        self.start = int(np.abs(np.subtract(values, start)).argmin())
        self._options, self._name = [(form.format(value), i) for i, value in enumerate(values)], name

        @cache
        def look(i: int) -> tuple[bytes, str]:
            figure, file = (
                Figure(figsize=(9, 3.8), facecolor="white", dpi=100),
                io.BytesIO(),
            )  # automatic layout is slow
            sentence = draw(figure, i)
            figure.savefig(file, format="png")
            return file.getvalue(), sentence

        self.look = look

    @cached_property
    def widget(self) -> Any:
        try:
            import ipywidgets
        except ImportError:
            return None
        style = {"layout": {"width": "36em"}, "style": {"description_width": "initial"}}
        slider = ipywidgets.SelectionSlider(options=self._options, value=self.start, description=self._name, **style)
        image, label = ipywidgets.Image(format="png"), ipywidgets.Label()

        def moved(change: Mapping[str, Any]) -> None:
            image.value, label.value = self.look(change["new"])

        moved({"new": self.start})
        slider.observe(moved, names="value")
        return ipywidgets.VBox([slider, image, label])

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> tuple[dict, dict]:
        """Front ends take the richest form they know: the widget where one can live, else the picture."""
        png, sentence = self.look(self.start)
        data = {"text/plain": sentence, "image/png": base64.b64encode(png).decode()}
        if self.widget is not None:
            view = {"version_major": 2, "version_minor": 0, "model_id": self.widget.model_id}
            data["application/vnd.jupyter.widget-view+json"] = view
        return data, {"image/png": {"alt": sentence}}


def tau_explorer(
    divergence: Tensor | Mapping[str, Tensor],
    taus: Sequence[float] = tuple(i / 50 for i in range(1, 31)),
    *,
    start: float = 0.25,
    title: str = "",
) -> Explorer:
    """The graph of similar heads and what Algorithm 2 removes, as the threshold tau moves (notebook 03).

    Args:
        divergence: [heads, heads] in nats, or one such per module as `divergences_of` returns them: at most six of the
            modules are drawn, evenly spread; the counts are over all.
        taus: positions of the slider in nats.

    Raises:
        ValueError: no module, a divergence that is not square, or a negative tau.
    """
    modules = list(divergence.values()) if isinstance(divergence, Mapping) else [divergence]
    if not modules:
        raise ValueError("tau_explorer: expected the divergences of at least one module, found none")
    marked = [[redundant_heads(values, tau) for values in modules] for tau in taus]
    graphs = [[similarity_graph(values, tau) for values in modules] for tau in taus]
    counts, n_heads = [sum(map(len, gone)) for gone in marked], sum(map(len, modules))
    numbers = np.unique(np.linspace(0, len(modules) - 1, min(6, len(modules))).round().astype(int)).tolist()
    rows, several = 1 + (len(numbers) > 3), len(modules) > 1

    def draw(figure: Figure, i: int) -> str:
        ax = figure.add_axes((0.08, 0.15, 0.29, 0.74))
        ax.step(taus, counts, where="post", color=PALETTE[0])
        _mark(ax, taus[i], counts[i])
        ax.set(xlabel=r"threshold $\tau$ in nats", ylabel=f"heads that go, of {n_heads}", ylim=(0, n_heads))
        ax.set(title=title or "all modules" * several)
        pairs = list(zip(graphs[i], marked[i], strict=True))
        alone = [[head for head in gone if {*graph[head]} <= {*gone}] for graph, gone in pairs]
        place = {"left": 0.42, "right": 0.99, "bottom": 0.02, "top": 0.84, "wspace": 0.05, "hspace": 0.2}
        grid = figure.add_gridspec(rows, math.ceil(len(numbers) / rows), **place)
        for cell, number in zip(grid, numbers, strict=False):
            ax, (graph, gone) = figure.add_subplot(cell), pairs[number]
            colors = [PALETTE[1] if head in gone else "#bfe3f5" for head in graph]
            look = {"node_color": colors, "node_size": 130, "edge_color": "#666666", "font_size": 8}
            look |= {"edgecolors": "black", "linewidths": [2.2 * (head in alone[number]) for head in graph]}
            nx.draw_networkx(graph, nx.circular_layout(graph), ax=ax, **look)
            ax.set(xlim=(-1.35, 1.35), ylim=(-1.35, 1.35), aspect="equal")
            ax.set_title(f"module {number}: " * several + f"{len(gone)} go", fontsize=10)
            ax.axis("off")
        figure.text(0.7, 0.94, "light blue stays, orange goes; thick rim: no neighbour stays", ha="center", fontsize=10)
        orphans = f"{sum(map(len, alone))} of them with no similar head among those that stay"
        return f"tau = {taus[i]:g} nats: {counts[i]} of {n_heads} heads go, {orphans}"

    return Explorer(draw, taus, start, "tau in nats", "{:.2f}")


def ridge_explorer(
    seen: Moments,
    unseen: Mapping[str, Moments],
    weight: Tensor,
    damps: Sequence[float] = tuple(10 ** (i / 2) for i in range(-12, 5)),
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
        damps: positions of the slider, all > 0.

    Raises:
        ValueError: moments without targets or of another size than `weight`, or damps that are not positive.
    """
    if not all(damp > 0 for damp in damps):
        raise ValueError(f"ridge_explorer: expected damps > 0 for a logarithmic axis, found {damps}")
    for moments in (seen, *unseen.values()):
        size = "no targets" if moments.xy is None else list(moments.xy.T.shape)
        if size != list(weight.shape):
            expected = f"expected moments of a layer {list(weight.shape)} with its targets"
            raise ValueError(f"ridge_explorer: {expected}, found {size} in {moments.name!r}")
    texts = {"calibration": seen, **unseen}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # few tokens are what one may want to look at
        solutions = [solve(seen, weight, damp=damp) for damp in damps]
    errors = {name: [text.relative_error(s.weight) for s in solutions] for name, text in texts.items()}
    strength = torch.linalg.eigvalsh(seen.xx).flip(0).clamp(min=0).cpu().numpy()
    colors = (PALETTE[2], PALETTE[0], PALETTE[1], *PALETTE[3:])  # other texts as everywhere: code blue, prose orange

    def draw(figure: Figure, i: int) -> str:
        left, right = figure.add_axes((0.12, 0.15, 0.37, 0.73)), figure.add_axes((0.6, 0.15, 0.37, 0.73))
        for (name, values), color, marker in zip(errors.items(), colors, _MARKERS, strict=False):
            left.plot(damps, values, color=color, marker=marker, markersize=4, label=name)
            left.axhline(texts[name].relative_error(weight), color=color, linestyle="--", linewidth=1)
            _mark(left, damps[i], values[i])
        labels = {"xlabel": "damping (share of the mean diagonal)", "ylabel": "relative error (dashed: no refit)"}
        left.set(xscale="log", yscale="log", **labels)
        narrow = {"frameon": False, "fontsize": 9, "columnspacing": 1, "handletextpad": 0.3}
        left.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(errors), **narrow)
        share = strength / (strength + solutions[i].lam)
        right.fill_between(range(1, len(share) + 1), share, step="mid", color=PALETTE[2], alpha=0.6)
        labels = {"xlabel": "directions of the input, strongest first", "ylabel": "share that the data decide"}
        right.set(xlim=(0, len(share) + 1), ylim=(0, 1.02), **labels)
        error = ", ".join(f"{values[i]:.3g} on {name}" for name, values in errors.items())
        decided = f"the data decide more than half in {(share > 0.5).sum()} of {len(share)} directions"
        return f"damping {damps[i]:.1e}: relative error {error}; {decided}"

    return Explorer(draw, damps, start, "damping", "{:.1e}")


def _mark(ax: Axes, x: float, y: float) -> None:
    """Where the slider stands."""
    ax.plot([x], [y], marker="o", markersize=11, markerfacecolor="none", markeredgecolor="black", markeredgewidth=1.6)
