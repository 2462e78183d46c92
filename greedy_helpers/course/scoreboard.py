"""The course's one measure of damage, and the figure that closes every notebook.

All notebooks judge on the same text (:class:`Judge`) and count in *excess loss*: nats per token above the dense model's
own loss, the logarithm of the quotient of two perplexities. :func:`draw` shows what the methods of the notebooks so far
have reached on that scale, from recorded runs; :func:`measure_again` repeats one of them.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoint import load_model
from ..compare import RESULTS
from ..criteria import weight_norm
from ..data import calibration_tokens, default_sources, evaluation_tokens
from ..data_free import self_generated_tokens
from ..evaluate import perplexity
from ..pruning import prune
from ..recipes import FLAP, OSSCAR, RECOMMENDED, Recipe
from ..similarity import redundant_first
from .plots import PALETTE
from .samples import n_windows

WINDOWS, SEQ = 24, 256
RATIO = 0.25  # of the parameters of heads and FFN channels
_CALIBRATION = 32  # windows


class Judge:
    """The course's held-out text, and the dense model's line on it.

    Attributes:
        held_out: name of a text -> token ids [windows, 256], long: 24 evenly spaced windows of each text, of a larger
            model 4. Every window begins with an empty context.
        dense: name of a text -> the dense model's perplexity.
    """

    def __init__(self, dense: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        windows = n_windows(name, WINDOWS, 4)
        self.held_out: dict[str, Tensor] = {
            text: evaluation_tokens(tokenizer, windows, SEQ, source) for text, source in default_sources(name).items()
        }
        self.dense = self.perplexity(dense)

    def perplexity(self, model: PreTrainedModel) -> dict[str, float]:
        """Name of a text -> perplexity."""
        return {text: perplexity(model, windows) for text, windows in self.held_out.items()}

    def excess(self, model: PreTrainedModel) -> dict[str, float]:
        """Name of a text -> nats per token above the dense model."""
        return {text: math.log(value / self.dense[text]) for text, value in self.perplexity(model).items()}


@dataclass(frozen=True)
class Line:
    """One method on the scoreboard.

    Attributes:
        notebook: where the course has it from.
        name: what it is called, here and in the recorded rows (their `recipe`).
        recipe: how to run it.
        calibration: the recorded rows' calibration text, of the embedded model.
    """

    notebook: str
    name: str
    recipe: Recipe
    calibration: str = "code+prose"


_SECOND_MOMENT_PRE = Recipe("second moment", "pre")
LINES = (
    Line("00", "random units", Recipe("random", "none")),
    Line("02", "L2 magnitude", Recipe(weight_norm, "none")),
    Line("03", "similar heads first", Recipe(partial(redundant_first, tau=0.35), "none")),
    Line("04", "second moment, no repair", Recipe("second moment", "none")),
    Line("05", "output energy, no repair", Recipe("output energy", "none")),
    Line("05", "output energy, no repair, on our plan", Recipe("output energy", "none", allocation="loss prices")),
    Line("06", "paper", _SECOND_MOMENT_PRE),
    Line("06", "second moment, refit after", Recipe("second moment", "post, local")),
    Line("07", "paper", _SECOND_MOMENT_PRE, "self-generated"),
    Line("08", "OSSCAR", OSSCAR),
    Line("08", "recommended", RECOMMENDED),
    Line("09", "Wanda-sp", Recipe("Wanda-sp", "none")),
    Line("09", "FLAP", FLAP),
)
_TITLES = {"llama-mini": "llama-mini", "smollm2": "SmolLM2-135M"}
_GOAL = next(line for line in LINES if line.name == "recommended")


@cache
def _recorded(model: str) -> dict:
    return json.loads((RESULTS / f"{model}_recipes.json").read_text(encoding="utf-8"))


def recorded(model: str, line: Line) -> list[dict[str, float]]:
    """Excess loss per text in every recorded run of a line: 25% removed, query heads; empty if there is none.

    `model` is "llama-mini", or "smollm2": the public model, calibrated on 160 windows of C4.
    """
    found = _recorded(model)
    which = (line.calibration, _CALIBRATION)
    if model == "smollm2":
        own = line.calibration == "self-generated"
        which = (line.calibration if own else "c4_train00000_first1000.jsonl[:800]", 160)
    return [
        {text: math.log(row[text] / dense) for text, dense in found["dense"].items()}
        for row in found["rows"]
        if (row["recipe"], row["ratio"], row["unit"]) == (line.name, RATIO, "query")
        and (row["calibration"], row["windows"]) == which
    ]


def runs_of(model: str) -> pd.DataFrame:
    """All recorded runs on a model, one row per run and held-out text; `model` as for :func:`recorded`.

    Columns: what was recorded of the run, `model`, `text`, `perplexity`, `excess` (nats per token above the dense
    model) and `usual`: query heads, and the calibration text, in kind and amount, that most runs had.
    """
    found = _recorded(model)
    table = pd.DataFrame(found["rows"]).rename(columns={"calibration tokens, sha256": "digest"})
    text, amount = table[["calibration", "windows"]].value_counts().idxmax()
    table["usual"] = table["unit"].eq("query") & table["calibration"].eq(text) & table["windows"].eq(amount)
    by_text = [table.assign(text=text, perplexity=table[text]) for text in found["dense"]]
    table = pd.concat(by_text, ignore_index=True).drop(columns=[*found["dense"]]).assign(model=model)
    return table.assign(excess=np.log(table["perplexity"] / table["text"].map(found["dense"])))


def line_of(notebook: str, name: str) -> Line:
    """Raises ValueError if the notebook has no such line."""
    for line in LINES:
        if (line.notebook, line.name) == (notebook, name):
            return line
    raise ValueError(f"expected one of {[(line.notebook, line.name) for line in LINES]}, found {(notebook, name)}")


def measure_again(notebook: str, name: str) -> dict[str, float]:
    """Prune llama-mini once more as a line's first recorded run did, and compare: excess loss per text.

    Held-out text is your own Python's standard library, so that the last digits differ between versions.

    Raises:
        ValueError: the notebook has no such line.
        AssertionError: further from the record than 0.02 nats and 15% of it.
    """
    line = line_of(notebook, name)
    model, tokenizer = load_model("llama-mini")
    if line.notebook == "03":
        model.set_attn_implementation("eager")  # attention maps are compared
    judge = Judge(model, tokenizer, "llama-mini")
    if line.calibration == "self-generated":
        calibration = self_generated_tokens(model, tokenizer, _CALIBRATION, SEQ, seed=0)
    else:
        calibration = calibration_tokens(tokenizer, _CALIBRATION, SEQ, line.calibration, seed=0)
    prune(model, calibration, RATIO, line.recipe, progress=False)
    found, before = judge.excess(model), recorded("llama-mini", line)[0]
    fewer = any(len(windows) < WINDOWS for windows in judge.held_out.values())  # GREEDY_WINDOWS: a quick look, no check
    for text, value in found.items():
        print(f"{name}, {text}: {value:.3f} nats measured now, {before[text]:.3f} recorded")
        assert fewer or abs(value - before[text]) < 0.02 + 0.15 * before[text], "expected what was recorded"
    return found


def draw(notebook: str, live: Mapping[str, Mapping[str, float]] | None = None) -> Figure:
    """The scoreboard up to this notebook: excess loss without a quarter of the parameters, lowest is best.

    Left the embedded model, right the public one, as recorded: a mark per text, the mean over calibration sets. The
    axis is the same in every notebook, and logarithmic: equal steps are equal factors. What this notebook adds is
    coloured. `live` adds what a notebook has measured itself: name -> {text: nats}.
    """
    lines = [line for line in LINES if line.notebook <= notebook]
    own = ", text by the model itself"
    names = [f"{line.name}{own * (line.calibration == 'self-generated')} ({line.notebook})" for line in lines]
    new = [line.notebook == notebook for line in lines]
    runs = {model: [recorded(model, line) for line in lines] for model in _TITLES}
    for name, found in (live or {}).items():
        names.append(f"{name} (now)")
        new.append(True)
        runs["llama-mini"].append([dict(found)])
        runs["smollm2"].append([])
    if _GOAL not in lines:
        names.append("where the course goes (08)")
        new.append(False)
        for model, rows in runs.items():
            rows.append(recorded(model, _GOAL))
    fig, axes = plt.subplots(1, 2, figsize=(10, 0.36 * len(names) + 1.7), sharey=True, layout="constrained")
    for ax, (model, rows) in zip(axes, runs.items(), strict=True):
        dense = _recorded(model)["dense"]
        for y, (found, is_new) in enumerate(zip(rows, new, strict=True)):
            if not found:
                continue
            color = PALETTE[4] if is_new else "0.45"
            values = [statistics.mean(run[text] for run in found) for text in dense]
            ax.plot([min(values), max(values)], [y, y], color=color, linewidth=1)
            for mark, value in zip("os", values, strict=True):
                ax.plot(value, y, mark, color=color, markersize=6)
            mean = statistics.mean(values)
            shown = f"{mean:.2f}" if mean >= 0.1 else f"{mean:.3f}"
            look = {"va": "center", "color": color, "fontsize": 9}
            ax.annotate(shown, (max(values), y), (7, 0), textcoords="offset points", **look)
        ax.set_xscale("log")
        ax.set_xlim(0.025, 25)
        ax.set_xticks([0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10], ["0.05", "0.1", "0.2", "0.5", "1", "2", "5", "10"])
        ax.minorticks_off()
        ax.grid(axis="x", alpha=0.3)
        texts = ", ".join(f"{mark} {text}" for mark, text in zip("●■", dense, strict=True))
        ax.set_title(f"{_TITLES[model]}: {texts}", fontsize=11)
        ax.set_xlabel("excess loss, nats per token")
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    for label, is_new in zip(axes[0].get_yticklabels(), new, strict=True):
        label.set_color(PALETTE[4] if is_new else "black")
    plt.close(fig)  # a cell shows what it returns, once
    fig.suptitle(f"{RATIO:.0%} of the heads' and channels' parameters removed", fontsize=12)
    return fig
