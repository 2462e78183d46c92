"""Perplexity with everything that belongs beside it: strides, bytes, standard errors."""

import copy
import math

import pytest
import torch
from tiny import VOCABULARY, tiny_model

from greedy_helpers import evaluate_text, perplexity, read_text
from greedy_helpers.checkpoint import load_tokenizer
from greedy_helpers.data import documents, evaluation_tokens
from greedy_helpers.evaluate import Text


def stream(t: int = 200, n_documents: int = 20) -> Text:
    generator = torch.Generator().manual_seed(1)
    size = torch.randint(0, 6, (t,), generator=generator)
    return Text(torch.randint(VOCABULARY, (t,), generator=generator), torch.arange(t) * n_documents // t, size)


def test_without_overlap_it_is_the_perplexity_of_the_windows(model):
    text = stream(205)
    windows = text.ids[:192].view(8, 24)
    score = evaluate_text(model, text, seq=24)
    assert score.windows == 8
    assert score.tokens == 8 * 23
    assert score.perplexity == pytest.approx(perplexity(model, windows), rel=1e-9)
    some = evaluate_text(model, text, seq=24, windows=3)
    assert some.perplexity == pytest.approx(perplexity(model, windows[[0, 2, 5]]), rel=1e-9)


def test_every_token_but_the_first_counts_once_when_windows_overlap(model):
    """One target at a time, with the context that the stride leaves it."""
    text, seq, stride = stream(59), 24, 7
    total = 0.0
    for target in range(1, 24 + 7 * 5):
        window = 0 if target < seq else math.ceil((target + 1 - seq) / stride)
        logits = model(text.ids[None, window * stride : target]).logits[0, -1]
        total -= torch.log_softmax(logits, -1)[text.ids[target]].item()
    for batch_size in (1, 4, 16):
        score = evaluate_text(model, text, seq, stride, batch_size=batch_size)
        assert score.tokens == 58
        assert score.loss == pytest.approx(total / 58, rel=1e-5)


def test_bits_per_byte_of_a_uniform_model():
    model, text = tiny_model("llama"), stream(192, 4)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    score = evaluate_text(model, text, seq=48)
    size = text.size.view(4, 48)[:, 1:].sum().item()
    assert score.bits_per_byte == pytest.approx(4 * 47 * math.log2(VOCABULARY) / size, rel=1e-6)
    assert score.loss_error == pytest.approx(0, abs=1e-6)  # every window is as hard as any other


@pytest.mark.parametrize("name", ["llama-mini", "gpt2-mini"])
def test_tokens_stand_for_all_bytes_of_their_document(name, tmp_path):
    tokenizer = load_tokenizer(name)
    file = tmp_path / "characters of several bytes.txt"
    file.write_text("\n\n".join(f"Größe {i}: 你好, 😀 naïve — dérivée" for i in range(60)))
    for source in ("prose", str(file)):
        text = read_text(tokenizer, source)
        for number, document in list(enumerate(documents(source, "test")["text"]))[:10]:
            mine = text.document == number
            assert text.size[mine].sum() == len(document.encode())
            assert text.size[mine][0] == 0, "the separator is no part of the document"
        some = evaluation_tokens(tokenizer, None, 16, source)[:4]
        assert text.ids[: some.numel()].view_as(some).equal(some)


def test_standard_error_is_that_of_a_ratio(model):
    """Against the delta method, which needs no drawing."""
    score = evaluate_text(model, stream(2000, 100), seq=20)
    mean = score.nats.sum() / score.targets.sum()
    spread = (score.nats - mean * score.targets).square().sum().sqrt() / score.targets.sum()
    assert score.clusters == "documents"
    assert len(score.nats) == 100
    assert score.loss_error == pytest.approx(spread.item(), rel=0.1)
    assert score.perplexity_error == pytest.approx(score.perplexity * score.loss_error)


def test_few_documents_are_cut_into_windows(model):
    score = evaluate_text(model, stream(200, 3), seq=20)
    assert score.clusters == "windows"
    assert score.targets.tolist() == [19] * 10


def test_a_difference_is_surer_than_its_terms(model):
    text, other = stream(2000, 100), copy.deepcopy(model)
    with torch.no_grad():
        other.get_output_embeddings().weight.mul_(0.98)
    mine, theirs = (evaluate_text(one, text, seq=20) for one in (model, other))
    difference, error = mine.minus(theirs)
    assert difference == pytest.approx(mine.loss - theirs.loss)
    assert 0 < error < 0.2 * mine.loss_error
    assert mine.minus(mine) == (0.0, 0.0)
    with pytest.raises(ValueError, match="same windows"):
        mine.minus(evaluate_text(other, text, seq=40))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seq": 24, "stride": 25}, r"stride in \[1, seq\]"),
        ({"seq": 1}, "seq >= 2"),
        ({"seq": 24, "windows": 9}, "1 <= windows <= 8, as many as 200 tokens hold .* found windows=9"),
        ({"seq": 300}, "1 <= windows <= 0, .* at seq=300"),
        ({"seq": 24, "windows": 0}, "found windows=0"),
    ],
)
def test_impossible_windows_are_refused(model, settings, message):
    with pytest.raises(ValueError, match=message):
        evaluate_text(model, stream(200), **settings)


def test_as_words_and_as_json(model):
    score = evaluate_text(model, stream(), seq=20)
    assert f"{score.perplexity:.2f}" in str(score)
    assert "stride 20" in str(score)
    assert score.to_dict()["tokens"] == 190


def test_offsets_that_leave_blanks_out_or_go_back(monkeypatch):
    """Some tokenizers trim blanks from their offsets, or give a piece of a character a smaller end."""

    class Trimming:
        is_fast, eos_token_id, bos_token_id, get_vocab = True, None, None, dict

        def __call__(self, text, **_options):
            return {"input_ids": [5, 6, 7, 8], "offset_mapping": [(0, 2), (3, 6), (3, 5), (6, 6)]}

    monkeypatch.setattr("greedy_helpers.evaluate.documents", lambda *_: {"text": ["ab cdü\n\n"]})
    assert read_text(Trimming()).size.tolist() == [2, 5, 0, 2]
