"""Each of 100 bad recipes is refused with exit code 2, a place, a remedy, and in bounded text."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from persea.config.recipe import load_recipe
from persea.errors import RecipeError

MAX_MESSAGE_CHARS = 20_000
GOOD: dict[str, Any] = {
    "student": {"model": "org/student"},
    "teachers": [{"name": "a", "model": "org/a"}],
    "corpus": [{"skill": "code", "generate": 8}],
}
# Text that is no recipe at all.
TEXTS: dict[str, bytes] = {
    "empty": b"",
    "spaces": b"  \n",
    "a number": b"3",
    "a list": b"- a\n- b\n",
    "a word": b"student",
    "null": b"null",
    "no YAML": b"student: {model: [}",
    "tab": b"student:\n\tmodel: x\n",
    "two documents": b"a: 1\n---\nb: 2\n",
    "NUL": b"name: a\0b\n",
    "escape": b"name: \x1b[31mred\n",
    "UTF-16": "name: a\n".encode("utf-16"),
    "Latin-1": "name: é\n".encode("latin-1"),
    "half a surrogate": b'name: "\\ud800"\n',
    "Python object": b"name: !!python/object/apply:os.system ['true']\n",
    "own tag": b"name: !secret x\n",
    "binary": b"name: !!binary aGk=\n",
    "doubled key": b"name: a\nname: b\n",
    "merge of a number": b"a: &a 1\nb: {<<: *a}\n",
    "number as key": b"1: a\n",
    "truth as key": b"true: a\n",
    "list as key": b"[a, b]: c\n",
    "unknown alias": b"name: *x\n",
    "alias of itself": b"a: &a [*a]\n",
    "alias bomb": b"a: &a [x,x,x,x,x,x,x,x,x]\n"
    + b"".join(
        b"%c: &%c [%s]\n" % (k + 1, k + 1, b",".join([b"*%c" % k] * 9)) for k in range(97, 110)
    ),
    "nested 10,000 deep": b"a: " + b"[" * 10_000 + b"]" * 10_000,
    "nested mappings": b"".join(b" " * k + b"a:\n" for k in range(200)),
    "2 MB": b"# " + b"x" * 2_000_000,
    "9,000 unknown keys": b"".join(b"key%d: 1\n" % k for k in range(9000)),
    "line of 900,000 letters": b"name: " + b"x" * 900_000,
    "colon in a value": b"name: a: b\n",
    "open quote": b'name: "a\n',
}


def changed(path: str, value: Any) -> dict[str, Any]:
    recipe = yaml.safe_load(yaml.safe_dump(GOOD))
    *keys, last = [int(k) if k.isdigit() else k for k in path.split(".")]
    at = recipe
    for key in keys:
        at = at[key] if isinstance(at, list) else at.setdefault(key, {})
    if value is None:
        del at[last]
    else:
        at[last] = value
    return dict(recipe)


# (key, its value); None = the key is left out
VALUES: tuple[tuple[str, Any], ...] = (
    ("student", None),
    ("teachers", None),
    ("corpus", None),
    ("student", "org/student"),
    ("student", []),
    ("teachers", {}),
    ("teachers", []),
    ("teachers", "org/a"),
    ("teachers", [1]),
    ("corpus", []),
    ("corpus", [[]]),
    ("corpus", {"skill": "code"}),
    ("studnet", {"model": "a/b"}),
    ("trainnig", {}),
    ("student.model", None),
    ("student.model", ""),
    ("student.model", 3),
    ("student.model", ["a/b"]),
    ("student.modle", "a/b"),
    ("student.revision", 3),
    ("student.adapt", "some"),
    ("student.lora", {"rank": 8}),
    ("student.thinking", "maybe"),
    ("student.trust_remote_code", True),
    ("teachers.0.model", None),
    ("teachers.0.name", ""),
    ("teachers.0.name", "../a"),
    ("teachers.0.name", "a b"),
    ("teachers.0.name", "student"),
    ("teachers.0.effort", "extreme"),
    ("teachers.0.quantize", "1bit"),
    ("teachers.0.endpoint", "http://localhost"),
    ("teachers.0.endpoint", {"url": "ftp://a"}),
    ("teachers.0.endpoint", {"url": "http://user:key@a"}),
    ("corpus.0.skill", None),
    ("corpus.0.skill", "Code!"),
    ("corpus.0.generate", 0),
    ("corpus.0.generate", -1),
    ("corpus.0.generate", 1.5),
    ("corpus.0.generate", "many"),
    ("corpus.0.generate", True),
    ("corpus.0.generate", 10**15),
    ("corpus.0.generate", None),
    ("corpus.0.file", "x.jsonl"),
    ("corpus.0.language", 3),
    ("corpus.0.columns", {"prompt": "q"}),
    ("corpus.0.file", "${HOME}/x.jsonl"),
    ("corpus.0.file", "${PERSEA_DATA"),
    ("training.steps", 0),
    ("training.steps", -3),
    ("training.steps", "ten"),
    ("training.steps", 10**12),
    ("training.learning_rate", -1),
    ("training.learning_rate", float("nan")),
    ("training.learning_rate", float("inf")),
    ("training.learning_rate", "3e-3x"),
    ("training.batch_size", 0),
    ("training.objective", "magic"),
    ("training.precision", "float7"),
    ("training.event_weight", 2),
    ("training.max_length", 0),
    ("training.stepps", 4),
    ("training", 3),
    ("capture.max_new_tokens", 0),
    ("capture.sampling_threshold", 2),
    ("capture.answers", "all"),
    ("audition.items", 0),
    ("audition.pinned", {"code": "nobody"}),
    ("audition.pinned", ["code"]),
    ("evaluation.items", -1),
    ("evaluation.benchmarks", [{"benchmark": "gsm8k"}]),
    ("evaluation.judge", "nobody"),
    ("check.min_common_share", 7),
    ("seed", "x"),
    ("seed", -1),
    ("threads", -1),
    ("name", ""),
    ("name", "../../etc"),
    ("name", 3),
    ("template_date", "yesterday"),
    ("release.use", "fun"),
    ("licence_decisions", ["x"]),
)


def written(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    return path


def refuse(path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    text = str(caught.value)
    assert caught.value.exit_code == 2
    assert len(text) < MAX_MESSAGE_CHARS
    assert all("bad.yaml" in line and " -> " in line for line in text.splitlines()), text
    assert all(c.isprintable() or c == "\n" for c in text)


def test_there_are_a_hundred() -> None:
    assert len(TEXTS) + len(VALUES) >= 100


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", TEXTS)
def test_text_that_is_no_recipe_is_refused(kind: str, tmp_path: Path) -> None:
    refuse(written(tmp_path, TEXTS[kind]))


@pytest.mark.timeout(20)
@pytest.mark.parametrize(("key", "value"), VALUES, ids=lambda v: str(v)[:30])
def test_a_wrong_value_is_refused_at_its_place(key: str, value: Any, tmp_path: Path) -> None:
    refuse(written(tmp_path, yaml.safe_dump(changed(key, value)).encode()))


def test_the_good_recipe_loads(tmp_path: Path) -> None:
    load_recipe(written(tmp_path, yaml.safe_dump(GOOD).encode()))


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["FIFO", "device", "folder", "link to itself", "long name"])
def test_what_is_no_file_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "long name":
        path = tmp_path / ("x" * 300 + "bad.yaml")
    else:
        path.symlink_to("/dev/zero" if kind == "device" else path)
    refuse(path)
