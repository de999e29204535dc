"""The whole river on the saplings, in processes of its own: once, again, from the middle, killed,
changed, verb by verb.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from persea import storage as store
from persea.evaluation.compatibility import MAX_TEMPLATE_EXCESS_BITS_PER_BYTE
from persea.models.placement import compute_device, uses_bfloat16
from persea.pipeline.lineage_stage import trained_precision
from tests.cli.test_cli import STAGES, TINY, flowed, flowed_copy, persea, recipe, start, tree

FILES = {
    "check": {"check.json"},
    "capture": {"summary.json"},
    "evaluate": {"evaluation.json", "examples.jsonl"},
    "lineage": {"lineage.json"},
    "audition": {
        "cast.json",
        "table.md",
        # each pinned teacher, and the base on the same questions
        *(f"{teacher}.{skill}.jsonl" for skill, teacher in TINY["audition"]["pinned"].items()),
        *(f"base.{skill}.jsonl" for skill in TINY["audition"]["pinned"]),
    },
    "train": {
        "metrics.jsonl",
        "dataset.json",
        "student/model.safetensors",
        "student/config.json",
        "student/tokenizer.json",
        "student/tokenizer_config.json",
        "student/chat_template.jinja",
        "student/generation_config.json",
    },
    "report": {"report.json", "index.html", "README.md"},
}
JOURNAL = ("lock", "status.json", "ledger.jsonl")  # written by every run, whatever it does

CLOCK_KEYS = ("seconds", "cpu_seconds", "state", "metrics", "outputs", "seal", "left")


def told(err: str) -> dict[str, str]:
    """stage -> "up to date" or "worked", from what the run said."""
    return {
        stage: "up to date" if f"{stage:>9} 100% up to date" in err else "worked"
        for stage in STAGES
        if f"{stage:>9} " in err
    }


def times(folder: Path) -> dict[str, int]:
    return {
        str(p.relative_to(folder)): p.stat().st_mtime_ns
        for p in folder.rglob("*")
        if p.is_file() and p.name not in (*JOURNAL, "README.md", "NOTICE", "lineage.json")
    }


def student(folder: Path) -> str:
    return store.digest_file(folder / "run" / "train" / "student" / "model.safetensors")


def without_clocks(files: dict[str, bytes]) -> dict[str, object]:
    """File contents of a run folder, without what a clock or a process id wrote."""
    out: dict[str, object] = {}
    for name, data in files.items():
        if name.endswith(".pt") or name in JOURNAL or name.startswith("report/"):
            continue  # a checkpoint and the page hold seconds
        if name.endswith(("done.json", "metrics.jsonl")) or "checkpoints" in name:
            lines: list[dict[str, Any]] = (
                [json.loads(line) for line in data.splitlines()]
                if name.endswith(".jsonl")
                else [json.loads(data)]
            )
            for line in lines:
                for key in CLOCK_KEYS:
                    line.pop(key, None)
            out[name] = (
                lines
                if "evaluate" not in name and "lineage" not in name and "report" not in name
                else None
            )
        else:
            out[name] = data
    return out


@pytest.fixture(scope="module")
def whole() -> Path:
    """The folder of the whole run, made once; tests look and do not touch."""
    folder, ended = flowed()
    assert ended.code == 0, ended.err
    return folder


def test_a_run_ends_with_the_table_and_the_files_of_every_stage(whole: Path) -> None:
    _, ended = flowed()
    assert told(ended.err) == dict.fromkeys(STAGES, "worked")
    head, *rows = [line.split() for line in ended.out.splitlines()]
    assert head == [
        "skill",
        "student",
        "base",
        "qwen-sapling",
        "gemma-sapling",
        "gpt-oss-sapling",
        "retained",
    ]
    assert [
        row[0]
        for row in rows
        if re.fullmatch(r"[a-z/]+( \d\.\d\d\*?){5}( \d+%| -)?", " ".join(row))
    ] == ["languages", "code", "reasoning", "bits/byte"]
    assert all(
        any(cell.endswith("*") for cell in row)
        for row in rows
        if row[0] in TINY["audition"]["pinned"]
    )
    assert ended.out.endswith("page     run/report/index.html\nstudent  run/train/student\n")
    for stage, names in FILES.items():
        record = json.loads((whole / "run" / stage / "done.json").read_text())
        assert names <= record["outputs"].keys(), stage
        assert all(
            store.digest_file(whole / "run" / stage / name) == sha
            for name, sha in record["outputs"].items()
        )
    assert (
        len(list((whole / "run" / "capture" / "units").iterdir()))
        == len(list((whole / "run" / "capture" / "commits").iterdir()))
        == 9
    )
    assert not list((whole / "run").rglob(".*"))


def test_a_second_run_skips_everything_and_touches_nothing(whole: Path) -> None:
    before = times(whole / "run")
    begin = time.monotonic()
    ended = persea("run", "tiny.yaml", "--out", "run", folder=whole)
    assert ended.code == 0
    assert told(ended.err) == dict.fromkeys(STAGES, "up to date")
    assert times(whole / "run") == before
    assert ended.out == flowed()[1].out
    assert time.monotonic() - begin < 20


def test_a_stage_that_was_deleted_is_made_again_with_what_follows(tmp_path: Path) -> None:
    run = flowed_copy(tmp_path, *STAGES) / "run"
    shutil.rmtree(run / "evaluate")
    before = times(run)
    ended = persea("run", "tiny.yaml", "--out", "run", folder=tmp_path)
    assert told(ended.err) == dict.fromkeys(STAGES, "up to date") | {
        "evaluate": "worked"
    }  # the same evaluation: the same report
    assert {n: t for n, t in times(run).items() if n in before} == before
    assert (run / "evaluate" / "evaluation.json").read_bytes() == (
        flowed()[0] / "run" / "evaluate" / "evaluation.json"
    ).read_bytes()


def test_fine_tuning_on_the_text_alone_and_other_ways_to_compute_a_step(tmp_path: Path) -> None:
    run = flowed_copy(tmp_path, "check", "audition", "capture") / "run"
    options = [
        word
        for pair in (
            "training.objective=sft",
            "training.steps=2",
            "training.log_every=1",
            "training.precision=bfloat16",
            "training.gradient_checkpointing=true",
            "training.packing=true",
            "training.loss_balancing=deviation",
        )
        for word in ("--set", pair)
    ]
    ended = persea("train", "tiny.yaml", "--out", "run", *options, folder=tmp_path)
    assert ended.code == 0, ended.err
    lines = [
        json.loads(line) for line in (run / "train" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(
        set(line["terms"]) == {"cross_entropy"}
        and line["loss"] == pytest.approx(line["terms"]["cross_entropy"])
        for line in lines
    )
    assert all(sum(line["share"].values()) == pytest.approx(1) for line in lines)
    weights = [
        [part["weight"] for parts in line["groups"].values() for part in parts.values()]
        for line in lines
    ]
    assert set(weights[0]) == {1.0} != set(weights[1])  # nothing was heard before the first step


def test_a_precision_left_to_the_machine_is_recorded_by_the_training(tmp_path: Path) -> None:
    run = flowed_copy(tmp_path, "check", "audition", "capture") / "run"
    options = ("--set", "training.steps=1", "--set", "training.precision=auto")
    ended = persea("train", "tiny.yaml", "--out", "run", *options, folder=tmp_path)
    assert ended.code == 0, ended.err
    counts = json.loads((run / "train" / "dataset.json").read_text())
    here = "bfloat16" if uses_bfloat16("auto", compute_device()) else "float32"
    assert counts["precision"] == here
    # the record tells what the training's machine chose, not the one that writes the record
    for told in ({"precision": "bfloat16"}, {"precision": "float32"}, {}):
        kept = {key: value for key, value in counts.items() if key != "precision"}
        (run / "train" / "dataset.json").write_text(json.dumps(kept | told))
        assert trained_precision(run) == told


def test_an_evaluation_of_other_items_makes_what_follows_again(tmp_path: Path) -> None:
    run = flowed_copy(tmp_path, *STAGES) / "run"
    before = times(run / "train") | times(run / "capture")
    ended = persea(
        "run", "tiny.yaml", "--out", "run", "--set", "evaluation.max_new_tokens=40", folder=tmp_path
    )
    assert ended.code == 0
    assert told(ended.err) == {
        s: "worked" if s in ("evaluate", "lineage", "report") else "up to date" for s in STAGES
    }
    assert times(run / "train") | times(run / "capture") == before
    assert "max_new_tokens: 40" in (run / "recipe.yaml").read_text()


@pytest.mark.parametrize(
    ("verb", "change"), [("run", "training.steps=9"), ("train", "training.learning_rate=1e-4")]
)
def test_a_finished_student_is_never_overwritten_by_another_recipe(
    tmp_path: Path, verb: str, change: str
) -> None:
    run = flowed_copy(tmp_path, *STAGES) / "run"
    before = tree(run)
    ended = persea(verb, "tiny.yaml", "--out", "run", "--set", change, folder=tmp_path)
    assert ended.code == 4
    key, _, value = change.partition("=")
    was = {"training.steps": "8", "training.learning_rate": "0.003"}[key]
    assert (
        f"the folder holds a finished student of another recipe, base or capture ({key}: {was} -> "
        f"{float(value):g}) -> give this run another --out" in ended.err
    )
    assert ended.err.count("persea: ") == 1
    assert {n: d for n, d in tree(run).items() if n not in JOURNAL} == before  # recipe.yaml too


def test_what_a_new_audition_forbids_is_refused_before_the_capture(tmp_path: Path) -> None:
    run = flowed_copy(tmp_path, *STAGES) / "run"
    before = times(run / "capture")
    sets = ("audition.pinned={}", "audition.items=2", "capture.sampling_threshold=0.05")
    options = [x for one in sets for x in ("--set", one)]
    ended = persea("run", "tiny.yaml", "--out", "run", *options, folder=tmp_path)
    assert ended.code == 4, ended.err
    assert "finished student of another recipe" in ended.err
    assert told(ended.err).get("capture") is None
    assert times(run / "capture") == before


@pytest.mark.parametrize(
    "changes",
    [
        {"student": TINY["student"] | {"adapt": "lora", "lora": {"rank": 2, "alpha": 4}}},
        {"student": {"model": TINY["teachers"][0]["model"]}},
    ],
    ids=["lora", "base"],
)
def test_another_student_is_another_training(tmp_path: Path, changes: dict[str, Any]) -> None:
    flowed_copy(tmp_path, "audition", "capture", "train")
    ended = persea("train", recipe(tmp_path, **changes), "--out", "run", folder=tmp_path)
    assert ended.code == 4, ended.err


def test_the_shape_of_the_adapters_is_part_of_the_training(tmp_path: Path) -> None:
    flowed_copy(tmp_path, "check", "audition", "capture")
    lora = TINY["student"] | {"adapt": "lora", "lora": {"rank": 2, "alpha": 4}}
    made = [persea("train", recipe(tmp_path, student=lora), "--out", "run", folder=tmp_path).code]
    made.append(
        persea(
            "train",
            recipe(tmp_path, student=lora | {"lora": {"rank": 2, "alpha": 8}}),
            "--out",
            "run",
            folder=tmp_path,
        ).code
    )
    assert made == [0, 4]


def test_killed_while_it_trains_it_goes_on_to_the_same_student(tmp_path: Path) -> None:
    run = flowed_copy(tmp_path, "check", "audition", "capture") / "run"
    for words in (
        "train  12%",
        "train  50%",
        "train  88%",
    ):  # before the first checkpoint, between two, before the last
        running = start("run", "tiny.yaml", "--out", "run", folder=tmp_path)
        running.signal_when(words, signal.SIGKILL)
        assert running.wait().code == -signal.SIGKILL
        assert not (run / "train" / "done.json").exists()
    (run / "train" / ".half.jsonl.1.tmp").write_text("what a killed writer leaves")
    ended = persea("run", "tiny.yaml", "--out", "run", folder=tmp_path)
    assert ended.code == 0, ended.err
    assert student(tmp_path) == student(flowed()[0])
    assert without_clocks(tree(run)) == without_clocks(tree(flowed()[0] / "run"))
    assert not list(run.rglob(".*"))


def test_stopped_while_it_captures_it_says_so_and_goes_on(tmp_path: Path) -> None:
    run = flowed_copy(tmp_path, "check", "audition") / "run"
    for words, number in ((" 8/72 prompts", signal.SIGINT), (" 32/72 prompts", signal.SIGTERM)):
        running = start("capture", "tiny.yaml", "--out", "run", folder=tmp_path)
        running.signal_when(words, number)
        ended = running.wait()
        assert ended.code == 128 + number
        assert ended.err.splitlines()[-1] == (
            f"persea: stopped by {number.name}; committed work is kept "
            "-> run the same command to continue"
        )
        assert "Traceback" not in ended.err
    kept = times(run / "capture" / "commits")
    assert 4 <= len(kept) < 9
    assert persea("capture", "tiny.yaml", "--out", "run", folder=tmp_path).code == 0
    assert kept.items() <= times(run / "capture" / "commits").items()
    assert without_clocks(tree(run / "capture")) == without_clocks(
        tree(flowed()[0] / "run" / "capture")
    )


def test_each_stage_by_its_own_verb_is_the_whole(tmp_path: Path) -> None:
    path = recipe(tmp_path)
    for stage in STAGES:
        ended = persea(stage, path, "--out", "run", folder=tmp_path)
        assert ended.code == 0, ended.err
        checked = {"check": "up to date"} if stage == "train" else {}
        assert told(ended.err) == {**checked, stage: "worked"}
    assert without_clocks(tree(tmp_path / "run")) == without_clocks(tree(flowed()[0] / "run"))
    assert ended.out == flowed()[1].out


def test_broken_lines_are_set_aside_with_place_and_reason(tmp_path: Path) -> None:
    lines = [
        b'{"prompt": "Count: 1 2 3"}',
        b'{"prompt": "\xff"}',
        b"{",
        b'{"prompt": "COUNT: 1 2 3"}',
        b'{"prompt": "' + b"a b " * 2000 + b'"}',
    ]
    (tmp_path / "p.jsonl").write_bytes(b"\n".join(lines))
    corpus = [
        *TINY["corpus"],
        {"skill": "languages", "file": "p.jsonl", "on_malformed": "quarantine"},
    ]
    recipe(tmp_path, corpus=corpus)
    shutil.copytree(flowed()[0] / "run", tmp_path / "run")
    for stage in ("capture", "train", "evaluate", "lineage", "report"):
        shutil.rmtree(tmp_path / "run" / stage)
    ended = persea("capture", "tiny.yaml", "--out", "run", folder=tmp_path)
    assert ended.code == 0, ended.err
    told = json.loads((tmp_path / "run" / "capture" / "summary.json").read_text())
    assert told["in"] == told["kept"] + told["skipped"] + told["quarantined"] == 72 + len(lines)
    aside = [
        json.loads(line)
        for line in (tmp_path / "run" / "capture" / "quarantine.jsonl").read_text().splitlines()
    ]
    assert [q["location"].rpartition("/")[2] for q in aside[:2]] == ["p.jsonl:2", "p.jsonl:3"]
    assert (
        aside[2]["location"].startswith("prompt p.jsonl:5, ")
        and "positions for 1,024" in aside[2]["reason"]
    )
    assert (len(aside), told["quarantined"], told["quarantine"]) == (
        3,
        3,
        [{k: q[k] for k in ("location", "reason")} for q in aside],
    )
    assert told["removed"]["duplicate"] >= 1


def test_wrong_answers_are_heard_and_not_taught(tmp_path: Path) -> None:
    """The tiny run's own answers, verified: nobody is asked again, what is wrong is aside, the
    lessons are the rest.
    """
    run = flowed_copy(tmp_path, "check", "audition", "capture") / "run"
    units = {p.name: p.read_bytes() for p in (run / "capture" / "units").iterdir()}
    ended = persea(
        "capture",
        "tiny.yaml",
        "--out",
        "run",
        "--set",
        "capture.drop_wrong_answers=true",
        folder=tmp_path,
    )
    assert ended.code == 0, ended.err
    assert {p.name: p.read_bytes() for p in (run / "capture" / "units").iterdir()} == units
    told, wrong = (
        json.loads((run / "capture" / name).read_text())
        for name in ("summary.json", "rejected.json")
    )
    assert told["verified"] == {
        "right": told["kept"] - len(wrong),
        "unverified": 0,
        "rejected": dict(Counter(w["verdict"] for w in wrong)),
    }
    assert 0 < len(wrong) < told["kept"]
    assert (run / "capture" / "removed.jsonl").is_file()
    ended = persea(
        "train",
        "tiny.yaml",
        "--out",
        "run",
        "--set",
        "capture.drop_wrong_answers=true",
        folder=tmp_path,
    )
    assert ended.code == 0, ended.err
    feed = json.loads((run / "train" / "dataset.json").read_text())
    assert sum(feed["examples"].values()) == told["verified"]["right"]
    ended = persea(
        "train", "tiny.yaml", "--out", "run", folder=tmp_path
    )  # another corpus of answers: not over this student
    assert ended.code != 0


def test_a_lost_unit_is_named_and_asked_again_alone(tmp_path: Path) -> None:
    run = flowed_copy(tmp_path, "check", "audition", "capture") / "run"
    before, lost = times(run / "capture"), sorted((run / "capture" / "units").iterdir())[4]
    data = lost.read_bytes()
    lost.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    ended = persea("run", "tiny.yaml", "--out", "run", folder=tmp_path)
    assert ended.code == 3
    record = run / "capture" / "commits" / f"{lost.stem}.json"
    told = (
        f"{lost.relative_to(tmp_path)}: the bytes of block 0 do not match their digest "
        f"-> delete {record.relative_to(tmp_path)} and"
    )
    assert told in ended.err
    record.unlink()  # what the message says
    ended = persea("capture", "tiny.yaml", "--out", "run", folder=tmp_path)
    assert ended.code == 0
    assert lost.read_bytes() == data
    changed = {n for n, t in times(run / "capture").items() if before.get(n) != t}
    assert changed - {"removed.jsonl"} == {
        f"units/{lost.name}",
        f"commits/{record.name}",
        "summary.json",
        "done.json",
    }


def test_a_student_that_was_damaged_is_written_again(tmp_path: Path) -> None:
    run = flowed_copy(tmp_path, *STAGES) / "run"
    whole = student(tmp_path)
    (run / "train" / "student" / "model.safetensors").write_bytes(b"broken")
    ended = persea("train", "tiny.yaml", "--out", "run", folder=tmp_path)
    assert ended.code == 0, ended.err
    assert student(tmp_path) == whole


@pytest.mark.parametrize("record", ["[]", "{}", '{"key": 1}', '{"key": "x", "outputs": 3}', "{"])
def test_a_broken_record_of_a_stage_is_data_that_does_not_match(
    tmp_path: Path, record: str
) -> None:
    (flowed_copy(tmp_path, "check") / "run" / "check" / "done.json").write_text(record)
    ended = persea("check", "tiny.yaml", "--out", "run", folder=tmp_path)
    assert ended.code == 3
    wrong = "not JSON: " if record == "{" else "the record does not match its own checksum"
    assert f"run/check/done.json: {wrong}" in ended.err
    assert "Traceback" not in ended.err


def test_a_run_in_a_folder_with_the_name_of_a_stages_inside_records_its_outputs(
    tmp_path: Path,
) -> None:
    ended = persea(
        "check",
        recipe(tmp_path),
        "--out",
        tmp_path / "units" / "checkpoints",
        "--json",
        folder=tmp_path,
    )
    assert json.loads(ended.out) == json.loads(
        (tmp_path / "units" / "checkpoints" / "check" / "check.json").read_text()
    )
    assert json.loads((tmp_path / "units" / "checkpoints" / "check" / "done.json").read_text())[
        "outputs"
    ].keys() == {"check.json"}


def test_check_prints_a_table_a_teacher_and_what_its_template_is_worth(tmp_path: Path) -> None:
    ended = persea("check", recipe(tmp_path), "--out", "run", folder=tmp_path)
    assert ended.code == 0, ended.err
    found = json.loads((tmp_path / "run" / "check" / "check.json").read_text())
    lines = ended.out.splitlines()
    assert [line.split()[0] for line in lines if " -> student" in line] == [
        "qwen-sapling",
        "gemma-sapling",
        "gpt-oss-sapling",
    ]
    rows = [line for line in lines if re.match(r"(languages|code|reasoning) [a-z]+ ", line)]
    assert len(rows) == len(found["pairs"]) > 6
    for row, pair in zip(rows, found["pairs"], strict=True):
        assert row.split()[:3] == [pair["skill"], pair["language"], f"{pair['tokens']:,}"]
        assert abs(sum(int(share) for share in re.findall(r"(\d+)%", row)[:4]) - 100) <= 2
    assert len({(p["teacher"], p["skill"], p["language"]) for p in found["pairs"]}) == len(
        found["pairs"]
    )
    every = {one["teacher"]: one for one in found["likelihoods"] if not one["language"]}
    assert list(every) == ["qwen-sapling", "gemma-sapling", "gpt-oss-sapling"]
    for name, one in every.items():
        # a sapling knows its own template, which is no help with what it does not know: most of
        # these answers are in other languages
        assert one["template_bits_per_byte"] < one["bare_bits_per_byte"] + (
            0 if name == "qwen-sapling" else MAX_TEMPLATE_EXCESS_BITS_PER_BYTE
        )
        assert (
            f"{name}: {one['template_bits_per_byte']:.2f} bits per byte with its own template, "
            f"{one['bare_bits_per_byte']:.2f} without one" in lines
        )


def test_what_check_refuses_is_shown_beside_the_rest(tmp_path: Path) -> None:
    ended = persea(
        "check",
        recipe(tmp_path),
        "--set",
        "check.min_common_share=0.99",
        "--set",
        "check.measure_likelihood=false",
        "--out",
        "run",
        folder=tmp_path,
    )
    assert ended.code == 4
    assert "floor 99%" in ended.err
    assert "gpt-oss-sapling -> student" in ended.out
    assert "bits per byte" not in ended.out


def test_check_is_done_again_when_a_text_changes(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("xin chào\n")
    path = recipe(tmp_path, check={"texts": {"vi": "mine.txt"}, "measure_likelihood": False})
    for text, tells in (
        ("xin chào\n", "worked"),
        ("xin chào\n", "up to date"),
        ("chào buổi sáng\n", "worked"),
    ):
        (tmp_path / "mine.txt").write_text(text)
        ended = persea("check", path, "--out", "run", folder=tmp_path)
        assert (ended.code, told(ended.err)) == (0, {"check": tells}), ended.err
        assert re.search(r"^texts vi ", ended.out, re.MULTILINE)
    (tmp_path / "mine.txt").unlink()
    ended = persea("check", path, "--out", "run", folder=tmp_path)
    assert ended.code == 3
    assert "check.texts.vi" in ended.err


def test_a_student_learns_from_its_own_words_and_goes_on_where_it_was_stopped(
    tmp_path: Path,
) -> None:
    """Steps 4 and on learn from answers of its own; a round of 8 is in flight at the checkpoint of
    step 6, where the second run begins.
    """
    words = [
        "--set",
        (
            "training.on_policy={start_step: 4, share: 1.0, rollouts: 8, max_staleness_steps: 2, "
            "max_new_tokens: 16}"
        ),
        "--out",
        "run",
    ]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
        flowed_copy(folder, "check", "audition", "capture")
    ended = persea("train", "tiny.yaml", *words, folder=whole)
    assert ended.code == 0, ended.err
    lines = [
        json.loads(line)
        for line in (whole / "run" / "train" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [("reverse_kl" in line["terms"], "event_kl" in line["terms"]) for line in lines] == [
        (False, True),
        (False, True),
        (True, False),
        (True, False),
    ]
    checkpoints = whole / "run" / "train" / "checkpoints"
    assert sorted(p.stem for p in checkpoints.glob("*.json")) == ["step-00000006", "step-00000008"]
    shutil.copytree(
        checkpoints,
        cut / "run" / "train" / "checkpoints",
        ignore=shutil.ignore_patterns("step-00000008*"),
    )
    ended = persea("train", "tiny.yaml", *words, folder=cut)
    assert ended.code == 0, ended.err
    one, other = (
        (folder / "run" / "train" / "student" / "model.safetensors").read_bytes()
        for folder in (whole, cut)
    )
    assert one == other
