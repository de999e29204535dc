"""What the children of the tests' fork server find imported and computed.

`tests.cli.test_cli.warm` starts the server. Without this each child spends half a second on imports
and, if it loads a model, as much on transformers' table of weight conversions.
"""

from __future__ import annotations

import atexit
import gc
from importlib import import_module
from pathlib import Path

gc.disable()  # imports make objects that stay
RECIPES = Path(__file__).resolve().parent.parent / "recipes"
MODULES = (
    "torch",
    "torch.distributed.checkpoint",
    "detect_secrets.core.plugins.util",
    "rich.progress",
    *(
        f"persea.{name}"
        for name in (
            "cli",
            "config.recipe",
            "evaluation.check_sampling",
            "evaluation.evaluate",
            "evaluation.named_mass",
            "losses",
            "pipeline.check_stage",
            "pipeline.plan",
            "pipeline.progress",
            "pipeline.stages",
            "report.page",
            "teachers.engines.transformers",
            "training.dataset",
            "training.loop",
            "training.student",
        )
    ),
    *(
        f"transformers.{name}"
        for name in (
            "generation.utils",
            "models.auto.modeling_auto",
            "models.auto.tokenization_auto",
            "models.gemma3.modeling_gemma3",
            "models.gpt_oss.modeling_gpt_oss",
            "models.llama.modeling_llama",
            "models.qwen3.modeling_qwen3",
        )
    ),
    "tests.cli.test_cli",  # where most children begin
)
for name in MODULES:
    import_module(name)
import_module("persea.config.recipe").load_recipe(RECIPES / "quickstart.yaml")
import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("llama")
atexit.register(gc.unfreeze)  # extension modules count what is left at the end
gc.freeze()  # a child does not search them, so it does not copy their pages either
gc.enable()
