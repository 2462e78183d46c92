"""What users do with a pruned model, in small: it works today and has to go on working."""

import copy
import json
import os
import subprocess
import sys
import time

import pytest
import torch
from conftest import calibration
from tiny import VOCABULARY, tiny_model, unit_sets
from transformers import AutoModelForCausalLM

from greedy_helpers import FLAP, depth2_modules, export_plain, load_model, load_pruned, prune, remove_units, save_pruned
from greedy_helpers.data import WIKITEXT2
from greedy_helpers.tasks import zero_shot

TOKENS = calibration(12)


def pruned(name, dtype=torch.float64, **sizes):
    """Blocks of different sizes: other heads and channels in each."""
    model = tiny_model(name, dtype, **sizes)
    for i, module in enumerate(depth2_modules(model)):
        sets = unit_sets(module)
        remove_units(module, sets[:, min(1 + i, sets.shape[1] - 1) :].flatten())
    return model


def logits_of(model, tokens=TOKENS):
    with torch.no_grad():
        return model(input_ids=tokens).logits


# --- generation


@pytest.mark.parametrize("name", ["bloom", "falcon-rw", "gpt2", "opt", "gpt_neo", "gemma2", "llama-gqa"])
def test_left_padded_batches_generate_what_single_prompts_do(name):
    """ALiBi and learned positions follow the attention mask, also behind fewer heads."""
    # in float64 transformers' BLOOM and Gemma 2 give NaN, dense too: the mask overflows their softmax, in float32
    model = pruned(name, torch.float32 if name in ("bloom", "gemma2") else torch.float64)
    prompts = [TOKENS[i, :n] % (VOCABULARY - 2) + 2 for i, n in enumerate((3, 9, 6))]  # 0 ends and pads
    width = max(map(len, prompts))
    ids, mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, 1
    how = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    how |= {"return_dict_in_generate": True, "output_logits": True}
    together = model.generate(ids, attention_mask=mask, **how)
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt[None], attention_mask=torch.ones_like(prompt)[None], **how)
        assert together.sequences[row, width:].tolist() == alone.sequences[0, len(prompt) :].tolist()
        for batch, single in zip(together.logits, alone.logits, strict=True):
            torch.testing.assert_close(batch[row], single[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("write", [save_pruned, export_plain])
def test_generation_configs_that_transformers_finds_invalid(write, tmp_path):
    """Sampling options without sampling, as Llama-2 was published: transformers saves no such config that is new."""
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    options = {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [0, 7]}
    (tmp_path / "dense" / "generation_config.json").write_text(json.dumps(options))
    model, _ = load_model(tmp_path / "dense", dtype=torch.float64)
    with pytest.raises(ValueError, match="temperature"):
        model.generation_config.validate(strict=True)
    for module in depth2_modules(model):
        remove_units(module, torch.arange(module.n_units // 2))
    write(model, tmp_path / "model")
    loaded, _ = load_model(tmp_path / "model", dtype=torch.float64)
    torch.testing.assert_close(logits_of(loaded), logits_of(model))
    if write is save_pruned:
        kept = json.loads((tmp_path / "model" / "generation_config.json").read_text())
        assert {key: kept[key] for key in options if key in kept} == options | {"do_sample": kept.get("do_sample")}


# --- rotary positions


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 16.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 16},
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
def test_scaled_rotary_positions_through_the_mistral_export(rope, tmp_path):
    """48 is no multiple of 5 heads, which Llama's own config wants; Mistral's does not."""
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 8, "max_position_embeddings": 32}
    model = tiny_model("llama", **sizes, rope_parameters=rope | {"rope_theta": 5_000.0})
    for module in depth2_modules(model):
        remove_units(module, torch.arange(module.n_units * 5 // 8))
    export_plain(model, tmp_path / "model")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float64)
    assert type(plain).__name__ == "MistralForCausalLM"
    beyond = calibration(2, 60)  # longer than the context: where dynamic scaling sets in
    for tokens in (TOKENS, beyond):
        torch.testing.assert_close(logits_of(plain, tokens), logits_of(model, tokens), rtol=1e-6, atol=1e-6)
    unscaled = tiny_model("llama", **sizes)
    for module in depth2_modules(unscaled):
        remove_units(module, torch.arange(module.n_units * 5 // 8))
    assert (logits_of(unscaled, beyond) - logits_of(model, beyond)).abs().max() > 1e-3  # else the test shows nothing


# --- training, compiling, judging


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_lora_on_a_pruned_model_merged_and_saved(name, tmp_path):
    peft = pytest.importorskip("peft")
    model = pruned(name)
    before = logits_of(model)
    targets = ["q_proj", "down_proj"] if name == "llama" else ["c_attn", "c_proj"]
    config = peft.LoraConfig(r=2, target_modules=targets, fan_in_fan_out=name == "gpt2", init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    after = logits_of(adapted)
    assert (after - before).abs().max() > 1e-3
    merged = adapted.merge_and_unload()
    save_pruned(merged, tmp_path / "merged")
    loaded, _ = load_pruned(tmp_path / "merged", dtype=torch.float64)
    torch.testing.assert_close(logits_of(loaded), after, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("stored", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("read", [torch.float64, torch.float32, torch.bfloat16])
def test_added_biases_through_saving_and_dtypes(stored, read, tmp_path):
    model = tiny_model("llama")
    prune(model, TOKENS, 0.5, FLAP, progress=False)
    biases = {module.level2.path: module.level2.linear.bias for module in depth2_modules(model)}
    assert all(bias is not None for bias in biases.values())
    save_pruned(model, tmp_path / "flap", dtype=stored)
    loaded, _ = load_pruned(tmp_path / "flap", dtype=read)
    for path, bias in biases.items():
        new = loaded.get_submodule(path).bias
        assert new.dtype == read
        expected = bias.to(stored or bias.dtype).to(read)
        torch.testing.assert_close(new, expected, rtol=0, atol=0)
    again = copy.deepcopy(loaded).to(torch.float64)
    save_pruned(again, tmp_path / "again")
    torch.testing.assert_close(logits_of(load_pruned(tmp_path / "again", dtype=torch.float64)[0]), logits_of(again))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiling_unequal_blocks(backend):
    model = pruned("llama", torch.float32)
    expected = logits_of(model)
    try:
        compiled = logits_of(torch.compile(copy.deepcopy(model), backend=backend))
    finally:
        torch._dynamo.reset()
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-4)


def test_lm_eval_on_a_pruned_model_that_was_saved(tmp_path):
    """Read back from its folder; tests/test_tasks.py compares the numbers for a model in memory."""
    pytest.importorskip("lm_eval", reason="needs greedy-helpers[eval]")
    from greedy_helpers import load_model

    model, tokenizer = load_model("llama-mini")
    for i, module in enumerate(depth2_modules(model)):
        remove_units(module, torch.arange(module.n_units - 1 - i % 2))
    save_pruned(model, tmp_path / "pruned", tokenizer)
    loaded, its_tokenizer = load_model(tmp_path / "pruned")
    rows = [
        {"context": "import", "choices": [" os", " zebra"], "answer": 0},
        *({"context": "x =", "choices": [" 1", " )"], "answer": 0},) * 3,
    ]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "items", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "items.jsonl")}},
        "doc_to_text": "context", "doc_to_choice": "choices",
        "doc_to_target": "answer", "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    (tmp_path / "items.yaml").write_text(json.dumps(task))  # JSON is YAML
    tables = [zero_shot(*one, [str(tmp_path / "items.yaml")]) for one in ((model, tokenizer), (loaded, its_tokenizer))]
    assert tables[0].loc["items", "items"] == 4
    assert tables[0].equals(tables[1])


# --- without a network


OFFLINE = """
import sys
from greedy_helpers.data import documents
try:
    documents(sys.argv[1])
except ConnectionError as error:
    print(error)
"""


@pytest.mark.parametrize("offline", ["1", "0"])
def test_sources_that_cannot_be_reached_fail_soon_with_one_sentence(offline, tmp_path):
    """Known from the environment, and learnt by trying: a proxy that refuses stands for the missing network."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": offline, "HF_DATASETS_OFFLINE": offline, "HF_HOME": str(tmp_path),
        "HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9",
        "https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9", "HF_ENDPOINT": "https://huggingface.invalid",
    }  # fmt: skip
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, WIKITEXT2], env=environment, capture_output=True, text=True, timeout=120
    )
    assert time.monotonic() - start < 60
    assert done.returncode == 0, done.stderr[-2000:]
    assert "'code' and 'prose' always work" in done.stdout
