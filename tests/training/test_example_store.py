"""Examples on disk are those that are made, bit for bit; what is damaged is made anew."""

from __future__ import annotations

import zlib
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from persea import load_renderer
from persea.alignment.event_map import EventMap, build_event_map
from persea.cache.reader import AnswerSubset, CacheReader, open_cache_reader
from persea.cache.unit import CachedAnswer, write_unit
from persea.chat.messages import Conversation, Text, ThinkingEffort
from persea.chat.renderer import ChatRenderer
from persea.distributions import DistributionKind, SparseDistributions, text_only_distributions
from persea.errors import DataError
from persea.losses import EventTargets
from persea.training.dataset import DistillDataset, build_dataset
from persea.training.example import Example, ExampleMaker, TeachEnd
from persea.training.example_store import EXAMPLE_FORMAT, ExampleStore, read_summary
from tests.training.test_dataset import captured, captures_of, voices  # noqa: F401

Renderers = dict[str, ChatRenderer]


@pytest.fixture(scope="module")
def maps(voices: Renderers) -> dict[str, EventMap]:
    return {name: build_event_map(voices[name], voices["llama"]) for name in ("qwen", "gemma")}


def units(folder: Path, answers: dict[str, list[CachedAnswer]]) -> CacheReader:
    for name, members in answers.items():
        kind = members[0].distributions.kind
        write_unit(
            folder,
            name,
            members,
            {},
            tau=0.1,
            kind=kind,
            unit_metadata={"teacher": members[0].teacher},
        )
    return open_cache_reader(folder, list(answers))


def storable(one: CachedAnswer) -> CachedAnswer:
    """With probabilities in (0, 1], no token twice in a row, and no realised token in it."""
    rows = one.distributions
    sizes = np.diff(rows.offsets_N1)
    column_M = np.arange(len(rows.ids_M)) - np.repeat(rows.offsets_N1[:-1], sizes)
    target_M = np.repeat(one.tokens.ids_T[one.tokens.loss_mask_T], sizes)
    # three ids in a row above or below the target
    ids_M = np.where(target_M > 100, target_M - 50, target_M + 50) + column_M
    return replace(
        one,
        distributions=replace(
            rows,
            ids_M=ids_M.astype(np.int32),
            probs_M=np.clip(rows.probs_M, 1e-3, 0.3).astype(np.float32),
        ),
    )


def some(renderers: Renderers, teacher: str, n: int) -> list[CachedAnswer]:
    return [storable(one) for one in captures_of(renderers, 3 * n) if one.teacher == teacher][:n]


def arrays(example: Example) -> dict[str, Any]:
    found: dict[str, Any] = {
        f.name: getattr(example.tokens, f.name) for f in fields(example.tokens)
    }
    found |= {f.name: getattr(example.targets, f.name) for f in fields(EventTargets)}
    return found | {"counts": example.counts}


def equal(one: Example, two: Example) -> bool:
    left, right = arrays(one), arrays(two)
    return (one.teacher, one.skill, one.language) == (two.teacher, two.skill, two.language) and all(
        left[name] is right[name] or left[name] == right[name]
        if isinstance(left[name], DistributionKind)
        else left[name].dtype == right[name].dtype and np.array_equal(left[name], right[name])
        for name in left
    )


def dataset(
    reader: Any, renderers: Renderers, maps: dict[str, EventMap], folder: Path | None, **more: Any
) -> DistillDataset:
    return build_dataset(
        [(reader, 1.0)],
        renderers["llama"],
        maps,
        batch_size=2,
        seed=0,
        max_length=more.pop("max_length", 512),
        example_folder=folder,
        **more,
    )


@pytest.mark.parametrize("partial_tokens", [False, True])
@pytest.mark.parametrize("teach_end", ["auto", "never"])
def test_a_stored_example_is_the_example(
    voices: Renderers,
    maps: dict[str, EventMap],
    tmp_path: Path,
    partial_tokens: bool,
    teach_end: TeachEnd,
):
    parts = {"a": some(voices, "qwen", 5), "b": some(voices, "gemma", 3)}
    reader = units(tmp_path / "cache", parts)
    settings: dict[str, Any] = {"partial_tokens": partial_tokens, "teach_end": teach_end}
    plain = dataset(reader, voices, maps, None, **settings)
    made = dataset(reader, voices, maps, tmp_path / "examples", **settings)
    read = dataset(reader, voices, maps, tmp_path / "examples", **settings)
    assert len(plain) == len(read) == 8 and len(list((tmp_path / "examples").iterdir())) == 2
    assert all(equal(plain[k], one[k]) for one in (made, read) for k in range(8))
    assert any(len(plain[k].targets.row_M) for k in range(8))
    assert plain.stats.to_json() == made.stats.to_json() == read.stats.to_json()


def test_topk_and_text_only_answers_are_stored_too(
    voices: Renderers,
    maps: dict[str, EventMap],
    tmp_path: Path,
):
    one, two = some(voices, "qwen", 2)
    rows = one.distributions
    topk = SparseDistributions(
        rows.offsets_N1,
        rows.ids_M,
        (rows.probs_M * np.float32(0.5)).astype(np.float32),
        rows.target_logprob_N,
        DistributionKind.TOPK,
    )
    text = text_only_distributions(int(two.tokens.loss_mask_T.sum()))
    reader = units(
        tmp_path / "cache",
        {"a": [replace(one, distributions=topk)], "b": [replace(two, distributions=text)]},
    )
    plain = dataset(reader, voices, maps, None)
    for _ in range(2):
        stored = dataset(reader, voices, maps, tmp_path / "examples")
        assert all(equal(plain[k], stored[k]) for k in range(2))
    assert len(plain[0].targets.row_R) and not len(plain[1].targets.row_M)


def test_a_later_start_makes_nothing(
    voices: Renderers,
    maps: dict[str, EventMap],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    reader = units(tmp_path / "cache", {"a": some(voices, "qwen", 4)})
    first = dataset(reader, voices, maps, tmp_path / "examples")

    def never(self: ExampleMaker, *args: object) -> Example:
        raise AssertionError("an example was made")

    monkeypatch.setattr(ExampleMaker, "align", never)
    heard: list[tuple[int, int]] = []
    again = dataset(
        reader,
        voices,
        maps,
        tmp_path / "examples",
        on_answer=lambda read, answers: heard.append((read, answers)),
    )
    assert heard == [(4, 4)]
    assert all(equal(first[k], again[k]) for k in range(4))
    with pytest.raises(AssertionError, match="was made"):  # another setting is another file
        dataset(reader, voices, maps, tmp_path / "examples", teach_end="never")


def test_too_long_and_unwritable_answers_are_counted_from_the_file(
    voices: Renderers,
    tmp_path: Path,
):
    maps = {"llama": build_event_map(voices["llama"], voices["gemma"])}
    texts = ("a b", "a\u2581b", "long " * 200, "c d")
    answers = [
        storable(
            captured(
                voices["llama"],
                "llama",
                k,
                Conversation.from_question(f"q{k}").with_answer(Text(text)),
            )
        )
        for k, text in enumerate(texts)
    ]
    answers[3] = replace(answers[3], answer=replace(answers[3].answer, effort=ThinkingEffort.HIGH))
    reader = units(tmp_path / "cache", {"a": answers})
    kept = AnswerSubset(reader, np.array([0, 1, 3]))
    for source, counts in ((reader, (2, 1, 1)), (kept, (2, 0, 1))):
        for _ in range(2):
            made = build_dataset(
                [(source, 1.0)],
                voices["gemma"],
                maps,
                batch_size=1,
                seed=0,
                max_length=200,
                example_folder=tmp_path / "examples",
            )
            told = made.stats
            assert (len(made), told.too_long, told.unrenderable) == counts
            assert "does not reproduce the text" in told.reasons[0]
            assert told.efforts == {"none": 1, "high": 1} and told.skipped["llama"] == 4 - 2 - (
                source is kept
            )


def test_a_damaged_file_is_made_anew_and_a_damaged_example_is_refused(
    voices: Renderers,
    maps: dict[str, EventMap],
    tmp_path: Path,
):
    reader = units(tmp_path / "cache", {"a": some(voices, "qwen", 4)})
    first = dataset(reader, voices, maps, tmp_path / "examples")
    (path,) = (tmp_path / "examples").iterdir()
    whole = path.read_bytes()
    found = 0
    for at in range(0, len(whole), max(1, len(whole) // 60)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        if read_summary(path) is None:
            again = dataset(reader, voices, maps, tmp_path / "examples")
            assert path.read_bytes() == whole
            assert all(equal(first[k], again[k]) for k in range(4))
            found += 1
            continue
        again = dataset(reader, voices, maps, tmp_path / "examples")
        bad = 0
        for k in range(4):
            try:
                assert equal(again[k], first[k])
            except DataError as error:
                assert "not as it was written" in str(error) and str(path) in error.remedy
                bad += 1
        found += bool(bad)
        path.write_bytes(whole)
    assert found >= 55  # the other bytes are padding or names of the header
    path.write_bytes(b"")
    assert read_summary(path) is None


def test_processes_share_the_work_and_other_files_are_deleted(
    voices: Renderers,
    maps: dict[str, EventMap],
    tmp_path: Path,
):
    parts = {name: some(voices, "qwen", k + 1) for k, name in enumerate("abcd")}
    for k, members in enumerate(parts.values()):
        parts["abcd"[k]] = [
            replace(m, answer=replace(m.answer, prompt_id=f"{k} {m.prompt_id}")) for m in members
        ]
    reader = units(tmp_path / "cache", parts)
    maker = ExampleMaker.create(voices["llama"], maps, False, "auto")
    store = ExampleStore(tmp_path / "examples", maker)
    store.build_missing([reader], 0, 2)
    assert len(list(store.folder.iterdir())) == 2
    store.build_missing([reader], 0, 1)
    assert len(list(store.folder.iterdir())) == 4
    (store.folder / "0.examples").write_bytes(b"of another student")
    (store.folder / ".1.examples.77.tmp").write_bytes(b"of a killed process")
    store.delete_others([reader])
    assert {path.name for path in store.folder.iterdir()} == {
        store.path(reader.folder, unit).name for unit in parts
    }


def test_what_an_example_is_has_not_changed_without_a_new_format():
    """Whoever changes rendering, alignment or projection raises EXAMPLE_FORMAT (or a digest that
    the key holds) with it: files of the old format must not be read.
    """
    renderers = {
        name: load_renderer(f"saplings/{name}-sapling")
        for name in ("qwen", "gemma", "gpt-oss", "llama")
    }
    maps = {
        name: build_event_map(renderers[name], renderers["llama"]) for name in ("qwen", "gemma")
    }
    maker = ExampleMaker.create(renderers["llama"], maps, True, "auto")
    total = 0
    for answer in (*some(renderers, "qwen", 3), *some(renderers, "gemma", 3)):
        for _, value in sorted(arrays(maker.make(answer)).items()):
            if isinstance(value, np.ndarray) and value.dtype.kind in "ib":
                total = zlib.crc32(value.astype(np.int64).tobytes(), total)
    assert (EXAMPLE_FORMAT, total) == (2, 4038690896)
