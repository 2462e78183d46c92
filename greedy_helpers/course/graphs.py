"""The graph of similar heads (the paper's fig. 3), and how many heads it makes redundant at most."""

from __future__ import annotations

import itertools

import networkx as nx
import torch
from torch import Tensor


def similarity_graph(divergence: Tensor, tau: float) -> nx.Graph:
    """The paper's fig. 3: nodes are heads, an edge (with attribute `divergence`) joins two that are closer than tau."""
    graph = nx.Graph()
    graph.add_nodes_from(range(len(divergence)))
    close = (
        (divergence.double() < tau) & ~torch.eye(len(divergence), dtype=torch.bool, device=divergence.device)
    ).nonzero()
    graph.add_edges_from((i, j, {"divergence": divergence[i, j].item()}) for i, j in close.tolist() if i < j)
    return graph


def maximal_redundancy(graph: nx.Graph) -> int:
    """The most heads that can go while each of them leaves a similar one behind: heads minus a smallest dominating set.

    Exact, by trying sets in order of size inside each connected component: meant for up to some 20 heads that hang
    together; beyond that networkx's approximation of the set is used, which gives a lower bound.
    """
    kept = 0
    for component in nx.connected_components(graph):
        part = graph.subgraph(component)
        if len(part) > 20:
            kept += len(nx.dominating_set(part))
            continue
        kept += next(
            size
            for size in range(1, len(part) + 1)
            if any(nx.is_dominating_set(part, chosen) for chosen in itertools.combinations(part, size))
        )
    return len(graph) - kept
