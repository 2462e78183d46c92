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
"""

from __future__ import annotations

from dataclasses import dataclass, field
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


_QKV = {"q_proj": "kv group dim", "k_proj": "kv dim", "v_proj": "kv dim"}
_HEADS = {"num_attention_heads": "kv group", "num_key_value_heads": "kv", "head_dim": "dim"}
_WIDTH = {"intermediate_size": "unit"}
_GATED = ModuleLayout(
    "gated_ffn", "mlp", {"gate_proj": "unit", "up_proj": "unit"}, {"down_proj": "unit"}, config=_WIDTH
)
_LLAMA = Family(
    "layers", (ModuleLayout("attention", "self_attn", _QKV, {"o_proj": "kv group dim"}, config=_HEADS), _GATED)
)
_COUPLED = (
    "its q_norm and k_norm normalise over all heads at once, so a head that goes changes every other: removing heads "
    "cannot equal zeroing them"
)
_ALIBI = ("alibi", "attention_mask")  # falcon folds alibi into a mask with one slice per head
_FALCON_FFN = ModuleLayout(
    "ffn", "mlp", {"dense_h_to_4h": "unit"}, {"dense_4h_to_h": "unit"}, config={"ffn_hidden_size": "unit"}
)
_BIGCODE_FFN = ModuleLayout("ffn", "mlp", {"c_fc": "unit"}, {"c_proj": "unit"}, config={"n_inner": "unit"})

# "type:flag" is the entry for configs of that type whose attribute `flag` is true; it is asked before "type".
FAMILIES: dict[str, Family] = {
    "llama": Family(_LLAMA.blocks, _LLAMA.modules, export_as="Mistral"),
    **dict.fromkeys(
        ["cohere", "gemma2", "gemma3_text", "granite", "mistral", "olmo", "qwen2", "qwen3", "smollm3"], _LLAMA
    ),
    "olmo2": Family("layers", (_GATED,), whole={"self_attn": _COUPLED}),
    "stablelm": Family(
        "layers",
        (
            ModuleLayout(
                "attention",
                "self_attn",
                _QKV,
                {"o_proj": "kv group dim"},
                {"num_heads": "kv group", "num_key_value_heads": "kv"},
                lists={"q_layernorm.norms": "kv group", "k_layernorm.norms": "kv"},
            ),
            _GATED,
        ),
    ),
    "glm": Family(
        "layers",
        (
            _LLAMA.modules[0],
            ModuleLayout("gated_ffn", "mlp", {"gate_up_proj": "unit | unit"}, {"down_proj": "unit"}, config=_WIDTH),
        ),
    ),
    "phi3": Family(
        "layers",
        (
            ModuleLayout(
                "attention",
                "self_attn",
                {"qkv_proj": "kv group dim | kv dim | kv dim"},
                {"o_proj": "kv group dim"},
                {"num_key_value_heads": "kv", "config.num_attention_heads": "kv group"},
                config=_HEADS,
            ),
            ModuleLayout("gated_ffn", "mlp", {"gate_up_proj": "unit | unit"}, {"down_proj": "unit"}, config=_WIDTH),
        ),
    ),
    "phi": Family(
        "layers",
        (
            ModuleLayout("attention", "self_attn", _QKV, {"dense": "kv group dim"}, config=_HEADS),
            ModuleLayout("ffn", "mlp", {"fc1": "unit"}, {"fc2": "unit"}, config=_WIDTH),
        ),
    ),
    "starcoder2": Family(
        "layers",
        (_LLAMA.modules[0], ModuleLayout("ffn", "mlp", {"c_fc": "unit"}, {"c_proj": "unit"}, config=_WIDTH)),
    ),
    "gpt2": Family(
        "h",
        (
            ModuleLayout(
                "attention",
                "attn",
                {"c_attn": "kv dim | kv dim | kv dim"},
                {"c_proj": "kv dim"},
                {"num_heads": "kv", "split_size": "kv dim"},
            ),
            ModuleLayout("ffn", "mlp", {"c_fc": "unit"}, {"c_proj": "unit"}, config={"n_inner": "unit"}),
        ),
    ),
    "gpt_bigcode:multi_query": Family(
        "h",
        (
            ModuleLayout(
                "attention",
                "attn",
                {"c_attn": "head dim | dim | dim"},
                {"c_proj": "head dim"},
                {"embed_dim": "head dim", "num_heads": "head", "num_key_value_groups": "head"},
            ),
            _BIGCODE_FFN,
        ),
    ),
    "gpt_bigcode": Family(
        "h",
        (
            ModuleLayout("attention", "attn", {"c_attn": "kv 3 dim"}, {"c_proj": "kv dim"}, {"num_heads": "kv"}),
            _BIGCODE_FFN,
        ),
    ),
    "gpt_neo": Family(
        "h",
        (
            ModuleLayout(
                "attention",
                "attn.attention",
                {"q_proj": "kv dim", "k_proj": "kv dim", "v_proj": "kv dim"},
                {"out_proj": "kv dim"},
                {"num_heads": "kv"},
            ),
            ModuleLayout("ffn", "mlp", {"c_fc": "unit"}, {"c_proj": "unit"}, config=_WIDTH),
        ),
    ),
    "gptj": Family(
        "h",
        (
            ModuleLayout(
                "attention",
                "attn",
                {"q_proj": "kv dim", "k_proj": "kv dim", "v_proj": "kv dim"},
                {"out_proj": "kv dim"},
                {"num_attention_heads": "kv"},
            ),
            ModuleLayout("ffn", "mlp", {"fc_in": "unit"}, {"fc_out": "unit"}, config={"n_inner": "unit"}),
        ),
    ),
    "gpt_neox": Family(
        "layers",
        (
            ModuleLayout(
                "attention",
                "attention",
                {"query_key_value": "kv 3 dim"},
                {"dense": "kv dim"},
                sizes={"dim": "head_size"},
            ),
            ModuleLayout("ffn", "mlp", {"dense_h_to_4h": "unit"}, {"dense_4h_to_h": "unit"}, config=_WIDTH),
        ),
    ),
    "opt": Family(
        "decoder.layers",
        (
            ModuleLayout(
                "attention",
                "self_attn",
                {"q_proj": "kv dim", "k_proj": "kv dim", "v_proj": "kv dim"},
                {"out_proj": "kv dim"},
                {"num_heads": "kv"},
            ),
            ModuleLayout("ffn", "", {"fc1": "unit"}, {"fc2": "unit"}, config={"ffn_dim": "unit"}),
        ),
    ),
    "bloom": Family(
        "h",
        (
            ModuleLayout(
                "attention",
                "self_attention",
                {"query_key_value": "kv 3 dim"},
                {"dense": "kv dim"},
                {"num_heads": "kv"},
                head_inputs=_ALIBI,
            ),
            ModuleLayout("ffn", "mlp", {"dense_h_to_4h": "unit"}, {"dense_4h_to_h": "unit"}),
        ),
    ),
    "falcon:new_decoder_architecture": Family(
        "h",
        (
            ModuleLayout(
                "attention",
                "self_attention",
                {"query_key_value": "kv group+2 dim"},
                {"dense": "kv group dim"},
                {"num_heads": "kv group", "num_kv_heads": "kv"},
                sizes={"dim": "head_dim", "group": "num_heads // num_kv_heads"},
                head_inputs=_ALIBI,
            ),
            _FALCON_FFN,
        ),
    ),
    "falcon:multi_query": Family(
        "h",
        (
            ModuleLayout(
                "attention",
                "self_attention",
                {"query_key_value": "head dim | dim | dim"},
                {"dense": "head dim"},
                {"num_heads": "head"},
                head_inputs=_ALIBI,
            ),
            _FALCON_FFN,
        ),
    ),
    "falcon": Family(
        "h",
        (
            ModuleLayout(
                "attention",
                "self_attention",
                {"query_key_value": "kv 3 dim"},
                {"dense": "kv dim"},
                {"num_heads": "kv", "num_kv_heads": "kv"},
                head_inputs=_ALIBI,
            ),
            _FALCON_FFN,
        ),
    ),
    "bert": Family(
        "encoder.layer",
        (
            ModuleLayout(
                "attention",
                "attention",
                {"self.query": "kv dim", "self.key": "kv dim", "self.value": "kv dim"},
                {"output.dense": "kv dim"},
                sizes={"dim": "self.attention_head_size"},
            ),
            ModuleLayout("ffn", "", {"intermediate.dense": "unit"}, {"output.dense": "unit"}, config=_WIDTH),
        ),
    ),
}

_EXPERTS = "mixture of experts: a token sees only some of the FFNs, stored in one 3-d parameter each, not in linears"
_LATENT = "multi-head latent attention: keys and values of all heads come from one low-rank projection"
_RECURRENT = "linear attention or a state-space layer: its heads carry a state through time, not attention over tokens"
_CROSS = "encoder and decoder with cross-attention, which reads two streams"

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
        _CROSS,
    ),
}
