"""Beside the notebooks' solutions: other right answers, and (wrong answer, what the message has to say). 05 to 10."""

import math

import torch
from solutions import after, nb


def macs(d, heads, dim, width, seq, attention=1.0):
    return int(seq * (4 * d * heads * dim + 3 * d * width) + attention * 2 * seq * seq * heads * dim)


def by_rounds(prices, parameters, budget, order=sorted):
    """One unit after the other, without a list of all."""
    left, removed = {name: order(own)[::-1] for name, own in prices.items()}, 0
    while removed < budget:
        open_to_all = [name for name, own in left.items() if len(own) > 1]
        if not open_to_all:
            raise ValueError("too much")
        name = min(open_to_all, key=lambda name: left[name][-1] / parameters[name])
        left[name].pop()
        removed += parameters[name]
    return {name: len(own) for name, own in left.items()}


def damped(read, target, w0, damp):
    return nb.ridge_toward(read, target, w0, damp * read.square().sum() / read.shape[1])


def level_2(x, x_hat, w1, w2, act, damp, again=True, local=False):
    """The second step without a second pass, or to what the module gave on x_hat."""
    new = damped(x_hat, x @ w1.T, w1, damp)
    z, z_old = act(x_hat @ (new if again else w1).T), act((x_hat if local else x) @ w1.T)
    return damped(z, z_old @ w2.T, w2, damp)


def runs(windows, run):
    return [tuple(r) for r in windows.unfold(1, run, 1).reshape(-1, run).tolist()]


def resampled(nats, targets, statistic=lambda x, t: x.sum(1) / t.sum(1), n=2000):
    draws = torch.randint(len(nats), (n, len(nats)), generator=torch.Generator().manual_seed(7))
    return statistic(nats[draws], targets[draws]).std().item()


def counts(a, b):
    return int((a & ~b).sum()), int((b & ~a).sum())


def p_value(b, c, sides=2):
    return sides * sum(math.comb(b + c, k) for k in range(min(b, c) + 1)) / 2 ** (b + c)


def rest_of(b, g):
    return [c for c in range(b.shape[1]) if c not in g.tolist()]


def part(inverse, b, g):
    return inverse[rest_of(b, g)][:, rest_of(b, g)], b[:, rest_of(b, g)]


def diagonal(inverse, b, g):
    return nb.downdate(inverse, b, g)[0], (b - b[:, g] / inverse[g, g] @ inverse[g])[:, rest_of(b, g)]


def one_shot(h, b, n_keep):
    cost = b.square().sum(0) / torch.linalg.inv(h).diagonal()
    return torch.sort(cost.argsort(descending=True)[:n_keep]).values


def one_pass(prices):
    prices = list(prices)
    for i in range(len(prices) - 1):
        if prices[i] > prices[i + 1]:
            prices[i] = prices[i + 1] = (prices[i] + prices[i + 1]) / 2
    return prices


def weights(config, kv=None, dim=None, matrices=3, norms=2):
    d, h = config.hidden_size, config.num_attention_heads
    kv, dim = kv or config.num_key_value_heads, dim or config.head_dim
    return 2 * d * h * dim + 2 * d * kv * dim + matrices * d * config.intermediate_size + norms * d


def without_a_message(*arguments):
    try:
        return nb.micro_batch(*arguments)
    except ValueError:
        raise ValueError from None


ANSWERS = {
    "check_head_parameters": [
        (lambda *a: nb.head_parameters(*a) + a[3] * a[0], "bias of o_proj belongs to the residual stream"),
        (lambda d, dim, g, b: nb.head_parameters(d, dim, g, False), "take their biases along"),
        (lambda d, dim, g, b: nb.head_parameters(d, dim, 1, b), "with all of its 3 query heads"),
    ],
    "check_remove_heads": [
        (lambda *a: None, r"q\.weight, its shape: expected \[6, 6\], found \[8, 6\]"),
        (after(nb.remove_heads, 0, bias=torch.zeros(8)), r"q\.bias, its length: expected 6, found 8"),
        (after(nb.remove_heads, 0, weight=lambda w: w.flip(0)), "heads that stay.*consecutive channels"),
        (after(nb.remove_heads, 0, out_features=8), r"in_features and out_features: expected \[6, 6\], found \[6, 8\]"),
        (after(nb.remove_heads, 3, bias=torch.zeros(6)), "o.bias, which belongs to the outputs"),
        (lambda *a: nb.remove_heads(*a) or a[4].clear(), "changed the list of heads"),
    ],
    "check_plan_by_price": [
        by_rounds,
        (lambda *a: {"ffn 0": 3}, "Give an entry for each of"),
        (lambda p, *_: dict.fromkeys(p, 0), "A module keeps a unit at least"),
        (lambda p, *_: {n: len(p[n]) for n in p}, "budget 1: .*Go on until the budget is reached"),
        (lambda p, c, b: nb.plan_by_price(p, c, b // 2), "Go on until the budget is reached"),
        (lambda p, c, b: nb.plan_by_price({n: [x * c[n] for x in p[n]] for n in p}, c, b), "per parameter"),
        (lambda *a: by_rounds(*a, order=list), "The lists are in no order"),
        (lambda p, c, b: nb.plan_by_price(p, c, min(b + 30, 244)), "budget 0: .*Stop as soon as"),
        (lambda p, c, b: nb.plan_by_price(p, c, min(b, 244)), "expected a ValueError, found"),
    ],
    "check_block_macs": [
        (lambda *a: 2 * macs(*a), "floating point operations"),
        (lambda *a: macs(*a, attention=0), "two products of attention"),
        (lambda *a: macs(*a) // a[-1], "Count all 5 tokens"),
        (lambda *a: macs(*a, attention=1 / a[-1]), "Count all 5 tokens"),
        (lambda *a: macs(*a, attention=a[0] / a[1] / a[2]), r"heads \* dim wide, not d"),
    ],
    "check_ridge_toward": [
        (lambda x, y, w0, lam: nb.ridge_toward(x, y, 0 * w0, lam), "pulled toward zero"),
        (lambda x, y, w0, lam: nb.ridge_toward(x, y, w0, lam / 2), "40 tokens, lam = 3.0.*least squares"),
        (lambda x, y, w0, lam: nb.ridge_toward(x, y, w0, lam) + (x == 0).all(), "teach nothing"),
    ],
    "check_two_steps": [
        lambda *a: list(nb.two_steps(*a)),
        (lambda *a: nb.two_steps(*a)[0], r"expected \(new w1, new w2\), found Tensor"),
        (lambda x, h, w1, w2, f, d: (w1, nb.two_steps(x, h, w1, w2, f, d)[1]), "Level 1 did not move"),
        (lambda x, h, w1, w2, f, d: (damped(h, x @ w1.T, 0 * w1, d), w2), "not toward zero"),
        (lambda x, h, w1, w2, f, d: (nb.ridge_toward(h, x @ w1.T, w1, d), w2), "times the mean diagonal"),
        (lambda x, h, w1, w2, f, d: (nb.two_steps(x, h, w1, w2, f, d)[0], w2), "Level 2 did not move"),
        (lambda *a: (nb.two_steps(*a)[0], level_2(*a, again=False)), "Run again"),
        (lambda *a: (nb.two_steps(*a)[0], level_2(*a, local=True)), "from x and the old weights"),
    ],
    "check_error_from_moments": [
        lambda *a: float(nb.error_from_moments(*a)),
        (lambda *a: nb.error_from_moments(*a) * a[0], r"one number, found shape \[6, 6\]"),
        (lambda *a: nb.error_from_moments(*a) * a[2], "divide by the energy"),
        (lambda *a: nb.error_from_moments(*a) ** 0.5, "no root"),
        (lambda xx, xy, yy, w: nb.error_from_moments(xx, xy, yy, w) + (w.T * xy).sum() / yy, "stands there twice"),
        (lambda *a: max(float(nb.error_from_moments(*a)), 1e-3), "meets exactly: expected 0, found 0.001"),
    ],
    "check_centred_solve": [
        (lambda *a: nb.centred_solve(*a)[0], r"expected \(W, b\), found Tensor"),
        (lambda n, xx, xy, x, y, *a: (nb.centred_solve(n, xx, xy, 0 * x, 0 * y, *a)[0], y / n), "Centre first"),
        (lambda *a: nb.centred_solve(*a[:5], 0 * a[5], a[6]), "lam = 2: W: expected"),
        (lambda *a: (nb.centred_solve(*a)[0], a[4] - nb.centred_solve(*a)[0] @ a[3]), "means, not sums"),
    ],
    "check_nucleus": [
        lambda x, p: nb.nucleus(x, p).float(),
        (lambda x, p: nb.nucleus(x, p) * 0.9, "expected"),
        (lambda x, p: x.softmax(-1) * (nb.nucleus(x, p) > 0), "add up to 1 again"),
        (lambda x, p: nb.nucleus(x, p).sort(dim=-1, descending=True).values, "order of the vocabulary"),
        (lambda x, p: nb.nucleus(x, p / 2), "with which p is reached"),
        (lambda x, p: x.softmax(-1), "as few tokens as possible"),
    ],
    "check_shared_runs": [
        (lambda a, b, n: sum(r in runs(a, n) for r in runs(b, n)) / len(runs(b, n)), "repeated runs count once"),
        (lambda a, b, n: nb.shared_runs(a.reshape(1, -1), b.reshape(1, -1), n), "expected"),
        (lambda a, b, n: nb.shared_runs(b, a, n), "expected"),
    ],
    "check_bits_per_byte": [
        (lambda x, t: nb.bits_per_byte(x, t) * math.log(2), "These are nats"),
        (lambda x, t: nb.bits_per_byte(x, t) * math.log(2) ** 2, "do not multiply"),
        (lambda x, t: nb.bits_per_byte(x, t) / len(x), "expected the sum"),
        (lambda x, t: x.mean().item() / math.log(2), "bits per token"),
        (lambda x, t: x.sum().item() / math.log(2) / len(t), "bits per character"),
        (lambda x, t: 1.0, "expected 0.721348, found 1$"),
    ],
    "check_bootstrap_error": [
        (lambda x, t: (x / t).std().item(), "spread of single documents"),
        (lambda x, t: resampled(x, t) / t.double().mean().sqrt().item(), "draw documents"),
        (lambda x, t: resampled(x, t, lambda drawn, _: drawn.sum(1) / t.sum()), "not by a fixed number"),
        (lambda x, t: resampled(x, t, lambda x, t: (x / t).mean(1)), "Every document counted alike"),
        (lambda x, t: 1e-9, "expected .* found 1e-09$"),
        (lambda x, t: -1.0, "positive"),
        (lambda x, t: resampled(x, t) + (len(x) != 40) * 0.2, "no doubt"),
    ],
    "check_mcnemar": [
        (lambda a, b: nb.mcnemar(a, b)[2], r"expected \(only a, only b, p\)"),
        (lambda a, b: (int(a.sum()), int(b.sum()), 0.5), "all right answers"),
        (lambda a, b: (*counts(b, a), 0.5), "the counts: expected"),
        (lambda a, b: (*counts(a, b), p_value(*counts(a, b), sides=1)), "one-sided"),
        (lambda a, b: (*counts(a, b), p_value(*counts(a, b))), "no probability"),
        (lambda a, b: (*counts(a, b), 0.5), "p: expected"),
    ],
    "check_comparable": [
        (lambda a, b: True, "expected False: another model"),
        (lambda a, b: a == b, "expected True: methods"),
        (lambda a, b: nb.comparable(a, b) or a["stride"] != b["stride"], "more context"),
        (lambda a, b: nb.comparable(a, b) and a["tokenizer"] == b["tokenizer"], "do not depend on the tokenizer"),
        (lambda a, b: nb.comparable(a, b) and a["blocks left"] == b["blocks left"], "within half a percentage point"),
        (lambda a, b: nb.comparable(a, b) and a["calibration"] == b["calibration"], "as many calibration tokens"),
        (lambda a, b: nb.comparable(a, b | {"calibration text": a["calibration text"]}), "text it is judged on"),
        (lambda a, b: nb.comparable(a, b) and bool(a["calibration"]) == bool(b["calibration"]), "nothing away"),
    ],
    "check_downdate": [
        (lambda *a: a[0], r"expected \(new inverse, B\), found Tensor"),
        (part, "the part of the inverse"),
        (lambda *a: (nb.downdate(*a)[0], part(*a)[1]), "did not move"),
        (diagonal, "do not divide by its diagonal"),
    ],
    "check_residual_refit": [
        (lambda z, y, x, x_hat, w0, lam: nb.residual_refit(z, y, x, x, w0, lam), "only imitates"),
        (lambda z, y, x, x_hat, w0, lam: nb.residual_refit(z, y, x_hat, x, w0, lam), "The sign"),
        (lambda z, y, x, x_hat, w0, lam: nb.residual_refit(z, y, x, x_hat, 0 * w0, lam), "pulls toward zero"),
    ],
    "check_greedy_keep": [
        (lambda *a: nb.greedy_keep(*a).flip(0), "Give sorted"),
        (lambda h, b, n: torch.arange(n), "solving again after every removal"),
        (one_shot, "after each removal the costs change"),
    ],
    "check_rising_prices": [
        lambda prices: torch.tensor(nb.rising_prices(prices), dtype=torch.float64),
        (lambda prices: [max(prices[: i + 1]) for i in range(len(prices))], "average, do not clip"),
        (one_pass, "look back"),
        (lambda prices: [sum(prices) / len(prices)] * len(prices) if prices else [], "Average only where"),
    ],
    "check_block_bytes": [
        (lambda c, s: weights(c), "not bytes"),
        (lambda c, s: s * weights(c) * c.num_hidden_layers, "all blocks"),
        (lambda c, s: s * weights(c, norms=0), "two norms"),
        (lambda c, s: s * weights(c, matrices=2), "three matrices"),
        (lambda c, s: s * weights(c, kv=c.num_attention_heads), "grouped-query attention.*fewer than the queries"),
        (lambda c, s: s * weights(c, dim=c.hidden_size // c.num_attention_heads), "config.head_dim"),
        (lambda c, s: 7, "expected .*, found 7"),
    ],
    "check_merge": [
        (lambda parts: nb.merge(parts)[1:], r"expected \(n, mean, second\)"),
        (lambda parts: (0, *nb.merge(parts)[1:]), "number of tokens: expected 20, found 0"),
        (lambda p: (20, sum(q[1] for q in p) / len(p), nb.merge(p)[2]), "unequal shares.*a larger share weighs more"),
        (lambda p: (20, nb.merge(p)[1] * 20, nb.merge(p)[2]), "sum over the tokens"),
        (lambda p: (20, nb.merge(p)[1] + 1, nb.merge(p)[2]), "mean: expected"),
        (
            lambda p: (20, nb.merge(p)[1], nb.merge(p)[2] - nb.merge(p)[1].outer(nb.merge(p)[1])),
            "This is the covariance",
        ),
        (lambda p: (20, nb.merge(p)[1], sum(q[2] for q in p) / len(p)), "unequal shares: second, the mean of x x'"),
    ],
    "check_micro_batch": [
        (lambda *a: 0, "at least one window"),
        (lambda free, fixed, each, n: int((free - fixed) / each), "no power of two"),
        (lambda free, fixed, each, n: nb.micro_batch(free, 0, each, n), "more than is free"),
        (lambda free, fixed, each, n: nb.micro_batch(free, fixed, each, 10**6), "only 6 windows"),
        (lambda free, fixed, each, n: nb.micro_batch(free - 1e-9, fixed, each, n), "A larger batch fits"),
        (lambda *a: 1, "A larger batch fits"),
        (without_a_message, "has to say"),
        (lambda *a: nb.micro_batch(*a) if a[0] != 4.5 else 0, "expected a ValueError, found 0"),
    ],
    "check_channel_energy": [
        lambda batches: torch.cat(list(batches)).double().square().sum(0),
        (lambda batches: sum(b.square().sum(0) for b in batches), "The sum needs 64 bits"),
        (lambda batches: sum(b.square().double().sum(0) for b in batches), "before you square"),
        (lambda batches: sum(b.double().square().sum(0).half() for b in batches).double(), "rounded to 16 bits"),
        (lambda batches: nb.channel_energy(batches) / sum(map(len, batches)), "This is the mean"),
        (lambda batches: nb.channel_energy(batches).sqrt(), "This is the norm"),
        (lambda batches: nb.channel_energy(batches).float(), "The sum needs 64 bits"),
        (lambda batches: nb.channel_energy(batches).sum(), r"expected shape \[4\]"),
    ],
}
