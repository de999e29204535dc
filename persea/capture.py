"""Ask the cast, keep what it said; resumes where it stopped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from persea import cache
from persea.audition import Cast
from persea.chat import Finish, Text, Tokens
from persea.corpus import Prompt
from persea.errors import DataError, Refused
from persea.rows import sample_rows
from persea.teacher import Answer, Teacher


@dataclass(frozen=True)
class Unit:
    """Some prompts for one teacher; `name` is the digest of all that determines the unit's bytes."""

    name: str
    teacher: str
    prompts: tuple[Prompt, ...]


def plan_units(prompts: Sequence[Prompt], cast: Cast, teachers: Mapping[str, str], size: int, settings: Mapping[str, Any]) -> tuple[Unit, ...]:
    """Every prompt to the teacher the cast names, in units of `size` prompts, in corpus order.

    teachers  name -> identity: digest of weights, voice and effort
    settings  what else determines a unit's bytes: tau, seed, limits
    """
    asked: dict[str, list[Prompt]] = {name: [] for name in teachers}
    counts: Counter[str] = Counter()
    for prompt in prompts:
        asked[cast.teacher_of(prompt.skill, counts[prompt.skill])].append(prompt)
        counts[prompt.skill] += 1
    units = []
    for name, mine in asked.items():
        for begin in range(0, len(mine), size):
            some = tuple(mine[begin:begin + size])
            key = cache.unit_id([[p.id, p.skill, p.language, p.conversation.to_json(), p.answer] for p in some], name, teachers[name], settings)
            units.append(Unit(key, name, some))
    return tuple(units)


def capture(units: Sequence[Unit], teacher: Teacher, folder: Path, *, tau: float, max_new_tokens: int, seed: int, given: bool = False,
            progress: Callable[[int], None] = lambda prompts: None) -> None:
    """Ask one teacher every unit of its own that is not committed yet; no prompt is asked twice.

    given     score the answers that came with the prompts instead of asking for new ones
    progress  called after each unit with the prompts in it
    Raises DataError for a prompt without answer where they are to be given.
    """
    for unit in units:
        if unit.teacher != teacher.name:
            continue
        if not cache.is_committed(folder, unit.name):
            answers = [_given(p, teacher) for p in unit.prompts] if given else teacher.answer(unit.prompts, max_new_tokens)
            _keep(unit, answers, teacher, folder, tau, seed)
        progress(len(unit.prompts))


def _given(prompt: Prompt, teacher: Teacher) -> Answer:
    if not prompt.answer:
        raise DataError(f"prompt {prompt.id} has no answer of its own", where="capture.answers: given",
                        remedy="add an assistant turn or an \"answer\" to it, or let the teachers answer: capture.answers: ask")
    conversation = replace(prompt.conversation, effort=teacher.effort).answered(Text(prompt.answer))
    return Answer(prompt.id, teacher.name, prompt.skill, prompt.language, conversation, Finish.STOP)


def _keep(unit: Unit, answers: Sequence[Answer], teacher: Teacher, folder: Path, tau: float, seed: int) -> None:
    """Score the whole answers, and publish and commit the unit."""
    rendered = [(a, _rendered(a, teacher)) for a in answers]
    whole = [(a, tokens) for a, tokens in rendered if tokens is not None]
    scored = teacher.engine.score([t.ids_T for _, t in whole], [t.learn_T for _, t in whole])
    captures = []
    for (answer, tokens), logprobs_NW in zip(whole, scored, strict=True):
        rows = sample_rows(logprobs_NW, tokens.ids_T[tokens.learn_T], tau, f"{seed} {unit.teacher} {answer.prompt_id}")
        captures.append(cache.Capture(answer, tokens, rows))
    dropped = Counter((Finish.MALFORMED if a.finish is Finish.STOP else a.finish).value for a, tokens in rendered if tokens is None)
    cache.write_unit(folder, unit.name, captures, dropped, tau=tau, about={"teacher": unit.teacher})


def _rendered(answer: Answer, teacher: Teacher) -> Tokens | None:
    """A whole answer in the teacher's voice; None for one that did not stop, or that its own template refuses (gpt-oss' does
    where a text speaks of channels): such an answer is malformed, and counted as that."""
    if answer.finish is not Finish.STOP:
        return None
    try:
        return teacher.voice.render(answer.conversation)
    except DataError:
        return None


def read(units: Sequence[Unit], folder: Path) -> Iterator[cache.Capture]:
    """All captures of the units, in order, every digest checked."""
    for unit in units:
        yield from cache.read_unit(folder, unit.name)


def summary(units: Sequence[Unit], folder: Path) -> dict[str, Any]:
    """What was asked, kept and left out; prompts = kept + left out, always. Raises Refused where nothing was kept."""
    total: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    teachers: dict[str, Counter[str]] = {}
    for unit in units:
        record = cache.read_record(folder, unit.name)
        counts = {"prompts": len(unit.prompts), "kept": record["answers"], **{k: record[k] for k in ("tokens", "positions", "entries", "bytes")}}
        total.update(counts)
        left_out.update(record["dropped"])
        teachers.setdefault(unit.teacher, Counter()).update(counts)
    if not total["kept"]:
        raise Refused(f"no answer of {total['prompts']} is whole ({dict(left_out)})", where="capture",
                      remedy="raise capture.max_new_tokens, or look at the answers: the teachers may not know their templates")
    return {**total, "left_out": dict(left_out), "teachers": {k: dict(v) for k, v in teachers.items()}}
