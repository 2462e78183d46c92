"""Checkers of notebook 11, the capstone: the parts of a pruner for Llama models, and the pruner."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from .common import NotYet, ask, call, compare, draw, expect, is_linear, parts, ridge

_Units = dict[str, dict[str, Tensor]]
_LEVEL2 = {"attention": "self_attn.o_proj", "ffn": "mlp.down_proj"}


def _llama(heads: int, kv: int, dim: int, bias: bool = False) -> LlamaForCausalLM:
    """Two blocks of width 24 in float64, weights so large that a wrong channel shows."""
    config = LlamaConfig(
        vocab_size=40, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=kv, head_dim=dim, attention_bias=bias, mlp_bias=bias, max_position_embeddings=32,
    )  # fmt: skip
    model, generator = LlamaForCausalLM(config).double().eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
            elif bias:
                parameter.copy_(1 + 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def _units(block: nn.Module) -> _Units:
    """Module -> linear -> channels of every unit; a unit of attention is a KV head with its query heads."""
    dim = block.self_attn.head_dim
    n_kv = block.self_attn.k_proj.weight.shape[0] // dim
    group = block.self_attn.q_proj.weight.shape[0] // dim // n_kv

    def consecutive(width: int, n: int) -> Tensor:
        return torch.tensor([list(range(unit * width, (unit + 1) * width)) for unit in range(n)])

    queries, keys = consecutive(group * dim, n_kv), consecutive(dim, n_kv)
    channel = consecutive(1, block.mlp.down_proj.weight.shape[1])
    return {
        "attention": {
            "self_attn.q_proj": queries,
            "self_attn.k_proj": keys,
            "self_attn.v_proj": keys,
            "self_attn.o_proj": queries,
        },
        "ffn": {f"mlp.{part}_proj": channel for part in ("gate", "up", "down")},
    }


@torch.no_grad()
def _cut(block: nn.Module, own: Mapping[str, Tensor], keep: Tensor) -> None:
    for path, channels in own.items():
        linear, axis = block.get_submodule(path), int(path in _LEVEL2.values())
        stay = channels[keep].flatten()
        linear.weight = nn.Parameter(linear.weight.index_select(axis, stay))
        if axis == 0 and linear.bias is not None:
            linear.bias = nn.Parameter(linear.bias[stay])
        linear.out_features, linear.in_features = linear.weight.shape


def check_units_of(units_of: Callable[[nn.Module], _Units]) -> str:
    """Notebook 11: `units_of(block)` -> module -> path of a linear -> long [n_units, channels of a unit]."""
    shortened = _llama(6, 3, 6).model.layers[0]
    for name, own in _units(shortened).items():
        _cut(shortened, own, torch.arange(len(own[_LEVEL2[name]]) - 1))
    for what, block in (
        ("4 query heads, 4 KV heads", _llama(4, 4, 6).model.layers[0]),
        ("6 query heads on 2 KV heads of 6 channels", _llama(6, 2, 6).model.layers[0]),
        ("a block that has lost a KV head and a channel", shortened),
    ):
        what, right = f"units_of, {what}", _units(block)
        found = _same_keys(what, call(what, units_of, block), right)
        for name, own in right.items():
            linears = _same_keys(f"{what}, {name}", found[name], own)
            for path, channels in own.items():
                _compare_units(f"{what}: {path}", linears[path], channels, block)
    return "correct: every unit with its rows of level 1 and its columns of level 2"


def _same_keys(what: str, found: Mapping, right: Mapping) -> Mapping:
    expect(isinstance(found, Mapping), f"{what}: expected a dictionary, found {type(found).__name__}")
    compare(f"{what}: its keys, level 2 last", list(found), list(right))
    return found


def _compare_units(what: str, found: Tensor, right: Tensor, block: nn.Module) -> None:
    (n_units, width), dim, config = right.shape, block.self_attn.head_dim, block.self_attn.config
    ffn = "mlp" in what
    before = config.intermediate_size if ffn else config.num_key_value_heads
    old_size = "The config still has the sizes before the cut: read them off the weights"
    all_heads = "A unit is a KV head with *all* query heads that read it: as many units in q and o as in k and v"
    own_dim = "A head has `head_dim` channels, which need not be the width of the stream over the number of heads"
    if isinstance(found, Tensor) and found.shape != right.shape:
        for wrong, hint in (
            (found.ndim == 1, "One row per unit, also where it is a single channel: [n_units, 1]"),
            (len(found) == before != n_units, old_size),
            (list(found.shape) == [right.numel() // dim, dim], all_heads),
            (not ffn and found.shape[-1] % dim > 0, own_dim),
        ):
            expect(not wrong, f"{what}: expected shape {list(right.shape)}, found {list(found.shape)}. {hint}")
    every = torch.arange(right.numel())
    side_by_side = "The channels of a head lie side by side: head 0 has the first head_dim of them"
    neighbours = "*Consecutive* query heads share a KV head: with 2 of them per KV head, 0 and 1 read the first"
    spread = right if ffn else every.view(-1, n_units, dim).transpose(0, 1).flatten(1)
    compare(what, found, right, (spread, neighbours), (every.view(width, n_units).T, side_by_side))


def check_moments_of(moments_of: Callable[[Iterable[tuple[Tensor, Tensor]]], tuple[Tensor, Tensor, int]]) -> str:
    """Notebook 11: `moments_of(batches)` -> (X'X, X'Y, tokens), summed over pairs (x, y) of [batch, seq, d]."""
    x, y = (part.float() + 30 for part in draw(0, (20, 6, 5), (20, 6, 3)))

    def sums(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x, y = x.double().flatten(0, 1), y.double().flatten(0, 1)
        return x.T @ x, x.T @ y

    n, mean_x, mean_y = 120, x.double().mean((0, 1)), y.double().mean((0, 1))
    for size in (1, 8, 20):
        batches = list(zip(x.split(size), y.split(size), strict=True))
        what = f"moments_of, {n} tokens in batches of {size}"
        *found, tokens = parts(what, call(what, moments_of, batches), "X'X, X'Y, n")
        wrong = zip(sums(*batches[-1]), sums(x - mean_x, y - mean_y), strict=True)
        for name, value, right, (last, centred) in zip(("X'X", "X'Y"), found, sums(x, y), wrong, strict=True):
            compare(
                f"{what}: {name}",
                value,
                right,
                (last, "That is the last batch alone: add up all of them"),
                (centred, "That is centred: the method's moments are not"),
                (right / n, "That is the mean over tokens: return the sums, and the number of tokens beside them"),
                (right / n * len(batches), "Every batch was averaged: add up sums, as batches may differ in size"),
                (right, "Nearly: single precision loses digits in a long sum. Turn x and y into float64 first"),
                rtol=1e-12,
            )
        hint = "Count tokens, not windows or batches"
        compare(f"{what}: n", tokens, n, hint)
    stream = iter(zip(x.split(8), y.split(8), strict=True))
    try:
        found = moments_of(stream)
    except TypeError as error:
        raise NotYet(f"moments_of, batches that come one by one: {error}. Read them in a `for` loop, once") from error
    compare("moments_of, batches that come one by one: n", found[2], n, "Read them in a `for` loop, once")
    return "correct: the same sums, whatever the batches"


def check_energy_scores(energy_scores: Callable[[Tensor, int, Tensor, Tensor], Tensor]) -> str:
    """Notebook 11: `energy_scores(xx, n, weight, columns)` -> [n_units], E||B_u z_u||^2 from Z'Z over n tokens."""
    z, mix, weight = draw(1, (50, 6), (6, 6), (6, 6))
    z = z @ mix + 0.5
    for what, columns in (
        ("channels", torch.arange(6)[:, None]),
        ("heads of two channels", torch.arange(6).view(3, 2)),
        ("heads of three channels", torch.arange(6).view(2, 3)),
    ):
        sent = [z[:, unit] @ weight[:, unit].T for unit in columns]
        right = torch.stack([part.square().sum(1).mean() for part in sent])
        loudness, norms = z.square().mean(0), weight.square().sum(0)

        def each(values: Tensor, columns: Tensor = columns) -> Tensor:
            return values[columns].sum(1)

        rows = torch.stack([(z[:, unit] @ weight[unit]).square().sum(1).mean() for unit in columns])
        ask(f"energy_scores, {what}", energy_scores, z.T @ z, 50, weight, columns).must_be(
            right,
            (50 * right, "That is the sum over tokens: divide by n"),
            (right.sqrt(), "The energy is a square: no root"),
            (each(norms), "That is the weight alone: what the channels carry counts as well"),
            (each(loudness), "That is what the channels carry, before level 2: its columns count as well"),
            (rows, "A channel is a *column* of level 2: weight[:, unit]"),
            (each(weight.square().sum(1) * loudness), "A channel is a *column* of level 2: weight[:, unit]"),
            (
                each(norms * loudness),
                "The channels of a head are added before they are squared: take the whole block of Z'Z that belongs to "
                "the unit, not only its diagonal",
            ),
        )
    return "correct: what each unit sends to the residual stream"


@torch.no_grad()
def check_cut_units(cut_units: Callable[[nn.Module, Mapping[str, Tensor], Tensor], None]) -> str:
    """Notebook 11: `cut_units(block, own, keep)` cuts one module of a Llama block in place to the units `keep`."""
    tokens = torch.arange(24).view(2, 12)
    for bias in (False, True):
        for name, keep in (("attention", [0, 2]), ("ffn", [1, 4, 5, 20, 31])):
            what = f"cut_units, {name}{', with biases' * bias}"
            model, silent, right = _llama(6, 3, 6, bias), _llama(6, 3, 6, bias), _llama(6, 3, 6, bias)
            block, own = model.model.layers[0], _units(model.model.layers[0])[name]
            gone = [unit for unit in range(len(own[_LEVEL2[name]])) if unit not in keep]
            silent.model.layers[0].get_submodule(_LEVEL2[name]).weight[:, own[_LEVEL2[name]][gone].flatten()] = 0
            _cut(right.model.layers[0], own, torch.tensor(keep))
            with torch.enable_grad():
                cut_units(block, own, torch.tensor(keep))
            _check_layers(what, block, right.model.layers[0], own, name, len(keep))
            hint = "Other channels stayed than `keep` says, or level 1 and level 2 kept different ones"
            found, wanted = model(tokens).logits, silent(tokens).logits
            compare(f"{what}: the logits, against those with the others' columns set to zero", found, wanted, hint)
            expect(
                all(p.requires_grad and p.is_leaf for p in block.parameters()),
                f"{what}: expected parameters like those before, found some with a graph or without requires_grad",
            )
    return "correct: smaller weights, and the output of a model in which the others are silent"


def _check_layers(
    what: str, block: nn.Module, right: nn.Module, own: Mapping[str, Tensor], name: str, n_keep: int
) -> None:
    for path in own:
        found, wanted = block.get_submodule(path), right.get_submodule(path)
        size, goal = list(found.weight.shape), list(wanted.weight.shape)
        level2, whole = path == _LEVEL2[name], list(goal)
        whole[level2] = own[path].numel()
        others = list(goal)
        others[level2] = whole[level2] - goal[level2]
        for wrong, hint in (
            (size == whole, "It has its old size: removing is more than setting to zero, and every linear is cut"),
            (size == others, "`keep` names the units that stay"),
            (level2 and size[0] != goal[0], "Level 2 loses *columns*: its rows belong to the residual stream"),
            (not level2 and size[1] != goal[1], "Level 1 loses *rows*: its columns belong to the residual stream"),
            (size[level2] == n_keep, "`own` has the channels of every unit: keep all of a unit's channels"),
        ):
            expect(size == goal or not wrong, f"{what}: {path}.weight: expected {goal}, found {size}. {hint}")
        expect((found.bias is None) == (wanted.bias is None), f"{what}: {path}: expected the bias as it was before")
        is_linear(f"{what}: {path}", found, *goal[::-1])


def check_ridge_refit(ridge_refit: Callable[[Tensor, Tensor, Tensor, float], Tensor]) -> str:
    """Notebook 11: `ridge_refit(xx, xy, weight, damp)` -> W [d_y, d_x], the damping a share of the mean diagonal."""
    for n, damp in ((40, 0.5), (40, 1e-3), (3, 0.1)):
        x, w, noise, w0 = draw(2, (n, 5), (5, 2), (n, 2), (2, 5))
        x = x + 1.5
        y = x @ w + noise
        xx, xy = x.T @ x, x.T @ y
        lam = damp * xx.diagonal().mean().item()
        right, eye = ridge(x, y, w0, lam), torch.eye(5, dtype=torch.float64)
        inverse = torch.linalg.inv(xx + lam * eye)
        ask(f"ridge_refit, {n} tokens, damp {damp}", ridge_refit, xx, xy, w0, damp).must_be(
            right,
            ((inverse @ xy).T, "This W is pulled toward zero. Solve for the *change* of the weight: X'Y - X'X W0'"),
            (w0 + (inverse @ xy).T, "The change corrects what is *missing*: X'Y - X'X W0', not X'Y"),
            (ridge(x, y, w0, damp), "`damp` is a share: lambda is damp times the mean of the diagonal of X'X"),
            (ridge(x, y, w0, 5 * lam), "That is damp times the trace: take the mean of the diagonal"),
            (ridge(x, y, w0, lam / n), "X'X is a sum over tokens here, and so is lambda: do not divide by n"),
            (2 * w0 - right, "The sign: the change is added to the weight"),
            rtol=1e-6,
        )
    x, w, w0 = draw(3, (30, 4), (3, 4), (3, 4))
    hint = "Already at its targets: the weight has to stay"
    ask("ridge_refit, targets that the weight meets", ridge_refit, x.T @ x, x.T @ x @ w.T, w, 0.1).must_be(w, hint)
    found = ridge_refit(x.T @ x, x.T @ x @ w.T, w0.float(), 0.1)
    expect(found.dtype == torch.float32, f"ridge_refit: expected the dtype of `weight`, float32, found {found.dtype}")
    return "correct: near the targets where the text speaks, near the old weight where it does not"


def check_spend(spend: Callable[[Mapping, Mapping, int, float], Mapping]) -> str:
    """Notebook 11: `spend(prices, sizes, budget, floor)` -> units left; the cheapest per parameter go, if they fit."""
    sizes = {(0, "attention"): 40, (0, "ffn"): 6, (1, "attention"): 40, (1, "ffn"): 6}
    values = draw(4, (4,), (20,), (4,), (20,))
    prices = {key: (1.5 * size * own.abs()) for (key, size), own in zip(sizes.items(), values, strict=True)}
    units = {key: len(own) for key, own in prices.items()}

    def removed(plan: Mapping) -> int:
        return sum((units[key] - left) * sizes[key] for key, left in plan.items())

    def walk(
        budget: int, floor: float, per: Mapping = sizes, over: bool = False, stop: bool = False, up: bool = True
    ) -> dict:
        offers = []
        for key, own in prices.items():
            most = units[key] - max(1, math.ceil(floor * units[key]))
            offers += [(price / per[key], key) for price in sorted(own.tolist(), reverse=not up)[:most]]
        plan, left = dict(units), budget
        for _, key in sorted(offers, reverse=not up):
            if left < (1 if over else sizes[key]):
                if stop:
                    break
                continue
            plan[key], left = plan[key] - 1, left - sizes[key]
        return plan

    plain = dict.fromkeys(sizes, 1)
    for budget, floor in ((0, 0.25), (100, 0.25), (133, 0.25), (200, 0.5), (250, 0.0), (10_000, 0.25)):
        right = walk(budget, floor)
        ask(f"spend, budget {budget}, floor {floor}", spend, prices, sizes, budget, floor).must_be(
            right,
            (lambda plan: plan.keys() != units.keys(), f"Give an entry for each of {sorted(units)}"),
            ({key: units[key] - left for key, left in right.items()}, "Return how many units *stay*"),
            (lambda plan: not all(isinstance(left, int) for left in plan.values()), "Whole numbers (int)"),
            (
                lambda plan, floor=floor: any(left < max(1, floor * units[key]) for key, left in plan.items()),
                "The floor: that share of every module's units stays, and at least one",
            ),
            (walk(budget, floor, up=False), "The cheapest units go, not the dearest"),
            (walk(budget, floor, per=plain), "Compare the price *per parameter*: a KV group is more than a channel"),
            (
                walk(budget, floor, stop=True),
                "A unit that no longer fits is passed over: smaller ones behind it may fit",
            ),
            (
                lambda plan, budget=budget: removed(plan) > budget,
                "Never more than the budget: take only what still fits",
            ),
            (
                lambda plan, right=right: removed(plan) < removed(right),
                "More fits into the budget: go on to the end of the list",
            ),
            "Sort all offers, of all modules, by price per parameter; the cheapest of each module go first",
        )
    return "correct: the budget goes where a parameter costs least, to less than one channel"


@torch.no_grad()
def check_my_prune(my_prune: Callable[..., Mapping]) -> str:
    """Notebook 11: `my_prune(model, tokens, ratio, damp, plan)` prunes in place -> (block, module) -> units left."""
    dense, ratio, damp = _llama(8, 4, 6), 0.3, 1e-3
    tokens = torch.randint(40, (24, 16), generator=torch.Generator().manual_seed(0))
    before, model = tokens.clone(), copy.deepcopy(dense)
    _check_plan("my_prune", my_prune(model, tokens, ratio, damp), model)
    expect(torch.equal(tokens, before), "my_prune: your function changed the tokens; work on copies")
    whole, left = (sum(p.numel() for p in m.model.layers.parameters() if p.ndim > 1) for m in (dense, model))
    expect(left < whole, "my_prune: the model has all its parameters: prune it in place")
    share, unit = 1 - left / whole, 4 * 12 * 24 / whole
    expect(
        abs(share - ratio) <= unit,
        f"my_prune: expected {ratio:.0%} of the parameters to go, to within one unit, found {share:.1%}. Count the "
        "weights of all linears of the blocks, and remove for each unit as many as `sizes` says",
    )
    hooks = sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules())
    expect(hooks == 0, f"my_prune: {hooks} hooks are still there: remove() each when you have read what it saw")
    expect(bool(model(tokens).logits.isfinite().all()), "my_prune: the pruned model puts out NaN or infinity")
    error, best = _last_errors(dense, model, tokens)
    missed = f"my_prune: the last level 2 misses its target by {error:.4g} of its energy; {best:.4g} is possible"
    hint = "Step 2 comes *after* the cut: the units that stay take over the work of those that went"
    expect(error < 1.06 * best, f"{missed}. {hint}")
    hint = "Inputs come from the pruned stream, targets from the dense one, which runs through untouched weights"
    expect(error < 1.003 * best, f"{missed}. {hint}")
    plan = {(0, "attention"): 4, (0, "ffn"): 20, (1, "attention"): 3, (1, "ffn"): 32}
    model = copy.deepcopy(dense)
    found = _check_plan("my_prune with a plan", my_prune(model, tokens, ratio, damp, plan), model)
    compare("my_prune with a plan", found, plan, "A plan that is given replaces the budget")
    return "correct: the right size, and every module repaired behind the pruned ones"


def _check_plan(what: str, plan: Mapping, model: nn.Module) -> dict:
    expect(isinstance(plan, Mapping), f"{what}: expected the plan, a dictionary, found {type(plan).__name__}")
    blocks = enumerate(model.model.layers)
    left = {(i, name): len(own[_LEVEL2[name]]) for i, block in blocks for name, own in _units(block).items()}
    return compare(f"{what}: the plan that it returns, beside what is left in the model", dict(plan), left)


def _last_errors(dense: nn.Module, model: nn.Module, tokens: Tensor) -> tuple[float, float]:
    """Relative error of the last level 2 on what it reads: as it is, and with the least-squares solution.

    Of the dense and the residual target, the one that the weight is nearer to.
    """
    seen: dict[tuple[str, str], Tensor] = {}
    for which, one in (("dense", dense), ("pruned", model)):
        block = one.model.layers[-1]
        handles = [
            block.mlp.down_proj.register_forward_hook(
                lambda _, args, out, which=which: seen.update({(which, "z"): args[0], (which, "y"): out})
            ),
            block.post_attention_layernorm.register_forward_pre_hook(
                lambda _, args, which=which: seen.update({(which, "stream"): args[0]})
            ),
        ]
        one(tokens)
        for handle in handles:
            handle.remove()
    z, y = seen["pruned", "z"].flatten(0, 1), seen["dense", "y"].flatten(0, 1)
    drift = (seen["dense", "stream"] - seen["pruned", "stream"]).flatten(0, 1)
    found = []
    for target in (y, y + drift):
        fitted = z @ torch.linalg.lstsq(z, target).solution
        outputs = seen["pruned", "y"].flatten(0, 1), fitted
        found.append(tuple(((target - out).square().sum() / target.square().sum()).item() for out in outputs))
    return min(found, key=lambda pair: pair[0] / pair[1])
