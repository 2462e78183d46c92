"""Finding the depth-2 modules of a model that the family table does not know, by asking gradients.

The graph is cut behind every linear layer, so the input of each linear depends on the linears directly before it and
on nothing further back. One backward pass per linear then says exactly which of its input channels depend on which of
their output channels. Where this *coupling* falls apart into pieces, the pieces are units: FFN channels, heads, KV
groups. Where it does not, the linear reads the residual stream (or a norm ties all heads together).

All this happens on a tiny twin: the same class and config with small widths and two blocks. What comes out is a layout
in words, so the cost does not depend on the size of the model.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

import networkx as nx
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .families import REFUSED, Family, ModuleLayout
from .layouts import channel_index, product
from .stream import cut_graph
from .structure import UnsupportedModule, depth2_modules, eval_mode, linears_of, weight_of
from .surgery import remove_units, zero_units

# Sizes of the twin: no two axes, nor their products, are equal, so a number says which axis it is.
_KV, _GROUP, _DIM, _FFN, _BLOCKS, _VOCABULARY = 4, 3, 8, 40, 2, 64
_HEAD_INPUTS = ("alibi", "attention_mask")


class _StaysWhole(Exception):
    """Why the units of a module cannot go one by one."""


@dataclass(frozen=True)
class Units:
    """How the input channels of one linear fall apart, with everything that hangs on each piece.

    Attributes:
        inputs: long [n_units, width], input channels of the linear.
        outputs: upstream linear -> long [n_units, width], the output channels that feed each unit.
        shared: upstream linear -> long [k], output channels that feed all units (empty tensors left out).
    """

    inputs: Tensor
    outputs: dict[str, Tensor]
    shared: dict[str, Tensor]


def coupling(model: PreTrainedModel, tokens: Tensor | None = None) -> dict[str, dict[str, Tensor]]:
    """Which input channels of each linear depend on which output channels of the linears directly before it.

    `coupling(model)[reader][writer]` is bool [d_in of the reader, d_out of the writer]; writers that a reader does not
    depend on are left out. Exact, not estimated: a batch of identical samples asks about one channel per sample, so
    one backward pass per linear answers for all its channels. Memory grows with the widest linear times the depth:
    use :func:`tiny_twin` for large models.

    Args:
        tokens: long [seq]; default: 16 random ids. At least 4, as over one key the softmax is constant and queries
            and keys would seem unconnected.
    """
    vocabulary = model.get_input_embeddings().num_embeddings
    if tokens is None:
        tokens = torch.randint(vocabulary, (16,), generator=torch.Generator().manual_seed(0))
    if tokens.ndim != 1 or len(tokens) < 4:
        raise ValueError(f"coupling: expected a sequence of at least 4 token ids, found shape {list(tokens.shape)}")
    linears = linears_of(model)
    batch = max(weight_of(linear).shape[1] for linear in linears.values())
    with eval_mode(model), cut_graph(linears) as (inputs, outputs), torch.enable_grad():
        _run(model, tokens.to(model.device).expand(batch, -1))
    coupled: dict[str, dict[str, Tensor]] = {}
    for reader, x in inputs.items():
        if not x.requires_grad:
            continue
        x = x.reshape(batch, -1, x.shape[-1])  # some models flatten batch and sequence
        d_in = x.shape[-1]
        # Sample b asks about channel b; random weights over the positions, as plain sums may cancel.
        weights = torch.rand(x.shape[1], generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(x)
        asked = (x[:d_in].diagonal(dim1=0, dim2=2) * weights[:, None]).sum()  # diagonal: [positions, d_in]
        gradients = torch.autograd.grad(asked, list(outputs.values()), retain_graph=True, allow_unused=True)
        rows = {
            writer: g.reshape(batch, -1, g.shape[-1])[:d_in].abs().amax(1) > 0
            for writer, g in zip(outputs, gradients, strict=True)
            if g is not None
        }
        if connected := {writer: row for writer, row in rows.items() if row.any()}:
            coupled[reader] = connected  # a reader of the embeddings alone has none
    return coupled


def _run(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """What the model returns first, without a KV cache."""
    no_cache = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    return model(input_ids=tokens, **no_cache)[0]


def find_units(coupled: Mapping[str, Tensor]) -> Units | None:
    """The pieces into which one reader's coupling (writer -> bool [d_in, d_out]) falls, or None if it is one piece.

    Output channels that reach every input belong to no piece. If what is left still hangs together, so do channels that
    reach a comb of inputs: the value that all query heads share feeds one channel of each head. Pieces are numbered by
    their first input channel.
    """
    everywhere = {writer: rows.all(0) for writer, rows in coupled.items()}
    comb = {writer: rows.all(0) | _has_gaps(rows) for writer, rows in coupled.items()}
    return _pieces(coupled, everywhere) or _pieces(coupled, comb)


def _has_gaps(rows: Tensor) -> Tensor:
    """For every column of bool [d_in, d_out] whether its True entries are more than one stretch."""
    return rows[0].int() + (rows[1:] & ~rows[:-1]).sum(0) > 1


def _pieces(coupled: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> Units | None:
    """Connected components without the `shared` columns (writer -> bool [d_out]); None if there is only one."""
    d_in = next(iter(coupled.values())).shape[0]
    graph = nx.Graph()
    graph.add_nodes_from(("in", channel) for channel in range(d_in))
    for writer, rows in coupled.items():
        graph.add_edges_from((("in", i), (writer, j)) for i, j in (rows & ~shared[writer]).nonzero().tolist())
    pieces = [piece for piece in nx.connected_components(graph) if any(kind == "in" for kind, _ in piece)]
    if len(pieces) < 2 or not graph.number_of_edges():
        return None
    pieces.sort(key=lambda piece: min(channel for kind, channel in piece if kind == "in"))
    tables = {}
    for kind in ("in", *coupled):
        channels = [sorted(channel for k, channel in piece if k == kind) for piece in pieces]
        if len({len(row) for row in channels}) != 1:
            return None
        tables[kind] = torch.tensor(channels, dtype=torch.long)
    outputs = {writer: tables[writer] for writer in coupled if tables[writer].numel()}
    return Units(tables["in"], outputs, {w: s.nonzero().flatten() for w, s in shared.items() if s.any()})


def tiny_twin(model: PreTrainedModel, grouped: bool = True, kv_heads: int = _KV) -> PreTrainedModel:
    """A model of the same class and config with small widths, two blocks and random float64 weights.

    Args:
        grouped: 3 query heads per KV head where the config can say so; else as many KV heads as heads.
        kv_heads: number of KV heads (of heads, where they are not grouped).

    Raises:
        ValueError: the config does not shrink this way; then build a small model of the class and hand it over.
    """
    torch.manual_seed(0)
    try:
        config = _small_config(model.config, grouped, kv_heads)
        twin = getattr(model, "_dense_class", type(model))(config).double().eval()
        with torch.no_grad():
            for name, parameter in twin.named_parameters():
                # Large and random, norms and biases too: a wrong channel has to show.
                if parameter.ndim == 1 and "bias" not in name:
                    parameter.uniform_(0.7, 1.3)
                else:
                    parameter.normal_(0, 0.2)
            _run(twin, torch.zeros(1, 8, dtype=torch.long))
    except Exception as error:
        raise ValueError(
            f"tiny_twin: {type(model.config).__name__} does not shrink to {kv_heads} heads or KV groups of {_DIM} "
            f"channels ({type(error).__name__}: {error}); build a small model of the same class and pass it as `twin`"
        ) from error
    return twin


def _small_config(config: PreTrainedConfig, grouped: bool, kv_heads: int) -> PreTrainedConfig:
    small = copy.deepcopy(config)
    kv_names = [name for name in ("num_key_value_heads", "num_kv_heads") if getattr(config, name, None) is not None]
    group = _GROUP if grouped and kv_names else 1
    heads = kv_heads * group
    values = {
        "num_hidden_layers": _BLOCKS, "hidden_size": heads * _DIM, "num_attention_heads": heads, "head_dim": _DIM,
        "vocab_size": _VOCABULARY, "max_position_embeddings": 64, "word_embed_proj_dim": heads * _DIM, "rotary_dim": 4,
        "intermediate_size": _FFN, "ffn_dim": _FFN, "n_inner": _FFN, "ffn_hidden_size": _FFN,
        "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "qk_nope_head_dim": _DIM,
    } | dict.fromkeys(kv_names, kv_heads)  # fmt: skip
    for name, value in values.items():
        if getattr(config, name, None) is not None:
            with suppress(AttributeError):  # derived from the others (a property)
                setattr(small, name, value)
    for name, value in vars(config).items():  # one entry per block
        if isinstance(value, list) and len(value) == config.num_hidden_layers and not name.startswith("_"):
            setattr(small, name, value[:_BLOCKS])
    if (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default") != "default":
        # scaled variants carry one factor per rotary dimension of the large model
        theta = config.rope_parameters.get("rope_theta", 10_000.0)
        small.rope_parameters = {"rope_type": "default", "rope_theta": theta}
    small._attn_implementation = "eager"
    return small


def discover(model: PreTrainedModel, twin: PreTrainedModel | None = None) -> Family:
    """The family table's entry for a model, found by probing a tiny twin and proven on it.

    Finds the pairs of levels, the unit of each, fused and interleaved layouts, and, by trying, the attributes that go
    stale when units go. An entry is returned only if removing units equals zeroing them (float64, 1e-10, eager and
    sdpa), on a second twin with twice the heads as well, and if the model's own weights factor into its layouts. (One
    size proves too little: CodeGen stores its channels in four partitions, which with four heads look like heads.) To
    use it::

        greedy_helpers.FAMILIES[model.config.model_type] = greedy_helpers.discover(model)

    Modules whose cut cannot be made exact are listed in `whole`, with the reason.

    Args:
        twin: a small model of the same class, for configs that :func:`tiny_twin` cannot shrink. Its layouts are then
            proven on its size only; test them on another.

    Raises:
        UnsupportedModule: a refused family, experts, or nothing that could be cut.
        ValueError: no twin, or channels in an order that no layout describes.
    """
    model_type = getattr(model.config, "model_type", type(model).__name__)
    if model_type in REFUSED:
        raise UnsupportedModule(f"discover: model type {model_type!r} is not supported: {REFUSED[model_type]}")
    if stacked := [name for name, parameter in model.named_parameters() if parameter.ndim == 3]:
        convolution, stack = "a convolution over time (linear attention?)", "a stack of matrices (experts?)"
        what = convolution if "conv" in stacked[0] else stack
        raise UnsupportedModule(f"discover: {stacked[0]} is {what}, no linear layer to cut")
    twin, *others = _twins(model) if twin is None else [twin]
    family = _read_structure(twin)
    modules, whole = [], dict(family.whole)
    for layout in family.modules:
        try:
            proven = _prove(twin, family, layout)
            for other in others:
                if reason := _why_not_exact(other, replace(family, modules=(proven,))):
                    raise _StaysWhole(f"what fits {_KV} heads does not fit {2 * _KV}: {reason}")
            modules.append(proven)
        except _StaysWhole as reason:
            whole[layout.owner] = str(reason)
    if not modules:
        raise UnsupportedModule(f"discover: nothing in {type(model).__name__} can be cut exactly: {whole}")
    family = replace(family, modules=tuple(modules), whole=whole)
    depth2_modules(model, family=family)  # the full-size weights factor into the layouts found on the twin
    return family


def _twins(model: PreTrainedModel) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Two twins, one with twice the heads of the other: grouped if the config allows it."""
    with suppress(ValueError):
        return tiny_twin(model), tiny_twin(model, kv_heads=2 * _KV)
    return tiny_twin(model, grouped=False), tiny_twin(model, grouped=False, kv_heads=2 * _KV)


def _read_structure(twin: PreTrainedModel) -> Family:
    """Layouts of the twin's last block, not proven yet."""
    blocks, modules, whole = "", [], {}
    last = f".{_BLOCKS - 1}."
    for reader, coupled in coupling(twin).items():
        place, _, below = reader.partition(last)
        # Level 2 depends on linears of its own block only; a reader of the residual stream on earlier blocks, too.
        if not below or not all(writer.startswith(place + last) for writer in coupled):
            continue
        try:
            modules.append(_layout_of(twin, place + last, reader, coupled))
            blocks = place
        except _StaysWhole as reason:
            whole[below] = str(reason)
    if not modules:
        raise UnsupportedModule(
            f"discover: no linear of {type(twin).__name__} has inputs that fall apart into units ({whole})"
        )
    prefix = f"{twin.base_model_prefix}." if hasattr(twin, twin.base_model_prefix) else ""
    return Family(blocks.removeprefix(prefix), tuple(modules), whole)


def _layout_of(twin: PreTrainedModel, block: str, reader: str, coupled: Mapping[str, Tensor]) -> ModuleLayout:
    """The units of one level-2 linear in words; `block` is the path of its block with a final dot."""
    units = find_units(coupled)
    everywhere = list(coupled) if units is None else [name for name in units.shared if name not in units.outputs]
    if everywhere:
        names, below = ", ".join(name.rpartition(".")[2] for name in everywhere), reader.removeprefix(block)
        raise _StaysWhole(f"every channel of {names} reaches all inputs of {below}: no unit can go alone")
    tables = {reader: units.inputs} | units.outputs
    steps = zip(*(name.split(".")[:-1] for name in tables), strict=False)
    path = ".".join(step[0] for step in itertools.takewhile(lambda step: len(set(step)) == 1, steps))
    module, owner = twin.get_submodule(path), f"{path}.".removeprefix(block).rstrip(".")
    if units.inputs.shape[1] == 1:
        kind = "gated_ffn" if sum(table.shape[1] for table in units.outputs.values()) > 1 else "ffn"
        axis, dim, group = "unit", 1, 1
    else:
        kind, axis = "attention", "head" if units.shared else "kv"
        dim = math.gcd(*(length for table in tables.values() for _, length in _runs(table[0])))
        group = units.inputs.shape[1] // dim
    layouts = {}
    for name, table in tables.items():
        n_channels = weight_of(twin.get_submodule(name)).shape[1 if name == reader else 0]
        text = layouts[name.removeprefix(f"{path}.")] = _layout_text(table, n_channels, axis, dim, group)
        if not torch.equal(channel_index(text, n_channels, dim=dim, group=group).sort(1).values, table):
            raise _StaysWhole(f"no layout describes the order of the channels of {name}")
    sizes: dict[str, str | None] = {}
    if kind == "attention":
        numbers = _numbers(module)
        sizes["dim"] = _pick([name for name, value in numbers.items() if value == dim], "head_dim", "head")
        if any("group" in text for text in layouts.values()):
            exact = [name for name, value in numbers.items() if value == group]
            pairs = itertools.product(numbers, repeat=2)
            quotients = [f"{a} // {b}" for a, b in pairs if (numbers[a], numbers[b]) == (_KV * group, _KV)]
            sizes["group"] = _pick(exact, "num_key_value_groups", "group") or _pick(quotients, "", "head")
        if None in sizes.values():
            raise _StaysWhole(f"no attribute of {owner} says how large its heads or groups are")
    (level2, text), *level1 = layouts.items()
    return ModuleLayout(kind, owner, dict(level1), {level2: text}, **({"sizes": sizes} if sizes else {}))


def _layout_text(table: Tensor, n_channels: int, axis: str, dim: int, group: int) -> str:
    n_units, stretches, position = len(table), [], 0
    if axis == "unit":
        return " | ".join(["unit"] * table.shape[1])
    words = {1: "dim", group: "group dim", group + 2: "group+2 dim"} if group > 1 else {1: "dim"}
    for start, length in _runs(table[0]):
        stretches += ["dim"] * ((start - position) // dim)  # nobody's
        stretches.append(f"{axis} {words.get(length // dim, f'{length // dim} dim')}")
        position = start + n_units * length
    return " | ".join(stretches + ["dim"] * ((n_channels - position) // dim))


def _runs(channels: Tensor) -> list[tuple[int, int]]:
    """(start, length) of every stretch of consecutive numbers."""
    values = channels.tolist()
    starts = [i for i, value in enumerate(values) if i == 0 or value != values[i - 1] + 1]
    return [(values[i], j - i) for i, j in zip(starts, [*starts[1:], len(values)], strict=True)]


def _numbers(module: nn.Module) -> dict[str, int]:
    """The integer attributes of a module and of what is below it, linears aside: path -> value."""
    return {
        f"{path}.{name}".lstrip("."): value
        for path, part in module.named_modules()
        if not isinstance(part, nn.Linear | Conv1D)
        for name, value in vars(part).items()
        if type(value) is int and not name.startswith("_")
    }


def _pick(candidates: list[str], best: str, hint: str) -> str | None:
    """The candidate with that last name, else one that holds the hint, else any."""
    return min(candidates, key=lambda c: (c.rpartition(".")[2] != best, hint not in c, len(c), c), default=None)


def _prove(twin: PreTrainedModel, family: Family, layout: ModuleLayout) -> ModuleLayout:
    """The layout with the fewest stale attributes repaired that makes the cut exact."""
    (module,) = depth2_modules(twin, [_BLOCKS - 1], unit="kv", family=replace(family, modules=(layout,)))
    axis = next(iter(layout.level2.values())).split()[0]
    sizes = {"group": 1} | module.sizes | {axis: module.n_units}
    is_attention = layout.kind == "attention"
    products = [axis, f"{axis} group", f"{axis} dim", f"{axis} group dim"] if is_attention else [axis]
    # the shortest product with a value names it, as "kv" and "kv group" are the same where there are no groups
    meaning = {product(axes, sizes): axes for axes in reversed(products)}
    numbers = _numbers(module.owner)
    if hasattr(module.owner, "config"):
        own = vars(module.owner.config)
        numbers |= {f"config.{k}": v for k, v in own.items() if type(v) is int and "head" in k}
    lists = {
        path: meaning[len(part)]
        for path, part in module.owner.named_modules()
        if isinstance(part, nn.ModuleList) and len(part) in meaning
    }
    stale = sorted((path for path, value in numbers.items() if value in meaning), key=lambda p: p.startswith("config."))
    choices = [chosen for n_stale in range(4) for chosen in itertools.combinations(stale, n_stale)]
    reasons = []
    for head_inputs, chosen in itertools.product([(), _HEAD_INPUTS] if is_attention else [()], choices):
        attributes = {path: meaning[numbers[path]] for path in chosen}
        candidate = replace(layout, attributes=attributes, lists=lists, head_inputs=head_inputs)
        reason = _why_not_exact(twin, replace(family, modules=(candidate,)))
        if reason is None:
            return candidate
        reasons.append(reason)
    raise _StaysWhole(f"removing units does not equal zeroing them: {reasons[0]}")


@torch.no_grad()
def _why_not_exact(twin: PreTrainedModel, family: Family) -> str | None:
    """None if removing units of the last block equals zeroing them, with every attention implementation there is.

    Of attention with grouped queries: KV heads, and query heads.
    """
    tokens = torch.randint(_VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(2))
    grouped = any(module.group > 1 for module in depth2_modules(twin, [_BLOCKS - 1], unit="kv", family=family))
    for unit, attention in itertools.product(["kv", "query"] if grouped else ["kv"], ["eager", "sdpa"]):
        removed, zeroed = copy.deepcopy(twin), copy.deepcopy(twin)
        try:
            for model in (removed, zeroed):
                model.set_attn_implementation(attention)
        except ValueError:
            continue  # the class refuses this implementation
        try:
            for model, change, gone in ((removed, remove_units, False), (zeroed, zero_units, True)):
                (module,) = depth2_modules(model, [_BLOCKS - 1], unit=unit, family=family)
                units, in_set = torch.arange(module.n_units), module.n_units // module.n_sets
                turned = (units + units // in_set) % in_set  # not the same query heads of every KV head
                change(module, ((turned % 3 == 1) == gone).nonzero().flatten())
            error = (_run(removed, tokens) - _run(zeroed, tokens)).abs().max().item()
        except Exception as error:  # a wrong guess fails in as many ways as there are models
            first_line = str(error).partition("\n")[0]
            return f"{type(error).__name__} with {attention}: {first_line[:120]}"
        if not error <= 1e-10:
            return f"the outputs differ by {error:.1g} with {attention}"
    return None
