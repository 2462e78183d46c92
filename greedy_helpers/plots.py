"""Figures for the notebooks: take numbers, draw on an `ax`, return it. No model, no computation.

White background, colours from Okabe and Ito's palette (told apart by colour-blind readers), hatches beside them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", "#000000")
_HATCHES = ("", "//", "..", "xx", "\\\\", "oo", "--", "++")


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


def perplexity_bars(
    ax: Axes, values: Mapping[str, Mapping[str, float]], baseline: Mapping[str, float] | None = None
) -> Axes:
    """Grouped bars: `values` maps a variant to {domain: perplexity}; dashed lines mark `baseline` per domain."""
    domains = list(next(iter(values.values())))
    width = 0.8 / len(domains)
    for d, domain in enumerate(domains):
        places = [v + (d - (len(domains) - 1) / 2) * width for v in range(len(values))]
        heights = [found[domain] for found in values.values()]
        look = {"color": PALETTE[d], "hatch": _HATCHES[d], "edgecolor": "white"}
        bars = ax.bar(places, heights, width * 0.92, label=domain, **look)
        ax.bar_label(bars, fmt="%.1f", padding=2, fontsize=9)
        if baseline:
            ax.axhline(baseline[domain], color=PALETTE[d], linestyle="--", linewidth=1)
            ax.annotate(
                f"dense {baseline[domain]:.1f}",
                (1.0, baseline[domain]),
                xycoords=("axes fraction", "data"),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
                color=PALETTE[d],
            )
    ax.set_xticks(range(len(values)), [name.replace(" + ", "\n+ ") for name in values])
    ax.set_ylabel("perplexity (lower is better)")
    ax.legend(title="held-out text", frameon=False, loc="upper right")
    return ax


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
