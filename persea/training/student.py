"""The student model: load, adapt (full or LoRA), run and save."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from persea.chat.renderer import ChatRenderer
from persea.errors import DataError, MissingRequirementError, RefusedError, StorageError
from persea.losses import LMHead
from persea.models.loading import ModelSource, load_model, local_tokenizer_folder
from persea.models.tokenizer_files import copy_tokenizer_files
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
    """Low-rank adapters (Hu et al. 2021).

    Attributes:
        rank: rank of the added matrices.
        alpha: the added matrices are scaled by alpha / rank.
        targets: names of the adapted projections.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]


@dataclass(frozen=True)
class ComputeOptions:
    """How a step is computed; the options change results by rounding only.

    Attributes:
        bf16: matrix products in bfloat16; weights, sums and optimiser moments stay float32.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a
            third more time.
        packing: put several short texts into one row, without attention between them, instead of
            padding.
    """

    bf16: bool = False
    gradient_checkpointing: bool = False
    packing: bool = False


class HiddenStateModule(torch.nn.Module):
    """Everything a training step runs of a model, as one module that DDP or FSDP can wrap.

    The head's weight is an output too: under DDP a parameter that no output reaches is unused.
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
        """Return hidden states [N, D], weight and bias of the head.

        Args:
            ids_BS: int64 token ids.
            mask_or_position_BS: attention mask, or with packing each token's position in its text.
            row_N: row of each wanted position.
            position_N: the position.
        """
        mask_BS, positions_BS = (
            (None, mask_or_position_BS) if self.options.packing else (mask_or_position_BS, None)
        )
        with torch.autocast(ids_BS.device.type, torch.bfloat16, enabled=self.options.bf16):
            hidden_ND = hidden_states(self.model, ids_BS, mask_BS, positions_BS)[row_N, position_N]
        linear: torch.nn.Linear = self.model.get_output_embeddings()
        # view_as: DDP does not see a parameter that is returned as it is
        weight_VD, bias_V = (
            None if side is None else side.view_as(side) for side in (linear.weight, linear.bias)
        )
        return hidden_ND.bfloat16() if self.options.bf16 else hidden_ND, weight_VD, bias_V


@dataclass(frozen=True, eq=False)
class StudentModel:
    """A causal language model with its chat renderer.

    Attributes:
        model: the transformers model, with adapters where LoRA is used.
        renderer: chat renderer of the model.
        source: where the model comes from.
        options: how a step is computed.
        forward_module: the distributed forward pass; None in one process.
    """

    model: PreTrainedModel
    renderer: ChatRenderer
    source: ModelSource
    options: ComputeOptions = field(default=ComputeOptions())
    forward_module: torch.nn.Module | None = None

    @property
    def trainable_parameters(self) -> list[torch.nn.Parameter]:
        """Parameters that the optimiser changes."""
        return [p for p in self.model.parameters() if p.requires_grad]

    @cached_property
    def _logit_scaling(self) -> LogitScaling:
        """Scale and soft cap of the logits, checked once."""
        return find_logit_scaling(self.model, len(self.renderer.vocabulary), "student")

    def hidden_and_head(
        self,
        ids_BS: torch.Tensor,
        mask_BS: torch.Tensor,
        row_N: torch.Tensor,
        position_N: torch.Tensor,
    ) -> tuple[torch.Tensor, LMHead]:
        """Run the model and return hidden states [N, D] and the head, without padded rows.

        Args:
            ids_BS: int64 token ids, right-padded.
            mask_BS: 1 = token, 0 = padding.
            row_N: row of each wanted position.
            position_N: the position.
        """
        forward = self.forward_module or HiddenStateModule(self.model, self.options)
        inputs: tuple[torch.Tensor, ...] = (ids_BS, mask_BS, row_N, position_N)
        inputs = pack_sequences(*inputs) if self.options.packing else inputs
        hidden_ND, weight_VD, bias_V = forward(*(side.to(self.model.device) for side in inputs))
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
        """Return all float32 logits [N, V] at once; training uses `hidden_and_head` instead."""
        hidden_ND, head = self.hidden_and_head(ids_BS, mask_BS, row_N, position_N)
        return head.logits(hidden_ND)

    def distribute(self, world: World, parallel: ParallelStrategy) -> StudentModel:
        """Return the student as one of several processes holds it; collective.

        The backward pass averages the gradients of all processes.

        Args:
            world: this process among all processes.
            parallel: DDP or FSDP.
        """
        if world.size == 1:
            return self
        forward = HiddenStateModule(self.model, self.options)
        if parallel is ParallelStrategy.DDP:
            from torch.nn.parallel import DistributedDataParallel

            # find_unused_parameters keeps the order of gradient buckets from the first step on.
            # Otherwise DDP reorders them after one step, and a resumed training would add the
            # gradients of three processes in another order than an uninterrupted one.
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
        """Save a Hugging Face folder: weights (adapters merged), config, tokenizer, chat template.

        Raises:
            StorageError: if the folder cannot be written.
        """
        model: Any = self.model
        if getattr(model, "peft_config", None):
            import copy

            model = copy.deepcopy(model).merge_and_unload()
        origin = local_tokenizer_folder(self.source, "student")
        try:
            model.save_pretrained(folder)
            if origin is not None:
                copy_tokenizer_files(origin, folder)
            _save_stop_ids(folder / "generation_config.json", self.renderer.stop_ids)
        except (OSError, SafetensorError) as error:
            raise StorageError(
                f"cannot write the student: {error}",
                where=str(folder),
                remedy="free space, then run again: the training resumes from its last checkpoint",
            ) from error
        if origin is None:
            from transformers import AutoTokenizer

            AutoTokenizer.from_pretrained(
                self.source.tokenizer_name_or_path, trust_remote_code=False
            ).save_pretrained(folder)
        if self.source.thinking or self.source.chat_template:
            _save_chat_template(folder, self.renderer.template_text)


def _save_chat_template(folder: Path, template_text: str) -> None:
    """Save the template that the student was trained with, if it is not the model's own."""
    (folder / "chat_template.jinja").write_text(template_text, encoding="utf-8")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if config.pop("chat_template", None) is not None:
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _save_stop_ids(path: Path, stop_ids: Sequence[int]) -> None:
    """Add the template's stop tokens to the generation config.

    A base model stops only at the end of a text and would not stop after an answer.
    """
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
    """Load the student for training.

    Args:
        source: where the model comes from.
        renderer: the student's chat renderer.
        lora: adapters to train; None = all weights.
        seed: seed of the adapters' initial weights.
        options: how a step is computed.

    Raises:
        MissingRequirementError: if peft is needed and not installed.
        DataError: if the model has no projection of a LoRA target's name.
        RefusedError: if the model's head cannot be trained, or if the model does not support an
            option.
    """
    model: Any = load_model(source, renderer, "student")
    torch.manual_seed(seed)
    if lora is None:
        # float32: a step is smaller than bfloat16 can add to a weight; frozen weights may stay
        model = model.float()
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
                    lora_alpha=lora.alpha,  # type: ignore[arg-type]  # a float works too
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
                f"{type(model).__name__} does not support gradient checkpointing",
                where="training.gradient_checkpointing",
                remedy="gradient_checkpointing: false",
            )
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    student = StudentModel(model, renderer, source, options)
    assert student._logit_scaling  # raises here, not at the first step, if it cannot be trained
    if options.packing:
        refuse_packing(model, len(renderer.vocabulary), "training.packing")
    return student
