"""The corpus is split once and for all; packing neither pads nor loses."""

import hashlib
import json
from functools import partial

import pytest
import torch
from datasets import Dataset
from tiny import VOCABULARY, tiny_model

from greedy_helpers import calibration_tokens, evaluation_tokens, load_model, random_tokens, self_generated_tokens
from greedy_helpers.data import docstrings, documents, is_held_out, pack, python_corpus


@pytest.fixture(scope="module")
def tokenizer():
    return load_model("llama-mini")[1]


def test_split_is_disjoint_and_covers_every_module():
    train, test = python_corpus("train"), python_corpus("test")
    assert isinstance(train, Dataset)
    assert not set(train["name"]) & set(test["name"])
    assert not set(train["text"]) & set(test["text"])
    assert len(test) > 20
    assert 0.05 < len(test) / (len(train) + len(test)) < 0.2


def test_split_is_stable():
    # Written out once, by hand: if one of these moves, the embedded models' held-out text is no longer held out.
    held_out = {"ast.py", "enum.py", "ipaddress.py", "selectors.py", "http/client.py", "logging/handlers.py"}
    trained_on = {"json/decoder.py", "argparse.py", "typing.py", "asyncio/tasks.py", "pathlib.py", "random.py"}
    assert all(is_held_out(name) for name in held_out)
    assert not any(is_held_out(name) for name in trained_on)
    digest = hashlib.sha256(b"enum.py").digest()  # the rule in other words
    assert int(digest[:4].hex(), 16) % 10 == 0


def test_held_out_prose_is_in_no_training_document():
    topics = python_corpus("test", "prose")
    assert len(topics) > 50
    assert not any("pydoc_data" in name for name in python_corpus("train")["name"])
    trained_on = "\n".join(python_corpus("train", "prose")["text"]) + "\n".join(python_corpus("train")["text"])
    for text in topics["text"][:40]:
        middle = text[len(text) // 2 :][:200]
        assert middle not in trained_on


def test_no_tests_tables_or_site_packages():
    names = [*python_corpus("train")["name"], *python_corpus("test")["name"]]
    forbidden = {"test", "tests", "site-packages", "encodings", "pydoc_data", "idle_test"}
    assert not [name for name in names if forbidden & set(name.split("/"))]


@pytest.mark.parametrize(("split", "domain"), [("validation", "code"), ("train", "poetry")])
def test_unknown_split_or_domain(split, domain):
    with pytest.raises(ValueError, match="expected"):
        python_corpus(split, domain)


def test_docstrings_come_in_order_and_bad_source_has_none():
    source = '"""First, about the module."""\ndef f():\n    """Second, about f."""\n'
    assert docstrings(source, min_characters=5) == "First, about the module.\n\nSecond, about f."
    assert docstrings("print 'python 2'") == ""


@pytest.mark.parametrize("lengths", [[0, 1, 5, 17, 3, 8, 2], []])
@pytest.mark.parametrize("separator", [None, 99])
def test_packing_loses_no_token(separator, lengths):
    ids = [list(range(length)) for length in lengths]
    windows, rest = pack(ids, 4, separator)
    stream = [token for document in ids for token in ([] if separator is None else [separator]) + document]
    assert windows.shape == (len(stream) // 4, 4)
    assert windows.flatten().tolist() + rest.tolist() == stream


def test_windows_too_short_to_predict_a_token():
    with pytest.raises(ValueError, match="at least 2"):
        pack([[1, 2]], 1)


def test_calibration_is_seeded_and_from_the_training_split(tokenizer):
    first = calibration_tokens(tokenizer, 8, 64, seed=3)
    assert first.shape == (8, 64)
    assert first.dtype == torch.long
    assert torch.equal(first, calibration_tokens(tokenizer, 8, 64, seed=3))
    assert not torch.equal(first, calibration_tokens(tokenizer, 8, 64, seed=4))
    train = "\n".join(python_corpus("train")["text"])
    test = "\n".join(python_corpus("test")["text"])
    piece = max(tokenizer.decode(first[0]).split("<|endoftext|>"), key=len)[2:-2]  # cut characters at the ends
    assert piece in train
    assert piece not in test


def test_evaluation_windows_are_spread_and_validation_windows_are_between_them(tokenizer):
    every = evaluation_tokens(tokenizer, None, 128, "prose")
    test, validation = (evaluation_tokens(tokenizer, 40, 128, "prose", part) for part in ("test", "validation"))
    assert torch.equal(test, every[torch.arange(40) * len(every) // 40])
    places = [(every == window).all(1).nonzero().item() for window in torch.stack([test, validation], 1).flatten(0, 1)]
    assert places == sorted(set(places))
    too_many = f"{2 * len(every)} windows .* to set {len(every)} of them aside .* found {len(every)}"
    with pytest.raises(ValueError, match=too_many):
        evaluation_tokens(tokenizer, len(every), 128, "prose", "validation")


@pytest.mark.parametrize("function", [calibration_tokens, evaluation_tokens])
def test_more_windows_than_text(function, tokenizer, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("\n\n".join(f"This is paragraph number {i} of a short file." for i in range(60)))
    with pytest.raises(ValueError, match=r"expected 1000 windows of 16 tokens .*short\.txt'.* found \d+"):
        function(tokenizer, 1000, 16, source=str(path))
    with pytest.raises(ValueError, match="at least 1 window, found n=0"):
        function(tokenizer, 0)


@pytest.mark.parametrize(("suffix", "column"), [("txt", "text"), ("parquet", "body")])
def test_local_file_is_split_by_paragraph_or_row(suffix, column, tmp_path, tokenizer):
    path = tmp_path / f"mine.{suffix}"
    texts = [f"This is paragraph number {i} of a file, and it says so." for i in range(60)]
    if suffix == "txt":
        path.write_text("\n\n".join(texts))
        assert calibration_tokens(tokenizer, 4, 16, source=str(path)).shape == (4, 16)
    else:
        Dataset.from_dict({column: texts}).to_parquet(str(path))
        with pytest.raises(ValueError, match=r"expected a column 'text' .* found \['body'\]"):
            documents(str(path), "train")
    train, test = (list(documents(str(path), split, column)["text"]) for split in ("train", "test"))
    assert sorted(train + test) == sorted(texts)
    assert test


def test_rows_that_the_source_names(tmp_path, tokenizer):
    """They serve either split, whole; the folder's name may hold what joins two sources."""
    path = tmp_path / "a+b" / "c4.jsonl"
    path.parent.mkdir()
    texts = [f"document {i}, which has a few words of its own" for i in range(30)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for split in ("train", "test"):
        assert list(documents(f"{path}[:20]", split)["text"]) == texts[:20]
        assert list(documents(f"{path}[20:]", split)["text"]) == texts[20:]
        assert list(documents(f"{path}[3:5]", split)["text"]) == texts[3:5]
    assert "document 7, which" in tokenizer.decode(calibration_tokens(tokenizer, 1, 8, f"{path}[7:8]")[0])
    for rows in ("[20:31]", "[30:]", "[5:5]"):
        with pytest.raises(ValueError, match=r"expected rows \[.*\] in .*c4\.jsonl, found 30 rows"):
            documents(f"{path}{rows}")
    path.rename(tmp_path / "file[1:2].jsonl")  # a name that looks like rows
    assert len(documents(str(tmp_path / "file[1:2].jsonl"), "train")) < 30


def test_wikitext_as_published(tmp_path):
    """The rows of the Hub's copy are the lines, blank ones empty, joined with blank lines: published numbers' text."""
    rows = ["", " = Title = \n", "", " A line , with a \u2028 separator . \n", ""]
    raw = " \n = Title = \n \n A line , with a \u2028 separator . \n \n"
    for split in ("train", "valid", "test"):
        (tmp_path / f"wiki.{split}.raw").write_text(raw.replace("Title", split), "utf-8", newline="")
    of = {split: "\n\n".join(rows).replace("Title", split) for split in ("train", "valid", "test")}
    file = {split: str(tmp_path / f"wiki.{split}.raw") for split in of}
    for split in ("train", "test"):
        assert documents(str(tmp_path), split)["text"] == [of[split]]
        assert documents(file[split], split)["text"] == [of[split]]
        assert documents(file["valid"], split)["text"] == [of["valid"]]
    with pytest.raises(ValueError, match=r"text of split 'train', found .*wiki\.test\.raw, .* test split"):
        documents(file["test"], "train")
    with pytest.raises(ValueError, match=r"text of split 'test', found .*wiki\.train\.raw, .* train split"):
        documents(file["train"], "test")
    (tmp_path / "wiki.train.raw").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected wiki\.train\.raw in .*, found wiki\.test\.raw, wiki\.val"):
        documents(str(tmp_path), "train")
    with pytest.raises(FileNotFoundError, match=r"raw form at .*wiki\.train\.raw, found nothing"):
        documents(file["train"], "train")
    with pytest.raises(ValueError, match=r"expected wiki\.train\.raw, .* found other\.raw"):
        documents("other.raw", "train")
    (tmp_path / "wiki.test.raw").write_bytes("Größe\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"wiki\.test\.raw is not utf-8"):
        documents(file["test"], "test")


def test_missing_file_and_missing_network():
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt"):
        documents("nowhere.txt")
    with pytest.raises(ConnectionError, match="'code' and 'prose' always work"):
        documents("Salesforce/wikitext:wikitext-2-raw-v1")


def test_published_sources_name_their_files(monkeypatch):
    """PTB in LLM-Pruner's form (validation split, rows joined by blank lines), C4 by document."""
    asked = []

    def answer(path, data_files, split):
        asked.append((path, data_files[split]))
        column = "sentence" if path == "parquet" else "text"
        return Dataset.from_dict({column: ["one", "two"]})

    monkeypatch.setattr("greedy_helpers.data.load_dataset", answer)
    assert documents("ptb", "test")["text"] == ["one\n\ntwo"]
    assert list(documents("c4", "train")["text"]) == ["one", "two"]
    assert asked[0][0] == "parquet"
    assert "penn_treebank/validation/" in asked[0][1]
    assert asked[1] == ("allenai/c4", "en/c4-train.00000-of-01024.json.gz")


def test_several_sources_in_equal_parts(tokenizer):
    both = calibration_tokens(tokenizer, 5, 32, "code+prose", seed=3)
    code, prose = (calibration_tokens(tokenizer, m, 32, s, seed=3) for m, s in ((3, "code"), (2, "prose")))
    assert torch.equal(both, torch.stack([code[0], prose[0], code[1], prose[1], code[2]]))


# --- calibration without data


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2"])
def test_self_generated_text_is_the_models_own_distribution(name):
    """With the same draws, inverting the distribution from full passes without a cache gives the same tokens."""
    model = tiny_model(name)
    found = self_generated_tokens(model, n=3, seq=12, start="random", seed=4)
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(VOCABULARY, (3, 1), generator=generator)
    draws = torch.rand(3, 11, generator=generator, dtype=torch.float64)
    for t in range(11):
        with torch.no_grad():
            cumulative = model(tokens, use_cache=False).logits[:, -1].double().softmax(-1).cumsum(-1)
        following = (cumulative <= draws[:, t : t + 1]).sum(-1, keepdim=True)
        tokens = torch.cat([tokens, following], 1)
    assert torch.equal(found, tokens)


def test_self_generated_text_depends_on_the_seed_and_not_on_the_batch():
    model = tiny_model("llama")
    make = partial(self_generated_tokens, model, n=9, seq=10, start="random")
    assert torch.equal(make(batch_size=1), make(batch_size=8))
    assert not torch.equal(make(), make(seed=1))
    greedy = make(top_k=1)
    with torch.no_grad():
        logits = model(greedy).logits[:, :-1]
    chosen = logits.gather(-1, greedy[:, 1:, None])[..., 0]
    torch.testing.assert_close(chosen, logits.amax(-1))  # the padding token's logits are all equal
    assert make(temperature=0.05).unique().numel() < make(temperature=2.0).unique().numel()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq": 65, "start": "random"}, "2 <= seq <= 64, found n=128, seq=65"),  # 64 positions
        ({"temperature": 0.0, "start": "random", "seq": 8}, "expected temperature > 0"),
        ({"seq": 8}, "no separator to start from"),
        ({"seq": 8, "start": "eos"}, "'separator' or 'random', found 'eos'"),
    ],
)
def test_self_generation_refuses_what_it_cannot_do(options, message):
    with pytest.raises(ValueError, match=message):
        self_generated_tokens(tiny_model("llama"), **options)


def test_self_generation_stops_at_nan():
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(FloatingPointError, match="NaN or Inf logits"):
        self_generated_tokens(model, n=1, seq=4, start="random")


def test_random_tokens_cover_the_vocabulary():
    tokens = random_tokens(tiny_model("gpt2"), 64, 128)
    assert tokens.shape == (64, 128)
    assert tokens.unique().tolist() == list(range(VOCABULARY))
    assert torch.equal(tokens, random_tokens(VOCABULARY, 64, 128))
    with pytest.raises(ValueError, match="n >= 1"):
        random_tokens(VOCABULARY, 0)
