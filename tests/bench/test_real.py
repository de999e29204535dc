"""The bench with real models, on bundled ones: the same code, other folders."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.objectives.examples import Teacher
from bench.objectives.vocabularies import Speaker
from bench.real.extension import extended_spec, mapped_rows
from bench.real.methods import EVENTS, Lessons, loss_of
from bench.real.models import Trainee, bits, pack, pruned, speaker, states
from bench.real.onpolicy import Begun
from bench.real.parent import taught_beside
from bench.real.plan import next_run
from bench.real.report import reached_at, rows
from bench.real.teacher import RealTeacher, Scored, bytes_per_position, sampled
from bench.real.texts import Text, part_of
from bench.real.train import Run, batches, cross_entropy
from persea.chat.families.gemma import GEMMA
from persea.chat.families.llama import LLAMA
from persea.vocab_extension.map_embeddings import RowMethod

ROOT = Path(__file__).resolve().parents[2]
SAPLINGS = ROOT / "saplings"
TEXTS = ("Selamat pagi, dunia yang besar!", "Kota itu indah.", "สวัสดีครับ ชาวโลก", "a b")


def tiny(vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


@pytest.fixture(scope="module")
def student() -> Speaker:
    spec = (SAPLINGS / "llama-sapling" / "tokenizer.json").read_text()
    return speaker(spec, "student", LLAMA, "<|begin_of_text|>")


@pytest.fixture(scope="module")
def teacher() -> Speaker:
    spec = (SAPLINGS / "gemma-sapling" / "tokenizer.json").read_text()
    return speaker(spec, "teacher", GEMMA, "<bos>")


def scores(teacher: Teacher, text: str) -> Scored:
    ids = teacher.speaker.vocabulary.encode(text)
    with torch.no_grad():
        states_TD = states(teacher.model, pack([ids], teacher.speaker.start, 0))
    drawn = sampled(teacher, states_TD, ids, text)
    return Scored(tuple(ids), states_TD, torch.from_numpy(drawn.target_logprob_N), drawn)


@pytest.fixture(scope="module")
def lessons(
    student: Speaker, teacher: Speaker, tmp_path_factory: pytest.TempPathFactory
) -> Lessons:
    head = Teacher(teacher, tiny(len(teacher.vocabulary)).eval())
    real = SimpleNamespace(head=head, speaker=teacher, model=head.model, name="teacher")
    texts = [Text("ind", 0, t) for t in TEXTS]
    folder = tmp_path_factory.mktemp("targets")
    return Lessons(real, student, texts, [scores(head, t) for t in TEXTS], folder)  # type: ignore[arg-type]


def test_packed_texts_see_only_themselves(student: Speaker) -> None:
    model, end = tiny(len(student.vocabulary)).eval(), student.renderer.stop_ids[0]
    ids = student.vocabulary.encode_batch(list(TEXTS))
    with torch.no_grad():
        together = states(model, pack(ids, student.start, end))
        alone = torch.cat([states(model, pack([one], student.start, end)) for one in ids])
    assert torch.allclose(together, alone, atol=1e-5)


def test_bits_do_not_depend_on_the_batch(student: Speaker) -> None:
    model = tiny(len(student.vocabulary)).eval()
    whole, single = (bits(model, student, TEXTS, n) for n in (1000, 1))
    assert np.allclose(whole, single, rtol=1e-5)
    assert all(0 < text < with_end for text, with_end in whole)


def test_every_pass_reads_every_text_once() -> None:
    sizes = [100 + 10 * k for k in range(40)]
    steps = batches(sizes, 2, seed=1)
    half = len([k for step in steps for k in step]) // 2
    read = [k for step in steps for k in step]
    assert sorted(read[:half]) == sorted(read[half:]) == list(range(40))
    assert read != [k for step in batches(sizes, 2, seed=2) for k in step]
    part = [k for step in batches(sizes, 0.5, seed=1) for k in step]
    assert part == read[: len(part)]
    assert 0.5 <= sum(sizes[k] for k in part) / sum(sizes) < 0.55


def test_every_setting_is_part_of_the_key() -> None:
    run = Run("events", ("ind",), 12, 1, 1e-4)
    others = [
        replace(run, **{name: value})
        for name, value in (
            ("method", "strict"),
            ("languages", ("tha",)),
            ("kilobytes", 13),
            ("passes", 2),
            ("rate", 2e-4),
            ("seed", 2),
            ("share", 0.5),
            ("student", "taught 10 means"),
            ("more", 1),
            ("end", "teacher"),
            ("arithmetic", "single"),
            ("part", "test"),
            ("new_rows", 10.0),
            ("temperature", 2.0),
            ("entries", "top 8"),
            ("replay", 6),
        )
    ]
    assert len({one.key for one in (run, *others)}) == len(others) + 1


def test_kept_results_are_found_by_their_settings() -> None:
    lines = (ROOT / "bench" / "results" / "real.jsonl").read_text().splitlines()
    names = [one.name for one in fields(Run)]
    for line in map(json.loads, lines):
        settings = {k: line[k] for k in names if k in line}
        run = Run(**settings | {"languages": tuple(line["languages"])})
        assert run.key == line["key"]


@pytest.mark.parametrize("method", EVENTS)
def test_without_a_share_events_are_cross_entropy(lessons: Lessons, method: str) -> None:
    run = Run(method, ("ind",), 1, 1, 1e-4, share=0.0)
    chosen = [2, 0]
    ids = [lessons.lessons[k].student.ids_T.tolist() for k in chosen]
    packed = pack(ids, lessons.student.start, lessons.student.renderer.stop_ids[0])
    logits = torch.randn(len(packed.labels_S), len(lessons.student.vocabulary))
    found = loss_of(run, lessons)(logits, packed, chosen)
    expected = torch.nn.functional.cross_entropy(logits, packed.labels_S)
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    taught = loss_of(replace(run, share=0.7), lessons)(logits, packed, chosen)
    assert abs(float(taught) - float(expected)) > 1e-4


def test_the_end_is_taught_only_where_it_is_asked_for(lessons: Lessons) -> None:
    for k, one in enumerate(lessons.lessons):
        text, teacher = (lessons.targets(k, "events", end) for end in ("text", "teacher"))
        assert text.row_M.max() < len(one.student)
        assert teacher.row_M.max() == len(one.student)
        assert np.array_equal(text.row_M, teacher.row_M[teacher.row_M < len(one.student)])


@pytest.mark.parametrize("method", ["strict", "strict everywhere", "chunk", "bpm", "uld"])
def test_baselines_read_a_packed_batch(lessons: Lessons, method: str) -> None:
    chosen = [1, 3]
    ids = [lessons.lessons[k].student.ids_T.tolist() for k in chosen]
    packed = pack(ids, lessons.student.start, lessons.student.renderer.stop_ids[0])
    logits = torch.randn(len(packed.labels_S), len(lessons.student.vocabulary))
    run = Run(method, ("ind",), 1, 1, 1e-4, share=0.0)
    expected = torch.nn.functional.cross_entropy(logits, packed.labels_S)
    found = loss_of(run, lessons)(logits, packed, chosen)
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


def test_new_tokens_are_the_teachers(student: Speaker, teacher: Speaker) -> None:
    ours = {raw for raw in student.vocabulary.bytes_W if raw}
    words = [
        raw.decode()
        for raw in teacher.vocabulary.bytes_W
        if raw and raw not in ours and raw.isascii() and raw.isalpha() and len(raw) > 2
    ]
    text = student.vocabulary.backend.to_str()
    spec = extended_spec(text, 40, teacher.vocabulary, [words * 3], [[]])
    found = speaker(spec, "longer", LLAMA, "<|begin_of_text|>")
    known = {raw for raw in teacher.vocabulary.bytes_W if raw}
    new = [raw for raw in found.vocabulary.bytes_W[len(student.vocabulary) :] if raw]
    assert new
    for raw in new:
        assert raw in known or (raw[0] >= 0xC0 and all(0x80 <= b < 0xC0 for b in raw[1:]))
    for text in (*TEXTS, *words):
        ids = found.vocabulary.encode(text)
        assert found.vocabulary.decode(ids) == text.encode()
        assert len(ids) <= len(student.vocabulary.encode(text))
    assert any(len(found.vocabulary.encode(w)) < len(student.vocabulary.encode(w)) for w in words)


@pytest.mark.parametrize("method", ["ridge", "orthogonal"])
def test_a_linear_map_is_found(student: Speaker, teacher: Speaker, method: RowMethod) -> None:
    ours, theirs = tiny(len(student.vocabulary)), tiny(len(teacher.vocabulary))
    torch.manual_seed(1)
    linear = torch.randn(16, 16)
    if method == "orthogonal":
        linear, _ = torch.linalg.qr(linear)
    of_teacher = {raw: i for i, raw in enumerate(teacher.vocabulary.bytes_W) if raw}
    both = [
        (i, of_teacher[raw])
        for i, raw in enumerate(student.vocabulary.bytes_W)
        if raw and raw in of_teacher and len(raw) > 1
    ]
    with torch.no_grad():
        own, other = (m.get_input_embeddings().weight for m in (ours, theirs))
        for i, j in both:
            own[i] = other[j] @ linear
    new = [i for i, _ in both[:5]]
    at, rows = mapped_rows(ours, theirs, student.vocabulary, teacher.vocabulary, new, method)
    assert at == new
    expected = torch.stack([own[i] for i in new]).detach()
    assert torch.nn.functional.cosine_similarity(rows, expected).min() > 0.98


@pytest.mark.parametrize("half", [False, True])
def test_new_rows_learn_faster_and_nothing_else_changes(student: Speaker, half: bool) -> None:
    first = len(student.vocabulary) - 3
    packed = pack([student.vocabulary.encode(TEXTS[0])], student.start, first + 1)
    moved = []
    for faster in (1.0, 10.0):
        model = tiny(len(student.vocabulary))
        before = model.get_input_embeddings().weight.detach().float().clone()
        trainee = Trainee(model, half, first, faster)
        loss = torch.nn.functional.cross_entropy(trainee.logits(packed), packed.labels_S)
        trainee.step(loss, 1e-3)
        moved.append(trainee.embedding.detach() - before)
    slow, fast = moved
    assert torch.equal(slow[:first], fast[:first])
    assert torch.allclose(10 * slow[first:], fast[first:], atol=1e-5)
    assert fast[first + 1].abs().max() > 5e-3


def test_a_pruned_student_keeps_its_first_and_last_layer(student: Speaker) -> None:
    torch.manual_seed(0)
    config = tiny(8).config
    config.num_hidden_layers = 5
    whole = LlamaForCausalLM(config).eval()
    first, middle, last = (whole.model.layers[k] for k in (0, 2, 4))
    small = pruned(whole, 3)
    assert list(small.model.layers) == [first, middle, last]
    packed = pack([[1, 2, 3]], 0, 4)
    assert states(small, packed).shape == (4, config.hidden_size)


def test_a_parent_teaches_the_texts_it_has(student: Speaker) -> None:
    torch.manual_seed(3)
    ids = student.vocabulary.encode_batch(list(TEXTS[:2]))
    packed = pack(ids, student.start, student.renderer.stop_ids[0])
    head = torch.randn(len(student.vocabulary), 16)
    hidden = torch.randn(len(packed.labels_S), 16)
    of = {7: hidden[packed.text_S == 1]}
    longer = torch.cat([hidden @ head.T, torch.full((len(hidden), 2), -1e4)], 1)
    found = taught_beside(cross_entropy, head, of, 1.0)(longer, packed, [3, 7])
    own = torch.nn.functional.cross_entropy(longer, packed.labels_S, reduction="none")
    # the student is the parent, so that its second text has no loss
    expected = own[packed.text_S == 0].sum() / len(own)
    assert float(found) == pytest.approx(float(expected), rel=1e-4)
    assert float(taught_beside(cross_entropy, head, {}, 1.0)(longer, packed, [3, 7])) == (
        pytest.approx(float(own.mean()))
    )


@pytest.mark.parametrize("entries", ["", "sampled .2", "top 4", "kl .3"])
def test_distributions_are_kept_in_other_ways(teacher: Speaker, entries: str) -> None:
    head = Teacher(teacher, tiny(len(teacher.vocabulary)).eval())
    real = RealTeacher(Path(), Path())
    vars(real).update(speaker=teacher, model=head.model, head=head)
    scored = [scores(head, t) for t in TEXTS]
    found = real.redrawn(scored, TEXTS, entries, 1.0)
    for one, before in zip(found, scored, strict=True):
        assert len(one.drawn) == len(one.ids) + 1
        assert np.allclose(one.drawn.target_logprob_N, before.drawn.target_logprob_N, atol=2e-3)
    if entries == "top 4":
        assert np.array_equal(np.diff(found[0].drawn.offsets_N1), [4] * len(found[0].drawn))
    assert bytes_per_position(found, teacher, entries) > 0
    hot = real.redrawn(scored, TEXTS, entries, 3.0)
    assert hot[0].drawn.target_logprob_N.std() < found[0].drawn.target_logprob_N.std()


def test_the_students_own_words_are_scored_by_the_teacher(lessons: Lessons) -> None:
    model = tiny(len(lessons.student.vocabulary))
    world = SimpleNamespace(teacher=lessons.teacher)
    run = Run(EVENTS[-1], ("ind",), 1, 1, 1e-4)
    begun = Begun(world, run, lessons.student, lessons.texts, lessons)  # type: ignore[arg-type]
    said = begun.said(model, lessons.texts, seed=1)
    assert [one.tokens > 0 for one in said] == [True] * len(said)
    again = begun.said(model, lessons.texts, seed=1)
    assert [one.own for one in said] == [one.own for one in again]
    own = [one.own for one in said if one.own is not None]
    assert own
    loss = begun.on_policy_loss(model, own)
    assert loss is not None and torch.isfinite(loss)
    loss.backward()  # type: ignore[no-untyped-call]
    grad = model.get_input_embeddings().weight.grad
    assert grad is not None and grad.abs().sum() > 0


@pytest.mark.parametrize("arithmetic", ["single", "half", "autocast"])
def test_a_step_lowers_the_loss(student: Speaker, arithmetic: str) -> None:
    trainee = Trainee(
        tiny(len(student.vocabulary)), arithmetic == "half", autocast=arithmetic == "autocast"
    )
    assert (trainee.model.dtype is torch.bfloat16) is (arithmetic == "half")
    ids = student.vocabulary.encode_batch(list(TEXTS))
    packed = pack(ids, student.start, student.renderer.stop_ids[0])
    losses = []
    for _ in range(8):
        logits = trainee.logits(packed)
        loss = torch.nn.functional.cross_entropy(logits, packed.labels_S)
        losses.append(float(loss.detach()))
        trainee.step(loss, 1e-2)
    assert losses[-1] < losses[0] - 0.3


def test_parts_have_their_shares() -> None:
    parts = [part_of(block) for block in range(2000)]
    assert [parts.count(p) for p in ("test", "dev")] == pytest.approx([400, 200], rel=0.15)


def test_the_plan_ends_and_repeats_no_run() -> None:
    done: dict[str, dict[str, float]] = {}
    while (run := next_run(done)) is not None:
        assert run.key not in done
        done[run.key] = {"mean": 1.0 + run.rate, "english": 1.0}
        assert len(done) < 200
    assert len(done) > 60
    assert next_run({}) == Run("none", ("ind", "tha"), 12, 0, 0.0)


def line(method: str, student: str, seed: int, shift: float, cpu: float) -> dict[str, Any]:
    texts = [[b, 100.0 * (2 + b % 3) + 50 * shift, 0.0, 50 + b] for b in range(30)]
    mean = sum(t[1] for t in texts) / sum(t[3] for t in texts)
    run = Run(method, ("ind",), 12, 1, 1e-4, seed=seed, student=student)
    found = {"bits_per_byte": mean, "texts": texts}
    return {
        **asdict(run),
        "mean": mean,
        "english": 1.0,
        "cpu_seconds": cpu,
        "steps": 2,
        "curve": [[1, 0, 0, cpu / 2, mean + 1]],
        "measured": {"ind": found},
    }


def test_rows_are_paired_with_cross_entropy() -> None:
    lines = [
        line("none", "plain", 1, 10, 0),
        line("teacher", "plain", 1, -1, 0),
        line("cross-entropy", "plain", 1, 1.0, 100),
        line("cross-entropy", "plain", 2, 1.2, 100),
        line("events", "plain", 1, 0.0, 100),
        line("events", "plain", 2, 0.2, 100),
        line("events", "taught 10 means", 1, -0.5, 90)
        | {"capture_seconds": 70, "targets_seconds": 30},
    ]
    found = {(r["method"], r["student"]): r for r in rows(lines)}
    events = found["events", "plain"]
    gain, low, high = events["beside_cross_entropy"]
    assert gain == pytest.approx(-50 * 30 / sum(50 + b for b in range(30)), abs=1e-3)
    assert low <= gain <= high < 0
    assert events["seeds"] == [1, 2]
    assert events["reached_at"] == pytest.approx((2 + gain) / 2, abs=0.01)
    assert events["gap"] > found["cross-entropy", "plain"]["gap"] > 0
    longer = found["events", "taught 10 means"]
    assert longer["beside_cross_entropy"] is None
    assert longer["equal_cpu"]["minus_cross_entropy"][0] < gain
    assert longer["equal_cpu"]["its_student"] == "plain"
    assert longer["with_capture"]["bill"] == 190
    assert "equal_cpu" not in found["cross-entropy", "plain"]


def test_a_goal_is_reached_between_two_points() -> None:
    points = {"curve": [[10, 0, 0, 0, 3.0], [20, 0, 0, 0, 2.0]], "steps": 40, "part": "test"}
    assert reached_at(points, 2.5) == pytest.approx(15 / 40)
    assert reached_at(points, 3.5) == pytest.approx(10 / 40)
    assert reached_at(points | {"part": "dev", "mean": 1.5}, 1.75) == pytest.approx(30 / 40)
    assert reached_at(points, 1.0) is None
