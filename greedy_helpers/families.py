"""Where the depth-2 modules of each model family are: pure data, the only file a new family edits.

A layout says which unit owns which channel of a linear layer. It names the axes that the channel dimension
factors into, slowest first, and `|` separates stretches laid one after another in a fused projection:

    "kv group dim"              query channels: for each KV head its `group` query heads of `dim` channels
    "kv dim"                    one head of `dim` channels after another
    "kv dim | kv dim | kv dim"  GPT-2's c_attn: all queries, then all keys, then all values
    "kv 3 dim"                  GPT-NeoX: query, key and value of the first head, then of the second, ...
    "kv group+2 dim"            Falcon-40B: the queries of a KV head, then its key, then its value
    "head dim | dim | dim"      multi-query: query heads, and one key and one value that all of them share
    "unit"                      one channel each

The axis named `kv` or `head` (attention) or `unit` (FFN) counts the units; its size is read off the weight, never
off the config, so a pruned model is described as well as a dense one. A stretch without such an axis belongs to no
unit and is never cut. `greedy_helpers.discover` finds the entry of a family that is not here.

An axis `group` makes the attention one of grouped queries: `kv` counts KV heads and `kv group` query heads, either of
which can be the unit (`depth2_modules(..., unit=)`). When query heads go, `group` shrinks and stretches without it stay
whole, as do the key and value behind the queries of `group+2`. The attribute that `sizes` names for it follows; the two
of a quotient do through `attributes`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

Kind = Literal["attention", "ffn", "gated_ffn"]
UNIT_AXES = ("kv", "head", "unit")


@dataclass(frozen=True)
class ModuleLayout:
    """One depth-2 module of a block: level 1 reads the residual stream, level 2 writes back to it.

    Attributes:
        owner: path of the module below its block, e.g. `"self_attn"`; `""` is the block itself.
        level1, level2: linear layer (path below `owner`) -> layout of its output / input channels.
        attributes: attributes of `owner` that go stale when units go, as products of axis sizes, e.g.
            `{"split_size": "kv dim"}`. `"config.x"` is what this module alone shall read as `config.x`.
        sizes: axis -> where `owner` keeps its size, an attribute or `"attribute // attribute"`. An attribute that
            is not there is 1.
        lists: ModuleLists below `owner` with one entry per head -> how the entries are dealt out to the units.
        head_inputs: arguments of `owner`'s forward that hold one slice per head and have to lose heads with it.
        config: what an unmodified transformers config has to say about a model pruned to the same sizes in every
            block, as products of axis sizes. Empty where no config can say it.
    """

    kind: Kind
    owner: str
    level1: dict[str, str]
    level2: dict[str, str]
    attributes: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, str] = field(default_factory=lambda: {"dim": "head_dim", "group": "num_key_value_groups"})
    lists: dict[str, str] = field(default_factory=dict)
    head_inputs: tuple[str, ...] = ()
    config: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        blocks: path of the list of blocks below `model.base_model`.
        modules: the depth-2 modules of one block, in execution order.
        whole: modules that have to stay whole -> the reason.
        export_as: prefix of a twin family's classes, with the same weights, whose config may say what this one refuses.
    """

    blocks: str
    modules: tuple[ModuleLayout, ...]
    whole: dict[str, str] = field(default_factory=dict)
    export_as: str | None = None


heads = partial(ModuleLayout, "attention")


def alibi_heads(level1: str, level2: str, attributes: dict[str, str], **rest) -> ModuleLayout:
    """Attention as Bloom and Falcon have it. Falcon folds alibi into a mask with one slice per head."""
    inputs = ("alibi", "attention_mask")
    projection, output = {"query_key_value": level1}, {"dense": level2}
    return heads("self_attention", projection, output, attributes, head_inputs=inputs, **rest)


def gated(level1: dict[str, str]) -> ModuleLayout:
    """A gated FFN as Llama has it, whose gate and up projection are `level1`."""
    return ModuleLayout("gated_ffn", "mlp", level1, {"down_proj": "unit"}, config={"intermediate_size": "unit"})


def ffn(owner: str, level1: str, level2: str, width: str | None = "intermediate_size") -> ModuleLayout:
    """An FFN of two linear layers, whose width a config calls `width`; None: no config can say it."""
    return ModuleLayout("ffn", owner, {level1: "unit"}, {level2: "unit"}, config={width: "unit"} if width else {})


def family(blocks: str, *modules: ModuleLayout, **rest) -> Family:
    """A :class:`Family` whose modules are listed one by one."""
    return Family(blocks, modules, **rest)


_QKV = dict.fromkeys(["q_proj", "k_proj", "v_proj"], "kv dim")
_GROUPED = _QKV | {"q_proj": "kv group dim"}
_COUNTS = {"num_attention_heads": "kv group", "num_key_value_heads": "kv", "head_dim": "dim"}
_ATTENTION = heads("self_attn", _GROUPED, {"o_proj": "kv group dim"}, config=_COUNTS)
_GATED = gated({"gate_proj": "unit", "up_proj": "unit"})
_FUSED_GATED = gated({"gate_up_proj": "unit | unit"})
_LLAMA = family("layers", _ATTENTION, _GATED)
_GPT2_FFN = ffn("mlp", "c_fc", "c_proj", "n_inner")
_FALCON_FFN = ffn("mlp", "dense_h_to_4h", "dense_4h_to_h", "ffn_hidden_size")
_COUPLED = (
    "its q_norm and k_norm normalise over all heads at once, so a head that goes changes every other: removing heads "
    "cannot equal zeroing them"
)

# "type:flag" is the entry for configs of that type whose attribute `flag` is true; it is asked before "type".
FAMILIES: dict[str, Family] = {
    "llama": replace(_LLAMA, export_as="Mistral"),
    **dict.fromkeys("cohere gemma2 gemma3_text granite mistral olmo qwen2 qwen3 smollm3".split(), _LLAMA),
    "olmo2": family("layers", _GATED, whole={"self_attn": _COUPLED}),
    "stablelm": family(
        "layers",
        heads(
            "self_attn", _GROUPED, {"o_proj": "kv group dim"}, {"num_heads": "kv group", "num_key_value_heads": "kv"},
            lists={"q_layernorm.norms": "kv group", "k_layernorm.norms": "kv"},
        ),
        _GATED,
    ),
    "glm": family("layers", _ATTENTION, _FUSED_GATED),
    "phi3": family(
        "layers",
        heads(
            "self_attn", {"qkv_proj": "kv group dim | kv dim | kv dim"}, {"o_proj": "kv group dim"},
            {"num_key_value_heads": "kv", "config.num_attention_heads": "kv group"}, config=_COUNTS,
        ),
        _FUSED_GATED,
    ),
    "phi": family(
        "layers",
        heads("self_attn", _GROUPED, {"dense": "kv group dim"}, config=_COUNTS),
        ffn("mlp", "fc1", "fc2"),
    ),
    "starcoder2": family("layers", _ATTENTION, ffn("mlp", "c_fc", "c_proj")),
    "gpt2": family(
        "h",
        heads(
            "attn", {"c_attn": "kv dim | kv dim | kv dim"}, {"c_proj": "kv dim"},
            {"num_heads": "kv", "split_size": "kv dim"},
        ),
        _GPT2_FFN,
    ),
    "gpt_bigcode:multi_query": family(
        "h",
        heads(
            "attn", {"c_attn": "head dim | dim | dim"}, {"c_proj": "head dim"},
            {"embed_dim": "head dim", "num_heads": "head", "num_key_value_groups": "head"},
        ),
        _GPT2_FFN,
    ),
    "gpt_bigcode": family(
        "h",
        heads("attn", {"c_attn": "kv 3 dim"}, {"c_proj": "kv dim"}, {"num_heads": "kv"}),
        _GPT2_FFN,
    ),
    "gpt_neo": family(
        "h",
        heads("attn.attention", _QKV, {"out_proj": "kv dim"}, {"num_heads": "kv"}),
        ffn("mlp", "c_fc", "c_proj"),
    ),
    "gptj": family(
        "h",
        heads("attn", _QKV, {"out_proj": "kv dim"}, {"num_attention_heads": "kv"}),
        ffn("mlp", "fc_in", "fc_out", "n_inner"),
    ),
    "gpt_neox": family(
        "layers",
        heads("attention", {"query_key_value": "kv 3 dim"}, {"dense": "kv dim"}, sizes={"dim": "head_size"}),
        ffn("mlp", "dense_h_to_4h", "dense_4h_to_h"),
    ),
    "opt": family(
        "decoder.layers",
        heads("self_attn", _QKV, {"out_proj": "kv dim"}, {"num_heads": "kv"}),
        ffn("", "fc1", "fc2", "ffn_dim"),
    ),
    "bloom": family(
        "h",
        alibi_heads("kv 3 dim", "kv dim", {"num_heads": "kv"}),
        ffn("mlp", "dense_h_to_4h", "dense_4h_to_h", None),
    ),
    "falcon:new_decoder_architecture": family(
        "h",
        alibi_heads(
            "kv group+2 dim", "kv group dim", {"num_heads": "kv group", "num_kv_heads": "kv"},
            sizes={"dim": "head_dim", "group": "num_heads // num_kv_heads"},
        ),
        _FALCON_FFN,
    ),
    "falcon:multi_query": family(
        "h",
        alibi_heads("head dim | dim | dim", "head dim", {"num_heads": "head"}),
        _FALCON_FFN,
    ),
    "falcon": family("h", alibi_heads("kv 3 dim", "kv dim", {"num_heads": "kv", "num_kv_heads": "kv"}), _FALCON_FFN),
    "bert": family(
        "encoder.layer",
        heads(
            "attention", dict.fromkeys(["self.query", "self.key", "self.value"], "kv dim"), {"output.dense": "kv dim"},
            sizes={"dim": "self.attention_head_size"},
        ),
        ffn("", "intermediate.dense", "output.dense"),
    ),
}  # fmt: skip

_EXPERTS = "mixture of experts: a token sees only some of the FFNs, stored in one 3-d parameter each, not in linears"
_LATENT = "multi-head latent attention: keys and values of all heads come from one low-rank projection"
_RECURRENT = "linear attention or a state-space layer: its heads carry a state through time, not attention over tokens"
CROSS = "encoder and decoder with cross-attention, which reads two streams"

# Refused by name: what the depth-2 description does not cover.
REFUSED: dict[str, str] = {
    **dict.fromkeys(
        "mixtral qwen2_moe qwen3_moe qwen3_vl_moe olmoe gpt_oss phimoe granitemoe granitemoeshared jetmoe dbrx llama4 "
        "llama4_text glm4_moe ernie4_5_moe minimax minimax_m2 flex_olmo hunyuan_v1_moe dots1 nllb-moe afmoe aria_text "
        "switch_transformers cohere2_moe exaone_moe granitemoe_swa mimo_v2_flash solar_open deepseek_v4".split(),
        _EXPERTS,
    ),
    **dict.fromkeys(
        "deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa longcat_flash minicpm3 youtu".split(), _LATENT
    ),
    **dict.fromkeys(
        "mamba mamba2 falcon_mamba falcon_h1 jamba bamba zamba zamba2 rwkv recurrent_gemma qwen3_next lfm2 xlstm "
        "granitemoehybrid nemotron_h kimi_linear qwen3_5 qwen3_5_text qwen3_5_moe qwen3_5_moe_text olmo_hybrid".split(),
        _RECURRENT,
    ),
    **dict.fromkeys(
        "t5 mt5 umt5 bart mbart pegasus marian whisper led longt5 t5gemma blenderbot mvp prophetnet mllama".split(),
        CROSS,
    ),
}
