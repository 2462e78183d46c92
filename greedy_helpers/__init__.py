"""Structured pruning of large language models without retraining (Li, Dong, Lei; arXiv 2407.19126).

In the order of the method: load a model, get text, find the structure, score, cut, refit, measure, save. What is not
here is importable from its module: `from greedy_helpers.allocation import middle_blocks`.
"""

from .allocation import budget, cost_plan, keep_best, uniform_plan
from .checkpoint import load_model, load_pruned, save_pruned
from .criteria import (
    Seen,
    fixed_scores,
    flap,
    output_energy,
    random_scores,
    second_moment,
    taylor_scores,
    wanda_sp,
    weight_norm,
)
from .data import (
    EMBEDDED,
    WIKITEXT2,
    calibration_tokens,
    default_sources,
    evaluation_tokens,
)
from .data_free import random_tokens, self_generated_tokens
from .discovery import discover
from .evaluate import evaluate_text, generate_text, perplexity, read_text
from .export import export_plain
from .families import FAMILIES
from .greedy import exact_greedy
from .moments import Moments
from .pruning import prune, scores_of
from .recipes import FLAP, OSSCAR, PAPER, RECOMMENDED, Recipe
from .reconstruct import solve
from .similarity import head_divergence, redundant_heads
from .stream import BlockStream
from .structure import blocks_of, count_parameters, depth2_modules, set_weight, weight_of
from .surgery import remove_units, zero_units

__version__ = "0.2.0"

__all__ = [
    "EMBEDDED",
    "FAMILIES",
    "FLAP",
    "OSSCAR",
    "PAPER",
    "RECOMMENDED",
    "WIKITEXT2",
    "BlockStream",
    "Moments",
    "Recipe",
    "Seen",
    "blocks_of",
    "budget",
    "calibration_tokens",
    "cost_plan",
    "count_parameters",
    "default_sources",
    "depth2_modules",
    "discover",
    "evaluate_text",
    "evaluation_tokens",
    "exact_greedy",
    "export_plain",
    "fixed_scores",
    "flap",
    "generate_text",
    "head_divergence",
    "keep_best",
    "load_model",
    "load_pruned",
    "output_energy",
    "perplexity",
    "prune",
    "random_scores",
    "random_tokens",
    "read_text",
    "redundant_heads",
    "remove_units",
    "save_pruned",
    "scores_of",
    "second_moment",
    "self_generated_tokens",
    "set_weight",
    "solve",
    "taylor_scores",
    "uniform_plan",
    "wanda_sp",
    "weight_norm",
    "weight_of",
    "zero_units",
]
