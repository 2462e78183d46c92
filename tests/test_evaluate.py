"""Perplexity is the number one computes by hand."""

import math

import pytest
import torch
from tiny import VOCABULARY, tiny_model

from greedy_helpers import generate_text, load_model, perplexity


def test_perplexity_by_hand(model, tokens):
    """One window, one target at a time: softmax, log, mean, exp."""
    log_likelihoods = [
        math.log(torch.softmax(model(window[None, :position]).logits[0, -1], -1)[window[position]].item())
        for window in tokens
        for position in range(1, len(window))
    ]
    assert len(log_likelihoods) == 6 * 23
    by_hand = math.exp(-sum(log_likelihoods) / len(log_likelihoods))
    for batch_size in (1, 5, 16):
        assert perplexity(model, tokens, batch_size) == pytest.approx(by_hand, rel=1e-5)


def test_perplexity_of_a_uniform_model_is_the_vocabulary():
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert perplexity(model, torch.randint(0, VOCABULARY, (3, 9))) == pytest.approx(VOCABULARY)


def test_perplexity_switches_dropout_off_and_back(tokens):
    model = tiny_model("gpt2").train()
    assert perplexity(model, tokens) == perplexity(model, tokens) == perplexity(tiny_model("gpt2"), tokens)
    assert model.training


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.tensor([[1, VOCABULARY]]), r"ids in \[0, 96\), the vocabulary of \w+, found ids from 1 to 96"),
        (torch.tensor([[-1, 3]]), "found ids from -1 to 3"),
        (torch.tensor([1, 2]), r"found \[2\]"),
        (torch.tensor([[1]]), r"found \[1, 1\]"),
        (torch.zeros(0, 8, dtype=torch.long), r"found \[0, 8\]"),
        (torch.zeros(1, 65, dtype=torch.long), "at most 64 tokens, the context of LlamaForCausalLM, found 65"),
        (torch.rand(2, 8), "found dtype torch.float32"),
    ],
)
def test_tokens_the_model_cannot_read(tokens, message):
    with pytest.raises(TypeError if tokens.is_floating_point() else ValueError, match=message):
        perplexity(tiny_model("llama"), tokens)


def test_nan_logits():
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[5, 5] = float("nan")
    with pytest.raises(FloatingPointError, match="NaN or Inf"):
        perplexity(model, torch.randint(0, VOCABULARY, (2, 8)))


def test_generated_text_starts_with_the_prompt_and_stops_at_the_context():
    model, tokenizer = load_model("llama-mini")
    text = generate_text(model, tokenizer, "import os\n", 8)
    assert text.startswith("import os\n")
    assert text == generate_text(model, tokenizer, "import os\n", 8)
    sampled = [generate_text(model, tokenizer, "import os\n", 16, temperature=1.0, seed=seed) for seed in (0, 0, 1)]
    assert sampled[0] == sampled[1] != sampled[2]
    context = model.config.max_position_embeddings
    prompt = tokenizer.decode([5] * (context - 2))
    assert len(tokenizer(generate_text(model, tokenizer, prompt, 50))["input_ids"]) <= context + 2
    with pytest.raises(ValueError, match=f"shorter than the context of {context}"):
        generate_text(model, tokenizer, tokenizer.decode([5] * (context + 9)))
    with pytest.raises(ValueError, match="at least one token"):
        generate_text(model, tokenizer, "")
