"""Structured pruning of large language models without retraining (Li, Dong, Lei; arXiv 2407.19126).

In the order of the method: load a model, get text, find the structure, score, cut, refit, measure, save.
"""

from .allocation import (
    adaptive_plan,
    budget,
    keep_best,
    keep_top,
    middle_blocks,
    redundancy_plan,
    uniform_plan,
    unit_parameters,
)
from .capture import BlockStream
from .checkpoint import disk_bytes, export_plain, load_model, load_pruned, save_pruned
from .criteria import (
    Criterion,
    Seen,
    flap,
    obs_cost,
    output_energy,
    random_scores,
    second_moment,
    second_moment_identity,
    taylor,
    wanda_sp,
    weight_norm,
)
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
from .discover import Units, coupling, discover, find_units, linears_of, tiny_twin
from .evaluate import compare_latency, count_parameters, generate_text, perplexity
from .families import FAMILIES, Family, ModuleLayout
from .moments import Moments
from .prune import PruneReport, PruneStep, module_moments, prune, scores_of
from .reconstruct import least_squares, refit
from .similarity import (
    divergences_of,
    head_divergence,
    maximal_redundancy,
    redundant_first,
    redundant_heads,
    similarity_graph,
    unit_divergence,
)
from .structure import (
    ChannelGroup,
    Depth2Module,
    UnknownFamily,
    UnsupportedModule,
    blocks_of,
    blocks_path,
    channel_index,
    depth2_modules,
    family_of,
    set_weight,
    weight_of,
)
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
    "Units",
    "UnknownFamily",
    "UnsupportedModule",
    "adaptive_plan",
    "blocks_of",
    "blocks_path",
    "budget",
    "calibration_tokens",
    "channel_index",
    "compare_latency",
    "count_parameters",
    "coupling",
    "default_sources",
    "depth2_modules",
    "discover",
    "disk_bytes",
    "divergences_of",
    "documents",
    "evaluation_tokens",
    "export_plain",
    "family_of",
    "find_units",
    "flap",
    "generate_text",
    "head_divergence",
    "keep_best",
    "keep_top",
    "least_squares",
    "linears_of",
    "load_model",
    "load_pruned",
    "maximal_redundancy",
    "middle_blocks",
    "module_moments",
    "obs_cost",
    "output_energy",
    "pack",
    "perplexity",
    "prune",
    "python_corpus",
    "random_scores",
    "redundancy_plan",
    "redundant_first",
    "redundant_heads",
    "refit",
    "remove_units",
    "save_pruned",
    "scores_of",
    "second_moment",
    "second_moment_identity",
    "set_weight",
    "similarity_graph",
    "taylor",
    "tiny_twin",
    "undone_on_error",
    "uniform_plan",
    "unit_divergence",
    "unit_parameters",
    "wanda_sp",
    "weight_norm",
    "weight_of",
    "zero_units",
]
