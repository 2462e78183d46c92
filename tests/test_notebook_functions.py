"""Functions that a notebook builds up by hand and the package has as well: equal on random input, ties included.

The notebooks assert the same on their own data when nbval runs them. Here the input is chosen to be awkward: ties,
single heads, empty results, ratios on the edge of a whole unit.
"""

import ast
import copy
import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import tiny
import torch

import greedy_helpers as gh
from greedy_helpers.allocation import n_removed, unit_parameters
from greedy_helpers.course import graphs
from greedy_helpers.course.cost import count_macs
from greedy_helpers.course.multiple_choice import paired_accuracy
from greedy_helpers.criteria import removal_costs
from greedy_helpers.evaluate import TextScore
from greedy_helpers.greedy import eliminate
from greedy_helpers.measure import ModulePasses
from greedy_helpers.prices import output_fisher, stream_energy
from greedy_helpers.reconstruct import refit
from greedy_helpers.remedies import Remedy, refit_survivors
from greedy_helpers.similarity import unit_divergence
from greedy_helpers.structure import linears_of

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"


def taken_from(stem, *names):
    """The functions of those names as the notebook defines them."""
    found = {"torch": torch, "nn": torch.nn, "copy": copy, "math": math, "itertools": itertools, "gh": gh}
    found |= {"ModulePasses": ModulePasses, "n_removed": n_removed, "linears_of": linears_of}
    found |= {"output_fisher": output_fisher}
    for cell in nbformat.read(NOTEBOOKS / f"{stem}.ipynb", as_version=4).cells:
        # Only cells with one of the names are parsed: a cell may hold IPython's % and !.
        if cell.cell_type == "code" and any(f"def {name}(" in cell.source for name in names):
            for node in ast.parse(cell.source).body:
                if isinstance(node, ast.FunctionDef) and node.name in names:
                    exec(compile(ast.Module([node], []), f"{stem}.ipynb", "exec"), found)
    return [found[name] for name in names]


def divergences(n, generator, digits):
    """A symmetric matrix with zero diagonal; few digits make ties, also with the threshold."""
    values = torch.rand(n, n, generator=generator).round(decimals=digits)
    return (values.triu(1) + values.triu(1).T).double()


@pytest.mark.parametrize("digits", [1, 6])
def test_similar_heads(digits):
    algorithm_2, most_with_living_twin = taken_from("03_similarity", "algorithm_2", "most_with_living_twin")
    generator = torch.Generator().manual_seed(digits)
    for n, tau in itertools.product((1, 2, 3, 5, 7), (0.0, 0.3, 0.5, 0.7)):
        values = divergences(n, generator, digits)
        assert algorithm_2(values, tau) == gh.redundant_heads(values, tau)
        graph = graphs.similarity_graph(values, tau)
        assert len(most_with_living_twin(values, tau)) == graphs.maximal_redundancy(graph)


def test_divergence_of_maps_with_masked_keys():
    _, at_once = taken_from("03_similarity", "entropies", "divergence_at_once")
    maps = torch.randn(3, 5, 9, 9, generator=torch.Generator().manual_seed(0)).double().exp().tril()
    maps = maps / maps.sum(-1, keepdim=True)
    torch.testing.assert_close(gh.head_divergence([maps[:1], maps[1:]]), at_once(maps), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("group", [1, 2, 3, 6])
def test_divergence_of_groups(group):
    (group_divergence,) = taken_from("03_similarity", "group_divergence")
    values = divergences(6, torch.Generator().manual_seed(0), 6)
    torch.testing.assert_close(group_divergence(values, group), unit_divergence(values, group))


def test_greedy_elimination():
    _, greedy_keep = taken_from("08_beyond_the_paper", "downdate", "greedy_keep")
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        z = torch.randn(30, 9, generator=generator).double() @ torch.randn(9, 9, generator=generator).double()
        h, b = z.T @ z + 0.1 * torch.eye(9).double(), torch.randn(9, 4, generator=generator).double()
        for n_keep in (1, 4, 8, 9):
            kept = eliminate(h, b, torch.arange(9)[:, None], n_keep).keep
            torch.testing.assert_close(greedy_keep(h, b.T, n_keep), kept)  # columns in the notebook


@pytest.mark.parametrize("digits", [1, 12])
def test_second_moment_of_a_plain_module(digits):
    functions = taken_from("04_second_moment", "second_moment_by_hand", "second_moment_at_once")
    model = tiny.tiny_model("gpt2")
    ffn = gh.depth2_modules(model, [0], kinds={"ffn"})[0]
    (level1,) = (group.linear for group in ffn.level1.values())
    torch.nn.init.zeros_(level1.bias)
    x = torch.randn(50, 48, generator=torch.Generator().manual_seed(0)).double().round(decimals=digits) + 0.5
    moments = gh.Moments()
    moments.update(x)
    a, b = gh.weight_of(level1).detach(), gh.weight_of(ffn.level2.linear).detach()
    right = gh.second_moment(ffn, gh.Seen(moments, moments))
    for function in functions:
        torch.testing.assert_close(function(a, b, moments.xx / moments.n), right, rtol=1e-10, atol=0)


@pytest.mark.parametrize("family", ["llama-gqa", "gpt2", "opt"])
def test_the_pruning_loop(family):
    _, prune_by_hand = taken_from("05_pruning", "n_left", "prune_by_hand")
    model = tiny.tiny_model(family)
    tokens = torch.randint(tiny.VOCABULARY, (6, 16), generator=torch.Generator().manual_seed(0))
    by_hand = prune_by_hand(copy.deepcopy(model), tokens, 0.5, [0, 1])  # one of two query heads per KV head
    gh.prune(model, tokens, 0.5, gh.Recipe(gh.second_moment, "none", allocation="floor"), progress=False)
    for (name, mine), theirs in zip(by_hand.named_parameters(), model.parameters(), strict=True):
        assert mine.shape == theirs.shape, name
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("family", ["llama-gqa", "gpt2"])
def test_prices_of_sets_and_their_order(family):
    price_matrices, worst_first, nats_curves = taken_from("05_pruning", "price_matrices", "worst_first", "nats_curves")
    model = tiny.tiny_model(family)
    tokens = torch.randint(tiny.VOCABULARY, (6, 16), generator=torch.Generator().manual_seed(0))
    subject = SimpleNamespace(model=model, calibration=tokens, modules=gh.depth2_modules(model))
    subject.scores, fisher = gh.scores_of(model, tokens, gh.second_moment), output_fisher(model, tokens)
    subject.prices = price_matrices(subject)
    curves, z = nats_curves(subject), {}
    for m in subject.modules:
        m.level2.linear.register_forward_pre_hook(lambda _, args, name=m.name: z.update({name: args[0].flatten(0, -2)}))
    with torch.no_grad():
        model(tokens)
    for m in subject.modules:
        left = m.n_units // 2 // m.n_sets * m.n_sets
        gone = ~torch.isin(torch.arange(m.n_units), gh.keep_best(subject.scores[m.name], left, m.n_sets))
        assert set(worst_first(subject, m).flatten()[: m.n_units - left].tolist()) == set(gone.nonzero()[:, 0].tolist())
        channels = m.level2.index[gone].flatten()
        e = z[m.name][:, channels] @ gh.weight_of(m.level2.linear)[:, channels].T
        price = 0.5 * (fisher[m.name] * (e.T @ e / len(e))).sum()  # tr(G E[e e']) / 2
        torch.testing.assert_close(subject.prices[m.name][gone][:, gone].sum(), price.detach())
        assert curves[m.name][m.n_units - left - 1] >= price * (1 - 1e-9)


@pytest.mark.parametrize("family", ["llama", "llama-gqa", "opt"])
def test_multiply_accumulates(family):
    (macs,) = taken_from("05_pruning", "macs")
    model = tiny.tiny_model(family, torch.float32)
    gh.remove_units(gh.depth2_modules(model, [1])[1], torch.arange(50))
    for seq in (1, 7):
        found, right = macs(model, seq), count_macs(model, seq)
        assert list(found.values()) == [right["linears"], right["attention"], right["head"]]


@pytest.mark.parametrize("bias", [True, False])
def test_heads_of_four_matrices(bias):
    (remove_heads,) = taken_from("05_pruning", "remove_heads")
    model = tiny.tiny_model("llama")
    attention = gh.blocks_of(model)[0].self_attn
    parts = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    for part in parts[:3]:
        part.bias = torch.nn.Parameter(torch.randn(48).double()) if bias else None
    by_hand = copy.deepcopy(parts)
    remove_heads(*by_hand, [0, 2], 12)
    gh.remove_units(gh.depth2_modules(model, [0], kinds={"attention"})[0], torch.tensor([1, 3]))
    for mine, theirs in zip(by_hand, parts, strict=True):
        torch.testing.assert_close(dict(mine.named_parameters()), dict(theirs.named_parameters()), rtol=0, atol=0)


def regression(seed, tokens=40, d=7, outputs=3):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, d, generator=generator).double() + 1
    y = x @ torch.randn(d, outputs, generator=generator).double() + torch.randn(tokens, outputs, generator=generator)
    moments = gh.Moments()
    moments.update(x, y)
    return x, y, moments, torch.randn(outputs, d, generator=generator).double()


@pytest.mark.parametrize("damp", [1e-6, 0.01, 3.0])
def test_refits(damp):
    ridge_toward, error_from_moments, centred_solve = taken_from(
        "06_reconstruction", "ridge_toward", "error_from_moments", "centred_solve"
    )
    for seed in range(3):
        x, y, m, w0 = regression(seed)
        plain = gh.solve(m, w0, damp=damp)
        torch.testing.assert_close(ridge_toward(x, y, w0, plain.lam), plain.weight)
        assert math.isclose(error_from_moments(m.xx, m.xy, m.yy, plain.weight), m.relative_error(plain.weight))
        centred = gh.solve(m, w0, torch.zeros(3).double(), damp)
        found = centred_solve(m.n, m.xx, m.xy, m.x, m.y, w0, centred.lam)
        torch.testing.assert_close(found, (centred.weight, centred.bias))


def test_the_two_steps():
    """On the first FFN, behind heads that are cut: the paper's remedy leaves the same weights."""
    _, two_steps = taken_from("06_reconstruction", "ridge_toward", "two_steps")
    dense = tiny.tiny_model("llama")
    model, read = copy.deepcopy(dense), []
    tokens = torch.randint(tiny.VOCABULARY, (16, 16), generator=torch.Generator().manual_seed(0))
    report = gh.prune(model, tokens, 0.3, gh.Recipe(gh.output_energy, "pre"), blocks=[0], progress=False)
    for subject in (dense, model):
        gate = gh.blocks_of(subject)[0].mlp.gate_proj
        gate.register_forward_pre_hook(lambda _, args: read.append(args[0].flatten(0, -2)))
        with torch.no_grad():
            subject(tokens)
    mlp, kept = gh.blocks_of(dense)[0].mlp, report.steps[1].keep
    w1, w2 = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).detach(), mlp.down_proj.weight.detach()
    found1, found2 = two_steps(*read, w1, w2, lambda h: mlp.act_fn(h[:, :80]) * h[:, 80:], 0.01)
    pruned = gh.blocks_of(model)[0].mlp
    torch.testing.assert_close(found1[:80][kept], pruned.gate_proj.weight.detach())
    torch.testing.assert_close(found1[80:][kept], pruned.up_proj.weight.detach())
    torch.testing.assert_close(found2[:, kept], pruned.down_proj.weight.detach())


@pytest.mark.parametrize("family", ["llama", "llama-gqa"])
def test_the_capstone(family):
    parts = ("units_of", "moments_of", "energy_scores", "cut_units", "ridge_refit", "spend", "enter", "reads", "run")
    *_, prices_of, my_prune = taken_from("11_capstone", *parts, "prices_of", "my_prune")
    model = tiny.tiny_model(family, attention_bias=False, mlp_bias=False)
    tokens = torch.randint(tiny.VOCABULARY, (12, 24), generator=torch.Generator().manual_seed(0))
    mine, places = copy.deepcopy(model), {"attention": "self_attn", "ffn": "mlp"}
    prices, sizes = prices_of(model, tokens)
    scores, energy = gh.scores_of(model, tokens, gh.output_energy, unit="kv"), stream_energy(model, tokens)
    modules = {module.name: module for module in gh.depth2_modules(model, unit="kv")}
    for (block, name), own in prices.items():
        module = f"model.layers.{block}.{places[name]}"
        torch.testing.assert_close(own, scores[module] / energy[module])
        assert sizes[block, name] == unit_parameters(modules[module])

    def refit_level1(module, seen):
        return refit([group.linear for group in module.level1.values()], seen.only_level1(), seen.damp, through=True)

    plan = my_prune(mine, tokens, 0.3, 0.02)
    plan = {f"model.layers.{block}.{places[name]}": left for (block, name), left in plan.items()}
    assert any(left < modules[name].n_units for name, left in plan.items())
    recipe = gh.Recipe(gh.output_energy, Remedy(refit_level1, refit_survivors, refits_level1=True), 0.02)
    gh.prune(model, tokens, plan=plan, recipe=recipe, unit="kv", progress=False)
    for (name, one), other in zip(mine.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9, msg=name)


def test_joint_removal():
    remove_jointly, cheapest_pairs, repair_jointly, repair_by_sweep = taken_from(
        "12_neighbours", "remove_jointly", "cheapest_pairs", "repair_jointly", "repair_by_sweep"
    )
    cheapest_pairs.__globals__["PAIRS"] = pairs = torch.tensor(list(itertools.combinations(range(4), 2)))
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(40, 8, generator=generator).double() @ torch.randn(8, 8, generator=generator).double()
    h, w = z.T @ z + 0.1 * torch.eye(8).double(), torch.randn(3, 8, generator=generator).double()
    inverse = torch.linalg.inv(h)
    path = eliminate(h, w.T, torch.arange(8)[:, None], 5)
    shared = torch.ones(3, 8, dtype=torch.bool).index_fill(1, path.keep, False)
    together = repair_jointly(w, inverse, shared)
    torch.testing.assert_close(together[:, path.keep], path.solution.T)
    rows = torch.stack([remove_jointly(row, inverse, path.order) for row in w])
    torch.testing.assert_close(rows, together, atol=1e-8, rtol=1e-6)

    gone = cheapest_pairs(w, inverse)
    for row, mask in zip(w, gone, strict=True):
        for group, chosen in ((range(0, 4), mask[:4]), (range(4, 8), mask[4:])):
            prices = removal_costs(inverse, row[:, None], pairs + group.start)
            assert pairs[prices.argmin()].tolist() == chosen.nonzero().flatten().tolist()
    swept, jointly = ((new - w) @ h for new in (repair_by_sweep(w, inverse, gone), repair_jointly(w, inverse, gone)))
    price = [(change @ inverse * change).sum() for change in (swept, jointly)]
    assert price[0] > price[1], "in every other order of removal the passed columns stay as they are"
    first_alone = torch.zeros(3, 8, dtype=torch.bool)
    first_alone[:, 0] = True  # with everything still to come, the sweep is exact
    alike = repair_by_sweep(w, inverse, first_alone)
    torch.testing.assert_close(alike, repair_jointly(w, inverse, first_alone), atol=1e-8, rtol=1e-6)


def test_scores_of_texts():
    bits_per_byte, bootstrap_error = taken_from("09_comparison", "bits_per_byte", "bootstrap_error")
    generator = torch.Generator().manual_seed(0)
    texts = ["plain", "häßlich", "日本語の文"]
    losses = [torch.rand(n, generator=generator).double() for n in (4, 9, 2)]
    nats, targets = torch.stack([loss.sum() for loss in losses]), torch.tensor([4, 9, 2])
    size = torch.tensor([len(text.encode()) for text in texts])
    score = TextScore(16, 16, 3, "documents", nats, targets, size)
    assert math.isclose(bits_per_byte(torch.cat(losses), "".join(texts)), score.bits_per_byte)
    assert math.isclose(bootstrap_error(nats, targets), score.loss_error, rel_tol=0.1), "other draws"


def test_mcnemar():
    (mcnemar,) = taken_from("09_comparison", "mcnemar")
    generator = torch.Generator().manual_seed(0)
    for share in (0.0, 0.1, 0.5):
        a = torch.rand(60, generator=generator) < 0.6
        b = a ^ (torch.rand(60, generator=generator) < share)
        first, second = (
            SimpleNamespace(answers=[0] * 60, characters=[], correct=right, correct_norm=right) for right in (a, b)
        )
        right = paired_accuracy(first, second)
        assert mcnemar(a, b) == (right.only_first, right.only_second, pytest.approx(right.p_value))
