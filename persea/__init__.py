"""Distil several language models, each with its own tokenizer, into one student.

The ten lines that need no run folder: two chat renderers, the map between their vocabularies, the
loss that compares them where both tokenizers begin a token at the same byte.

    import persea

    student = persea.load_renderer("meta-llama/Llama-3.2-3B-Instruct")
    teacher = persea.load_renderer("Qwen/Qwen3-8B")
    event_map = persea.event_map(teacher=teacher, student=student)
    loss_fn = persea.losses.EventKL(event_map, event_weight=0.7)
    cache = persea.open_cache("runs/avocado", teacher="qwen")  # answers and distributions
    dataset = persea.DistillDataset(cache, student=student, teachers={"qwen": teacher})

Or the whole job, the same as `persea run avocado.yaml` on the command line:

    run = persea.distill(persea.Recipe.from_yaml("avocado.yaml"), out="runs/avocado")

Names in `persea.__all__` are public and keep their signatures; everything else may change.
`examples/` shows each of them at work, `docs/architecture.md` shows which package does what.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from persea import errors, losses
    from persea.alignment.event_map import EventMap, event_map
    from persea.alignment.spans import align
    from persea.cache.reader import open_cache
    from persea.chat.messages import Conversation
    from persea.chat.renderer import ChatRenderer
    from persea.config.recipe import Recipe
    from persea.evaluation.api import audition, check, evaluate
    from persea.models.loading import load_renderer
    from persea.pipeline.distill import DistillResult, distill
    from persea.training.dataset import DistillDataset

__version__ = "0.1.0"

__all__ = [
    "ChatRenderer",
    "Conversation",
    "DistillDataset",
    "DistillResult",
    "EventMap",
    "Recipe",
    "__version__",
    "align",
    "audition",
    "check",
    "distill",
    "errors",
    "evaluate",
    "event_map",
    "load_renderer",
    "losses",
    "open_cache",
]

# Public name -> the module that defines it. Loaded on first use (PEP 562): `import persea` alone
# imports neither torch nor transformers, which take seconds.
_MODULE_OF = {
    "ChatRenderer": "persea.chat.renderer",
    "Conversation": "persea.chat.messages",
    "DistillDataset": "persea.training.dataset",
    "DistillResult": "persea.pipeline.distill",
    "EventMap": "persea.alignment.event_map",
    "Recipe": "persea.config.recipe",
    "align": "persea.alignment.spans",
    "audition": "persea.evaluation.api",
    "check": "persea.evaluation.api",
    "distill": "persea.pipeline.distill",
    "evaluate": "persea.evaluation.api",
    "event_map": "persea.alignment.event_map",
    "load_renderer": "persea.models.loading",
    "open_cache": "persea.cache.reader",
}
_SUBMODULES = ("errors", "losses")


if not TYPE_CHECKING:  # type checkers read the imports above and find misspelt names

    def __getattr__(name: str) -> Any:
        """Import a public name from its module and keep it."""
        if name in _SUBMODULES:
            return importlib.import_module(f"persea.{name}")
        if name not in _MODULE_OF:
            raise AttributeError(f"module 'persea' has no attribute {name!r}")
        value = getattr(importlib.import_module(_MODULE_OF[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    """Return the public names."""
    return list(__all__)
