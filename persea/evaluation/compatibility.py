"""Compatibility check: is a teacher usable for this student?

Measured on real conversations, before the capture and the training: how many student tokens begin
at a common boundary, how often the two tokenizers disagree on the event there, and whether the
teacher's chat template suits the teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from persea.alignment.event_map import EventMap, event_map_digest
from persea.alignment.spans import SupervisionKind, align_batch
from persea.chat.messages import Conversation, Text
from persea.chat.renderer import ChatRenderer
from persea.data.text_files import read_text_lines
from persea.errors import DataError, RefusedError
from persea.evaluation.retained_mass import RetainedMassFunction, summarize_mass
from persea.tasks.intervals import Z95, wilson_interval
from persea.tasks.task import Task, TaskItem
from persea.teachers.teacher import Teacher
from persea.tokenization.tokens import RenderedTokens
from persea.tokenization.vocabulary import Vocabulary

# Bits per byte by which a chat template may be worse than no template. Measured on the qwen sapling
# (tests/evaluation/test_compatibility.py): losing the newlines of its template costs .01, losing
# the empty thinking block, as under Qwen 2.5's template, .74. A small change of wording passes, a
# format that the model was not trained with does not.
MAX_TEMPLATE_EXCESS_BITS_PER_BYTE = 0.25
TEXT_FILES_SKILL = "texts"  # the skill of samples from `check.texts`


@dataclass(frozen=True)
class ConversationSample:
    """Answered conversations of one kind.

    Attributes:
        skill: The skill whose reference answers these are, or TEXT_FILES_SKILL.
        language: Their language.
        conversations: Conversations that end with an answer.
        labels: Name of each conversation in messages.
    """

    skill: str
    language: str
    conversations: tuple[Conversation, ...]
    labels: tuple[str, ...]

    @property
    def is_documents(self) -> bool:
        """Whether these are plain texts without roles."""
        return any(c.is_document for c in self.conversations)

    def is_supported_by(self, renderer: ChatRenderer) -> bool:
        """Return whether a family can render the sample; only tools can be unsupported.

        Prompts that a teacher's family cannot render are not given to the teacher, so there is
        nothing to check.
        """
        return renderer.family.is_tool_text_verbatim is not None or not any(
            c.tools for c in self.conversations
        )

    def render(self, renderer: ChatRenderer) -> list[RenderedTokens]:
        """Render all conversations.

        Raises:
            DataError: The tokenizer or template cannot render one; names it.
        """
        rendered = []
        for label, conversation in zip(self.labels, self.conversations, strict=True):
            try:
                rendered.append(renderer.render(conversation))
            except DataError as error:
                raise DataError(
                    error.message, where=f"{error.where}, {label}", remedy=error.remedy
                ) from error
        return rendered


@dataclass(frozen=True)
class PairCompatibility:
    """How a teacher's tokens align with the student's on one sample.

    The first four shares are of the student's supervised tokens and sum to 1 (see SupervisionKind).

    Attributes:
        teacher: Name of the teacher.
        skill: Skill of the sample.
        language: Language of the sample.
        conversations: Number of conversations.
        tokens: Supervised student tokens.
        num_boundaries: Common boundaries.
        boundary_share: Tokens where both tokenizers begin a token: taught by events.
        partial_token_share: Tokens inside a teacher token that begins at a common boundary.
        span_share: Tokens in a span whose two ends only are common boundaries.
        cross_entropy_only_share: Tokens without any target of the teacher: markers, and text that
            only the student's rendering has.
        one_to_one_share: Of all spans, those of one student and one teacher token.
        event_disagreement: Of the common boundaries, those where the two tokens map to different
            events.
        space_event_share: Of the common boundaries, those before a run of spaces and tabs: an
            event that does not determine its length.
        mean_event_bytes: Bytes that the event determines, mean over common boundaries.
        mean_token_bytes: Bytes of the student token there.
        retained_mass_mean: Teacher probability that the boundary masks retain; None if not
            measured.
        retained_mass_p5: 95 % of the boundaries retain more.
        retained_mass_low: Lower end of the 95 % interval of the mean over conversations; None for
            a single one.
        retained_mass_high: Its upper end.
        num_mass_boundaries: Common boundaries at which the mass was measured.
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
    retained_mass_low: float | None = None
    retained_mass_high: float | None = None
    num_mass_boundaries: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON; keys are the field names."""
        return asdict(self)


@dataclass(frozen=True)
class TemplateLikelihood:
    """A teacher's bits per byte on reference answers, with and without its chat template.

    Attributes:
        teacher: Name of the teacher.
        language: Language of the answers; "" for all.
        conversations: Number of answers.
        num_bytes: Bytes of the answers.
        template_bits_per_byte: After the question in the teacher's template.
        bare_bits_per_byte: After the bare question.
        excess_low: Lower end of the 95 % interval of template - bare over conversations; None for
            a single one.
    """

    teacher: str
    language: str
    conversations: int
    num_bytes: int
    template_bits_per_byte: float
    bare_bits_per_byte: float
    excess_low: float | None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON; keys are the field names."""
        return asdict(self)


def check_pair(
    teacher_name: str,
    teacher_renderer: ChatRenderer,
    student_renderer: ChatRenderer,
    event_map: EventMap,
    sample: ConversationSample,
    student_tokens: Sequence[RenderedTokens],
    retained_mass: RetainedMassFunction | None = None,
    mass_conversations: Sequence[int] | None = None,
) -> PairCompatibility:
    """Align a teacher's renderings of a sample with the student's.

    Args:
        teacher_name: Name for the result.
        teacher_renderer: The teacher's tokenizer and template.
        student_renderer: The student's.
        event_map: Event map of the two.
        sample: Conversations.
        student_tokens: The sample rendered by `student_renderer`.
        retained_mass: Measures retained probability mass; None leaves it out.
        mass_conversations: Conversations of the sample that it is measured on; None = all.

    Raises:
        DataError: Bytes cannot be located, or the event map belongs to other tokenizers.
    """
    if event_map.digest != event_map_digest(teacher_renderer, student_renderer):
        raise DataError(
            "this event map was built for other tokenizers",
            where=f"{teacher_name} -> student",
            remedy="load the event map of these two chat renderers",
        )
    teacher_tokens = sample.render(teacher_renderer)
    alignment = align_batch(student_tokens, teacher_tokens)
    boundaries = alignment.boundaries
    student_ids_S = _concatenate_ids(student_tokens)
    teacher_ids_T = _concatenate_ids(teacher_tokens)
    kinds_N = alignment.supervision_S[alignment.supervision_S >= 0]
    num_supervised = len(kinds_N)
    shares = np.bincount(kinds_N, minlength=len(SupervisionKind)) / max(1, num_supervised)
    ids_C = student_ids_S[boundaries.student_C]
    event_C = event_map.student_event_V[ids_C]
    differs_C = event_C != event_map.teacher_event_W[teacher_ids_T[boundaries.teacher_C]]
    vocabulary = student_renderer.vocabulary
    has_bytes_C = (vocabulary.lengths_W[ids_C] > 0) & (event_C >= 0)
    event_bytes = _bytes_per_event(event_map, vocabulary)[event_C[has_bytes_C]]
    mass: dict[str, Any] = {}
    if retained_mass and len(ids_C):
        chosen = range(len(student_tokens)) if mass_conversations is None else mass_conversations
        mass = summarize_mass(
            retained_mass, [student_tokens[k] for k in chosen], [teacher_tokens[k] for k in chosen]
        )
    return PairCompatibility(
        teacher_name,
        sample.skill,
        sample.language,
        len(student_tokens),
        num_supervised,
        len(ids_C),
        float(shares[SupervisionKind.EVENT]),
        float(shares[SupervisionKind.PARTIAL_TOKEN]),
        float(shares[SupervisionKind.SPAN]),
        float(shares[SupervisionKind.TEXT]) if num_supervised else 1.0,
        alignment.spans.num_one_to_one / max(1, len(alignment.spans.student_C2)),
        _mean(differs_C),
        _mean(_is_space_token(ids_C, vocabulary)),
        _mean(event_bytes),
        _mean(vocabulary.lengths_W[ids_C[has_bytes_C]]),
        **mass,
    )


def _concatenate_ids(renderings: Sequence[RenderedTokens]) -> npt.NDArray[np.int32]:
    return np.concatenate([np.empty(0, np.int32), *(r.ids_T for r in renderings)])


def _mean(values: npt.NDArray[Any]) -> float:
    return float(values.mean()) if len(values) else 0.0


def _bytes_per_event(event_map: EventMap, vocabulary: Vocabulary) -> npt.NDArray[np.int32]:
    """Return the bytes of each event [E]: those of its shortest student token, a prefix of the
    others.
    """
    offsets_E1, tokens = event_map.tokens_by_event
    return np.minimum.reduceat(vocabulary.lengths_W[tokens], offsets_E1[:-1])


def _is_space_token(ids: npt.NDArray[np.int32], vocabulary: Vocabulary) -> npt.NDArray[np.bool_]:
    distinct, index = np.unique(ids, return_inverse=True)
    pieces = [vocabulary.bytes_W[i] or b"x" for i in distinct.tolist()]
    return np.array([not p.strip(b" \t") for p in pieces], np.bool_)[index]


def measure_template_likelihood(
    teacher: Teacher,
    samples: Sequence[ConversationSample],
    on_answer: Callable[[], None] = lambda: None,
) -> list[TemplateLikelihood]:
    """Compare a teacher's likelihood of reference answers with and without its chat template.

    Without the template, the text is the question, a newline and the answer. Costs two forward
    passes over every answer; empty answers are left out.

    Args:
        teacher: The teacher; its engine must have full distributions.
        samples: Conversations with reference answers.
        on_answer: Called after each answer.

    Returns:
        One result for all answers, then one per language.
    """
    languages = [s.language for s in samples for _ in s.conversations]
    conversations = [replace(c, effort=teacher.effort) for s in samples for c in s.conversations]
    bare = [_encode_without_template(teacher.renderer, c) for c in conversations]
    bare_logprobs = teacher.engine.compute_logprobs(
        [ids_T for ids_T, _ in bare], [mask_T for _, mask_T in bare]
    )
    rows_N3 = np.zeros((len(conversations), 3))  # bytes, bits in the template, bits without it
    for k, ((tokens, logprobs_NW), (ids_T, mask_T), bare_NW) in enumerate(
        zip(teacher.compute_logprobs(conversations), bare, bare_logprobs, strict=True)
    ):
        has_bytes_T = (tokens.starts_T >= 0) & (tokens.ends_T > tokens.starts_T)
        template_bits_N = _bits_per_token(logprobs_NW, tokens.ids_T[tokens.loss_mask_T])
        rows_N3[k] = (
            (tokens.ends_T - tokens.starts_T)[has_bytes_T & tokens.loss_mask_T].sum(),
            template_bits_N[has_bytes_T[tokens.loss_mask_T]].sum(),
            _bits_per_token(bare_NW, ids_T[mask_T]).sum(),
        )
        on_answer()
    language_N = np.array(languages, object)[rows_N3[:, 0] > 0]
    rows_N3 = rows_N3[rows_N3[:, 0] > 0]
    if not len(rows_N3):
        return []
    return [
        _summarize_likelihood(
            teacher.name, language, rows_N3[(language_N == language) | (not language)]
        )
        for language in dict.fromkeys(["", *language_N.tolist()])
    ]


def _encode_without_template(
    renderer: ChatRenderer, conversation: Conversation
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
    """Encode question and answer without a template; return ids [T] and the answer's mask [T].

    A BOS is added if the template has one: some models need it for any sensible output.
    """
    answer = renderer.family.normalise(conversation).messages[-1].text
    question = "\n".join(m.text for m in conversation.messages[:-1]) + "\n"
    bos = renderer.vocabulary.control_token_ids.get(renderer.special_tokens.get("bos_token", ""))
    has_bos = bos is not None and int(renderer.render_prompt(conversation).ids_T[0]) == bos
    question_ids, answer_ids = renderer.vocabulary.encode_batch([question, answer])
    ids_T = np.array([*([bos] if has_bos else []), *question_ids, *answer_ids], np.int32)
    return ids_T, np.arange(len(ids_T)) >= len(ids_T) - len(answer_ids)


def _bits_per_token(logprobs_NW: Any, ids_N: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
    logprob_N = logprobs_NW.numpy()[np.arange(len(ids_N)), ids_N].astype(np.float64)
    bits_N: npt.NDArray[np.float64] = -logprob_N / np.log(2)
    return bits_N


def _summarize_likelihood(
    teacher: str, language: str, rows_N3: npt.NDArray[np.float64]
) -> TemplateLikelihood:
    """Sum (bytes, template bits, bare bits); the interval is that of a ratio of sums."""
    num_bytes, template_bits, bare_bits = rows_N3.sum(axis=0)
    excess = (template_bits - bare_bits) / num_bytes
    n = len(rows_N3)
    residual_N = rows_N3[:, 1] - rows_N3[:, 2] - excess * rows_N3[:, 0]
    low = None
    if n > 1:
        low = float(excess - Z95 * sqrt(n * float(residual_N.var(ddof=1))) / num_bytes)
    return TemplateLikelihood(
        teacher,
        language,
        n,
        int(num_bytes),
        float(template_bits / num_bytes),
        float(bare_bits / num_bytes),
        low,
    )


def reference_samples(
    tasks: Iterable[tuple[Task, Sequence[TaskItem]]], max_answers: int | None = None
) -> list[ConversationSample]:
    """Return the reference answers of tasks as samples, one for each task and language.

    Args:
        tasks: Tasks with their items; items without a reference answer are left out, as some
            published questions have none.
        max_answers: Reference answers of one task and language, at most; None = all.
    """
    samples = []
    for task, items in tasks:
        answered = [i for i in items if i.reference or i.calls]
        for language in dict.fromkeys(i.prompt.language for i in answered):
            chosen = [i for i in answered if i.prompt.language == language][:max_answers]
            samples.append(
                ConversationSample(
                    task.name,
                    language,
                    tuple(i.reference_conversation for i in chosen),
                    tuple(i.prompt.id for i in chosen),
                )
            )
    return samples


def read_texts(language: str, file_ref: str, max_lines: int) -> ConversationSample:
    """Read the first lines of a text file, as answers to an empty question.

    Args:
        language: Language of the file.
        file_ref: `FILE` or `FILE#key`, see `read_text_lines`.
        max_lines: Lines to read at most.

    Raises:
        DataError: See `read_text_lines`.
    """
    name, _, _ = file_ref.partition("#")
    texts = read_text_lines(file_ref, f"check.texts.{language}, {name}", max_lines)
    return ConversationSample(
        TEXT_FILES_SKILL,
        language,
        tuple(Conversation.from_question("").with_answer(Text(text)) for _, text in texts),
        tuple(f"{Path(name).name}:{number}" for number, _ in texts),
    )


def refuse_incompatible(
    pairings: Iterable[PairCompatibility],
    likelihoods: Iterable[TemplateLikelihood],
    min_common_share: float,
    max_disagreement: float,
    max_template_excess: float = MAX_TEMPLATE_EXCESS_BITS_PER_BYTE,
) -> None:
    """Check measurements against their limits.

    Args:
        pairings: Results of `check_pair`.
        likelihoods: Results of `measure_template_likelihood`.
        min_common_share: Lowest share of student tokens at a common boundary.
        max_disagreement: Highest share of boundaries with different events; compared with
            the lower end of its interval, since a short sample proves nothing.
        max_template_excess: Bits per byte by which a template may be worse than none; compared
            with the lower end of its interval.

    Raises:
        RefusedError: The first measurement beyond its limit.
    """
    for p in pairings:
        where = f"{p.teacher} -> student, {' '.join(filter(None, (p.skill, p.language)))}"
        if p.boundary_share < min_common_share:
            raise RefusedError(
                f"only {p.boundary_share:.0%} of the student's tokens begin at a common boundary "
                f"(floor {min_common_share:.0%})",
                where=where,
                remedy="choose a teacher or student with more similar tokenizers, "
                "or lower check.min_common_share",
            )
        num_different = round(p.event_disagreement * p.num_boundaries)
        if (
            p.num_boundaries
            and wilson_interval(num_different, p.num_boundaries)[0] > max_disagreement
        ):
            raise RefusedError(
                f"{p.event_disagreement:.1%} of the common boundaries have different events "
                f"(at most {max_disagreement:.1%})",
                where=where,
                remedy="choose a teacher or student with more similar tokenizers, "
                "or raise check.max_disagreement",
            )
    for one in likelihoods:
        if one.language or one.excess_low is None or one.excess_low <= max_template_excess:
            continue
        excess = one.template_bits_per_byte - one.bare_bits_per_byte
        raise RefusedError(
            f"its chat template costs {excess:.2f} bits per byte: "
            f"{one.template_bits_per_byte:.2f} on the reference answers, "
            f"{one.bare_bits_per_byte:.2f} without a template",
            where=f"{one.teacher}, {one.conversations} answers",
            remedy="the model was not trained with this template: give its own "
            "chat_template.jinja, or an instruct model; where the answers are unlike all it knows, "
            "raise check.max_template_excess",
        )
