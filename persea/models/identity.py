"""Identify a model by its files, and list what is unusual about its configuration."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from persea.chat.messages import Conversation, Text
from persea.chat.renderer import ChatRenderer
from persea.models import hub
from persea.models.gguf_header import find_gguf
from persea.models.gguf_model import (
    converted_bytes,
    describe_gguf,
    gguf_digest,
    gguf_fingerprint,
    gguf_header,
    gguf_note,
)
from persea.models.loading import ModelSource, config_value, eos_token_ids, local_folder
from persea.models.weight_files import SUFFIX, find_weight_files, update_with_weights
from persea.storage import digest_file
from persea.tokenization.logit_rows import tokens_without_row

# The origin of a student that persea trained lies beside its files; no model depends on it.
LINEAGE_FILE = "lineage.json"
# Raised when a model with a running state gets other logits from the local engine.
RUNNING_STATE_VERSION = 1
# Those that fail a probe of persea.models.cached_states under transformers 5.24, and those that no
# probe has passed.
RUNNING_STATE_TYPES = frozenset(
    "bailing_hybrid bamba deepseek_v4 falcon_mamba glm5_next jamba kimi_linear mamba mamba2 "
    "qwen4_exp recurrent_gemma rwkv xlstm zamba".split()
)


def loading_options(source: ModelSource) -> list[str]:
    """Return quantisation and precision of a model, where they are not the usual ones."""
    return [value for value in (source.quantize, source.precision) if value not in ("none", "auto")]


def fingerprint(source: ModelSource, where: str) -> str:
    """Return a sha256 that changes when the model changes; the weights are checked on the way.

    A local folder is identified by the names and contents of its configs, its templates and the
    weights that are read (`find_weight_files`); a
    GGUF file by its content; a hub model by its id and commit; a random model by its tokenizer and
    sizes. Quantisation and precision count in each case.

    Args:
        source: The model.
        where: The place for error messages.

    Raises:
        DataError: The folder does not exist, or a weight in it is NaN or infinite.
    """
    gguf = None if source.is_random else find_gguf(source.model, where)
    if gguf is not None:
        return gguf_fingerprint(gguf, loading_options(source))
    folder = None if source.is_random else local_folder(source.model, where)
    if folder is None:
        identity = [
            source.model,
            source.revision
            if source.is_random
            else hub.resolve_commit(source.model, source.revision),
            source.tokenizer,
            source.sizes,
            *loading_options(source),
        ]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    digest = hashlib.sha256("".join(loading_options(source)).encode())
    for path in _fingerprinted_files(folder, where):
        digest.update(path.name.encode())
        if path.suffix == SUFFIX:
            update_with_weights(digest, path, where)
            continue
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def computation_version(source: ModelSource, where: str) -> list[Any]:
    """Return what an identity needs besides the weights: how the local engine computes the model.

    Before version 1 the engine gave models with a running state other logits than those of the
    whole text, so answers and captures of that time are not reused. Empty for all other models,
    whose identities stay the same.

    Args:
        source: The model.
        where: The place for error messages.
    """
    if source.is_random or find_gguf(source.model, where) is not None:
        return []  # persea makes and converts models with attention only
    model_type = config_value(source, "config.json", "model_type", where)
    if model_type not in RUNNING_STATE_TYPES:
        return []
    return [{"running_state": RUNNING_STATE_VERSION}]


def file_stats(source: ModelSource, where: str) -> tuple[tuple[str, int, int, int], ...]:
    """Return name, size (bytes), modification and change time (ns) of each fingerprinted file.

    They show at once that a folder was written to, without reading the weights. A hub model and a
    random model have none.
    """
    gguf = None if source.is_random else find_gguf(source.model, where)
    folder = None if source.is_random or gguf else local_folder(source.model, where)
    files = [gguf] if gguf else _fingerprinted_files(folder, where) if folder else []
    stats = [(path.name, path.stat()) for path in files]
    return tuple((name, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in stats)


def file_digests(source: ModelSource, where: str) -> dict[str, str]:
    """Return name -> sha256 of each file of a local model that the fingerprint covers."""
    gguf = None if source.is_random else find_gguf(source.model, where)
    if gguf is not None:
        return {gguf.name: gguf_digest(gguf)}
    folder = None if source.is_random else local_folder(source.model, where)
    files = [] if folder is None else _fingerprinted_files(folder, where)
    return {path.name: digest_file(path) for path in files}


def resolved_revision(source: ModelSource, where: str) -> str:
    """Return the commit of a hub model, or else the revision that the recipe names."""
    if source.is_random or find_gguf(source.model, where) or local_folder(source.model, where):
        return source.revision
    return hub.resolve_commit(source.model, source.revision)


def weight_bytes(source: ModelSource, where: str) -> int | None:
    """Return the size of a local model's weights on disk; None for a hub model or random weights.

    For a GGUF file it is the size of the dequantised weights.
    """
    gguf = None if source.is_random else find_gguf(source.model, where)
    if gguf is not None:
        return converted_bytes(gguf_header(gguf, where))
    folder = None if source.is_random else local_folder(source.model, where)
    return None if folder is None else sum(p.stat().st_size for p in folder.glob("*.safetensors"))


def gguf_origin(source: ModelSource, where: str) -> dict[str, Any] | None:
    """Return what the lineage records of a GGUF file; None for another model."""
    gguf = None if source.is_random else find_gguf(source.model, where)
    return None if gguf is None else describe_gguf(gguf, where)


def model_name(name_or_path: str) -> str:
    """Return a model's name for records: the last name of a path, or the hub id."""
    path = Path(name_or_path).expanduser()
    return path.name if path.exists() else name_or_path


def _fingerprinted_files(folder: Path, where: str) -> list[Path]:
    patterns = ["*.json", "*.jinja"]
    if not (folder / "tokenizer.json").is_file():
        patterns += ["merges.txt", "tokenizer.model", "tiktoken.model", "*.tiktoken"]
    found = [
        path
        for pattern in patterns
        for path in folder.glob(pattern)
        if path.name != LINEAGE_FILE and path.is_file()
    ]
    return sorted([*found, *find_weight_files(folder, where)])


def model_warnings(source: ModelSource, renderer: ChatRenderer, where: str) -> str:
    """Return warnings about a model and its renderer, for people; "" if nothing is unusual.

    Nothing here stops a run. Reported are: a family that persea does not know; a base model with a
    chat template (its configuration ends a text with another token than the template ends a turn,
    so the model has never learned to end a turn); a BOS token that the tokenizer adds and the
    template does not, or that the template writes twice; control tokens without a row of logits;
    bytes without a token.
    """
    vocabulary = renderer.vocabulary
    warnings = [renderer.family.limitations] if renderer.family.limitations else []
    gguf = None if source.is_random else find_gguf(source.model, where)
    if gguf is not None:
        warnings.append(gguf_note(gguf, where))
    prompt_ids = renderer.render_prompt(Conversation.from_question("Hi")).ids_T.tolist()
    answered = renderer.render(Conversation.from_question("Hi").with_answer(Text("Hi")))
    stop_id = int(answered.ids_T[answered.loss_mask_T][-1])
    eos_ids = eos_token_ids(source, where)

    def name(ids: Sequence[int]) -> str:
        return ", ".join(
            f"{vocabulary.control_names.get(i, 'no control token')} ({i})" for i in ids
        )

    if eos_ids and stop_id not in eos_ids and not renderer.is_text:
        warnings.append(
            f"a base model with a chat template: its configuration ends a text with "
            f"{name(eos_ids)}, the template ends a turn with {name([stop_id])}; persea stops at "
            "the template's token, which this model may never generate."
        )
    plain_ids, special_ids = (
        vocabulary.backend.encode("Hi", add_special_tokens=special).ids for special in (False, True)
    )
    length = len(plain_ids)
    start = next(
        (k for k in range(len(special_ids)) if special_ids[k : k + length] == plain_ids), 0
    )
    prefix_ids = special_ids[:start]
    if prefix_ids and prompt_ids[: len(prefix_ids)] != prefix_ids:
        warnings.append(
            f"its tokenizer puts {name(prefix_ids)} before every text, its chat template does not; "
            "persea follows the template."
        )
    first = prompt_ids[:2]
    if len(first) == 2 and first[0] == first[1] and first[0] in vocabulary.control_names:
        warnings.append(
            f"its chat template begins with {name(first[:1])} twice; persea follows the template."
        )
    if without_row := tokens_without_row(vocabulary):
        warnings.append(
            f"its tokenizer has {len(without_row)} control tokens more than the model has logits; "
            f"they are left out: {', '.join(without_row[:5])}."
        )
    if vocabulary.missing_bytes:
        warnings.append(
            f"its vocabulary lacks {len(vocabulary.missing_bytes)} single bytes "
            f"({vocabulary.missing_bytes[:32].hex(' ')}); texts that need one are left out."
        )
    return " ".join(warnings)
