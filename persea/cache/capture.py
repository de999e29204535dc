"""Let the cast teachers answer the prompts, and store answers and token distributions.

A capture is split into units. Each is committed when it is complete, so an interrupted capture
continues with the first unit that is missing, and no prompt is asked twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from persea.cache.accounting import UnitProgress
from persea.cache.canaries import Canaries, write_pairs
from persea.cache.generated_distributions import answer_distributions, reducer_of_prompts
from persea.cache.given_answers import answer_or_score, count_prompt_tokens
from persea.cache.maintenance import committed_units
from persea.cache.reader import SHUFFLE_WINDOW_BLOCKS, CacheReader, open_cache_reader
from persea.cache.sparsifier import DistributionSparsifier
from persea.cache.token_meter import TokenMeter, server_tokens
from persea.cache.unit import CachedAnswer, is_committed, read_record, unit_id, write_unit
from persea.chat.messages import FinishReason, ThinkingEffort
from persea.data.formats import MAX_LINE_BYTES
from persea.data.prompts import Prompt, parts_to_json
from persea.distributions import (
    SparseDistributions,
)
from persea.errors import DataError, RefusedError
from persea.evaluation.audition import Cast
from persea.teachers.engines import Engine
from persea.teachers.teacher import Answer, Teacher
from persea.tokenization.tokens import RenderedTokens


@dataclass(frozen=True)
class CaptureUnit:
    """Some prompts for one teacher.

    Attributes:
        name: Digest of everything that determines the unit's bytes.
        teacher: Name of the teacher.
        prompts: The prompts, in corpus order.
        identity: Digest of the teacher's weights, renderer and effort.
    """

    name: str
    teacher: str
    prompts: tuple[Prompt, ...]
    identity: str = ""


# Most tokens of a unit. Decides the split into units, and so their names. Counted in bytes: a text
# has at most as many tokens as bytes, besides the few of the template.
MAX_UNIT_TOKENS = 1 << 20


def plan_units(
    prompts: Sequence[Prompt],
    cast: Cast,
    teacher_identities: Mapping[str, str],
    prompts_per_unit: int,
    settings: Mapping[str, Any],
    max_new_tokens: int | None = None,
) -> tuple[CaptureUnit, ...]:
    """Assign every prompt to the teacher that the cast names, and split each teacher's into units.

    A unit is closed before its tokens could exceed 2^20. The length of an answer that is not there
    yet counts as max_new_tokens.

    Args:
        prompts: The corpus.
        cast: Which teacher answers which prompts.
        teacher_identities: Teacher name -> digest of weights, renderer and effort.
        prompts_per_unit: Prompts of a unit, at most.
        settings: The other settings that determine a unit's bytes: tau, seed, limits.
        max_new_tokens: Longest answer in tokens; None = the prompts bring their answers.

    Returns:
        The units, by teacher, each in corpus order.
    """
    prompts_by_teacher: dict[str, list[Prompt]] = {name: [] for name in teacher_identities}
    for prompt, name in assign_prompts(prompts, cast):
        prompts_by_teacher[name].append(prompt)
    units = []
    for name, assigned in prompts_by_teacher.items():
        for unit_prompts in _split_into_units(assigned, prompts_per_unit, max_new_tokens):
            contents = [
                [
                    p.id,
                    p.skill,
                    p.language,
                    p.conversation.to_json(),
                    p.answer,
                    *([p.effort.value] if p.effort else []),
                    *([parts_to_json(p.answer_parts)] if p.answer_parts else []),
                ]
                for p in unit_prompts
            ]
            key = unit_id(contents, name, teacher_identities[name], settings)
            units.append(CaptureUnit(key, name, unit_prompts, teacher_identities[name]))
    return tuple(units)


def assign_prompts(prompts: Sequence[Prompt], cast: Cast) -> Iterator[tuple[Prompt, str]]:
    """Yield each prompt with the teacher that the cast gives it, in corpus order."""
    counts: Counter[str] = Counter()
    for prompt in prompts:
        part = cast.part_of(prompt.skill, prompt.language)
        yield prompt, cast.teacher_of(part, counts[part])
        counts[part] += 1


def _split_into_units(
    prompts: Sequence[Prompt], prompts_per_unit: int, max_new_tokens: int | None
) -> Iterator[tuple[Prompt, ...]]:
    unit_prompts: list[Prompt] = []
    tokens = 0
    for prompt in prompts:
        answer = (
            len(prompt.given_text.encode(errors="replace"))
            if max_new_tokens is None
            else max_new_tokens
        )
        prompt_tokens = answer + sum(
            len(part.text.encode(errors="replace")) for part in prompt.conversation.parts()
        )
        if unit_prompts and (
            len(unit_prompts) == prompts_per_unit or tokens + prompt_tokens > MAX_UNIT_TOKENS
        ):
            yield tuple(unit_prompts)
            unit_prompts, tokens = [], 0
        unit_prompts.append(prompt)
        tokens += prompt_tokens
    if unit_prompts:
        yield tuple(unit_prompts)


MAX_QUARANTINE_REASON_CHARS = 300  # of a message in the quarantine list
CONTENT_FILTER_REASON = "the content filter of the server refused to answer"


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
    canaries: Canaries | None = None,
    refuse_if_changed: Callable[[], None] = lambda: None,
    on_unit: Callable[[UnitProgress], None] = lambda step: None,
    on_part: Callable[[CaptureUnit, float], None] = lambda unit, share: None,
) -> None:
    """Capture every unit of one teacher that is not committed yet.

    Args:
        units: The units of the run. Those of other teachers are skipped.
        teacher: The teacher.
        folder: The cache folder.
        max_new_tokens: Longest answer, in tokens.
        seed: Seed of the sampled distributions.
        tau: Store an unbiased sample, or None.
        max_kl: Store the likeliest tokens up to this loss in nats, or None.
        use_given_answers: Score the answers that come with the prompts, and generate none.
            Documents are scored in any case.
        canaries: Prompts that are answered twice, and which answer is learned; None = none.
        refuse_if_changed: Raises if the teacher is no longer the model of the units' names. Called
            before each commit.
        on_unit: Called after each unit.
        on_part: Called inside a unit with the share of it that is done.

    Raises:
        DataError: A prompt has no answer, and use_given_answers is set.
        RefusedError: The folder holds units of another model with this teacher's name.
    """
    own_units = [u for u in units if u.teacher == teacher.name]
    refuse_changed_identity(own_units, folder)
    for unit in own_units:
        is_new = not is_committed(folder, unit.name)
        if is_new:
            capture_unit(
                unit,
                teacher,
                folder,
                max_new_tokens=max_new_tokens,
                sparsifier=DistributionSparsifier(seed, tau, max_kl),
                use_given_answers=use_given_answers,
                canaries=canaries,
                refuse_if_changed=refuse_if_changed,
                on_part=partial(on_part, unit),
            )
        on_unit(
            UnitProgress(
                len(unit.prompts), read_record(folder, unit.name)["tokens"], is_new, unit.name
            )
        )


def capture_unit(
    unit: CaptureUnit,
    teacher: Teacher,
    folder: Path,
    *,
    max_new_tokens: int,
    sparsifier: DistributionSparsifier,
    use_given_answers: bool = False,
    canaries: Canaries | None = None,
    refuse_if_changed: Callable[[], None] = lambda: None,
    on_part: Callable[[float], None] = lambda share: None,
) -> int:
    """Capture and commit one unit.

    Args:
        unit: The unit.
        teacher: Its teacher.
        folder: The cache folder.
        max_new_tokens: Longest answer, in tokens.
        sparsifier: Reduces full distributions.
        use_given_answers: Score the answers that come with the prompts, and generate none.
        canaries: Prompts that are answered twice, and which answer is learned; None = none.
        refuse_if_changed: Called before the commit; raises if the teacher is another model by now.
        on_part: Called with the share that is done.

    Returns:
        Tokens of all conversations that the teacher read or wrote, each counted once, also of
        answers that are left out. Behind a server: the tokens that its responses report, repeated
        requests and scores included, which is what its owner pays.

    Raises:
        DataError: A prompt has no answer, and use_given_answers is set.
    """
    on_part(0.0)
    meter, before = TokenMeter(teacher.engine), server_tokens(teacher)
    writer = replace(teacher, engine=cast(Engine, meter)).reporting(
        lambda share: on_part(WRITING_SHARE * share)
    )
    renderable, quarantine = _split_renderable(unit.prompts, teacher)
    drawn: dict[str, Answer] = {}
    num_drawn_tokens = 0
    if canaries:
        drawn, pairs, num_drawn_tokens = canaries.answer(
            renderable, teacher, max_new_tokens, partial(_is_learnable, teacher=teacher)
        )
        write_pairs(folder, unit.name, pairs)
    others = [p for p in renderable if p.id not in drawn]
    rest = iter(
        answer_or_score(
            others,
            writer,
            max_new_tokens,
            use_given_answers,
            partial(reducer_of_prompts, sparsifier, teacher),
        )
    )
    asked = [drawn.get(p.id) or next(rest) for p in renderable]
    quarantine += [
        (a.prompt_id, a.failure_reason or CONTENT_FILTER_REASON)
        for a in asked
        if a.finish is FinishReason.REFUSED
    ]
    answers = [a for a in asked if a.finish is not FinishReason.REFUSED]
    lengths = _write_answers(
        unit, answers, quarantine, teacher, folder, sparsifier, refuse_if_changed, on_part
    )
    if getattr(teacher.engine, "client", None) is not None:
        return server_tokens(teacher) - before
    own = (a.prompt_id for a in asked if a.is_own and a.prompt_id not in drawn)
    written = dict(zip(own, meter.lengths, strict=False))
    counted = {k: n for k, n in (written | lengths).items() if k not in drawn}
    return sum(counted.values()) + num_drawn_tokens


WRITING_SHARE = 0.5  # of a unit's time, if the teacher writes its answers; the rest scores them


def refuse_changed_identity(units: Sequence[CaptureUnit], folder: Path) -> None:
    """Raise if a folder holds units of another model with the name of one of the units' teachers.

    A planned unit's name is a digest of its teacher's identity, so only the records of other units
    are read.

    Raises:
        RefusedError: It does.
    """
    identities = {u.teacher: u.identity for u in units}
    planned = {u.name for u in units}
    for name in committed_units(folder):
        if name in planned:
            continue
        about = read_record(folder, name)["about"]
        if about.get("identity", "") != identities.get(
            about.get("teacher", ""), about.get("identity", "")
        ):
            raise RefusedError(
                f"the folder holds units of another {about['teacher']}: its weights, tokenizer, "
                "template or effort changed",
                where=str(folder),
                remedy=f"give this run another --out, or delete {folder}",
            )


def _split_renderable(
    prompts: Sequence[Prompt], teacher: Teacher
) -> tuple[list[Prompt], list[tuple[str, str]]]:
    """Split prompts into those that the teacher can be asked, and the others with a reason.

    The teacher's template and tokenizer must be able to render the prompt, and its positions must
    hold it. One odd document does not end a capture.
    """
    renderable: list[Prompt] = []
    quarantine: list[tuple[str, str]] = []
    for prompt in prompts:
        try:
            num_bytes = sum(len(part.text.encode()) for part in prompt.conversation.parts())
            if num_bytes > MAX_LINE_BYTES:
                raise DataError(f"{num_bytes:,} bytes, at most {MAX_LINE_BYTES:,}")
            num_tokens = count_prompt_tokens(prompt, teacher)
            if 0 < teacher.max_context_tokens <= num_tokens:
                raise DataError(
                    f"{num_tokens:,} tokens, and {teacher.name} has positions for "
                    f"{teacher.max_context_tokens:,}, answer included"
                )
        except (DataError, UnicodeError) as error:
            quarantine.append((prompt.id, str(error)[:MAX_QUARANTINE_REASON_CHARS]))
        else:
            renderable.append(prompt)
    return renderable, quarantine


def _write_answers(
    unit: CaptureUnit,
    answers: Sequence[Answer],
    quarantine: Sequence[tuple[str, str]],
    teacher: Teacher,
    folder: Path,
    sparsifier: DistributionSparsifier,
    refuse_if_changed: Callable[[], None],
    on_part: Callable[[float], None],
) -> dict[str, int]:
    """Score the complete answers of a unit; write and commit it.

    Returns:
        Prompt -> tokens of each complete answer with its prompt.
    """
    rendered = [(a, _render_complete(a, teacher)) for a in answers]
    rendered = [
        (replace(a, finish=FinishReason.LENGTH), None)
        if tokens is not None and not _has_positions_for(tokens, teacher)
        else (a, tokens)
        for a, tokens in rendered
    ]
    complete = [(a, tokens) for a, tokens in rendered if tokens is not None]
    is_scored = all(a.given or a.conversation.is_document for a in answers)
    begin = 0.0 if is_scored else WRITING_SHARE
    results = list(
        answer_distributions(
            unit.teacher,
            complete,
            teacher,
            sparsifier,
            lambda share: on_part(begin + (1 - begin) * share),
        )
    )
    cached, failed = [], list(quarantine)
    for (answer, tokens), result in zip(complete, results, strict=True):
        if isinstance(result, SparseDistributions):
            cached.append(CachedAnswer(answer, tokens, result))
        else:
            failed.append((answer.prompt_id, result.reason))
    dropped = Counter[str](_drop_reason(a) for a, tokens in rendered if tokens is None)
    if failed:
        dropped[FinishReason.REFUSED.value] += len(failed)
    refuse_if_changed()
    kind, tau = sparsifier.kind, sparsifier.tau or 0.0
    metadata = {"teacher": unit.teacher, "identity": unit.identity}
    if not teacher.engine.capabilities.has_full_distributions:
        capabilities = teacher.engine.capabilities
        kind, tau = capabilities.kind, 0.0
        if capabilities.num_top_logprobs:
            metadata["top"] = str(capabilities.num_top_logprobs)
    elif sparsifier.max_kl:
        metadata["kl"] = f"{sparsifier.max_kl:g}"
    write_unit(
        folder,
        unit.name,
        cached,
        dropped,
        tau=tau,
        kind=kind,
        unit_metadata=metadata,
        quarantine=failed,
    )
    return {answer.prompt_id: len(tokens) for answer, tokens in complete}


# drop reason besides those of FinishReason: the prompt asks for thinking, and the answer has none.
# A student would learn from it that the thinking switch has no effect.
MISSING_THINKING = "thoughtless"


def _is_missing_thinking(answer: Answer) -> bool:
    return (
        answer.effort not in (None, ThinkingEffort.NONE)
        and not answer.conversation.messages[-1].thinking
    )


def _drop_reason(answer: Answer) -> str:
    """Return why an answer is left out."""
    if answer.finish is not FinishReason.STOP:
        return answer.finish.value
    return MISSING_THINKING if _is_missing_thinking(answer) else FinishReason.MALFORMED.value


def _render_complete(answer: Answer, teacher: Teacher) -> RenderedTokens | None:
    """Render and tokenize a complete answer; return None for one that is left out.

    Left out are answers that did not stop, that lack the thinking their prompt asks for, and those
    that the teacher's own template refuses (gpt-oss refuses a text that mentions its channels): the
    last count as malformed.
    """
    if answer.finish is not FinishReason.STOP or _is_missing_thinking(answer):
        return None
    try:
        return teacher.renderer.render(answer.conversation)
    except DataError:
        return None


def _has_positions_for(tokens: RenderedTokens, teacher: Teacher) -> bool:
    return teacher.max_context_tokens <= 0 or len(tokens) <= teacher.max_context_tokens


def _is_learnable(answer: Answer, teacher: Teacher) -> bool:
    """Return whether an answer is complete and fits into the teacher's positions."""
    tokens = _render_complete(answer, teacher)
    return tokens is not None and _has_positions_for(tokens, teacher)


def open_teacher_caches(
    units: Sequence[CaptureUnit], folder: Path, window_blocks: int = SHUFFLE_WINDOW_BLOCKS
) -> tuple[tuple[CacheReader, int], ...]:
    """Open the answers of each teacher.

    Args:
        units: The units of the run.
        folder: The cache folder.
        window_blocks: Blocks of about 4,096 tokens that are shuffled together in an epoch.

    Returns:
        (cache, share) of each teacher that was asked. The share is its number of prompts.

    Raises:
        DataError: A unit is missing or damaged.
    """
    return tuple(
        (
            open_cache_reader(folder, [u.name for u in units if u.teacher == name], window_blocks),
            sum(len(u.prompts) for u in units if u.teacher == name),
        )
        for name in dict.fromkeys(u.teacher for u in units)
    )
