"""Teachers that transformers does not run here: behind a server, or in vLLM."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from persea import storage
from persea.chat.renderer import ChatRenderer
from persea.config.schema import TEXT_ONLY_MODEL, GenerationSection, TeacherSection
from persea.errors import MissingRequirementError
from persea.report.lineage import ParentModel
from persea.teachers.engines import Sampling
from persea.teachers.engines.chat_server import ChatServerEngine
from persea.teachers.engines.http_client import HttpClient, RetryPolicy
from persea.teachers.engines.token_server import (
    ServerFingerprint,
    TokenServerEngine,
    resolve_served_model,
)
from persea.teachers.engines.vllm import VllmEngine, load_vllm_engine
from persea.teachers.engines.wire_formats import WIRE_FORMATS


def sampling_of(generation: GenerationSection) -> Sampling:
    """Return the sampling settings of a recipe's `generation` section."""
    return Sampling(generation.temperature, generation.top_p, generation.seed)


def is_remote(ref: TeacherSection) -> bool:
    """Return whether a teacher runs behind a server or in vLLM."""
    return ref.endpoint is not None or ref.engine != "local"


def has_fixed_effort(ref: TeacherSection) -> bool:
    """Return whether the server receives no thinking effort: a chat server without `dial`."""
    return ref.endpoint is not None and ref.endpoint.dial is False


def endpoint_identity(ref: TeacherSection) -> list[Any]:
    """Return what the answers of a teacher behind a server depend on.

    The address and the retry settings are no part of it. Empty for a local teacher.
    """
    at = ref.endpoint
    return [] if at is None else [ref.model, ref.revision, at.protocol, at.served, at.top, at.dial]


def generation_identity(ref: TeacherSection) -> list[Any]:
    """Return the generation settings and the engine where they differ from the defaults.

    Default settings add nothing, so that the identity of such a teacher stays the same.
    """
    return ([ref.generation.model_dump()] if ref.generation != GenerationSection() else []) + (
        [ref.engine] if ref.engine != "local" else []
    )


def remote_parent(ref: TeacherSection, renderer: ChatRenderer, handshake_file: Path) -> ParentModel:
    """Describe a teacher behind a server for the lineage record.

    Args:
        ref: The teacher.
        renderer: Its chat renderer.
        handshake_file: The record of its first handshake: it names the model that answered.
    """
    handshake = storage.read_json(handshake_file)
    is_text_only = ref.model == TEXT_ONLY_MODEL
    model = (
        str(handshake["model"])
        if is_text_only
        else Path(ref.model).name
        if Path(ref.model).is_dir()
        else ref.model
    )
    return ParentModel(
        ref.name,
        model,
        ref.revision,
        TEXT_ONLY_MODEL if is_text_only else renderer.family.name,
        ref.licence or ("not known" if is_text_only else renderer.family.licence),
        storage.digest_json(handshake),
    )


def open_remote_engine(
    ref: TeacherSection, renderer: ChatRenderer, handshake_file: Path
) -> TokenServerEngine | ChatServerEngine | VllmEngine:
    """Open the engine of a teacher behind a server or in vLLM.

    The first handshake of a run is stored, and every later one must match it.

    Args:
        ref: The teacher.
        renderer: Its chat renderer.
        handshake_file: Where the first handshake is stored.

    Raises:
        TeacherError: The server does not offer the recipe's settings, or runs another model.
        MissingRequirementError: The API key or vLLM is missing.
    """
    if ref.endpoint is None:
        return load_vllm_engine(
            ref.model, ref.revision, len(renderer.vocabulary), sampling_of(ref.generation)
        )
    engine = _open_server_engine(ref, renderer)
    if handshake_file.is_file():
        first = ServerFingerprint.from_json(storage.read_json(handshake_file))
        first.refuse_other_model(engine.fingerprints[0], f"{ref.name}, {ref.endpoint.url}")
        # last digits may differ: the stored fingerprint stays, so earlier answers are reused and no
        # drift adds up from run to run
        engine.fingerprints[:] = [first]
    else:
        storage.write_json(handshake_file, engine.fingerprints[0].to_json())
    return engine


def _open_server_engine(
    ref: TeacherSection, renderer: ChatRenderer
) -> TokenServerEngine | ChatServerEngine:
    at, sampling = ref.endpoint, sampling_of(ref.generation)
    assert at is not None
    key = os.environ.get(at.key_env, "").strip() if at.key_env else ""
    if at.key_env and not key:
        raise MissingRequirementError(
            f"the variable {at.key_env} is not set",
            where=f"{ref.name}, {at.url}",
            remedy=f"export {at.key_env}=...; a recipe holds none",
        )
    if not key.isascii() or not key.isprintable() or " " in key:
        raise MissingRequirementError(
            f"the variable {at.key_env} contains characters that an HTTP header cannot carry",
            where=f"{ref.name}, {at.url}",
            remedy=f"export {at.key_env}=... with the key alone: ASCII, no spaces, no line breaks",
        )
    client = HttpClient(
        at.url,
        ref.name,
        RetryPolicy(at.concurrency, at.attempts, at.stall, at.patience, at.budget),
        key,
    )
    engine: TokenServerEngine | ChatServerEngine
    if at.protocol == "chat":
        engine = ChatServerEngine(
            client,
            at.served or resolve_served_model(client, ""),
            sampling,
            bool(at.dial),
            ref.effort,
        )
    else:
        wire_format = next(f for f in WIRE_FORMATS if f.name == at.protocol)
        engine = TokenServerEngine(
            client,
            renderer,
            wire_format,
            resolve_served_model(client, at.served),
            at.top or 1,
            sampling,
        )
    engine.handshake()
    return engine
