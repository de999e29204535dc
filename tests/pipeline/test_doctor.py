"""The doctor names what is there and what is missing, each with a remedy."""

from __future__ import annotations

import json
import os
from importlib import metadata
from pathlib import Path

import pytest

from persea.config.recipe import load_recipe
from persea.pipeline import doctor
from persea.pipeline.doctor import State, examine
from tests.cli.test_cli import ROOT, persea


def test_the_machine_is_examined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = metadata.version

    def version(name: str) -> str:
        if name in ("peft", "gguf"):
            raise metadata.PackageNotFoundError
        return "1.0" if name == "detect-secrets" else installed(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    found = {f.what: f for f in examine(None, tmp_path / "runs")}
    assert found["torch"].state is State.OK
    assert (found["peft"].state, found["peft"].remedy) == (State.PROBLEM, "pip install peft")
    assert (found["gguf"].state, found["gguf"].remedy) == (
        State.ABSENT,
        "pip install 'persea[gguf]'",
    )
    assert found["sandbox"].state in (State.OK, State.ABSENT)
    assert "CPU cores" in found["devices"].detail
    assert all(f.remedy for f in found.values() if f.state is not State.OK)


def test_endpoints_and_licences_of_a_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(
        "student: {model: some/student}\n"
        "teachers:\n"
        "  - name: a\n"
        "    model: some/a\n"
        "    endpoint: {url: 'http://127.0.0.1:9', key_env: PERSEA_TEST_KEY}\n"
        "corpus: [{skill: code, generate: 4}]\n"
    )
    recipe = load_recipe(path)
    monkeypatch.delenv("PERSEA_TEST_KEY", raising=False)
    found = {f.what: f for f in examine(recipe, tmp_path)}
    assert found["endpoint of a"].detail == "PERSEA_TEST_KEY is not set"
    assert found["licences"].state is State.PROBLEM
    monkeypatch.setitem(os.environ, "PERSEA_TEST_KEY", "x")
    found = {f.what: f for f in examine(recipe, tmp_path)}
    assert "127.0.0.1:9: " in found["endpoint of a"].detail


def test_the_verb_prints_json(tmp_path: Path) -> None:
    ended = persea("doctor", str(ROOT / "recipes" / "quickstart.yaml"), "--json", folder=tmp_path)
    assert ended.code == 0, ended.err
    assert {"python", "sandbox", "hub", "licences"} <= {f["what"] for f in json.loads(ended.out)}


def test_a_problem_ends_with_exit_code_3_and_the_same_json(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(
        "student: {model: some/student}\n"
        "teachers: [{name: a, model: some/a, endpoint: {url: 'http://127.0.0.1:9'}}]\n"
        "corpus: [{skill: code, generate: 4}]\n"
    )
    ended = persea("doctor", str(path), "--json", folder=tmp_path)
    problems = {f["what"] for f in json.loads(ended.out) if f["state"] == "problem"}
    assert {"endpoint of a", "licences"} <= problems
    assert ended.code == 3
    assert "problems would stop a run: " in ended.err
    assert "endpoint of a" in ended.err
    assert "Traceback" not in ended.err
