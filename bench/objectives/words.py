"""Sample text from a model, for SFT on the teachers' text.

The first quarter of each window stays; the rest is sampled at temperature 1.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import DynamicCache

from bench.objectives.data import ASKED, Window
from bench.objectives.examples import Teacher
from bench.objectives.vocabularies import Speaker

AT_ONCE = 128


def open_continuations(
    path: Path, pools: Mapping[str, Sequence[Window]], teachers: Mapping[str, Teacher]
) -> dict[str, list[Window]]:
    """Load windows continued by the teachers from the cache, or sample them once."""
    if not path.is_file():
        made = {d: [] for d in pools}  # type: ignore[var-annotated]
        for who, teacher in teachers.items():
            asked = [w for d, pool in pools.items() if ASKED[d] == who for w in pool]
            for at in range(0, len(asked), AT_ONCE):
                some = asked[at : at + AT_ONCE]
                for w, text in zip(some, continued(teacher, some, seed=at), strict=True):
                    made[w.domain].append([w.page, text])
        path.write_text(json.dumps(made))
    return {
        d: [Window(d, page, text) for page, text in pool]
        for d, pool in json.loads(path.read_text()).items()
    }


def continued(teacher: Teacher, windows: Sequence[Window], seed: int) -> list[str]:
    """Return each window's first quarter, continued by the teacher to the window's length in
    bytes.
    """
    return [
        text_of(teacher.speaker, ids, len(w.text.encode()))
        for w, ids in zip(windows, drawn(teacher, windows, seed), strict=True)
    ]


def drawn(teacher: Teacher, windows: Sequence[Window], seed: int) -> list[list[int]]:
    """Return each window's first quarter in the model's tokens, followed by samples.

    As many bytes as the longest window has, or 256 tokens.
    """
    speaker, generator = teacher.speaker, torch.Generator().manual_seed(seed)
    lengths_W = torch.from_numpy(speaker.vocabulary.lengths_W)
    sizes_B = torch.tensor([len(w.text.encode()) for w in windows])
    prefixes = [given(w, speaker) for w in windows]
    written: list[list[int]] = [[] for _ in windows]
    bytes_B, last_B, cache = (
        torch.zeros(len(windows), dtype=torch.int64),
        torch.full((len(windows),), speaker.start),
        DynamicCache(),
    )
    while bool((bytes_B < sizes_B).any()) and len(written[0]) < 256:
        with torch.no_grad():
            hidden = teacher.model.model(
                input_ids=last_B[:, None], past_key_values=cache, use_cache=True
            ).last_hidden_state[:, -1]
            probs_BW = teacher.logprobs(hidden).exp()
        probs_BW[:, lengths_W == 0] = 0  # samples never end: start and stop tokens were not trained
        last_B = torch.multinomial(probs_BW, 1, generator=generator)[:, 0]
        for b, prefix in enumerate(prefixes):
            if len(written[b]) < len(prefix):
                last_B[b] = prefix[len(written[b])]
            written[b].append(int(last_B[b]))
        bytes_B += lengths_W[last_B]
    return written


def given(window: Window, speaker: Speaker) -> list[int]:
    raw = window.text.encode()
    return speaker.vocabulary.encode(raw[: len(raw) // 4].decode(errors="ignore"))


def text_of(speaker: Speaker, ids: Sequence[int], size: int) -> str:
    """Return up to `size` bytes of the sample, which ends where it stops being valid text."""
    raw = speaker.vocabulary.decode(ids)[:size]
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        text = raw[: error.start].decode()
    return unicodedata.normalize("NFC", text)
