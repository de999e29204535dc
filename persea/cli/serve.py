"""persea serve: a model behind an OpenAI-compatible API on this machine."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from persea.cli.options import AFTER_PANEL, app, refuse_other_versions
from persea.errors import MissingRequirementError


@app.command(rich_help_panel=AFTER_PANEL)
def serve(
    model: Annotated[
        str,
        typer.Argument(
            help="A model folder, a GGUF file, a hub id, or a run folder (its student).",
            show_default=False,
        ),
    ],
    host: Annotated[
        str,
        typer.Option(help="Address to listen on. An address that others can reach needs a key."),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 = any free port.")] = 8000,
    name: Annotated[
        str,
        typer.Option(
            help="Name of the model for clients. Default: the folder's name.", show_default=False
        ),
    ] = "",
    key_env: Annotated[
        str, typer.Option(help="Environment variable that holds the API key.")
    ] = "PERSEA_SERVE_KEY",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 = torch's choice.")] = 0,
    max_body: Annotated[int, typer.Option(min=1, help="Largest request, in MiB.")] = 8,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most new tokens a request.")] = 4096,
    max_logprobs: Annotated[
        int, typer.Option(min=0, help="Most log-probabilities a position.")
    ] = 64,
    concurrency: Annotated[
        int, typer.Option(min=1, help="Requests answered at once. Further requests get status 429.")
    ] = 32,
    seconds: Annotated[
        float,
        typer.Option(
            min=0.1, help="Timeout for the headers of a request, its body, and a slow client."
        ),
    ] = 20.0,
) -> None:
    """Serve a model with an OpenAI-compatible API.

    Routes: /v1/models, /v1/chat/completions, /v1/completions, /inference/v1/generate. See
    docs/serve.md.
    """
    if find_spec("fastapi") is None or find_spec("uvicorn") is None:
        raise MissingRequirementError(
            "fastapi and uvicorn are not installed",
            where="serve",
            remedy="pip install 'persea[serve]'",
        )
    from persea.models.loading import set_threads
    from persea.pipeline.model_refs import silence_transformers
    from persea.serve.limits import ServerLimits
    from persea.serve.server import load_served_model, resolve_api_key, run_server

    key = resolve_api_key(host, key_env)  # before the weights, which take minutes
    refuse_other_versions(Path(model), "train")
    silence_transformers()
    set_threads(threads)
    limits = ServerLimits(max_body << 20, seconds, concurrency, max_tokens, max_logprobs)
    served = load_served_model(model, name)
    run_server(
        served,
        host,
        port,
        key,
        limits,
        lambda address: typer.echo(f"{served.name} listens on {address}"),
    )
