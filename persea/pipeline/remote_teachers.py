"""Far: teachers whose weights are not opened by transformers here: behind a server, or in vLLM."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from persea import storage as store
from persea.chat.renderer import Voice
from persea.config.schema import WORDS, Generation, Teacher
from persea.errors import EnvironmentLacks
from persea.report.lineage import Parent
from persea.teachers.engines import Sampling
from persea.teachers.engines.chat_server import TalkEngine
from persea.teachers.engines.http_client import Line, Manners
from persea.teachers.engines.token_server import EndpointEngine, Fingerprint, served_model
from persea.teachers.engines.vllm import VllmEngine, open_vllm
from persea.teachers.engines.wire_formats import DIALECTS


def sampling_of(generation: Generation) -> Sampling:
    return Sampling(generation.temperature, generation.top_p, generation.seed)


def is_far(ref: Teacher) -> bool:
    return ref.endpoint is not None or ref.engine != "local"


def is_undialled(ref: Teacher) -> bool:
    """Whether nothing of its effort is told to the server: a chat route without `dial`."""
    return ref.endpoint is not None and ref.endpoint.dial is False


def what_answers(ref: Teacher) -> list[Any]:
    """Of a teacher behind a server, what its answers depend on; not where it stands, nor how patiently it is asked."""
    at = ref.endpoint
    return [] if at is None else [ref.model, ref.revision, at.protocol, at.served, at.top, at.dial]


def how_answered(ref: Teacher) -> list[Any]:
    """What a teacher's identity says beside that; nothing where it answers as all do."""
    return ([ref.generation.model_dump()] if ref.generation != Generation() else []) + ([ref.engine] if ref.engine != "local" else [])


def far_parent(ref: Teacher, voice: Voice, kept: Path) -> Parent:
    """A teacher behind a server, for the lineage record: which model answered, as its first handshake found."""
    seen, words = store.read_json(kept), ref.model == WORDS
    model = str(seen["model"]) if words else Path(ref.model).name if Path(ref.model).is_dir() else ref.model
    return Parent(ref.name, model, ref.revision, WORDS if words else voice.family.name,
                  ref.licence or ("not known" if words else voice.family.licence), store.digest_of(seen))


def open_far(ref: Teacher, voice: Voice, kept: Path) -> EndpointEngine | TalkEngine | VllmEngine:
    """The engine of such a teacher. The first handshake of a run is kept as `kept`, and holds for all later ones.

    Raises TeacherError where a server does not give what is asked, or is another model's; EnvironmentLacks without its key, or without vLLM.
    """
    if ref.endpoint is None:
        return open_vllm(ref.model, ref.revision, len(voice.vocabulary), sampling_of(ref.generation))
    engine = _open(ref, voice)
    if kept.is_file():
        before = Fingerprint.from_json(store.read_json(kept))
        before.refuse_another(engine.first[0], f"{ref.name}, {ref.endpoint.url}")
        engine.first[:] = [before]  # its last digits are no other speaker's: what was heard before holds, and no drift adds up from run to run
    else:
        store.publish_json(kept, engine.first[0].to_json())
    return engine


def _open(ref: Teacher, voice: Voice) -> EndpointEngine | TalkEngine:
    at, sampling = ref.endpoint, sampling_of(ref.generation)
    assert at is not None
    key = os.environ.get(at.key_env, "").strip() if at.key_env else ""
    if at.key_env and not key:
        raise EnvironmentLacks(f"the variable {at.key_env} holds no key", where=f"{ref.name}, {at.url}",
                               remedy=f"export {at.key_env}=...; a recipe holds none")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise EnvironmentLacks(f"the variable {at.key_env} holds what no header can carry", where=f"{ref.name}, {at.url}",
                               remedy=f"export {at.key_env}=... with the key alone: no line break, no space, no letter beyond ASCII")
    line = Line(at.url, ref.name, Manners(at.concurrency, at.attempts, at.stall, at.patience, at.budget), key)
    engine: EndpointEngine | TalkEngine
    if at.protocol == "chat":
        engine = TalkEngine(line, at.served or served_model(line, ""), sampling, bool(at.dial), ref.effort)
    else:
        dialect = next(d for d in DIALECTS if d.name == at.protocol)
        engine = EndpointEngine(line, voice, dialect, served_model(line, at.served), at.top or 1, sampling)
    engine.prove()
    return engine
