"""Names of optimisers, and what a recipe says about weight decay and saved weights."""

from __future__ import annotations

from enum import StrEnum


class OptimizerName(StrEnum):
    """Optimisers, with the names that transformers' TrainingArguments have for them.

    ADAMW: torch's AdamW. ADAMW_FUSED: its fused kernels, which differ by rounding. ADAMW_8BIT:
    bitsandbytes' AdamW, with moments of 8 bits (Dettmers et al. 2021, arXiv 2110.02861). MUON:
    torch's Muon for the matrices of the layers, AdamW for everything else (Jordan et al. 2024).
    """

    ADAMW = "adamw_torch"
    ADAMW_FUSED = "adamw_torch_fused"
    ADAMW_8BIT = "adamw_8bit"
    MUON = "muon"


class WeightDecayOn(StrEnum):
    """Weights that decay: MATRICES = all but norms and biases, ALL = every weight."""

    MATRICES = "matrices"
    ALL = "all"


class SavedDtype(StrEnum):
    """Type of the student's saved weights: AUTO = the one that its base is stored in."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
