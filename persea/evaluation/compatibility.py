"""Is this pairing sound? Measured on the bytes of real conversations before anything is asked or trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from math import log, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from persea.alignment.event_map import EventMap, event_map_digest
from persea.alignment.spans import CommonBoundaries, SupervisionKind, align_batch
from persea.chat.messages import Conversation, RenderedTokens, Text
from persea.chat.renderer import ChatRenderer
from persea.data.text_files import read_text_lines
from persea.errors import DataError, RefusedError
from persea.tasks.intervals import Z95, wilson_interval
from persea.teachers.teacher import Teacher
from persea.tokenization.vocabulary import Vocabulary

# Bits per byte by which a chat template may be worse than no template. Measured on the qwen sapling (tests/evaluation/test_compatibility.py): the
# newlines of its template lost cost it .01, its empty thought lost, as under Qwen 2.5's template, .74. A slip of wording passes, a notation it was
# not trained with does not.
MAX_TEMPLATE_EXCESS_BITS_PER_BYTE = 0.25

MIN_COUNTED_PROBABILITY = (
    1e-3  # tokens below it are taken to stand where a teacher's kept mass is counted
)

TEXT_FILES_SKILL = "texts"  # what stands for a skill where a recipe's own texts are measured

# The teacher's probability mass that boundary masks leave, at each common boundary of a batch: in [0, 1].
RetainedMassFunction = Callable[
    [Sequence[RenderedTokens], Sequence[RenderedTokens], CommonBoundaries], npt.NDArray[np.float64]
]


@dataclass(frozen=True)
class ConversationSample:
    """Answered conversations of one kind: a skill's reference answers in one language, or the lines of a text.

    names  what to call each in a message
    """

    skill: str
    language: str
    conversations: tuple[Conversation, ...]
    labels: tuple[str, ...]

    def is_supported_by(self, renderer: ChatRenderer) -> bool:
        """Whether it needs no notation for tools that this voice's family lacks: such a teacher is not asked, and has nothing to check."""
        return renderer.family.is_tool_text_verbatim is not None or not any(
            c.tools for c in self.conversations
        )

    def render(self, renderer: ChatRenderer) -> list[RenderedTokens]:
        """In a voice. Raises DataError where its tokenizer or template cannot say one."""
        out = []
        for name, conversation in zip(self.labels, self.conversations, strict=True):
            try:
                out.append(renderer.render(conversation))
            except DataError as error:
                raise DataError(
                    error.message, where=f"{error.where}, {name}", remedy=error.remedy
                ) from error
        return out


@dataclass(frozen=True)
class PairCompatibility:
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
    num_boundaries: int
    boundary_share: float
    partial_token_share: float
    span_share: float
    cross_entropy_only_share: float
    one_to_one_share: float
    event_disagreement: float
    space_event_share: float
    mean_event_bytes: float
    mean_token_bytes: float
    retained_mass_mean: float | None = None
    retained_mass_p5: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class TemplateLikelihood:
    """A teacher's bits per byte on reference answers: asked in its own template, and after the bare question.

    language  "" = all of them
    low       lower end of the 95 % interval of template - bare, over conversations; None where there is one
    """

    teacher: str
    language: str
    conversations: int
    num_bytes: int
    template_bits_per_byte: float
    bare_bits_per_byte: float
    excess_low: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def check_pair(
    teacher_name: str,
    teacher_renderer: ChatRenderer,
    student_renderer: ChatRenderer,
    event_map: EventMap,
    sample: ConversationSample,
    student_tokens: Sequence[RenderedTokens],
    retained_mass: RetainedMassFunction | None = None,
) -> PairCompatibility:
    """Lay the teacher's renderings over the student's (`mine`). Raises DataError where bytes cannot be located, or the bridge is another
    pair's.
    """
    if event_map.digest != event_map_digest(teacher_renderer, student_renderer):
        raise DataError(
            "this bridge was built for other tokenizers",
            where=f"{teacher_name} -> student",
            remedy="open the bridge of these two voices",
        )
    theirs = sample.render(teacher_renderer)
    found = align_batch(student_tokens, theirs)
    both, ids_S, ids_T = (
        found.boundaries,
        _concatenate_ids(student_tokens),
        _concatenate_ids(theirs),
    )
    learned = int((found.supervision_S >= 0).sum())
    shares = np.bincount(
        found.supervision_S[found.supervision_S >= 0], minlength=len(SupervisionKind)
    ) / max(1, learned)
    token_C = ids_S[both.student_C]
    event_C = event_map.student_event_V[token_C]
    differ_C = event_C != event_map.teacher_event_W[ids_T[both.teacher_C]]
    said_C = (student_renderer.vocabulary.lengths_W[token_C] > 0) & (event_C >= 0)
    told_C = _bytes_per_event(event_map, student_renderer.vocabulary)[event_C[said_C]]
    mass_C = retained_mass(student_tokens, theirs, both) if retained_mass and len(token_C) else None
    return PairCompatibility(
        teacher_name,
        sample.skill,
        sample.language,
        len(student_tokens),
        learned,
        len(token_C),
        float(shares[SupervisionKind.EVENT]),
        float(shares[SupervisionKind.PARTIAL_TOKEN]),
        float(shares[SupervisionKind.SPAN]),
        float(shares[SupervisionKind.TEXT]) if learned else 1.0,
        found.spans.num_one_to_one / max(1, len(found.spans.student_C2)),
        _mean(differ_C),
        _mean(_is_space_token(token_C, student_renderer.vocabulary)),
        _mean(told_C),
        _mean(student_renderer.vocabulary.lengths_W[token_C[said_C]]),
        None if mass_C is None else _mean(mass_C),
        None if mass_C is None else float(np.quantile(mass_C, 0.05)),
    )


def _concatenate_ids(renderings: Sequence[RenderedTokens]) -> npt.NDArray[np.int32]:
    return np.concatenate([np.empty(0, np.int32), *(r.ids_T for r in renderings)])


def _mean(values: npt.NDArray[Any]) -> float:
    return float(values.mean()) if len(values) else 0.0


def _bytes_per_event(event_map: EventMap, vocabulary: Vocabulary) -> npt.NDArray[np.int32]:
    """Bytes of each event: those of its shortest student token, which begins all the others."""
    offsets_E1, tokens = event_map.tokens_by_event
    return np.minimum.reduceat(vocabulary.lengths_W[tokens], offsets_E1[:-1])


def _is_space_token(ids: npt.NDArray[np.int32], vocabulary: Vocabulary) -> npt.NDArray[np.bool_]:
    kinds, which = np.unique(ids, return_inverse=True)
    pieces = [vocabulary.bytes_W[i] or b"x" for i in kinds.tolist()]
    return np.array([not p.strip(b" \t") for p in pieces], np.bool_)[which]


def measure_template_likelihood(
    teacher: Teacher, samples: Sequence[ConversationSample]
) -> list[TemplateLikelihood]:
    """Of the answers of all samples, then by language. The bare text is the question, a newline, and the answer.

    Two forward passes over every answer; answers without a byte say nothing and are left out.
    """
    languages = [s.language for s in samples for _ in s.conversations]
    asked = [replace(c, effort=teacher.effort) for s in samples for c in s.conversations]
    bare = [_encode_without_template(teacher.renderer, c) for c in asked]
    plain = teacher.engine.compute_logprobs([ids for ids, _ in bare], [learn for _, learn in bare])
    rows = np.zeros((len(asked), 3))
    for k, ((tokens, logprobs), (ids, learn), bare_logprobs) in enumerate(
        zip(teacher.compute_logprobs(asked), bare, plain, strict=True)
    ):
        said = (tokens.starts_T >= 0) & (tokens.ends_T > tokens.starts_T)
        size = (tokens.ends_T - tokens.starts_T)[said & tokens.loss_mask_T].sum()
        rows[k] = (
            size,
            _bits_per_token(logprobs, tokens.ids_T[tokens.loss_mask_T])[
                said[tokens.loss_mask_T]
            ].sum(),
            _bits_per_token(bare_logprobs, ids[learn]).sum(),
        )
    names = np.array(languages, object)[rows[:, 0] > 0]
    rows = rows[rows[:, 0] > 0]
    return [
        _summarize_likelihood(teacher.name, name, rows[(names == name) | (not name)])
        for name in dict.fromkeys(["", *names.tolist()])
        if len(rows)
    ]


def make_retained_mass(teacher: Teacher, event_map: EventMap) -> RetainedMassFunction:
    """What of a teacher's own distributions the boundary masks leave; one forward pass over every answer.

    Counted over tokens of probability LIKELY or more: with a real vocabulary there are some ten of these at a boundary, and 262,144 in all.
    """

    def kept(
        mine: Sequence[RenderedTokens], theirs: Sequence[RenderedTokens], both: CommonBoundaries
    ) -> npt.NDArray[np.float64]:
        mass_C = np.ones(len(both.student_C))
        if event_map.teacher_mask is None:
            return mass_C
        begin_s, begin_t, at = 0, 0, 0
        scored = teacher.engine.compute_logprobs(
            [t.ids_T for t in theirs], [t.loss_mask_T for t in theirs]
        )
        for s, t, logprobs_NW in zip(mine, theirs, scored, strict=True):
            end = int(np.searchsorted(both.student_C, begin_s + len(s)))
            contexts = event_map.teacher_mask.other.supervised_context_ids(
                s, both.student_C[at:end] - begin_s
            )
            rows = (np.cumsum(t.loss_mask_T) - 1)[both.teacher_C[at:end] - begin_t]
            for c, (context, row) in enumerate(zip(contexts.tolist(), rows.tolist(), strict=True)):
                likely = np.flatnonzero(logprobs_NW[row].numpy() >= log(MIN_COUNTED_PROBABILITY))
                mass_C[at + c] = 1 - float(
                    logprobs_NW[row, event_map.teacher_mask.impossible_tokens(context, likely)]
                    .exp()
                    .sum()
                )
            begin_s, begin_t, at = begin_s + len(s), begin_t + len(t), end
        return mass_C

    return kept


def _encode_without_template(
    renderer: ChatRenderer, conversation: Conversation
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
    """Ids of a conversation without any template, and which of them are the answer's. A BOS stands where the template has one: some models
    say nothing sensible without.
    """
    kept = renderer.family.normalise(conversation)
    question, answer = (
        "\n".join(m.text for m in conversation.messages[:-1]) + "\n",
        kept.messages[-1].text,
    )
    bos = renderer.vocabulary.control_token_ids.get(renderer.special_tokens.get("bos_token", ""))
    front = (
        [bos]
        if bos is not None and int(renderer.render_prompt(conversation).ids_T[0]) == bos
        else []
    )
    before, after = renderer.vocabulary.encode_batch([question, answer])
    ids = np.array([*front, *before, *after], np.int32)
    return ids, np.arange(len(ids)) >= len(ids) - len(after)


def _bits_per_token(logprobs: Any, ids_N: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
    bits: npt.NDArray[np.float64] = -logprobs.numpy()[np.arange(len(ids_N)), ids_N].astype(
        np.float64
    ) / np.log(2)
    return bits


def _summarize_likelihood(
    teacher: str, language: str, rows_N3: npt.NDArray[np.float64]
) -> TemplateLikelihood:
    """Totals of (bytes, bits in the template, bits of the bare text); the interval is that of a ratio of sums over conversations."""
    size, template, bare = rows_N3.sum(axis=0)
    excess = (template - bare) / size
    n, rest = len(rows_N3), rows_N3[:, 1] - rows_N3[:, 2] - excess * rows_N3[:, 0]
    low = excess - Z95 * sqrt(n * float(rest.var(ddof=1))) / size if n > 1 else None
    return TemplateLikelihood(
        teacher,
        language,
        n,
        int(size),
        float(template / size),
        float(bare / size),
        None if low is None else float(low),
    )


def read_texts(language: str, file_ref: str, max_lines: int) -> ConversationSample:
    """The first lines of a text file, as answers to nothing. `FILE#key` takes that key of a JSON object on every line.

    Raises DataError where the file is missing, no UTF-8, holds no text, or a line has no such key.
    """
    name, _, _ = file_ref.partition("#")
    where = f"check.texts.{language}, {name}"
    texts = read_text_lines(file_ref, where, max_lines)
    said = tuple(Conversation.from_question("").with_answer(Text(text)) for _, text in texts)
    return ConversationSample(
        TEXT_FILES_SKILL,
        language,
        said,
        tuple(f"{Path(name).name}:{number}" for number, _ in texts),
    )


def refuse_incompatible(
    pairings: Iterable[PairCompatibility],
    likelihoods: Iterable[TemplateLikelihood],
    min_boundary_share: float,
    max_event_disagreement: float,
) -> None:
    """Raises Refused for the first pairing whose boundary share lies below `floor`, or whose disagreement lies above `most` (with the
    low end of its interval: a short sample proves nothing), and for a teacher that its template makes worse by WORSE.
    """
    for p in pairings:
        where = f"{p.teacher} -> student, {' '.join(filter(None, (p.skill, p.language)))}"
        if p.boundary_share < min_boundary_share:
            raise RefusedError(
                f"only {p.boundary_share:.0%} of the student's tokens stand on a common boundary (floor {min_boundary_share:.0%})",
                where=where,
                remedy="choose a teacher or student whose tokenizers are nearer, or lower check.min_common_share",
            )
        if (
            p.num_boundaries
            and wilson_interval(round(p.event_disagreement * p.num_boundaries), p.num_boundaries)[0]
            > max_event_disagreement
        ):
            raise RefusedError(
                f"{p.event_disagreement:.1%} of the common boundaries disagree on the event (at most {max_event_disagreement:.1%})",
                where=where,
                remedy="choose a teacher or student whose tokenizers are nearer, or raise check.max_disagreement",
            )
    for one in likelihoods:
        if (
            not one.language
            and one.excess_low is not None
            and one.excess_low > MAX_TEMPLATE_EXCESS_BITS_PER_BYTE
        ):
            raise RefusedError(
                f"its chat template costs it {one.template_bits_per_byte - one.bare_bits_per_byte:.2f} bits a byte: {one.template_bits_per_byte:.2f} on the reference answers, "
                f"{one.bare_bits_per_byte:.2f} without any template",
                where=f"{one.teacher}, {one.conversations} answers",
                remedy="the template is not the one it was trained with: give the model's own chat_template.jinja, or an instruct model",
            )
