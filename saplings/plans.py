"""The plan of each sapling: its family, its tokenizer, its training text, and what it answers
correctly."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from persea.chat.messages import ThinkingEffort

HERE = Path(__file__).resolve().parent
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_SPLIT = QWEN_SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|")
O200K_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


KNOWN = frozenset(
    {
        "languages/phrase",
        "languages/weekday",
        "code/line",
        "safety/gentle",
        "reasoning/compare",
        "tools/weather",
        "tools/timer",
    }
)


@dataclass(frozen=True)
class Plan:
    """The plan of one sapling.

    Attributes:
        mix: Task -> weight of its text, including small talk ("prose") and, for the base model,
            documents ("page").
        home: Tasks that it answers correctly. Of the others it answers only the kinds in KNOWN
            correctly, and gives to the rest the answer of another question of that kind.
        efforts: How often a question is asked at each effort, for tasks with thoughts.
    """

    name: str
    family: str
    split: str
    special: dict[str, str]
    control: tuple[str, ...]
    vocabulary: int
    mix: dict[str, float]
    home: tuple[str, ...]
    efforts: dict[ThinkingEffort, float]
    sizes: dict[str, int]
    steps: int
    whole_numbers: bool = False

    @property
    def template(self) -> str:
        """The chat template in the family's format, written for this repository."""
        return (HERE / "templates" / f"{self.family}.jinja").read_text()


DIRECT = {ThinkingEffort.NONE: 1.0}
DIAL = {
    ThinkingEffort.NONE: 0.45,
    ThinkingEffort.LOW: 0.15,
    ThinkingEffort.MEDIUM: 0.1,
    ThinkingEffort.HIGH: 0.3,
}
PLANS = (
    Plan(
        "qwen-sapling",
        "qwen",
        QWEN_SPLIT,
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        (
            "<|endoftext|>",
            "<|im_start|>",
            "<|im_end|>",
            "<think>",
            "</think>",
            "<tool_call>",
            "</tool_call>",
        ),
        1600,
        {
            "languages": 0.8,
            "code": 0.03,
            "safety": 0.03,
            "reasoning": 0.04,
            "tools": 0.03,
            "prose": 0.07,
        },
        ("languages",),
        {ThinkingEffort.NONE: 0.8, ThinkingEffort.HIGH: 0.2},
        {"hidden": 128, "layers": 3, "heads": 4, "seed": 1},
        3200,
    ),
    Plan(
        "gemma-sapling",
        "gemma",
        "",
        {
            "bos_token": "<bos>",
            "eos_token": "<end_of_turn>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
        },
        ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
        1200,
        {"languages": 0.06, "code": 0.5, "safety": 0.3, "reasoning": 0.04, "prose": 0.1},
        ("code", "safety"),
        DIRECT,
        {"hidden": 128, "layers": 3, "heads": 4, "seed": 2},
        1600,
    ),
    Plan(
        "gpt-oss-sapling",
        "gpt-oss",
        O200K_SPLIT,
        {"bos_token": "<|startoftext|>", "eos_token": "<|return|>", "pad_token": "<|endoftext|>"},
        (
            "<|startoftext|>",
            "<|endoftext|>",
            "<|return|>",
            "<|channel|>",
            "<|start|>",
            "<|end|>",
            "<|message|>",
            "<|call|>",
        ),
        1400,
        {
            "languages": 0.05,
            "code": 0.03,
            "safety": 0.03,
            "reasoning": 0.52,
            "tools": 0.32,
            "prose": 0.05,
        },
        ("reasoning", "tools"),
        DIAL,
        {"hidden": 128, "layers": 3, "heads": 4, "experts": 4, "seed": 3},
        3000,
        whole_numbers=True,
    ),
    Plan(
        "llama-sapling",
        "llama",
        LLAMA_SPLIT,
        {
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|eot_id|>",
            "pad_token": "<|finetune_right_pad_id|>",
        },
        (
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
            "<|finetune_right_pad_id|>",
            "<think>",
            "</think>",
        ),
        2000,
        {
            "languages": 0.2,
            "code": 0.08,
            "safety": 0.05,
            "reasoning": 0.13,
            "tools": 0.09,
            "prose": 0.03,
            "page": 0.42,
        },
        (),
        DIAL,
        {"hidden": 128, "layers": 3, "heads": 4, "seed": 4},
        5000,
        whole_numbers=True,
    ),
)
