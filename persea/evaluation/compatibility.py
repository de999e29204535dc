"""Is this pairing sound? Measured on the bytes of real conversations before anything is asked or trained."""

from __future__ import annotations

import codecs
import json
import sys
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from math import log, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from persea.alignment.event_map import Bridge, bridge_digest
from persea.alignment.spans import Boundaries, Taught, align
from persea.chat.messages import Conversation, Text, Tokens
from persea.chat.renderer import Voice
from persea.errors import DataError, Refused
from persea.tasks.intervals import Z95, wilson
from persea.teachers.teacher import Teacher
from persea.tokenization.vocabulary import Vocabulary

# Bits per byte by which a chat template may be worse than no template. Measured on the qwen sapling (tests/evaluation/test_compatibility.py): the
# newlines of its template lost cost it .01, its empty thought lost, as under Qwen 2.5's template, .74. A slip of wording passes, a notation it was
# not trained with does not.
WORSE = 0.25

LIKELY = 1e-3  # tokens below it are taken to stand where a teacher's kept mass is counted

TEXTS = "texts"  # what stands for a skill where a recipe's own texts are measured

# The teacher's probability mass that boundary masks leave, at each common boundary of a batch: in [0, 1].
Kept = Callable[[Sequence[Tokens], Sequence[Tokens], Boundaries], npt.NDArray[np.float64]]


@dataclass(frozen=True)
class Sample:
    """Answered conversations of one kind: a skill's reference answers in one language, or the lines of a text.

    names  what to call each in a message
    """

    skill: str
    language: str
    conversations: tuple[Conversation, ...]
    names: tuple[str, ...]

    def suits(self, voice: Voice) -> bool:
        """Whether it needs no notation for tools that this voice's family lacks: such a teacher is not asked, and has nothing to check."""
        return voice.family.tool_bytes is not None or not any(c.tools for c in self.conversations)

    def rendered(self, voice: Voice) -> list[Tokens]:
        """In a voice. Raises DataError where its tokenizer or template cannot say one."""
        out = []
        for name, conversation in zip(self.names, self.conversations, strict=True):
            try:
                out.append(voice.render(conversation))
            except DataError as error:
                raise DataError(error.what, where=f"{error.where}, {name}", remedy=error.remedy) from error
        return out


@dataclass(frozen=True)
class Pairing:
    """One teacher against the student on one sample. Shares in [0, 1].

    Of the student's learned tokens; the four add up to 1 (align.Taught):
    boundary            stand where both tokenizers begin a token: taught by events
    completion          begin inside a teacher token that begins at a common boundary
    chunk               stand in a span of which only the ends are common
    cross_entropy_only  nothing of the teacher's reaches them

    one_to_one          of all spans, those of one student and one teacher token
    disagreement        of the common boundaries, those where the two realised tokens map to different events
    spaces              of the common boundaries, those where a run of spaces and tabs stands: an event that tells no length
    event_bytes, token_bytes  bytes that the event tells and that the student token has, mean over common boundaries
    kept_mean, kept_p5  teacher's mass that the boundary masks leave: mean, and what 95 % of the boundaries have more of;
                        None where it was not measured
    """

    teacher: str
    skill: str
    language: str
    conversations: int
    tokens: int
    boundaries: int
    boundary: float
    completion: float
    chunk: float
    cross_entropy_only: float
    one_to_one: float
    disagreement: float
    spaces: float
    event_bytes: float
    token_bytes: float
    kept_mean: float | None = None
    kept_p5: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Likelihood:
    """A teacher's bits per byte on reference answers: asked in its own template, and after the bare question.

    language  "" = all of them
    low       lower end of the 95 % interval of template - bare, over conversations; None where there is one
    """

    teacher: str
    language: str
    conversations: int
    bytes: int
    template: float
    bare: float
    low: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def check(teacher: str, voice: Voice, student: Voice, bridge: Bridge, sample: Sample, mine: Sequence[Tokens], kept: Kept | None = None) -> Pairing:
    """Lay the teacher's renderings over the student's (`mine`). Raises DataError where bytes cannot be located, or the bridge is another
    pair's.
    """
    if bridge.digest != bridge_digest(voice, student):
        raise DataError("this bridge was built for other tokenizers", where=f"{teacher} -> student", remedy="open the bridge of these two voices")
    theirs = sample.rendered(voice)
    found = align(mine, theirs)
    both, ids_S, ids_T = found.boundaries, _ids(mine), _ids(theirs)
    learned = int((found.taught_S >= 0).sum())
    shares = np.bincount(found.taught_S[found.taught_S >= 0], minlength=len(Taught)) / max(1, learned)
    token_C = ids_S[both.student_C]
    event_C = bridge.student_event_V[token_C]
    differ_C = event_C != bridge.teacher_event_W[ids_T[both.teacher_C]]
    said_C = (student.vocabulary.lengths_W[token_C] > 0) & (event_C >= 0)
    told_C = _event_bytes(bridge, student.vocabulary)[event_C[said_C]]
    mass_C = kept(mine, theirs, both) if kept and len(token_C) else None
    return Pairing(
        teacher, sample.skill, sample.language, len(mine), learned, len(token_C),
        float(shares[Taught.EVENT]), float(shares[Taught.COMPLETION]), float(shares[Taught.CHUNK]), float(shares[Taught.TEXT]) if learned else 1.0,
        found.spans.one_to_one / max(1, len(found.spans.student_C2)), _mean(differ_C), _mean(_spaces(token_C, student.vocabulary)),
        _mean(told_C), _mean(student.vocabulary.lengths_W[token_C[said_C]]),
        None if mass_C is None else _mean(mass_C), None if mass_C is None else float(np.quantile(mass_C, 0.05)))


def _ids(renderings: Sequence[Tokens]) -> npt.NDArray[np.int32]:
    return np.concatenate([np.empty(0, np.int32), *(r.ids_T for r in renderings)])


def _mean(values: npt.NDArray[Any]) -> float:
    return float(values.mean()) if len(values) else 0.0


def _event_bytes(bridge: Bridge, vocabulary: Vocabulary) -> npt.NDArray[np.int32]:
    """Bytes of each event: those of its shortest student token, which begins all the others."""
    offsets_E1, tokens = bridge.members
    return np.minimum.reduceat(vocabulary.lengths_W[tokens], offsets_E1[:-1])


def _spaces(ids: npt.NDArray[np.int32], vocabulary: Vocabulary) -> npt.NDArray[np.bool_]:
    kinds, which = np.unique(ids, return_inverse=True)
    pieces = [vocabulary.bytes_W[i] or b"x" for i in kinds.tolist()]
    return np.array([not p.strip(b" \t") for p in pieces], np.bool_)[which]


def likelihood(teacher: Teacher, samples: Sequence[Sample]) -> list[Likelihood]:
    """Of the answers of all samples, then by language. The bare text is the question, a newline, and the answer.

    Two forward passes over every answer; answers without a byte say nothing and are left out.
    """
    languages = [s.language for s in samples for _ in s.conversations]
    asked = [replace(c, effort=teacher.effort) for s in samples for c in s.conversations]
    bare = [_bare(teacher.voice, c) for c in asked]
    plain = teacher.engine.score([ids for ids, _ in bare], [learn for _, learn in bare])
    rows = np.zeros((len(asked), 3))
    for k, ((tokens, logprobs), (ids, learn), bare_logprobs) in enumerate(zip(teacher.score(asked), bare, plain, strict=True)):
        said = (tokens.starts_T >= 0) & (tokens.ends_T > tokens.starts_T)
        size = (tokens.ends_T - tokens.starts_T)[said & tokens.learn_T].sum()
        rows[k] = size, _bits(logprobs, tokens.ids_T[tokens.learn_T])[said[tokens.learn_T]].sum(), _bits(bare_logprobs, ids[learn]).sum()
    names = np.array(languages, object)[rows[:, 0] > 0]
    rows = rows[rows[:, 0] > 0]
    return [_likelihood(teacher.name, name, rows[(names == name) | (not name)]) for name in dict.fromkeys(["", *names.tolist()]) if len(rows)]


def kept_by(teacher: Teacher, bridge: Bridge) -> Kept:
    """What of a teacher's own distributions the boundary masks leave; one forward pass over every answer.

    Counted over tokens of probability LIKELY or more: with a real vocabulary there are some ten of these at a boundary, and 262,144 in all.
    """
    def kept(mine: Sequence[Tokens], theirs: Sequence[Tokens], both: Boundaries) -> npt.NDArray[np.float64]:
        mass_C = np.ones(len(both.student_C))
        if bridge.teacher_mask is None:
            return mass_C
        begin_s, begin_t, at = 0, 0, 0
        scored = teacher.engine.score([t.ids_T for t in theirs], [t.learn_T for t in theirs])
        for s, t, logprobs_NW in zip(mine, theirs, scored, strict=True):
            end = int(np.searchsorted(both.student_C, begin_s + len(s)))
            contexts = bridge.teacher_mask.keeper.inner(s, both.student_C[at:end] - begin_s)
            rows = (np.cumsum(t.learn_T) - 1)[both.teacher_C[at:end] - begin_t]
            for c, (context, row) in enumerate(zip(contexts.tolist(), rows.tolist(), strict=True)):
                likely = np.flatnonzero(logprobs_NW[row].numpy() >= log(LIKELY))
                mass_C[at + c] = 1 - float(logprobs_NW[row, bridge.teacher_mask.dead(context, likely)].exp().sum())
            begin_s, begin_t, at = begin_s + len(s), begin_t + len(t), end
        return mass_C

    return kept


def _bare(voice: Voice, conversation: Conversation) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
    """Ids of a conversation without any template, and which of them are the answer's. A BOS stands where the template has one: some models
    say nothing sensible without.
    """
    kept = voice.family.normalise(conversation)
    question, answer = "\n".join(m.text for m in conversation.messages[:-1]) + "\n", kept.messages[-1].text
    bos = voice.vocabulary.control.get(voice.special_tokens.get("bos_token", ""))
    front = [bos] if bos is not None and int(voice.prompt(conversation).ids_T[0]) == bos else []
    before, after = voice.vocabulary.encode_batch([question, answer])
    ids = np.array([*front, *before, *after], np.int32)
    return ids, np.arange(len(ids)) >= len(ids) - len(after)


def _bits(logprobs: Any, ids_N: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
    bits: npt.NDArray[np.float64] = -logprobs.numpy()[np.arange(len(ids_N)), ids_N].astype(np.float64) / np.log(2)
    return bits


def _likelihood(teacher: str, language: str, rows_N3: npt.NDArray[np.float64]) -> Likelihood:
    """Totals of (bytes, bits in the template, bits of the bare text); the interval is that of a ratio of sums over conversations."""
    size, template, bare = rows_N3.sum(axis=0)
    excess = (template - bare) / size
    n, rest = len(rows_N3), rows_N3[:, 1] - rows_N3[:, 2] - excess * rows_N3[:, 0]
    low = excess - Z95 * sqrt(n * float(rest.var(ddof=1))) / size if n > 1 else None
    return Likelihood(teacher, language, n, int(size), float(template / size), float(bare / size), None if low is None else float(low))


def read_texts(language: str, reference: str, lines: int) -> Sample:
    """The first lines of a text file, as answers to nothing. `FILE#key` takes that key of a JSON object on every line.

    Raises DataError where the file is missing, no UTF-8, holds no text, or a line has no such key.
    """
    name, _, _ = reference.partition("#")
    where = f"check.texts.{language}, {name}"
    texts = read_lines(reference, where, lines)
    said = tuple(Conversation.ask("").answered(Text(text)) for _, text in texts)
    return Sample(TEXTS, language, said, tuple(f"{Path(name).name}:{number}" for number, _ in texts))


def read_lines(reference: str, where: str, most: int = sys.maxsize) -> list[tuple[int, str]]:
    """(line number, text in NFC) of a text file's first lines that hold one: `FILE`, or `FILE#key` for that key of a JSON object on every line.

    Raises DataError as `read_texts` does.
    """
    name, _, key = reference.partition("#")
    remedy = "give a UTF-8 file, one text a line"
    try:
        raw = Path(name).read_bytes().removeprefix(codecs.BOM_UTF8)
        rows = raw.decode().replace("\r\n", "\n").replace("\r", "\n").split("\n")  # a stray sign of a line's end is no text
    except OSError as error:
        raise DataError(f"cannot read the text: {error}", where=where, remedy=remedy) from error
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"cannot read the text: not UTF-8 at byte {error.start:,}", where=f"{where}:{line}", remedy=remedy) from error
    filled = ((number, row) for number, row in enumerate(rows, start=1) if row.strip())
    texts = [(n, unicodedata.normalize("NFC", _field(row, key, f"{where}:{n}") if key else row)) for n, row in islice(filled, most)]
    if not texts:
        raise DataError("no line with a text", where=where, remedy=remedy)
    return texts


def _field(row: str, key: str, where: str) -> str:
    try:
        value = json.loads(row)
    except (ValueError, RecursionError) as error:
        raise DataError("not a JSON object", where=where, remedy="leave out the `#key` to take the line itself") from error
    if not isinstance(value, dict) or not isinstance(value.get(key), str):
        raise DataError(f"no text under {key!r}", where=where, remedy="name a key that holds a text on every line, after `#`")
    text: str = value[key]
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        raise DataError("half a surrogate pair has no bytes", where=where, remedy="the text was cut inside a character; mend it or leave it out")
    return text


def refuse(pairings: Iterable[Pairing], likelihoods: Iterable[Likelihood], floor: float, most: float) -> None:
    """Raises Refused for the first pairing whose boundary share lies below `floor`, or whose disagreement lies above `most` (with the
    low end of its interval: a short sample proves nothing), and for a teacher that its template makes worse by WORSE.
    """
    for p in pairings:
        where = f"{p.teacher} -> student, {' '.join(filter(None, (p.skill, p.language)))}"
        if p.boundary < floor:
            raise Refused(f"only {p.boundary:.0%} of the student's tokens stand on a common boundary (floor {floor:.0%})", where=where,
                          remedy="choose a teacher or student whose tokenizers are nearer, or lower check.floor")
        if p.boundaries and wilson(round(p.disagreement * p.boundaries), p.boundaries)[0] > most:
            raise Refused(f"{p.disagreement:.1%} of the common boundaries disagree on the event (at most {most:.1%})", where=where,
                          remedy="choose a teacher or student whose tokenizers are nearer, or raise check.disagreement")
    for one in likelihoods:
        if not one.language and one.low is not None and one.low > WORSE:
            raise Refused(f"its chat template costs it {one.template - one.bare:.2f} bits a byte: {one.template:.2f} on the reference answers, "
                          f"{one.bare:.2f} without any template", where=f"{one.teacher}, {one.conversations} answers",
                          remedy="the template is not the one it was trained with: give the model's own chat_template.jinja, or an instruct model")
