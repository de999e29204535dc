"""Prompts with skill and language, and the corpus: all prompts without duplicates and test items.

Removed prompts are kept in the corpus with the reason, so that every input is accounted for.
"""

from __future__ import annotations

from bisect import bisect
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import accumulate
from typing import Any, TypeVar

from persea.chat.messages import PART_KINDS, ContentPart, Conversation, Text, ThinkingEffort
from persea.data.dedup import (
    DEFAULT_DEDUP_OPTIONS,
    DedupOptions,
    HeldOutIndex,
    NearDuplicateIndex,
    normalize_text,
)
from persea.errors import RefusedError

# Multiples of the golden ratio modulo 1 fill [0, 1) evenly in every stretch; so do those of the
# silver ratio, and the pairs of both the unit square. Teacher and effort of a prompt are therefore
# independent of each other.
GOLDEN_RATIO_STEP = 0.6180339887498949
SILVER_RATIO_STEP = 0.41421356237309515


@dataclass(frozen=True)
class Prompt:
    """A conversation for teachers to answer, or a document for them to score.

    Attributes:
        id: Unique within a corpus.
        conversation: Ends with the user's turn, or is a document.
        skill: Skill that the answer teaches.
        language: Language code of the answer; "" if unknown.
        answer: Text of the source's own answer; "" if there is none.
        answer_parts: The source's own answer, where it has more than a text: a thought or calls.
        effort: Thinking effort of the answer, in capture and in training. None = the teacher's own
            effort in capture, and an answer without thinking in training.
    """

    id: str
    conversation: Conversation
    skill: str
    language: str
    answer: str = ""
    effort: ThinkingEffort | None = None
    answer_parts: tuple[ContentPart, ...] = ()

    @property
    def given_parts(self) -> tuple[ContentPart, ...]:
        """The source's own answer; () if there is none."""
        return self.answer_parts or ((Text(self.answer),) if self.answer else ())

    @property
    def given_text(self) -> str:
        """All texts of the source's own answer: its thought, its words, arguments of calls."""
        return "\n".join(part.text for part in self.given_parts)


Choice = TypeVar("Choice")
MALFORMED_LINE_REASON = "malformed line"


def pick_by_share(shares: Sequence[tuple[Choice, float]], number: int, step: float) -> Choice:
    """Choose one of several by fixed shares, without random numbers.

    Args:
        shares: (choice, share) pairs; the shares sum to 1.
        number: Position of the item, from 0.
        step: An irrational number, such as `GOLDEN_RATIO_STEP`.

    Returns:
        A choice. The shares hold in every stretch of consecutive numbers.
    """
    choices, parts = zip(*shares, strict=True)
    found: Choice = choices[
        min(len(choices) - 1, bisect(list(accumulate(parts)), (number + 1) * step % 1))
    ]
    return found


def assign_efforts(
    prompts: Iterable[Prompt], effort_shares: Mapping[ThinkingEffort, float]
) -> list[Prompt]:
    """Give each prompt a thinking effort.

    Args:
        prompts: The prompts of one part of the corpus, in order.
        effort_shares: Effort -> share, in any order. Empty = the prompts stay as they are.

    Returns:
        Prompts with their efforts.
    """
    shares = [
        (effort, effort_shares[effort]) for effort in ThinkingEffort if effort in effort_shares
    ]
    return [
        replace(p, effort=pick_by_share(shares, k, SILVER_RATIO_STEP)) if shares else p
        for k, p in enumerate(prompts)
    ]


class RemovalReason(StrEnum):
    """Why a prompt was left out."""

    DUPLICATE = "duplicate"
    NEAR_DUPLICATE = "near-duplicate"
    TEST_ITEM = "test item"
    CONTAMINATED = "holds a test item"
    EMPTY = "empty"
    NO_GAIN = "no teacher is better than the student"


@dataclass(frozen=True)
class RemovedPrompt:
    """A prompt that was left out.

    Attributes:
        prompt: The prompt.
        reason: Why it was left out.
        matched_id: Id of the prompt that it repeats, or of the test item that it is or contains.
    """

    prompt: Prompt
    reason: RemovalReason
    matched_id: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return a line of `capture/removed.jsonl`."""
        p = self.prompt
        return {
            "id": p.id,
            "reason": self.reason,
            "matched_id": self.matched_id,
            "skill": p.skill,
            "language": p.language,
            "conversation": p.conversation.to_json(),
            "answer": p.answer,
        } | ({"answer_parts": parts_to_json(p.answer_parts)} if p.answer_parts else {})


def parts_to_json(parts: Sequence[ContentPart]) -> list[dict[str, str]]:
    """Return parts as JSON values, as a conversation has them."""
    kinds = {part_type: name for name, part_type in PART_KINDS.items()}
    return [{"kind": kinds[type(part)], **vars(part)} for part in parts]


@dataclass(frozen=True)
class MalformedLine:
    """A line of a file that is no prompt and no text.

    Attributes:
        location: file:line.
        reason: Why the line is malformed.
        num_bytes: Length of the line.
        prefix: Its first characters.
    """

    location: str
    reason: str
    num_bytes: int
    prefix: str


@dataclass(frozen=True)
class Corpus:
    """The prompts to answer and everything that was left out.

    Attributes:
        prompts: Prompts and documents.
        removed: Prompts that were left out, each with its reason.
        malformed: Lines that are no prompts.
        notes: What readers found in the files, for people: shapes, columns that were not read.
    """

    prompts: tuple[Prompt, ...]
    removed: tuple[RemovedPrompt, ...]
    malformed: tuple[MalformedLine, ...] = ()
    notes: tuple[str, ...] = ()

    def without(self, is_left_out: Callable[[Prompt], bool], reason: RemovalReason) -> Corpus:
        """Return the corpus with some prompts moved to `removed`."""
        left_out = [p for p in self.prompts if is_left_out(p)]
        if not left_out:
            return self
        return replace(
            self,
            prompts=tuple(p for p in self.prompts if not is_left_out(p)),
            removed=(*self.removed, *(RemovedPrompt(p, reason) for p in left_out)),
        )

    def count_removed(self) -> dict[str, int]:
        """Return reason -> number of prompts, documents and lines that were left out."""
        counts = Counter[str](r.reason.value for r in self.removed)
        if self.malformed:
            counts[MALFORMED_LINE_REASON] = len(self.malformed)
        return dict(counts)

    @property
    def num_inputs(self) -> int:
        """Number of prompts and malformed lines that came in."""
        return len(self.prompts) + len(self.removed) + len(self.malformed)


def build_corpus(
    sources: Iterable[Iterable[Prompt]],
    held_out: Iterable[Prompt],
    near_duplicate_thresholds: Sequence[float | None] = (),
    dedup: DedupOptions = DEFAULT_DEDUP_OPTIONS,
    held_out_texts: Iterable[tuple[str, str]] = (),
    are_answers_given: bool = False,
) -> Corpus:
    """Collect prompts and documents without duplicates and without test items.

    Two prompts are duplicates if their texts and tools are equal after NFC, case folding and
    white-space folding; where the prompts bring their answers, both prompt and answer must be
    equal: what is learned is compared. A prompt contains a test item if it, or its answer, shares
    `dedup.ngram_words` words in a row with one.

    Args:
        sources: Prompts of each part of the corpus, in order; the first of two duplicates stays.
        held_out: Test items of every evaluation.
        near_duplicate_thresholds: For each source, the Jaccard similarity from which a prompt
            repeats an earlier one of the sources with a threshold. None or no entry = only exact
            duplicates are removed.
        dedup: Lengths of compared runs.
        held_out_texts: (name, text) of held-out documents. A prompt or answer that equals one, or
            shares `dedup.ngram_words` words in a row with one, is left out.
        are_answers_given: Whether the prompts' own answers are learned.

    Returns:
        The corpus; its prompts are in the order of the sources.
    """
    thresholds = [t for t in near_duplicate_thresholds if t is not None]
    tested = HeldOutIndex(((p.id, _dedup_text(p.conversation)) for p in held_out), dedup)
    documents = HeldOutIndex(held_out_texts, dedup)
    similar = NearDuplicateIndex(min(thresholds, default=1.0), dedup.shingle_words)
    ids_by_text: dict[tuple[bool, str], str] = {}
    prompts: list[Prompt] = []
    removed: list[RemovedPrompt] = []
    for k, source in enumerate(sources):
        threshold = near_duplicate_thresholds[k] if k < len(near_duplicate_thresholds) else None
        for prompt in source:
            question = _dedup_text(prompt.conversation)
            learned = f"{question}\n{prompt.given_text}" if are_answers_given else question
            key = prompt.conversation.is_document, normalize_text(learned)
            if not key[1]:
                removed.append(RemovedPrompt(prompt, RemovalReason.EMPTY))
            elif match := (
                tested.find_exact(question)
                or documents.find_exact(question)
                or documents.find_exact(prompt.given_text)
            ):
                removed.append(RemovedPrompt(prompt, RemovalReason.TEST_ITEM, match))
            elif key in ids_by_text:
                removed.append(RemovedPrompt(prompt, RemovalReason.DUPLICATE, ids_by_text[key]))
            elif match := _find_overlap((tested, documents), (question, prompt.given_text)):
                removed.append(RemovedPrompt(prompt, RemovalReason.CONTAMINATED, match))
            elif threshold is not None and (
                match := similar.find_or_add(prompt.id, learned, threshold)
            ):
                removed.append(RemovedPrompt(prompt, RemovalReason.NEAR_DUPLICATE, match))
            else:
                ids_by_text[key] = prompt.id
                prompts.append(prompt)
    return Corpus(tuple(prompts), tuple(removed))


def refuse_lost_parts(corpus: Corpus, parts: Sequence[Sequence[Prompt]]) -> None:
    """Check that something is left of every part of a corpus.

    Raises:
        RefusedError: A part was left out whole. The message counts the reasons.
    """
    kept = {id(prompt) for prompt in corpus.prompts}
    for k, part in enumerate(parts):
        if any(id(prompt) in kept for prompt in part):
            continue
        lost = {id(prompt) for prompt in part}
        why = Counter(r.reason.value for r in corpus.removed if id(r.prompt) in lost)
        counts = ", ".join(f"{reason} ({n:,})" for reason, n in why.items())
        raise RefusedError(
            f"nothing is left to teach; left out: {counts}",
            where=f"corpus.{k}",
            remedy="give prompts or texts that do not repeat others or hold the held-out ones, or "
            "delete the part",
        )


def _find_overlap(indexes: Sequence[HeldOutIndex], texts: Sequence[str]) -> str:
    """Return the name of a held-out text that one of the texts overlaps with, or ""."""
    return next(
        (match for index in indexes for text in texts if (match := index.find_overlap(text))), ""
    )


def _dedup_text(conversation: Conversation) -> str:
    """Return all texts and tool names: the same question with other tools is another prompt."""
    return "\n".join(
        [*(p.text for p in conversation.parts()), *(t.name for t in conversation.tools)]
    )
