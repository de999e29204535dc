"""Engines as a recipe names them."""

from __future__ import annotations

import os

from persea.chat import Effort
from persea.engines import Sampling
from persea.engines.dialects import DIALECTS
from persea.engines.endpoint import EndpointEngine, served_model
from persea.engines.line import Line, Manners
from persea.engines.talk import TalkEngine
from persea.errors import EnvironmentLacks
from persea.sections import Endpoint, Generation
from persea.voice import Voice


def sampling_of(generation: Generation) -> Sampling:
    return Sampling(generation.temperature, generation.top_p, generation.seed)


def open_endpoint(name: str, endpoint: Endpoint, effort: Effort, sampling: Sampling, voice: Voice) -> EndpointEngine | TalkEngine:
    """A server, its handshake done. Raises TeacherError where it does not give what is asked, EnvironmentLacks where its key is not set."""
    key = os.environ.get(endpoint.key_env, "").strip() if endpoint.key_env else ""
    if endpoint.key_env and not key:
        raise EnvironmentLacks(f"the variable {endpoint.key_env} holds no key", where=f"{name}, {endpoint.url}",
                               remedy=f"export {endpoint.key_env}=...; a recipe holds none")
    manners = Manners(endpoint.concurrency, endpoint.attempts, endpoint.stall, endpoint.patience, endpoint.budget)
    line = Line(endpoint.url, name, manners, key)
    engine: EndpointEngine | TalkEngine
    if endpoint.protocol == "chat":
        engine = TalkEngine(line, endpoint.served or served_model(line, ""), sampling, bool(endpoint.dial), effort)
    else:
        dialect = next(d for d in DIALECTS if d.name == endpoint.protocol)
        engine = EndpointEngine(line, voice, dialect, served_model(line, endpoint.served), endpoint.top or 1, sampling)
    engine.prove()
    return engine
