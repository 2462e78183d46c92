"""Perplexity with everything that belongs beside it: strides, bytes, standard errors."""

import copy
import math

import pytest
import torch
from tiny import VOCABULARY, tiny_model

from greedy_helpers import Text, evaluate_text, load_model, perplexity, read_text
from greedy_helpers.data import documents, evaluation_tokens


def stream(t: int = 200, n_documents: int = 20) -> Text:
    generator = torch.Generator().manual_seed(1)
    size = torch.randint(0, 6, (t,), generator=generator)
    return Text(torch.randint(VOCABULARY, (t,), generator=generator), torch.arange(t) * n_documents // t, size)


def test_without_overlap_it_is_the_perplexity_of_the_windows(model):
    text = stream(205)
    windows = text.ids[:192].view(8, 24)
    found = evaluate_text(model, text, seq=24)
    assert found.windows == 8
    assert found.tokens == 8 * 23
    assert found.perplexity == pytest.approx(perplexity(model, windows), rel=1e-9)
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
    found = evaluate_text(model, text, seq, stride)
    assert found.tokens == 58
    assert found.loss == pytest.approx(total / 58, rel=1e-5)


def test_does_not_depend_on_the_batch_size(model):
    one, many = (evaluate_text(model, stream(), 16, 8, batch_size=size) for size in (1, 7))
    assert one.perplexity == pytest.approx(many.perplexity, rel=1e-6)


def test_bits_per_byte_of_a_uniform_model():
    model, text = tiny_model("llama"), stream(192, 4)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    found = evaluate_text(model, text, seq=48)
    size = text.size.view(4, 48)[:, 1:].sum().item()
    assert found.bits_per_byte == pytest.approx(4 * 47 * math.log2(VOCABULARY) / size, rel=1e-6)
    assert found.loss_error == pytest.approx(0, abs=1e-6)  # every window is as hard as any other


@pytest.mark.parametrize("name", ["llama-mini", "gpt2-mini"])
def test_tokens_stand_for_all_bytes_of_their_document(name):
    _, tokenizer = load_model(name)
    text = read_text(tokenizer, "prose")
    for number, document in list(enumerate(documents("prose", "test")["text"]))[:10]:
        mine = text.document == number
        assert text.size[mine].sum() == len(document.encode())
        assert text.size[mine][0] == 0, "the separator is no part of the document"
    assert text.ids[: 4 * 64].view(4, 64).equal(evaluation_tokens(tokenizer, None, 64, "prose")[:4])


def test_characters_of_several_bytes(tmp_path):
    _, tokenizer = load_model("llama-mini")
    file = tmp_path / "umlaut.txt"
    file.write_text("\n\n".join(f"Größe {i}: 你好, 😀 naïve — dérivée" for i in range(60)))
    text = read_text(tokenizer, str(file))
    for number, document in enumerate(documents(str(file), "test")["text"]):
        assert text.size[text.document == number].sum() == len(document.encode())


def test_standard_error_is_that_of_a_ratio(model):
    """Against the delta method, which needs no drawing."""
    found = evaluate_text(model, stream(2000, 100), seq=20)
    mean = found.nats.sum() / found.targets.sum()
    spread = (found.nats - mean * found.targets).square().sum().sqrt() / found.targets.sum()
    assert found.clusters == "documents"
    assert len(found.nats) == 100
    assert found.loss_error == pytest.approx(spread.item(), rel=0.1)
    assert found.perplexity_error == pytest.approx(found.perplexity * found.loss_error)


def test_few_documents_are_cut_into_windows(model):
    found = evaluate_text(model, stream(200, 3), seq=20)
    assert found.clusters == "windows"
    assert found.targets.tolist() == [19] * 10


def test_a_difference_is_surer_than_its_terms(model):
    text, other = stream(2000, 100), copy.deepcopy(model)
    with torch.no_grad():
        other.get_output_embeddings().weight.mul_(0.98)
    mine, theirs = (evaluate_text(one, text, seq=20) for one in (model, other))
    difference, error = mine.minus(theirs)
    assert difference == pytest.approx(mine.loss - theirs.loss)
    assert 0 < error < 0.2 * mine.loss_error
    nothing = mine.minus(mine)
    assert nothing == (0.0, 0.0)
    with pytest.raises(ValueError, match="same windows"):
        mine.minus(evaluate_text(other, text, seq=40))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seq": 24, "stride": 25}, r"stride in \[1, seq\]"),
        ({"seq": 1}, "seq >= 2"),
        ({"seq": 24, "windows": 9}, "9 windows .* found 8"),
        ({"seq": 300}, "at least 1 window .* found 0"),
        ({"seq": 24, "windows": 0}, "0 windows"),
    ],
)
def test_impossible_windows_are_refused(model, settings, message):
    with pytest.raises(ValueError, match=message):
        evaluate_text(model, stream(200), **settings)


def test_as_words_and_as_json(model):
    found = evaluate_text(model, stream(), seq=20)
    assert f"{found.perplexity:.2f}" in str(found)
    assert "stride 20" in str(found)
    assert found.to_dict()["tokens"] == 190


def test_offsets_that_leave_blanks_out_or_go_back(monkeypatch):
    """Some tokenizers trim blanks from their offsets, or give a piece of a character a smaller end."""

    class Trimming:
        is_fast, eos_token_id, bos_token_id = True, None, None

        def __call__(self, text, **_options):
            return {"input_ids": [5, 6, 7, 8], "offset_mapping": [(0, 2), (3, 6), (3, 5), (6, 6)]}

    monkeypatch.setattr("greedy_helpers.evaluate.documents", lambda source, split: {"text": ["ab cdü\n\n"]})
    assert read_text(Trimming()).size.tolist() == [2, 5, 0, 2]
