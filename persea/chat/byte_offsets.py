"""Locate the content bytes of a rendered conversation in its tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from persea.chat.messages import ContentPart, Conversation
from persea.chat.text_runs import TextRun
from persea.errors import DataError
from persea.tokenization.vocabulary import Vocabulary


def token_table(
    vocabulary: Vocabulary,
    ids: Sequence[int],
    run: TextRun,
    offsets: Mapping[int, int],
    answer_start: int,
    turn_ended: bool,
) -> npt.NDArray[np.int64]:
    """Return the columns of `RenderedTokens` for the tokens of one run of text.

    A token that also covers template text has no start: `.` and the line break at the end of a
    thought are often one token, and a teacher that predicts `.` alone predicts another token. The
    same holds for a token that also covers the space that the tokenizer puts before a text.

    Args:
        vocabulary: The tokenizer.
        ids: The tokens of the run, its prefix included.
        run: The run of text.
        offsets: Part index -> offset of its first retained byte, see `part_offsets`.
        answer_start: Character of the rendering at which the answer starts.
        turn_ended: Whether a stop token precedes the run.

    Returns:
        int64 [tokens, 4]: id, start and end in content bytes (-1 for none), in the loss mask.

    Raises:
        DataError: One token covers the end of the prompt and the start of the answer.
    """
    ends = np.cumsum(vocabulary.lengths_W[np.asarray(ids, np.int64)]) - len(run.prefix)
    starts = ends - vocabulary.lengths_W[np.asarray(ids, np.int64)]
    table = np.full((len(ids), 4), -1, np.int64)
    table[:, 0] = ids
    answer_byte = len(run.text[: max(0, answer_start - run.start_char)].encode())
    begins = np.maximum(starts, 0)  # the prefix belongs to the side on which the run begins
    if ((begins < answer_byte) & (ends > answer_byte)).any():
        answer = run.text.encode()[answer_byte : answer_byte + 20].decode(errors="replace")
        raise DataError(
            f"one token covers the end of the prompt and the start of the answer {answer!r}",
            where=vocabulary.name,
            remedy="no model can generate this answer after this prompt; leave it out",
        )
    if 0 < answer_byte < len(run.text.encode()):
        num_prompt = int((ends <= answer_byte).sum())
        prompt = run.prefix + run.text[: answer_start - run.start_char]
        _refuse_changed_prompt(vocabulary, list(ids[:num_prompt]), prompt)
    table[:, 3] = (begins >= answer_byte) & (not turn_ended)
    content_bytes = np.zeros(len(ids), np.int64)  # bytes of content in each token
    for a, b, part, skipped in run.content_spans:
        offset = offsets[part] + skipped - a
        starts_inside = (starts >= a) & (starts < b)
        table[starts_inside, 1] = starts[starts_inside] + offset
        touches = (ends > a) & (starts < b)
        table[touches, 2] = np.minimum(ends[touches], b) + offset
        content_bytes += np.clip(np.minimum(ends, b) - np.maximum(starts, a), 0, None)
    table[content_bytes < ends - starts, 1] = -1
    return table


def _refuse_changed_prompt(vocabulary: Vocabulary, ids: list[int], prompt: str) -> None:
    """Refuse an answer that changes the tokens of the prompt before it.

    GPT-2's tokenizer writes two line breaks as one token at the end of a prompt, and as two before
    a word: the model never sees the two.
    """
    if ids != vocabulary.encode(prompt):
        raise DataError(
            "the last tokens of the prompt change when the answer follows: the ids of the prompt "
            "are no prefix of the conversation's ids",
            where=vocabulary.name,
            remedy="no model sees this prompt when it generates; leave the conversation out, or "
            "use a chat template that ends its prompt with a control token",
        )


def part_offsets(
    original: Conversation,
    normalised: Conversation,
    has_bytes: Callable[[ContentPart], bool],
    family: str,
) -> dict[int, int]:
    """Return part index -> offset of its first retained byte in the original content.

    Args:
        original: The conversation as given.
        normalised: The conversation as the family keeps it.
        has_bytes: Whether the template writes a part's text unchanged.
        family: Name of the family, for messages.

    Raises:
        DataError: A part of the normalised conversation is no substring of the original part.
    """
    offsets: dict[int, int] = {}
    position = 0
    pairs = zip(original.parts(), normalised.parts(), strict=True)
    for i, (full, part) in enumerate(pairs):
        offset = full.text.find(part.text) if has_bytes(part) else 0
        if offset < 0:
            raise DataError(
                f"content part {i} was rewritten, not trimmed",
                where=family,
                remedy="a family may drop or trim content, nothing else",
            )
        offsets[i] = position + len(full.text[:offset].encode())
        position += len(full.text.encode()) + 1
    return offsets
