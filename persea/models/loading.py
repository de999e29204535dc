"""Where weights come from: a folder, a hub id, or a random sprout of a family's real architecture; its voice beside it.

Only safetensors and configs are read: no pickles, no remote code (a config with `auto_map` is refused before any
library sees it).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from persea.chat import families
from persea.chat.families.generic import GENERIC_FAMILY_NAME as GENERIC
from persea.chat.families.generic import infer_family
from persea.chat.families.hybrid import (
    add_thinking_switch,
    has_llama_control_tokens,
    has_thinking_switch,
    make_hybrid_family,
)
from persea.chat.messages import PINNED_DATE, Conversation, Family, Text
from persea.chat.renderer import ChatRenderer
from persea.chat.template import compile_template
from persea.errors import DataError
from persea.models.placement import placement_kwargs
from persea.tokenization.vocabulary import load_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ModelSource:
    """Where one model comes from.

    model      a folder in Hugging Face form, a hub id, or "random" (then `tokenizer` and `sizes` are needed)
    revision   hub revision; a folder has none
    tokenizer  folder or hub id of the tokenizer where it is not the model's
    family     name of the family, or "generic"; "" = recognised by its control tokens and chat template
    sizes      for "random": hidden, layers, heads, seed
    thinking   give a model whose template has no thinking switch the hybrid template
    quantize   8bit, 4bit, mxfp4: fewer bits a weight, on a GPU; none = as stored
    offload    what the GPU has no room for stays in main memory
    """

    model: str
    revision: str = ""
    tokenizer: str = ""
    family: str = ""
    sizes: tuple[tuple[str, int], ...] = field(default=())
    thinking: bool = False
    quantize: str = "none"
    offload: bool = False

    @property
    def is_random(self) -> bool:
        return self.model == "random"

    @property
    def tokenizer_name_or_path(self) -> str:
        """Where tokenizer and template are."""
        return self.tokenizer or self.model


def local_folder(name_or_path: str, where: str) -> Path | None:
    """The folder a reference names; None for a hub id. A path that is not there is refused here, not looked up on the hub."""
    path = Path(name_or_path).expanduser()
    if name_or_path and path.is_dir():
        return path
    if name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") != 1 or path.exists():
        raise DataError(
            f"no model folder {name_or_path!r}",
            where=where,
            remedy="give a folder in Hugging Face form or a hub id such as Qwen/Qwen3-8B",
        )
    return None


def resolve_model_source(name_or_path: str, where: str) -> tuple[ModelSource, date]:
    """What a person points at, and the date its template tells: the student of a run folder, or a model folder or hub id.

    Raises DataError for a path that is neither, and for a run without a student.
    """
    folder = Path(name_or_path).expanduser()
    if not folder.exists() and folder.parent != Path() and folder.parent.is_dir():
        raise DataError(
            f"no model folder and no run {name_or_path!r}",
            where=where,
            remedy="give a run folder, a model folder or a hub id",
        )
    student, recipe = folder / "train" / "student", folder / "recipe.yaml"
    if not student.is_dir() and not recipe.is_file():
        return ModelSource(name_or_path), PINNED_DATE
    if not student.is_dir():
        raise DataError(
            "this run has no student yet",
            where=str(folder),
            remedy="train it first: persea run with the same recipe and --out",
        )
    written = yaml.safe_load(recipe.read_text(encoding="utf-8")) if recipe.is_file() else {}
    told = written.get("template_date", written.get("today", PINNED_DATE))
    return ModelSource(
        str(student), family=written.get("student", {}).get("family", "")
    ), told if isinstance(told, date) else date.fromisoformat(told)


def load_tokenizer(source: ModelSource, where: str) -> Any:
    """Transformers' tokenizer of a model. Raises DataError for a missing folder, one that brings code, and what is no tokenizer."""
    from transformers import AutoTokenizer

    folder = local_folder(source.tokenizer_name_or_path, where)
    if folder is not None:
        _refuse_remote_code(folder, where)
    revision = {"revision": source.revision} if source.revision and folder is None else {}
    try:
        return AutoTokenizer.from_pretrained(
            folder or source.tokenizer_name_or_path, trust_remote_code=False, **revision
        )
    except (
        Exception
    ) as error:  # transformers raises a dozen kinds here, each meaning: this is no tokenizer
        raise DataError(
            f"no tokenizer in {source.tokenizer_name_or_path!r}: {_first_line(error).rstrip(':')}",
            where=where,
            remedy="the folder needs tokenizer.json and tokenizer_config.json"
            if folder is not None
            else "fetch it first where there is network (`hf download`), accept its licence there, or give a folder",
        ) from error


def load_renderer(source: ModelSource, where: str, today: date = PINNED_DATE) -> ChatRenderer:
    """Tokenizer, chat template and family of a model. Loads no weights. A family persea does not know speaks through `generic`.

    Raises DataError for a missing folder, a model without chat template, a tokenizer that does not round-trip, a
    template that neither a family nor `generic` can follow.
    """
    tokenizer = load_tokenizer(source, where)
    text = tokenizer.chat_template or ""
    if not isinstance(text, str):
        raise DataError(
            f"{source.tokenizer_name_or_path!r} has several chat templates",
            where=where,
            remedy="keep one, as chat_template.jinja",
        )
    vocabulary = load_vocabulary(tokenizer, source.tokenizer_name_or_path)
    if not text and not (source.thinking and has_llama_control_tokens(vocabulary)):
        raise DataError(
            f"{source.tokenizer_name_or_path!r} has no chat template",
            where=where,
            remedy="add chat_template.jinja to the folder; a base model without one cannot teach or be asked",
        )
    special = {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
    template = compile_template(text, special, today, where)
    if source.thinking and not has_thinking_switch(template):
        text = add_thinking_switch(text, vocabulary)
        template = compile_template(text, special, today, where)
    family = families.get_family(source.family) if source.family not in ("", GENERIC) else None
    if not source.family:
        family = families.detect_family(vocabulary, text)
    if family is None:
        ends = {vocabulary.control_names.get(i, "") for i in eos_token_ids(source, where)} | {
            special.get("eos_token", "")
        }
        family, template = infer_family(
            vocabulary, template, ends & vocabulary.control_token_ids.keys(), where
        )
    thinks = has_thinking_switch(template)
    if source.thinking and (len(family.efforts) > 1 or not thinks):
        _refuse_thinking_option(family, where)
    if len(family.efforts) == 1 and thinks:
        family = make_hybrid_family(family, vocabulary)
    return ChatRenderer(family, vocabulary, template, text, today, special)


def _refuse_thinking_option(family: Family, where: str) -> None:
    if len(family.efforts) > 1:
        raise DataError(
            f"`thinking: true`, but {family.name} has a thinking switch of its own: {', '.join(family.efforts)}",
            where=where,
            remedy="delete `thinking:`",
        )
    raise DataError(
        f"`thinking: true`, but the template of {family.name} does not take the effort before the system's text and the thought "
        "before the answer",
        where=where,
        remedy="choose a student whose template takes a system text and writes answers as they are",
    )


def eos_token_ids(source: ModelSource, where: str) -> tuple[int, ...]:
    """Ids with which the model's own configuration ends a text: generation_config.json's, else config.json's; none for a sprout."""
    if source.is_random:
        return ()
    folder = local_folder(source.model, where)
    for name in ("generation_config.json", "config.json"):
        path = _download_hub_file(source, name) if folder is None else folder / name
        if path is None or not path.is_file():
            continue
        config = _read_json_config(path, where)
        inner = config.get("text_config")
        said = config.get(
            "eos_token_id", inner.get("eos_token_id") if isinstance(inner, dict) else None
        )
        ids = tuple(i for i in (said if isinstance(said, list) else [said]) if isinstance(i, int))
        if ids:
            return ids
    return ()


def model_warnings(source: ModelSource, renderer: ChatRenderer, where: str) -> str:
    """What a person should know of this voice, in plain words; "" where nothing is odd. Nothing here stops a run.

    A family persea does not know; a base model in a chat template (its configuration ends at another token than the
    template's turns: it never learned the turn's end); a BOS that the tokenizer adds and the template does not.
    """
    vocabulary, found = (
        renderer.vocabulary,
        [renderer.family.limitations] if renderer.family.limitations else [],
    )
    prompt = renderer.render_prompt(Conversation.from_question("Hi")).ids_T.tolist()
    answered = renderer.render(Conversation.from_question("Hi").with_answer(Text("Hi")))
    stop, ends = int(answered.ids_T[answered.loss_mask_T][-1]), eos_token_ids(source, where)

    def name(ids: Sequence[int]) -> str:
        return ", ".join(
            f"{vocabulary.control_names.get(i, 'no control token')} ({i})" for i in ids
        )

    if ends and stop not in ends:
        found.append(
            f"a base model in a chat template: its configuration ends at {name(ends)}, the template ends a turn with {name([stop])}; "
            "persea stops at the template's, which this model may never say by itself."
        )
    plain, dressed = (
        vocabulary.backend.encode("Hi", add_special_tokens=a).ids for a in (False, True)
    )
    front = dressed[
        : next((k for k in range(len(dressed)) if dressed[k : k + len(plain)] == plain), 0)
    ]
    if front and prompt[: len(front)] != front:
        found.append(
            f"its tokenizer puts {name(front)} before every text, its chat template does not; persea follows the template."
        )
    if len(prompt) > 1 and prompt[0] == prompt[1] and prompt[0] in vocabulary.control_names:
        found.append(
            f"its chat template begins with {name(prompt[:1])} twice; persea follows the template."
        )
    return " ".join(found)


def load_model(source: ModelSource, renderer: ChatRenderer, where: str) -> PreTrainedModel:
    """The causal model of a source, in evaluation mode: float32 on a CPU, as stored on a GPU (120 billion weights in float32
    fit nowhere).

    Raises DataError for a model that cannot be read, or has fewer logits than its tokenizer has tokens; EnvironmentLacks where the machine
    cannot hold it as asked (`placement`).
    """
    import torch

    placed = placement_kwargs(source.quantize, source.offload, where)
    if source.is_random:
        model = random_init(renderer.family.name, len(renderer.vocabulary), dict(source.sizes))
    else:
        model = read_weights(
            source, where, dtype="auto" if torch.cuda.is_available() else torch.float32, **placed
        )
    rows = model.get_output_embeddings().weight.shape[0]
    if rows < len(renderer.vocabulary):
        raise DataError(
            f"{rows} logits for a vocabulary of {len(renderer.vocabulary)} tokens",
            where=where,
            remedy="tokenizer and model do not belong together",
        )
    if placed:  # where each weight lies is decided
        return model.eval()
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def read_weights(source: ModelSource, where: str, **load_kwargs: Any) -> Any:
    """What transformers makes of a model's safetensors, read as `how` says. Raises DataError for a model that cannot be read."""
    from transformers import AutoModelForCausalLM

    folder = local_folder(source.model, where)
    if folder is not None:
        if not (folder / "config.json").is_file():
            raise DataError(
                f"no config.json in {folder}",
                where=where,
                remedy="give a folder in Hugging Face form",
            )
        _refuse_remote_code(folder, where)
    revision = {"revision": source.revision} if source.revision and folder is None else {}
    try:
        return AutoModelForCausalLM.from_pretrained(
            folder or source.model,
            trust_remote_code=False,
            use_safetensors=True,
            **revision,
            **load_kwargs,
        )
    except Exception as error:  # as above: whatever it is, this is no model
        raise DataError(
            f"cannot load {source.model!r}: {_first_line(error)}",
            where=where,
            remedy="the folder needs config.json and model.safetensors of a causal model",
        ) from error


def fingerprint(source: ModelSource, where: str) -> str:
    """sha256 over config and weights of a local folder; id and revision of a hub model; sizes of a sprout; and in how few bits, if in fewer."""
    folder = None if source.is_random else local_folder(source.model, where)
    bits = [] if source.quantize == "none" else [source.quantize]
    if folder is None:
        return hashlib.sha256(
            json.dumps(
                [source.model, source.revision, source.tokenizer, source.sizes, *bits]
            ).encode()
        ).hexdigest()
    digest = hashlib.sha256("".join(bits).encode())
    for path in _fingerprinted_files(folder):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def file_stats(source: ModelSource, where: str) -> tuple[tuple[str, int, int], ...]:
    """Name, size and time of each file that the fingerprint reads: what tells at once that a folder was written to. None of a hub model."""
    folder = None if source.is_random else local_folder(source.model, where)
    return (
        tuple(
            (p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in _fingerprinted_files(folder)
        )
        if folder
        else ()
    )


def _fingerprinted_files(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.safetensors"), *folder.glob("*.json"), *folder.glob("*.jinja")])


def random_init(family: str, vocab_size: int, sizes: dict[str, int]) -> PreTrainedModel:
    """A randomly initialised model of a family's real architecture.

    sizes: hidden (128), layers (3), heads (4), seed (0); for gpt-oss also experts (4).
    """
    import torch
    from transformers import (
        AutoModelForCausalLM,
        Gemma3TextConfig,
        GptOssConfig,
        LlamaConfig,
        Qwen3Config,
    )

    hidden, layers, heads = sizes.get("hidden", 128), sizes.get("layers", 3), sizes.get("heads", 4)
    shared: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 2),
        "head_dim": hidden // heads,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if family == "qwen":
        config = Qwen3Config(intermediate_size=3 * hidden, **shared)
    elif family == "gemma":
        config = Gemma3TextConfig(
            intermediate_size=3 * hidden,
            sliding_window=128,
            query_pre_attn_scalar=hidden // heads,
            **shared,
        )
    elif family == "gpt-oss":
        config = GptOssConfig(
            intermediate_size=hidden,
            num_local_experts=sizes.get("experts", 4),
            num_experts_per_tok=2,
            sliding_window=128,
            **(shared | {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}),
        )
    elif family == "llama":
        config = LlamaConfig(intermediate_size=3 * hidden, **shared)
    else:
        raise DataError(
            f"no small architecture known for family {family!r}", remedy="give a model folder"
        )
    torch.manual_seed(sizes.get("seed", 0))
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def download_model(source: ModelSource, where: str, with_weights: bool = True) -> Path:
    """The folder of a model, fetched from the hub where it is a hub's, with or without its weights. Raises DataError where it cannot be had."""
    folder = local_folder(source.model, where)
    if folder is not None:
        return folder
    from huggingface_hub import snapshot_download

    try:
        kinds = ["*.json", "*.jinja", *(["model*.safetensors"] if with_weights else [])]
        return Path(
            snapshot_download(
                source.model,
                revision=source.revision or None,
                allow_patterns=kinds,
                ignore_patterns=["*/*"],
            )
        )
    except Exception as error:  # a dozen kinds: not there, no network, no licence
        raise DataError(
            f"cannot fetch {source.model!r}: {_first_line(error)}",
            where=where,
            remedy="give a folder in Hugging Face form",
        ) from error


def copy_tokenizer_files(source_folder: Path, target_folder: Path) -> None:
    """Tokenizer, chat template and how to generate, from one model folder to another."""
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "special_tokens_map.json",
        "generation_config.json",
    ):
        if (source_folder / name).is_file():
            shutil.copyfile(source_folder / name, target_folder / name)


def _refuse_remote_code(folder: Path, where: str) -> None:
    for path in (folder / "config.json", folder / "tokenizer_config.json"):
        if not path.is_file():
            continue
        if "auto_map" in _read_json_config(path, where):
            raise DataError(
                f"{path} brings its own code (auto_map)",
                where=where,
                remedy="use a model transformers knows itself",
            )


def _read_json_config(path: Path, where: str) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path} is not JSON: {error}", where=where, remedy="fetch the model again"
        ) from error
    if not isinstance(config, dict):
        raise DataError(f"{path} is no JSON object", where=where, remedy="fetch the model again")
    return config


def _download_hub_file(source: ModelSource, name: str) -> Path | None:
    """A small file of a hub model; None where it has none, or cannot be had: its weights will say why."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(source.model, name, revision=source.revision or None))
    except (HfHubHTTPError, LocalEntryNotFoundError):
        return None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def set_threads(threads: int) -> None:
    """Fix torch's threads; the same number gives the same bits. 0 leaves torch's own choice."""
    if threads:
        import torch

        torch.set_num_threads(threads)
