"""The elimination's shortcuts (one factorisation, low-rank downdates) give what solving everything again gives."""

import itertools
import math
from functools import partial

import pytest
import torch
from conftest import assert_untouched, calibration, quiet, state_of
from tiny import tiny_model

from greedy_helpers import cost_plan, depth2_modules, exact_greedy, output_energy, remove_units, scores_of, weight_of
from greedy_helpers import greedy as greedy_file
from greedy_helpers.allocation import removed_parameters, unit_parameters
from greedy_helpers.greedy import eliminate, swap
from greedy_helpers.reconstruct import solve


def problem(n_units=9, width=1, n=80, d_y=5, seed=0, noise=0.3, others=0):
    """Correlated channels z [n, channels], outputs y, and the units' shuffled channels; `others` are in no unit."""
    generator = torch.Generator().manual_seed(seed)
    channels = n_units * width + others
    mix = torch.randn(channels, channels, generator=generator).double()
    z = torch.randn(n, channels, generator=generator).double() @ (mix + noise * torch.eye(channels).double())
    y = torch.randn(n, d_y, generator=generator).double() + z @ torch.randn(channels, d_y, generator=generator).double()
    index = torch.randperm(channels, generator=generator)[: n_units * width].view(n_units, width)
    return z, y, index


def normal(z, y, lam=0.7):
    h = z.T @ z + lam * torch.eye(z.shape[1]).to(z)
    return h, torch.cholesky_solve(z.T @ y, torch.linalg.cholesky(h))


def ridge_error(z, y, channels, lam=0.7):
    """min ||Y - Z_S W'||^2 + lam ||W||^2 by plain least squares on the augmented system: no shortcut."""
    z = z[:, sorted(channels)]
    above = torch.cat([z, math.sqrt(lam) * torch.eye(z.shape[1]).to(z)])
    below = torch.cat([y, y.new_zeros(z.shape[1], y.shape[1])])
    solution = torch.linalg.lstsq(above, below).solution
    return (below - above @ solution).square().sum().item(), solution


def channels_of(index, n_channels, units):
    """The channels of these units and of no unit."""
    return sorted(set(range(n_channels)) - set(index.flatten().tolist()) | set(index[list(units)].flatten().tolist()))


def slow_greedy(z, y, index, n_keep, n_sets=1):
    left, order, errors = list(range(len(index))), [], []
    while len(left) > n_keep:
        sets = [u // (len(index) // n_sets) for u in left]
        due = [u for u, its in zip(left, sets, strict=True) if sets.count(its) == max(map(sets.count, sets))]
        rest = {u: channels_of(index, z.shape[1], set(left) - {u}) for u in due}
        trials = {u: ridge_error(z, y, channels)[0] for u, channels in rest.items()}
        gone = min(trials, key=trials.get)
        left.remove(gone)
        order.append(gone)
        errors.append(trials[gone])
    return order, errors, left


@pytest.mark.parametrize("block", [1, 3, 32])
@pytest.mark.parametrize("others", [0, 5])
@pytest.mark.parametrize(
    ("n_units", "width", "n_keep", "n_sets"),
    [(24, 1, 1, 1), (24, 1, 10, 1), (8, 3, 1, 1), (8, 3, 3, 1), (9, 2, 3, 3), (8, 2, 4, 2), (12, 1, 4, 2)],
)
def test_the_path_equals_solving_again_after_every_removal(n_units, width, n_keep, n_sets, others, block):
    """Down to the last unit, so that the matrices are compacted on the way; the arguments stay as they are."""
    z, y, index = problem(n_units, width, others=others)
    h, b = normal(z, y)
    given = h.clone(), b.clone()
    path = eliminate(h, b, index, n_keep, block=block, n_sets=n_sets)
    order, errors, left = slow_greedy(z, y, index, n_keep, n_sets)
    assert path.order.tolist() == order
    assert path.keep.tolist() == left
    everything = ridge_error(z, y, range(z.shape[1]))[0]
    assert (everything + path.costs.cumsum(0)).tolist() == pytest.approx(errors)
    error, solution = ridge_error(z, y, channels_of(index, z.shape[1], left))
    torch.testing.assert_close(path.solution, solution)
    assert error == pytest.approx(errors[-1])
    for unit, cost in zip(left, path.next_costs.tolist(), strict=True):
        rest = channels_of(index, z.shape[1], set(left) - {unit})
        assert cost == pytest.approx(ridge_error(z, y, rest)[0] - error)
    assert torch.equal(h, given[0])
    assert torch.equal(b, given[1])


@pytest.mark.parametrize("seed", range(5))
def test_against_the_optimum_over_all_subsets(seed):
    """Greedy is the optimum for one unit; for more it comes near it, and trades of one for one come nearer."""
    z, y, index = problem(8, seed=seed)
    h, b = normal(z, y)
    for n_keep in (7, 5, 4):
        subsets = itertools.combinations(range(8), n_keep)
        errors = {keep: ridge_error(z, y, index[list(keep)].flatten().tolist())[0] for keep in subsets}
        greedy = eliminate(h, b, index, n_keep).keep
        traded, _ = swap(h, h @ b, index, greedy, tries=8)
        best = min(errors.values())
        assert errors[tuple(greedy.tolist())] <= best * (1.75 if n_keep < 7 else 1 + 1e-9)  # an average subset: 2.7
        assert errors[tuple(traded.tolist())] <= best * 1.1


def subsets_of_sets(n_sets, in_set, n_keep):
    """All subsets with the same number of every set."""
    per_set = [
        list(itertools.combinations(range(s * in_set, (s + 1) * in_set), n_keep // n_sets)) for s in range(n_sets)
    ]
    return [sum(parts, ()) for parts in itertools.product(*per_set)]


@pytest.mark.parametrize("seed", range(5))
def test_against_the_optimum_over_all_subsets_of_equal_numbers(seed):
    """A round of three sets comes near the best of all 27 that take one of each; trades inside the sets come nearer."""
    z, y, index = problem(9, 2, seed=seed)
    h, b = normal(z, y)
    nested = set(range(9))
    for n_keep in (6, 3):
        errors = {
            keep: ridge_error(z, y, index[list(keep)].flatten().tolist())[0] for keep in subsets_of_sets(3, 3, n_keep)
        }
        greedy = eliminate(h, b, index, n_keep, n_sets=3).keep
        assert set(greedy.tolist()) < nested  # rounds do not depend on how many there are
        nested = set(greedy.tolist())
        traded, _ = swap(h, h @ b, index, greedy, tries=9, n_sets=3)
        best = min(errors.values())
        assert best * (1 - 1e-9) <= errors[tuple(traded.tolist())] <= errors[tuple(greedy.tolist())] * (1 + 1e-9)
        assert errors[tuple(greedy.tolist())] < sum(errors.values()) / len(errors)
        assert errors[tuple(traded.tolist())] <= best * 1.2


def test_swaps_stay_inside_their_sets():
    """From the worst subset down to one that no trade inside a set improves; trades between sets would go on."""
    z, y, index = problem(8, 2, seed=3)
    h, b = normal(z, y)
    error = lambda keep: ridge_error(z, y, index[list(keep)].flatten().tolist())[0]  # noqa: E731
    worst = max(subsets_of_sets(2, 4, 4), key=error)
    found, trades = swap(h, h @ b, index, torch.tensor(worst), tries=8, n_sets=2)
    kept = set(found.tolist())
    assert trades > 0
    assert len(kept & {0, 1, 2, 3}) == len(kept & {4, 5, 6, 7}) == 2
    trials = {(gone // 4 == back // 4): [] for gone, back in itertools.product(kept, range(8))}
    for gone, back in itertools.product(kept, set(range(8)) - kept):
        trials[gone // 4 == back // 4].append(error({*kept, back} - {gone}))
    assert min(trials[True]) >= error(kept) * (1 - 1e-9)
    free, _ = swap(h, h @ b, index, found, tries=8)
    assert (min(trials[False]) < error(kept)) == (free.tolist() != found.tolist())


@pytest.mark.parametrize("width", [1, 2])
def test_swaps_leave_a_bad_choice_behind(width):
    """From the worst subset, trades go down to a subset that no single trade improves."""
    z, y, index = problem(7, width, seed=3)
    h, b = normal(z, y)
    error = lambda keep: ridge_error(z, y, index[list(keep)].flatten().tolist())[0]  # noqa: E731
    worst = max(itertools.combinations(range(7), 4), key=error)
    found, trades = swap(h, h @ b, index, torch.tensor(worst), tries=7)
    assert trades > 0
    assert error(found.tolist()) < error(worst)
    for gone, back in itertools.product(found.tolist(), set(range(7)) - set(found.tolist())):
        assert error({*found.tolist(), back} - {gone}) >= error(found.tolist()) * (1 - 1e-9)
    same, none = swap(h, h @ b, index, found, most=0)
    assert none == 0
    assert torch.equal(same, found)


@pytest.fixture
def states(monkeypatch):
    """The working states of all eliminations."""
    made, init = [], greedy_file._State.__init__
    monkeypatch.setattr(greedy_file._State, "__init__", lambda self, *a: (init(self, *a), made.append(self))[0])
    return made


def test_single_precision_keeps_the_same_units(states):
    z, y, index = problem(60, n=400, noise=3.0)
    h, b = normal(z, y)
    exact, single = eliminate(h, b, index, 20), eliminate(h, b, index, 20, dtype=torch.float32)
    assert len(set(single.keep.tolist()) & set(exact.keep.tolist())) >= 19
    assert states[1].refactorised == 0


@pytest.mark.parametrize(("n_units", "width", "others"), [(40, 1, 0), (40, 1, 5), (12, 4, 5)])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_what_drifts_is_factorised_again(n_units, width, others, dtype, close, states):
    """With a tolerance that nothing meets, every block ends with a new factorisation, and the path is the same."""
    z, y, index = problem(n_units, width, n=400, noise=20.0, others=others)
    h, b = normal(z, y)
    given = h.clone(), b.clone()
    exact = eliminate(h, b, index, 3)
    strict = eliminate(h, b, index, 3, dtype=dtype, block=4, tolerance=1e-30)
    assert states[1].refactorised == (math.ceil(37 / 4) if width == 1 else 9)
    assert strict.order.tolist() == exact.order.tolist()
    torch.testing.assert_close(strict.costs, exact.costs, rtol=close, atol=0)
    torch.testing.assert_close(strict.solution, exact.solution, rtol=close, atol=close)
    assert torch.equal(h, given[0])
    assert torch.equal(b, given[1])


def test_bad_arguments():
    z, y, index = problem(4)
    h, b = normal(z, y)
    for n_keep in (0, 5):
        with pytest.raises(ValueError, match=f"between 1 and 4 units, found {n_keep}"):
            eliminate(h, b, index, n_keep)
    with pytest.raises(torch.linalg.LinAlgError):
        eliminate(-h, b, index, 2)


# --- as a criterion


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2"])
@pytest.mark.parametrize("swaps", [0, 5])
def test_prune_keeps_what_the_elimination_keeps(name, swaps):
    """H and the solution are those of the refit that follows: same damping, same targets, a bias centred out."""
    model, path, damp = tiny_model(name), {}, 0.03

    def spy(module, seen):
        linear, moments = module.level2.linear, seen.level2
        h, solution = moments.xx, solve(moments, weight_of(linear), linear.bias, damp)
        if linear.bias is not None:
            h = h - torch.outer(moments.x, moments.x) / moments.n
        h = h + damp * h.diagonal().mean() * torch.eye(len(h)).to(h)
        sets = {"n_sets": module.n_sets}
        keep = eliminate(h, solution.weight.T, module.level2.index, seen.n_keep, **sets).keep
        keep = swap(h, h @ solution.weight.T, module.level2.index, keep, swaps, **sets)[0]
        path[module.name] = keep
        return exact_greedy(module, seen, swaps=swaps)

    report = quiet(model, calibration(24, seed=1), 0.5, criterion=spy, remedy="post", damp=damp)
    for step in report.steps:
        assert torch.equal(step.keep, path[step.name])
        assert step.scores.isfinite().all()


@pytest.mark.parametrize("name", ["llama", "llama-gqa", "gpt2"])
def test_it_has_the_least_error_of_its_module(name):
    """On the first module all criteria read the same input and have the same targets: greedy is lowest."""
    criteria = {"greedy": exact_greedy, "energy": output_energy, "swaps": partial(exact_greedy, swaps=20)}
    where, errors = {"kinds": {"ffn", "gated_ffn"}, "blocks": [0]}, {}
    for label, criterion in criteria.items():
        report = quiet(tiny_model(name), calibration(40, seed=1), 0.5, criterion=criterion, remedy="post", **where)
        errors[label] = report.steps[0].error
    assert errors["greedy"] < errors["energy"]
    assert errors["swaps"] <= errors["greedy"] * (1 + 1e-6)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_whole_path_scores_are_the_rising_error(name):
    """Without targets: the error per token of imitating the module's own outputs without the units up to each one."""
    model, tokens, z = tiny_model(name), calibration(24, seed=1), {}
    for module in depth2_modules(model):
        remove_units(module, torch.arange(min(module.n_units, 12)))

    def spy(module, seen):
        z[module.name] = torch.cat([window.flatten(0, 1) for window in seen.level2_windows()])
        return exact_greedy(module, seen, whole_path=True)

    scores = scores_of(model, tokens, spy, damp=0.05)
    for module in depth2_modules(model):
        x, linear, order = z[module.name], module.level2.linear, scores[module.name].argsort()
        x = x if linear.bias is None else x - x.mean(0)
        w = weight_of(linear).T
        lam = 0.05 * x.square().sum() / x.shape[1]
        sets = order // (module.n_units // module.n_sets)
        assert all(len(set(part.tolist())) == module.n_sets for part in sets.view(-1, module.n_sets))  # rounds
        for gone in range(1, module.n_units - module.n_sets + 1):
            stays = module.level2.index[order[gone:]].flatten()
            # min ||X W - X_s V||^2 + lam ||W - V||^2, V zero outside s
            above = torch.cat([x, lam.sqrt() * torch.eye(x.shape[1]).to(x)])
            below = above @ w
            solution = torch.linalg.lstsq(above[:, stays], below, driver="gelsd").solution
            error = (below - above[:, stays] @ solution).square().sum() / len(x)
            assert scores[module.name][order[gone - 1]].item() == pytest.approx(error.item())


def test_without_damping_a_dead_channel_is_refused_by_name():
    model = tiny_model("llama")
    depth2_modules(model)[3].level1["gate_proj"].linear.weight.data[7] = 0
    before = state_of(model)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj: the 80 channels .* found 0"):
        quiet(model, calibration(24), 0.25, criterion=exact_greedy, remedy="post", damp=0.0, blocks=[1])
    assert_untouched(model, before)


# --- plans from its costs


def test_cost_plan_is_the_cheapest_plan_that_removes_as_much():
    """Against all plans, for costs that rise ever faster in every module, each at its own rate.

    The last unit may be too large for what is left of the budget: then the plan lies between the cheapest that removes
    as much, and the cheapest that removes one such unit more.
    """
    modules, scores = depth2_modules(tiny_model("llama")), {}
    for seed, module in enumerate(modules):
        rises = torch.rand(module.n_units, generator=torch.Generator().manual_seed(seed)).double().sort().values
        scores[module.name] = 3.0**seed * unit_parameters(module) * rises.cumsum(0)
    removed, costs = torch.zeros(1), torch.zeros(1).double()
    for module in modules:  # of all plans: parameters and costs
        most = module.n_units - max(1, round(0.05 * module.n_units))
        steps = torch.arange(most + 1)
        price = torch.cat([torch.zeros(1).double(), scores[module.name][:most]])
        removed = (removed[:, None] + steps * unit_parameters(module)).flatten()
        costs = (costs[:, None] + price).flatten()
    dearest = max(map(unit_parameters, modules))
    for wanted in (5_000, 15_000, 25_000):
        plan = cost_plan(modules, scores, wanted)
        took = removed_parameters(modules, plan)
        assert abs(took - wanted) <= min(map(unit_parameters, modules)) / 2
        price = sum(scores[m.name][m.n_units - plan[m.name] - 1] for m in modules if plan[m.name] < m.n_units)
        cheapest, one_more = costs[removed >= took].min().item(), costs[removed >= took + dearest].min().item()
        assert cheapest * (1 - 1e-9) <= price.item() <= one_more
    with pytest.raises(ValueError, match="parameters in removable units"):
        cost_plan(modules, scores, 10**9)


def test_a_cheap_unit_behind_a_dear_one_is_not_for_sale_alone():
    """Rises 10, 0 sell as 5, 5: behind a rise of 4 elsewhere, before one of 6."""
    modules = depth2_modules(tiny_model("llama"), kinds=["gated_ffn"])
    rises = torch.full((2, 80), 100.0)
    rises[0, :2], rises[1, :2] = torch.tensor([10.0, 0.0]), torch.tensor([4.0, 6.0])
    scores = {module.name: row.cumsum(0) for module, row in zip(modules, rises, strict=True)}
    plans = [cost_plan(modules, scores, n * unit_parameters(modules[0])) for n in (1, 2, 3, 4)]
    assert [tuple(plan.values()) for plan in plans] == [(80, 79), (79, 79), (78, 79), (78, 78)]
