"""What users hand over: decoders of unusual blocks, tokenizers with a begin-of-text token, padded windows, any file."""

import json

import pytest
import torch
from conftest import assert_untouched, calibration, quiet, state_of
from tiny import VOCABULARY, tiny_config, tiny_model
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import BatchEncoding, ByT5Tokenizer, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from greedy_helpers import (
    calibration_tokens,
    depth2_modules,
    evaluate_text,
    evaluation_tokens,
    generate_text,
    perplexity,
    read_text,
    scores_of,
    self_generated_tokens,
    taylor_scores,
)
from greedy_helpers.checkpoint import load_tokenizer
from greedy_helpers.data import documents, pack, prefix_ids, separator_id
from greedy_helpers.discovery import discover
from greedy_helpers.stream import BlockStream
from greedy_helpers.structure import UnsupportedModule, blocks_of

# --- blocks with arguments of their own


class Layer(LlamaDecoderLayer):
    """Reads its own embedding of the tokens, too."""

    def forward(self, hidden_states, *args, extra, **kwargs):
        return super().forward(hidden_states + extra[self.self_attn.layer_idx], *args, **kwargs)


class PerLayer(LlamaForCausalLM):
    """Every block is called with embeddings of the tokens, as Gemma 3n's are."""

    def __init__(self, config):
        super().__init__(config)
        self.model.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.more = nn.ModuleList(nn.Embedding(VOCABULARY, config.hidden_size) for _ in self.model.layers)
        self.post_init()

    def forward(self, input_ids, **kwargs):
        return super().forward(input_ids, extra=[table(input_ids) for table in self.more], **kwargs)


def per_layer(**sizes):
    torch.manual_seed(0)
    return PerLayer(tiny_config("llama", **sizes)).double().eval()


def assert_streamed(model, stream, tokens):
    """The hidden states behind every block are those of the whole model."""
    with torch.no_grad():
        whole = model(tokens, output_hidden_states=True, use_cache=False)
        for block, expected in zip(blocks_of(model), whole.hidden_states, strict=False):
            torch.testing.assert_close(torch.cat(stream.hidden), expected)
            stream.advance(block)
        logits = model.lm_head(model.model.norm(torch.cat(stream.hidden)))
    torch.testing.assert_close(logits, whole.logits)


@pytest.mark.parametrize("batch_size", [1, 4, 5, 12])
def test_every_batch_has_its_own_arguments(batch_size):
    model, tokens = per_layer(), calibration()
    stream = BlockStream(model, tokens, batch_size)
    twin = stream.share()
    assert_streamed(model, stream, tokens)
    twin.rebatch(3)
    assert_streamed(model, twin, tokens)


def test_arguments_that_are_equal_are_stored_once():
    stream = BlockStream(per_layer(), calibration(), 4)
    (first, other, _) = stream._extra.values()
    assert first[0][1]["position_embeddings"][0] is other[1][1]["position_embeddings"][0]
    assert not torch.equal(first[0][1]["extra"][0], other[0][1]["extra"][0])


def test_pruning_does_not_depend_on_the_batches_where_blocks_have_arguments_of_their_own():
    tokens = calibration()
    one, many = (quiet(per_layer(), tokens, 0.25, remedy="both", batch_size=size) for size in (12, 5))
    for a, b in zip(one.steps, many.steps, strict=True):
        assert a.keep.equal(b.keep)
        assert a.error == pytest.approx(b.error, rel=1e-6)


def test_what_discovery_finds_there_can_be_pruned():
    """Its entry leads to the same cut as the family table's."""
    model = per_layer()
    family = discover(model)
    assert [m.name for m in depth2_modules(model, family=family)] == [m.name for m in depth2_modules(model)]


@pytest.mark.parametrize("n_batches", [1, 3])
def test_arguments_that_follow_earlier_blocks_are_refused_by_name(n_batches):
    """A skip connection from block to block cannot be replayed."""
    model, tokens = per_layer(), calibration()

    def skip(_block, args, kwargs):
        return args, kwargs | {"extra": [args[0] * 0.1, args[0] * 0.1]}

    model.model.layers[1].register_forward_pre_hook(skip, with_kwargs=True)
    with pytest.raises(UnsupportedModule, match=r"PerLayer: block 1 is called with 'extra', which depends on what ear"):
        quiet(model, tokens, 0.25, batch_size=12 // n_batches)


# --- tokenizers that put something in front of a text


def beginning_with(*names):
    """The embedded models' tokenizer, made to put these tokens in front of a text."""
    tokenizer = load_tokenizer("llama-mini")
    tokenizer.add_special_tokens({"bos_token": names[0], "extra_special_tokens": list(names[1:])})
    pairs = [(name, tokenizer.convert_tokens_to_ids(name)) for name in names]
    template = TemplateProcessing(single=f"{' '.join(names)} $A", special_tokens=pairs)
    tokenizer.backend_tokenizer.post_processor = template
    return tokenizer


STARTS = pytest.mark.parametrize("names", [("<bos>",), ("[gMASK]", "<sop>")])


def model_for(tokenizer):
    return tiny_model("llama", torch.float32, vocab_size=len(tokenizer))


@STARTS
@pytest.mark.parametrize("make", [calibration_tokens, evaluation_tokens])
def test_windows_start_as_the_tokenizers_texts_do(make, names):
    tokenizer, k = beginning_with(*names), len(names)
    prefix = tokenizer("")["input_ids"]
    assert prefix_ids(tokenizer) == prefix == tokenizer.convert_tokens_to_ids(list(names))
    windows = make(tokenizer, 4, 32, source="prose")
    assert windows.shape == (4, 32)
    assert windows[:, :k].tolist() == [prefix] * 4
    assert not torch.isin(windows[:, k:], torch.tensor(prefix)).any()


def test_packing_behind_a_prefix_loses_no_token():
    windows, rest = pack([[1, 2, 3], [4, 5, 6, 7]], 4, 9, [8])
    assert windows.tolist() == [[8, 9, 1, 2], [8, 3, 9, 4], [8, 5, 6, 7]]
    assert rest.tolist() == []
    with pytest.raises(ValueError, match="at least 3 tokens, found seq=2"):
        pack([[1, 2, 3]], 2, None, [8, 9])


@STARTS
def test_scores_are_of_windows_behind_the_prefix(names):
    tokenizer = beginning_with(*names)
    model, text, prefix = model_for(tokenizer), read_text(tokenizer, "prose"), prefix_ids(tokenizer)
    score = evaluate_text(model, text, 32, windows=3)
    windows = evaluation_tokens(tokenizer, 3, 32, "prose")
    with torch.no_grad():
        log_p = model(windows).logits[:, :-1].log_softmax(-1).gather(-1, windows[:, 1:, None])[..., 0]
    assert score.loss == pytest.approx(-log_p[:, len(names) - 1 :].mean().item(), rel=1e-5)
    assert score.tokens == 3 * (32 - len(names))
    assert (score.prefix, score.to_dict()["prefix"]) == (" ".join(names),) * 2
    assert f"windows of 32, each behind {' '.join(names)}, stride {32 - len(names)};" in str(score)
    if len(names) == 1:
        assert score.perplexity == pytest.approx(perplexity(model, windows), rel=1e-6)

    few, body = type(text)(text.ids[:40], text.document[:40], text.size[:40], text.prefix), 12 - len(names)
    with torch.no_grad():  # overlapping windows, one target at a time
        total = 0.0
        stop = body + (40 - body) // 5 * 5  # the end of the last whole window
        for target in range(len(names) == 0, stop):
            begin = 0 if target < body else -(-(target + 1 - body) // 5) * 5
            context = torch.tensor([prefix + few.ids[begin:target].tolist()])
            total -= model(context).logits[0, -1].log_softmax(-1)[few.ids[target]].item()
    assert evaluate_text(model, few, 12, 5).loss == pytest.approx(total / stop, rel=1e-4)


def test_prompts_and_self_generated_windows_start_like_texts():
    tokenizer, seen = beginning_with("<bos>"), []
    model = model_for(tokenizer)
    model.get_input_embeddings().register_forward_pre_hook(lambda _module, args: seen.append(args[0][0].tolist()))
    for prompt in ("import os\n", "<bos>import os\n"):
        seen.clear()
        text = generate_text(model, tokenizer, prompt, 2)
        assert seen[0] == tokenizer("import os\n")["input_ids"]
        assert text.startswith("import os\n")
    windows = self_generated_tokens(model, tokenizer, 3, 8)
    assert windows.shape == (3, 8)
    assert windows[:, 0].tolist() == [tokenizer.bos_token_id] * 3


def test_documents_are_separated_as_in_pre_training():
    """The end-of-text token of a chat model may end a turn."""
    tokenizer = load_tokenizer("llama-mini")
    end = tokenizer.eos_token_id
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    assert separator_id(tokenizer) == end == tokenizer.convert_tokens_to_ids("<|endoftext|>")
    slow = ByT5Tokenizer()
    assert separator_id(slow) == slow.eos_token_id
    slow.add_tokens(["<|end_of_text|>"])
    assert separator_id(slow) == slow.convert_tokens_to_ids("<|end_of_text|>")


@pytest.mark.parametrize("name", ["llama-mini", "gpt2-mini"])
def test_the_embedded_models_windows_have_no_prefix(name):
    tokenizer = load_tokenizer(name)
    assert prefix_ids(tokenizer) == []
    texts = documents("prose", "test")["text"]
    ids = [token for text in texts for token in [tokenizer.eos_token_id, *tokenizer.encode(text)]]
    assert evaluation_tokens(tokenizer, None, 64, "prose").flatten().tolist() == ids[: len(ids) // 64 * 64]


def test_no_tokenizer_is_said():
    for call in (
        lambda: calibration_tokens(None),
        lambda: read_text(None),
        lambda: generate_text(tiny_model("llama"), None, "a"),
    ):
        with pytest.raises(TypeError, match="expected the model's tokenizer, found None"):
            call()


def test_slow_tokenizers_give_a_perplexity_without_bits_per_byte():
    tokenizer = ByT5Tokenizer()  # pure Python; it counts bytes, but does not say so
    assert not tokenizer.is_fast
    model = tiny_model("llama", torch.float32, vocab_size=len(tokenizer))
    score, other = (evaluate_text(model, read_text(tokenizer, "prose"), 32, windows=3) for _ in range(2))
    assert score.perplexity == pytest.approx(perplexity(model, evaluation_tokens(tokenizer, 3, 32, "prose")))
    assert score.bits_per_byte is None
    assert "bits" not in str(score)
    assert json.loads(json.dumps(score.to_dict()))["bits_per_byte"] is None
    assert score.minus(other) == (0.0, 0.0)


# --- what is handed over in the place of packed windows

CALLS = {
    "prune": lambda model, tokens: quiet(model, tokens, 0.25),
    "scores_of": scores_of,
    "taylor_scores": lambda model, tokens: taylor_scores(model, tokens, "element1"),
    "perplexity": perplexity,
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(
    ("container", "way_out"),
    [
        (lambda t: BatchEncoding({"input_ids": t}), "its \\['input_ids'\\] as a tensor"),
        (lambda t: {"input_ids": t}, "its \\['input_ids'\\] as a tensor"),
        (lambda t: t.tolist(), "torch.tensor\\(...\\) of it"),
        (lambda t: list(t), "torch.stack\\(...\\) of it"),
        (lambda t: t.numpy(), "torch.tensor\\(...\\) of it"),
        (lambda t: None, "torch.tensor\\(...\\) of it"),
    ],
    ids=["BatchEncoding", "dict", "lists", "list of tensors", "numpy", "None"],
)
def test_other_containers_of_tokens(call, container, way_out, tokens):
    model = tiny_model("llama")
    before, given = state_of(model), container(tokens)
    with pytest.raises(TypeError, match=rf"as a long tensor \[n, seq\], found {type(given).__name__}; pass {way_out}"):
        call(model, given)
    assert_untouched(model, before)


def test_a_text_is_asked_for():
    with pytest.raises(TypeError, match="expected a Text, as read_text returns it, found Tensor"):
        evaluate_text(tiny_model("llama"), calibration(2))


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_windows_are_refused_with_the_share(call, side, tokens):
    model, pad = tiny_model("llama"), 95
    model.config.pad_token_id = pad
    tokens = tokens.clamp(max=pad - 1)  # [6, 24]
    padded = tokens.clone()
    padded[:3, slice(0, 4) if side == "left" else slice(20, 24)] = pad
    with pytest.raises(ValueError, match=r"packed windows without padding, found 8\.3% pad tokens \(id 95\)"):
        call(model, padded)
    few = tokens.clone()
    few[:3, -2:] = pad  # 4.2%
    few[:, [5, 9, 14]] = pad  # single ones separate documents
    call(model, few)


def test_pads_that_also_end_texts_are_text(tokens):
    model = tiny_model("llama")
    for ends in ({"pad_token_id": 0}, {"pad_token_id": 7, "eos_token_id": [3, 7]}, {"pad_token_id": None}):
        vars(model.config).update(ends)
        tokens[:, -6:] = ends["pad_token_id"] or 0
        quiet(model, tokens, 0.0)


# --- files

TEXTS = [f"Größe {i}: 你好, 😀 naïve — dérivée, und noch etwas mehr." for i in range(40)]


def both_sides(path, column="text", tokenizer=None):
    return sorted(t for split in ("train", "test") for t in documents(str(path), split, column, tokenizer)["text"])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("suffix", ["txt", "TXT", "md", "csv", "jsonl", "json"])
def test_a_byte_order_mark_says_the_encoding(encoding, suffix, tmp_path):
    path = tmp_path / f"mine.{suffix}"
    mark = "\ufeff" if encoding.endswith("-be") else ""
    if suffix == "csv":
        text = "\n".join(["text", *(f'"{t}"' for t in TEXTS)])
    elif "json" in suffix:
        text = "\n".join(json.dumps({"text": t}, ensure_ascii=False) for t in TEXTS)
    else:
        text = "\r\n\r\n".join(TEXTS)
    path.write_bytes((mark + text).encode(encoding))
    assert both_sides(path) == sorted(TEXTS)


@pytest.mark.parametrize("name", ["mine[1].txt", "m?ne.txt", "*.txt", "a::b.txt", "mine[1].parquet"])
def test_names_that_look_like_patterns_are_names(name, tmp_path):
    from datasets import Dataset

    (tmp_path / "mine.txt").write_text("Another file.\n\n" * 30)
    if name.endswith("parquet"):
        Dataset.from_dict({"text": TEXTS}).to_parquet(tmp_path / name)
    else:
        (tmp_path / name).write_text("\n\n".join(TEXTS), "utf-8")
    assert both_sides(tmp_path / name) == sorted(TEXTS)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("latin.txt", "Größe und Maß".encode("latin-1"), "is not utf-8 .* save it as UTF-8"),
        ("wide.txt", "plain text\n\n".encode("utf-16-le") * 9, "found zero bytes; save it as UTF-8"),
        ("cut.txt", "Größe".encode("utf-16")[:-1], "is not utf-16 .* save it as UTF-8"),
        ("broken.jsonl", b'{"text": "one"}\n{"text": \n', "cannot be read as json: "),
        ("broken.parquet", b"PAR1 and no more", "cannot be read as parquet: "),
        ("empty.txt", b"", "paragraphs or rows|cannot be read as text"),
        ("one.txt", b"A single paragraph.", r"has 1 paragraphs \(with blank lines between .* 'test'"),
        ("mixed.jsonl", b'{"text": "one"}\n{"text": 5}', "expected rows of one kind in .*, found '5' among them"),
        ("list.json", b"[1, 2]", "expected text, or chat messages .* found '1'"),
        ("numbers.csv", b"text,other\n1,a\n2,b\n", "expected text, or chat messages .* found '1'"),
        ("other.csv", b"body,title\na,b\n", r"column 'text' in .* found \['body', 'title'\]; name one with column="),
        ("text.docx", b"PK", r"expected a file that ends in \.txt, \.md, .* found .*text\.docx"),
    ],
)
def test_files_that_cannot_be_read_are_refused_by_name(name, content, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as refused:
        both_sides(path)
    assert name in str(refused.value)


TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
CHATS = [[{"role": "user", "content": f"Why {i}?"}, {"role": "assistant", "content": "So."}] for i in range(40)]


@pytest.mark.parametrize("column", ["messages", "dialogue"])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_chat_messages_go_through_the_chat_template(column, suffix, tmp_path):
    from datasets import Dataset

    path = tmp_path / f"chats.{suffix}"
    data = Dataset.from_dict({column: CHATS, "score": list(range(40))})
    data.to_json(path) if suffix == "jsonl" else data.to_parquet(path)
    tokenizer = load_tokenizer("llama-mini")
    asked = "text" if column == "messages" else column  # a table without text is read from its messages
    with pytest.raises(
        ValueError, match="need a tokenizer's chat template, found no tokenizer; name a column of plain"
    ):
        documents(str(path), "train", asked)
    with pytest.raises(ValueError, match="found a tokenizer without one; name a column of plain text with column="):
        calibration_tokens(tokenizer, 2, 16, str(path), column=asked)
    tokenizer.chat_template = TEMPLATE
    assert both_sides(path, asked, tokenizer) == sorted(f"[user] Why {i}?\n[assistant] So.\n" for i in range(40))
    assert "[assistant] So.\n" in tokenizer.decode(calibration_tokens(tokenizer, 2, 32, str(path), column=asked)[0])
    assert read_text(tokenizer, str(path), column=asked).document.max() >= 0
    tokenizer.chat_template = "{{ raise_exception('only one turn') }}"
    with pytest.raises(ValueError, match=r"the chat template refuses a conversation of .* only one turn"):
        both_sides(path, asked, tokenizer)
