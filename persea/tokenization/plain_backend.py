"""From a model's tokenizer to one that encodes text alone: exact bytes, no control tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from tokenizers import AddedToken, Tokenizer, models

from persea.errors import DataError
from persea.tokenization.prefix_space import (
    TEXT_BEGINNING,
    PrefixSpace,
    find_prefix_space,
    remove_prefix_space,
)

HIDDEN_MARK = "\U000f0000"  # a private-use character
# A tokenizer may write a space before a text if a normaliser or pre-tokenizer of it matches.
PREFIX_PATTERN = re.compile(
    r'"Prepend"|"Metaspace"|"add_prefix_space":\s*true|'
    + re.escape(f'"Regex":{json.dumps(TEXT_BEGINNING)}')
)
LOSSY_REMEDY = (
    "it cannot be the student, nor teach with distributions; it can teach with its text alone: "
    "serve it and name it `model: text_only` with its endpoint (docs/engines.md)"
)
# Parts of a tokenizer after which the text is another one.
LOSSY_PARTS = frozenset(
    "NFKC NFKD NFD Nmt Precompiled Lowercase StripAccents Strip BertNormalizer BertPreTokenizer "
    "Whitespace WhitespaceSplit CharDelimiterSplit".split()
)


def copy_tokenizer(definition: str) -> Tokenizer:
    """Return a tokenizer without padding and truncation."""
    tokenizer = Tokenizer.from_str(definition)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def open_plain(
    backend: Tokenizer,
    definition: str,
    control: Mapping[str, int],
    name: str,
    probes: Sequence[str],
) -> tuple[Tokenizer, PrefixSpace | None]:
    """Return the tokenizer that encodes text alone, and where the original writes a space.

    Args:
        backend: The tokenizer as it is.
        definition: Its JSON.
        control: Control token -> id.
        name: Name in messages.
        probes: Texts on which the rule for the space must hold.

    Raises:
        DataError: The original writes spaces by a rule that is not known.
    """
    states = [
        part.__getstate__().decode() if part else ""
        for part in (backend.normalizer, backend.pre_tokenizer)
    ]
    if not PREFIX_PATTERN.search(" ".join(states)):
        return _as_text_only(copy_tokenizer(definition), control), None
    spec = json.loads(definition)
    if not remove_prefix_space(spec):
        return _as_text_only(copy_tokenizer(definition), control), None
    plain, original = (
        _as_text_only(copy_tokenizer(json.dumps(spec)), control),
        copy_tokenizer(definition),
    )
    lead = next(
        (
            t.content
            for t in original.get_added_tokens_decoder().values()
            if t.special and not (t.normalized or t.lstrip or t.rstrip or t.single_word)
        ),
        "",
    )
    prefix_space = find_prefix_space(original, plain, lead, probes)
    if prefix_space is None:
        raise DataError(
            "the tokenizer writes spaces that are not in the text, by no rule that persea knows"
            f"{lossy_parts(backend)}",
            where=name,
            remedy=LOSSY_REMEDY,
        )
    return plain, prefix_space


def unknown_token(backend: Tokenizer) -> dict[str, int]:
    """Return Unigram's token for characters without a piece, which need not be an added token."""
    model = json.loads(backend.model.__getstate__())
    unk_id = model["unk_id"]
    return {} if unk_id is None else {model["vocab"][unk_id][0]: unk_id}


def _hide_control_pieces(plain: Tokenizer, control: Mapping[str, int]) -> Tokenizer:
    """Return a Unigram tokenizer that never takes a control token for a piece of a text.

    Its model would: every entry of a Unigram vocabulary is a piece. The entries keep their ids
    under names that no text has.
    """
    spec = json.loads(plain.to_str())
    for entry in spec["model"]["vocab"]:
        if entry[0] in control:
            entry[0] = HIDDEN_MARK + entry[0]
    for token in spec["added_tokens"]:
        if token["content"] in control:
            token |= {"content": HIDDEN_MARK + token["content"], "special": True}
            token |= {"lstrip": False, "rstrip": False, "single_word": False}
    plain = Tokenizer.from_str(json.dumps(spec))
    plain.encode_special_tokens = True
    return plain


def _as_text_only(plain: Tokenizer, control: Mapping[str, int]) -> Tokenizer:
    """Return the tokenizer, changed to encode a control token in a text as text."""
    if isinstance(plain.model, models.Unigram):
        return _hide_control_pieces(plain, control)
    plain.add_special_tokens([AddedToken(c, special=True, normalized=False) for c in control])
    plain.encode_special_tokens = True
    return plain


def normalizes_any(backend: Tokenizer, control: Mapping[str, int]) -> bool:
    """Return whether a normaliser changes the text before a control token is looked for in it."""
    state = json.loads(backend.normalizer.__getstate__()) if backend.normalizer else {}
    types = {n["type"] for n in state.get("normalizers", [state]) if n}
    return bool(types - {"NFC"}) and any(
        t.normalized and t.content in control for t in backend.get_added_tokens_decoder().values()
    )


def lossy_parts(backend: Tokenizer) -> str:
    """Return the parts of a tokenizer that change texts, for a message; "" if none is known."""
    states = " ".join(
        part.__getstate__().decode() if part else ""
        for part in (backend.normalizer, backend.pre_tokenizer)
    )
    found = sorted(LOSSY_PARTS & set(re.findall(r'"type":\s*"(\w+)"', states)))
    return f"; it changes texts by {', '.join(found)}" if found else ""
