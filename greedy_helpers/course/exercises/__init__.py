"""Checkers for the notebooks' exercises. Each takes your function, tries it, and raises with a hint if it is not right.

Three levels each: the shape, the values against an independent reference, and an edge case. Sorted by notebook.
"""

# ruff: noqa: F401 - the names are exported

from .common import NotYet
from .nb00_to_03 import (
    check_activity,
    check_first_order,
    check_fool_magnitude,
    check_fused_layout,
    check_gated_magnitude,
    check_group_divergence,
    check_js_rows,
    check_perplexity,
    check_pieces,
    check_purposes,
    check_remove_channels,
    check_share_repaired,
    check_unit_energy,
    check_with_living_twin,
)
from .nb04_to_06 import (
    check_bias_remedy,
    check_block_macs,
    check_centred_solve,
    check_error_from_moments,
    check_greedy_plan,
    check_head_parameters,
    check_head_scores,
    check_remove_heads,
    check_ridge_toward,
    check_second_moment_scores,
    check_set_cost,
    check_spearman,
    check_standard_error,
    check_units_left,
)
from .nb07_to_09 import (
    check_bits_per_byte,
    check_bootstrap_error,
    check_comparable,
    check_downdate,
    check_draw,
    check_greedy_keep,
    check_mcnemar,
    check_pareto_front,
    check_removal_cost,
    check_residual_refit,
    check_rising_prices,
    check_shared_runs,
    check_sigma_of_random_ids,
)
from .nb10 import check_block_bytes, check_merge, check_micro_batch, check_resumable

__all__ = ["NotYet", *sorted(name for name in globals() if name.startswith("check_"))]
