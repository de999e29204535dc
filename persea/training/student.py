"""Student: load, adapt (full or LoRA), run, save."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError

from persea.chat.renderer import ChatRenderer
from persea.errors import DataError, MissingRequirementError, RefusedError, StorageError
from persea.losses import LMHead
from persea.models.loading import ModelSource, copy_tokenizer_files, load_model, local_folder
from persea.training.distributed.world import ParallelStrategy, World
from persea.training.lm_head import (
    LogitScaling,
    find_logit_scaling,
    hidden_states,
    pack_sequences,
    refuse_packing,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters on the named projections (Hu et al. 2021)."""

    rank: int
    alpha: float
    targets: tuple[str, ...]


@dataclass(frozen=True)
class ComputeOptions:
    """How a step is computed; none changes what is computed but by rounding.

    half       matrix products in bfloat16; weights, sums and the optimiser's moments stay in float32
    recompute  activations are made again in the backward pass instead of kept: less memory, about a third more time
    packing    short texts share a row, each blind to the others, instead of being padded
    """

    bf16: bool = False
    gradient_checkpointing: bool = False
    packing: bool = False


class HiddenStateModule(torch.nn.Module):
    """What a training step runs of a model, as one module: what is spread over processes is wrapped around its forward, so all that a
    step uses comes out of it, the head's weight too (under DDP a parameter that is not reached from an output counts as unused).
    """

    def __init__(self, model: PreTrainedModel, options: ComputeOptions) -> None:
        super().__init__()
        self.model, self.options = model, options

    def forward(
        self,
        ids_BS: torch.Tensor,
        mask_or_position_BS: torch.Tensor,
        row_N: torch.Tensor,
        position_N: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Hidden states [N, D], weight and bias of the head. place_BS: the mask, or each token's place in its text where texts are packed."""
        mask_BS, positions_BS = (
            (None, mask_or_position_BS) if self.options.packing else (mask_or_position_BS, None)
        )
        with torch.autocast(ids_BS.device.type, torch.bfloat16, enabled=self.options.bf16):
            hidden_ND = hidden_states(self.model, ids_BS, mask_BS, positions_BS)[row_N, position_N]
        linear: torch.nn.Linear = self.model.get_output_embeddings()
        weight_VD, bias_V = (
            None if side is None else side.view_as(side) for side in (linear.weight, linear.bias)
        )  # DDP overlooks a bare parameter
        return hidden_ND.bfloat16() if self.options.bf16 else hidden_ND, weight_VD, bias_V


@dataclass(frozen=True, eq=False)
class StudentModel:
    """A causal model in its own voice. `trained` = what the optimiser may change; `runs` = its Forward, spread over processes or not."""

    model: PreTrainedModel
    renderer: ChatRenderer
    source: ModelSource
    options: ComputeOptions = field(default=ComputeOptions())
    forward_module: torch.nn.Module | None = None

    @property
    def trainable_parameters(self) -> list[torch.nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    @cached_property
    def _logit_scaling(self) -> LogitScaling:
        return find_logit_scaling(self.model, len(self.renderer.vocabulary), "student")

    def hidden_and_head(
        self,
        ids_BS: torch.Tensor,
        mask_BS: torch.Tensor,
        row_N: torch.Tensor,
        position_N: torch.Tensor,
    ) -> tuple[torch.Tensor, LMHead]:
        """[N, D] what the head is given at positions (row_N, at_N) of right-padded texts, and the head; its padded rows are cut off."""
        runs, device, inputs = (
            self.forward_module or HiddenStateModule(self.model, self.options),
            self.model.device,
            (ids_BS, mask_BS, row_N, position_N),
        )
        hidden_ND, weight_VD, bias_V = runs(
            *(
                side.to(device)
                for side in (pack_sequences(*inputs) if self.options.packing else inputs)
            )
        )
        return hidden_ND, LMHead(
            weight_VD,
            len(self.renderer.vocabulary),
            bias_V,
            self._logit_scaling.scale,
            self._logit_scaling.softcap,
        )

    def logits(
        self,
        ids_BS: torch.Tensor,
        mask_BS: torch.Tensor,
        row_N: torch.Tensor,
        position_N: torch.Tensor,
    ) -> torch.Tensor:
        """[N, V] float32 logits at positions (row_N, at_N), all at once: training goes through `hidden` instead."""
        hidden_ND, head = self.hidden_and_head(ids_BS, mask_BS, row_N, position_N)
        return head.logits(hidden_ND)

    def distribute(self, world: World, parallel: ParallelStrategy) -> StudentModel:
        """This student as one of a world's processes holds it: backward averages the gradients of all. Every process calls it."""
        if world.size == 1:
            return self
        forward = HiddenStateModule(self.model, self.options)
        if parallel is ParallelStrategy.DDP:
            from torch.nn.parallel import DistributedDataParallel

            # Looking for unused parameters keeps the buckets as they are from the first step on. Otherwise DDP orders them anew after one step,
            # and a resumed training would add up the gradients of three processes in another order than one that went through.
            return replace(
                self, forward_module=DistributedDataParallel(forward, find_unused_parameters=True)
            )
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.model.device.type, (world.size,))
        layers = set(self.model._no_split_modules or ())
        for module in list(forward.modules()):
            if type(module).__name__ in layers:
                fully_shard(module, mesh=mesh)
        fully_shard(forward, mesh=mesh)
        return replace(self, forward_module=forward)

    def save(self, folder: Path) -> None:
        """A Hugging Face folder: weights (adapters merged), config, tokenizer, chat template."""
        model = self.model
        if getattr(model, "peft_config", None):
            import copy

            model = copy.deepcopy(model).merge_and_unload()
        origin = local_folder(self.source.tokenizer_name_or_path, "student")
        try:
            model.save_pretrained(folder)
            if origin is not None:
                copy_tokenizer_files(origin, folder)
            _save_stop_ids(folder / "generation_config.json", self.renderer.stop_ids)
        except (OSError, SafetensorError) as error:
            raise StorageError(
                f"cannot write the student: {error}",
                where=str(folder),
                remedy="free space, then run again: its training is kept",
            ) from error
        if origin is None:
            from transformers import AutoTokenizer

            AutoTokenizer.from_pretrained(
                self.source.tokenizer_name_or_path, trust_remote_code=False
            ).save_pretrained(folder)
        if self.source.thinking:
            _save_chat_template(folder, self.renderer.template_text)


def _save_chat_template(folder: Path, template_text: str) -> None:
    """The template that the student was taught in, where it is not the one that came with it."""
    (folder / "chat_template.jinja").write_text(template_text, encoding="utf-8")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if config.pop("chat_template", None) is not None:
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _save_stop_ids(path: Path, stop_ids: Sequence[int]) -> None:
    """Let the saved configuration stop at the voice's ends too: a base model's own names its text's end only, and would run on."""
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    eos = config.get("eos_token_id")
    own = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if set(stop_ids) - set(own):
        path.write_text(
            json.dumps(
                config | {"eos_token_id": [*own, *(i for i in stop_ids if i not in own)]}, indent=2
            )
            + "\n",
            encoding="utf-8",
        )


def load_student(
    source: ModelSource,
    renderer: ChatRenderer,
    lora: LoraSettings | None,
    seed: int = 0,
    options: ComputeOptions = ComputeOptions(),
) -> StudentModel:
    """The student's weights, ready to be trained in full, or with adapters; these begin at random, by the seed."""
    model = load_model(source, renderer, "student")
    torch.manual_seed(seed)
    if lora is None:
        model = model.float()  # a step is smaller than what bfloat16 can add to a weight; frozen weights may stay as they are stored
    else:
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise MissingRequirementError(
                "adapt: lora needs peft", where="student", remedy="pip install peft"
            ) from error
        try:
            model = get_peft_model(
                model,
                LoraConfig(
                    r=lora.rank,
                    lora_alpha=lora.alpha,
                    target_modules=list(lora.targets),
                    task_type="CAUSAL_LM",
                ),
            )
        except ValueError as error:
            raise DataError(
                str(error).splitlines()[0],
                where="student.lora.targets",
                remedy="name projections this model has, e.g. q_proj",
            ) from error
    if options.gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise RefusedError(
                f"{type(model).__name__} cannot make its activations again",
                where="training.gradient_checkpointing",
                remedy="gradient_checkpointing: false",
            )
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    student = StudentModel(model, renderer, source, options)
    assert (
        student._logit_scaling
    )  # one that cannot be trained is refused here, not at the first step
    if options.packing:
        refuse_packing(model, len(renderer.vocabulary), "training.packing")
    return student
