"""Figures for the notebooks: take numbers, draw on an `ax`, return it. No model, no computation.

White background, colours from Okabe and Ito's palette (told apart by colour-blind readers), hatches beside them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", "#000000")


def use_course_style() -> None:
    """Set matplotlib's defaults for the course: once per notebook, in the set-up."""
    plt.rcParams.update(
        {
            "figure.facecolor": "white",
            "axes.facecolor": "white",
            "savefig.facecolor": "white",  # transparent figures vanish on a dark theme
            "figure.dpi": 100,
            "font.size": 11,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.prop_cycle": plt.cycler(color=PALETTE),
        }
    )


def error_by_module(ax: Axes, errors: Mapping[str, Sequence[float]], names: Sequence[str]) -> Axes:
    """Relative output error per module in depth order: one line per variant over the modules' short `names`."""
    markers = "osD^vPX*"
    for v, (variant, values) in enumerate(errors.items()):
        ax.plot(range(len(values)), values, marker=markers[v % len(markers)], color=PALETTE[v], label=variant)
    ax.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=9)
    ax.set_ylabel("relative output error")
    ax.set_ylim(bottom=0)
    ax.legend(frameon=False)
    return ax


def coupling_matrix(ax: Axes, coupled: Mapping[str, np.ndarray], pieces: Sequence[Sequence[int]] | None = None) -> Axes:
    """Which inputs of one linear (rows) depend on which outputs of the linears before it (columns).

    `coupled` maps a writer's short name to bool [d_in, d_out]. With `pieces` (input channels per unit) every unit gets
    a colour; without, everything that is coupled is grey.
    """
    d_in = next(iter(coupled.values())).shape[0]
    unit_of = np.full(d_in, -1)
    for unit, channels in enumerate(pieces if pieces is not None else []):
        unit_of[list(channels)] = unit
    palette = np.array([to_rgb(color) for color in (*PALETTE[:6], "#999999")])
    row_colors = palette[np.where(unit_of < 0, -1, unit_of % 6)]  # [d_in, 3]
    start, edges = 0, []
    for rows in coupled.values():
        picture = np.where(rows[:, :, None], row_colors[:, None, :], 1.0)
        ax.imshow(picture, extent=(start, start + rows.shape[1], d_in, 0), aspect="auto", interpolation="nearest")
        edges.append(start)
        start += rows.shape[1]
    for edge in edges[1:]:
        ax.axvline(edge, color="black", linewidth=1)
    widths = [rows.shape[1] for rows in coupled.values()]
    ax.set_xticks([e + w / 2 for e, w in zip(edges, widths, strict=True)], list(coupled))
    ax.tick_params(axis="x", length=0)
    ax.set_xlim(0, start)
    ax.set_ylim(d_in, 0)
    ax.spines[["top", "right"]].set_visible(True)
    return ax


def who_hears_whom(ax: Axes, hears: np.ndarray, names: Sequence[str]) -> Axes:
    """Linears against linears: bool [reader, writer], in order of execution, with their short `names`."""
    ax.imshow(np.where(hears[:, :, None], to_rgb(PALETTE[0]), 1.0), interpolation="nearest")
    ax.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.set_xticks(np.arange(len(names)) - 0.5, minor=True)
    ax.set_yticks(np.arange(len(names)) - 0.5, minor=True)
    ax.grid(which="minor", color="#dddddd", linewidth=0.5)
    ax.tick_params(which="both", length=0)
    ax.set_xlabel("writer")
    ax.set_ylabel("reader")
    return ax


def module_map(
    ax: Axes,
    values: np.ndarray,
    kinds: Sequence[str],
    fmt: str = "{:.2f}",
    vmin: float = 0.0,
    vmax: float | None = None,
) -> Axes:
    """One number per module: `values` [kinds, blocks] as a heat map, dark is large and NaN grey.

    The numbers are written in while there is room for them, for up to 16 blocks; else a colour bar has the scale.
    """
    values = np.asarray(values, dtype=float)
    vmax = float(np.nanmax(values)) if vmax is None else vmax
    image = ax.imshow(values, cmap="Blues", vmin=vmin, vmax=vmax, aspect="auto")
    ax.set_facecolor("0.85")
    n_blocks, roomy = values.shape[1], values.shape[1] <= 16
    for row, column in np.argwhere(np.isfinite(values)) if roomy else ():
        dark = (values[row, column] - vmin) > 0.65 * (vmax - vmin)
        look = {"ha": "center", "va": "center", "color": "white" if dark else "black"}
        ax.text(column, row, fmt.format(values[row, column]), fontsize=9 if n_blocks <= 8 else 8, **look)
    if not roomy:
        ax.figure.colorbar(image, ax=ax, format=lambda value, _: fmt.format(value))
    ax.set_xticks(range(0, n_blocks, 1 if roomy else 5))
    ax.set_yticks(range(len(kinds)), kinds)
    ax.tick_params(length=0)
    return ax


def prune_steps(axes: Sequence[Axes], steps: pd.DataFrame) -> Sequence[Axes]:
    """A pruning run in two pictures: the share of units left per module, and its error after the cut and at the end.

    `steps` is `PruneReport.to_frame()`; `axes` are two, e.g. of `plt.subplots(1, 2)`.
    """
    names = [
        f"{block} {'attn' if kind == 'attention' else 'ffn'}"
        for block, kind in zip(steps.block, steps.kind, strict=True)
    ]
    left, right = axes
    is_attention = (steps.kind == "attention").to_numpy()
    shares = (steps.units_after / steps.units_before).to_numpy()
    for label, rows, color, hatch in (("heads", is_attention, 0, ""), ("FFN channels", ~is_attention, 1, "//")):
        look = {"color": PALETTE[color], "hatch": hatch, "edgecolor": "white", "label": label}
        left.bar(np.flatnonzero(rows), shares[rows], **look)
    left.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=9)
    left.set_ylim(0, 1)
    left.set_ylabel("share of units left")
    left.legend(frameon=False, loc="lower right")
    errors = {"after the cut": steps.error_cut, "at the end": steps.error}
    error_by_module(right, {label: list(values) for label, values in errors.items()}, names)
    return axes
