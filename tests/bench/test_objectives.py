"""bench/objectives in miniature: the whole experiment on real text with toy models, and the
parts whose truth is known.
"""

from __future__ import annotations

import importlib
import itertools
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from persea.alignment.event_map import load_event_map

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
pytestmark = pytest.mark.realdata

chunks = importlib.import_module("bench.objectives.chunks")
arms = importlib.import_module("bench.objectives.arms")
bench_data = importlib.import_module("bench.objectives.data")
extension = importlib.import_module("bench.objectives.extension")
methods = importlib.import_module("bench.objectives.methods")
models = importlib.import_module("bench.objectives.models")
onpolicy = importlib.import_module("bench.objectives.onpolicy")
report = importlib.import_module("bench.objectives.report")


@pytest.fixture(scope="module")
def world(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Teachers trained for four steps on the real texts, with tokenizers cut to 1,024 tokens."""
    torch.set_num_threads(1)
    patch = pytest.MonkeyPatch()
    patch.setenv("PERSEA_HOME", str(tmp_path_factory.mktemp("home")))
    made = arms.World(models.SIZES["toy"], tmp_path_factory.mktemp("objectives"))
    made.grow()
    yield made
    patch.undo()


def test_a_page_is_one_page_in_all_languages() -> None:
    assert bench_data.page_of("python-newest.c-api--allocation/id.po") == bench_data.page_of(
        "c-api/allocation.po"
    )
    assert bench_data.page_of("pages.zh_TW/common/tar.md") == bench_data.page_of(
        "pages/common/tar.md"
    )


def test_parts_share_no_page(world: Any) -> None:
    pages = {
        part: {w.page for pool in pools.values() for w in pool}
        for part, pools in world.text.items()
    }
    assert all(pages.values())
    for one, other in itertools.combinations(pages.values(), 2):
        assert not one & other


def test_windows_are_short_nfc_and_cover_the_document() -> None:
    document = bench_data.Document("th", "p", "สวัสดีชาวโลก สามร้อย\n" * 40 + "x" * 700)
    cut = bench_data.windows(document)
    assert "".join(w.text for w in cut) == document.text
    assert all(0 < len(w.text.encode()) <= bench_data.WINDOW for w in cut)


def test_cut_vocabularies_encode_every_text(world: Any) -> None:
    for who, speaker in world.speakers.items():
        size = world.size.vocabulary
        assert size <= len(speaker.vocabulary) <= size + 30, (
            who
        )  # the last token's parts and two control tokens
        texts = [
            w.text
            for d in bench_data.TEACHES.get(who, bench_data.DOMAINS)
            for w in world.text["test"][d][:20]
        ]
        speaker.vocabulary.encode_batch(texts)  # raises for a text whose bytes do not round-trip


def batch_of(world: Any) -> Any:
    return next(world.batches(arms.Arm("events", "full", 0.5, 1e-3, "unlimited", 1)))


def test_dense_whole_rows_equal_the_event_objective(world: Any) -> None:
    """events_full equals event_kl_loss on rows with every entry; sampled rows match on average."""
    batch = batch_of(world)
    torch.manual_seed(0)
    logits = torch.randn(len(batch.labels_N), len(world.speakers["student"].vocabulary))
    setting = methods.Setting("events", "full", 0.7)
    losses = []
    for rows in ("full", "top-k all"):
        own = logits.clone().requires_grad_()
        loss = methods.events(own, batch, world.pairs, replace(setting, rows=rows))
        loss.backward()
        losses.append((float(loss.detach()), own.grad))
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-4)
    assert torch.allclose(losses[0][1], losses[1][1], atol=1e-7)
    draws = float(methods.events(logits, batch, world.pairs, replace(setting, rows="sampled .01")))
    assert draws == pytest.approx(losses[0][0], rel=0.02)


@pytest.mark.parametrize(
    "method", [m for m in methods.METHODS if m not in ("cross-entropy", "sft")]
)
def test_share_zero_is_cross_entropy_and_every_method_has_a_gradient(
    world: Any, method: str
) -> None:
    batch = batch_of(world)
    torch.manual_seed(0)
    logits = torch.randn(
        len(batch.labels_N), len(world.speakers["student"].vocabulary), requires_grad=True
    )
    rows = "sampled .01" if " + " in method else "full"
    plain = methods.cross_entropy(logits, batch, {}, methods.Setting("cross-entropy", "none", 0.0))
    alone = methods.METHODS[method](logits, batch, world.pairs, methods.Setting(method, rows, 0.0))
    assert float(alone.detach()) == pytest.approx(float(plain.detach()), rel=1e-5)
    mixed = methods.METHODS[method](logits, batch, world.pairs, methods.Setting(method, rows, 0.7))
    (gradient,) = torch.autograd.grad(mixed, logits)
    (of_plain,) = torch.autograd.grad(plain, logits)
    assert bool(torch.isfinite(gradient).all())
    assert not torch.allclose(gradient, of_plain, atol=1e-6)


def test_bits_are_counted_by_hand(world: Any) -> None:
    speaker, windows = world.speakers["student"], world.text["test"]["en"][:3]
    model = models.make(world.size.student, len(speaker.vocabulary), seed=1)
    bits = 0.0
    for w in windows:
        ids = [speaker.start, *speaker.vocabulary.encode(w.text)]
        with torch.no_grad():
            logprobs = torch.log_softmax(
                model(input_ids=torch.tensor([ids])).logits[0].double(), -1
            )
        bits -= sum(float(logprobs[k, i]) for k, i in enumerate(ids[1:])) / np.log(2)
    found = arms.measure(model, speaker, windows).bits_per_byte()
    assert found == {
        "en": pytest.approx(bits / sum(len(w.text.encode()) for w in windows), rel=1e-4)
    }


def test_a_finished_run_is_skipped_and_a_seed_repeats(world: Any, tmp_path: Path) -> None:
    arm = arms.Arm("events", "sampled .01", 0.7, 4e-3, "limited", 1)
    first = arms.run_all(world, [arm], tmp_path / "a.jsonl")
    again = arms.run_all(world, [arm], tmp_path / "a.jsonl")
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 1
    assert first == again
    other = arms.run_all(world, [arm], tmp_path / "b.jsonl")
    assert other[0]["bits_per_byte"] == first[0]["bits_per_byte"]
    assert set(other[0]["bits_per_byte"]) == set(bench_data.DOMAINS)


def test_sft_text_is_as_long_as_the_windows(world: Any) -> None:
    for domain, pool in world.teacher_text.items():
        assert len(pool) == len(world.windows("unlimited", 1.0)[domain])
        assert all(0 < len(w.text.encode()) <= bench_data.WINDOW + 3 for w in pool)


# --- scripts that the student breaks into bytes, and its vocabulary extended ---


@pytest.fixture(scope="module")
def scripts(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same miniature in the world of scripts.

    Its students are pretrained on eight windows per domain and have 64 extra tokens.
    """
    size = replace(
        models.SIZES["toy"],
        name="toy-scripts",
        teaches=bench_data.SCRIPTS,
        batch=4,
        vocabulary=3000,
        seen=200,
        per_page=6,
        met=8,
        extended=64,
    )
    made = arms.World(size, tmp_path_factory.mktemp("scripts"))
    made.grow()
    return made


def test_learned_merges_are_the_most_frequent_pairs_by_hand() -> None:
    spec = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "post_processor": None,
        "decoder": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {
            "type": "BPE",
            "vocab": {"a": 0, "b": 1, "c": 2, "ab": 3},
            "merges": [["a", "b"]],
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
        },
    }
    backend = extension.Tokenizer.from_str(extension.json.dumps(spec))
    found = extension.learn_merges(
        backend, ["abc abc abca", "cc cc", "aaa"], 3
    )  # abc 3 times; then c c, a a and abc a: 2 of each but the last
    assert found[0] == ("ab", "c") and set(found[1:]) == {("c", "c"), ("a", "a")}
    longer = extension.Tokenizer.from_str(
        extension.json.dumps(extension.extend_tokenizer_spec(spec, found))
    )
    assert longer.encode("abca").tokens == ["abc", "a"] and longer.encode("aaa").tokens == [
        "aa",
        "a",
    ]
    assert extension.learn_merges(backend, ["abc"], 3) == []  # a pair must occur twice


def test_an_extended_student_encodes_the_same_bytes_in_fewer_tokens(scripts: Any) -> None:
    old, new = scripts.real["student"].vocabulary, scripts.speakers["student"].vocabulary
    assert len(new) == len(old) + 64
    texts = [w.text for d in ("km", "my", "lo") for w in scripts.text["test"][d][:20]]
    before, after = (
        old.encode_batch(texts),
        new.encode_batch(texts),
    )  # raises for a text whose bytes do not round-trip
    assert sum(map(len, after)) < 0.8 * sum(map(len, before))
    english = ["def f(x):\n    return x + 1", "All human beings are born free."]
    assert [old.decode([i]) for one in old.encode_batch(english) for i in one] == [
        new.decode([i]) for one in new.encode_batch(english) for i in one
    ]


def test_new_rows_are_the_mean_of_their_pieces_and_old_rows_stay(scripts: Any) -> None:
    plain, longer = scripts.real["student"], scripts.speakers["student"]
    model = models.make(scripts.size.student, len(plain.vocabulary), seed=3)
    rows = model.get_input_embeddings().weight.detach().clone()
    made = extension.carried(model, plain, longer)
    assert made.lm_head.weight is made.get_input_embeddings().weight and len(
        made.lm_head.weight
    ) == len(longer.vocabulary)
    fresh = 0
    for i in range(len(longer.vocabulary)):
        raw = longer.vocabulary.bytes_W[i]
        pieces = (
            [plain.start]
            if i == longer.start
            else plain.vocabulary.encode(raw.decode())
            if raw and _is_text(raw)
            else None
        )
        if pieces is not None and (len(pieces) > 1 or i == longer.start):
            fresh += len(pieces) > 1
            assert torch.allclose(made.lm_head.weight[i], rows[pieces].mean(0)), i
    assert fresh > 20


def _is_text(raw: bytes) -> bool:
    try:
        return bool(raw.decode())
    except UnicodeDecodeError:
        return False


def test_students_of_scripts_start_from_the_pretrained_one(scripts: Any, tmp_path: Path) -> None:
    one, other = scripts.begun(1), scripts.begun(2)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    trained_on = {w.text for pool in scripts.windows("unlimited", 1.0).values() for w in pool}
    assert not trained_on & {
        w.text for d in scripts.size.domains for w in scripts.text["train"][d][-8:]
    }
    never, plain = (
        arms.Arm("cross-entropy", "none", 0.0, 4e-3, "unlimited", 1, length)
        for length in (0.0, 1.0)
    )
    inside = arms.Arm("events + masks + completion", "sampled .01", 0.7, 4e-3, "unlimited", 1)
    lines = arms.run_all(scripts, [never, plain, inside], tmp_path / "a.jsonl")
    assert (
        lines[0]["bytes"] == 0
        and lines[1]["bytes"] == lines[2]["bytes"] > 0
        and lines[1]["mean"] < lines[0]["mean"]
    )
    assert set(lines[1]["bits_per_byte"]) == {"km", "my", "lo", "tha"}
    expected = report.extension_table(lines, {"toy-scripts": "64"}).splitlines()
    assert len(expected) == 5 and expected[2].startswith(
        "| 64 | cross-entropy |  | 0 | 1 |  | 0 | 0 |"
    )


# --- the report ---


def lines_of(seeds: int, better: float) -> list[dict[str, Any]]:
    """Return result lines of one method, `better` bits per byte below the same random pages."""
    rng = np.random.default_rng(0)
    pages = {
        d: [[float(b - better * 100), 100] for b in rng.normal(200, 20, 30)]
        for d in bench_data.DOMAINS
    }
    return [{"seed": s, "pages": pages} for s in range(seeds)]


def test_a_paired_difference_is_exact_and_equal_pages_cancel() -> None:
    gaps = report.compare_paired_results(lines_of(2, 0.1), lines_of(2, 0.0))
    for value, low, high in gaps.values():
        assert (
            value == pytest.approx(-0.1)
            and low == pytest.approx(-0.1)
            and high == pytest.approx(-0.1)
        )


@pytest.mark.parametrize(
    ("reached", "expected"), [(2.5, "1.0"), (2.25, "1.4"), (2.0, "2.0"), (2.6, "< 1")]
)
def test_tokens_to_equal_quality(reached: float, expected: str) -> None:
    assert report.token_factor([(1.0, 2.5), (2.0, 2.0), (4.0, 1.9)], reached) == expected
    assert (
        report.token_factor([(1.0, 2.5), (2.0, 2.0), (4.0, 2.1)], 1.8)
        == "not reached: best 2.000 at factor 2"
    )


def test_a_table_goes_between_its_marks_or_is_an_error(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- one -->\nold\n<!-- end -->\nb\n")
    report.write_tables(page, {"one": "new"})
    assert page.read_text() == "a\n<!-- one -->\nnew\n<!-- end -->\nb\n"
    with pytest.raises(SystemExit, match="0 places"):
        report.write_tables(page, {"two": "x"})


def test_masks_only_remove_mass_and_never_the_realised_event(world: Any) -> None:
    batch = batch_of(world)
    taken = 0
    for group in batch.groups:
        pair = world.pairs[group.who]
        for one in group.examples:
            free, masked = (methods.entries(one, pair, "top-k all", flag) for flag in (False, True))
            before = np.bincount(free.row_M, free.probs_M, minlength=len(one.student))
            after = np.bincount(masked.row_M, masked.probs_M, minlength=len(one.student))
            assert np.all(after <= before + 1e-5)
            taken += int(np.sum(after < before - 1e-6))
            realised = set(
                zip(
                    one.student_C.tolist(),
                    pair.event_map.teacher_event_W[one.spoken.ids_T[one.teacher_C]].tolist(),
                    strict=True,
                )
            )
            assert realised <= set(zip(masked.row_M.tolist(), masked.event_M.tolist(), strict=True))
    assert taken > 0


def test_spans_cover_the_same_bytes_and_weight_zero_is_events_with_masks(world: Any) -> None:
    batch = batch_of(world)
    found, impossible = chunks.gathered(batch, world.pairs)
    n = 0
    for group in batch.groups:
        for one, first in zip(group.examples, group.first_student, strict=True):
            own = chunks.stretches(one, world.pairs[group.who])
            for (a, b), ends in zip(own.student_C2, own.ends_C, strict=True):
                assert (
                    one.student.starts_T[a] in one.spoken.starts_T
                    and one.student.ends_T[b - 1] in one.spoken.ends_T
                )
                assert found.position_P[found.span_P == n].tolist() == list(
                    range(first + a, first + b)
                )
                assert int(found.end_C[n]) == (first + b if ends else -1)
                n += 1
    assert n == len(found.teacher_logprob_C) > 0 and bool((found.teacher_logprob_C < 1e-4).all())
    torch.manual_seed(0)
    logits = torch.randn(len(batch.labels_N), len(world.speakers["student"].vocabulary))
    assert not set(zip(impossible.row_D.tolist(), impossible.token_D.tolist(), strict=True)) & set(
        enumerate(batch.labels_N.tolist())
    )
    setting = methods.Setting("events + masks", "sampled .01", 0.7)
    without = methods.events_sparse(logits, batch, world.pairs, setting)
    assert float(chunks.with_chunks(0.0)(logits, batch, world.pairs, setting)) == pytest.approx(
        float(without), rel=1e-6
    )
    assert float(chunks.with_chunks(0.1)(logits, batch, world.pairs, setting)) > float(without)


def test_student_text_is_scored_by_its_teacher_and_a_run_learns(world: Any, tmp_path: Path) -> None:
    """Tokens of the student's text match their bytes, the loss is positive, and a step trains."""
    begun = onpolicy.Begun(world, arms.Arm("events", "sampled .01", 0.7, 4e-3, "unlimited", 1))
    model, student, pairs = begun.student(1), world.speakers["student"], begun.pairs()
    windows = [w for pool in begun.windows.values() for w in pool]
    assert not {w.text for w in windows} & {
        w.text for pool in world.windows("unlimited", 1.0).values() for w in pool
    }
    some = [
        own
        for own in onpolicy.sample_continuations(model, student, windows, seed=1)
        if own is not None
    ]
    assert len(some) > len(windows) // 3
    for own in some:
        teacher, raw = (
            world.speakers[bench_data.ASKED[own.window.domain]],
            own.text.encode(),
        )
        for tokens, speaker in zip(
            onpolicy.both_tokens(own, student, teacher), (student, teacher), strict=True
        ):
            placed = zip(tokens.starts_T[1:], tokens.ends_T[1:], tokens.ids_T[1:], strict=True)
            assert all(raw[a:b] == speaker.vocabulary.bytes_W[i] for a, b, i in placed)
            assert tokens.ends_T[-1] == len(raw)
        assert own.window.text.startswith(student.vocabulary.decode(own.ids[: own.prefix]).decode())
    loss = onpolicy.on_policy_loss(model, world.speakers, some, pairs)
    assert float(loss.detach()) > 0
    (line,) = onpolicy.run_all(
        world, begun.arm, [onpolicy.More("own", 1e-3, 1)], tmp_path / "lines.jsonl"
    )
    (before,) = onpolicy.run_all(
        world, begun.arm, [onpolicy.More("none", 1e-3, 1)], tmp_path / "lines.jsonl"
    )
    assert (
        line["tokens"] > 0 == before["tokens"] and line["bits_per_byte"] != before["bits_per_byte"]
    )
    assert all(
        trained_on >= 0 and own >= 0 and size > 0
        for trained_on, own, size in filter(None, line["continued"])
    )


def test_student_equal_to_its_teacher_has_zero_loss_on_its_own_text(world: Any) -> None:
    """With one vocabulary and one model on both sides, the loss is zero and the bits are equal."""
    who = "B"
    teacher = world.teachers[who]
    speakers = world.speakers | {"student": teacher.speaker}
    pair = onpolicy.TeacherScorer(
        onpolicy.asked(who, teacher),
        load_event_map(teacher.speaker.renderer, teacher.speaker.renderer),
    )
    windows = [w for d in bench_data.TEACHES[who] for w in world.text["test"][d][:3]]
    some = [
        onpolicy.own_words(teacher.speaker, w, teacher.speaker.vocabulary.encode(w.text))
        for w in windows
    ]  # as its tokenizer spells it
    assert (
        abs(float(onpolicy.on_policy_loss(teacher.model, speakers, some, {who: pair}).detach()))
        < 1e-5
    )
    assert all(own.text.startswith(w.text[:4]) for own, w in zip(some, windows, strict=True))
    measured = onpolicy.spoken_by(teacher.model, speakers, windows, {who: pair})
    spelled = [
        own
        for own in onpolicy.sample_continuations(teacher.model, teacher.speaker, windows, seed=7)
        if own is not None
    ]
    same = [list(own.ids) == teacher.speaker.vocabulary.encode(own.text) for own in spelled]
    lines = [one for one in measured["continued"] if one is not None]
    assert len(lines) == len(same) and all(
        abs(a - b) < 0.02 for (a, b, _), alike in zip(lines, same, strict=True) if alike
    )


def test_continuations_are_compared_window_by_window() -> None:
    """Windows that one run did not continue are left out of all; a constant gap has no spread."""
    text = {"continued": [[10.0, 4.0, 10], [30.0, 12.0, 20], None], "seed": 1}
    better = {"continued": [[9.0, 4.0, 10], [28.0, 12.0, 20], [1.0, 1.0, 1]], "seed": 1}
    assert report.reverse_kl_difference([better], [text]) == "-0.100 [-0.100, -0.100]"
    lines = [
        dict(
            line,
            on=on,
            part="test",
            rate=0.001,
            mean=2.0,
            taught=0.9,
            calibration=0.1,
            tokens=1000,
        )
        | {"self": 0.4}
        for on, line in (("text", text), ("own", better))
    ]
    cells = "0.001 | 1 | 2.000 | 0.900 | 0.400 | 0.500 | -0.100 [-0.100, -0.100] | 0.100 | 1"
    assert f"| on-policy | {cells} |" in report.onpolicy_table(lines)
