"""What users hand over: decoders of unusual blocks, tokenizers with a begin-of-text token, padded windows, any file."""

import pytest
import torch
from conftest import calibration, quiet
from tiny import VOCABULARY, tiny_config
from torch import nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from greedy_helpers.discovery import discover
from greedy_helpers.stream import BlockStream
from greedy_helpers.structure import UnsupportedModule, blocks_of, depth2_modules

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
