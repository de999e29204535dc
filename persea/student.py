"""Student: load, adapt (full or LoRA), run, save."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError

from persea.errors import DataError, EnvironmentLacks, StorageError
from persea.models import Source, local_folder, open_model
from persea.ranks import Shard, World
from persea.voice import Voice

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters on the named projections (Hu et al. 2021)."""

    rank: int
    alpha: float
    targets: tuple[str, ...]


class Forward(torch.nn.Module):
    """What a training step runs of a model, as one module: processes that share a student average gradients, and gather what is sharded,
    around this module's forward. Whatever else of the model a step uses (hidden states, the head) is to be used in here."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids_BS: torch.Tensor, mask_BS: torch.Tensor, row_N: torch.Tensor, at_N: torch.Tensor) -> torch.Tensor:
        logits_BSV: torch.Tensor = self.model(input_ids=ids_BS, attention_mask=mask_BS, use_cache=False).logits
        return logits_BSV[row_N, at_N]


@dataclass(frozen=True, eq=False)
class Student:
    """A causal model in its own voice. `trained` = what the optimiser may change; `runs` = its Forward, spread over processes or not."""

    model: PreTrainedModel
    voice: Voice
    source: Source
    runs: torch.nn.Module | None = None

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def logits(self, ids_BS: torch.Tensor, mask_BS: torch.Tensor, row_N: torch.Tensor, at_N: torch.Tensor) -> torch.Tensor:
        """[N, V] float32 logits at positions (row_N, at_N); padded rows of the matrix are cut off."""
        device, runs = self.model.device, self.runs or Forward(self.model)
        logits_NV: torch.Tensor = runs(ids_BS.to(device), mask_BS.to(device), row_N.to(device), at_N.to(device))
        return logits_NV[:, :len(self.voice.vocabulary)].float()

    def spread(self, world: World, shard: Shard) -> Student:
        """This student as one of a world's processes holds it: backward averages the gradients of all. Every process calls it."""
        if world.size == 1:
            return self
        forward = Forward(self.model)
        if shard is Shard.DDP:
            from torch.nn.parallel import DistributedDataParallel

            # Looking for unused parameters keeps the buckets as they are from the first step on. Otherwise DDP orders them anew after one step,
            # and a resumed training would add up the gradients of three processes in another order than one that went through.
            return replace(self, runs=DistributedDataParallel(forward, find_unused_parameters=True))
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.model.device.type, (world.size,))
        layers = set(self.model._no_split_modules or ())
        for module in list(forward.modules()):
            if type(module).__name__ in layers:
                fully_shard(module, mesh=mesh)
        fully_shard(forward, mesh=mesh)
        return replace(self, runs=forward)

    def save(self, folder: Path) -> None:
        """A Hugging Face folder: weights (adapters merged), config, tokenizer, chat template."""
        model = self.model
        if getattr(model, "peft_config", None):
            import copy

            model = copy.deepcopy(model).merge_and_unload()
        origin = local_folder(self.source.words, "student")
        try:
            model.save_pretrained(folder)
            for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "generation_config.json"):
                if origin is not None and (origin / name).is_file():
                    shutil.copyfile(origin / name, folder / name)
            _end_turns(folder / "generation_config.json", self.voice.stop_ids)
        except (OSError, SafetensorError) as error:
            raise StorageError(f"cannot write the student: {error}", where=str(folder),
                               remedy="free space, then run again: its training is kept") from error
        if origin is not None:
            return
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(self.source.words, trust_remote_code=False).save_pretrained(folder)


def _end_turns(path: Path, stop_ids: Sequence[int]) -> None:
    """Let the saved configuration stop at the voice's ends too: a base model's own names its text's end only, and would run on."""
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    eos = config.get("eos_token_id")
    own = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if set(stop_ids) - set(own):
        path.write_text(json.dumps(config | {"eos_token_id": [*own, *(i for i in stop_ids if i not in own)]}, indent=2) + "\n", encoding="utf-8")


def open_student(source: Source, voice: Voice, lora: Lora | None, seed: int = 0) -> Student:
    """The student's weights, ready to be trained in full, or with adapters; these begin at random, by the seed."""
    model = open_model(source, voice, "student")
    torch.manual_seed(seed)
    if lora is None:
        model = model.float()  # a step is smaller than what bfloat16 can add to a weight; frozen weights may stay as they are stored
    else:
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise EnvironmentLacks("adapt: lora needs peft", where="student", remedy="pip install peft") from error
        try:
            model = get_peft_model(model, LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets), task_type="CAUSAL_LM"))
        except ValueError as error:
            raise DataError(str(error).splitlines()[0], where="student.lora.targets",
                            remedy="name projections this model has, e.g. q_proj") from error
    return Student(model, voice, source)
