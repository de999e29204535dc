"""Far: teachers whose weights are not opened by transformers here: behind a server, or in vLLM."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from persea import storage as store
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
    return Sampling(generation.temperature, generation.top_p, generation.seed)


def is_remote(ref: TeacherSection) -> bool:
    return ref.endpoint is not None or ref.engine != "local"


def has_fixed_effort(ref: TeacherSection) -> bool:
    """Whether nothing of its effort is told to the server: a chat route without `send_effort`."""
    return ref.endpoint is not None and ref.endpoint.send_effort is False


def endpoint_identity(ref: TeacherSection) -> list[Any]:
    """Of a teacher behind a server, what its answers depend on; not where it stands, nor how patiently it is asked."""
    at = ref.endpoint
    model = "words" if ref.model == TEXT_ONLY_MODEL else ref.model  # literal in kept caches
    return (
        []
        if at is None
        else [
            model,
            ref.revision,
            at.protocol,
            at.served_model_name,
            at.top_logprobs,
            at.send_effort,
        ]
    )


def generation_identity(ref: TeacherSection) -> list[Any]:
    """What a teacher's identity says beside that; nothing where it answers as all do."""
    return ([ref.generation.model_dump()] if ref.generation != GenerationSection() else []) + (
        [ref.engine] if ref.engine != "local" else []
    )


def remote_parent(ref: TeacherSection, renderer: ChatRenderer, handshake_file: Path) -> ParentModel:
    """A teacher behind a server, for the lineage record: which model answered, as its first handshake found."""
    seen, words = store.read_json(handshake_file), ref.model == TEXT_ONLY_MODEL
    model = (
        str(seen["model"])
        if words
        else Path(ref.model).name
        if Path(ref.model).is_dir()
        else ref.model
    )
    return ParentModel(
        ref.name,
        model,
        ref.revision,
        TEXT_ONLY_MODEL if words else renderer.family.name,
        ref.licence or ("not known" if words else renderer.family.licence),
        store.digest_json(seen),
    )


def open_remote_engine(
    ref: TeacherSection, renderer: ChatRenderer, handshake_file: Path
) -> TokenServerEngine | ChatServerEngine | VllmEngine:
    """The engine of such a teacher. The first handshake of a run is kept as `kept`, and holds for all later ones.

    Raises TeacherError where a server does not give what is asked, or is another model's; EnvironmentLacks without its key, or without vLLM.
    """
    if ref.endpoint is None:
        return load_vllm_engine(
            ref.model, ref.revision, len(renderer.vocabulary), sampling_of(ref.generation)
        )
    engine = _open_server_engine(ref, renderer)
    if handshake_file.is_file():
        before = ServerFingerprint.from_json(store.read_json(handshake_file))
        before.refuse_other_model(engine.fingerprints[0], f"{ref.name}, {ref.endpoint.url}")
        engine.fingerprints[:] = [
            before
        ]  # its last digits are no other speaker's: what was heard before holds, and no drift adds up from run to run
    else:
        store.write_json(handshake_file, engine.fingerprints[0].to_json())
    return engine


def _open_server_engine(
    ref: TeacherSection, renderer: ChatRenderer
) -> TokenServerEngine | ChatServerEngine:
    at, sampling = ref.endpoint, sampling_of(ref.generation)
    assert at is not None
    key = os.environ.get(at.key_env, "").strip() if at.key_env else ""
    if at.key_env and not key:
        raise MissingRequirementError(
            f"the variable {at.key_env} holds no key",
            where=f"{ref.name}, {at.url}",
            remedy=f"export {at.key_env}=...; a recipe holds none",
        )
    if not key.isascii() or not key.isprintable() or " " in key:
        raise MissingRequirementError(
            f"the variable {at.key_env} holds what no header can carry",
            where=f"{ref.name}, {at.url}",
            remedy=f"export {at.key_env}=... with the key alone: no line break, no space, no letter beyond ASCII",
        )
    line = HttpClient(
        at.url,
        ref.name,
        RetryPolicy(
            at.concurrency,
            at.max_attempts,
            at.stall_timeout_s,
            at.give_up_after_s,
            at.max_total_tokens,
        ),
        key,
    )
    engine: TokenServerEngine | ChatServerEngine
    if at.protocol == "chat":
        engine = ChatServerEngine(
            line,
            at.served_model_name or resolve_served_model(line, ""),
            sampling,
            bool(at.send_effort),
            ref.effort,
        )
    else:
        dialect = next(d for d in WIRE_FORMATS if d.name == at.protocol)
        engine = TokenServerEngine(
            line,
            renderer,
            dialect,
            resolve_served_model(line, at.served_model_name),
            at.top_logprobs or 1,
            sampling,
        )
    engine.handshake()
    return engine
