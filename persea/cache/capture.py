"""Ask the cast, keep what it said; resumes where it stopped."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from persea.cache import unit as cache
from persea.cache.maintenance import committed_units
from persea.cache.reader import CacheReader, open_cache_reader
from persea.chat.messages import FinishReason, Text, ThinkingEffort
from persea.data.formats import MAX_LINE_BYTES
from persea.data.prompts import Corpus, MalformedLine, Prompt
from persea.distributions import (
    DistributionKind,
    SparseDistributions,
    concat_distributions,
    sample_distributions,
    topk_within_kl,
)
from persea.errors import DataError, RefusedError
from persea.evaluation.audition import Cast
from persea.teachers.engines import EngineFailure
from persea.teachers.teacher import Answer, Teacher
from persea.tokenization.tokens import RenderedTokens

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class CaptureUnit:
    """Some prompts for one teacher of some identity; `name` is the digest of all that determines the unit's bytes."""

    name: str
    teacher: str
    prompts: tuple[Prompt, ...]
    identity: str = ""


MAX_UNIT_TOKENS = (
    1 << 20
)  # the most tokens of a unit; a text has at most as many tokens as bytes, but for a template's few


def plan_units(
    prompts: Sequence[Prompt],
    cast: Cast,
    teacher_identities: Mapping[str, str],
    prompts_per_unit: int,
    settings: Mapping[str, Any],
    max_new_tokens: int | None = None,
) -> tuple[CaptureUnit, ...]:
    """Every prompt to the teacher the cast names, in units of `size` prompts, fewer where they could pass 2^20 tokens, in corpus order.

    A unit is closed before anything is asked, so what answers may come to counts: max_new_tokens each; None = the given ones' bytes.

    teachers  name -> identity: digest of weights, voice and effort
    settings  what else determines a unit's bytes: tau, seed, limits
    """
    asked: dict[str, list[Prompt]] = {name: [] for name in teacher_identities}
    for prompt, name in assign_prompts(prompts, cast):
        asked[name].append(prompt)
    units = []
    for name, mine in asked.items():
        for some in _split_into_units(mine, prompts_per_unit, max_new_tokens):
            asked_of = [
                [
                    p.id,
                    p.skill,
                    p.language,
                    p.conversation.to_json(),
                    p.answer,
                    *([p.effort.value] if p.effort else []),
                ]
                for p in some
            ]
            key = cache.unit_id(asked_of, name, teacher_identities[name], settings)
            units.append(CaptureUnit(key, name, some, teacher_identities[name]))
    return tuple(units)


def assign_prompts(prompts: Sequence[Prompt], cast: Cast) -> Iterator[tuple[Prompt, str]]:
    """Each prompt and the teacher that the cast gives it, in corpus order."""
    counts: Counter[str] = Counter()
    for prompt in prompts:
        part = cast.part_of(prompt.skill, prompt.language)
        yield prompt, cast.teacher_of(part, counts[part])
        counts[part] += 1


def _split_into_units(
    prompts: Sequence[Prompt], prompts_per_unit: int, max_new_tokens: int | None
) -> Iterator[tuple[Prompt, ...]]:
    some: list[Prompt] = []
    tokens = 0
    for prompt in prompts:
        answer = (
            len(prompt.answer.encode(errors="replace"))
            if max_new_tokens is None
            else max_new_tokens
        )
        more = answer + sum(
            len(part.text.encode(errors="replace")) for part in prompt.conversation.parts()
        )
        if some and (len(some) == prompts_per_unit or tokens + more > MAX_UNIT_TOKENS):
            yield tuple(some)
            some, tokens = [], 0
        some.append(prompt)
        tokens += more
    if some:
        yield tuple(some)


@dataclass(frozen=True)
class DistributionSparsifier:
    """What is kept of each distribution: by tau a sample, by kl the likeliest tokens and a rest; one of the two."""

    seed: int
    tau: float | None = None
    max_kl: float | None = None

    @property
    def kind(self) -> DistributionKind:
        return DistributionKind.SAMPLED if self.max_kl is None else DistributionKind.TOPK

    def sparsify(
        self,
        unit: CaptureUnit,
        answer: Answer,
        tokens: RenderedTokens,
        logprobs_NW: torch.Tensor,
        token_counts_W: npt.NDArray[np.int64],
        row_offset: int = 0,
    ) -> SparseDistributions:
        """The answer's rows from its `first` on, of as many as there are log-probabilities.

        seen_W: how often each token stands in the unit's answers. One more of each, and it says how a rest is spread.
        """
        realised_N = tokens.ids_T[tokens.loss_mask_T][row_offset : row_offset + len(logprobs_NW)]
        if self.max_kl is not None:
            return topk_within_kl(
                logprobs_NW,
                realised_N,
                self.max_kl,
                (token_counts_W + 1) / (token_counts_W + 1).sum(),
                f"prompt {answer.prompt_id}",
            )
        if self.tau is None:
            raise AssertionError("rows are kept by tau or by kl")
        return sample_distributions(
            logprobs_NW,
            realised_N,
            self.tau,
            f"{self.seed} {unit.teacher} {answer.prompt_id}",
            row_offset,
        )


@dataclass(frozen=True)
class UnitProgress:
    """A unit is done: `prompts` in it and `tokens` kept; asked = it was not there before."""

    num_prompts: int
    num_tokens: int
    is_new: bool


CONTENT_FILTER_REASON = "the server refused to answer: its content filter"  # what its own template cannot say is not asked


def capture_teacher(
    units: Sequence[CaptureUnit],
    teacher: Teacher,
    folder: Path,
    *,
    max_new_tokens: int,
    seed: int,
    tau: float | None = None,
    max_kl: float | None = None,
    use_given_answers: bool = False,
    refuse_if_changed: Callable[[], None] = lambda: None,
    on_unit: Callable[[UnitProgress], None] = lambda step: None,
) -> None:
    """Ask one teacher every unit of its own that is not committed yet; no prompt is asked twice.

    tau, kl    one of them: rows sampled below tau, or the likeliest up to a KL of kl and a rest
    given      score the answers that came with the prompts instead of asking for new ones
    unchanged  raises where the teacher is no longer what the units' names say; called before each commit
    progress   called after each unit
    Raises DataError for a prompt without answer where they are to be given, Refused where units of the same name's other weights,
    tokenizer or template stand in the folder.
    """
    mine = [u for u in units if u.teacher == teacher.name]
    _refuse_changed_identity(mine, folder)
    for unit in mine:
        asked = not cache.is_committed(folder, unit.name)
        if asked:
            sayable, quarantine = _split_renderable(unit.prompts, teacher)
            answers = (
                [_given_answer(p, teacher) for p in sayable]
                if use_given_answers
                else teacher.answer(sayable, max_new_tokens)
            )
            quarantine += [
                (a.prompt_id, a.failure_reason or CONTENT_FILTER_REASON)
                for a in answers
                if a.finish is FinishReason.REFUSED
            ]
            answers = [a for a in answers if a.finish is not FinishReason.REFUSED]
            _write_answers(
                unit,
                answers,
                quarantine,
                teacher,
                folder,
                DistributionSparsifier(seed, tau, max_kl),
                refuse_if_changed,
            )
        on_unit(
            UnitProgress(len(unit.prompts), cache.read_record(folder, unit.name)["tokens"], asked)
        )


def _refuse_changed_identity(units: Sequence[CaptureUnit], folder: Path) -> None:
    identities = {u.teacher: u.identity for u in units}
    for name in committed_units(folder):
        about = cache.read_record(folder, name)["about"]
        if about.get("identity", "") != identities.get(
            about.get("teacher", ""), about.get("identity", "")
        ):
            raise RefusedError(
                f"units of another {about['teacher']} stand here: its weights, tokenizer, template or effort changed",
                where=str(folder),
                remedy=f"give this run another --out, or delete {folder}",
            )


def _split_renderable(
    prompts: Sequence[Prompt], teacher: Teacher
) -> tuple[list[Prompt], list[tuple[str, str]]]:
    """Prompts that the teacher's template and tokenizer can say and its positions hold; the others with the reason.

    One odd document does not end a capture.
    """
    sayable: list[Prompt] = []
    quarantine: list[tuple[str, str]] = []
    for prompt in prompts:
        try:
            size = sum(len(part.text.encode()) for part in prompt.conversation.parts())
            if size > MAX_LINE_BYTES:
                raise DataError(f"{size:,} bytes, at most {MAX_LINE_BYTES:,}")
            length = len(teacher.renderer.render_prompt(teacher.build_conversation(prompt)))
            if 0 < teacher.max_context_tokens <= length:
                raise DataError(
                    f"{length:,} tokens, and {teacher.name} has positions for {teacher.max_context_tokens:,}, answer included"
                )
        except (DataError, UnicodeError) as error:
            quarantine.append((prompt.id, str(error)[:300]))
        else:
            sayable.append(prompt)
    return sayable, quarantine


def _given_answer(prompt: Prompt, teacher: Teacher) -> Answer:
    if not prompt.answer:
        raise DataError(
            f"prompt {prompt.id} has no answer of its own",
            where="capture.answers: given",
            remedy='add an assistant turn or an "answer" to it, or let the teachers answer: capture.answers: ask',
        )
    conversation = teacher.build_conversation(prompt).with_answer(Text(prompt.answer))
    return Answer(
        prompt.id,
        teacher.name,
        prompt.skill,
        prompt.language,
        conversation,
        FinishReason.STOP,
        prompt.effort,
    )


def _write_answers(
    unit: CaptureUnit,
    answers: Sequence[Answer],
    quarantine: Sequence[tuple[str, str]],
    teacher: Teacher,
    folder: Path,
    sparsifier: DistributionSparsifier,
    refuse_if_changed: Callable[[], None],
) -> None:
    """Score the whole answers, and publish and commit the unit."""
    rendered = [(a, _render_complete(a, teacher)) for a in answers]
    rendered = [
        (replace(a, finish=FinishReason.LENGTH), None)
        if t is not None and 0 < teacher.max_context_tokens < len(t)
        else (a, t)
        for a, t in rendered
    ]
    whole = [(a, tokens) for a, tokens in rendered if tokens is not None]
    rows = [
        (a, t, r)
        for (a, t), r in zip(
            whole, _answer_distributions(unit, whole, teacher, sparsifier), strict=True
        )
    ]
    captures = [
        cache.CachedAnswer(answer, tokens, said)
        for answer, tokens, said in rows
        if isinstance(said, SparseDistributions)
    ]
    quarantine = [
        *quarantine,
        *(
            (answer.prompt_id, said.reason)
            for answer, _, said in rows
            if isinstance(said, EngineFailure)
        ),
    ]
    dropped = Counter[str](_drop_reason(a) for a, tokens in rendered if tokens is None)
    if quarantine:
        dropped[FinishReason.REFUSED.value] += len(quarantine)
    refuse_if_changed()
    about = {"teacher": unit.teacher, "identity": unit.identity}
    if not teacher.engine.capabilities.has_full_distributions:
        able = teacher.engine.capabilities
        cache.write_unit(
            folder,
            unit.name,
            captures,
            dropped,
            tau=0.0,
            kind=able.kind,
            unit_metadata=about
            | ({"top": str(able.num_top_logprobs)} if able.num_top_logprobs else {}),
            quarantine=quarantine,
        )
        return
    cache.write_unit(
        folder,
        unit.name,
        captures,
        dropped,
        tau=sparsifier.tau or 0.0,
        kind=sparsifier.kind,
        unit_metadata=about | ({"kl": f"{sparsifier.max_kl:g}"} if sparsifier.max_kl else {}),
        quarantine=quarantine,
    )


def _answer_distributions(
    unit: CaptureUnit,
    complete_answers: Sequence[tuple[Answer, RenderedTokens]],
    teacher: Teacher,
    sparsifier: DistributionSparsifier,
) -> Iterator[SparseDistributions | EngineFailure]:
    """Rows of each answer: as the engine names them, or what is kept of its whole distributions."""
    ids, learn = (
        [t.ids_T for _, t in complete_answers],
        [t.loss_mask_T for _, t in complete_answers],
    )
    if not teacher.engine.capabilities.has_full_distributions:
        yield from teacher.engine.compute_sparse_distributions(ids, learn)
        return
    seen_W = np.zeros(len(teacher.renderer.vocabulary), np.int64)
    for one in ids:
        seen_W += np.bincount(one, minlength=len(seen_W))
    parts: list[list[SparseDistributions]] = [[] for _ in complete_answers]
    for k, logprobs_NW in teacher.engine.iter_logprobs(ids, learn):
        parts[k].append(
            sparsifier.sparsify(
                unit, *complete_answers[k], logprobs_NW, seen_W, sum(map(len, parts[k]))
            )
        )
    yield from map(concat_distributions, parts)


MISSING_THINKING = "thoughtless"  # beside the ways to finish: asked to think, and answered at once. A student would learn that the switch means nothing


def _is_missing_thinking(answer: Answer) -> bool:
    return (
        answer.effort not in (None, ThinkingEffort.NONE)
        and not answer.conversation.messages[-1].thinking
    )


def _drop_reason(answer: Answer) -> str:
    """Why an answer is not kept."""
    if answer.finish is not FinishReason.STOP:
        return answer.finish.value
    return MISSING_THINKING if _is_missing_thinking(answer) else FinishReason.MALFORMED.value


def _render_complete(answer: Answer, teacher: Teacher) -> RenderedTokens | None:
    """A whole answer in the teacher's voice; None for one that did not stop, that has no thought where its mode asks for one, or that its
    own template refuses (gpt-oss' does where a text speaks of channels): such an answer is malformed, and counted as that.
    """
    if answer.finish is not FinishReason.STOP or _is_missing_thinking(answer):
        return None
    try:
        return teacher.renderer.render(answer.conversation)
    except DataError:
        return None


def open_teacher_caches(
    units: Sequence[CaptureUnit], folder: Path
) -> tuple[tuple[CacheReader, int], ...]:
    """Each teacher's captures, and its share: how many prompts the cast gave it. A teacher that was asked nothing has none."""
    return tuple(
        (
            open_cache_reader(folder, [u.name for u in units if u.teacher == name]),
            sum(len(u.prompts) for u in units if u.teacher == name),
        )
        for name in dict.fromkeys(u.teacher for u in units)
    )


def capture_summary(units: Sequence[CaptureUnit], folder: Path) -> dict[str, Any]:
    """What was asked, kept and left out; prompts = kept + left out, always. Raises Refused where nothing was kept."""
    total: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    teachers: dict[str, Counter[str]] = {}
    for unit in units:
        record = cache.read_record(folder, unit.name)
        counts = {
            "prompts": len(unit.prompts),
            "kept": record["answers"],
            **{k: record[k] for k in ("tokens", "positions", "entries", "bytes")},
        }
        total.update(counts)
        left_out.update(record["dropped"])
        teachers.setdefault(unit.teacher, Counter()).update(counts)
    if not total["kept"]:
        raise RefusedError(
            f"no answer of {total['prompts']} is whole ({dict(left_out)})",
            where="capture",
            remedy="raise capture.max_new_tokens, or look at the answers: the teachers may not know their templates",
        )
    return {
        **total,
        "left_out": dict(left_out),
        "teachers": {k: dict(v) for k, v in teachers.items()},
    }


MAX_QUARANTINE_IN_SUMMARY = (
    100  # of what was quarantined in the summary; the file beside it holds all
)


def quarantine_records(
    units: Sequence[CaptureUnit], folder: Path, malformed: Sequence[MalformedLine]
) -> list[dict[str, Any]]:
    """Every line and prompt that was not asked, with the place and the reason."""
    return [asdict(b) for b in malformed] + [
        {"where": f"prompt {prompt}, {unit.teacher}, unit {unit.name}", "why": why}
        for unit in units
        for prompt, why in cache.read_record(folder, unit.name)["quarantine"]
    ]


def account_for_prompts(
    totals: dict[str, Any], corpus: Corpus, quarantine: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """What came in = what was kept, skipped and quarantined, counted where each was decided; AssertionError if not."""
    skipped = (
        len(corpus.removed)
        + sum(totals["left_out"].values())
        - totals["left_out"].get(FinishReason.REFUSED.value, 0)
    )
    found = {
        "in": corpus.num_inputs,
        "kept": totals["kept"],
        "skipped": skipped,
        "quarantined": len(quarantine),
    }
    if found["in"] != totals["kept"] + skipped + len(quarantine):
        raise AssertionError(f"prompts were lost: {found}")
    return found | {
        "quarantine": [
            {"where": q["where"], "why": q["why"]} for q in quarantine[:MAX_QUARANTINE_IN_SUMMARY]
        ]
    }


@dataclass
class CaptureBudget:
    """How quickly a capture goes, and when it has cost enough.

    prompts        of the whole capture
    tokens, hours  the most it may cost: tokens kept in all, hours of this run; 0 = no limit
    """

    num_prompts: int
    max_tokens: int = 0
    max_hours: float = 0
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        (
            self._start_s,
            self._prompts_done,
            self._new_prompts,
            self._tokens_cached,
            self._new_tokens,
        ) = self.clock(), 0, 0, 0, 0

    def record_unit(self, unit: UnitProgress) -> tuple[float, str]:
        """Share done, and a few words: prompts, tokens a second, time left. Raises Refused where a limit is reached and prompts are left."""
        self._prompts_done += unit.num_prompts
        self._tokens_cached += unit.num_tokens
        self._new_prompts += unit.num_prompts if unit.is_new else 0
        self._new_tokens += unit.num_tokens if unit.is_new else 0
        seconds = self.clock() - self._start_s
        for limit, spent, key, words in (
            (
                self.max_tokens,
                self._tokens_cached,
                "capture.max_total_tokens",
                f"{self._tokens_cached:,} tokens",
            ),
            (self.max_hours, seconds / 3600, "capture.max_hours", f"{seconds / 3600:.2f} hours"),
        ):
            if limit and spent >= limit and self._prompts_done < self.num_prompts:
                raise RefusedError(
                    f"the budget is spent: {words} for {self._prompts_done:,} of {self.num_prompts:,} prompts",
                    where=key,
                    remedy=f"raise {key} and run again: what is committed stays",
                )
        words = f"{self._prompts_done}/{self.num_prompts} prompts"
        if self._new_prompts and seconds > 0:
            left = (self.num_prompts - self._prompts_done) * seconds / self._new_prompts
            words += f", {self._new_tokens / seconds:,.0f} tokens/s" + (
                f", {_format_seconds_left(left)} left" if left else ""
            )
        return self._prompts_done / self.num_prompts, words


def _format_seconds_left(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return (
        f"{seconds:.0f} s"
        if minutes < 2
        else f"{minutes:.0f} min"
        if hours < 2
        else f"{hours:.1f} h"
    )
