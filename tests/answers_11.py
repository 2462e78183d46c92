"""Beside the notebooks' solutions: other right answers, and (wrong answer, what the message has to say). 11."""

import copy
import math

import torch
from solutions import nb
from torch import nn

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")


def units_by(rows):
    """An answer for task 1 from rows(block, path, rows of the right answer) -> other rows, of attention."""

    def answer(block):
        found = nb.units_of(block)
        return found | {"attention": {path: rows(block, path, right) for path, right in found["attention"].items()}}

    return answer


def spread_queries(block, path, right):
    """As if query head h read KV head h mod n_kv."""
    every, dim = torch.arange(right.numel()), block.self_attn.head_dim
    return every.view(-1, len(right), dim).transpose(0, 1).flatten(1)


def by_config(block):
    config, dim = block.self_attn.config, block.self_attn.head_dim
    kv = config.num_key_value_heads
    queries = torch.arange(config.num_attention_heads * dim).view(kv, -1)
    keys = torch.arange(kv * dim).view(kv, -1)
    channel = torch.arange(config.intermediate_size)[:, None]
    ffn = dict.fromkeys(("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"), channel)
    return {"attention": dict(zip(ATTENTION, (queries, keys, keys, queries), strict=True)), "ffn": ffn}


def dim_by_width(block, path, right):
    dim = 24 // block.self_attn.config.num_attention_heads
    return torch.arange(right.numel()).view(-1, dim)


def flat_channels(block):
    found = nb.units_of(block)
    return found | {"ffn": {path: channels[:, 0] for path, channels in found["ffn"].items()}}


def in_blocks(x, y):
    return x.flatten(0, 1).double(), y.flatten(0, 1).double()


def moments_by(change):
    """An answer for task 2 from change(xx, xy, n) -> another triple."""
    return lambda batches: change(*nb.moments_of(list(batches)))


def centred(batches):
    x, y = (torch.cat([part.flatten(0, 1).double() for part in side]) for side in zip(*batches, strict=True))
    return (x - x.mean(0)).T @ (x - x.mean(0)), (x - x.mean(0)).T @ (y - y.mean(0)), len(x)


def averaged(batches):
    sums = [(x.T @ x / len(x), x.T @ y / len(x), len(x)) for x, y in (in_blocks(*batch) for batch in batches)]
    return tuple(sum(part) for part in zip(*sums, strict=True))


def in_single(batches):
    xx = xy = n = 0
    for x, y in batches:
        x, y = x.flatten(0, 1), y.flatten(0, 1)
        xx, xy, n = xx + x.T @ x, xy + x.T @ y, n + len(x)
    return xx, xy, n


def per_unit(values, columns):
    return values[columns].sum(1)


def unit_by_unit(xx, n, weight, columns):
    return torch.stack([torch.trace(weight[:, u] @ xx[u][:, u] @ weight[:, u].T) / n for u in columns])


def rows_scores(xx, n, weight, columns):
    return torch.stack([torch.trace(weight[u] @ weight[u].T @ xx[u][:, u]) for u in columns]) / n


def cut_with(**changes):
    """The solution of task 4 with other channels, `rows(own, keep)`, or what `after(block, own)` does to the result."""

    def answer(block, own, keep):
        own, keep = changes.get("given", lambda own, keep: (own, keep))(own, keep)
        nb.cut_units(block, own, keep)
        changes.get("after", lambda block, own: None)(block, own)

    return answer


def zeroed(block, own, keep):
    level2 = block.get_submodule(list(own)[-1])
    gone = [unit for unit in range(len(own[list(own)[-1]])) if unit not in keep.tolist()]
    with torch.no_grad():
        level2.weight[:, own[list(own)[-1]][gone].flatten()] = 0


def level2_by_rows(block, own, keep):
    *_, level2 = own
    rows = block.get_submodule(level2).weight[: 2 * len(keep)]
    nb.cut_units(block, own, keep)
    block.get_submodule(level2).weight = nn.Parameter(rows.detach())


def others(own, keep):
    return own, torch.tensor([unit for unit in range(len(next(iter(own.values())))) if unit not in keep])


def first_channels(own, keep):
    return {path: channels[:, :1] for path, channels in own.items()}, keep


def first_forgotten(own, keep):
    return dict(list(own.items())[1:]), keep


def by_parameter(block, own, keep):
    with torch.no_grad():
        for path, channels in own.items():
            linear, stay = block.get_submodule(path), channels[keep].flatten()
            if path == list(own)[-1]:
                linear.weight, linear.in_features = nn.Parameter(linear.weight[:, stay]), len(stay)
            else:
                linear.weight, linear.out_features = nn.Parameter(linear.weight[stay]), len(stay)
                linear.bias = linear.bias if linear.bias is None else nn.Parameter(linear.bias[stay])


def forget_bias(block, own):
    for path in own:
        block.get_submodule(path).bias = None


def long_bias(block, own):
    for path in own:
        linear = block.get_submodule(path)
        if linear.bias is not None:
            linear.bias = nn.Parameter(torch.zeros(linear.out_features + 1).to(linear.weight))


def stale(block, own):
    for path in own:
        block.get_submodule(path).out_features = 99


def shuffled(block, own):
    linear = block.get_submodule(next(iter(own)))
    linear.weight = nn.Parameter(linear.weight.flip(0))


def frozen(block, own):
    block.get_submodule(next(iter(own))).weight.requires_grad_(False)


def inverse(xx, lam):
    return torch.linalg.inv(xx + lam * torch.eye(len(xx)).to(xx))


def share(xx, damp):
    return damp * xx.diagonal().mean()


def spend_with(*, per=True, over=False, stop=False, up=True, least=None, sort=True):
    """An answer for task 6 with some rules changed."""

    def answer(prices, sizes, budget, floor):
        offers = []
        for key, own in prices.items():
            most = len(own) - (least if least is not None else max(1, math.ceil(floor * len(own))))
            own = sorted(own.tolist(), reverse=not up) if sort else own.tolist()
            offers += [(price / (sizes[key] if per else 1), key) for price in own[:most]]
        left, rest = {key: len(own) for key, own in prices.items()}, budget
        for _, key in sorted(offers, reverse=not up):
            if rest < (1 if over else sizes[key]):
                if stop:
                    break
                continue
            left[key], rest = left[key] - 1, rest - sizes[key]
        return left

    return answer


def how_many_go(prices, *rest):
    return {key: len(prices[key]) - left for key, left in nb.spend(prices, *rest).items()}


def changed(**replaced):
    """`my_prune` with other functions in the place of those that it calls."""

    def answer(*arguments):
        own = nb.my_prune.__wrapped__.__globals__  # inside torch.no_grad()
        before = {name: own[name] for name in replaced}
        own.update(replaced)
        try:
            return nb.my_prune(*arguments)
        finally:
            own.update(before)

    return answer


def on_a_copy(model, *arguments):
    return nb.my_prune(copy.deepcopy(model), *arguments)


def nothing(model, *arguments):
    return {
        (i, n): len(own[list(own)[-1]]) for i, b in enumerate(model.model.layers) for n, own in nb.units_of(b).items()
    }


def keeps_hooks(model, *arguments):
    plan = nb.my_prune(model, *arguments)
    model.model.layers[0].register_forward_hook(lambda *_: None)
    return plan


def breaks(model, *arguments):
    plan = nb.my_prune(model, *arguments)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(math.nan)
    return plan


class Copies:
    """In the place of the module `copy`: the dense stream runs through the block that is being pruned."""

    deepcopy = staticmethod(lambda block: block)


def no_repair(model, *arguments):
    return changed(ridge_refit=lambda xx, xy, weight, damp: weight)(model, *arguments)


def twice_the_budget(prices, sizes, budget, floor):
    return nb.spend(prices, sizes, 2 * budget, floor)


ANSWERS = {
    "check_units_of": [
        (units_by(lambda block, path, right: right.flatten().view(-1, block.self_attn.head_dim)), "all. query heads"),
        (units_by(spread_queries), "Consecutive"),
        (units_by(lambda block, path, right: right.flatten().view(right.shape[1], -1).T), "lie side by side"),
        (units_by(dim_by_width), "need not be the width"),
        (by_config, "read them off the weights"),
        (flat_channels, r"\[n_units, 1\]"),
        (lambda block: nb.units_of(block)["attention"], "its keys"),
        (lambda block: {name: list(own.values()) for name, own in nb.units_of(block).items()}, "expected a dictionary"),
        (units_by(lambda block, path, right: right.double()), "expected dtype torch.int64"),
    ],
    "check_moments_of": [
        lambda batches: nb.moments_of((x, y) for x, y in batches),
        (lambda batches: nb.moments_of(list(batches)[-1:]), "last batch alone"),
        (moments_by(lambda xx, xy, n: (xx / n, xy / n, n)), "mean over tokens"),
        (averaged, "Every batch was averaged"),
        (centred, "centred"),
        (in_single, "single precision"),
        (lambda batches: (*nb.moments_of(batches)[:2], sum(len(x) for x, _ in batches)), "Count tokens"),
        (lambda batches: (*nb.moments_of(batches)[:2], len(list(batches))), "Count tokens"),
        (moments_by(lambda xx, xy, n: (xx, xy.T, n)), "expected shape"),
        (moments_by(lambda xx, xy, n: (xx, n)), "expected .X'X, X'Y, n."),
        (lambda batches: nb.moments_of(batches[i] for i in range(len(batches))), "for. loop"),
    ],
    "check_energy_scores": [
        unit_by_unit,
        (lambda xx, n, weight, columns: n * nb.energy_scores(xx, n, weight, columns), "divide by n"),
        (lambda *a: nb.energy_scores(*a).sqrt(), "no root"),
        (lambda xx, n, weight, columns: per_unit(weight.square().sum(0), columns), "what the channels carry counts"),
        (lambda xx, n, weight, columns: per_unit(xx.diagonal() / n, columns), "before level 2"),
        (rows_scores, "column"),
        (
            lambda xx, n, weight, columns: per_unit(weight.square().sum(0) * xx.diagonal() / n, columns),
            "added before they are squared",
        ),
        (lambda *a: nb.energy_scores(*a)[:, None], "expected shape"),
    ],
    "check_cut_units": [
        by_parameter,
        (zeroed, "removing is more than setting to zero"),
        (cut_with(given=others), "units that stay"),
        (level2_by_rows, "Level 2 loses .columns"),
        (cut_with(given=first_channels), "all of a unit"),
        (cut_with(given=first_forgotten), "every linear is cut"),
        (cut_with(given=lambda own, keep: (own, keep - 1)), "Other channels stayed"),
        (cut_with(after=shuffled), "Other channels stayed"),
        (cut_with(after=forget_bias), "the bias as it was"),
        (cut_with(after=long_bias), "biases along"),
        (cut_with(after=stale), "in_features and out_features"),
        (cut_with(after=frozen), "without requires_grad"),
    ],
    "check_ridge_refit": [
        lambda xx, xy, weight, damp: weight + ((xy.T - weight.to(xx) @ xx) @ inverse(xx, share(xx, damp))).to(weight),
        (lambda xx, xy, weight, damp: (inverse(xx, share(xx, damp)) @ xy).T.to(weight), "toward zero"),
        (lambda xx, xy, weight, damp: weight + (inverse(xx, share(xx, damp)) @ xy).T.to(weight), "what is .missing"),
        (lambda xx, xy, weight, damp: nb.ridge_refit(xx, xy, weight, damp / xx.diagonal().mean()), "`damp` is a share"),
        (lambda xx, xy, weight, damp: nb.ridge_refit(xx, xy, weight, damp * len(xx)), "the trace"),
        (lambda xx, xy, weight, damp: nb.ridge_refit(xx, xy, weight, damp / 40), "do not divide by n"),
        (lambda xx, xy, weight, damp: 2 * weight - nb.ridge_refit(xx, xy, weight, damp), "The sign"),
        (lambda *a: nb.ridge_refit(*a).T, "expected shape"),
        (lambda *a: nb.ridge_refit(*a).double(), "the dtype of `weight`"),
    ],
    "check_spend": [
        spend_with(),
        (lambda *a: dict(list(nb.spend(*a).items())[1:]), "entry for each"),
        (how_many_go, "how many units .stay"),
        (lambda *a: {key: float(left) + 0.5 for key, left in nb.spend(*a).items()}, "Whole numbers"),
        (spend_with(least=1), "The floor"),
        (spend_with(least=0), "The floor"),
        (spend_with(up=False), "not the dearest"),
        (spend_with(per=False), "per parameter"),
        (spend_with(stop=True), "passed over"),
        (spend_with(over=True), "Never more than the budget"),
        (lambda prices, sizes, budget, floor: nb.spend(prices, sizes, budget // 2, floor), "More fits"),
        (spend_with(sort=False), "Sort all offers"),
        (lambda *a: list(nb.spend(*a).values()), "expected dict"),
    ],
    "check_my_prune": [
        (lambda *a: None, "found NoneType"),
        (on_a_copy, "beside what is left in the model"),
        (nothing, "prune it in place"),
        (changed(spend=twice_the_budget), "30% of the parameters"),
        (keeps_hooks, "1 hooks are still there"),
        (breaks, "NaN or infinity"),
        (no_repair, "after. the cut"),
        (changed(copy=Copies), "untouched weights"),
        (lambda model, tokens, ratio, damp, plan=None: nb.my_prune(model, tokens, ratio, damp), "replaces the budget"),
    ],
}  # fmt: skip
