"""Units are named by what makes them, survive being killed at any moment, and every prompt is kept
or counted as left out.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from persea.cache import unit as cache
from persea.cache.accounting import (
    CaptureBudget,
    UnitProgress,
    account_for_prompts,
    capture_summary,
    quarantine_records,
)
from persea.cache.capture import CaptureUnit, capture_teacher, open_teacher_caches, plan_units
from persea.chat.messages import Conversation, FinishReason, Message, Role, Text, ThinkingEffort
from persea.data.prompts import Corpus, MalformedLine, Prompt, RemovalReason
from persea.distributions import DistributionKind, text_only_distributions
from persea.errors import DataError, RefusedError
from persea.evaluation.audition import Cast
from persea.tasks.generated import LANGUAGES_TASK, REASONING_TASK
from persea.tasks.task import Split
from persea.teachers.engines import Engine, GeneratedTokens, Reducer
from persea.teachers.engines.transformers import TransformersEngine
from persea.teachers.teacher import Answer, Teacher
from tests.cli.test_cli import tree, warm
from tests.teachers.engines.test_transformers import engine, opened
from tests.teachers.test_teacher import scripted, words

SETTINGS: dict[str, Any] = {"tau": 0.01, "max_new_tokens": 40, "seed": 0}
ALONE = Cast({"languages": (("qwen-sapling", 1.0),), "reasoning": (("qwen-sapling", 1.0),)}, ())


@dataclass
class Counting(Engine):
    """An engine that notes which prompts it is asked."""

    real: Engine
    asked: list[bytes] = field(default_factory=list)

    @property
    def capabilities(self) -> Any:
        return self.real.capabilities

    def generate(
        self, prompts: Sequence[np.ndarray], stop_ids: Sequence[int], max_new_tokens: int
    ) -> list[np.ndarray]:
        self.asked += [p.tobytes() for p in prompts]
        return self.real.generate(prompts, stop_ids, max_new_tokens)

    def compute_logprobs(
        self, sequences: Sequence[np.ndarray], learn: Sequence[np.ndarray]
    ) -> object:
        return self.real.compute_logprobs(sequences, learn)

    def iter_logprobs(self, sequences: Sequence[np.ndarray], learn: Sequence[np.ndarray]) -> object:
        return self.real.iter_logprobs(sequences, learn)


def prompts(n: int) -> list[Prompt]:
    """n questions of each of two skills, with their answers."""
    return [
        replace(i.prompt, answer=i.reference)
        for skill in (LANGUAGES_TASK, REASONING_TASK)
        for i in skill.items(Split.TRAIN, n, 0)
    ]


def units(
    some: Sequence[Prompt],
    size: int = 4,
    cast: Cast = ALONE,
    identity: str = "weights 1",
    **settings: Any,
) -> tuple[CaptureUnit, ...]:
    names = dict.fromkeys(name for parts in cast.parts.values() for name, _ in parts)
    return plan_units(
        some, cast, {name: f"{name} {identity}" for name in names}, size, SETTINGS | settings
    )


def names(planned: Sequence[CaptureUnit]) -> list[str]:
    return [u.name for u in planned]


def read(planned: Sequence[CaptureUnit], folder: Path) -> list[cache.CachedAnswer]:
    return [c for unit in planned for c in cache.read_unit(folder, unit.name)]


def ask(
    planned: Sequence[CaptureUnit], folder: Path, speaker: Teacher | None = None, **changes: Any
) -> list[int]:
    """Capture with the qwen-sapling; the prompts of each unit as progress told them."""
    told: list[int] = []
    speaker = speaker or Teacher("qwen-sapling", opened("qwen-sapling")[0], engine("qwen-sapling"))
    capture_teacher(
        planned,
        speaker,
        folder,
        **{"on_unit": lambda step: told.append(step.num_prompts)} | SETTINGS | changes,
    )
    return told


# --- names ---


def test_the_same_question_under_the_same_settings_has_the_same_name() -> None:
    assert names(units(prompts(6))) == names(units(prompts(6)))
    assert len(set(names(units(prompts(6))))) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"tau": 0.02},
        {"seed": 1},
        {"max_new_tokens": 41},
        {"identity": "weights 2"},
        {"answers": "given"},
    ],
    ids=str,
)
def test_another_setting_is_another_name_for_every_unit(change: dict[str, Any]) -> None:
    assert not set(names(units(prompts(6)))) & set(names(units(prompts(6), **change)))


@pytest.mark.parametrize(
    "change",
    [
        {"id": "other"},
        {"language": "xx"},
        {"skill": "reasoning"},
        {"answer": "other"},
        {"conversation": Conversation.from_question("other")},
        {"conversation": Conversation.from_question("Say", system="Be brief.")},
        {"conversation": Conversation.from_question("Say", effort=ThinkingEffort.HIGH)},
        {"effort": ThinkingEffort.NONE},
        {"effort": ThinkingEffort.HIGH},
    ],
    ids=str,
)
def test_another_prompt_changes_the_name_of_its_unit_and_of_no_other(
    change: dict[str, Any],
) -> None:
    some = prompts(8)[:8]
    some[5] = replace(some[5], conversation=Conversation.from_question("Say"))
    one, other = (
        names(units(some)),
        names(units([*some[:5], replace(some[5], **change), *some[6:]])),
    )
    assert one[0] == other[0]
    assert one[1] != other[1]


def test_another_teacher_is_another_name_even_with_the_same_weights() -> None:
    """What a unit holds carries its teacher's name."""
    renamed = Cast(dict.fromkeys(ALONE.parts, (("qwen", 1.0),)), ())
    one = plan_units(prompts(4), ALONE, {"qwen-sapling": "weights"}, 4, SETTINGS)
    other = plan_units(prompts(4), renamed, {"qwen": "weights"}, 4, SETTINGS)
    assert not set(names(one)) & set(names(other))


def test_every_prompt_is_in_one_unit_in_corpus_order() -> None:
    some = prompts(9)
    planned = units(some)
    assert [p for u in planned for p in u.prompts] == some
    assert [len(u.prompts) for u in planned] == [4, 4, 4, 4, 2]
    assert units([]) == ()


def test_a_unit_is_closed_before_it_could_pass_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    some = [
        Prompt(str(k), Conversation.from_question("é" * n), "languages", "en", answer="a" * 30)
        for k, n in enumerate([10, 10, 10, 40, 100, 1])
    ]
    names_of = {"qwen-sapling": "weights"}

    def sizes(size: int, longest: int | None) -> list[list[str]]:
        return [
            [p.id for p in u.prompts]
            for u in plan_units(some, ALONE, names_of, size, SETTINGS, longest)
        ]

    assert sizes(4, 10) == [["0", "1", "2", "3"], ["4", "5"]]  # far from 2^20
    monkeypatch.setattr("persea.cache.capture.MAX_UNIT_TOKENS", 100)
    assert sizes(4, 10) == [
        ["0", "1", "2"],
        ["3"],
        ["4"],
        ["5"],
    ]  # 20 + 10 each, then 90, 210 alone, 12
    assert sizes(2, 10) == [["0", "1"], ["2"], ["3"], ["4"], ["5"]]
    assert sizes(4, 30) == sizes(4, None) == [["0", "1"], ["2"], ["3"], ["4"], ["5"]]


def test_shares_hold_in_every_stretch_of_prompts() -> None:
    cast = Cast(
        {
            "languages": (("a", 0.7), ("b", 0.3)),
            "reasoning": (("c", 0.5), ("a", 0.25), ("b", 0.25)),
        },
        (),
    )
    for skill, parts in cast.parts.items():
        said = [cast.teacher_of(skill, k) for k in range(1000)]
        for name, share in parts:
            for width in (10, 30, 100):
                counts = np.convolve([s == name for s in said], np.ones(width), "valid")
                assert np.abs(counts - share * width).max() <= 2, (name, width)
    language = [p for p in prompts(10) if p.skill == "languages"]
    split = units(
        [p for pair in zip(language, prompts(10)[10:], strict=True) for p in pair], cast=cast
    )
    given = {p.id: u.teacher for u in split for p in u.prompts}
    assert [given[p.id] for p in language] == [
        cast.teacher_of("languages", k) for k in range(10)
    ]  # the other skill does not move it
    assert Counter(given[p.id] for p in language)["b"] == 3


# --- resume ---


def work(folder: Path, pipe: Connection) -> None:
    """What the child does: captures, and tells of every unit."""
    torch.set_num_threads(1)
    ask(units(prompts(10)), folder, on_unit=lambda unit: pipe.send(unit.num_prompts))


def killed(folder: Path, after: int, seconds: float) -> int:
    """Units committed by a child that is killed some time after it told of so many."""
    mine, childs = warm().Pipe(duplex=False)
    child = warm().Process(target=work, args=(folder, childs))
    child.start()
    childs.close()
    for _ in range(after):
        assert mine.poll(120), "the child said nothing"
        mine.recv()
    time.sleep(seconds)
    assert child.pid
    assert child.is_alive(), "it ended before it was killed"
    os.kill(child.pid, signal.SIGKILL)
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    mine.close()
    return len(list((folder / "commits").glob("*.json")))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a capture that nothing disturbs leaves."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert ask(units(prompts(10)), folder) == [4, 4, 4, 4, 4]
    return tree(folder)


def test_killed_anywhere_it_goes_on_to_the_same_bytes_and_asks_nothing_twice(
    tmp_path: Path, uninterrupted: dict[str, bytes]
) -> None:
    rng, planned = random.Random(1), units(prompts(10))
    for turn, (after, seconds) in enumerate(
        [(1, 0.0), (1, rng.uniform(0, 0.03)), (1, rng.uniform(0, 0.02))]
    ):
        before = {
            n: d for n, d in tree(tmp_path).items() if not n.rpartition("/")[2].startswith(".")
        }
        assert killed(tmp_path, turn + after, seconds) >= turn + 1  # what stands is told at once
        assert before.items() <= tree(tmp_path).items()
    stood = {u.name for u in planned if cache.is_committed(tmp_path, u.name)}
    assert 3 <= len(stood) < len(planned)
    counting = Counting(engine("qwen-sapling"))
    voice = opened("qwen-sapling")[0]
    assert ask(planned, tmp_path, Teacher("qwen-sapling", voice, counting)) == [4, 4, 4, 4, 4]
    assert counting.asked == [
        voice.render_prompt(p.conversation).ids_T.tobytes()
        for u in planned
        if u.name not in stood
        for p in u.prompts
    ]
    assert {
        n: d for n, d in tree(tmp_path).items() if not n.rpartition("/")[2].startswith(".")
    } == uninterrupted
    again = Counting(engine("qwen-sapling"))
    ask(planned, tmp_path, Teacher("qwen-sapling", voice, again))
    assert again.asked == []


def test_a_unit_that_was_published_but_not_committed_is_asked_again(
    tmp_path: Path, uninterrupted: dict[str, bytes]
) -> None:
    """Killed between the two: the bytes are there, the record is not."""
    planned = units(prompts(10))
    ask(planned[:2], tmp_path)
    (tmp_path / "commits" / f"{planned[1].name}.json").unlink()
    (tmp_path / "units" / f"{planned[1].name}.safetensors").write_bytes(b"half")
    counting = Counting(engine("qwen-sapling"))
    ask(planned, tmp_path, Teacher("qwen-sapling", opened("qwen-sapling")[0], counting))
    assert len(counting.asked) == 16
    assert tree(tmp_path) == uninterrupted


def test_a_teacher_is_asked_its_own_units_only(tmp_path: Path) -> None:
    cast = Cast({"languages": (("qwen-sapling", 1.0),), "reasoning": (("someone else", 1.0),)}, ())
    planned = units(prompts(4), cast=cast)
    assert ask(planned, tmp_path) == [4]
    assert [cache.is_committed(tmp_path, u.name) for u in planned] == [True, False]


def test_what_is_read_is_what_the_teacher_said_with_its_rows(tmp_path: Path) -> None:
    planned = units(prompts(4))
    ask(planned, tmp_path)
    speaker = Teacher("qwen-sapling", opened("qwen-sapling")[0], engine("qwen-sapling"))
    answers = [
        a for u in planned for a in speaker.answer(u.prompts, 40) if a.finish is FinishReason.STOP
    ]
    captures = list(read(planned, tmp_path))
    assert [c.answer for c in captures] == answers
    for one, (tokens, logprobs_NW) in zip(
        captures, speaker.compute_logprobs([a.conversation for a in answers]), strict=True
    ):
        assert np.array_equal(one.tokens.ids_T, tokens.ids_T)
        assert len(one.distributions) == int(tokens.loss_mask_T.sum())
        assert one.distributions.offsets_N1[-1] == len(one.distributions.ids_M)
        mass = np.add.reduceat(one.distributions.probs_M, one.distributions.offsets_N1[:-1])
        assert np.abs(mass - 1).max() <= SETTINGS["tau"] + 1e-3
        row = np.repeat(np.arange(len(one.distributions)), np.diff(one.distributions.offsets_N1))
        p = logprobs_NW.double().exp().numpy()[row, one.distributions.ids_M]
        head = (
            p >= 2 * SETTINGS["tau"]
        )  # away from the threshold, where batches of another shape round otherwise
        assert np.allclose(
            np.log(one.distributions.probs_M[head]), np.log(p[head]), rtol=0, atol=1e-3
        )


def test_the_likeliest_and_a_rest_are_kept_where_a_kl_is_asked_for(tmp_path: Path) -> None:
    planned = units(prompts(4), max_kl=0.02)
    ask(planned, tmp_path / "one", tau=None, max_kl=0.02)
    ask(planned, tmp_path / "two", tau=None, max_kl=0.02)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    record = cache.read_record(tmp_path / "one", planned[0].name)
    assert (record["kind"], record["about"]["kl"]) == ("topk", "0.02")
    speaker = Teacher("qwen-sapling", opened("qwen-sapling")[0], engine("qwen-sapling"))
    for unit in planned:
        captures = cache.read_unit(tmp_path / "one", unit.name)
        seen_W = 1.0 + np.bincount(
            np.concatenate([c.tokens.ids_T for c in captures]),
            minlength=len(speaker.renderer.vocabulary),
        )
        for one, (_, logs_NW) in zip(
            captures,
            speaker.compute_logprobs([c.answer.conversation for c in captures]),
            strict=True,
        ):
            assert one.distributions.kind is DistributionKind.TOPK
            p_NW, row = (
                logs_NW.double().exp().numpy(),
                np.repeat(np.arange(len(one.distributions)), np.diff(one.distributions.offsets_N1)),
            )
            q_NW = np.zeros_like(p_NW)
            q_NW[row, one.distributions.ids_M] = one.distributions.probs_M
            spread_NW = np.where(q_NW > 0, 0, seen_W)
            q_NW += (1 - q_NW.sum(1, keepdims=True)) * spread_NW / spread_NW.sum(1, keepdims=True)
            assert (p_NW * (np.log(p_NW) - np.log(q_NW))).sum(
                1
            ).max() <= 0.02 + 1e-4  # another batch rounds otherwise


def test_rows_are_kept_in_one_way(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="either tau or max_kl"):
        ask(units(prompts(1)), tmp_path, tau=None)


# --- what is left out ---


def test_answers_that_are_not_whole_are_counted_and_prompts_are_kept_or_left_out(
    tmp_path: Path,
) -> None:
    name = "llama-sapling"
    whole, cut, odd = (
        words(name, "a whole answer", "<|eot_id|>"),
        words(name, "cut "),
        words(name, "x", "<|begin_of_text|>", "<|eot_id|>"),
    )
    some, cast = prompts(5), Cast(dict.fromkeys(ALONE.parts, ((name, 1.0),)), ())
    planned = units(some, cast=cast)
    says = [whole, cut, odd, whole, odd, odd, cut, odd, whole, whole]
    ask(planned, tmp_path, scripted(name, *says))
    told = capture_summary(planned, tmp_path)
    assert (told["prompts"], told["kept"], told["left_out"]) == (
        10,
        4,
        {"length": 2, "malformed": 4},
    )
    assert told["prompts"] == told["kept"] + sum(told["left_out"].values())
    assert told["teachers"].keys() == {name}
    captures = list(read(planned, tmp_path))
    assert [c.answer.prompt_id for c in captures] == [some[k].id for k in (0, 3, 8, 9)]
    assert (told["tokens"], told["positions"], told["entries"]) == (
        sum(len(c.tokens) for c in captures),
        sum(len(c.distributions) for c in captures),
        sum(len(c.distributions.ids_M) for c in captures),
    )
    assert told["bytes"] == sum(p.stat().st_size for p in (tmp_path / "units").iterdir())


def test_an_answer_without_the_thought_it_was_asked_for_is_left_out(tmp_path: Path) -> None:
    """Cut thoughts count as cut answers; a prompt without a mode may be answered either way."""
    name = "qwen-sapling"
    control = opened(name)[0].vocabulary.control_token_ids
    thinks = [
        control["<think>"],
        *words(name, "hm"),
        control["</think>"],
        *words(name, "42", "<|im_end|>"),
    ]
    direct, cut = words(name, "42", "<|im_end|>"), [control["<think>"], *words(name, "hm and hm")]
    cases = [
        (ThinkingEffort.HIGH, thinks),
        (ThinkingEffort.HIGH, direct),
        (ThinkingEffort.HIGH, cut),
        (ThinkingEffort.NONE, direct),
        (None, direct),
        (ThinkingEffort.LOW, direct),
    ]
    some = [replace(p, effort=effort) for p, (effort, _) in zip(prompts(6), cases, strict=False)]
    planned = units(some, size=6)
    ask(planned, tmp_path, scripted(name, *(says for _, says in cases)))
    told = capture_summary(planned, tmp_path)
    assert (told["kept"], told["left_out"]) == (3, {"thoughtless": 2, "length": 1})
    assert [(c.answer.effort, c.answer.conversation.effort) for c in read(planned, tmp_path)] == [
        (ThinkingEffort.HIGH, ThinkingEffort.HIGH),
        (ThinkingEffort.NONE, ThinkingEffort.NONE),
        (None, ThinkingEffort.NONE),
    ]


def test_an_answer_that_its_own_template_refuses_is_left_out_and_not_the_end_of_the_run(
    tmp_path: Path,
) -> None:
    """gpt-oss' template raises where a text speaks of its channels; a teacher may well say such a
    thing.
    """
    name = "llama-sapling"
    says = [words(name, text, "<|eot_id|>") for text in ("fine", "of <channel>", "fine")]
    speaker = scripted(name, *says)
    template = speaker.renderer.template

    def picky(messages: list[dict[str, Any]], **switches: Any) -> str:
        if any("<channel>" in m["content"] for m in messages):
            raise DataError("the chat template refuses the conversation", where=name)
        return template(messages, **switches)

    planned = units(prompts(3)[:3], cast=Cast({"languages": ((name, 1.0),)}, ()))
    ask(planned, tmp_path, replace(speaker, renderer=replace(speaker.renderer, template=picky)))
    told = capture_summary(planned, tmp_path)
    assert (told["kept"], told["left_out"]) == (2, {"malformed": 1})


def test_nothing_whole_is_refused(tmp_path: Path) -> None:
    planned = units(prompts(3))
    ask(planned, tmp_path, max_new_tokens=2)
    with pytest.raises(
        RefusedError,
        match=r"none of 6 answers is complete \(\{'length': 6\}\) -> raise capture.max_new_tokens",
    ) as caught:
        capture_summary(planned, tmp_path)
    assert caught.value.exit_code == 4
    assert list(read(planned, tmp_path)) == []


def test_a_summary_before_all_is_captured_is_refused_with_the_missing_unit(tmp_path: Path) -> None:
    planned = units(prompts(5))
    ask(planned[:1], tmp_path)
    with pytest.raises(DataError, match=rf"{planned[1].name}\.json: not there"):
        capture_summary(planned, tmp_path)


def test_each_teachers_captures_are_a_cache_of_their_own_with_the_casts_share(
    tmp_path: Path,
) -> None:
    both = Cast({"languages": (("qwen-sapling", 1.0),), "reasoning": (("gemma-sapling", 1.0),)}, ())
    planned = units(prompts(5), cast=both)
    for name in ("qwen-sapling", "gemma-sapling"):
        ask(planned, tmp_path, Teacher(name, opened(name)[0], engine(name)))
    (one, share), (other, rest) = open_teacher_caches(planned, tmp_path)
    assert (share, rest) == (5, 5)
    for read_, name in ((one, "qwen-sapling"), (other, "gemma-sapling")):
        assert [c.answer for c in read_] == [
            c.answer for c in read([u for u in planned if u.teacher == name], tmp_path)
        ]


def test_an_answer_that_comes_in_pieces_gives_the_same_unit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never [learned tokens, vocabulary] of a whole answer: the most rows that are handed over at
    once is told by the pieces.
    """
    planned = units(prompts(3)[:3], answers="given")
    ask(planned, tmp_path / "whole", use_given_answers=True)
    sizes: list[int] = []

    class Cut(Counting):
        def iter_logprobs(
            self, sequences: Sequence[np.ndarray], learn: Sequence[np.ndarray]
        ) -> object:
            for k, some in self.real.iter_logprobs(sequences, learn):
                for piece in torch.split(some, 2):
                    sizes.append(len(piece))
                    yield k, piece

    ask(
        planned,
        tmp_path / "cut",
        Teacher("qwen-sapling", opened("qwen-sapling")[0], Cut(engine("qwen-sapling"))),
        use_given_answers=True,
    )
    assert max(sizes) == 2 and len(sizes) > 6
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")


def test_a_sampled_capture_needs_no_second_pass_and_is_what_scoring_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A likeliest token, an entry of the sample and a log-probability move in last digits only."""
    planned = units(prompts(6))
    scored: list[int] = []

    class Noted(TransformersEngine):
        def reduce_distributions(self, sequences: Any, learn: Any, reducer: Any) -> Any:
            scored.append(len(sequences))
            return super().reduce_distributions(sequences, learn, reducer)

    renderer, model = opened("qwen-sapling")
    noted = Teacher("qwen-sapling", renderer, Noted(model, len(renderer.vocabulary)))
    ask(planned, tmp_path / "drawn", noted)
    assert sum(scored) == 0  # the template renders what was generated
    scored.clear()
    monkeypatch.setattr("persea.cache.capture.reducer_of_prompts", lambda *given: None)
    ask(planned, tmp_path / "scored", noted)
    both = [list(read(planned, tmp_path / name)) for name in ("drawn", "scored")]
    assert sum(scored) == len(both[0]) > 6
    moved = 0
    for one, other in zip(*both, strict=True):
        assert one.answer == other.answer
        assert np.array_equal(one.tokens.ids_T, other.tokens.ids_T)
        a, b = one.distributions, other.distributions
        assert np.allclose(a.target_logprob_N, b.target_logprob_N, atol=3e-3)
        moved += not np.array_equal(a.ids_M, b.ids_M)
    assert moved <= len(both[0]) // 4


def test_an_answer_that_is_rendered_in_other_tokens_is_scored(tmp_path: Path) -> None:
    """A scripted engine writes a text letter by letter; the student learns the usual tokens."""
    planned = units(prompts(1)[:1])
    renderer, _ = opened("qwen-sapling")
    text = [renderer.vocabulary.encode(letter)[0] for letter in "good"]
    assert len(renderer.vocabulary.encode("good")) < 4
    reduced: list[int] = []

    class Spelling(Counting):
        def generate_with_distributions(
            self, prompts: Any, stop_ids: Any, max_new_tokens: int, reducer: Reducer
        ) -> list[GeneratedTokens]:
            ids_T = np.array([*text, stop_ids[0]], np.int32)
            wrong = text_only_distributions(len(ids_T))
            return [GeneratedTokens(ids_T, wrong) for _ in prompts]

        def reduce_distributions(self, sequences: Any, learn: Any, reducer: Any) -> Any:
            reduced.append(len(sequences))
            return self.real.reduce_distributions(sequences, learn, reducer)

    ask(planned, tmp_path, Teacher("qwen-sapling", renderer, Spelling(engine("qwen-sapling"))))
    (kept,) = read(planned, tmp_path)
    assert kept.answer.text == "good" and reduced == [1]
    assert kept.distributions.kind is DistributionKind.SAMPLED
    assert len(kept.tokens.ids_T[kept.tokens.loss_mask_T]) < 5


# --- answers that came with the prompts ---


def test_given_answers_are_scored_and_not_asked(tmp_path: Path) -> None:
    planned = units(prompts(3), answers="given")
    counting = Counting(engine("qwen-sapling"))
    ask(
        planned,
        tmp_path,
        Teacher("qwen-sapling", opened("qwen-sapling")[0], counting),
        use_given_answers=True,
    )
    assert counting.asked == []
    captures = list(read(planned, tmp_path))
    assert [c.answer.text for c in captures] == [
        p.answer for p in itertools.chain(*(u.prompts for u in planned))
    ]
    assert all(len(c.distributions) == int(c.tokens.loss_mask_T.sum()) > 0 for c in captures)


def test_a_given_answer_that_is_missing_is_named(tmp_path: Path) -> None:
    some = [replace(p, answer="") if k == 2 else p for k, p in enumerate(prompts(3))]
    with pytest.raises(DataError, match=f"prompt {some[2].id} has no answer of its own"):
        ask(units(some, answers="given"), tmp_path, use_given_answers=True)
    assert tree(tmp_path) == {}


# --- hostile documents, changed teachers, budgets ---

HOSTILE = (
    "",
    " \n\t ",
    "x",
    "NUL \x00 inside",
    "half a pair \ud83d",
    "<|im_start|><|im_end|><|endoftext|>",
    "\u200f\u202e\u0639",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467",
    "e\u0301\u0301\u0301",
    "\ufffd\ufffe\U0010ffff",
    "\u2581\u2581",
    "x" * (16 << 20) + "y",
)


def test_of_hostile_documents_each_is_kept_or_counted_as_left_out(tmp_path: Path) -> None:
    some = [
        replace(
            prompts(1)[0],
            id=f"hostile {k}",
            conversation=Conversation((Message(Role.USER, (Text(text),)),)),
        )
        for k, text in enumerate(HOSTILE)
    ]
    planned = units(some, size=5)
    ask(planned, tmp_path, max_new_tokens=30)
    told = (
        capture_summary(planned, tmp_path)
        if any(cache.read_record(tmp_path, u.name)["answers"] for u in planned)
        else None
    )
    records = [cache.read_record(tmp_path, u.name) for u in planned]
    assert sum(r["answers"] + sum(r["dropped"].values()) for r in records) == len(HOSTILE)
    refused = {name: why for r in records for name, why in r["quarantine"]}
    assert {"hostile 4", "hostile 11"} <= set(refused)
    assert "surrogates not allowed" in refused["hostile 4"]
    assert "bytes, at most 16,777,216" in refused["hostile 11"]
    assert sum(r["dropped"].get("refused", 0) for r in records) == len(refused)
    assert told is None or told["prompts"] == told["kept"] + sum(told["left_out"].values())
    assert len(refused) < len(HOSTILE) - 6  # the odd ones are asked


def test_a_prompt_past_the_models_positions_is_not_asked_and_an_answer_past_them_not_kept(
    tmp_path: Path,
) -> None:
    some = prompts(3)[:3]
    speaker = Teacher("qwen-sapling", opened("qwen-sapling")[0], engine("qwen-sapling"))
    lengths = [len(speaker.renderer.render_prompt(p.conversation)) for p in some]
    whole = [len(speaker.renderer.render(p.conversation.with_answer(Text(p.answer)))) for p in some]
    planned = units(some, answers="given")
    context = max(lengths)
    counting = Counting(engine("qwen-sapling"))
    ask(
        units(some), tmp_path / "ask", replace(speaker, engine=counting, max_context_tokens=context)
    )
    assert len(counting.asked) == sum(n < context for n in lengths) < 3
    record = cache.read_record(tmp_path / "ask", units(some)[0].name)
    assert [name for name, _ in record["quarantine"]] == [
        p.id for p, n in zip(some, lengths, strict=True) if n == context
    ]
    assert (
        f"{context:,} tokens, and qwen-sapling has positions for {context:,}"
        in record["quarantine"][0][1]
    )
    ask(
        planned,
        tmp_path / "given",
        replace(speaker, max_context_tokens=max(whole) - 1),
        use_given_answers=True,
    )
    record = cache.read_record(tmp_path / "given", planned[0].name)
    assert (record["answers"], record["dropped"]) == (
        sum(n < max(whole) for n in whole),
        {"length": whole.count(max(whole))},
    )
    ask(
        planned,
        tmp_path / "all",
        replace(speaker, max_context_tokens=max(whole)),
        use_given_answers=True,
    )
    assert cache.read_record(tmp_path / "all", planned[0].name)["answers"] == 3


def test_what_came_in_is_kept_skipped_or_set_aside(tmp_path: Path) -> None:
    hostile = Conversation((Message(Role.USER, (Text("half \ud83d"),)),))
    some = [*prompts(3)[:3], replace(prompts(1)[0], id="hostile", conversation=hostile)]
    corpus = Corpus(
        tuple(some),
        (("twice", RemovalReason.DUPLICATE),),
        (MalformedLine("p.jsonl:7", "not JSON", 9, "{"),),
    )
    ask(units(some), tmp_path)
    told, aside = (
        capture_summary(units(some), tmp_path),
        quarantine_records(units(some), tmp_path, corpus.malformed),
    )
    found = account_for_prompts(told, corpus, aside)
    assert (found["in"], found["kept"], found["skipped"], found["quarantined"]) == (
        6,
        told["kept"],
        4 - told["kept"],
        2,
    )
    assert found["quarantine"][0] == {"location": "p.jsonl:7", "reason": "not JSON"}
    assert found["quarantine"][1]["location"].startswith("prompt hostile, qwen-sapling, unit ")
    with pytest.raises(AssertionError, match=r"prompts were lost: .*'in': 6"):
        account_for_prompts(told, corpus, aside[1:])


def test_an_answer_that_a_server_filtered_is_set_aside_with_that_reason(tmp_path: Path) -> None:
    some = prompts(2)[:2]

    class Filtering(Teacher):
        def answer(
            self, prompts: Sequence[Prompt], max_new_tokens: int, reducer: Reducer | None = None
        ) -> list[Answer]:
            first, *rest = super().answer(prompts, max_new_tokens, reducer)
            return [replace(first, finish=FinishReason.REFUSED), *rest]

    ask(
        units(some),
        tmp_path,
        Filtering("qwen-sapling", opened("qwen-sapling")[0], engine("qwen-sapling")),
    )
    told, aside = (
        capture_summary(units(some), tmp_path),
        quarantine_records(units(some), tmp_path, ()),
    )
    assert told["left_out"] == {"refused": 1}
    assert [a["reason"] for a in aside] == ["the content filter of the server refused to answer"]
    assert account_for_prompts(told, Corpus(tuple(some), ()), aside)["quarantined"] == 1


def test_a_teacher_that_changed_half_way_is_refused_and_what_stands_stays(tmp_path: Path) -> None:
    ask(units(prompts(6))[:1], tmp_path)
    before = tree(tmp_path)
    with pytest.raises(
        RefusedError,
        match=r"the folder holds units of another qwen-sapling: .* -> give this run another --out",
    ) as caught:
        ask(units(prompts(6), identity="weights 2"), tmp_path)
    assert caught.value.exit_code == 4
    assert tree(tmp_path) == before
    ask(units(prompts(6), tau=0.02), tmp_path, tau=0.02)  # the same teacher, other settings


def test_a_teacher_that_changes_while_it_is_asked_commits_nothing_more(tmp_path: Path) -> None:
    checks: list[int] = []

    def unchanged() -> None:
        checks.append(len(cache_records(tmp_path)))
        if len(checks) == 2:
            raise RefusedError("changed")

    with pytest.raises(RefusedError, match="changed"):
        ask(units(prompts(6)), tmp_path, refuse_if_changed=unchanged)
    assert checks == [0, 1]
    assert len(cache_records(tmp_path)) == 1


def cache_records(folder: Path) -> list[Path]:
    return list((folder / "commits").glob("*.json")) if (folder / "commits").is_dir() else []


def test_progress_tells_tokens_a_second_and_the_time_that_is_left() -> None:
    seconds = iter([0.0, 1.0, 10.0, 30.0, 400.0])
    pace = CaptureBudget(1000, clock=lambda: next(seconds))
    assert pace.record_unit(UnitProgress(200, 900, is_new=False)) == (
        0.2,
        "200/1000 prompts",
    )  # it stood there: says nothing of the pace
    assert pace.record_unit(UnitProgress(100, 500, is_new=True)) == (
        0.3,
        "300/1000 prompts, 50 tokens/s, 70 s left",
    )
    assert pace.record_unit(UnitProgress(100, 1000, is_new=True)) == (
        0.4,
        "400/1000 prompts, 50 tokens/s, 90 s left",
    )
    assert pace.record_unit(UnitProgress(600, 2500, is_new=True)) == (
        1.0,
        "1000/1000 prompts, 10 tokens/s",
    )


@pytest.mark.parametrize(
    ("limit", "reason"),
    [
        (
            {"max_tokens": 1000},
            (
                r"capture\.max_total_tokens: the budget is spent: 1,100 tokens for 20 of 30 "
                r"prompts -> raise capture\.max_total_tokens"
            ),
        ),
        (
            {"max_hours": 0.5},
            (
                r"capture\.max_hours: the budget is spent: 0\.56 hours for 20 of 30 prompts -> "
                r"raise capture\.max_hours and run again"
            ),
        ),
    ],
)
def test_a_budget_that_is_spent_stops_the_capture_unless_it_is_done(
    limit: dict[str, float], reason: str
) -> None:
    seconds = iter([0.0, 1000.0, 2000.0, 3000.0])
    pace = CaptureBudget(30, clock=lambda: next(seconds), **limit)  # type: ignore[arg-type]
    pace.record_unit(UnitProgress(10, 500, is_new=True))
    with pytest.raises(RefusedError, match=reason) as caught:
        pace.record_unit(UnitProgress(10, 600, is_new=True))
    assert caught.value.exit_code == 4
    assert pace.record_unit(UnitProgress(10, 600, is_new=True))[0] == 1.0
