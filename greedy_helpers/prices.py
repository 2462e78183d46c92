"""What an error of a module costs the model, in nats: the loss's own metric on the outputs of every module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from .large.distributed import all_sum, all_windows, share_of
from .large.lazy import is_lazy
from .stream import walk
from .structure import asking_for_gradients, blocks_of, check_tokens, depth2_modules, eval_mode


def output_fisher(model: PreTrainedModel, tokens: Tensor, *, seed: int = 0, batch_size: int = 1) -> dict[str, Tensor]:
    """The Fisher information of every module's output: module name -> G = E[g g'], float64 [d, d], per token.

    With e [d] the change of a module's output at one token, and g the gradient of a window's summed loss with respect
    to that output, the loss rises by 1/2 E[(g'e)^2] to second order, when the labels are drawn from the model itself:
    then g has mean zero, and E[g g'] is the Hessian's expectation (Gauss-Newton; Amari 1998, Martens 2020). If g and e
    are independent that is 1/2 tr(G E[e e']), in nats per token, and two modules can be compared.

    The one place where the method looks backward: one backward pass over activations, without gradients of weights. The
    graph of a batch of windows is held at once, so the whole model has to be in memory.

    Args:
        tokens: long [n, seq], calibration text. Only the labels are drawn, not the text.
        seed: of the draw.
        batch_size: windows per pass; the result depends on it by the draw only.

    Raises:
        ValueError: a model whose blocks are on the disk, or one without a causal head.
    """
    check_tokens(model, tokens, packed=True)
    if is_lazy(model):
        raise ValueError("output_fisher: expected the whole model in memory, found its blocks on the disk")
    if model.get_output_embeddings() is None:
        raise ValueError(
            f"output_fisher: expected a causal language model, found {type(model).__name__} without a head"
        )
    outputs = {module.name: module.level2.linear for module in depth2_modules(model)}
    count, tokens = tokens.numel(), share_of(tokens)
    sums: dict[str, Tensor] = {}
    generator = torch.Generator(model.device).manual_seed(seed)
    with (
        eval_mode(model),
        asking_for_gradients(model.parameters(), False),
        _gradients(model, outputs, sums),
        torch.enable_grad(),
    ):
        for windows in tokens.split(batch_size):
            logits = model(input_ids=windows.to(model.device), use_cache=False).logits.float()
            with torch.no_grad():
                labels = torch.multinomial(logits.flatten(0, 1).softmax(-1), 1, generator=generator).flatten()
            F.cross_entropy(logits.flatten(0, 1), labels, reduction="sum").backward()
    all_sum(*sums.values())
    return {name: total / count for name, total in sums.items()}


def stream_energy(
    model: PreTrainedModel,
    tokens: Tensor,
    *,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    store: torch.device | str | None = None,
) -> list[float]:
    """The squared norm of the residual stream behind every block, its median over the tokens: one number per block.

    What an error is small or large beside, for prices that need no gradient. The median, as in many models the first
    token of a text has a norm a hundred times that of the others, and a mean would be about that token alone.

    Args:
        tokens: long [n, seq], calibration text.
        batch_size, device, store: see :func:`~greedy_helpers.pruning.prune`.
    """
    check_tokens(model, tokens, packed=True)
    found, where = [], {"batch_size": batch_size, "device": device, "store": store}
    with closing(walk(model, tokens, len(blocks_of(model)) - 1, **where)) as walked:
        for block, stream in walked:
            stream.advance(block)
            norms = (hidden.float().square().sum(-1) for hidden in stream.hidden)
            found.append(torch.cat([part.flatten() for part in all_windows(norms)]).median().item())
    return found


@contextmanager
def _gradients(model: PreTrainedModel, outputs: dict[str, nn.Module], sums: dict[str, Tensor]) -> Iterator[None]:
    """Adds g g' of every output of the modules to `sums` whenever somebody calls backward."""

    def listen(name: str):
        def add(gradient: Tensor) -> None:
            g = gradient.detach().flatten(0, -2)
            g = g.to(torch.promote_types(g.dtype, torch.float32))
            product = (g.T @ g).double()
            sums[name] = sums[name] + product if name in sums else product

        return lambda module, args, output: output.register_hook(add) and None

    with ExitStack() as hooks:
        # weights are frozen, so the graph has to begin at the embeddings
        embeddings = model.get_input_embeddings()
        hooks.callback(embeddings.register_forward_hook(lambda m, a, output: output.requires_grad_(True)).remove)
        for name, linear in outputs.items():
            hooks.callback(linear.register_forward_hook(listen(name)).remove)
        yield


def loss_metric(model: PreTrainedModel, tokens: Tensor, damp: float = 0.1) -> dict[str, Tensor]:
    """:func:`output_fisher` as a metric: module name -> L, float64 [d, d] lower, with L L' = G + damp mean(diag G) I.

    An error e [d] then costs 1/2 ||e L||^2 nats. G is known from as many gradients as there are tokens, and in small
    directions from none: damping keeps a share of the plain squared error alive there.
    """
    roots = {}
    for name, fisher in output_fisher(model, tokens).items():
        floor = damp * fisher.diagonal().mean().clamp(min=torch.finfo(fisher.dtype).tiny)
        roots[name] = torch.linalg.cholesky(fisher + floor * torch.eye(len(fisher)).to(fisher))
    return roots
