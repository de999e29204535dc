"""Load tokenizers, chat renderers and weights: a folder, a GGUF file, a hub id, or random weights.

A GGUF file is converted once to a folder, which is kept (persea.models.gguf_model). Only
safetensors and configurations are read: no pickles and no remote code. A folder whose configuration
has `auto_map` is refused before any library reads it; hub ids are loaded with
`trust_remote_code=False`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from persea.chat.families.hybrid import (
    add_thinking_switch,
    has_thinking_switch,
)
from persea.chat.families.text import make_text_family
from persea.chat.family import UNKNOWN_FAMILY
from persea.chat.family_selection import choose_family
from persea.chat.messages import PINNED_DATE
from persea.chat.renderer import ChatRenderer
from persea.chat.template import default_template
from persea.chat.template_containment import open_template
from persea.errors import DataError
from persea.models import hub
from persea.models.chat_templates import (
    is_text_model,
    read_template,
    refuse_thinking_option,
)
from persea.models.config_files import read_json_config, refuse_remote_code
from persea.models.folder_files import refuse_unsafe_files
from persea.models.gguf_header import find_gguf
from persea.models.gguf_model import gguf_header, model_folder, tokenizer_folder
from persea.models.gguf_tokenizer import refuse_other_tokens, stop_token_ids
from persea.models.kept_tokenizer import OpenedTokenizer, open_tokenizer
from persea.models.placement import compute_device, placement_kwargs
from persea.models.random_init import random_init
from persea.models.references import model_path
from persea.models.run_student import refuse_changed_student
from persea.models.tokenizer_containment import refuse_endless_tokenizer
from persea.models.tokenizer_files import open_tokenizer_file
from persea.models.weight_files import refuse_impossible_weights, refuse_partial_load
from persea.tokenization.logit_rows import limit_to_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from and how it is loaded.

    Attributes:
        model: A folder in Hugging Face form, a GGUF file or a folder that holds one, a hub id, or
            "random" (then `tokenizer` and `sizes` are needed).
        revision: Hub revision; unused for a folder.
        tokenizer: Folder or hub id of the tokenizer, if it is not the model's.
        family: Name of the family, or "generic"; "" = detected by control tokens and chat template.
        sizes: For "random": pairs of name and value, see `random_init`.
        thinking: Give a model whose chat template has no thinking switch the hybrid template.
        quantize: "8bit", "4bit" or "mxfp4" for fewer bits a weight on a GPU; "none" = as stored.
        offload: Keep in main memory the weights that do not fit on the GPU.
        chat_template: A file with a chat template, instead of the model's own; "" = its own.
        attn_implementation: Attention of transformers, such as "flash_attention_2"; "" = its
            choice.
        precision: Type of weights and matrix products, "float32" or "bfloat16"; "auto" = float32
            on a CPU, else as stored.
    """

    model: str
    revision: str = ""
    tokenizer: str = ""
    family: str = ""
    sizes: tuple[tuple[str, int], ...] = field(default=())
    thinking: bool = False
    quantize: str = "none"
    offload: bool = False
    chat_template: str = ""
    attn_implementation: str = ""
    precision: str = "auto"

    @property
    def is_random(self) -> bool:
        """Whether the weights are initialised at random."""
        return self.model == "random"

    @property
    def tokenizer_name_or_path(self) -> str:
        """Folder or hub id of tokenizer and chat template."""
        return self.tokenizer or self.model


def local_folder(name_or_path: str, where: str) -> Path | None:
    """Return the folder that a reference names; None for a hub id.

    For a GGUF file this is the folder of its dequantised weights, which the first call writes.

    Raises:
        DataError: A path does not exist; it is refused here instead of being looked up on the hub.
            Or a file of the folder cannot be read safely (`refuse_unsafe_files`).
    """
    gguf = find_gguf(name_or_path, where)
    if gguf is not None:
        return model_folder(gguf, where)
    path = model_path(name_or_path, where)
    if name_or_path and path.is_dir():
        refuse_unsafe_files(path, where)
        return path
    if name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") != 1 or path.exists():
        raise DataError(
            f"no model folder {name_or_path!r}",
            where=where,
            remedy="give a folder in Hugging Face form, a GGUF file, or a hub id such as "
            "Qwen/Qwen3-8B",
        )
    return None


def loadable_name(name_or_path: str, where: str) -> str:
    """Return what another library can load: the converted folder of a GGUF file, or the reference.

    Raises:
        DataError: The GGUF file cannot be converted.
    """
    gguf = find_gguf(name_or_path, where)
    return name_or_path if gguf is None else str(model_folder(gguf, where))


def local_tokenizer_folder(source: ModelSource, where: str) -> Path:
    """Return the local folder of a model's tokenizer; for a hub id that of its commit.

    A tokenizer.json beside a GGUF file is preferred to the tokenizer in the file.

    Raises:
        DataError: The folder does not exist, or the hub model cannot be downloaded.
    """
    name_or_path = source.tokenizer_name_or_path
    path = model_path(name_or_path, where)
    if name_or_path and (path / "tokenizer.json").is_file():
        refuse_unsafe_files(path, where)
        return path
    gguf = find_gguf(name_or_path, where)
    if gguf is not None:
        return tokenizer_folder(gguf, where)
    return local_folder(name_or_path, where) or hub.download_snapshot(
        name_or_path, source.revision, where, with_weights=False
    )


def _refuse_other_tokenizer(source: ModelSource, folder: Path, tokenizer: Any, where: str) -> None:
    """Raise if a GGUF file is given a tokenizer that is not its own."""
    gguf = None if source.is_random else find_gguf(source.model, where)
    if gguf is not None and (source.tokenizer or folder == Path(source.model).expanduser()):
        refuse_other_tokens(gguf_header(gguf, where), tokenizer.backend_tokenizer, where)


def resolve_model_source(name_or_path: str, where: str) -> tuple[ModelSource, date]:
    """Return the model that a person names, and the date for its chat template.

    Args:
        name_or_path: A run folder (its student), a model folder, a GGUF file, or a hub id.
        where: The place for error messages.

    Raises:
        DataError: The path is neither, the run has no student yet, its recipe is broken, or its
            student was changed after the training.
    """
    folder = model_path(name_or_path, where)
    is_local = folder.parent.is_dir() or folder.parts[:1] == ("runs",)
    if not folder.exists() and folder.parent != Path() and is_local:
        raise DataError(
            f"no model folder and no run {name_or_path!r}",
            where=where,
            remedy="give a run folder, a model folder, a GGUF file or a hub id",
        )
    student, recipe = folder / "train" / "student", folder / "recipe.yaml"
    if not student.is_dir() and not recipe.is_file():
        refuse_changed_student(folder, where)
        return ModelSource(name_or_path), PINNED_DATE
    if not student.is_dir():
        raise DataError(
            "this run has no student yet",
            where=str(folder),
            remedy="train it first: persea run with the same recipe and --out",
        )
    refuse_changed_student(student, where)
    settings = yaml.safe_load(recipe.read_text(encoding="utf-8")) if recipe.is_file() else {}
    if not isinstance(settings, dict):
        raise DataError(
            "the recipe of this run is no mapping of keys",
            where=str(recipe),
            remedy="put back the recipe that the run was started with",
        )
    template_date = settings.get("template_date", settings.get("today", PINNED_DATE))
    if not isinstance(template_date, date):
        template_date = date.fromisoformat(str(template_date))
    family = (settings.get("student") or {}).get("family", "")
    return ModelSource(str(student), family=family), template_date


def load_tokenizer(source: ModelSource, where: str) -> Any:
    """Load the transformers tokenizer of a model.

    Raises:
        DataError: The folder is missing, brings its own code, or has no tokenizer.
    """
    from transformers import AutoTokenizer

    folder = local_tokenizer_folder(source, where)
    name = source.tokenizer_name_or_path
    definition = folder / "tokenizer.json"
    refuse_endless_tokenizer(definition if definition.is_file() else folder, where)
    opened = open_tokenizer_file(folder, where)
    if opened is not None:
        return opened
    # A hub model behind a server may have code beside it; a GGUF file's weights are not converted.
    if find_gguf(name, where) is not None or local_folder(name, where) is not None:
        refuse_remote_code(folder, where)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises a dozen kinds here
        raise DataError(
            f"no tokenizer in {name!r}: {_first_line(error).rstrip(':')}",
            where=where,
            remedy="the folder needs tokenizer.json and tokenizer_config.json",
        ) from error
    _refuse_other_tokenizer(source, folder, tokenizer, where)
    return tokenizer


def _open_tokenizer(source: ModelSource, where: str) -> OpenedTokenizer:
    """Open a model's tokenizer; from the second time on without transformers."""
    folder = local_tokenizer_folder(source, where)
    name = source.tokenizer_name_or_path
    opened = open_tokenizer(folder, name, lambda: load_tokenizer(source, where))
    _refuse_other_tokenizer(source, folder, opened, where)
    return opened


def load_renderer(
    source: ModelSource | str, where: str = "", template_date: date = PINNED_DATE
) -> ChatRenderer:
    """Load tokenizer, chat template and family of a model, without its weights.

    A model of a family that persea does not know gets the family that `infer_family` finds out by
    rendering its template. A model without a chat template is a text model
    (`persea.chat.families.text`).

    Args:
        source: A folder in Hugging Face form, a GGUF file, a hub id, or a `ModelSource`.
        where: The place for error messages; by default the folder or hub id.
        template_date: The date that the chat template writes.

    Returns:
        The renderer, which turns conversations into token ids and parses answers.

    Raises:
        DataError: The folder is missing, the tokenizer does not reproduce its input, a family is
            named and there is no chat template, or neither a family nor `infer_family` can follow
            the template.

    Example:
        >>> from persea.chat.messages import Conversation, Text
        >>> from persea.models.loading import load_renderer
        >>> renderer = load_renderer("saplings/qwen-sapling")
        >>> renderer.family.name
        'qwen'
        >>> tokens = renderer.render(Conversation.from_question("2 + 3?").with_answer(Text("5")))
        >>> answer_ids = tokens.ids_T[tokens.loss_mask_T].tolist()
        >>> renderer.vocabulary.decode_pieces(answer_ids)[-2:]
        (b'5', '<|im_end|>')
    """
    if isinstance(source, str):
        source = ModelSource(source)
    where = where or source.tokenizer_name_or_path
    tokenizer = _open_tokenizer(source, where)
    template_text, template_note = default_template(
        read_template(source, where) or tokenizer.chat_template, where
    )
    vocabulary = tokenizer.vocabulary
    if num_rows := num_logits_in_config(source, where):
        vocabulary = limit_to_rows(vocabulary, num_rows, where)
    special = {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
    if is_text_model(source, template_text, vocabulary, where):
        text_family, rendering = make_text_family(vocabulary, special)
        return ChatRenderer(text_family, vocabulary, rendering, "", template_date, special)
    template = open_template(template_text, special, template_date, where)
    if source.thinking and not has_thinking_switch(template):
        template_text = add_thinking_switch(template_text, vocabulary)
        template = open_template(template_text, special, template_date, where)

    def eos_tokens() -> set[str]:
        names = {vocabulary.control_names.get(i, "") for i in eos_token_ids(source, where)}
        return (names | {special.get("eos_token", "")}) & vocabulary.control_token_ids.keys()

    renderer = choose_family(
        ChatRenderer(UNKNOWN_FAMILY, vocabulary, template, template_text, template_date, special),
        source.family,
        lambda text: tokenizer.encode(text, add_special_tokens=False),
        eos_tokens,
        where,
        _response_template(source, where),
    )
    if source.thinking and not renderer.family.has_hybrid_format:
        refuse_thinking_option(renderer.family, where)
    if template_note:
        notes = " ".join(filter(None, (renderer.family.limitations, template_note)))
        renderer = replace(renderer, family=replace(renderer.family, limitations=notes))
    return renderer


def _response_template(source: ModelSource, where: str) -> object:
    """Return transformers' `response_template`, if the tokenizer's configuration has one."""
    path = local_tokenizer_folder(source, where) / "tokenizer_config.json"
    if not path.is_file():
        return None
    return read_json_config(path, where).get("response_template")


def eos_token_ids(source: ModelSource, where: str) -> tuple[int, ...]:
    """Return the end-of-text ids in the model's own configuration.

    They are read from generation_config.json, or else config.json, or the metadata of a GGUF file.
    A random model has none.
    """
    if source.is_random:
        return ()
    gguf = find_gguf(source.model, where)
    if gguf is not None:
        return stop_token_ids(gguf_header(gguf, where))
    for name in ("generation_config.json", "config.json"):
        eos = config_value(source, name, "eos_token_id", where)
        ids = tuple(i for i in (eos if isinstance(eos, list) else [eos]) if isinstance(i, int))
        if ids:
            return ids
    return ()


def config_value(source: ModelSource, file_name: str, key: str, where: str) -> Any:
    """Return a value of a model's configuration file, or of its `text_config`; None without one."""
    if source.is_random:
        return None
    folder = local_folder(source.model, where)
    path = download_hub_file(source, file_name) if folder is None else folder / file_name
    if path is None or not path.is_file():
        return None
    config = read_json_config(path, where)
    text_config = config.get("text_config")
    return config.get(key, text_config.get(key) if isinstance(text_config, dict) else None)


def max_positions(source: ModelSource, where: str) -> int:
    """Return the number of positions in the model's configuration; 0 if it has none."""
    if source.is_random:
        from persea.models.random_init import MAX_POSITIONS

        return MAX_POSITIONS
    gguf = find_gguf(source.model, where)
    if gguf is not None and (stated := gguf_header(gguf, where).context_length):
        return stated  # without the weights, which its folder holds
    positions = config_value(source, "config.json", "max_position_embeddings", where)
    return positions if isinstance(positions, int) else 0


def num_logits_in_config(source: ModelSource, where: str) -> int:
    """Return the rows of logits by config.json or the table of a GGUF file; 0 = a row a token."""
    if source.is_random:
        return 0
    gguf = find_gguf(source.model, where)
    if gguf is not None:
        return gguf_header(gguf, where).num_embedding_rows
    stated = config_value(source, "config.json", "vocab_size", where)
    return stated if isinstance(stated, int) else 0


def load_model(source: ModelSource, renderer: ChatRenderer, where: str) -> PreTrainedModel:
    """Load a causal language model in evaluation mode, with weights of `source.precision`.

    "auto" is the stored type on a GPU: 120 billion weights in float32 fit on none.

    Raises:
        DataError: The model cannot be read, or has fewer logits than its tokenizer has tokens.
        MissingRequirementError: The machine cannot quantise or offload it, see `placement_kwargs`.
    """
    import torch

    placement = placement_kwargs(source.quantize, source.offload, where)
    device, precision = compute_device(), source.precision
    if precision == "auto" and device.type == "cpu":
        precision = "float32"
    attention = (
        {"attn_implementation": source.attn_implementation} if source.attn_implementation else {}
    )
    model: Any
    if source.is_random:
        model = random_init(renderer.family.name, len(renderer.vocabulary), dict(source.sizes))
    else:
        model, _ = read_weights(
            source,
            where,
            dtype="auto" if precision == "auto" else getattr(torch, precision),
            **placement,
            **attention,
        )
    num_logits = model.get_output_embeddings().weight.shape[0]
    if num_logits < len(renderer.vocabulary):
        raise DataError(
            f"{num_logits} logits for a vocabulary of {len(renderer.vocabulary)} tokens",
            where=where,
            remedy="tokenizer and model do not belong together",
        )
    if not placement:  # otherwise from_pretrained has placed the weights
        model = model.to(device)
    loaded: PreTrainedModel = model.eval()
    return loaded


def read_weights(source: ModelSource, where: str, **load_kwargs: Any) -> tuple[Any, list[str]]:
    """Load a causal model from safetensors with these arguments of `from_pretrained`.

    Returns:
        The model, and the names of tensors beside it in its files, which are not loaded.

    Raises:
        DataError: The model cannot be read, or only in part (`refuse_partial_load`).
    """
    from transformers import AutoModelForCausalLM

    folder = download_model(source, where)
    if not (folder / "config.json").is_file():
        raise DataError(
            f"no config.json in {folder}",
            where=where,
            remedy="give a folder in Hugging Face form",
        )
    refuse_remote_code(folder, where)
    refuse_impossible_weights(folder, where)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **load_kwargs,
        )
    except Exception as error:  # transformers raises a dozen kinds here
        is_shape = "ignore_mismatched_sizes" in str(error)
        reason = "a weight has another shape than config.json states"
        raise DataError(
            f"cannot load {source.model!r}: {reason if is_shape else _first_line(error)}",
            where=where,
            remedy="the folder needs config.json and model.safetensors of a causal model",
        ) from error
    model, info = loaded
    missing, left_out = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    refuse_partial_load(missing, left_out, [name for name, _ in model.named_parameters()], where)
    return model, left_out


def download_model(source: ModelSource, where: str, with_weights: bool = True) -> Path:
    """Return the folder of a model; a hub model is downloaded, with or without its weights.

    Raises:
        DataError: The model cannot be downloaded.
    """
    folder = local_folder(source.model, where)
    if folder is not None:
        return folder
    return hub.download_snapshot(source.model, source.revision, where, with_weights)


def download_hub_file(source: ModelSource, name: str) -> Path | None:
    """Return a small file of a hub model; None if it has none or the hub cannot be reached."""
    return hub.download_hub_file(source.model, source.revision, name)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # pydantic and huggingface_hub name the reason on the second line
    return " ".join(line.strip() for line in lines[: 2 if "alidation error" in lines[0] else 1])[
        :200
    ]


def set_threads(threads: int) -> None:
    """Set torch's number of threads, which decides the last bits; 0 keeps torch's choice."""
    if threads:
        import torch

        torch.set_num_threads(threads)
