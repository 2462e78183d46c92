"""Structured pruning of large language models without retraining (Li, Dong, Lei; arXiv 2407.19126).

In the order of the method: load a model, get text, find the structure, score, cut, refit, measure, save.
"""

from .allocation import keep_top
from .capture import BlockStream
from .checkpoint import disk_bytes, load_model, save_model
from .criteria import Criterion, Seen, random_scores, second_moment, weight_norm
from .data import (
    EMBEDDED,
    WIKITEXT2,
    calibration_tokens,
    default_sources,
    documents,
    evaluation_tokens,
    pack,
    python_corpus,
)
from .evaluate import compare_latency, count_parameters, generate_text, perplexity
from .families import FAMILIES, Family, ModuleLayout
from .moments import Moments
from .prune import PruneReport, PruneStep, module_moments, prune
from .reconstruct import least_squares, refit
from .structure import ChannelGroup, Depth2Module, UnknownFamily, blocks_of, depth2_modules, set_weight, weight_of
from .surgery import remove_units, undone_on_error, zero_units

__version__ = "0.1.0"

__all__ = [
    "EMBEDDED",
    "FAMILIES",
    "WIKITEXT2",
    "BlockStream",
    "ChannelGroup",
    "Criterion",
    "Depth2Module",
    "Family",
    "ModuleLayout",
    "Moments",
    "PruneReport",
    "PruneStep",
    "Seen",
    "UnknownFamily",
    "blocks_of",
    "calibration_tokens",
    "compare_latency",
    "count_parameters",
    "default_sources",
    "depth2_modules",
    "disk_bytes",
    "documents",
    "evaluation_tokens",
    "generate_text",
    "keep_top",
    "least_squares",
    "load_model",
    "module_moments",
    "pack",
    "perplexity",
    "prune",
    "python_corpus",
    "random_scores",
    "refit",
    "remove_units",
    "save_model",
    "second_moment",
    "set_weight",
    "undone_on_error",
    "weight_norm",
    "weight_of",
    "zero_units",
]
