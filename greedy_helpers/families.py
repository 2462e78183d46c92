"""Where the depth-2 modules of each model family are: pure data, the only file a new family edits.

A layout says which unit owns which channel of a linear layer. It names the axes that the channel dimension
factors into, slowest first, and `|` separates stretches laid one after another in a fused projection:

    "kv group dim"            query channels: for each KV head its `group` query heads of `dim` channels
    "kv dim"                  one head of `dim` channels after another
    "kv dim | kv dim | kv dim"  GPT-2's c_attn: all queries, then all keys, then all values
    "unit"                    one channel each

The axis named `kv` (attention) or `unit` (FFN) counts the units; its size is read off the weight, never off the
config, so a pruned model is described as well as a dense one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["attention", "ffn", "gated_ffn"]


@dataclass(frozen=True)
class ModuleLayout:
    """One depth-2 module of a block: level 1 reads the residual stream, level 2 writes back to it.

    Attributes:
        owner: path of the module below its block, e.g. `"self_attn"`.
        level1, level2: linear layer (path below `owner`) -> layout of its output / input channels.
        attributes: attributes of `owner` that go stale when units go, as products of axis sizes,
            e.g. `{"split_size": "kv dim"}`.
    """

    kind: Kind
    owner: str
    level1: dict[str, str]
    level2: dict[str, str]
    attributes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """A model family: the path of its list of blocks and the depth-2 modules of one block, in execution order."""

    blocks: str
    modules: tuple[ModuleLayout, ...]


FAMILIES: dict[str, Family] = {
    "llama": Family(
        "model.layers",
        (
            ModuleLayout(
                "attention",
                "self_attn",
                {"q_proj": "kv group dim", "k_proj": "kv dim", "v_proj": "kv dim"},
                {"o_proj": "kv group dim"},
            ),
            ModuleLayout("gated_ffn", "mlp", {"gate_proj": "unit", "up_proj": "unit"}, {"down_proj": "unit"}),
        ),
    ),
    "gpt2": Family(
        "transformer.h",
        (
            ModuleLayout(
                "attention",
                "attn",
                {"c_attn": "kv dim | kv dim | kv dim"},
                {"c_proj": "kv dim"},
                {"num_heads": "kv", "split_size": "kv dim"},
            ),
            ModuleLayout("ffn", "mlp", {"c_fc": "unit"}, {"c_proj": "unit"}),
        ),
    ),
}
