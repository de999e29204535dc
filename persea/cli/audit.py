"""persea audit: did a model learn from a capture, or from a teacher? Evidence with p-values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from persea.cli.options import AFTER_PANEL, NO_OVERRIDES, AsJson, app
from persea.errors import RecipeError

if TYPE_CHECKING:
    from persea.config.model_sections import EndpointSection
    from persea.evaluation.audit import CanaryTest, TeacherComparison

CAVEAT = (
    "evidence, not proof: texts may resemble a teacher's for other reasons, a sibling of the "
    "teacher leaves the same marks, and no result shows that a model did not learn from one"
)


@app.command(rich_help_panel=AFTER_PANEL)
def audit(
    suspect: Annotated[
        str,
        typer.Argument(
            help="The model: a folder, GGUF file, hub id or run folder. With --endpoint: where its "
            "tokenizer is.",
            show_default=False,
        ),
    ],
    canaries: Annotated[
        Path | None,
        typer.Option("--canaries", help="A run folder whose capture drew canaries."),
    ] = None,
    base: Annotated[
        str, typer.Option("--base", help="The model that the suspect was made from.")
    ] = "",
    teacher: Annotated[
        list[str],
        typer.Option("--teacher", help="A model that may have taught it. Repeatable."),
    ] = NO_OVERRIDES,
    control: Annotated[
        list[str],
        typer.Option(
            "--control",
            help="A model that did not. Repeatable. Default: the other teachers.",
            show_default=False,
        ),
    ] = NO_OVERRIDES,
    untaught: Annotated[
        list[str],
        typer.Option(
            "--untaught",
            help="A student of the base that no --teacher taught, to calibrate with. Repeatable.",
            show_default=False,
        ),
    ] = NO_OVERRIDES,
    skill: Annotated[
        list[str],
        typer.Option("--skill", help="A generated task to take prompts from. Default: all."),
    ] = NO_OVERRIDES,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="A file of prompts instead.")
    ] = None,
    items: Annotated[
        int, typer.Option("--items", min=1, help="Prompts of each task, or of the file.")
    ] = 40,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Longest answer of a teacher.")
    ] = 64,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Texts at once.")] = 64,
    seed: Annotated[int, typer.Option("--seed", help="Seed of answers and signs.")] = 0,
    endpoint: Annotated[
        str, typer.Option("--endpoint", help="Address of a server that runs the suspect.")
    ] = "",
    protocol: Annotated[
        str, typer.Option("--protocol", help="tokens, completions, sglang or llamacpp.")
    ] = "tokens",
    served_model_name: Annotated[
        str, typer.Option("--served-model-name", help="Its name on that server.")
    ] = "",
    key_env: Annotated[
        str, typer.Option("--key-env", help="Variable that holds the server's key.")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Test whether a model learned from a capture with canaries, or from a suspected teacher.

    --canaries RUN gives an exact p-value. --base and --teacher compare how much more than its base
    the model likes a teacher's texts than those of other models. Both are evidence, never proof.
    """
    _refuse_contradictions(canaries, base, teacher)
    from persea.pipeline.audit import (
        AuditModels,
        Suspect,
        audit_canaries,
        audit_prompts,
        audit_teachers,
    )
    from persea.pipeline.model_refs import silence_transformers
    from persea.pipeline.progress import progress_bars

    silence_transformers()
    server = _endpoint(endpoint, protocol, served_model_name, key_env) if endpoint else None
    model = Suspect(suspect, server)
    with progress_bars(quiet=as_json) as bar:

        def progress(share: float, text: str) -> None:
            bar("audit", share, text)

        if canaries is not None:
            test = audit_canaries(canaries, model, batch_size, progress)
            result, lines = test.to_json(), _canary_lines(test)
        else:
            compared = audit_teachers(
                AuditModels(model, base, tuple(teacher), tuple(control), tuple(untaught)),
                audit_prompts(skill, items, prompts, seed),
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                seed=seed,
                progress=progress,
            )
            result, lines = compared.to_json(), _teacher_lines(compared)
    if as_json:
        typer.echo(json.dumps(result | {"caveat": CAVEAT}, indent=1, ensure_ascii=False))
        return
    for line in (*lines, CAVEAT):
        typer.echo(line)


def _refuse_contradictions(canaries: Path | None, base: str, teachers: list[str]) -> None:
    if canaries is not None and (base or teachers):
        raise RecipeError(
            "--canaries needs no --base and no --teacher: its p-value is exact without them",
            where="persea audit",
            remedy="run the two tests one after the other",
        )
    if canaries is None and not (base and teachers):
        raise RecipeError(
            "nothing to compare the model with",
            where="persea audit",
            remedy="--canaries RUN, or --base MODEL and --teacher MODEL (docs/audit.md)",
        )


def _endpoint(url: str, protocol: str, served_model_name: str, key_env: str) -> EndpointSection:
    from pydantic import ValidationError

    from persea.config.model_sections import EndpointSection
    from persea.teachers.engines import ENGINES

    known = [s.name for s in ENGINES if s.is_server]
    if protocol not in known:
        raise RecipeError(
            f"unknown protocol {protocol!r}", where="--protocol", remedy=f"one of {known}"
        )
    try:
        return EndpointSection(
            url=url, protocol=protocol, served_model_name=served_model_name, key_env=key_env
        )
    except ValidationError as error:
        first: Any = error.errors()[0]
        option = f"--{str(first['loc'][-1]).replace('_', '-')}" if first["loc"] else "--endpoint"
        raise RecipeError(
            first["msg"],
            where=option.replace("--url", "--endpoint"),
            remedy="http://host:port; the name of a variable in capitals, not its value",
        ) from error


def _canary_lines(test: CanaryTest) -> list[str]:
    left_out = f", {test.left_out:,} pairs left out" if test.left_out else ""
    return [
        f"{test.suspect} prefers the learned answer in {test.preferred:,} of {test.tested:,} "
        f"pairs{left_out}",
        f"p = {test.p_value:.2g}: the probability of so many or more, if it never saw the capture",
    ]


def _teacher_lines(compared: TeacherComparison) -> list[str]:
    from persea.pipeline.progress import print_table

    print_table(
        ["teacher", "prompts", "effect, nats/byte", "p", "p, every control", "z", "finding"],
        [
            [
                e.teacher,
                str(e.prompts),
                f"{e.effect:+.4f}",
                f"{e.p_value:.2g}",
                f"{e.p_every:.2g}",
                "-" if e.z is None else f"{e.z:.1f}",
                e.finding,
            ]
            for e in compared.teachers
        ],
    )
    controls = ", ".join(compared.controls) or "the other teachers"
    notes = [f"suspect {compared.suspect}, base {compared.base}, controls: {controls}"]
    if all(e.z is None for e in compared.teachers):
        notes.append(
            "not calibrated: p counts prompts, not students; five --untaught students of the base "
            "give z, without which a p-value here is no error rate"
        )
    return notes
