"""Tiny random models, one per supported family: two blocks, width 48, weights so large that a wrong channel shows."""

import torch
import transformers
from torch import nn

VOCABULARY = 96
_SIZE = {
    "vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.2,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
_GPT2_SIZE = {
    "vocab_size": VOCABULARY, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_inner": 80, "n_positions": 64,
    "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
_GROUPED = {"num_attention_heads": 6, "num_key_value_heads": 2}
_HIDDEN_48 = {
    "hidden_size": 48,
    "vocab_size": VOCABULARY,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_FALCON = _HIDDEN_48 | {"num_hidden_layers": 2, "num_attention_heads": 4, "ffn_hidden_size": 80, "bias": True}

# name -> (classes' common prefix, config). Head counts, groups and dims differ, so that no two axes can be mixed up.
CONFIGS: dict[str, tuple[str, dict]] = {
    "llama": ("Llama", _SIZE | {"head_dim": 12}),
    "llama-gqa": ("Llama", _SIZE | {
        "num_key_value_heads": 2, "head_dim": 12, "attention_bias": True, "mlp_bias": True,
    }),
    "gpt2": ("GPT2", _GPT2_SIZE | {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}),
    "mistral": ("Mistral", _SIZE | _GROUPED | {"head_dim": 16, "sliding_window": 8}),
    "qwen2": ("Qwen2", _SIZE | _GROUPED),
    "qwen3": ("Qwen3", _SIZE | _GROUPED | {"head_dim": 16}),
    "gemma2": ("Gemma2", _SIZE | _GROUPED | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}),
    "gemma3": ("Gemma3Text", _SIZE | _GROUPED | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}),
    "phi": ("Phi", _SIZE | _GROUPED),
    "phi3": ("Phi3", _SIZE | _GROUPED),
    "gpt_neox": ("GPTNeoX", _SIZE),
    "opt": ("OPT", _SIZE | {"ffn_dim": 80, "word_embed_proj_dim": 48, "dropout": 0.0, "init_std": 0.2}),
    "gpt_neo": ("GPTNeo", _HIDDEN_48 | {
        "num_layers": 2, "num_heads": 4, "intermediate_size": 80, "max_position_embeddings": 64, "window_size": 8,
        "attention_types": [[["global", "local"], 1]],
    }),
    "gptj": ("GPTJ", _GPT2_SIZE | {"rotary_dim": 4}),
    "bloom": ("Bloom", _HIDDEN_48 | {"n_layer": 2, "n_head": 4}),
    "falcon-7b": ("Falcon", _FALCON | {"multi_query": True, "new_decoder_architecture": False, "alibi": False}),
    "falcon-40b": ("Falcon", _FALCON | {
        "new_decoder_architecture": True, "num_attention_heads": 6, "num_kv_heads": 2, "alibi": False,
    }),
    "falcon-rw": ("Falcon", _FALCON | {"multi_query": False, "new_decoder_architecture": False, "alibi": True}),
    "olmo": ("Olmo", _SIZE | _GROUPED),
    "olmo2": ("Olmo2", _SIZE | _GROUPED),
    "smollm3": ("SmolLM3", _SIZE | _GROUPED | {"no_rope_layers": [1, 0]}),
    "stablelm": ("StableLm", _SIZE | _GROUPED | {"qk_layernorm": True, "partial_rotary_factor": 0.5}),
    "starcoder2": ("Starcoder2", _SIZE | _GROUPED),
    "granite": ("Granite", _SIZE | _GROUPED),
    "cohere": ("Cohere", _SIZE | _GROUPED),
    "glm": ("Glm", _SIZE | _GROUPED | {"head_dim": 16}),
    "gpt_bigcode": ("GPTBigCode", _GPT2_SIZE | {"multi_query": True}),
    "bert": ("Bert", _SIZE),
}  # fmt: skip
ENCODERS = ("bert",)


def tiny_config(name: str, **sizes):
    prefix, values = CONFIGS[name]
    return getattr(transformers, f"{prefix}Config")(**values | sizes)


def model_class(name: str) -> type:
    prefix = CONFIGS[name][0]
    prefix = {"Gemma3Text": "Gemma3", "GPT2": "GPT2LMHeadModel", "Bert": "BertForMaskedLM"}.get(prefix, prefix)
    return getattr(transformers, prefix if hasattr(transformers, prefix) else f"{prefix}ForCausalLM")


def tiny_model(name: str, dtype: torch.dtype = torch.float64, attention: str | None = None, **sizes):
    """In eval mode, with random biases and norms too; `sizes` are entries of the config."""
    torch.manual_seed(0)
    config = tiny_config(name, **sizes)
    if attention is not None:
        config._attn_implementation = attention
    model = model_class(name)(config)
    randomize(model)
    return model.to(dtype).eval()


def unit_sets(module) -> torch.Tensor:
    """The module's units, long [n_sets, units of a set]; every set begins one place further on than the one before.

    So some columns of it are the same number of every set, but not the same ones.
    """
    sets = torch.arange(module.n_units).view(module.n_sets, -1)
    return torch.stack([units.roll(-place) for place, units in enumerate(sets)])


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "bias" in name:
            parameter.normal_(0, 0.3)
        elif parameter.ndim == 1:  # norms
            parameter.uniform_(0.7, 1.3)
        elif parameter.std() < 0.1:  # classes that ignore initializer_range
            parameter.normal_(0, 0.2)
