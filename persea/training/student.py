"""The student model: load, adapt (full or LoRA), run and save."""

from __future__ import annotations

import json
import os
import warnings
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
from persea.models.hidden_states import LogitScaling, find_logit_scaling, hidden_states
from persea.models.identity import model_name
from persea.models.loading import (
    ModelSource,
    download_model,
    load_model,
    local_tokenizer_folder,
)
from persea.models.tokenizer_files import copy_tokenizer_files
from persea.models.weight_shapes import read_stored_dtype
from persea.training.distributed.world import ParallelStrategy, World
from persea.training.packing import pack_sequences, refuse_packing

if TYPE_CHECKING:
    from transformers import PreTrainedModel


ALL_LINEAR = "all-linear"  # PEFT's word for every linear layer but the head


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters (Hu et al. 2021).

    Attributes:
        rank: rank of the added matrices.
        alpha: the added matrices are scaled by alpha / rank.
        targets: names of the adapted projections; ("all-linear",) = every linear layer but the
            head.
        dropout: dropout before the added matrices.
        use_rslora: scale by alpha / sqrt(rank) (Kalajdzievski 2023, arXiv 2312.03732).
        use_dora: learn the magnitude of each column apart (Liu et al. 2024, arXiv 2402.09353).
        modules_to_save: names of modules that are trained whole beside the adapters.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    modules_to_save: tuple[str, ...] = ()


@dataclass(frozen=True)
class ComputeOptions:
    """How a step is computed; the options change results by rounding only.

    Attributes:
        bf16: matrix products in bfloat16; weights, sums and optimiser moments stay float32.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a
            third more time.
        packing: put several short texts into one row, without attention between them, instead of
            padding.
        torch_compile: compile the forward pass with torch.compile.
    """

    bf16: bool = False
    gradient_checkpointing: bool = False
    packing: bool = False
    torch_compile: bool = False


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
        forward_module: the distributed or compiled forward pass; None = the plain one.
        stored_dtype: type that the base's weights are stored in; None = unknown, or random.
    """

    model: PreTrainedModel
    renderer: ChatRenderer
    source: ModelSource
    options: ComputeOptions = field(default=ComputeOptions())
    forward_module: torch.nn.Module | None = None
    stored_dtype: torch.dtype | None = None

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
        forward: Any = HiddenStateModule(self.model, self.options)
        if self.options.torch_compile:
            # the length of a batch changes from step to step
            forward = torch.compile(forward, dynamic=True)
        if world.size == 1:
            return replace(self, forward_module=forward) if self.options.torch_compile else self
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

    @property
    def embedding_ids(self) -> frozenset[int]:
        """`id` of the weights of embedding and head, which Muon leaves to AdamW."""
        modules = (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        return frozenset(id(p) for m in modules if m is not None for p in m.parameters())

    def save(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """Save a Hugging Face folder: weights (adapters merged), config, tokenizer, chat template.

        Adapters are saved too, in `adapter` beside the folder.

        Args:
            folder: the folder to write.
            dtype: of the saved weights; None = the one that they were trained in.

        Raises:
            StorageError: if the folder cannot be written.
        """
        model: Any = self.model
        origin = local_tokenizer_folder(self.source, "student")
        try:
            if getattr(model, "peft_config", None):
                import copy

                adapter = folder.with_name("adapter")
                _save_adapter(model, adapter, self.source)
                if self.source.quantize == "none":
                    model = copy.deepcopy(model).merge_and_unload()
                else:  # into the weights as they are stored, not as the training rounded them
                    model = _merge_into_stored(self.source, self.renderer, adapter)
            # copies: a training may go on with the weights
            weights = None if dtype is None else _cast_weights(model, dtype)
            model.save_pretrained(folder, state_dict=weights)
            if dtype is not None:
                _write_key(folder / "config.json", "dtype", str(dtype).removeprefix("torch."))
            _allow_by_umask(folder)
            copy_tokenizer_files(origin, folder)
            _save_stop_ids(folder / "generation_config.json", self.renderer.stop_ids)
        except (OSError, SafetensorError) as error:
            raise StorageError(
                f"cannot write the student: {error}",
                where=str(folder),
                remedy="free space, then run again: the training resumes from its last checkpoint",
            ) from error
        if self.source.thinking or self.source.chat_template:
            _save_chat_template(folder, self.renderer.template_text)


def _cast_weights(model: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the model's weights; those of floating point in another type. Tied weights stay one
    tensor, so that the folder holds them once.
    """
    kept: dict[int, torch.Tensor] = {}
    weights = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in kept:  # tied weights are one parameter under two names
            wanted = dtype if value.is_floating_point() else value.dtype
            kept[id(value)] = value.detach().to(wanted)
        weights[name] = kept[id(value)]
    return weights


def _write_key(path: Path, key: str, value: str) -> None:
    """Change one key of a JSON file."""
    config = json.loads(path.read_text(encoding="utf-8")) | {key: value}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _merge_into_stored(source: ModelSource, renderer: ChatRenderer, adapter: Path) -> Any:
    from peft import PeftModel

    base: Any = load_model(replace(source, quantize="none"), renderer, "student")
    return PeftModel.from_pretrained(base.float(), adapter).merge_and_unload()


def _save_adapter(model: Any, folder: Path, source: ModelSource) -> None:
    """Save adapters as PEFT does, with the hub name of their base and no folder of this machine."""
    model.save_pretrained(folder)
    _write_key(folder / "adapter_config.json", "base_model_name_or_path", model_name(source.model))
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty card
    _allow_by_umask(folder)


def _allow_by_umask(folder: Path) -> None:
    """Give saved weights the mode of any new file; safetensors makes them private."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.glob("*.safetensors"):
        path.chmod(0o666 & ~mask)


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


def _stored_dtype(source: ModelSource) -> torch.dtype | None:
    if source.is_random:
        return None
    folder = download_model(source, "student")  # the weights are there: they were loaded
    name = read_stored_dtype(folder)
    dtype: torch.dtype | None = getattr(torch, name) if name else None
    return dtype


def _refuse_tied_targets(model: Any, lora: LoraSettings) -> None:
    """Raise if adapters would change one of two tied weights, embedding and head.

    Merged into the saved student, they would change both.
    """
    if not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    names = [name for name, module in model.named_modules() if module in embeddings]
    for key, wanted in (("targets", lora.targets), ("modules_to_save", lora.modules_to_save)):
        hit = [n for n in names if any(n == w or n.endswith(f".{w}") for w in wanted)]
        if hit:
            raise RefusedError(
                f"embedding and head of this student are one weight, and {hit[0]} would change in "
                "the training for one of them only",
                where=f"student.lora.{key}",
                remedy=f"leave {hit[0].rpartition('.')[2]} out, or write `adapt: full`",
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
        _refuse_tied_targets(model, lora)
        if source.quantize != "none":
            from peft import prepare_model_for_kbit_training

            model = prepare_model_for_kbit_training(
                model, use_gradient_checkpointing=options.gradient_checkpointing
            )
        settings = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,  # type: ignore[arg-type]  # a float works too
            target_modules=ALL_LINEAR if ALL_LINEAR in lora.targets else list(lora.targets),
            lora_dropout=lora.dropout,
            use_rslora=lora.use_rslora,
            use_dora=lora.use_dora,
            modules_to_save=list(lora.modules_to_save) or None,
            task_type="CAUSAL_LM",
        )
        try:
            with warnings.catch_warnings():  # of transformers about PEFT: nothing to do for a user
                warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
                model = get_peft_model(model, settings)
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
    student = StudentModel(model, renderer, source, options, stored_dtype=_stored_dtype(source))
    assert student._logit_scaling  # raises here, not at the first step, if it cannot be trained
    if options.packing:
        refuse_packing(model, len(renderer.vocabulary), "training.packing")
    return student
