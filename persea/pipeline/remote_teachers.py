"""Teachers that transformers does not run here: behind a server, or in vLLM."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from persea import storage
from persea.chat.renderer import ChatRenderer
from persea.config.schema import (
    TEXT_ONLY_MODEL,
    EndpointSection,
    GenerationSection,
    TeacherSection,
)
from persea.errors import MissingRequirementError
from persea.models.identity import model_name
from persea.models.licence import UNKNOWN_LICENCE, read_licence
from persea.models.loading import ModelSource
from persea.report.lineage import ParentModel
from persea.teachers.engines import Engine, EngineOptions, Sampling, find_engine
from persea.teachers.engines.http_client import HttpClient, RetryPolicy
from persea.teachers.engines.server import ServerEngine, ServerFingerprint
from persea.teachers.engines.server_pool import handshake_all, open_pool


def sampling_of(generation: GenerationSection) -> Sampling:
    """Return the sampling settings of a recipe's `generation` section."""
    return Sampling(generation.temperature, generation.top_p, generation.seed)


def is_remote(ref: TeacherSection) -> bool:
    """Return whether a teacher runs behind a server or in vLLM."""
    return ref.endpoint is not None or ref.engine != "local"


def has_fixed_effort(ref: TeacherSection) -> bool:
    """Return whether the server receives no effort: a chat server without `send_effort`."""
    return ref.endpoint is not None and ref.endpoint.send_effort is False


def endpoint_identity(ref: TeacherSection) -> list[Any]:
    """Return the settings that the answers of a teacher behind a server depend on.

    The address and the retry settings are no part of it. Empty for a local teacher.
    """
    at = ref.endpoint
    model = (
        "words" if ref.model == TEXT_ONLY_MODEL else ref.model
    )  # the old name, part of identities in existing caches
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
    """Return the generation settings and the engine where they differ from the defaults.

    Default settings add nothing, so that the identity of such a teacher stays the same.
    """
    return ([ref.generation.model_dump()] if ref.generation != GenerationSection() else []) + (
        [ref.engine, *([ref.engine_options] if ref.engine_options else [])]
        if ref.engine != "local"
        else []
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
    model = str(handshake["model"]) if is_text_only else model_name(ref.model)
    licence = UNKNOWN_LICENCE
    if not is_text_only:
        licence = read_licence(ModelSource(ref.model, ref.revision), f"teachers.{ref.name}")
    return ParentModel(
        ref.name,
        model,
        ref.revision,
        TEXT_ONLY_MODEL if is_text_only else renderer.family.name,
        ref.licence or licence,
        storage.digest_json(handshake),
    )


def open_remote_engine(ref: TeacherSection, renderer: ChatRenderer, handshake_file: Path) -> Engine:
    """Open the engine of a teacher that is behind a server, or runs in vLLM.

    The first handshake of a run is stored in `handshake_file`, and later ones must match it.

    Raises:
        TeacherError: The server does not return the needed values, or serves another model.
        MissingRequirementError: The API key or vLLM is missing.
    """
    endpoint = ref.endpoint
    spec = find_engine(ref.engine if endpoint is None else endpoint.protocol)
    options = EngineOptions(
        ref.name,
        renderer,
        sampling_of(ref.generation),
        ModelSource(ref.model, ref.revision),
        engine_options=ref.engine_options,
    )
    if endpoint is None:
        return spec.open(options)
    options = replace(
        options,
        client=_open_client(ref.name, endpoint),
        served_model_name=endpoint.served_model_name,
        num_top_logprobs=endpoint.top_logprobs or 1,
        send_effort=bool(endpoint.send_effort),
        handshake_effort=ref.effort,
        max_fingerprint_drift=endpoint.max_fingerprint_drift,
    )
    engine = cast(ServerEngine, spec.open(options))
    handshake_all(engine)
    if handshake_file.is_file():
        before = ServerFingerprint.from_json(storage.read_json(handshake_file))
        where = f"{ref.name}, {engine.client.url}"
        before.refuse_other_model(engine.fingerprints[0], where, endpoint.max_fingerprint_drift)
        # The stored fingerprint stays binding: cached answers stay valid although its last digits
        # differ now, and drift does not add up from run to run.
        engine.fingerprints[:] = [before]
    else:
        storage.write_json(handshake_file, engine.fingerprints[0].to_json())
    return engine


def endpoint_key(name: str, endpoint: EndpointSection) -> str:
    """Return the key of a server; "" if the recipe names no variable.

    Raises:
        MissingRequirementError: The variable is not set, or no header can carry its value.
    """
    key = os.environ.get(endpoint.key_env, "").strip() if endpoint.key_env else ""
    if endpoint.key_env and not key:
        raise MissingRequirementError(
            f"the variable {endpoint.key_env} is not set",
            where=f"{name}, {endpoint.addresses[0]}",
            remedy=f"export {endpoint.key_env}=...; a recipe holds none",
        )
    if not key.isascii() or not key.isprintable() or " " in key:
        raise MissingRequirementError(
            f"the variable {endpoint.key_env} contains characters that an HTTP header cannot carry",
            where=f"{name}, {endpoint.addresses[0]}",
            remedy=f"export {endpoint.key_env}=... with the key alone: ASCII, no spaces, "
            "no line breaks",
        )
    return key


def _open_client(name: str, endpoint: EndpointSection) -> HttpClient:
    policy = RetryPolicy(
        endpoint.concurrency,
        endpoint.max_attempts,
        endpoint.stall_timeout_s,
        endpoint.give_up_after_s,
        endpoint.max_total_tokens,
        endpoint.max_failed_share,
        endpoint.max_answer_s,
    )
    key = endpoint_key(name, endpoint)
    if len(endpoint.addresses) > 1:
        return open_pool(endpoint.addresses, name, policy, key)
    return HttpClient(endpoint.addresses[0], name, policy, key)
