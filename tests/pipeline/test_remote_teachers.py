"""A teacher here, one behind a server with log-probabilities, one that only speaks, and a
yardstick: one run, real servers.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import yaml

from persea.cache.maintenance import committed_units
from persea.cache.unit import read_unit
from persea.chat.messages import ThinkingEffort
from persea.config.recipe import load_recipe
from persea.config.schema import GenerationSection, TeacherSection
from persea.distributions import DistributionKind
from persea.errors import MissingRequirementError, RecipeError
from persea.pipeline.preflight import refuse_unsupported_efforts
from persea.pipeline.remote_teachers import endpoint_identity, open_remote_engine
from persea.pipeline.run_context import RunContext
from tests.cli.test_cli import SAPLINGS, TINY, persea
from tests.servers import serving

RECIPES = SAPLINGS.parent / "recipes"
SMALL: dict[str, Any] = {
    "corpus": [
        {"skill": "languages", "generate": 6},
        {"skill": "code", "generate": 6},
        {"skill": "reasoning", "generate": 6},
    ],
    "audition": {
        "items": 2,
        "pinned": {"languages": "qwen-sapling", "code": "gemma-far", "reasoning": "oss-words"},
    },
    "training": {"steps": 4, "batch_size": 6, "warmup_steps": 1},
    "evaluation": {"items": 2, "max_new_tokens": 64},
}


def mixed(folder: Path) -> Path:
    """recipes/mixed.yaml, smaller, with this session's servers, and one who is measured and never
    teaches.
    """
    page = yaml.safe_load((RECIPES / "mixed.yaml").read_text()) | SMALL
    page["student"]["model"] = str(SAPLINGS / "llama-sapling")
    here, far, words = page["teachers"]
    here["model"], far["model"] = str(SAPLINGS / "qwen-sapling"), str(SAPLINGS / "gemma-sapling")
    far["endpoint"]["url"], words["endpoint"]["url"] = (
        serving("gemma-sapling"),
        serving("gpt-oss-sapling"),
    )
    page["teachers"].append(
        {
            "model": "text_only",
            "name": "yard",
            "reference": True,
            "endpoint": {"url": serving("qwen-sapling"), "protocol": "chat"},
        }
    )
    path = folder / "mixed.yaml"
    path.write_text(yaml.safe_dump(page, sort_keys=False))
    return path


def test_the_mixed_recipe_runs_and_every_teacher_is_kept_for_what_it_gives(tmp_path: Path) -> None:
    recipe = mixed(tmp_path)
    ended = persea("run", recipe, "--out", "run", folder=tmp_path)
    assert ended.code == 0, ended.err
    run = tmp_path / "run"
    checked = json.loads((run / "check" / "check.json").read_text())["named_mass"]
    (named,) = {m["teacher"]: m for m in checked}.values()  # of the one whose server lists tokens
    assert (named["teacher"], named["top_logprobs"]) == ("gemma-far", 20)
    assert 0.05 < named["event_mass"] < named["listed_mass"] <= 1
    kinds: dict[str, set[DistributionKind]] = {}
    for unit in committed_units(run / "capture"):
        for capture in read_unit(run / "capture", unit):
            kinds.setdefault(capture.answer.teacher, set()).add(capture.distributions.kind)
            sizes = {len(capture.distributions.ids_M) // max(1, len(capture.distributions))}
            assert capture.answer.teacher != "gemma-far" or sizes == {20}
    assert kinds == {
        "qwen-sapling": {DistributionKind.SAMPLED},
        "gemma-far": {DistributionKind.TOPK},
        "oss-words": {DistributionKind.TEXT_ONLY},
    }
    taught = {
        row["teacher"]: row
        for row in json.loads((run / "train" / "dataset.json").read_text())["supervision"]
    }
    assert taught["gemma-far"]["event"] > 0.5
    assert taught["gemma-far"]["mass_retained"] > 0
    assert (
        taught["oss-words"]["text"],
        taught["oss-words"]["event"],
        taught["oss-words"]["mass_retained"],
    ) == (1.0, 0.0, None)
    cast = json.loads((run / "audition" / "cast.json").read_text())
    assert {s["model_name"] for s in cast["scores"]} == {"qwen-sapling", "gemma-far", "oss-words"}
    evaluated = json.loads((run / "evaluate" / "evaluation.json").read_text())
    assert evaluated["teachers"] == ["qwen-sapling", "gemma-far", "oss-words"]
    assert evaluated["reference_models"] == ["yard"]
    assert {s["model_name"] for s in evaluated["scores"]} >= {"yard", "student", "base"}
    assert [
        bool(evaluated["bits_per_byte"][n])
        for n in ("qwen-sapling", "gemma-far", "oss-words", "yard")
    ] == [True, True, False, False]
    parents = {
        p["name"]: p for p in json.loads((run / "lineage" / "lineage.json").read_text())["teachers"]
    }
    assert list(parents) == ["qwen-sapling", "gemma-far", "oss-words"]
    assert (
        parents["oss-words"]["family"],
        parents["oss-words"]["model"],
        parents["oss-words"]["licence"],
    ) == ("text_only", "gpt-oss-sapling", "Apache-2.0")
    again = persea("run", recipe, "--out", "run", folder=tmp_path)
    assert again.code == 0
    assert again.err.count("up to date") == 7, again.err
    (run / "capture" / "done.json").unlink()
    for unit in (run / "capture" / "commits").iterdir():
        unit.unlink()
    swapped = persea(
        "capture",
        recipe,
        "--out",
        "run",
        "--set",
        f"teachers.2.endpoint.url={serving('gemma-sapling')}",
        "--set",
        "teachers.2.endpoint.send_effort=false",
        folder=tmp_path,
    )
    assert swapped.code == 5  # the same run, another model behind the words
    assert (
        "another model is there now: 'gemma-sapling' answers, it was 'gpt-oss-sapling'"
        in swapped.err
    )


def river(folder: Path, *changes: str) -> RunContext:
    return RunContext(load_recipe(mixed(folder), changes), folder / "run")


def test_where_a_server_stands_changes_no_identity_and_what_it_gives_does(tmp_path: Path) -> None:
    one = river(tmp_path).models.teacher_identities
    elsewhere = ("url=http://elsewhere:1", "stall_timeout_s=5", "key_env=K")
    assert (
        river(
            tmp_path, *(f"teachers.1.endpoint.{change}" for change in elsewhere)
        ).models.teacher_identities
        == one
    )
    for change, name in (
        ("teachers.1.endpoint.top_logprobs=5", "gemma-far"),
        ("teachers.1.endpoint.protocol=completions", "gemma-far"),
        ("teachers.1.endpoint.served_model_name=m", "gemma-far"),
        ("teachers.2.generation.temperature=0.5", "oss-words"),
        ("teachers.0.generation.max_new_tokens=9", "qwen-sapling"),
        ("teachers.2.endpoint.send_effort=false", "oss-words"),
    ):
        other = river(tmp_path, change).models.teacher_identities
        assert {n for n in one if one[n] != other[n]} == {name}, change
    assert river(tmp_path).models.teacher_names == ("qwen-sapling", "gemma-far", "oss-words")


def test_generation_is_each_teachers_own(tmp_path: Path) -> None:
    one = river(
        tmp_path,
        "teachers.0.generation.max_new_tokens=3",
        "teachers.0.generation.temperature=1.5",
        "teachers.0.generation.seed=4",
    )
    teacher = one.models.load_teacher("qwen-sapling", 4)
    assert (
        teacher.max_answer_tokens,
        teacher.engine.sampling.temperature,
        teacher.engine.sampling.seed,
    ) == (3, 1.5, 4)
    prompts = [p for p in one.corpus.prompts if p.skill == "languages"][:3]
    answers, same = teacher.answer(prompts, 50), teacher.answer(prompts, 50)
    assert answers == same  # drawn by chance that the prompt and the seed decide
    assert all(len(teacher.renderer.vocabulary.encode(a.text)) <= 3 for a in answers)


def test_a_key_is_never_in_a_recipe_and_must_be_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAR_KEY", "sk-abc")
    recipe = load_recipe(mixed(tmp_path), ["teachers.1.endpoint.key_env=FAR_KEY"])
    assert "sk-abc" not in recipe.to_yaml()
    monkeypatch.setenv("FAR_KEY", "sk-other")
    assert load_recipe(mixed(tmp_path), ["teachers.1.endpoint.key_env=FAR_KEY"]).hash == recipe.hash
    monkeypatch.delenv("FAR_KEY")
    with pytest.raises(MissingRequirementError, match="FAR_KEY is not set") as caught:
        open_remote_engine(recipe.teachers[1], None, tmp_path / "kept.json")  # type: ignore[arg-type]
    assert caught.value.exit_code == 7
    assert endpoint_identity(recipe.teachers[0]) == []


@pytest.mark.parametrize("key", ["sk-a\nbc", "sk abc", "sk-\xe4bc", "sk-\x07bc"])
def test_a_key_that_no_header_can_carry_is_refused_and_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("FAR_KEY", key)
    recipe = load_recipe(mixed(tmp_path), ["teachers.1.endpoint.key_env=FAR_KEY"])
    with pytest.raises(
        MissingRequirementError,
        match="FAR_KEY contains characters that an HTTP header cannot carry",
    ) as caught:
        open_remote_engine(recipe.teachers[1], None, tmp_path / "kept.json")  # type: ignore[arg-type]
    assert "bc" not in str(caught.value)


def test_the_first_handshake_is_who_answers_also_in_the_next_run(tmp_path: Path) -> None:
    """A server's last digits move; what was heard of it stays heard."""
    kept, one = tmp_path / "run" / "endpoints" / "gemma-far.json", river(tmp_path)
    first = one.models.evaluated_model(
        "gemma-far", 4, (), lambda name: one.models.load_teacher(name, 4)
    )
    told = json.loads(kept.read_text())
    kept.write_text(
        json.dumps(told | {"logs": [x - 0.01 for x in told["logs"]]})
    )  # as another batch would have had it
    two, three = river(tmp_path), river(tmp_path)
    moved = two.models.evaluated_model(
        "gemma-far", 4, (), lambda name: two.models.load_teacher(name, 4)
    )
    assert moved.identity != first.identity
    assert (
        moved.identity
        == three.models.evaluated_model(
            "gemma-far", 4, (), lambda name: three.models.load_teacher(name, 4)
        ).identity
    )
    assert two.models.remote_engines["gemma-far"].fingerprints[0].to_json() == json.loads(
        kept.read_text()
    )


def test_a_chat_route_without_dial_has_one_effort(tmp_path: Path) -> None:
    thinking, low = "student.thinking=true", "teachers.2.effort=low"
    for dial, known in (("true", {"none", "low", "medium", "high"}), ("false", {"none", "low"})):
        one = river(tmp_path, thinking, low, f"teachers.2.endpoint.send_effort={dial}")
        assert {
            e.value for e in ThinkingEffort if one.models.can_answer_at("oss-words", e)
        } == known
        assert one.models.measured_efforts("oss-words", (ThinkingEffort.HIGH,)) == (
            (ThinkingEffort.LOW, ThinkingEffort.HIGH) if dial == "true" else (ThinkingEffort.LOW,)
        )
    assert one.models.measured_efforts("student", (ThinkingEffort.HIGH,)) == (
        ThinkingEffort.NONE,
        ThinkingEffort.HIGH,
    )
    for dial in ("true", "false"):
        one = river(
            tmp_path,
            thinking,
            f"teachers.2.endpoint.send_effort={dial}",
            "corpus.2.effort_shares={high: 1.0}",
        )
        with (
            nullcontext()
            if dial == "true"
            else pytest.raises(RecipeError, match="no teacher of reasoning supports it") as caught
        ):
            refuse_unsupported_efforts(one)
    assert "oss-words supports none" in str(caught.value)
    assert "yard knows" not in str(caught.value)  # it teaches nobody


def test_weights_in_vllm_are_not_kept_after_their_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[object] = []
    monkeypatch.setattr(
        "persea.pipeline.model_refs.open_remote_engine",
        lambda *a: opened.append(object()) or opened[-1],
    )
    one = river(tmp_path, "teachers.0.engine=vllm")
    assert (
        one.models.load_teacher("qwen-sapling", 4).engine
        is not one.models.load_teacher("qwen-sapling", 4).engine
    )
    assert (
        one.models.load_teacher("gemma-far", 4).engine
        is one.models.load_teacher("gemma-far", 4).engine
    )
    assert (len(opened), list(one.models.remote_engines)) == (3, ["gemma-far"])


@pytest.mark.parametrize(
    ("teacher", "why"),
    [
        ({"model": "text_only", "name": "w"}, "no chat route"),
        ({"model": "text_only", "endpoint": {"url": "http://x", "protocol": "chat"}}, "missing"),
        ({"model": "a/b", "endpoint": {"url": "http://me:pw@x"}}, "url"),
        ({"model": "a/b", "endpoint": {"url": "x:80"}}, "url"),
        (
            {
                "model": "a/b",
                "endpoint": {"url": "http://x", "protocol": "chat", "top_logprobs": 5},
            },
            "delete `top_logprobs:`",
        ),
        (
            {"model": "a/b", "endpoint": {"url": "http://x", "send_effort": True}},
            "delete `send_effort:`",
        ),
        ({"model": "a/b", "endpoint": {"url": "http://x", "key_env": "sk-1234"}}, "key_env"),
        ({"model": "a/b", "engine": "vllm", "endpoint": {"url": "http://x"}}, "delete `engine:`"),
        ({"model": "a/b", "generation": {"top_p": 0.5}}, "nothing is sampled"),
        ({"model": "a/b", "reference": True}, "no teacher is left"),
        (
            {
                "model": "random",
                "name": "r",
                "tokenizer": "a/b",
                "sizes": {"hidden": 32, "layers": 1, "heads": 2},
                "endpoint": {"url": "http://x"},
            },
            "random weights run on this machine",
        ),
    ],
)
def test_contradictions_are_told(tmp_path: Path, teacher: dict[str, Any], why: str) -> None:
    path = tmp_path / "r.yaml"
    page = {k: TINY[k] for k in ("student", "corpus")}
    path.write_text(yaml.safe_dump(page | {"teachers": [teacher]}))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert why in str(caught.value)


def test_what_a_far_teacher_cannot_give_is_not_asked(tmp_path: Path) -> None:
    for change, why in (
        ("training.partial_tokens=true", "does not return the full distributions"),
        ("capture.answers=given", "a text that it did not generate"),
        ("audition.pinned.code=yard", "yard is a reference model"),
    ):
        with pytest.raises(RecipeError, match=why):
            load_recipe(mixed(tmp_path), [change])


def test_defaults_hang_on_the_protocol() -> None:
    chat, tokens = ({"url": "http://x", "protocol": p} for p in ("chat", "tokens"))
    one, other = (
        TeacherSection.model_validate({"model": "a/b", "endpoint": e}).endpoint
        for e in (chat, tokens)
    )
    assert one is not None
    assert other is not None
    assert (one.top_logprobs, one.send_effort, other.top_logprobs, other.send_effort) == (
        None,
        False,
        20,
        None,
    )
    assert TeacherSection(model="a/b").generation == GenerationSection()
