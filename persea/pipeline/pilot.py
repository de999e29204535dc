"""Pilot: short trainings that tell which teacher, or which loss, the student learns most from.

Each candidate trains the same student on the same prompts, in the same order, for a small share of
the recipe's steps, through the pipeline's own stages `capture` and `train` in a folder of its own.
What counts is the fall of the student's bits per byte on a part of the corpus that no candidate
trains on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from math import ceil, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from persea import storage
from persea.chat.messages import Conversation, Text
from persea.config.recipe import Recipe
from persea.data.prompts import Corpus, Prompt
from persea.errors import RecipeError, RefusedError
from persea.evaluation.answering import single_model_loader
from persea.evaluation.text_bits import measure_text_bits
from persea.pipeline.model_refs import BASE, STUDENT
from persea.pipeline.run_context import RunContext
from persea.pipeline.stages import run_pipeline
from persea.tasks.cluster_intervals import student_t_quantile
from persea.tasks.intervals import CONFIDENCE_LEVEL

if TYPE_CHECKING:
    from persea.teachers.teacher import Teacher
    from persea.vocab_extension.resize_model import ProgressCallback

PILOT_FOLDER, PILOT_FILE = "pilot", "pilot.json"
DEFAULT_SHARE, MIN_STEPS = 0.03, 10
HELD_OUT_SHARE, MAX_HELD_OUT, MIN_HELD_OUT = 0.1, 200, 4
METHODS = ("events", "sft")


@dataclass(frozen=True)
class Candidate:
    """One teacher and one objective to try.

    Attributes:
        teacher: Name of the teacher; it teaches every skill.
        method: The recipe's `training.objective`; "" = the recipe's own losses.
    """

    teacher: str
    method: str = ""

    @property
    def name(self) -> str:
        """Name of the candidate in tables, and of its folder."""
        return f"{self.teacher}-{self.method}" if self.method else self.teacher


@dataclass(frozen=True)
class CandidateResult:
    """What the student learned from a candidate.

    Attributes:
        name: The candidate.
        teacher: Its teacher.
        method: Its objective; "" = the recipe's own losses.
        gain: Bits per byte of the untrained student minus those of the trained one.
        low: Lower end of the 95 % interval over held-out texts.
        high: Upper end.
        bits_per_byte: Of the trained student.
        behind_low: Lower end of the interval of the best candidate's gain minus this one's; None
            for the best. Above 0 = the best is better with confidence.
        behind_high: Upper end.
        tokens: Positions that the student was trained on.
        seconds: Seconds of the training.
    """

    name: str
    teacher: str
    method: str
    gain: float
    low: float
    high: float
    bits_per_byte: float
    behind_low: float | None
    behind_high: float | None
    tokens: int
    seconds: float


@dataclass(frozen=True)
class PilotResult:
    """The result of a pilot.

    Attributes:
        candidates: Results, the largest gain first.
        base_bits_per_byte: Of the untrained student.
        steps: Steps of each training.
        of_steps: Steps of the recipe's training.
        num_held_out: Held-out texts.
        num_bytes: Their bytes.
    """

    candidates: tuple[CandidateResult, ...]
    base_bits_per_byte: float
    steps: int
    of_steps: int
    num_held_out: int
    num_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON; keys are the field names."""
        return asdict(self)

    def table_rows(self) -> list[tuple[str, str, str, str, str]]:
        """Return (candidate, bits per byte, gain, best minus this, tokens) of each candidate."""
        rows = []
        for c in self.candidates:
            behind = "-"
            if c.behind_low is not None and c.behind_high is not None:
                best = self.candidates[0].gain - c.gain
                behind = f"{best:.3f} ({c.behind_low:+.3f}, {c.behind_high:+.3f})"
            gain = f"{c.gain:+.3f} ({c.low:+.3f}, {c.high:+.3f})"
            rows.append((c.name, f"{c.bits_per_byte:.3f}", gain, behind, f"{c.tokens:,}"))
        return rows

    @property
    def sentence(self) -> str:
        """What the pilot says, in one sentence."""
        best = self.candidates[0]
        if best.low <= 0:
            return (
                f"no candidate improved the student with confidence after {self.steps} of "
                f"{self.of_steps} steps"
            )
        equal = [c.name for c in self.candidates[1:] if (c.behind_low or 0.0) <= 0]
        also = f"; not told apart from it: {', '.join(equal)}" if equal else ""
        return f"the student learned most from {best.name}{also}"


TABLE_COLUMNS = ("candidate", "bits/byte", "gain", "best minus it", "tokens")


@dataclass(eq=False)
class PilotContext(RunContext):
    """The run of one candidate: the corpus without the held-out part, cut to what is trained on.

    Attributes:
        num_prompts: Prompts that the steps need.
    """

    num_prompts: int = field(default=0, kw_only=True)

    @cached_property
    def corpus(self) -> Corpus:
        """Prompts that are not held out: a part of each skill in proportion to its size."""
        whole = RunContext(self.recipe, self.folder, task_files=self.task_files).corpus
        kept = sorted((p for p in whole.prompts if not is_held_out(p)), key=_position)
        chosen = frozenset(p.id for p in kept[: self.num_prompts])
        prompts = tuple(p for p in whole.prompts if p.id in chosen)
        return replace(whole, prompts=prompts, removed=(), malformed=())


def _position(prompt: Prompt) -> float:
    """Return a place in [0, 1) that the content of a prompt decides."""
    content = (
        "\0".join(part.text for part in prompt.conversation.parts()) + "\0" + prompt.given_text
    )
    digest = hashlib.sha256(content.encode(errors="replace")).digest()
    return int.from_bytes(digest[:6], "big") / (1 << 48)


def is_held_out(prompt: Prompt) -> bool:
    """Return whether a pilot measures on a prompt instead of training on it.

    A digest of the prompt's content decides, so a prompt that is added or moved changes no other.
    """
    return _position(prompt) < HELD_OUT_SHARE


def held_out_conversations(prompts: Sequence[Prompt]) -> list[Conversation]:
    """Return the held-out texts and answers, at most MAX_HELD_OUT.

    Raises:
        RefusedError: There are too few.
    """
    found = [
        p.conversation if p.conversation.is_document else p.conversation.with_answer(Text(p.answer))
        for p in sorted(filter(is_held_out, prompts), key=_position)
        if p.conversation.is_document or p.answer
    ]
    if len(found) < MIN_HELD_OUT:
        raise RefusedError(
            f"only {len(found)} prompts with a text or a reference answer can be held out of "
            f"{len(prompts):,}",
            where="pilot",
            remedy="a larger corpus, or answers in its prompt files",
        )
    return found[:MAX_HELD_OUT]


def pilot_steps(recipe: Recipe, share: float) -> int:
    """Return the steps of one pilot training."""
    return min(recipe.training.steps, max(MIN_STEPS, round(share * recipe.training.steps)))


def pilot_recipe(recipe: Recipe, candidate: Candidate, share: float) -> Recipe:
    """Return the recipe of one candidate: fewer steps, one teacher, no validation."""
    training, steps = recipe.training, pilot_steps(recipe, share)
    changes: dict[str, Any] = {
        "steps": steps,
        "warmup_steps": min(training.warmup_steps, ceil(steps / 10)),
        "checkpoint_every": max(1, ceil(steps / 2)),
        "log_every": max(1, steps // 20),
        "eval_steps": 0,
        "validation_share": None,
        "report_to": None,
        "on_policy": None,
    }
    if candidate.method:
        changes |= {"objective": candidate.method, "loss": ()}
    pinned = dict.fromkeys(recipe.skills, candidate.teacher)
    return recipe.model_copy(
        update={
            "training": training.model_copy(update=changes),
            "audition": recipe.audition.model_copy(update={"pinned": pinned}),
        }
    )


def run_pilot(
    context: RunContext,
    progress: ProgressCallback,
    share: float = DEFAULT_SHARE,
    methods: Sequence[str] = (),
) -> PilotResult:
    """Try each teacher, or each teacher with each method, and rank them by what is learned.

    An interrupted pilot continues: finished captures, checkpoints and trainings are kept.

    Args:
        context: The recipe and its run folder; the pilot writes into its folder `pilot`.
        progress: Called with "pilot", the fraction done and a message.
        share: Share of the recipe's steps.
        methods: Objectives to try with each teacher; none = the recipe's own losses.

    Returns:
        The ranking; pilot.json holds it too.

    Raises:
        RecipeError: A method is unknown, or there is one candidate only.
        RefusedError: The corpus has too few texts or reference answers to measure on.
    """
    candidates = [
        Candidate(teacher, method)
        for teacher in context.models.teacher_names
        for method in (methods or ("",))
    ]
    _refuse_no_choice(candidates, methods)
    folder = context.folder / PILOT_FOLDER
    texts = held_out_conversations(context.corpus.prompts)
    num_bytes_N = np.array([_num_bytes(c) for c in texts], np.float64)
    bits: dict[str, npt.NDArray[np.float64]] = {}
    runs: dict[str, RunContext] = {}
    parts = len(candidates) + 1  # and the untrained student
    for k, candidate in enumerate(candidates):
        report = partial(_report_candidate, progress, k, parts, candidate.name)
        run = runs[candidate.name] = _train_candidate(context, candidate, share, report)
        bits[candidate.name] = _measure(run, STUDENT, texts)
    progress("pilot", len(candidates) / parts, "measuring the untrained student")
    base_N = _measure(runs[candidates[0].name], BASE, texts)
    result = _rank(candidates, runs, bits, base_N, num_bytes_N, context.training.steps)
    storage.write_json(folder / PILOT_FILE, result.to_json())
    progress("pilot", 1.0, result.sentence)
    return result


def _refuse_no_choice(candidates: Sequence[Candidate], methods: Sequence[str]) -> None:
    if unknown := [m for m in methods if m not in METHODS]:
        raise RecipeError(
            f"no method {unknown[0]!r}", where="--method", remedy=f"one of {', '.join(METHODS)}"
        )
    if len(candidates) < 2:
        raise RecipeError(
            "one teacher and one method leave nothing to compare",
            where="pilot",
            remedy="add a teacher, or give --method events --method sft",
        )


def _report_candidate(
    progress: ProgressCallback,
    k: int,
    parts: int,
    name: str,
    stage: str,
    fraction: float,
    message: str,
) -> None:
    """Report a stage of a candidate as a part of the pilot: capture and training half each."""
    share = fraction / 2 if stage == "capture" else 0.5 + fraction / 2
    progress("pilot", (k + share) / parts, f"{name}: {stage} {message}")


def _train_candidate(
    context: RunContext, candidate: Candidate, share: float, report: ProgressCallback
) -> RunContext:
    """Capture and train one candidate, in a folder of its own."""
    recipe = pilot_recipe(context.resolved_recipe, candidate, share)
    folder = context.folder / PILOT_FOLDER / candidate.name
    num_prompts = recipe.training.steps * recipe.training.batch_size
    run = PilotContext(recipe, folder, task_files=context.task_files, num_prompts=num_prompts)
    run_pipeline(run, report, "capture")
    run_pipeline(run, report, "train", check_before_train=False)  # nobody keeps this student
    return run


def _num_bytes(conversation: Conversation) -> int:
    return sum(len(part.text.encode()) for part in conversation.messages[-1].parts)


def _measure(run: RunContext, name: str, texts: Sequence[Conversation]) -> npt.NDArray[np.float64]:
    """Return the bits that a model needs for each text [N], without the end of the text."""
    batch = run.recipe.evaluation.batch_size

    def load(model: str) -> Teacher:
        return run.models.load_participant(model, batch)

    model = run.models.evaluated_model(name, batch, (), single_model_loader(load))
    return np.array([content for content, _ in measure_text_bits(model, texts)])


def gain_interval(
    gains_N: npt.NDArray[np.float64], num_bytes_N: npt.NDArray[np.float64]
) -> tuple[float, float, float]:
    """Return bits gained per byte, a ratio of sums over texts, with its 95 % interval."""
    n, total = len(gains_N), float(num_bytes_N.sum())
    gain = float(gains_N.sum()) / total
    residual_N = gains_N - gain * num_bytes_N
    margin = (
        student_t_quantile(CONFIDENCE_LEVEL, n - 1)
        * sqrt(n * float(residual_N.var(ddof=1)))
        / total
    )
    return gain, gain - margin, gain + margin


def _rank(
    candidates: Sequence[Candidate],
    runs: dict[str, RunContext],
    bits: dict[str, npt.NDArray[np.float64]],
    base_N: npt.NDArray[np.float64],
    num_bytes_N: npt.NDArray[np.float64],
    of_steps: int,
) -> PilotResult:
    """Order the candidates by their gain, with the interval of each and of its distance."""
    order = sorted(candidates, key=lambda c: float(bits[c.name].sum()))
    best, total = order[0], float(num_bytes_N.sum())
    results = []
    for candidate in order:
        name = candidate.name
        gain, low, high = gain_interval(base_N - bits[name], num_bytes_N)
        behind: Callable[[int], float | None] = lambda k: None  # noqa: E731
        if candidate is not best:
            interval = gain_interval(bits[name] - bits[best.name], num_bytes_N)
            behind = interval.__getitem__
        last = _last_line(runs[name].folder)
        results.append(
            CandidateResult(
                name,
                candidate.teacher,
                candidate.method,
                gain,
                low,
                high,
                float(bits[name].sum()) / total,
                behind(1),
                behind(2),
                int(last["positions"]),
                float(last["seconds"]),
            )
        )
    steps = runs[best.name].recipe.training.steps
    base = float(base_N.sum()) / total
    return PilotResult(tuple(results), base, steps, of_steps, len(base_N), int(total))


def _last_line(folder: Path) -> dict[str, Any]:
    """Return the last line of a training's metrics."""
    import json

    lines = (folder / "train" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    line: dict[str, Any] = json.loads(lines[-1])
    return line
