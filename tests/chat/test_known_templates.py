"""Digests of published templates are recorded with their source and date."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench.fetch_templates import (
    GithubFile,
    NotFetchedError,
    github_template,
    npm_package,
    read_table,
)
from bench.known_templates import current_templates, describe_changes
from persea.chat.families.hybrid import HYBRID_PRELUDE
from persea.chat.known_templates import (
    KnownTemplate,
    is_known_template,
    known_templates,
    template_digest,
)

ROOT = Path(__file__).resolve().parents[2]


def test_each_record_has_a_digest_a_source_and_a_date():
    known = known_templates()
    assert len(known) > 100
    for digest, template in known.items():
        assert re.fullmatch(r"[0-9a-f]{64}", digest)
        assert template.name and template.source
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", template.date)


def test_saplings_and_persea_own_templates_are_known():
    own = [*ROOT.glob("saplings/**/*.jinja"), *ROOT.glob("persea/chat/**/*.jinja")]
    assert own
    for path in own:
        text = path.read_text(encoding="utf-8")
        assert is_known_template(text) and is_known_template(HYBRID_PRELUDE + text)
        assert not is_known_template(text + " ")


@pytest.mark.realdata
def test_real_templates_are_known(data: Path):
    paths = list((data / "templates").glob("*.jinja"))
    assert paths and all(is_known_template(p.read_text(encoding="utf-8")) for p in paths)


def test_changes_are_named(tmp_path: Path):
    folder = tmp_path / "pack 1"
    folder.mkdir()
    for name in ("same", "other", "fresh"):
        (folder / f"{name}.jinja").write_text(name)
    known = {
        template_digest("same"): KnownTemplate("same", "pack 0", "2026-01-01"),
        template_digest("old"): KnownTemplate("other", "pack 0", "2026-01-01"),
        template_digest("lost"): KnownTemplate("lost", "pack 0", "2026-01-01"),
        template_digest("absent"): KnownTemplate("absent", "package 0", "2026-01-01"),
    }
    current = {d: t for d, t in current_templates([folder]).items() if t.source == "pack 1"}
    assert list(describe_changes(known, current)) == [
        "pack 1: fresh is new",
        "pack 0: lost is gone",
        "pack 1: other is changed since pack 0, 2026-01-01",
    ]


def test_templates_of_other_sources_are_read(tmp_path: Path):
    table = """
    { model: "library/one:1b", gguf: "{{ 'a\\\\n' }}\\n\\"q\\"", ollama: {} },
    { model: "library/one:1b", gguf: '{{ \\'b\\' }} "q"' },
    { model: "library/one:1b", gguf: "{{ 'a\\\\n' }}\\n\\"q\\"" },
    """
    assert dict(read_table(table)) == {
        "one-1b": "{{ 'a\\n' }}\n\"q\"",
        "one-1b-2": "{{ 'b' }} \"q\"",
    }
    history = tmp_path / "o" / "r" / "c" / "data"
    history.mkdir(parents=True)
    (history / "m.json").write_text('{"_templates": [{"template": "old"}, {"template": "é"}]}')
    (history / "m.jinja").write_text("plain")
    files = [GithubFile("m", "o/r", "c", f"data/m{end}") for end in (".json", ".jinja")]
    assert [github_template(f, tmp_path.as_uri()) for f in files] == ["é", "plain"]
    with pytest.raises(NotFetchedError, match="gone: "):
        github_template(GithubFile("gone", "o/r", "c", "gone.jinja"), tmp_path.as_uri())


def test_a_missing_npm_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NotFetchedError, match="npm is not installed"):
        npm_package("@o/p", "1", tmp_path)
