"""The corpus is split once and for all; packing neither pads nor loses."""

import hashlib

import pytest
import torch
from datasets import Dataset

from greedy_helpers import calibration_tokens, documents, evaluation_tokens, load_model, pack, python_corpus
from greedy_helpers.data import docstrings, is_held_out


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


@pytest.mark.parametrize("separator", [None, 9])
def test_packing_loses_no_token(separator):
    generator = torch.Generator().manual_seed(0)
    lengths = [0, 1, 5, 17, 3, 8, 2]
    ids = [torch.randint(0, 9, (length,), generator=generator).tolist() for length in lengths]
    windows, rest = pack(ids, 4, separator)
    stream = [token for document in ids for token in ([] if separator is None else [separator]) + document]
    assert windows.shape[1] == 4
    assert len(rest) < 4
    assert windows.flatten().tolist() + rest.tolist() == stream


def test_packing_nothing_and_too_short_windows():
    windows, rest = pack([], 8)
    assert windows.shape == (0, 8)
    assert len(rest) == 0
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


def test_evaluation_windows_are_the_same_every_time_and_spread(tokenizer):
    every = evaluation_tokens(tokenizer, None, 128)
    some = evaluation_tokens(tokenizer, 5, 128)
    assert torch.equal(some, every[torch.arange(5) * len(every) // 5])


@pytest.mark.parametrize("function", [calibration_tokens, evaluation_tokens])
def test_more_windows_than_text(function, tokenizer):
    with pytest.raises(ValueError, match=r"expected 10000000 windows .* found \d+"):
        function(tokenizer, 10_000_000, 256)


def test_local_text_file_is_split_by_paragraph(tmp_path, tokenizer):
    path = tmp_path / "mine.txt"
    paragraphs = [f"This is paragraph number {i} of a file, and it says so." for i in range(60)]
    path.write_text("\n\n".join(paragraphs))
    train, test = list(documents(str(path), "train")["text"]), list(documents(str(path), "test")["text"])
    assert sorted(train + test) == sorted(paragraphs)
    assert test
    assert calibration_tokens(tokenizer, 4, 16, source=str(path)).shape == (4, 16)


def test_local_parquet_and_its_column(tmp_path):
    path = tmp_path / "mine.parquet"
    Dataset.from_dict({"body": [f"row {i}" for i in range(60)]}).to_parquet(str(path))
    rows = [*documents(str(path), "train", "body")["text"], *documents(str(path), "test", "body")["text"]]
    assert len(rows) == 60
    with pytest.raises(ValueError, match=r"expected a column 'text' .* found \['body'\]"):
        documents(str(path), "train")


def test_missing_file_and_missing_network():
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt"):
        documents("nowhere.txt")
    with pytest.raises(ConnectionError, match="'code' and 'prose' always work"):
        documents("Salesforce/wikitext:wikitext-2-raw-v1")
