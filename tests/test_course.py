"""What only the notebooks use: the graph of similar heads, and cards of calibration tokens."""

import pytest
import torch

from greedy_helpers import redundant_heads
from greedy_helpers.course.cards import calibration_card
from greedy_helpers.course.graphs import maximal_redundancy, similarity_graph


def line(*places):
    places = torch.tensor(places)
    return (places[:, None] - places).abs()


@pytest.mark.parametrize("tau", [0.0, 0.05, 0.2, 0.5, 0.7])
def test_an_edge_joins_two_heads_that_are_closer_than_tau(tau):
    divergence = torch.rand(8, 8, generator=torch.Generator().manual_seed(0))
    divergence = (divergence + divergence.T) / 2
    graph = similarity_graph(divergence, tau)
    assert list(graph) == list(range(8))
    assert {edge: graph.edges[edge]["divergence"] for edge in graph.edges} == {
        (i, j): divergence[i, j].item() for i in range(8) for j in range(i + 1, 8) if divergence[i, j] < tau
    }


def test_walk_and_graph_draw_the_same_line():
    """At the rounding of float32: 0.7 is stored as 0.69999999, which is below a tau of 0.7."""
    divergence = line(0.0, 0.7)
    assert redundant_heads(divergence, 0.7) == [0]
    assert list(similarity_graph(divergence, 0.7).edges) == [(0, 1)]


def test_maximal_redundancy():
    assert maximal_redundancy(similarity_graph(line(0.0, 0.1, 0.2, 0.9), 0.15)) == 2  # 1 and 3 stay
    assert maximal_redundancy(similarity_graph(line(0.0, 1.0, 2.0), 0.5)) == 0
    path = line(*(0.1 * i for i in range(6)))
    assert maximal_redundancy(similarity_graph(path, 0.15)) == 4  # two of six dominate a path


def test_a_card_sees_evaluation_text_among_the_calibration():
    text = torch.arange(400).view(4, 100)
    card = calibration_card(text, "numbers", "mine", {"mine": text[:2], "other": text + 1000, "half": text[:1, :54]})
    assert card.shared == {"mine": 1.0, "other": 0.0, "half": 1.0}
    assert card.in_domain == {"mine": True, "other": False, "half": False}
    assert (card.windows, card.seq, card.tokens, card.distinct_tokens) == (4, 100, 400, 400)
    assert "against mine: in domain, 100.0% of its 8-token runs" in str(card)
    assert calibration_card(text, "again").fingerprint == card.fingerprint
    assert calibration_card(text + 1, "others").fingerprint != card.fingerprint
