"""The river on the real vocabularies of four families, with prompts of fifteen languages, sums,
code and safety.
"""

from __future__ import annotations

import csv
import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from persea.cache import unit as cache
from persea.config.recipe import load_recipe
from persea.pipeline.run_context import RunContext
from persea.pipeline.stages import run_pipeline
from tests.alignment.test_event_map import real_event_map, real_home
from tests.conftest import ROOT, Speaker

assert real_home  # a fixture of test_event_map: event maps are built once for both
TEACHERS = {"qwen3": "qwen", "gemma3": "gemma", "gpt-oss": "gpt-oss"}
SIZES = {"qwen3": 151_669, "gemma3": 262_145, "gpt-oss": 201_088, "llama3": 128_256}
STEPS = 12


def short(text: str) -> str:
    """A text that costs little: what matters here is the script, not the story."""
    return unicodedata.normalize("NFC", text.strip()[:32]).strip()


def prompts(data: Path) -> dict[str, list[dict[str, str]]]:
    """Skill -> rows of a .jsonl file."""
    english = (data / "parallel" / "ntrex.eng.txt").read_text(encoding="utf-8").splitlines()
    languages = []
    for file in sorted((data / "parallel").glob("ntrex.*.txt")):
        lines = file.read_text(encoding="utf-8").splitlines()
        languages += [
            {
                "id": f"{file.stem} {k}",
                "prompt": short(f"{file.stem[6:]}: {english[k]}"),
                "answer": short(lines[k]),
                "language": file.stem.removeprefix("ntrex."),
            }
            for k in (3,)
        ]
    sums = [
        json.loads(line)
        for line in (data / "eval" / "gsm8k.train.jsonl")
        .read_text(encoding="utf-8")
        .splitlines()[:4]
    ]
    code = [
        json.loads(line)
        for line in (data / "eval" / "mbpp.jsonl").read_text(encoding="utf-8").splitlines()[:4]
    ]
    with (data / "eval" / "xstest_prompts.csv").open(encoding="utf-8", newline="") as file:
        safety = list(csv.DictReader(file))[::120]
    return {
        "languages": languages,
        "reasoning": [
            {"prompt": short(row["question"]), "answer": short(row["answer"])} for row in sums
        ],
        "code": [{"prompt": short(row["text"]), "answer": short(row["code"])} for row in code]
        + [
            {
                "prompt": short(row["prompt"]),
                "answer": short(f"This question is of type {row['type']}."),
            }
            for row in safety
        ],
    }


def lines(path: Path) -> Iterator[dict[str, object]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        yield json.loads(line)


@pytest.mark.realdata
def test_the_river_flows_through_four_real_vocabularies(
    data: Path,
    real_of: Callable[[str], Speaker],
    real_home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("PERSEA_HOME", str(real_home))
    monkeypatch.setenv("PERSEA_DATA", str(data))
    rows = prompts(data)
    for skill, said in rows.items():
        (tmp_path / f"{skill}.jsonl").write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in said), encoding="utf-8"
        )
    corpus = json.dumps(
        [{"skill": skill, "file": str(tmp_path / f"{skill}.jsonl")} for skill in rows]
    )
    recipe = load_recipe(
        ROOT / "recipes" / "real-vocabularies.yaml",
        [
            f"corpus={corpus}",
            "audition.items=1",
            "capture.max_new_tokens=2",
            "capture.prompts_per_unit=16",
            f"training.steps={STEPS}",
            "training.checkpoint_every=1000",
            "training.learning_rate=0.02",
            "check.min_common_share=0.2",
            "check.max_lines_per_text=2",
        ],
    )
    assert [t.name for t in recipe.teachers] == list(TEACHERS)
    river = RunContext(recipe, tmp_path / "run")
    # opened once for the whole session: the same folders, templates and date, 3 to 6 s each
    vars(river.models)["student_renderer"] = real_of("llama").renderer
    vars(river.models)["renderers"] = {
        name: real_of(family).renderer for name, family in TEACHERS.items()
    }
    for voice in river.models.renderers.values():
        real_event_map(voice, river.models.student_renderer, real_home)
    told: list[str] = []
    for stage in ("check", "audition", "capture", "train"):
        run_pipeline(river, lambda name, share, words: told.append(name), stage)
    assert list(dict.fromkeys(told)) == ["check", "audition", "capture", "train"]

    for name, voice in {**river.models.renderers, "llama3": river.models.student_renderer}.items():
        assert len(voice.vocabulary) == SIZES[name]
    pairs = json.loads((tmp_path / "run" / "check" / "check.json").read_text())["pairs"]
    assert {p["teacher"] for p in pairs} == set(TEACHERS)
    assert len({p["language"] for p in pairs if p["skill"] == "texts"}) == 17
    # two lines a language are few, and the given answers of the corpus are fewer still
    assert all(p["event_disagreement"] < (0.1 if p["skill"] == "texts" else 0.25) for p in pairs)

    # every prompt was answered by the teacher of its skill, with rows over that teacher's own
    # vocabulary
    captured = [
        c
        for unit in river.capture_units
        for c in cache.read_unit(tmp_path / "run" / "capture", unit.name)
    ]
    assert len(captured) == sum(map(len, rows.values())) == len(river.corpus.prompts)
    asked = Counter((c.answer.skill, c.answer.teacher) for c in captured)
    assert asked == {("languages", "qwen3"): 15, ("reasoning", "gpt-oss"): 4, ("code", "gemma3"): 8}
    assert {c.answer.language for c in captured if c.answer.skill == "languages"} == {
        r["language"] for r in rows["languages"]
    }
    assert len({r["language"] for r in rows["languages"]}) == 15
    said = {c.answer.prompt_id: c.answer.text for c in captured}
    assert all(said[row["id"]] == row["answer"] for row in rows["languages"])
    for name in TEACHERS:
        ids = np.concatenate([c.distributions.ids_M for c in captured if c.answer.teacher == name])
        assert ids.min() >= 0
        assert SIZES[name] * 0.99 < ids.max() < SIZES[name], "random weights know every token"
        mass = [
            c.distributions.probs_M[a:b].sum()
            for c in captured
            if c.answer.teacher == name
            for a, b in zip(
                c.distributions.offsets_N1[:-1], c.distributions.offsets_N1[1:], strict=True
            )
        ]
        assert np.abs(np.array(mass) - 1).max() <= recipe.capture.sampling_threshold + 1e-4

    # and the student learned from all of them
    feed = json.loads((tmp_path / "run" / "train" / "dataset.json").read_text())
    laid = feed.pop("supervision")
    assert sum(feed.pop("examples").values()) == len(captured)
    assert feed == {
        "skipped": {},
        "too_long": 0,
        "unrenderable": 0,
        "reasons": [],
        "efforts": {"none": len(captured)},
        "thinking_dropped": 0,
        "held_out": 0,
    }
    assert {row["teacher"] for row in laid} == set(river.models.renderers)
    for row in laid:
        assert row["event"] + row["partial_token"] + row["span"] + row["text"] == pytest.approx(
            1, abs=3e-4
        )
        assert (
            0.9 < row["mass_retained"] <= 1
        )  # random weights: what cannot stand is as likely as any other token
    log = list(lines(tmp_path / "run" / "train" / "metrics.jsonl"))
    assert len(log) == STEPS
    taught = Counter[str]()
    for line in log:
        taught.update({name: 1 for name, share in line["share"].items() if share > 0})
    assert set(taught) == set(TEACHERS)
    first, last = (float(np.mean([line["loss"] for line in some])) for some in (log[:3], log[-3:]))
    print(
        f"\nloss {first:.3f} -> {last:.3f} in {STEPS} steps; log V = {np.log(SIZES['llama3']):.3f}"
    )
    assert first == pytest.approx(np.log(SIZES["llama3"]), abs=1.5), (
        "an untrained student knows nothing"
    )
    assert last < first - 0.5
    for term in ("event_kl", "cross_entropy"):
        assert np.mean([line["terms"][term] for line in log[-3:]]) < np.mean(
            [line["terms"][term] for line in log[:3]]
        )
    assert (tmp_path / "run" / "train" / "student" / "model.safetensors").is_file()
