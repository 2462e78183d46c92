"""What is measured about one module: moments behind the pruned prefix, paired with what the dense model does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from .large.distributed import all_sum, all_windows
from .moments import Moments
from .stream import BlockStream
from .structure import Depth2Module, weight_of


class DenseRecord:
    """What one module does in the dense model, batch by batch, as far as somebody asks for it.

    Kept for the modules of one block at a time: no inner activations.

    Attributes:
        inputs: what level 1 reads, [tokens, d] per batch.
        outputs: what level 2 puts out, [tokens, d] per batch.
    """

    def __init__(self, module: Depth2Module, *, inputs: bool, outputs: bool, means: bool) -> None:
        self.level1, self.level2 = next(iter(module.level1.values())).linear, module.level2.linear
        self._inputs, self._outputs, self._means = inputs, outputs, means
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self._n, self._sum = 0, torch.zeros(())

    @property
    def reads(self) -> list[nn.Module]:
        """The linears whose inputs are wanted."""
        return [self.level1] * self._inputs + [self.level2] * self._means

    @property
    def makes(self) -> list[nn.Module]:
        """The linears whose outputs are wanted."""
        return [self.level2] * self._outputs

    def add(self, read: list[Tensor], made: list[Tensor], stream: BlockStream) -> None:
        """One batch of what :attr:`reads` read and :attr:`makes` put out."""
        if self._means:
            z = read[-1]
            self._n, self._sum = self._n + len(z), self._sum + z.sum(0, dtype=torch.float64)
        if self._inputs:
            self.inputs.append(stream.keep(read[0]))
        self.outputs += map(stream.keep, made)

    def hidden_mean(self) -> Tensor:
        """Mean of level 2's input, float64 [channels], over all processes.

        Raises:
            ValueError: nobody asked for it before the dense model's pass.
        """
        if not self._means:
            raise ValueError("expected a remedy that says that it reads the dense model's means (Remedy.reads_means)")
        total, count = self._sum.clone(), self._sum.new_tensor(self._n)
        all_sum(total, count)
        return total / count


class Drift:
    """What the residual stream lacks in front of a module: dense minus pruned, [tokens, d] per batch.

    It follows the modules of a block, cut or not. A module that was passed counts as soon as another pass over the
    block shows what it puts out now.
    """

    def __init__(self, dense: Sequence[Tensor], pruned: Sequence[Tensor], stream: BlockStream) -> None:
        self._stream = stream
        pairs = zip(dense, pruned, strict=True)
        self.batches = [stream.keep((self._on(d) - self._on(p)).flatten(0, -2)) for d, p in pairs]
        self.passed: list[DenseRecord] = []

    def _on(self, value: Tensor) -> Tensor:
        return value.to(self._stream.device, non_blocking=True)

    def move(self, place: int, made: list[Tensor]) -> None:
        """Batch `place` behind the modules that were passed: what they put out in the dense model, less `made`."""
        for record, output in zip(self.passed, made, strict=True):
            self.batches[place] = self._stream.keep(
                self._on(self.batches[place]) + (self._on(record.outputs[place]) - output)
            )

    def target(self, place: int, outputs: Sequence[Tensor]) -> Tensor:
        """The dense module's outputs of batch `place` plus what the stream lacks in front of it."""
        return self._on(outputs[place]) + self._on(self.batches[place])


@torch.no_grad()
def advance_dense(dense: BlockStream, block: nn.Module, records: Sequence[DenseRecord]) -> None:
    """Move the dense stream behind the still dense block and fill the `records` on the way, all in one pass."""
    reads = [linear for record in records for linear in record.reads]
    makes = [linear for record in records for linear in record.makes]
    hidden = []
    for output, (read, made) in dense.run(block, reads, makes):
        hidden.append(dense.keep(output))
        read, made = iter(read), iter(made)
        for record in records:
            record.add([next(read) for _ in record.reads], [next(made) for _ in record.makes], dense)
    dense.move(hidden, dense.position + 1)


class ModulePasses:
    """Passes over one module's block, to measure the module where it stands: behind the pruned prefix.

    With several processes everything is over the tokens of all of them, in each of them.
    """

    def __init__(
        self,
        stream: BlockStream,
        block: nn.Module,
        module: Depth2Module,
        dense: DenseRecord | None = None,
        drift: Drift | None = None,
        *,
        target: str = "none",
        hold_out: bool = False,
        precision: torch.dtype = torch.float64,
    ) -> None:
        """
        Args:
            stream: hidden states in front of `block`.
            dense: what the module does in the dense model.
            drift: what the residual stream lacks in front of the module, for the residual target.
            target: of level 2, see :mod:`greedy_helpers.remedies`; or `"none"`.
            hold_out: the moments of every fifth window are taken for themselves, too (of texts that take turns,
                windows of each); where there are fewer than five, those of the last quarter of every window.
            precision: see :class:`~greedy_helpers.moments.Moments`.
        """
        self._hold_out = hold_out
        self._stream, self._block, self._module, self._dense, self._drift = stream, block, module, dense, drift
        self._target, self._precision = target, precision

    @torch.no_grad()
    def moments(self, *levels: int) -> list[Moments]:
        """Moments of what level 1, level 2 or both read, paired with their targets, from one pass over the block."""
        groups = {1: next(iter(self._module.level1.values())), 2: self._module.level2}
        results = [Moments(groups[level].path, self._precision, hold_out=self._hold_out) for level in levels]
        first, few = 0, sum(map(len, self._stream.hidden)) < 5  # the batch's first window
        for place, inputs in enumerate(self._inputs([groups[level].linear for level in levels])):
            n, seq = self._stream.hidden[place].shape[:2]
            every_fifth = (torch.arange(first, first + n) % 5 == 4)[:, None]
            held_out = torch.arange(seq) >= seq - seq // 4 if few else every_fifth
            held_out = held_out.expand(n, seq).flatten()
            for moments, level, x in zip(results, levels, inputs, strict=True):
                moments.update(x, self._target_of(level, place), held_out)
            first += n
        for moments in results:
            moments.reduce()
        if self._target == "local" and 2 in levels:
            linear = self._module.level2.linear
            results[-1] = results[-1].aim_at(weight_of(linear), linear.bias)
        return results

    def _inputs(self, linears: list[nn.Module]) -> Iterator[list[Tensor]]:
        passed = [] if self._drift is None else [record.level2 for record in self._drift.passed]
        for place, (inputs, made) in enumerate(self._stream.watch(self._block, linears, passed)):
            if passed:
                self._drift.move(place, made)
            yield inputs
        if passed:
            self._drift.passed.clear()

    def _target_of(self, level: int, place: int) -> Tensor | None:
        if self._dense is None or (level == 2 and self._target in ("local", "none")):
            return None
        if level == 1:
            return self._dense.inputs[place] if self._dense.inputs else None
        if self._drift is not None:
            return self._drift.target(place, self._dense.outputs)
        return self._dense.outputs[place]

    def hidden_mean(self) -> Tensor:
        """See :meth:`DenseRecord.hidden_mean`."""
        return self._dense.hidden_mean()

    def _settle(self) -> None:
        """The drift moves behind the modules that were passed, before a pass that does not watch them."""
        if self._drift is not None and self._drift.passed:
            for _ in self._inputs([]):
                pass

    def attention_maps(self) -> Iterator[Tensor]:
        """[batch, heads, query, key], batch by batch."""
        self._settle()
        return all_windows(self._stream.attention_maps(self._block, self._module.owner))

    def level2_windows(self) -> Iterator[Tensor]:
        """Level 2's inputs, [batch, seq, channels], batch by batch."""
        self._settle()

        def windows() -> Iterator[Tensor]:
            batches = self._stream.inputs(self._block, [self._module.level2.linear])
            for states, (z,) in zip(self._stream.hidden, batches, strict=True):
                yield z.unflatten(0, states.shape[:2])

        return all_windows(windows())
