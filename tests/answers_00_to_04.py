"""Beside the notebooks' solutions: other right answers, and (wrong answer, what the message has to say). 00 to 04."""

import math

import torch
from solutions import after, nb

from greedy_helpers import redundant_heads


def losses(model, tokens):
    logits = model(input_ids=tokens).logits[:, :-1].log_softmax(-1)
    return -logits.gather(-1, tokens[:, 1:, None])[..., 0]


def entropies(x, eps=0.0):
    return -(x * (x + eps).log()).sum(-1) if eps else -torch.special.xlogy(x, x).sum(-1)


def js(p, q, h=entropies):
    return h((p + q) / 2) - (h(p) + h(q)) / 2


def mixed(p, x, v):
    return torch.einsum("hst,td,hcd->shc", p, x, v)  # [seq, heads, dim]


def whole_heads(p, x, v, o):
    return (mixed(p, x, v).transpose(0, 1) @ o.view(len(o), *v.shape[:2]).permute(1, 2, 0)).square().sum(2).mean(1)


def strided_heads(p, x, v, o):
    z = mixed(p, x, v)
    return (z.square().mean(0) * o.square().sum(0).view(z.shape[1:])).flatten().view(-1, len(v)).sum(0)


ANSWERS = {
    "check_perplexity": [
        lambda m, t: math.exp(losses(m, t).double().mean()),
        (lambda m, t: losses(m, t).mean().item(), "perplexity|natural logarithms"),
        (lambda m, t: 2 ** losses(m, t).mean().item(), "natural logarithms"),
        (lambda m, t: (-m(t).logits.log_softmax(-1).gather(-1, t[..., None])).mean().exp().item(), r"token t \+ 1"),
        (lambda m, t: losses(m, t).mean(1).exp().mean().item(), "average the surprise"),
        (lambda m, t: nb.my_perplexity(m, t[:1]), "Every window has 4 targets"),
    ],
    "check_activity": [
        lambda m, s: nb.activity(m, s).float(),
        (lambda m, s: s.level2.mean_square.view(m.n_units, -1).sum(1), "side by side.*the index names"),
        (lambda m, s: s.level2.mean_square[m.level2.index].mean(1), "three heads of two"),
    ],
    "check_fused_layout": [
        lambda h, d: nb.layout_index(h, d).flip(1),
        (lambda h, d: torch.arange(3 * h * d).view(h, -1), "GPT-NeoX's order"),
        (lambda h, d: nb.layout_index(h, d).flip(0), "layout_index"),
    ],
    "check_remove_channels": [
        (lambda *a: None, r"gate\.weight, its shape: expected \[4, 6\], found \[10, 6\]"),
        (after(nb.remove_channels, 0, bias=torch.zeros(10)), r"gate\.bias, its length: expected 4, found 10.*stays"),
        (after(nb.remove_channels, 2, weight=lambda w: w.flip(1)), "in the same order"),
        (after(nb.remove_channels, 0, out_features=10), r"out_features: expected \[6, 4\], found \[6, 10\]"),
    ],
    "check_pieces": [
        lambda c: 7 - 2 * nb.pieces(c),
        (lambda c: torch.zeros(len(c), dtype=torch.long), "shuffled: number of pieces: expected 4, found 1"),
        (lambda c: torch.arange(len(c)) % 4, "who is together with whom"),
        (lambda c: (c.int() @ c.int().T).clamp(max=1).argmax(1), "a chain.*expected 1, found .* repeat"),
    ],
    "check_gated_magnitude": [
        lambda *a: nb.gated_magnitude(*a).float(),
        (lambda *a: nb.gated_magnitude(*a).sqrt(), "asked for squared"),
        (lambda g, u, d: d.square().sum(0), "Level 1 is missing"),
        (lambda g, u, d: g.square().sum(1) + u.square().sum(1), "Level 2 is missing"),
        (lambda g, u, d: nb.gated_magnitude(g, u, d if d.shape[0] != d.shape[1] else d.T), "channel j is its column j"),
    ],
    "check_unit_energy": [
        (lambda z, b, i: nb.unit_energy(z, b, i) * len(z), "the sum over tokens"),
        (lambda z, b, i: nb.unit_energy(z, b, i) / len(b), "Sum over the output's dimensions"),
        (lambda z, b, i: (z.square().mean(0) * b.square().sum(0))[i].sum(1), "first add up, then square"),
        (lambda z, b, i: nb.unit_energy(z, b, torch.arange(i.numel()).view(i.shape)), "need not be neighbours"),
    ],
    "check_purposes": [
        ({}, "not answered yet: L2 magnitude"),
        (nb.purposes | {"OSSCAR": "objective"}, "of which function"),
        (nb.purposes | {"FLAP": "weights"}, "expected 'function', 'output', 'objective' or 'none', found 'weights'"),
        (nb.purposes | {"SparseGPT": "output"}, "was not asked"),
        (nb.purposes | {"Wanda-sp": "function"}, "no loss anywhere, but activations"),
    ],
    "check_fool_magnitude": [
        (lambda *a: -nb.fool_magnitude(*a), "positive, finite scales"),
        (lambda *a: 1e-320 * nb.fool_magnitude(*a), "so extreme that rounding shows"),
        (lambda g, u, d, o: torch.ones(len(o)), "L2's order"),
        (lambda g, u, d, o: nb.fool_magnitude(g, u, d, o.flip(0)), "targets above everybody's minimum"),
        (lambda g, u, d, o: nb.fool_magnitude(g, u, d, o.argsort()), "L2's order"),
    ],
    "check_js_rows": [
        lambda p, q: js(p.double(), q.double()),
        (lambda p, q: js(p, q) / math.log(2), "These are bits"),
        (lambda p, q: js(p, q).sqrt(), "the root"),
        (lambda p, q: js(q, p, lambda x: -entropies(x)), "The sign is wrong"),
        (lambda p, q: 2 * js(p, q), "Twice too large"),
        (lambda p, q: js(p, q, lambda x: -(x * x.log()).sum(-1)), "NaN: 0 log 0 counts as 0"),
        (lambda p, q: js(p, q, lambda x: entropies(x, 1e-6)), "exactly ln 2 .* inside the logarithm"),
    ],
    "check_with_living_twin": [
        lambda d, t: torch.tensor(list(nb.with_living_twin(d, t))),
        lambda d, t: set(nb.with_living_twin(d, t)),
        (lambda d, t: [9], r"expected distinct heads in \[0, 5\), found \[9\]"),
        (lambda d, t: [0, 0], "expected distinct heads"),
        (redundant_heads, r"a chain: removed \[0, 1, 2, 3\], but head \[0\] has no similar head left"),
        (lambda d, t: [], r"a chain: removed \[\]; head \[0\] could go as well"),
        (lambda d, t: list(nb.with_living_twin(d, t))[:1], "could go as well"),
        (lambda d, t: (d < t).nonzero()[:, 0].unique().tolist(), "has no similar head left"),
    ],
    "check_group_divergence": [
        lambda d, g: nb.group_divergence(d.double(), g),
        (lambda d, g: d.reshape(g, -1, g, 6 // g).mean((0, 2)).fill_diagonal_(0), "Heads 0, 3, ... were taken"),
        (lambda d, g: nb.group_divergence(d, g) * g * g, "These are sums"),
        (lambda d, g: d.reshape(6 // g, g, -1, g).mean((1, 3)), "group=2.*Zeros on the diagonal"),
        (lambda d, g: d[::g, ::g], "group=2: expected \n"),
    ],
    "check_gated_scores": [
        lambda *a: nb.gated_scores(*a).float(),
        (lambda g, u, b, s: nb.gated_scores(g, u, b, s) * b.square().sum(0), "enters once here, not twice"),
        (lambda g, u, b, s: nb.gated_scores(g, u, b, s) / b.norm(dim=0), "norm enters squared"),
        (lambda g, u, b, s: b.square().sum(0) * ((u @ s) * u).sum(1), "The gate path is missing"),
        (lambda g, u, b, s: b.square().sum(0) * ((g @ s) * g).sum(1), "The up path is missing"),
        (lambda g, u, b, s: b.square().sum(0) * u.square().sum(1) * g.square().sum(1), "Sigma is missing"),
        (lambda g, u, b, s: nb.gated_scores(g, u, b, s.diag().diag()), "Only the diagonal"),
        (lambda g, u, b, s: nb.gated_scores(g, u, b if len(b) != len(b.T) else b.T, s), r"\*column\* j of B"),
    ],
    "check_set_cost": [
        lambda *a: torch.tensor(nb.set_cost(*a)),
        (lambda a, b, s, g: sum(nb.set_cost(a, b, s, [j]) for j in g), "sum of the single scores"),
        (lambda a, b, s, g: nb.set_cost(a, b, s, g) if g else 1.0, "nothing removed: expected 0, found 1"),
        (lambda a, b, s, g: nb.set_cost(a, b, s, g) + (len(a) == 7), "cancel exactly: expected 0"),
    ],
    "check_head_scores": [
        (lambda p, x, *a: nb.head_scores(torch.eye(len(x)).double().expand_as(p), x, *a), r"the \*mixed\* input"),
        (whole_heads, "cross terms included"),
        (strided_heads, "consecutive: head 0 owns"),
    ],
    "check_standard_error": [
        lambda v: (v.mean(), torch.tensor(nb.standard_error(v)[1])),
        (lambda v: v.mean(), r"expected \(mean, standard error\), found Tensor"),
        (lambda v: (v.sum(), nb.standard_error(v)[1]), "mean: expected"),
        (lambda v: (v.mean(), v.std(correction=0) / v.numel() ** 0.5), "windows are independent"),
        (lambda v: (v.mean(), v.mean(1).std()), "spread between windows"),
        (lambda v: (v.mean(), v.mean(1).std(correction=0) / len(v) ** 0.5), "windows - 1"),
        (lambda v: (v.mean(), 2 * nb.standard_error(v)[1]), "standard error: expected"),
        (lambda v: (v.mean(), nb.standard_error(v)[1] + (v.std() == 0)), "constant values: expected 0, found 1"),
    ],
}
