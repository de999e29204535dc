"""Next-token distributions: the head that makes them, sparse ones, and their kinds."""

from persea.distributions.sampling import sample_distributions
from persea.distributions.sparse import (
    LOGPROB_STEP_NATS,
    MASS_TOLERANCE,
    DistributionKind,
    SparseDistributions,
    concat_distributions,
    distributions_from_top_logprobs,
    text_only_distributions,
    validate_logprobs,
)
from persea.distributions.topk import min_entries_within_kl, topk_within_kl

__all__ = [
    "LOGPROB_STEP_NATS",
    "MASS_TOLERANCE",
    "DistributionKind",
    "SparseDistributions",
    "concat_distributions",
    "distributions_from_top_logprobs",
    "min_entries_within_kl",
    "sample_distributions",
    "text_only_distributions",
    "topk_within_kl",
    "validate_logprobs",
]
