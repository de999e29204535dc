"""Runs of tokens without bytes, as the saplings' templates write them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from persea.alignment.markers import align_marker_runs
from persea.alignment.spans import align
from persea.chat.messages import Conversation, Text
from persea.tokenization.tokens import RenderedTokens
from tests.teachers.engines.test_transformers import opened
from tests.training.on_policy.test_rollouts import STUDENT, pair
from tests.training.on_policy.test_teacher_scores import marker, structured


def written(name: str, tokens: RenderedTokens, ranges: np.ndarray) -> list[str]:
    return [
        "".join(
            p if isinstance(p, str) else p.decode()
            for p in opened(name)[0].vocabulary.decode_pieces(tokens.ids_T[a:b].tolist())
        )
        for a, b in ranges.tolist()
    ]


@pytest.mark.parametrize(
    ("name", "open_", "close", "call", "called"),
    [
        (
            "qwen-sapling",
            "<think>\n",
            "\n</think>\n\n",
            '<tool_call>\n{"name": "timer", "arguments": {"',
            "}}\n</tool_call>",
        ),
        (
            "gpt-oss-sapling",
            "<|channel|>analysis<|message|>",
            "<|end|><|start|>assistant<|channel|>final<|message|>",
            ' to=functions.timer<|channel|>commentary json<|message|>{"',
            "}",
        ),
    ],
)
def test_marker_runs_between_parts_correspond(
    name: str, open_: str, close: str, call: str, called: str
) -> None:
    """A stretch ends after the first content; a shared full stop belongs to the run."""
    told = [
        [
            written(who, side, ranges)
            for who, side, ranges in zip(
                (STUDENT, name), pair_of, align_marker_runs(*pair_of), strict=True
            )
        ]
        for pair_of in structured(name)
    ]
    assert told[0] == [["<think>\ntwo", ".\n</think>\n\n5"], [f"{open_}two", f".{close}5"]]
    assert told[1] == [["<think>\nc", "\n</think>\n\nit"], [f"{open_}c", f"{close}it"]]
    assert told[2] == [
        ['{"name": "timer", "parameters": {"minutes', "} }"],
        [f"{call}minutes", called],
    ]


def test_markers_of_one_side_alone_correspond_to_nothing() -> None:
    """gpt-oss marks text by a channel, the student by its first word: no token corresponds."""
    asked = Conversation.from_question("2+3?").with_answer(Text("it is 5"))
    own, theirs = (opened(name)[0].render(asked) for name in (STUDENT, "gpt-oss-sapling"))
    mine, others = align_marker_runs(own, theirs)
    assert (written(STUDENT, own, mine), written("gpt-oss-sapling", theirs, others)) == (
        ["it"],
        ["<|channel|>final<|message|>it"],
    )
    first = int(np.flatnonzero(own.loss_mask_T)[0])
    assert first in align(own, theirs).boundaries.student_C.tolist()
    assert 0 not in pair("gpt-oss-sapling").score_boundaries([(own, theirs)]).position_C.tolist()


def test_a_run_that_was_cut_off_is_left_out() -> None:
    own, theirs = structured("qwen-sapling")[1]
    last = (
        max(k for k in range(len(own)) if marker(own, k)) + 1
    )  # as cut within the markers behind the thought
    cut_off = replace(
        own,
        ids_T=own.ids_T[:last],
        starts_T=own.starts_T[:last],
        ends_T=own.ends_T[:last],
        loss_mask_T=own.loss_mask_T[:last],
    )
    assert [len(side) for side in align_marker_runs(own, theirs)] == [2, 2]
    assert [len(side) for side in align_marker_runs(cut_off, theirs)] == [1, 1]
