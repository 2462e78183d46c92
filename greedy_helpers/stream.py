"""Running a model block by block and reading what its linears see. Its hooks never outlive their `with`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate, zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from transformers import PreTrainedModel

from .large.distributed import share_of
from .large.lazy import check_weights, resident
from .structure import UnsupportedModule, blocks_of, blocks_path, eval_mode, input_device


class _Reached(Exception):
    """Everything asked for has been seen; the rest of the forward pass is not needed."""


def walk(
    model: PreTrainedModel,
    tokens: Tensor,
    last: int,
    *,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    store: torch.device | str | None = None,
) -> Iterator[tuple[nn.Module, BlockStream]]:
    """Take the tokens through the blocks 0 to `last`: (block, stream in front of it), one after the other.

    The model is in eval mode, and the block has all its weights on the device, until the next one is asked for. The
    stream then moves behind the block, unless whoever got it has done that, and never behind the last. Use it inside
    `contextlib.closing`, so that everything is put back at once if something fails.

    With several processes each takes its share of the windows through the blocks.

    Raises:
        FloatingPointError: NaN or Inf in a block's weights, naming the weight.
    """
    with eval_mode(model):
        stream = BlockStream(model, share_of(tokens), batch_size, device=device, store=store)
        for index in range(last + 1):
            with resident(model, index, stream.device) as block:
                check_weights(block, f"{blocks_path(model)}.{index}.")
                yield block, stream
                if stream.position == index < last:
                    stream.advance(block)


def windows_per_batch(batch_size: int | None, seq: int) -> int:
    """`batch_size`, or as many windows of `seq` tokens as make up 4,096 tokens."""
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"expected a batch_size of at least 1 window, found {batch_size}")
    return max(1, 4096 // seq) if batch_size is None else batch_size


Watched = tuple[list[Tensor], list[Tensor]]  # inputs and outputs of linears, [batch * seq, channels] each
Call = tuple[tuple, dict[str, Any]]  # args and kwargs of a module


class BlockStream:
    """Hidden states in front of one block, carried from block to block.

    Pruning goes through the blocks once. Instead of running the whole model for every module (O(depth^2) block
    passes) the hidden states [batch, seq, d] of all calibration tokens are kept and moved on with
    :meth:`advance`, so each block runs a constant number of times. What transformers passes to a block besides the
    hidden states (masks, rotary embeddings, embeddings per layer) is recorded per block and batch and replayed: no
    family needs code here. Tensors that are the same in every batch are stored once, on the device; those of one batch
    wait where the hidden states do.

    The model itself is only asked for its embeddings and those arguments; no block runs for that, so the blocks may be
    on the disk (see :mod:`greedy_helpers.large`).

    Attributes:
        position: the number of the block that the hidden states are in front of.
        hidden: the hidden states, [batch, seq, d] each.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokens: Tensor,
        batch_size: int | None = None,
        *,
        device: torch.device | str | None = None,
        store: torch.device | str | None = None,
    ) -> None:
        """
        Args:
            tokens: long [n, seq].
            batch_size: windows per pass. Memory grows with batch_size * seq; default: 4,096 tokens.
            device: where the blocks will run; default: where the model's embeddings are.
            store: where the hidden states wait between passes; default: `device`. With `"cpu"` beside a GPU only one
                batch at a time is on the GPU.

        Raises:
            UnsupportedModule: a block is called with something else that depends on what earlier blocks compute, or
                with hidden states of another shape than [batch, seq, d].
        """
        self._model, self._tokens = model, tokens
        self._extra: dict[range, list[Call]] = {}  # windows of a batch -> what each block is called with
        home = input_device(model)
        self.device = home if device is None else torch.device(device)
        self.store = self.device if store is None else torch.device(store)
        self.implementation = model.config._attn_implementation
        self._finished: dict[nn.Module, dict[int, Any]] = {}  # module -> batch -> what it returns
        n, size = len(tokens), windows_per_batch(batch_size, tokens.shape[1])
        _check_independent(model, tokens[:size])
        self.move([self.keep(self._enter(range(i, min(i + size, n)))) for i in range(0, n, size)], 0)

    def share(self) -> BlockStream:
        """A second stream over the same hidden states; advancing one leaves the other where it is."""
        twin = object.__new__(BlockStream)
        vars(twin).update(vars(self))
        twin.move(self.hidden, self.position)
        return twin

    def rebatch(self, batch_size: int) -> None:
        """From now on batches of at most `batch_size` windows: views of the hidden states that are there."""
        self.move([part for hidden in self.hidden for part in hidden.split(batch_size)], self.position)
        for windows in self._windows:
            if windows not in self._extra:
                self._enter(windows)

    def keep(self, value: Tensor) -> Tensor:
        """`value` where hidden states wait; page-locked if that is the CPU beside a GPU, so that it returns fast."""
        if value.device.type == "cuda" and self.store.type == "cpu":
            return torch.empty(value.shape, dtype=value.dtype, pin_memory=True).copy_(value)
        return value.to(self.store)

    def _enter(self, windows: range) -> Tensor:
        """The hidden states in front of the first block; what the blocks are called with is recorded on the way."""
        batch = self._tokens[windows.start : windows.stop].to(input_device(self._model))
        calls = _block_arguments(self._model, blocks_of(self._model), batch)
        known = next((old for other, old in self._extra.items() if len(other) == len(windows)), [None] * len(calls))
        moved: dict[int, Tensor] = {}  # the blocks share masks and rotary embeddings: one copy on the device
        self._extra[windows] = [
            _to((args[1:], kwargs), self.device, moved, old, self.keep)
            for (args, kwargs), old in zip(calls, known, strict=True)
        ]
        return calls[0][0][0]

    def run(
        self, block: nn.Module, inputs: Sequence[nn.Module] = (), outputs: Sequence[nn.Module] = ()
    ) -> Iterator[tuple[Tensor, Watched]]:
        """Run `block` in the place of the stream's block: its output [batch, seq, d], one batch at a time.

        With each output: what the linears in `inputs` read and what those in `outputs` put out.
        """
        for place in range(len(self.hidden)):
            with _watching(inputs, outputs) as watched:
                output = self._call(block, place)
            yield output, watched()

    def watch(
        self, block: nn.Module, inputs: Sequence[nn.Module], outputs: Sequence[nn.Module] = ()
    ) -> Iterator[Watched]:
        """What linears inside `block` read and put out, batch by batch; nothing behind the last of them is computed."""
        for place in range(len(self.hidden)):
            with _watching(inputs, outputs, stop=True) as watched, suppress(_Reached):
                self._call(block, place)
            yield watched()

    def finish(self, owner: nn.Module) -> None:
        """`owner`, a module inside the block at hand, will not change any more.

        So it runs once more, and its outputs [batch, seq, d] are kept until the stream has moved behind the block.
        """
        self._finished.setdefault(owner, {})

    def inputs(self, block: nn.Module, linears: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
        """What `linears` (inside `block`) read: [batch * seq, d_in] each, batch by batch. It stops behind them."""
        return (inputs for inputs, _ in self.watch(block, linears))

    def attention_maps(self, block: nn.Module, attention: nn.Module) -> Iterator[Tensor]:
        """The softmax maps of `attention` (inside `block`): [batch, heads, query, key], batch by batch.

        One batch of maps exists at a time.

        Raises:
            ValueError: the attention implementation computes no maps (sdpa, flash); eager does.
        """
        for place in range(len(self.hidden)):
            returned: list[Any] = []
            handle = attention.register_forward_hook(lambda _module, _args, output, r=returned: r.append(output))
            try:
                self._call(block, place)
            finally:
                handle.remove()
            maps = returned[0][1] if returned and isinstance(returned[0], tuple) and len(returned[0]) > 1 else None
            if not isinstance(maps, Tensor) or maps.ndim != 4:
                raise ValueError(
                    f"block {self.position}: expected attention maps, found none: the model runs with attention "
                    f"{self.implementation!r}. Call model.set_attn_implementation('eager') first"
                )
            yield maps
            del maps, returned  # before the next pass makes new ones

    def advance(self, block: nn.Module) -> None:
        """Move the hidden states behind the block."""
        self.move([self.keep(output) for output, _ in self.run(block)], self.position + 1)

    def move(self, hidden: list[Tensor], position: int) -> None:
        """The hidden states are now `hidden`, in front of block `position`."""
        self.hidden, self.position, self._finished = hidden, position, {}
        ends = list(accumulate(map(len, hidden)))
        self._windows = [range(end - len(batch), end) for batch, end in zip(hidden, ends, strict=True)]

    @torch.no_grad()
    def _call(self, block: nn.Module, place: int) -> Tensor:
        with ExitStack() as stack:
            for owner, outputs in self._finished.items():
                stack.enter_context(_running_once(owner, outputs, place, self.keep, self.device))
            return self.through(block, place, self.hidden[place].to(self.device, non_blocking=True), self.position)

    def through(self, block: nn.Module, place: int, hidden: Tensor, index: int) -> Tensor:
        """What block `index` makes of `hidden` [batch, seq, d] in the place of batch `place`; with a graph if asked."""
        args, kwargs = _to(self._extra[self._windows[place]][index], self.device)
        output = block(hidden, *args, **kwargs)
        self._returns_tuple = isinstance(output, tuple)
        return output[0] if self._returns_tuple else output

    def head(self, place: int, hidden: Tensor) -> Tensor:
        """Logits [batch, seq, vocabulary] that the model makes of `hidden` behind its last block, where its head is.

        Some block has to have run before: what it returned tells in which form the model expects the hidden states.
        """
        windows, home = self._windows[place], input_device(self._model)
        there = hidden.to(home)
        given = (there,) if self._returns_tuple else there
        with forward_replaced(blocks_of(self._model), lambda *_args, **_kwargs: given):
            tokens = self._tokens[windows.start : windows.stop].to(home)
            return self._model(input_ids=tokens, use_cache=False).logits


@dataclass
class Streams:
    """The calibration tokens in front of the same block, in the dense model and in the pruned one."""

    dense: BlockStream
    pruned: BlockStream

    @property
    def are_one(self) -> bool:
        """Nothing has been cut yet."""
        return all(a is b for a, b in zip(self.dense.hidden, self.pruned.hidden, strict=True))


def _to(
    value: Any,
    device: torch.device,
    moved: dict[int, Tensor] | None = None,
    known: Any = None,
    keep: Callable[[Tensor], Tensor] | None = None,
) -> Any:
    """`value` with its tensors on `device`, or those of `known` in their places where they are equal.

    Tensors that differ from those of `known` go where `keep` puts them. `moved` maps ids of tensors to what became of
    them.
    """
    moved = {} if moved is None else moved
    leaves, structure = tree_flatten(value)
    for leaf, old in zip_longest(leaves, tree_leaves(known)):
        if isinstance(leaf, Tensor) and id(leaf) not in moved:
            there = leaf.to(device, non_blocking=True)
            different = isinstance(old, Tensor) and not _same(there, old)
            moved[id(leaf)] = keep(there) if different else there if old is None else old
    return tree_unflatten([moved.get(id(leaf), leaf) for leaf in leaves], structure)


def _same(one: Any, other: Any) -> bool:
    pairs = zip(tree_leaves(one), tree_leaves(other), strict=True)
    tensors = [(a, b) for a, b in pairs if isinstance(a, Tensor)]
    return all(isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b) for a, b in tensors)


def _check_independent(model: PreTrainedModel, batch: Tensor) -> None:
    """Refuse blocks whose arguments, the hidden states aside, follow what earlier blocks compute: see BlockStream."""
    batch = batch.to(input_device(model))
    plain, changed = (_block_arguments(model, blocks_of(model), batch, gain) for gain in (1.0, 2.0))
    if (found := plain[0][0][0].shape)[:-1] != batch.shape:
        raise UnsupportedModule(f"{type(model).__name__}: expected hidden states [batch, seq, d], found {list(found)}")
    for index, calls in enumerate(zip(plain, changed, strict=True)):
        one, other = ({**dict(enumerate(args[1:], 1)), **kwargs} for args, kwargs in calls)
        if name := next((name for name in one if not _same(one[name], other[name])), None):
            raise UnsupportedModule(
                f"{type(model).__name__}: block {index} is called with {name!r}, which depends on what earlier blocks "
                "compute; expected only the hidden states to do so"
            )


@torch.no_grad()
def _block_arguments(model: PreTrainedModel, blocks: Sequence[nn.Module], batch: Tensor, gain=1.0) -> list[Call]:
    """What the model passes to each of its `blocks`: (args, kwargs), args[0] the hidden states in front of the first.

    No block runs: masks and rotary embeddings do not depend on what a block computes, so each hands the hidden states
    on, times `gain`. Some families' blocks return a tensor, some a tuple; what arrives at the next block shows which.
    """
    for returns_tuple in (False, True):
        with _handing_on(blocks, returns_tuple, gain) as calls, suppress(_Reached):
            model(input_ids=batch, use_cache=False)
        if len(calls) == len(blocks):
            return calls
    raise RuntimeError(f"{type(model).__name__}: expected calls of {len(blocks)} blocks, found {len(calls)}")


@contextmanager
def _handing_on(blocks: Sequence[nn.Module], returns_tuple: bool, gain: float) -> Iterator[list[Call]]:
    """Collects each block's (args, kwargs) and lets it return its input * `gain`; the pass stops at the last of them.

    It also stops where something else than the hidden states arrives.
    """
    calls: list[Call] = []

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
        if calls and hidden.shape != calls[0][0][0].shape:
            raise _Reached
        calls.append(((hidden, *args), kwargs))
        if len(calls) == len(blocks):
            raise _Reached
        hidden = hidden if gain == 1 else hidden * gain
        return (hidden,) if returns_tuple else hidden

    with forward_replaced(blocks, forward):
        yield calls


@contextmanager
def _watching(
    inputs: Sequence[nn.Module], outputs: Sequence[nn.Module], stop: bool = False
) -> Iterator[Callable[[], Watched]]:
    """Collects what linears read and put out; with `stop` the pass ends when all of it is there."""
    read: dict[nn.Module, Tensor] = {}
    made: dict[nn.Module, Tensor] = {}

    def check() -> None:
        if stop and len(read) + len(made) == len(inputs) + len(outputs):
            raise _Reached

    def before(linear: nn.Module, args: tuple[Tensor]) -> None:
        read[linear] = args[0]
        check()

    def after(linear: nn.Module, _args: tuple, output: Tensor) -> None:
        made[linear] = output.clone()  # Falcon adds to it in place
        check()

    def watched() -> Watched:
        if len(read) + len(made) < len(inputs) + len(outputs):
            raise RuntimeError(
                f"the block ran {len(read) + len(made)} of the {len(inputs) + len(outputs)} linears that were watched"
            )
        return [read[linear].flatten(0, -2) for linear in inputs], [made[linear].flatten(0, -2) for linear in outputs]

    handles = []
    try:
        for linear in inputs:
            handles.append(linear.register_forward_pre_hook(before))
        for linear in outputs:
            handles.append(linear.register_forward_hook(after))
        yield watched
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _running_once(
    owner: nn.Module, outputs: dict[int, Any], place: int, keep: Callable[[Tensor], Tensor], device: torch.device
) -> Iterator[None]:
    """Keeps what `owner` returns, or returns what is kept of batch `place` in the place of its forward pass."""
    if place not in outputs:

        def after(_owner: nn.Module, _args: tuple, output: Any) -> None:
            first, *rest = output if isinstance(output, tuple) else (output,)
            kept = keep(first.clone())  # some blocks add to it in place
            outputs[place] = (kept, *[None] * len(rest)) if isinstance(output, tuple) else kept  # maps are large

        handle = owner.register_forward_hook(after)
        try:
            yield
        finally:
            handle.remove()
        return
    kept = outputs[place]
    first = (kept[0] if isinstance(kept, tuple) else kept).to(device, copy=True, non_blocking=True)
    with forward_replaced([owner], lambda *_args, **_kwargs: (first, *kept[1:]) if isinstance(kept, tuple) else first):
        yield


@contextmanager
def forward_replaced(modules: Sequence[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    own = [vars(module).get("forward") for module in modules]  # someone else may have replaced it before us
    try:
        for module in modules:
            module.forward = forward
        yield
    finally:
        for module, before in zip(modules, own, strict=True):
            vars(module).pop("forward", None)
            if before is not None:
                module.forward = before


@contextmanager
def cut_graph(linears: Mapping[str, nn.Module]) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Cuts autograd's graph behind every linear: (inputs, outputs), filled by the forward pass inside the `with`.

    `inputs[name]` [batch, ..., d_in] is what a linear read, as a function of `outputs[...]` [batch, ..., d_out] of the
    linears *directly* before it, which are leaves: a gradient goes one linear back and no further.

    The outputs are replaced by standard normal noise. Which channels are connected does not depend on the values, and
    with noise no ReLU is off at every position, as some are in real activations.
    """
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)

    def recording(name: str):
        def before(_linear: nn.Module, args: tuple[Tensor]) -> None:
            inputs[name] = args[0]

        def after(_linear: nn.Module, _args: tuple, output: Tensor) -> Tensor:
            noise = torch.randn(output.shape, generator=generator, dtype=torch.float64)
            outputs[name] = noise.to(output).requires_grad_()
            return outputs[name].clone()  # some models add to it in place, which a leaf does not allow

        return before, after

    handles = []
    for name, linear in linears.items():
        before, after = recording(name)
        handles += [linear.register_forward_pre_hook(before), linear.register_forward_hook(after)]
    try:
        yield inputs, outputs
    finally:
        for handle in handles:
            handle.remove()
