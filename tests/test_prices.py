"""Prices in nats against brute force: the metric, what an error does to the loss, what a removal costs."""

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_untouched, state_of
from tiny import CONFIGS, tiny_model

import greedy_helpers as gh
from greedy_helpers import prices, pruning
from greedy_helpers.allocation import asked_parameters
from greedy_helpers.criteria import Seen
from greedy_helpers.greedy import exact_greedy
from greedy_helpers.measure import ModulePasses
from greedy_helpers.prices import loss_metric, output_fisher
from greedy_helpers.pruning import loss_prices
from greedy_helpers.recipes import Recipe
from greedy_helpers.stream import BlockStream

NAMES = ["llama-gqa", "gpt2"]


def few_tokens(n=2, seq=6):
    return torch.randint(32, (n, seq), generator=torch.Generator().manual_seed(3))


def with_outputs(model, tokens):
    """Logits, and every module's output as a part of the graph."""
    outputs = {}
    hooks = [
        module.level2.linear.register_forward_hook(lambda m, a, out, name=module.name: outputs.update({name: out}))
        for module in gh.depth2_modules(model)
    ]
    logits = model(input_ids=tokens).logits
    for hook in hooks:
        hook.remove()
    return logits, outputs


def fisher_by_enumeration(model, tokens):
    """E[g g'] with the expectation over labels taken as a sum over the vocabulary: module -> [windows, seq, d, d]."""
    logits, outputs = with_outputs(model, tokens)
    logp = logits.log_softmax(-1)
    exact = {name: torch.zeros(*out.shape, out.shape[-1]) for name, out in outputs.items()}
    for place in range(tokens.shape[1]):
        for label in range(logp.shape[-1]):
            gradients = torch.autograd.grad(logp[:, place, label].sum(), list(outputs.values()), retain_graph=True)
            p = logp[:, place, label].exp().detach()[:, None, None, None]
            for total, g in zip(exact.values(), gradients, strict=True):
                total += p * g[..., :, None] * g[..., None, :]
    return exact


@pytest.mark.parametrize("name", NAMES)
def test_the_drawn_labels_give_the_expectation_over_all_labels(name):
    model, tokens = tiny_model(name), few_tokens()
    exact = {key: value.mean((0, 1)).double() for key, value in fisher_by_enumeration(model, tokens).items()}
    draws = [output_fisher(model, tokens, seed=seed, batch_size=2) for seed in range(150)]
    assert draws[0].keys() == exact.keys()
    for key, g in exact.items():
        seen = torch.stack([draw[key] for draw in draws])
        error = (seen.mean(0) - g) / (seen.std(0) / len(draws) ** 0.5)
        assert error.abs().max() < 6  # in standard errors, the largest of d * d entries
        assert error.square().mean() < 2
        assert (seen.mean(0) - g).norm() < 0.2 * g.norm() < (seen[0] - g).norm() * 2


@pytest.mark.parametrize("name", NAMES)
def test_an_error_at_one_token_raises_the_loss_by_half_its_square_in_the_metric(name):
    model, tokens = tiny_model(name), few_tokens(1)
    exact = fisher_by_enumeration(model, tokens)
    torch.manual_seed(0)
    with torch.no_grad():
        dense = model(input_ids=tokens).logits.log_softmax(-1)
        for module in gh.depth2_modules(model):
            for token in range(tokens.shape[1]):
                e = 1e-3 * torch.randn(exact[module.name].shape[-1], dtype=torch.float64)

                def add(linear, args, output, token=token, e=e):
                    output = output.clone()
                    output.view(1, tokens.shape[1], -1)[0, token] += e
                    return output

                hook = module.level2.linear.register_forward_hook(add)
                wrong = model(input_ids=tokens).logits.log_softmax(-1)
                hook.remove()
                rise = F.kl_div(wrong, dense, log_target=True, reduction="sum")  # labels are the model's own
                price = e @ exact[module.name][0, token].double() @ e / 2
                assert rise == pytest.approx(price.item(), rel=2e-2)


def moments_and_inputs(model, module, tokens):
    stream = BlockStream(model, tokens)
    passes = ModulePasses(stream, gh.blocks_of(model)[0], module)
    (z,) = zip(*stream.inputs(gh.blocks_of(model)[0], [module.level2.linear]), strict=True)
    return Seen(damp=1e-3, passes=passes), torch.cat(z).double()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("place", [0, 1])
def test_the_price_of_a_removal_is_the_error_behind_the_refit_in_the_metric(name, place):
    model, tokens = tiny_model(name), few_tokens(8, 24)
    module, metric = gh.depth2_modules(model, [0])[place], loss_metric(model, tokens)
    seen, z = moments_and_inputs(model, module, tokens)
    found = exact_greedy(module, seen, whole_path=True, metric=metric)
    w, (mean, bias) = gh.weight_of(module.level2.linear), (z.mean(0), module.level2.linear.bias)
    z = z if bias is None else z - mean
    lam, left, so_far = 1e-3 * z.square().sum(0).mean(), list(range(module.n_units)), 0.0

    def rise(units):
        """Of the objective, per token, when only `units` are left and refitted."""
        s = module.level2.index[units].flatten()
        h = z[:, s].T @ z[:, s] + lam * torch.eye(len(s))
        new = torch.linalg.solve(h, z[:, s].T @ (z @ w.T) + lam * w[:, s].T)  # [k, d]
        e, gone = z[:, s] @ new - z @ w.T, w.clone()
        gone[:, s] -= new.T  # the damping's share: how far all weights moved, those that went to zero too
        return (
            0.5
            * ((e @ metric[module.name]).square().sum() + lam * (metric[module.name].T @ gone).square().sum())
            / len(z)
        )

    rounds = min(4, module.n_units // module.n_sets - 1)
    for _ in range(rounds * module.n_sets):
        size = module.n_units // module.n_sets
        in_set = [sum(u // size == s for u in left) for s in range(module.n_sets)]
        due = [u for u in left if in_set[u // size] == max(in_set)]
        costs = {u: rise([v for v in left if v != u]).item() for u in due}
        cheapest = min(costs, key=costs.get)
        left.remove(cheapest)
        assert found[cheapest] == pytest.approx(costs[cheapest], rel=1e-6)
        assert costs[cheapest] >= so_far
        so_far = costs[cheapest]


def test_without_a_preferred_direction_the_order_is_the_plain_one(model, tokens):
    module = gh.depth2_modules(model, [0])[1]
    seen, _ = moments_and_inputs(model, module, tokens)
    identity = {module.name: torch.eye(len(gh.weight_of(module.level2.linear)), dtype=torch.float64) * 2**0.5}
    plain, priced = exact_greedy(module, seen), exact_greedy(module, seen, metric=identity)
    assert torch.allclose(plain, priced, rtol=1e-9)


def test_nothing_is_left_behind(model, tokens):
    model.train()
    frozen = gh.depth2_modules(model, [0])[1].level2.path + ".weight"
    model.get_parameter(frozen).requires_grad_(False)
    before = state_of(model)
    output_fisher(model, tokens)
    assert_untouched(model, before)
    assert model.training
    asks = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert asks == [frozen]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_what_it_cannot_do_is_said(model, tokens, tmp_path):
    with pytest.raises(ValueError, match=r"expected a causal language model, found .* without a head"):
        output_fisher(model.base_model, tokens)


@pytest.mark.parametrize("name", CONFIGS)
def test_block_by_block_is_the_whole_models_backward_pass(name, tokens):
    """The same labels, one graph over the whole model; and batches of one window or five."""
    model, seen = tiny_model(name), {}
    if model.get_output_embeddings() is None:
        pytest.skip("an encoder")
    draws = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    found = output_fisher(model, tokens, seed=5, batch_size=1)
    logits, outputs = with_outputs(model, tokens)
    cumulated = logits.detach().float().softmax(-1).cumsum(-1)
    labels = torch.searchsorted(cumulated, (draws[..., None] * cumulated[..., -1:]).float()).squeeze(-1)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    for key, g in zip(outputs, torch.autograd.grad(loss, list(outputs.values())), strict=True):
        g = g.flatten(0, -2).double()
        seen[key] = g.T @ g / tokens.numel()
    assert list(found) == [module.name for module in gh.depth2_modules(model)]
    for key, g in found.items():
        assert torch.allclose(g, seen[key], rtol=1e-4, atol=1e-6 * seen[key].abs().max().item())
    for key, g in output_fisher(model, tokens, seed=5, batch_size=5).items():
        assert torch.allclose(g, found[key], rtol=1e-4, atol=1e-6 * g.abs().max().item())


def test_blocks_may_be_on_the_disk(model, tokens, tmp_path):
    gh.save_pruned(model, tmp_path / "saved")
    lazy, _ = gh.load_model(tmp_path / "saved", lazy=True)
    here = output_fisher(model, tokens)
    for name, g in output_fisher(lazy, tokens).items():
        assert torch.allclose(g, here[name], rtol=1e-4, atol=1e-6 * g.abs().max().item())
    assert next(gh.blocks_of(lazy)[0].parameters()).is_meta
    asked = {"recipe": Recipe(allocation="loss prices"), "progress": False}
    kept = [
        [step.units_after for step in gh.prune(m, tokens, 0.25, work_dir=tmp_path / str(i), **asked).steps]
        for i, m in enumerate([lazy, model])
    ]
    assert kept[0] == kept[1]


def test_a_plan_by_prices_meets_its_budget_and_spares_what_is_dear(model, tokens):
    report = gh.prune(model, tokens, 0.4, Recipe(allocation="loss prices"), progress=False)
    assert report.removed["modules"] == pytest.approx(0.4, abs=2e-3)  # half a channel
    assert len({s.units_after / s.units_before for s in report.steps}) > 2


def test_prices_are_those_that_the_allocation_spends_by(model, tokens):
    modules = gh.depth2_modules(model)
    costs = loss_prices(model, tokens, batch_size=3)
    metric = loss_metric(model, tokens, batch_size=3)
    doubled = loss_prices(model, tokens, metric={name: 2 * g for name, g in metric.items()}, batch_size=3)
    for name, price in costs.items():
        torch.testing.assert_close(doubled[name], 4 * price)  # L L' is the metric
    plan = gh.cost_plan(modules, costs, asked_parameters(modules, 0.3))
    report = gh.prune(model, tokens, 0.3, Recipe("L2", "none", allocation="loss prices"), progress=False)
    assert {step.name: step.units_after for step in report.steps} == plan


def test_choice_and_budget_share_one_metric(model, tokens, monkeypatch):
    asked = []

    def counted(model, tokens, **where):
        asked.append(where["batch_size"])
        return loss_metric(model, tokens, **where)

    monkeypatch.setattr(pruning, "loss_metric", counted)
    recipe = Recipe("exact greedy, loss metric", "none", allocation="loss prices")
    gh.prune(model, tokens, 0.3, recipe, batch_size=3, progress=False)
    assert asked == [3]


def test_the_metric_takes_evenly_spaced_windows(model, tokens, monkeypatch):
    seen = []
    monkeypatch.setattr(prices, "output_fisher", lambda model, windows, **_: seen.append(windows) or {})
    for most, chosen in [(1, [0]), (3 * tokens.shape[1], [0, 2, 5]), (10**6, range(6))]:
        loss_metric(model, tokens, most=most)
        assert torch.equal(seen[-1], tokens[list(chosen)])


def test_the_metric_goes_on_with_smaller_batches(model, tokens, monkeypatch):
    def short(model, tokens, *, batch_size, **where):
        if batch_size > 2:
            raise torch.OutOfMemoryError("out of memory (simulated)")
        return output_fisher(model, tokens, batch_size=batch_size, **where)

    wanted = loss_metric(model, tokens)
    monkeypatch.setattr(prices, "output_fisher", short)
    with pytest.warns(UserWarning, match="loss_metric: out of memory .* going on with [12] windows"):
        found = loss_metric(model, tokens, batch_size=4)
    for name, root in wanted.items():
        torch.testing.assert_close(found[name], root)
