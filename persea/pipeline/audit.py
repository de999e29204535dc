"""Audit a model: score canary pairs, or the texts of suspected teachers and of control models.

`persea.evaluation.audit` has the statistics and their assumptions.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from persea.cache.canaries import drawing, read_pairs
from persea.chat.messages import Conversation, FinishReason
from persea.chat.renderer import ChatRenderer
from persea.config.model_sections import EndpointSection, TeacherSection
from persea.data.formats import read_prompts
from persea.data.prompts import Prompt
from persea.errors import DataError, RecipeError, RefusedError
from persea.evaluation.api import load_teacher, name_of, open_renderer
from persea.evaluation.audit import (
    MIN_PAIRED_PROMPTS,
    CanaryTest,
    TeacherComparison,
    compare_teachers,
    count_preferred,
)
from persea.models.loading import max_positions, resolve_model_source
from persea.pipeline.remote_teachers import open_remote_engine
from persea.tasks.generated import GENERATED_TASKS, find_generated_task
from persea.tasks.task import Split
from persea.teachers.teacher import Teacher

SCORED_AT_ONCE = 64
AuditProgress = Callable[[float, str], None]


@dataclass(frozen=True)
class Suspect:
    """A model to audit.

    Attributes:
        model: Its folder or hub id, or the folder of its tokenizer if a server runs it.
        endpoint: The server; None = the weights are loaded here.
    """

    model: str
    endpoint: EndpointSection | None = None

    @property
    def name(self) -> str:
        """Name in reports."""
        return name_of(self.model)

    def open(self, batch_size: int) -> Teacher:
        """Load the model, or connect to its server.

        Raises:
            DataError: The model cannot be read.
            RefusedError: The server returns no log-probabilities of given texts.
            TeacherError: The server cannot be reached, or runs a model with another tokenizer.
        """
        renderer = open_renderer(self.model)
        if self.endpoint is None:
            return load_teacher(self.name, self.model, renderer, batch_size)
        if self.endpoint.protocol == "chat":
            raise RefusedError(
                "a chat route returns no log-probabilities of a given text",
                where="--protocol chat",
                remedy="audit needs tokens, completions, sglang or llamacpp (docs/engines.md), or "
                "the weights",
            )
        ref = TeacherSection(name=self.name, model=self.model, endpoint=self.endpoint)
        with tempfile.TemporaryDirectory() as folder:
            engine = open_remote_engine(ref, renderer, Path(folder) / "handshake.json")
        return Teacher(self.name, renderer, engine, renderer.family.lowest_effort)


def audit_canaries(
    run: Path, suspect: Suspect, batch_size: int = 64, progress: AuditProgress = lambda f, t: None
) -> CanaryTest:
    """Test whether a model learned from the capture of a run with canaries.

    Args:
        run: The run folder, with its secret key.
        suspect: The model.
        batch_size: Sequences in one forward pass.
        progress: Called with (share done, text).

    Returns:
        How often the suspect prefers the learned answers, with its exact p-value.

    Raises:
        DataError: The run has no canaries or its files are damaged, or the model cannot be read.
        RefusedError: The key is missing, or the suspect can read no pair.
    """
    pairs = read_pairs(run)
    model = suspect.open(batch_size)
    conversations = [answer for pair in pairs for answer in pair.answers]
    positions = _positions(suspect)
    logprobs_P2 = score_answers(model, conversations, positions, progress).reshape(-1, 2)
    found = count_preferred(suspect.name, logprobs_P2, [pair.learned for pair in pairs])
    if not found.tested:
        raise RefusedError(
            f"it can read none of {len(pairs):,} pairs, or likes both answers of each equally",
            where=suspect.name,
            remedy="audit it through its own chat template, or with another capture",
        )
    return found


def _positions(suspect: Suspect) -> int:
    if suspect.endpoint is not None:
        return 0
    return max_positions(resolve_model_source(suspect.model, suspect.name)[0], suspect.name)


def score_answers(
    model: Teacher,
    conversations: Sequence[Conversation],
    positions: int = 0,
    progress: AuditProgress = lambda f, t: None,
) -> npt.NDArray[np.float64]:
    """Return the log-probability of each answer, its end included.

    Args:
        model: The model; its own chat template renders the conversations.
        conversations: Conversations that end with an answer.
        positions: Longest conversation in tokens; 0 = no limit known.
        progress: Called with (share done, text).

    Returns:
        Nats, float64 [N]; NaN where the template or the positions cannot hold a conversation.
    """
    readable = [k for k, c in enumerate(conversations) if _fits(model.renderer, c, positions)]
    logprob_N = np.full(len(conversations), np.nan)
    for begin in range(0, len(readable), SCORED_AT_ONCE):
        batch = readable[begin : begin + SCORED_AT_ONCE]
        scored = model.compute_target_logprobs([conversations[k] for k in batch])
        for k, (_, logprobs) in zip(batch, scored, strict=True):
            logprob_N[k] = float(logprobs.astype(np.float64).sum())
        done = begin + len(batch)
        progress(done / len(readable), f"{model.name}: {done:,} of {len(readable):,} texts")
    return logprob_N


def _fits(renderer: ChatRenderer, conversation: Conversation, positions: int) -> bool:
    try:
        tokens = renderer.render(conversation)
    except DataError:
        return False
    return not positions or len(tokens) <= positions


@dataclass(frozen=True)
class AuditModels:
    """The models of a comparison of teachers.

    Attributes:
        suspect: The model under audit.
        base: The model that it was made from, or another one of its family.
        teachers: Models that may have taught it.
        controls: Models that did not; none = the other teachers.
        untaught: Students of the base that none of the teachers taught, for calibration.
    """

    suspect: Suspect
    base: str
    teachers: tuple[str, ...]
    controls: tuple[str, ...] = ()
    untaught: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        writers = [name_of(m) for m in (*self.teachers, *self.controls)]
        if len(set(writers)) < len(writers):
            raise RecipeError(
                "two teachers or controls have the same name",
                where=", ".join(writers),
                remedy="name each model once; rename a folder",
            )
        if len(writers) < 2 or not self.teachers:
            raise RecipeError(
                "a teacher needs something to be compared with",
                where="persea audit",
                remedy="name a --teacher, and a second one or a --control",
            )


def audit_teachers(
    models: AuditModels,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 64,
    seed: int = 0,
    progress: AuditProgress = lambda f, t: None,
) -> TeacherComparison:
    """Test which teachers' texts a model prefers more than its base does.

    Each teacher and control draws an answer to every prompt. Suspect, base and untaught students
    score all of them, one model at a time.

    Args:
        models: The models.
        prompts: Prompts that the suspect was not trained on.
        max_new_tokens: Longest answer, in the writer's tokens.
        batch_size: Sequences in one forward pass.
        seed: Seed of the answers and of the random signs.
        progress: Called with (share done, text).

    Returns:
        The evidence for each teacher.

    Raises:
        DataError: A model cannot be read.
        RefusedError: The models complete too few of the prompts.
    """
    writers = (*models.teachers, *models.controls)
    readers = [models.suspect, *(Suspect(m) for m in (models.base, *models.untaught))]
    steps = len(writers) + len(readers)

    def report(step: int, share: float, text: str) -> None:
        progress((step + share) / steps, text)

    texts: dict[str, list[Conversation | None]] = {}
    for k, writer in enumerate(writers):
        report(k, 0.0, f"{name_of(writer)} answers {len(prompts):,} prompts")
        teacher = Suspect(writer).open(batch_size)
        texts[name_of(writer)] = draw_texts(teacher, prompts, max_new_tokens, seed)
    refuse_few_texts(texts)
    per_byte = []
    for k, reader in enumerate(readers, len(writers)):
        model, positions = reader.open(batch_size), _positions(reader)

        def step(share: float, text: str, k: int = k) -> None:
            report(k, share, text)

        per_byte.append(score_texts(model, texts, positions, step))
    suspect, base, *untaught = per_byte
    return compare_teachers(
        models.suspect.name,
        name_of(models.base),
        subtract(suspect, base),
        [name_of(m) for m in models.teachers],
        [name_of(m) for m in models.controls],
        [subtract(one, base) for one in untaught],
        seed,
    )


def draw_texts(
    teacher: Teacher, prompts: Sequence[Prompt], max_new_tokens: int, seed: int = 0
) -> list[Conversation | None]:
    """Draw one answer to each prompt at temperature 1; None where it is incomplete or empty."""
    drawn = drawing(teacher, 0)
    engine = drawn.engine
    sampling = replace(engine.sampling, seed=seed)  # type: ignore[attr-defined]
    drawn = replace(drawn, engine=replace(engine, sampling=sampling))  # type: ignore[type-var]
    return [
        answer.conversation if answer.finish is FinishReason.STOP and answer.text else None
        for answer in drawn.answer(prompts, max_new_tokens)
    ]


def refuse_few_texts(texts: Mapping[str, Sequence[Conversation | None]]) -> None:
    """Raise if a model completed too few prompts to be compared.

    Raises:
        RefusedError: The message names the model.
    """
    for name, some in texts.items():
        complete = sum(text is not None for text in some)
        if complete < MIN_PAIRED_PROMPTS:
            raise RefusedError(
                f"it completed {complete:,} of {len(some):,} prompts; the test needs "
                f"{MIN_PAIRED_PROMPTS}",
                where=name,
                remedy="more prompts, or a larger --max-new-tokens",
            )


def score_texts(
    model: Teacher,
    texts: Mapping[str, Sequence[Conversation | None]],
    positions: int = 0,
    progress: AuditProgress = lambda f, t: None,
) -> dict[str, npt.NDArray[np.float64]]:
    """Return writer -> log-probability of each of its texts in nats per byte, float64 [N]."""
    flat = [(name, k, c) for name, some in texts.items() for k, c in enumerate(some) if c]
    logprobs = score_answers(model, [c for _, _, c in flat], positions, progress)
    found = {name: np.full(len(some), np.nan) for name, some in texts.items()}
    for (name, k, conversation), logprob in zip(flat, logprobs, strict=True):
        num_bytes = sum(len(part.text.encode()) for part in conversation.messages[-1].parts)
        found[name][k] = logprob / max(1, num_bytes)
    return found


def subtract(
    scores: Mapping[str, npt.NDArray[np.float64]], base: Mapping[str, npt.NDArray[np.float64]]
) -> dict[str, npt.NDArray[np.float64]]:
    """Return writer -> gain of a model over its base on each text, in nats per byte."""
    return {name: scores[name] - base[name] for name in scores}


def audit_prompts(
    skills: Sequence[str], items: int, file: Path | None = None, seed: int = 0
) -> list[Prompt]:
    """Return the prompts of a comparison: test questions of the generated tasks, or a file's.

    Args:
        skills: Generated tasks; none = all.
        items: Questions of each task, or prompts of the file, at most.
        file: A file of prompts instead.
        seed: Seed of the questions.

    Raises:
        DataError: The file cannot be read.
        RecipeError: There is no such task.
    """
    if file is not None:
        return [p for p in read_prompts(file, "audit", "") if not p.conversation.is_document][
            :items
        ]
    tasks = [find_generated_task(s) for s in skills] if skills else GENERATED_TASKS
    return [i.prompt for task in tasks for i in task.items(Split.TEST, items, seed)]
