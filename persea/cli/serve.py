"""persea serve: a model behind OpenAI's routes on this machine."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated

import typer

from persea.cli.options import app
from persea.errors import MissingRequirementError


@app.command(rich_help_panel="After a run")
def serve(
    model: Annotated[
        str,
        typer.Argument(
            help="A model folder, a hub id, or a run folder: then its student.", show_default=False
        ),
    ],
    host: Annotated[
        str, typer.Option(help="Address to listen on; any but this machine's own needs a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 = any free one.")] = 8000,
    name: Annotated[
        str,
        typer.Option(
            help="What clients call the model; default the folder's name.", show_default=False
        ),
    ] = "",
    key_env: Annotated[
        str, typer.Option(help="Variable of the environment that holds the key.")
    ] = "PERSEA_SERVE_KEY",
    threads: Annotated[
        int, typer.Option(min=0, help="Threads of one operation on a CPU; 0 = torch's choice.")
    ] = 0,
    max_body: Annotated[int, typer.Option(min=1, help="MiB of one request.")] = 8,
    max_tokens: Annotated[int, typer.Option(min=1, help="New tokens of one request.")] = 4096,
    max_logprobs: Annotated[int, typer.Option(min=0, help="Tokens named at one position.")] = 64,
    concurrency: Annotated[
        int, typer.Option(min=1, help="Requests answered at once; more get status 429.")
    ] = 32,
    seconds: Annotated[
        float, typer.Option(min=0.1, help="For a request's head, its body, and a slow reader.")
    ] = 20.0,
) -> None:
    """Serve a model: /v1/models, /v1/chat/completions, /v1/completions, /inference/v1/generate. docs/serve.md."""
    if find_spec("fastapi") is None or find_spec("uvicorn") is None:
        raise MissingRequirementError(
            "fastapi and uvicorn are not installed",
            where="serve",
            remedy="pip install 'persea[serve]'",
        )
    from transformers.utils import logging

    from persea.models.loading import set_threads
    from persea.serve.limits import ServerLimits
    from persea.serve.server import load_served_model, resolve_api_key
    from persea.serve.server import run_server as listen

    key = resolve_api_key(host, key_env)  # before minutes of loading
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    set_threads(threads)
    caps = ServerLimits(max_body << 20, seconds, concurrency, max_tokens, max_logprobs)
    speaker = load_served_model(model, name)
    listen(
        speaker,
        host,
        port,
        key,
        caps,
        lambda where: typer.echo(f"{speaker.name} listens on {where}"),
    )
