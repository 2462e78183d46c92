"""The package's steps once more, slowly: full passes of whole models, stored activations, least squares by lstsq.

Shares with the package only the tables of channels and the surgery.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from greedy_helpers import depth2_modules, remove_units, set_weight, weight_of


def recorded(model, linear, tokens):
    """(input, output) of one linear in a full pass, [tokens, channels] each."""
    seen = []
    handle = linear.register_forward_hook(lambda _, args, output: seen.append((args[0], output.clone())))
    with torch.no_grad():
        model(tokens)
    handle.remove()
    return [part.flatten(0, -2) for part in seen[0]]


def stream_in_front(model, number, tokens):
    """The residual stream in front of module `number`: the block's input plus what this block has added so far."""
    modules = depth2_modules(model)
    block = model.get_submodule(modules[number].name.rsplit(".", 1)[0])
    seen = []
    handle = block.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        model(tokens)
    handle.remove()
    stream = seen[0].flatten(0, -2)
    for earlier in range(number - number % 2, number):
        stream = stream + recorded(model, modules[earlier].level2.linear, tokens)[1]
    return stream


def ridge_system(x, y, w0, damp):
    """(A, T) with ||T - A W'||^2 = ||Y - X W'||^2 + lam ||W - W0||^2 and lam = damp times the mean diagonal of X'X."""
    lam = damp * x.square().sum() / x.shape[1]
    return torch.cat([x, lam.sqrt() * torch.eye(x.shape[1], dtype=x.dtype)]), torch.cat([y, lam.sqrt() * w0.T])


def refit_slowly(linear, x, y, damp):
    """Refit a layer to y [tokens, d_y] on x [tokens, d_x], toward its current weight; a bias is solved by centring."""
    centre = linear.bias is not None
    x_mean, y_mean = (x.mean(0), y.mean(0)) if centre else (torch.zeros(()), torch.zeros(()))
    new = torch.linalg.lstsq(*ridge_system(x - x_mean, y - y_mean, weight_of(linear), damp)).solution.T
    set_weight(linear, new, y_mean - new @ x_mean if centre else None)


@dataclass
class Activations:
    """What one module reads and puts out when its units are chosen, [tokens, channels] each."""

    level1: list[Tensor]  # outputs of level 1
    z: Tensor  # inputs of level 2
    target: Tensor  # of level 2


def second_moment_slowly(module, seen, n_keep, damp):
    columns = weight_of(module.level2.linear).square().sum(0)
    if module.kind == "attention":
        scores = (columns * seen.z.square().mean(0))[module.level2.index].sum(1)
    else:
        scores = torch.stack([columns * y.square().mean(0) for y in seen.level1]).prod(0)
    kept, in_set = [], module.n_units // module.n_sets
    for unit in scores.argsort(descending=True).tolist():
        if sum(other // in_set == unit // in_set for other in kept) < n_keep // module.n_sets:
            kept.append(unit)
    return torch.tensor(kept)


def exact_greedy_slowly(module, seen, n_keep, damp):
    """Brute force: after every removal level 2 is solved again without each of the units that are left."""
    linear, left = module.level2.linear, list(range(module.n_units))
    x, y = seen.z, seen.target
    if linear.bias is not None:
        x, y = x - x.mean(0), y - y.mean(0)
    a, t = ridge_system(x, y, weight_of(linear), damp)

    def error_without(unit):
        columns = a[:, module.level2.index[[other for other in left if other != unit]].flatten()]
        return (t - columns @ torch.linalg.lstsq(columns, t).solution).square().sum().item()

    def may_go(unit):
        """Query heads go in rounds: none of a KV head that has fewer left than another."""
        kv_heads = [other // (module.n_units // module.n_sets) for other in left]
        return kv_heads.count(unit // (module.n_units // module.n_sets)) == max(map(kv_heads.count, kv_heads))

    while len(left) > n_keep:
        left.remove(min(filter(may_go, left), key=error_without))
    return torch.tensor(left)


@dataclass
class SlowStep:
    seen: Activations
    keep: Tensor
    error: float


def prune_slowly(model, tokens, sizes, choose: Callable, remedy="none", damp=1e-2) -> list[SlowStep]:
    """The method in place on `model`, with a whole dense copy beside it; `choose(module, seen, n_keep, damp)`.

    `sizes`: how many units every module keeps, in their order.
    """
    when, _, target = remedy.partition(", ")
    dense, steps = copy.deepcopy(model), []
    for number in range(len(depth2_modules(model))):
        module, original = depth2_modules(model)[number], depth2_modules(dense)[number]
        linear, pairs = module.level2.linear, zip(module.level1.values(), original.level1.values(), strict=True)
        wanted = recorded(dense, original.level2.linear, tokens)[1]
        if target == "local":
            wanted = recorded(model, linear, tokens)[1]
        if target == "residual":
            wanted = wanted + stream_in_front(dense, number, tokens) - stream_in_front(model, number, tokens)
        if when in ("pre", "both"):
            jobs = [(a.linear, recorded(model, a.linear, tokens)[0], recorded(dense, b.linear, tokens)[1])
                    for a, b in pairs]  # fmt: skip
            for job in jobs:
                refit_slowly(*job, damp)
            refit_slowly(linear, recorded(model, linear, tokens)[0], wanted, damp)
        level1 = [recorded(model, group.linear, tokens)[1] for group in module.level1.values()]
        seen = Activations(level1, recorded(model, linear, tokens)[0], wanted)
        keep = choose(module, seen, sizes[number], damp).sort().values
        remove_units(module, keep)
        if when in ("post", "both"):
            refit_slowly(linear, recorded(model, linear, tokens)[0], wanted, damp)
        missed = (recorded(model, linear, tokens)[1] - wanted).square().sum() / wanted.square().sum()
        steps.append(SlowStep(seen, keep, missed.item()))
    return steps
