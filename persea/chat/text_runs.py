"""Split a rendered conversation into control tokens and the runs of text between them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from persea.errors import DataError
from persea.tokenization.control_tokens import resolve_matches
from persea.tokenization.vocabulary import Vocabulary


@dataclass(frozen=True)
class TextRun:
    """A control token, or a run of text between control tokens.

    Attributes:
        control_id: Id of the control token; None for text.
        text: The text; "" for a control token.
        start_char: Index of the first character in the rendering.
        content_spans: (first byte, last byte + 1, part index, first byte within the part) of each
            content part within the text.
        prefix: The space that the tokenizer puts before the text, which is no part of it; or "".
    """

    control_id: int | None
    text: str
    start_char: int
    content_spans: tuple[tuple[int, int, int, int], ...]
    prefix: str = ""


def split_runs(
    vocabulary: Vocabulary, pattern: re.Pattern[str], segments: Sequence[tuple[str, int | None]]
) -> Iterator[TextRun]:
    """Yield the control tokens of the template text, and the runs of text between them.

    One token may cover text of several segments within a run. White space that a control token
    swallows is in no run, whether the template or the content wrote it.

    Args:
        vocabulary: The tokenizer.
        pattern: Matches its control tokens, the longest at each place.
        segments: The rendering as (text, index of the content part; None for template text).
    """
    full = "".join(text for text, _ in segments)
    found: list[re.Match[str]] = []
    content: list[tuple[int, int, int]] = []
    position = 0
    for text, part in segments:
        end = position + len(text)
        if part is not None:
            content.append((position, end, part))
        else:
            found += pattern.finditer(full, position, end)
        position = end
    begin = 0
    for match in resolve_matches(full, found, vocabulary.control_flags):
        if match.swallowed_from > begin:
            yield _run(vocabulary, full, begin, match.swallowed_from, content)
        control_id = vocabulary.control_token_ids[match.name]
        yield TextRun(control_id, "", match.begin, ())
        begin = match.swallowed_to
    if begin < len(full):
        yield _run(vocabulary, full, begin, len(full), content)


def _run(
    vocabulary: Vocabulary,
    full: str,
    begin: int,
    end: int,
    content: Sequence[tuple[int, int, int]],
) -> TextRun:
    """Return characters [begin, end) of the rendering as one run of text."""
    text = full[begin:end]
    spans = []
    for first, last, part in content:
        inside = max(first, begin), min(last, end)
        if inside[0] < inside[1]:
            a, b = (len(full[begin:k].encode()) for k in inside)
            spans.append((a, b, part, len(full[first : inside[0]].encode())))
    return TextRun(
        None, text, begin, tuple(spans), vocabulary.prefix_space_before(text, is_first=begin == 0)
    )


def refuse_tokens_without_row(vocabulary: Vocabulary, runs: Sequence[TextRun]) -> None:
    """Check that the model has a row of logits for each control token of a rendering.

    Raises:
        DataError: The template writes a control token that `limit_to_rows` left out.
    """
    for run in runs:
        if run.control_id is not None and run.control_id >= len(vocabulary):
            raise DataError(
                f"the chat template writes {vocabulary.control_names[run.control_id]}, which "
                "has no row of logits",
                where=vocabulary.name,
                remedy="take tokenizer and template from the folder that the weights came with",
            )


def insert_prompt_only_suffix(
    segments: Sequence[tuple[str, int | None]], position: int, suffix: str
) -> list[tuple[str, int | None]]:
    """Insert the family's `prompt_only_suffix` at this character, which lies in template text."""
    result: list[tuple[str, int | None]] = []
    char = 0
    for text, part in segments:
        if part is None and char < position <= char + len(text):
            result += [(text[: position - char] + suffix + text[position - char :], None)]
        else:
            result.append((text, part))
        char += len(text)
    return result


def encode_runs(vocabulary: Vocabulary, runs: Sequence[TextRun]) -> list[list[int]]:
    """Return the ids of the runs of text, each with the space that the tokenizer puts there."""
    return vocabulary.encode_batch([r.prefix + r.text for r in runs if r.control_id is None])


def refuse_other_encoding(
    vocabulary: Vocabulary,
    pattern: re.Pattern[str],
    segments: Sequence[tuple[str, int | None]],
    ids: Sequence[int],
) -> None:
    """Check the ids of a rendering against the tokenizer's own encoding of the whole.

    Only tokenizers with prefix spaces or with flags at control tokens are compared. Content that
    looks like a control token is text here and a control token there; it is replaced on both sides.

    Args:
        vocabulary: The tokenizer.
        pattern: Matches its control tokens, the longest at each place.
        segments: The rendering as (text, index of the content part; None for template text).
        ids: Its token ids.

    Raises:
        DataError: The two differ.
    """
    original = vocabulary.original
    if original is None:
        return
    if any(pattern.search(t) for t, part in segments if part is not None):
        segments = [(t if part is None else pattern.sub("x", t), part) for t, part in segments]
        runs = list(split_runs(vocabulary, pattern, segments))
        encoded = iter(encode_runs(vocabulary, runs))
        ids = [i for r in runs for i in (next(encoded) if r.control_id is None else [r.control_id])]
    full = "".join(t for t, _ in segments)
    expected = original.encode(full, add_special_tokens=False).ids
    if list(ids) == expected:
        return
    at = next((k for k, (a, b) in enumerate(zip(ids, expected, strict=False)) if a != b), -1)
    at = at if at >= 0 else min(len(ids), len(expected))
    near = original.decode(expected[max(0, at - 2) : at + 4], skip_special_tokens=False)
    raise DataError(
        f"the tokenizer cuts this conversation otherwise than its control tokens say, near "
        f"{near!r}",
        where=vocabulary.name,
        remedy="set `normalized` of its control tokens to false in tokenizer.json, or leave "
        "the conversation out",
    )
