"""Functions that a notebook builds up by hand and the package has as well: equal on random input, ties included.

The notebooks assert the same on their own data when nbval runs them. Here the input is chosen to be awkward: ties,
single heads, empty results, ratios on the edge of a whole unit.
"""

import ast
import itertools
import math
from pathlib import Path

import nbformat
import pytest
import torch

import greedy_helpers as gh

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"


def taken_from(stem, *names):
    """The functions of those names as the notebook defines them."""
    found = {"torch": torch, "math": math, "itertools": itertools}
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
        graph = gh.similarity_graph(values, tau)
        assert len(most_with_living_twin(values, tau)) == gh.maximal_redundancy(graph)


def test_divergence_of_maps_with_masked_keys():
    _, at_once = taken_from("03_similarity", "entropies", "divergence_at_once")
    maps = torch.randn(3, 5, 9, 9, generator=torch.Generator().manual_seed(0)).double().exp().tril()
    maps = maps / maps.sum(-1, keepdim=True)
    torch.testing.assert_close(gh.head_divergence([maps[:1], maps[1:]]), at_once(maps), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("group", [1, 2, 3, 6])
def test_divergence_of_groups(group):
    (group_divergence,) = taken_from("03_similarity", "group_divergence")
    values = divergences(6, torch.Generator().manual_seed(0), 6)
    torch.testing.assert_close(group_divergence(values, group), gh.unit_divergence(values, group))


def test_units_left():
    (units_left,) = taken_from("05_pruning", "units_left")
    for n, percent in itertools.product((1, 2, 7, 8, 32, 100), range(0, 100)):
        kept = gh.keep_top(torch.zeros(n), percent / 100)
        assert units_left(n, percent / 100) == len(kept), (n, percent)


def test_greedy_elimination():
    _, greedy_keep = taken_from("09_beyond_the_paper", "downdate", "greedy_keep")
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        z = torch.randn(30, 9, generator=generator).double() @ torch.randn(9, 9, generator=generator).double()
        h, b = z.T @ z + 0.1 * torch.eye(9).double(), torch.randn(9, 4, generator=generator).double()
        for n_keep in (1, 4, 8, 9):
            kept = gh.eliminate(h, b, torch.arange(9)[:, None], n_keep).keep
            torch.testing.assert_close(greedy_keep(h, b, n_keep), kept)
