"""The token offsets of two tokenizers refer to the same content bytes."""

from __future__ import annotations

from persea.chat.messages import Conversation, Text
from tests.conftest import Speaker


def test_offsets_cover_the_content_bytes(tiny: Speaker) -> None:
    """Each token's bytes are the bytes at its offsets; parts are one unused byte apart."""
    conversation = Conversation.from_question("a é?").with_answer(Text("你好"))
    content = b"\0".join(part.text.encode() for part in conversation.parts())
    tokens = tiny.renderer.render(conversation)
    assert len(tokens) == len(tokens.ids_T)
    seen = set()
    for i, start, end in zip(
        tokens.ids_T.tolist(), tokens.starts_T.tolist(), tokens.ends_T.tolist(), strict=True
    ):
        raw = tiny.renderer.vocabulary.bytes_W[i]
        if 0 <= start < end:
            assert content[start:end] == raw
            seen |= set(range(start, end))
    assert seen == {k for k, byte in enumerate(content) if byte}
