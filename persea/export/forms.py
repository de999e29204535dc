"""What a student is exported to; without imports, for the command line."""

from __future__ import annotations

from enum import StrEnum


class ExportForm(StrEnum):
    """What a student is exported to."""

    HF = "hf"
    ADAPTER = "adapter"
    GGUF = "gguf"
    OLLAMA = "ollama"


class GgufPrecision(StrEnum):
    """How matrices are stored. `auto` keeps the precision of the student's weights."""

    AUTO = "auto"
    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    Q8_0 = "q8_0"
