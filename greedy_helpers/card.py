"""The model card of a pruned model: what was asked, what was removed, how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import PreTrainedModel

from .structure import count_parameters, depth2_modules

if TYPE_CHECKING:
    from .report import PruneReport

_TEMPLATE = """---
{{ card_data }}
---
# A pruned language model

Whole attention heads and feed-forward channels were removed without retraining, with `greedy_helpers`: it implements
*Greedy Output Approximation* (Li, Dong, Lei; arXiv 2407.19126) and its rivals. The table says by which recipe.

| | |
|---|---|
{% for key, value in rows.items() %}| {{ key }} | {{ value }} |
{% endfor %}
The blocks may differ in size, so plain `from_pretrained` refuses the weights. `pruned.json` lists every module's size
and the checksum of every file. To load:

```python
import greedy_helpers as gh

model, tokenizer = gh.load_model("path or Hub id of this folder")
```
"""


def model_card(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    report: PruneReport | None = None,
    details: Mapping[str, object] | None = None,
) -> ModelCard:
    """The card of a pruned model, for the README.md of its folder. No network.

    Args:
        dense: the model before any pruning; the meta device is enough.
        report: adds what was asked for, and how it was done.
        details: further rows. `"base model"`, or the place that the model was loaded from, becomes the card's
            `base_model` if it is a Hub id. Weights that were dequantised (:mod:`greedy_helpers.public`) say so.
    """
    details, origin = details or {}, getattr(model.config, "dequantized_from", None) or {}
    data = ModelCardData(
        base_model=origin.get("model") or _hub_id(details.get("base model") or model.name_or_path),
        license=origin.get("license"),
        library_name="greedy-helpers",  # plain transformers refuses blocks of different sizes
        tags=["structured-pruning"],
    )
    rows = {"architecture": type(dense).__name__}
    if origin:
        rows["weights before pruning"] = "{weights}, dequantised: {file} of {package}".format(**origin)
    if report is not None:
        rows["asked for"] = report.asked
        rows["removed from these modules"] = f"{report.removed['modules']:.2%} of their parameters"
    rows |= _removed(model, dense)
    if report is not None:
        damping = "" if report.remedy in ("none", "bias") else f" (damping {report.damp})"
        rows |= {
            "criterion": report.criterion,
            "remedy": report.remedy + damping,
            "allocation": report.allocation,
            "calibration": f"{report.tokens:,} tokens",
        }
    rows |= {key: str(value) for key, value in details.items()}
    return ModelCard.from_template(data, template_str=_TEMPLATE, rows=rows)


def _hub_id(name: object) -> str | None:
    """`name` if it is like "organisation/model" and not a local folder."""
    if not isinstance(name, str) or "/" not in name or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def _removed(model: PreTrainedModel, dense: PreTrainedModel) -> dict[str, str]:
    """Rows with the parameters and units that were removed, counted in the model itself."""
    before, after = count_parameters(dense), count_parameters(model)
    rows = {
        name: f"{after[key]:,} of {before[key]:,} left ({1 - after[key] / before[key]:.2%} removed)"
        for key, name in {"blocks": "parameters of the blocks", "total": "parameters of the model"}.items()
    }
    left, whole = _units(model), _units(dense)
    if left["KV heads"] == left["attention heads"] and whole["KV heads"] == whole["attention heads"]:
        del whole["KV heads"]  # every head has its own
    return rows | {name: f"{left[name]:,} of {n:,} left" for name, n in whole.items() if n}


def _units(model: PreTrainedModel) -> dict[str, int]:
    modules = depth2_modules(model, unit="kv")
    attention = [module for module in modules if module.kind == "attention"]
    return {
        "attention heads": sum(module.n_units * module.group for module in attention),
        "KV heads": sum(module.n_units for module in attention),
        "FFN channels": sum(module.n_units for module in modules if module.kind != "attention"),
    }
