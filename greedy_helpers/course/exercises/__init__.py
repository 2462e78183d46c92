"""Checkers for the notebooks' exercises. Each takes your function, tries it, and raises with a hint if it is not right.

Three levels each: the shape, the values against an independent reference, and an edge case. One file per notebook.
"""

from .common import NotYet
from .nb00 import check_activity, check_perplexity, check_share_repaired
from .nb01 import check_fused_layout, check_pieces, check_remove_channels
from .nb02 import (
    check_first_order,
    check_fool_magnitude,
    check_gated_magnitude,
    check_purposes,
    check_unit_energy,
)
from .nb03 import check_group_divergence, check_js_rows, check_with_living_twin
from .nb04 import (
    check_head_scores,
    check_second_moment_scores,
    check_set_cost,
    check_spearman,
    check_standard_error,
)
from .nb05 import (
    check_block_macs,
    check_greedy_plan,
    check_head_parameters,
    check_remove_heads,
    check_units_left,
)
from .nb06 import (
    check_bias_remedy,
    check_centred_solve,
    check_error_from_moments,
    check_ridge_toward,
)
from .nb07 import check_draw, check_shared_runs, check_sigma_of_random_ids
from .nb08 import (
    check_bits_per_byte,
    check_bootstrap_error,
    check_comparable,
    check_mcnemar,
    check_pareto_front,
)
from .nb09 import (
    check_downdate,
    check_greedy_keep,
    check_removal_cost,
    check_residual_refit,
    check_rising_prices,
)
from .nb10 import check_block_bytes, check_merge, check_micro_batch, check_resumable

__all__ = [
    "NotYet",
    "check_activity",
    "check_bias_remedy",
    "check_bits_per_byte",
    "check_block_bytes",
    "check_block_macs",
    "check_bootstrap_error",
    "check_centred_solve",
    "check_comparable",
    "check_downdate",
    "check_draw",
    "check_error_from_moments",
    "check_first_order",
    "check_fool_magnitude",
    "check_fused_layout",
    "check_gated_magnitude",
    "check_greedy_keep",
    "check_greedy_plan",
    "check_group_divergence",
    "check_head_parameters",
    "check_head_scores",
    "check_js_rows",
    "check_mcnemar",
    "check_merge",
    "check_micro_batch",
    "check_pareto_front",
    "check_perplexity",
    "check_pieces",
    "check_purposes",
    "check_removal_cost",
    "check_remove_channels",
    "check_remove_heads",
    "check_residual_refit",
    "check_resumable",
    "check_ridge_toward",
    "check_rising_prices",
    "check_second_moment_scores",
    "check_set_cost",
    "check_share_repaired",
    "check_shared_runs",
    "check_sigma_of_random_ids",
    "check_spearman",
    "check_standard_error",
    "check_unit_energy",
    "check_units_left",
    "check_with_living_twin",
]
