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
from persea.cache.maintenance import committed
from persea.cache.reader import Reader, open_reader
from persea.chat.messages import Effort, Finish, Text, Tokens
from persea.data.prompts import MAX_LINE, Broken, Corpus, Prompt
from persea.distributions import RowKind, Rows, joined, sample_rows, top_rows
from persea.errors import DataError, Refused
from persea.evaluation.audition import Cast
from persea.teachers.engines import Failed, Namer
from persea.teachers.teacher import Answer, Teacher

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Unit:
    """Some prompts for one teacher of some identity; `name` is the digest of all that determines the unit's bytes."""

    name: str
    teacher: str
    prompts: tuple[Prompt, ...]
    identity: str = ""


UNIT_TOKENS = 1 << 20  # the most tokens of a unit; a text has at most as many tokens as bytes, but for a template's few


def plan_units(prompts: Sequence[Prompt], cast: Cast, teachers: Mapping[str, str], size: int, settings: Mapping[str, Any],
               max_new_tokens: int | None = None) -> tuple[Unit, ...]:
    """Every prompt to the teacher the cast names, in units of `size` prompts, fewer where they could pass 2^20 tokens, in corpus order.

    A unit is closed before anything is asked, so what answers may come to counts: max_new_tokens each; None = the given ones' bytes.

    teachers  name -> identity: digest of weights, voice and effort
    settings  what else determines a unit's bytes: tau, seed, limits
    """
    asked: dict[str, list[Prompt]] = {name: [] for name in teachers}
    for prompt, name in assigned(prompts, cast):
        asked[name].append(prompt)
    units = []
    for name, mine in asked.items():
        for some in _closed(mine, size, max_new_tokens):
            asked_of = [[p.id, p.skill, p.language, p.conversation.to_json(), p.answer, *([p.effort.value] if p.effort else [])] for p in some]
            key = cache.unit_id(asked_of, name, teachers[name], settings)
            units.append(Unit(key, name, some, teachers[name]))
    return tuple(units)


def assigned(prompts: Sequence[Prompt], cast: Cast) -> Iterator[tuple[Prompt, str]]:
    """Each prompt and the teacher that the cast gives it, in corpus order."""
    counts: Counter[str] = Counter()
    for prompt in prompts:
        part = cast.part_of(prompt.skill, prompt.language)
        yield prompt, cast.teacher_of(part, counts[part])
        counts[part] += 1


def _closed(prompts: Sequence[Prompt], size: int, max_new_tokens: int | None) -> Iterator[tuple[Prompt, ...]]:
    some: list[Prompt] = []
    tokens = 0
    for prompt in prompts:
        answer = len(prompt.answer.encode(errors="replace")) if max_new_tokens is None else max_new_tokens
        more = answer + sum(len(part.text.encode(errors="replace")) for part in prompt.conversation.parts())
        if some and (len(some) == size or tokens + more > UNIT_TOKENS):
            yield tuple(some)
            some, tokens = [], 0
        some.append(prompt)
        tokens += more
    if some:
        yield tuple(some)


@dataclass(frozen=True)
class Keeping:
    """What is kept of each distribution: by tau a sample, by kl the likeliest tokens and a rest; one of the two."""

    seed: int
    tau: float | None = None
    kl: float | None = None

    @property
    def kind(self) -> RowKind:
        return RowKind.SAMPLED if self.kl is None else RowKind.TOPK_REST

    def rows(self, unit: Unit, answer: Answer, tokens: Tokens, logprobs_NW: torch.Tensor, seen_W: npt.NDArray[np.int64], first: int = 0) -> Rows:
        """The answer's rows from its `first` on, of as many as there are log-probabilities.

        seen_W: how often each token stands in the unit's answers. One more of each, and it says how a rest is spread."""
        realised_N = tokens.ids_T[tokens.learn_T][first:first + len(logprobs_NW)]
        if self.kl is not None:
            return top_rows(logprobs_NW, realised_N, self.kl, (seen_W + 1) / (seen_W + 1).sum(), f"prompt {answer.prompt_id}")
        if self.tau is None:
            raise AssertionError("rows are kept by tau or by kl")
        return sample_rows(logprobs_NW, realised_N, self.tau, f"{self.seed} {unit.teacher} {answer.prompt_id}", first)


@dataclass(frozen=True)
class Step:
    """A unit is done: `prompts` in it and `tokens` kept; asked = it was not there before."""

    prompts: int
    tokens: int
    asked: bool


FILTERED = "the server refused to answer: its content filter"  # what its own template cannot say is not asked


def capture(units: Sequence[Unit], teacher: Teacher, folder: Path, *, max_new_tokens: int, seed: int, tau: float | None = None,
            kl: float | None = None, given: bool = False, unchanged: Callable[[], None] = lambda: None,
            progress: Callable[[Step], None] = lambda step: None) -> None:
    """Ask one teacher every unit of its own that is not committed yet; no prompt is asked twice.

    tau, kl    one of them: rows sampled below tau, or the likeliest up to a KL of kl and a rest
    given      score the answers that came with the prompts instead of asking for new ones
    unchanged  raises where the teacher is no longer what the units' names say; called before each commit
    progress   called after each unit
    Raises DataError for a prompt without answer where they are to be given, Refused where units of the same name's other weights,
    tokenizer or template stand in the folder.
    """
    mine = [u for u in units if u.teacher == teacher.name]
    _refuse_another(mine, folder)
    for unit in mine:
        asked = not cache.is_committed(folder, unit.name)
        if asked:
            sayable, quarantine = _sayable(unit.prompts, teacher)
            answers = [_given(p, teacher) for p in sayable] if given else teacher.answer(sayable, max_new_tokens)
            quarantine += [(a.prompt_id, a.why or FILTERED) for a in answers if a.finish is Finish.REFUSED]
            answers = [a for a in answers if a.finish is not Finish.REFUSED]
            _keep(unit, answers, quarantine, teacher, folder, Keeping(seed, tau, kl), unchanged)
        progress(Step(len(unit.prompts), cache.read_record(folder, unit.name)["tokens"], asked))


def _refuse_another(mine: Sequence[Unit], folder: Path) -> None:
    identities = {u.teacher: u.identity for u in mine}
    for name in committed(folder):
        about = cache.read_record(folder, name)["about"]
        if about.get("identity", "") != identities.get(about.get("teacher", ""), about.get("identity", "")):
            raise Refused(f"units of another {about['teacher']} stand here: its weights, tokenizer, template or effort changed", where=str(folder),
                          remedy=f"give this run another --out, or delete {folder}")


def _sayable(prompts: Sequence[Prompt], teacher: Teacher) -> tuple[list[Prompt], list[tuple[str, str]]]:
    """Prompts that the teacher's template and tokenizer can say and its positions hold; the others with the reason.

    One odd document does not end a capture."""
    sayable: list[Prompt] = []
    quarantine: list[tuple[str, str]] = []
    for prompt in prompts:
        try:
            size = sum(len(part.text.encode()) for part in prompt.conversation.parts())
            if size > MAX_LINE:
                raise DataError(f"{size:,} bytes, at most {MAX_LINE:,}")
            length = len(teacher.voice.prompt(teacher.asked(prompt)))
            if 0 < teacher.context <= length:
                raise DataError(f"{length:,} tokens, and {teacher.name} has positions for {teacher.context:,}, answer included")
        except (DataError, UnicodeError) as error:
            quarantine.append((prompt.id, str(error)[:300]))
        else:
            sayable.append(prompt)
    return sayable, quarantine


def _given(prompt: Prompt, teacher: Teacher) -> Answer:
    if not prompt.answer:
        raise DataError(f"prompt {prompt.id} has no answer of its own", where="capture.answers: given",
                        remedy="add an assistant turn or an \"answer\" to it, or let the teachers answer: capture.answers: ask")
    conversation = teacher.asked(prompt).answered(Text(prompt.answer))
    return Answer(prompt.id, teacher.name, prompt.skill, prompt.language, conversation, Finish.STOP, prompt.effort)


def _keep(unit: Unit, answers: Sequence[Answer], quarantine: Sequence[tuple[str, str]], teacher: Teacher, folder: Path, how: Keeping,
          unchanged: Callable[[], None]) -> None:
    """Score the whole answers, and publish and commit the unit."""
    rendered = [(a, _rendered(a, teacher)) for a in answers]
    rendered = [(replace(a, finish=Finish.LENGTH), None) if t is not None and 0 < teacher.context < len(t) else (a, t) for a, t in rendered]
    whole = [(a, tokens) for a, tokens in rendered if tokens is not None]
    rows = [(a, t, r) for (a, t), r in zip(whole, _rows(unit, whole, teacher, how), strict=True)]
    captures = [cache.Capture(answer, tokens, said) for answer, tokens, said in rows if isinstance(said, Rows)]
    quarantine = [*quarantine, *((answer.prompt_id, said.why) for answer, _, said in rows if isinstance(said, Failed))]
    dropped = Counter[str](_why(a) for a, tokens in rendered if tokens is None)
    if quarantine:
        dropped[Finish.REFUSED.value] += len(quarantine)
    unchanged()
    about = {"teacher": unit.teacher, "identity": unit.identity}
    if isinstance(teacher.engine, Namer):
        able = teacher.engine.abilities
        cache.write_unit(folder, unit.name, captures, dropped, tau=0.0, kind=able.kind,
                         about=about | ({"top": str(able.top)} if able.top else {}), quarantine=quarantine)
        return
    cache.write_unit(folder, unit.name, captures, dropped, tau=how.tau or 0.0, kind=how.kind,
                     about=about | ({"kl": f"{how.kl:g}"} if how.kl else {}), quarantine=quarantine)


def _rows(unit: Unit, whole: Sequence[tuple[Answer, Tokens]], teacher: Teacher, how: Keeping) -> Iterator[Rows | Failed]:
    """Rows of each answer: as the engine names them, or what is kept of its whole distributions."""
    ids, learn = [t.ids_T for _, t in whole], [t.learn_T for _, t in whole]
    if isinstance(teacher.engine, Namer):
        yield from teacher.engine.named(ids, learn)
        return
    seen_W = np.zeros(len(teacher.voice.vocabulary), np.int64)
    for one in ids:
        seen_W += np.bincount(one, minlength=len(seen_W))
    parts: list[list[Rows]] = [[] for _ in whole]
    for k, logprobs_NW in teacher.engine.pieces(ids, learn):
        parts[k].append(how.rows(unit, *whole[k], logprobs_NW, seen_W, sum(map(len, parts[k]))))
    yield from map(joined, parts)


THOUGHTLESS = "thoughtless"  # beside the ways to finish: asked to think, and answered at once. A student would learn that the switch means nothing


def _is_thoughtless(answer: Answer) -> bool:
    return answer.mode not in (None, Effort.NONE) and not answer.conversation.messages[-1].thinking


def _why(answer: Answer) -> str:
    """Why an answer is not kept."""
    if answer.finish is not Finish.STOP:
        return answer.finish.value
    return THOUGHTLESS if _is_thoughtless(answer) else Finish.MALFORMED.value


def _rendered(answer: Answer, teacher: Teacher) -> Tokens | None:
    """A whole answer in the teacher's voice; None for one that did not stop, that has no thought where its mode asks for one, or that its
    own template refuses (gpt-oss' does where a text speaks of channels): such an answer is malformed, and counted as that."""
    if answer.finish is not Finish.STOP or _is_thoughtless(answer):
        return None
    try:
        return teacher.voice.render(answer.conversation)
    except DataError:
        return None


def caches(units: Sequence[Unit], folder: Path) -> tuple[tuple[Reader, int], ...]:
    """Each teacher's captures, and its share: how many prompts the cast gave it. A teacher that was asked nothing has none."""
    return tuple((open_reader(folder, [u.name for u in units if u.teacher == name]), sum(len(u.prompts) for u in units if u.teacher == name))
                 for name in dict.fromkeys(u.teacher for u in units))


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


SHOWN = 100  # of what was quarantined in the summary; the file beside it holds all


def quarantined(units: Sequence[Unit], folder: Path, broken: Sequence[Broken]) -> list[dict[str, Any]]:
    """Every line and prompt that was not asked, with the place and the reason."""
    return [asdict(b) for b in broken] + [
        {"where": f"prompt {prompt}, {unit.teacher}, unit {unit.name}", "why": why}
        for unit in units for prompt, why in cache.read_record(folder, unit.name)["quarantine"]]


def accounts(told: dict[str, Any], corpus: Corpus, aside: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What came in = what was kept, skipped and quarantined, counted where each was decided; AssertionError if not."""
    skipped = len(corpus.removed) + sum(told["left_out"].values()) - told["left_out"].get(Finish.REFUSED.value, 0)
    found = {"in": corpus.came, "kept": told["kept"], "skipped": skipped, "quarantined": len(aside)}
    if found["in"] != told["kept"] + skipped + len(aside):
        raise AssertionError(f"prompts were lost: {found}")
    return found | {"quarantine": [{"where": q["where"], "why": q["why"]} for q in aside[:SHOWN]]}


@dataclass
class Pace:
    """How quickly a capture goes, and when it has cost enough.

    prompts        of the whole capture
    tokens, hours  the most it may cost: tokens kept in all, hours of this run; 0 = no limit
    """

    prompts: int
    tokens: int = 0
    hours: float = 0
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._begin, self._done, self._asked, self._kept, self._new = self.clock(), 0, 0, 0, 0

    def step(self, step: Step) -> tuple[float, str]:
        """Share done, and a few words: prompts, tokens a second, time left. Raises Refused where a limit is reached and prompts are left."""
        self._done += step.prompts
        self._kept += step.tokens
        self._asked += step.prompts if step.asked else 0
        self._new += step.tokens if step.asked else 0
        seconds = self.clock() - self._begin
        for limit, spent, key, words in ((self.tokens, self._kept, "capture.tokens", f"{self._kept:,} tokens"),
                                         (self.hours, seconds / 3600, "capture.hours", f"{seconds / 3600:.2f} hours")):
            if limit and spent >= limit and self._done < self.prompts:
                raise Refused(f"the budget is spent: {words} for {self._done:,} of {self.prompts:,} prompts", where=key,
                              remedy=f"raise {key} and run again: what is committed stays")
        words = f"{self._done}/{self.prompts} prompts"
        if self._asked and seconds > 0:
            left = (self.prompts - self._done) * seconds / self._asked
            words += f", {self._new / seconds:,.0f} tokens/s" + (f", {_spoken(left)} left" if left else "")
        return self._done / self.prompts, words


def _spoken(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if hours < 2 else f"{hours:.1f} h"
