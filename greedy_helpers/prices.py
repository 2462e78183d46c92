"""What an error of a module costs the model, in nats: the loss's own metric on the outputs of every module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from .large.distributed import all_sum, all_windows, share_of
from .large.lazy import resident
from .large.memory import at_smaller_batches
from .stream import walk, windows_per_batch
from .structure import asking_for_gradients, blocks_of, check_tokens, depth2_modules, eval_mode

# Tokens for the metric: each costs as much as four forward passes.
METRIC_TOKENS = 16_384


def output_fisher(
    model: PreTrainedModel,
    tokens: Tensor,
    *,
    seed: int = 0,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    store: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """The Fisher information of every module's output: module name -> G = E[g g'], float64 [d, d], per token.

    The matrices lie in the computer's memory, wherever the model is.

    With e [d] the change of a module's output at one token, and g the gradient of a window's summed loss with respect
    to that output, the loss rises by 1/2 E[(g'e)^2] to second order, when the labels are drawn from the model itself:
    then g has mean zero, and E[g g'] is the Hessian's expectation (Gauss-Newton; Amari 1998, Martens 2020). If g and e
    are independent that is 1/2 tr(G E[e e']), in nats per token, and two modules can be compared.

    The one place where the method looks backward: once, over activations, without gradients of weights. Block by block,
    each run again for its own gradients, so that no more than one block's graph exists and the blocks may be on the
    disk. The hidden states in front of all blocks wait meanwhile: n * seq * d numbers for each.

    Args:
        tokens: long [n, seq], calibration text. Only the labels are drawn, not the text.
        seed: of the draw, which depends neither on batches nor on devices nor on the number of processes.
        batch_size, device, store: see :func:`~greedy_helpers.pruning.prune`.

    Raises:
        ValueError: a model without a causal head.
    """
    check_tokens(model, tokens, packed=True)
    if model.get_output_embeddings() is None:
        raise ValueError(
            f"output_fisher: expected a causal language model, found {type(model).__name__} without a head"
        )
    draws = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    n_blocks, states, where = len(blocks_of(model)), [], {"batch_size": batch_size, "device": device, "store": store}
    with closing(walk(model, tokens, n_blocks - 1, **where)) as walked:
        for block, stream in walked:
            states.append(stream.hidden)
            stream.advance(block)
    draws, fishers = share_of(draws).split([len(hidden) for hidden in stream.hidden]), {}
    with eval_mode(model), asking_for_gradients(model.parameters(), False), torch.enable_grad():
        gradients = [
            stream.keep(_loss_gradient(partial(stream.head, place), hidden, draws[place]))
            for place, hidden in enumerate(stream.hidden)
        ]
        for index in reversed(range(n_blocks)):
            with resident(model, index, stream.device) as block:
                outputs, totals = {m.name: m.level2.linear for m in depth2_modules(model, [index])}, {}
                for place, hidden in enumerate(states.pop()):
                    leaf = hidden.to(stream.device).detach().requires_grad_()
                    with _gradients(outputs, totals):
                        output = stream.through(block, place, leaf, index)
                        output.backward(gradients[place].to(output.device))
                    gradients[place] = stream.keep(leaf.grad)
            totals = {name: totals[name] for name in outputs}  # in the same order in every process
            all_sum(*totals.values())
            # Off the device: one matrix per module is a lot of a large model.
            fishers |= {name: (total / tokens.numel()).cpu() for name, total in totals.items()}
    return {module.name: fishers[module.name] for module in depth2_modules(model)}


def _loss_gradient(head: Callable[[Tensor], Tensor], hidden: Tensor, draws: Tensor) -> Tensor:
    """Of the summed loss, with labels drawn from the model itself, with respect to the hidden states behind it all."""
    leaf = hidden.detach().requires_grad_()
    logits = head(leaf).flatten(0, -2).float()
    with torch.no_grad():
        cumulated = logits.softmax(-1).cumsum(-1)
        labels = torch.searchsorted(cumulated, draws.reshape(-1, 1).to(cumulated) * cumulated[:, -1:]).flatten()
    F.cross_entropy(logits, labels.clamp(max=logits.shape[-1] - 1), reduction="sum").backward()
    return leaf.grad


@contextmanager
def _gradients(outputs: dict[str, nn.Module], sums: dict[str, Tensor]) -> Iterator[None]:
    """Adds g g' of every output of the linears to `sums` when somebody calls backward."""

    def listen(name: str):
        def add(gradient: Tensor) -> None:
            g = gradient.detach().flatten(0, -2)
            g = g.to(torch.promote_types(g.dtype, torch.float32))
            product = (g.T @ g).double()
            sums[name] = sums[name] + product if name in sums else product

        return lambda module, args, output: output.register_hook(add) and None

    with ExitStack() as hooks:
        for name, linear in outputs.items():
            hooks.callback(linear.register_forward_hook(listen(name)).remove)
        yield


def stream_energy(
    model: PreTrainedModel,
    tokens: Tensor,
    *,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    store: torch.device | str | None = None,
) -> dict[str, float]:
    """The squared norm of the residual stream right behind every module, its median over the tokens: module -> number.

    What an error is small or large beside, for prices that need no gradient: the next norm divides by it. The median,
    as in many models the first token of a text has a norm a hundred times that of the others, and a mean would be about
    that token alone. Behind attention it is taken as what the block reads plus what attention puts out, which holds
    where nothing stands between level 2 and the stream.

    Args:
        tokens: long [n, seq], calibration text.
        batch_size, device, store: see :func:`~greedy_helpers.pruning.prune`.
    """
    check_tokens(model, tokens, packed=True)
    found, where = {}, {"batch_size": batch_size, "device": device, "store": store}
    with closing(walk(model, tokens, len(blocks_of(model)) - 1, **where)) as walked:
        for index, (block, stream) in enumerate(walked):
            modules = depth2_modules(model, [index])
            behind, energies = [], {module.name: [] for module in modules}
            for before, (output, (_, made)) in zip(
                stream.hidden, stream.run(block, [], [module.level2.linear for module in modules]), strict=True
            ):
                behind.append(stream.keep(output))
                level = before.flatten(0, -2).to(output.device)
                for module, change in zip(modules, made, strict=True):
                    level = output.flatten(0, -2) if module is modules[-1] else level + change
                    energies[module.name].append(level.float().square().sum(-1).view(output.shape[:2]))
            stream.move(behind, index + 1)
            for name, parts in energies.items():
                found[name] = torch.cat([part.flatten() for part in all_windows(parts)]).median().item()
    return found


def loss_metric(
    model: PreTrainedModel,
    tokens: Tensor,
    damp: float = 0.1,
    most: int = METRIC_TOKENS,
    *,
    batch_size: int | None = None,
    **where: torch.device | str | None,
) -> dict[str, Tensor]:
    """:func:`output_fisher` as a metric: module name -> L, float64 [d, d] lower, with L L' = G + damp mean(diag G) I.

    An error e [d] then costs 1/2 ||e L||^2 nats. G is known from as many gradients as there are tokens, and in small
    directions from none: damping keeps a share of the plain squared error alive there.

    Args:
        most: as many of the windows as hold at most so many tokens are taken, evenly spaced.
        batch_size: windows per pass; halved, with a warning, when memory runs out.
        where: device, store.
    """
    n = min(len(tokens), max(1, most // tokens.shape[1]))
    tokens = tokens[torch.linspace(0, len(tokens) - 1, n).long()]
    fishers = at_smaller_batches(
        lambda size: output_fisher(model, tokens, batch_size=size, **where),
        min(n, windows_per_batch(batch_size, tokens.shape[1])),
        "loss_metric",
    )
    roots = {}
    for name in list(fishers):
        fisher = fishers.pop(name)  # gone when its root is there
        floor = damp * fisher.diagonal().mean().clamp(min=torch.finfo(fisher.dtype).tiny)
        roots[name] = torch.linalg.cholesky(fisher + floor * torch.eye(len(fisher)).to(fisher))
    return roots
