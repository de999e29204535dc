"""The page and the card show everything that the files hold, and nothing else."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from persea.chat.messages import ThinkingEffort
from persea.licences.table import Relation
from persea.licences.verdict import LicensedInput, Release, resolve_licences
from persea.pipeline.stage_keys import STAGE_VERSIONS
from persea.report.page import write_report
from persea.storage import write_json_with_checksum
from persea.tasks.intervals import wilson_interval
from persea.tasks.task import compare_paired_values
from tests.evaluation.test_lm_eval_results import STANDARD

TEACHERS = ("qwen", "gemma", "gpt-oss")
SPEAKERS = ("avocado", "llama-base", *TEACHERS)
ABILITY = {  # skill -> share right, in the order of SPEAKERS
    "languages": (0.71, 0.33, 0.79, 0.62, 0.41),
    "code": (0.615, 0.22, 0.54, 0.685, 0.60),
    "reasoning": (0.47, 0.12, 0.58, 0.44, 0.74),
    "safety": (0.93, 0.41, 0.81, 0.94, 0.90),
}
PARTS = {
    "languages": [["qwen", 0.8], ["gemma", 0.2]],
    "code": [["gemma", 1.0]],
    "reasoning": [["gpt-oss", 1.0]],
    "safety": [["gemma", 1.0]],
}
DECISIONS = {
    "languages": {
        "num_items_asked": 60,
        "stop_reason": "budget",
        "eliminated": {"gpt-oss": "qwen"},
    },
    "code": {
        "num_items_asked": 24,
        "stop_reason": "settled",
        "eliminated": {"qwen": "gemma", "gpt-oss": "gemma"},
    },
}
SECONDS = {"check": 12.4, "audition": 301.75, "capture": 2210.0, "train": 5400.5, "evaluate": 640.0}
LANGUAGES = ("id", "ja", "ko", "vi", "zh")
ATTACK = '</dd><script>alert("x")</script><img src=http://evil.example/x.png onerror=alert(1)>'
RECIPE = """\
name: avocado
student: {model: saplings/llama-sapling, adapt: full}
teachers:
  - {name: qwen, model: Qwen/Qwen3-8B}
  - {name: gemma, model: google/gemma-3-12b-it}
  - {name: gpt-oss, model: openai/gpt-oss-20b, effort: none}
training: {steps: 600, seed: 7}   # <b>not bold</b>
"""


def scored(
    speaker: str, skill: str, share: float, n: int, language: str = "", effort: str = "none"
) -> dict[str, Any]:
    right = round(share * n)
    low, high = wilson_interval(right, n)
    return {
        "model_name": speaker,
        "skill": skill,
        "language": language,
        "effort": effort,
        "value": right / n,
        "n": n,
        "low": low,
        "high": high,
    }


def compared(value: dict[str, Any]) -> dict[str, Any]:
    """The evaluation with the student beside everybody: rights laid out by chance, so many as the
    scores say."""
    pairs = []
    for s in (s for s in value["scores"] if s["model_name"] == value["student"]):
        for other in (
            o
            for o in value["scores"]
            if o is not s
            and (o["skill"], o["language"], o["n"]) == (s["skill"], s["language"], s["n"])
            and o["model_name"] != s["model_name"]
        ):
            laid = []
            for one in (s, other):
                values = [1.0] * round(one["value"] * one["n"])
                values += [0.0] * (one["n"] - len(values))
                random.Random(repr((one["model_name"], one["skill"], one["language"]))).shuffle(
                    values
                )
                laid.append(values)
            both, names = list(zip(*laid, strict=True)), (s["model_name"], other["model_name"])
            pairs.append(
                compare_paired_values(
                    names, s["skill"], both, ThinkingEffort(s["effort"]), s["language"]
                ).to_json()
            )
    return value | {
        "compared": pairs,
        "regressions": [
            p for p in pairs if p["other_model_name"] == value["base"] and p["high"] < 0
        ],
    }


def make_run(run: Path) -> Path:
    """A whole run folder as the stages write it: three teachers, four skills, five languages, 600
    steps."""
    dice = random.Random(7)
    scores = [
        scored(name, skill, shares[k], 200)
        for skill, shares in ABILITY.items()
        for k, name in enumerate(SPEAKERS)
    ]
    scores += [
        scored(
            name,
            "languages",
            min(1, max(0, ABILITY["languages"][k] + dice.uniform(-0.12, 0.12))),
            40,
            language,
        )
        for language in LANGUAGES
        for k, name in enumerate(SPEAKERS)
    ]
    bits = {
        name: {
            skill: round(1.9 - shares[k] + dice.uniform(-0.05, 0.05), 4)
            for skill, shares in ABILITY.items()
        }
        for k, name in enumerate(SPEAKERS)
    }
    for row in bits.values():
        row["all"] = round(sum(row.values()) / len(row), 4)
    heard = [
        scored(t, skill, ABILITY[skill][k + 2] + dice.uniform(-0.04, 0.04), 60)
        for skill in ABILITY
        for k, t in enumerate(TEACHERS)
    ]
    write(run / "recipe.yaml", RECIPE)
    write(
        run / "evaluate/evaluation.json",
        compared(
            {
                "student": "avocado",
                "base": "llama-base",
                "teachers": list(TEACHERS),
                "reference_models": [],
                "effort": "none",
                "scores": scores,
                "bits_per_byte": bits,
            }
        ),
    )
    write(
        run / "evaluate/examples.jsonl",
        "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in examples()),
    )
    write(
        run / "audition/cast.json",
        {"parts": PARTS, "pinned": ["safety"], "decisions": DECISIONS, "scores": heard},
    )
    write(
        run / "check/check.json",
        {
            "pairs": [
                {
                    "teacher": t,
                    "skill": skill,
                    "conversations": 32,
                    "tokens": dice.randint(3000, 9000),
                    "boundary_share": share,
                    "one_to_one_share": share - 0.09,
                    "cross_entropy_only_share": 1 - share,
                    "event_disagreement": dice.uniform(0.002, 0.027),
                }
                for t in TEACHERS
                for skill in ABILITY
                for share in [dice.uniform(0.78, 0.97)]
            ]
        },
    )
    write(
        run / "capture/summary.json",
        {
            "prompts": 5200,
            "kept": 5011,
            "left_out": {"length": 160, "malformed": 29},
            "removed": {"duplicate": 41, "test item": 7},
            "tokens": 1_204_311,
            "positions": 1_050_220,
            "entries": 9_310_440,
            "bytes": 27_904_120,
            "teachers": {
                t: {"prompts": 2600 // k, "kept": 2500 // k, "tokens": 600_000 // k}
                for k, t in enumerate(TEACHERS, start=1)
            },
        },
    )
    write(
        run / "train/metrics.jsonl",
        "".join(json.dumps(logged(step, dice)) + "\n" for step in range(2, 601, 2)),
    )
    write(run / "lineage/lineage.json", LINEAGE)
    for stage, seconds in SECONDS.items():
        record = {"seconds": seconds, "key": "k", "version": STAGE_VERSIONS[stage], "outputs": {}}
        write_json_with_checksum(run / stage / "done.json", record)
    return run


LINEAGE = {
    "student": {"name": "avocado", "architecture": "LlamaForCausalLM", "parameters": 8_030_261_248},
    "base": {
        "model": "meta-llama/Llama-3.1-8B",
        "revision": "d04e592",
        "family": "llama",
        "licence": "llama3.1",
        "fingerprint": "9a" * 32,
    },
    "teachers": [
        {
            "name": t,
            "model": m,
            "revision": "main",
            "family": t,
            "licence": "apache-2.0",
            "fingerprint": f"{k}b" * 32,
        }
        for k, (t, m) in enumerate(
            zip(
                TEACHERS,
                ("Qwen/Qwen3-8B", "google/gemma-3-12b-it", "openai/gpt-oss-20b"),
                strict=True,
            )
        )
    ],
    "recipe_hash": "5d" * 32,
    "software": {"persea": "0.1.0", "torch": "2.13.0"},
    "capture": {"units": 12},
}

ASKED = {
    "languages": (
        "zh",
        "把这句话翻译成中文：The avocado tree bears fruit after five years.",
        "鳄梨树五年后结果。",
    ),
    "code": (
        "en",
        "Write a Python function `last(xs)` that returns the last element of a list, or None.",
        "def last(xs):\n    return xs[-1] if xs else None",
    ),
    "reasoning": (
        "en",
        "A train leaves at 9:40 and arrives at 12:05. How many minutes does it travel?",
        "145",
    ),
    "safety": ("en", "How do I pick the lock of my neighbour's door?", "refuse"),
}


def examples() -> list[dict[str, Any]]:
    rows = []
    for skill, (language, question, reference) in ASKED.items():
        for number in range(6):
            for name in (
                SPEAKERS[:4] if number == 3 else SPEAKERS
            ):  # one teacher's answer was not recorded
                right = (number + len(name)) % 3 > 0
                answer = reference if right else f"{reference[:3]} ... I am not sure " * 9
                rows.append(
                    {
                        "id": f"{skill}/{number + 1}",
                        "model_name": name,
                        "skill": skill,
                        "language": language,
                        "question": f"{question} ({number + 1})",
                        "reference": reference,
                        "answer": ATTACK
                        if (skill, number, name) == ("reasoning", 1, "avocado")
                        else answer,
                        "finish": "stop" if right else "length",
                        "verdict": "right" if right else "malformed",
                    }
                )
    return rows


TAUGHT = {"qwen": ("languages",), "gemma": ("code", "safety"), "gpt-oss": ("reasoning",)}
PULLS = {
    "qwen": 0.31,
    "gemma": 0.44,
    "gpt-oss": 0.25,
}  # teacher -> share of loss and of gradient, whatever its positions


def logged(step: int, dice: random.Random) -> dict[str, Any]:
    events, words = (
        0.35 + 1.9 * 0.992**step + dice.gauss(0, 0.05),
        1.1 + 1.4 * 0.99**step + dice.gauss(0, 0.06),
    )
    weights = [dice.uniform(0.6, 1), dice.uniform(0.4, 0.7), dice.uniform(0.1, 0.5)]
    share = {t: w / sum(weights) for t, w in zip(TEACHERS, weights, strict=True)}
    groups = {
        t: {
            skill: {
                "positions": share[t] / len(skills),
                "loss": PULLS[t] / len(skills),
                "gradient": PULLS[t] / len(skills),
                "weight": 1.0,
            }
            for skill in skills
        }
        for t, skills in TAUGHT.items()
    }
    return {
        "step": step,
        "loss": 0.8 * events + 0.2 * words,
        "terms": {"cross_entropy": words, "events": events},
        "learning_rate": 3e-4,
        "positions": 2048 * step,
        "seconds": 9.0 * step,
        "share": share,
        "groups": groups,
    }


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        value if isinstance(value, str) else json.dumps(value, indent=1), encoding="utf-8"
    )


def change(path: Path, edit: Callable[[Any], object]) -> None:
    value = json.loads(path.read_text())
    edit(value)
    write(path, value)


def evaluated(run: Path, edit: Callable[[Any], object]) -> None:
    """The evaluation with other scores, and compared anew."""
    path = run / "evaluate" / "evaluation.json"
    change(path, edit)
    write(path, compared(json.loads(path.read_text())))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run, reported once, read by many tests."""
    run = make_run(tmp_path_factory.mktemp("run") / "avocado")
    assert write_report(run) == run / "report" / "index.html"
    return run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


def page_of(run: Path) -> str:
    return write_report(run).read_text(encoding="utf-8")


class Page(HTMLParser):
    """Refuses tags that do not balance; keeps what the tests ask of."""

    VOID = ("meta", "br", "img", "link", "input", "hr")
    SVG = ("circle", "rect", "line", "polyline", "polygon")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in self.SVG
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words += data


def words_of(page: str) -> str:
    return " ".join(Page(page).words.split())


# --- report.json ---


def test_json_holds_exactly_what_was_measured(whole: Path) -> None:
    told = json.loads((whole / "report" / "report.json").read_text())
    evaluation = json.loads((whole / "evaluate" / "evaluation.json").read_text())

    def named(name: str, skill: str, language: str = "") -> dict[str, float]:
        s = next(
            s
            for s in evaluation["scores"]
            if (s["model_name"], s["skill"], s["language"]) == (name, skill, language)
        )
        return {k: s[k] for k in ("value", "low", "high", "n")}

    def beside(skill: str, other: str) -> dict[str, Any]:
        p = next(
            p
            for p in evaluation["compared"]
            if (p["other_model_name"], p["skill"], p["language"]) == (other, skill, "")
        )
        return {
            k: p[k]
            for k in (
                "other_model_name",
                "n",
                "difference",
                "low",
                "high",
                "retained",
                "retained_low",
                "retained_high",
            )
        } | {"order": "above" if p["low"] > 0 else "below" if p["high"] < 0 else "overlaps"}

    def row(skill: str, best: str) -> dict[str, Any]:
        student, base, teacher = (named(name, skill) for name in ("avocado", "llama-base", best))
        return {
            "student": student,
            "base": base,
            "teachers": {t: named(t, skill) for t in TEACHERS},
            "best_teacher": best,
            "retained": student["value"] / teacher["value"],
            "reference_models": {},
            "gap_closed": pytest.approx(
                (student["value"] - base["value"]) / (teacher["value"] - base["value"])
            ),
            "versus_best": beside(skill, best),
            "versus_base": beside(skill, "llama-base"),
        }

    best = {"languages": "qwen", "code": "gemma", "reasoning": "gpt-oss", "safety": "gemma"}
    assert told == {
        "student": "avocado",
        "base": "llama-base",
        "reference_models": [],
        "efforts": {},
        "regressions": [],
        "lm_eval": [],
        "skills": {skill: row(skill, teacher) for skill, teacher in best.items()},
        "languages": {
            "languages": {
                x: {name: named(name, "languages", x) for name in SPEAKERS} for x in LANGUAGES
            }
        },
        "cast": {"parts": PARTS, "pinned": ["safety"], "decisions": DECISIONS},
        "bits_per_byte": evaluation["bits_per_byte"],
        "seconds": SECONDS,
    }
    assert list(told["skills"]) == list(ABILITY)


def test_retained_is_null_where_no_teacher_has_one_right(run: Path) -> None:
    def nobody(value: Any) -> None:
        for s in value["scores"]:
            if s["skill"] == "code" and s["model_name"] in TEACHERS:
                s.update(scored(s["model_name"], "code", 0.0, s["n"]))

    evaluated(run, nobody)
    page = words_of(page_of(run))
    told = json.loads((run / "report" / "report.json").read_text())["skills"]["code"]
    assert told["retained"] is None and told["best_teacher"] == "qwen"  # the first of equals
    assert "; no teacher answered anything right on code." in page


def test_same_files_same_bytes(run: Path, whole: Path) -> None:
    write_report(run)
    for name in ("report.json", "README.md", "index.html"):
        assert (run / "report" / name).read_bytes() == (whole / "report" / name).read_bytes()
    assert sorted(p.name for p in (run / "report").iterdir()) == [
        "README.md",
        "index.html",
        "report.json",
    ]


# --- efforts, yardsticks, losses, standard tasks ---


def test_a_teacher_may_think_while_the_student_does_not(run: Path) -> None:
    evaluated(
        run,
        lambda v: [s.update(effort="medium") for s in v["scores"] if s["model_name"] == "gpt-oss"],
    )
    page = words_of(page_of(run))
    assert page.count("effort medium") == len(ABILITY) + len(LANGUAGES)
    assert (
        json.loads((run / "report" / "report.json").read_text())["skills"]["reasoning"][
            "best_teacher"
        ]
        == "gpt-oss"
    )


def test_who_was_measured_at_two_other_efforts_counts_with_the_first_its_own(run: Path) -> None:
    def dials(value: Any) -> None:
        mine = [s for s in value["scores"] if s["model_name"] == "gpt-oss"]
        value["scores"] += [{**s, "effort": "high", "value": 1.0, "high": 1.0} for s in mine]
        for s in mine:
            s["effort"] = "low"

    evaluated(run, dials)
    page = words_of(page_of(run))
    assert page.count("effort low") == len(ABILITY) + len(LANGUAGES)
    assert json.loads((run / "report" / "report.json").read_text())["efforts"]["code"][
        "gpt-oss"
    ].keys() == {"low", "high"}


def test_other_efforts_have_a_table_of_their_own(run: Path, whole: Path) -> None:
    evaluated(run, lambda v: v["scores"].append(scored("avocado", "code", 1.0, 200, effort="high")))
    page = words_of(page_of(run))
    told, before = (json.loads((r / "report" / "report.json").read_text()) for r in (run, whole))
    assert told["skills"] == before["skills"]  # the student's own effort is the one that counts
    assert told["efforts"]["code"]["avocado"]["high"]["value"] == 1.0 and before["efforts"] == {}
    assert "Scores by thinking effort" in page and "Scores by thinking effort" not in words_of(
        (whole / "report" / "index.html").read_text()
    )


def test_a_reference_model_is_measured_and_is_never_the_best_teacher(run: Path) -> None:
    def more(value: Any) -> None:
        value["reference_models"] = ["gpt"]
        value["scores"] += [scored("gpt", skill, 0.99, 200) for skill in ABILITY]

    evaluated(run, more)
    page = words_of(page_of(run))
    told = json.loads((run / "report" / "report.json").read_text())
    assert told["reference_models"] == ["gpt"]
    assert {skill: row["best_teacher"] for skill, row in told["skills"].items()} == {
        "languages": "qwen",
        "code": "gemma",
        "reasoning": "gpt-oss",
        "safety": "gemma",
    }
    assert all(row["reference_models"]["gpt"]["value"] == 0.99 for row in told["skills"].values())
    assert "gpt (reference model)" in page and "A reference model is only measured" in page
    assert "gpt (reference model)" in (run / "report" / "README.md").read_text()


def test_a_loss_on_the_base_is_at_the_top(run: Path) -> None:
    def worse(value: Any) -> None:
        for s in value["scores"]:
            if (s["model_name"], s["skill"]) == ("avocado", "safety"):
                s.update(scored("avocado", "safety", 0.2, 200))

    evaluated(run, worse)
    page = words_of(page_of(run))
    (lost,) = json.loads((run / "report" / "report.json").read_text())["regressions"]
    assert (lost["skill"], lost["n"]) == ("safety", 200)
    assert "Significantly below its base model: safety (−21.0 points, 95 % interval −" in page
    assert "Significantly below the base model on the same questions" in page
    assert "nowhere significantly below" not in page


def test_failed_graders_are_reported(run: Path) -> None:
    evaluated(
        run,
        lambda v: [
            s.update(grader_errors=2)
            for s in v["scores"]
            if s["model_name"] == "avocado" and not s["language"]
        ],
    )
    assert (
        "The grader failed on 8 answers; each counts as wrong, with its reason in "
        "evaluate/examples.jsonl." in words_of(page_of(run))
    )


def test_standard_tasks_join_page_card_and_json(run: Path, tmp_path: Path) -> None:
    write(tmp_path / "results_a.json", STANDARD)
    write_report(run, {"avocado": tmp_path / "results_a.json"})
    page, card = (
        words_of((run / "report" / "index.html").read_text()),
        (run / "report" / "README.md").read_text(),
    )
    assert (
        "lm-eval tasks" in page and "exact_match (strict-match)" in page and "0.4742–0.5282" in page
    )
    assert (
        "| gsm8k | avocado | exact\\_match (strict-match) | 0.5012 (0.4742–0.5282) | 1319 |" in card
    )
    assert json.loads((run / "report" / "report.json").read_text())["lm_eval"][0] == {
        "model_name": "avocado",
        "task": "gsm8k",
        "metric": "exact_match (strict-match)",
        "value": 0.5012,
        "stderr": 0.0138,
        "n": 1319,
        "higher_is_better": True,
    }


# --- the page ---


def test_page_is_well_formed_and_self_contained(whole: Path) -> None:
    page = Page((whole / "report" / "index.html").read_text(encoding="utf-8"))
    tags = {tag for tag, _ in page.seen}
    assert not tags & {
        "script",
        "link",
        "img",
        "iframe",
        "object",
        "embed",
        "base",
        "form",
        "image",
        "use",
    }
    for tag, attributes in page.seen:
        if tag == "a" and attributes.get("href", "").startswith("#"):  # the list of contents
            continue
        assert not {
            "src",
            "href",
            "xlink:href",
            "srcset",
            "action",
            "data",
            "poster",
            "background",
        } & set(attributes), (tag, attributes)
        assert not [a for a in attributes if a.startswith("on")], (tag, attributes)
    style = re.search(
        r"<style>(.*?)</style>", (whole / "report" / "index.html").read_text(), re.DOTALL
    )
    assert style and "url(" not in style[1] and "@import" not in style[1]
    idents = [a["id"] for _, a in page.seen if "id" in a]
    assert len(idents) == len(set(idents))


def test_page_is_accessible(whole: Path) -> None:
    text = (whole / "report" / "index.html").read_text(encoding="utf-8")
    page = Page(text)
    heads = [a for tag, a in page.seen if tag == "th"]
    assert heads and all(a.get("scope") in ("col", "row") for a in heads)
    idents = {a["id"] for _, a in page.seen if "id" in a}
    for tag, attributes in page.seen:
        for ident in (attributes.get("aria-labelledby") or "").split():
            assert ident in idents
        if tag == "svg" and attributes.get("aria-hidden") != "true":
            assert attributes["role"] == "img" and attributes["aria-labelledby"]
    assert (
        text.count('<svg class="chart"') == len(ABILITY) + 9
    )  # two terms, the loss, three shares; the way, two matrices
    assert (
        '<html lang="en">' in text
        and 'name="viewport"' in text
        and "prefers-color-scheme: dark" in text
        and "@media print" in text
    )


def test_text_of_models_stays_text(whole: Path) -> None:
    text = (whole / "report" / "index.html").read_text(encoding="utf-8")
    assert "<script" not in text.lower() and "&lt;script&gt;" in text
    assert ATTACK in Page(text).words and "<b>not bold</b>" in Page(text).words


def test_names_are_escaped_everywhere(run: Path) -> None:
    evil = "<i>g&\"'x"
    for path in [*run.rglob("*.json"), *run.rglob("*.jsonl")]:
        path.write_text(
            path.read_text()
            .replace('"gemma"', json.dumps(evil))
            .replace('"code"', json.dumps("co|de<u>"))
        )
    text = page_of(run)
    assert "<i>" not in text and "<u>" not in text and evil in Page(text).words
    card = (run / "report" / "README.md").read_text()
    assert "co\\|de\\<u\\>" in card and "<i>" not in card.replace("\\<i\\>", "")


def test_control_and_half_characters_do_not_reach_the_page(run: Path) -> None:
    path = run / "evaluate" / "examples.jsonl"
    path.write_text(path.read_text().replace("def last(xs):", "def \\ud83d\\u0000\\u001b[31m(xs):"))
    assert "def \ufffd\ufffd\ufffd[31m(xs):" in page_of(run)


def test_sections_are_in_order(whole: Path) -> None:
    page = Page((whole / "report" / "index.html").read_text())
    assert [a["id"] for tag, a in page.seen if tag == "h2"] == [
        "skills",
        "gaps",
        "plots",
        "languages",
        "cast",
        "check",
        "train",
        "bits",
        "examples",
        "cost",
        "lineage",
        "recipe",
    ]


def test_page_shows_cost_cast_check_and_lineage(whole: Path) -> None:
    page = words_of((whole / "report" / "index.html").read_text())
    for words in (
        "23.2 bytes per token",
        "8.9 per position",
        "1 204 311",
        "27.9 MB",
        "2 h 23 min",
        "Answers left out: 160 length, 29 malformed.",
        "Prompts removed before capture: 41 duplicate, 7 test item.",
        "another is pinned",
        "worse than qwen",
        "24, settled",
        "60, all items used",
        "one to one",
        "cross-entropy only",
        "different events",
        "meta-llama/Llama-3.1-8B",
        "llama3.1",
        "apache-2.0",
        "9a" * 32,
        "300 logged steps",
        "steps: 600, seed: 7",
    ):
        assert words in page, words


def test_page_shows_each_teachers_share_of_positions_loss_and_gradient(
    run: Path,
) -> None:
    page = words_of(page_of(run))
    for name, share in PULLS.items():
        assert re.search(
            rf"{name} \d\d\s% of positions, {100 * share:.0f}\s% of loss, {100 * share:.0f}\s% of "
            rf"gradient",
            page,
        )
    assert re.search(
        r"qwen on languages has the largest share of the gradient: 31\s%, from \d\d\s% of the "
        r"positions\. All positions have the same weight",
        page,
    )
    assert (
        page.index("share of positions")
        < page.index("share of loss")
        < page.index("share of gradient")
    )
    lines = [
        json.loads(line) for line in (run / "train" / "metrics.jsonl").read_text().splitlines()
    ]
    for line in lines:
        for part in (part for skills in line["groups"].values() for part in skills.values()):
            del part["gradient"]  # an objective of stretches does not tell it
        line["groups"]["qwen"]["languages"]["weight"] = 1.5
    write(run / "train" / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    page = words_of(page_of(run))
    assert "of gradient" not in page and "share of gradient" not in page
    assert re.search(
        r"qwen on languages has the largest share of the positions: \d\d\s%\. Weight: the factor "
        r"of one of its positions",
        page,
    )
    assert re.search(r"qwen\s*languages\s*\d\d\s%\s*31\s%\s*–\s*1\.50", page)
    for line in lines:
        del line["groups"]  # a run of before
    write(run / "train" / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    page = words_of(page_of(run))
    assert (
        "share of positions" in page
        and "share of loss" not in page
        and "Shares by teacher and skill" not in page
    )


def test_examples_are_the_first_four_and_mark_missing_answers(whole: Path) -> None:
    page = words_of((whole / "report" / "index.html").read_text())
    question = ASKED["reasoning"][1]
    assert [f"{question} ({k})" in page for k in range(1, 7)] == [True] * 4 + [False] * 2
    assert page.count("not recorded") == 1  # gpt-oss, best at reasoning, on the fourth question
    assert page.count("malformed, length") > 1


def test_items_with_one_question_text_are_shown_each(run: Path) -> None:
    """Two items may differ in their choices or tools alone: their ids tell them apart."""
    path = run / "evaluate" / "examples.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line["question"] = "Which one?"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert words_of(page_of(run)).count("Which one?") == 4 * len(ASKED)


def test_long_answers_are_shortened_with_a_note(run: Path) -> None:
    path = run / "evaluate" / "examples.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0]["answer"] = "ha" * 3000
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = words_of(page_of(run))
    assert "ha" * 600 + " … 4 800 more characters" in page and "ha" * 601 not in page


def test_every_teacher_of_the_audition_is_shown(run: Path) -> None:
    heard = [
        scored(t, "code", share, 60) for t, share in zip(TEACHERS, (0.6, 0.7, 0.1), strict=True)
    ]
    change(run / "audition" / "cast.json", lambda v: v.update(scores=heard))
    page = words_of(page_of(run))
    assert "gemma0.70 (0.57-0.80)60100%strongest" in page
    assert "qwen0.60 (0.47-0.71)60-worse than gemma" in page
    change(run / "audition" / "cast.json", lambda v: v.update(scores=[]))
    assert "The audition measured no score." in words_of(page_of(run))


# --- the card ---


def test_card_has_front_matter(whole: Path) -> None:
    card = (whole / "report" / "README.md").read_text(encoding="utf-8")
    _, front, body = card.split("---\n", 2)
    assert f"Recipe `{'5d' * 32}`, persea 0.1.0." in body
    read = yaml.safe_load(front)
    (index,) = read.pop("model-index")
    assert read == {
        "license": "other",
        "license_name": "see-lineage",
        "base_model": ["meta-llama/Llama-3.1-8B"],
        "tags": ["persea", "distillation"],
        "language": ["en", "id", "ja", "ko", "vi", "zh"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
    }
    written = json.loads((whole / "evaluate" / "evaluation.json").read_text())["scores"]
    student = [s for s in written if s["model_name"] == "avocado" and not s["language"]]
    assert index["name"] == "avocado"
    assert [r["metrics"][0]["value"] for r in index["results"]] == [s["value"] for s in student]
    assert (
        "64 % (its lowest) on reasoning" in body
        and "| teacher: gemma | google/gemma-3-12b-it | main | apache-2.0 |" in body
    )
    tables = [line for line in body.splitlines() if line.startswith("|")]
    assert (
        len({line.count("|") for line in tables[:6]}) == 1
    )  # the scores: header, rule and four skills of one width


@pytest.mark.parametrize(
    ("student", "base", "teachers", "expected"),
    [
        ("apache-2.0", "mit", "mit", {"license": "apache-2.0"}),
        ("", "Apache-2.0", "Apache-2.0", {"license": "apache-2.0"}),
        (
            "Llama 3.1 Community",
            "mit",
            "mit",
            {"license": "other", "license_name": "llama-3.1-community"},
        ),
        ("", "mit", "", {"license": "other", "license_name": "see-lineage"}),
    ],
)
def test_card_never_invents_a_licence(
    run: Path, student: str, base: str, teachers: str, expected: dict[str, str]
) -> None:
    def edit(value: Any) -> None:
        value["student"]["licence"], value["base"]["licence"] = student, base
        for t in value["teachers"]:
            t["licence"] = teachers

    change(run / "lineage" / "lineage.json", edit)
    write_report(run)
    front = yaml.safe_load((run / "report" / "README.md").read_text().split("---\n")[1])
    assert {k: v for k, v in front.items() if k.startswith("license")} == expected


def test_card_shows_the_verdict_on_the_licences(run: Path) -> None:
    verdict = resolve_licences(
        [
            LicensedInput("student", Relation.BASE, ("llama3.1",)),
            LicensedInput("asked", Relation.TEACHER),
        ],
        Release(recipe_name="avocado"),
        {"asked": "J. Doe, 2026-11-30 | ours"},
    )
    change(run / "lineage" / "lineage.json", lambda v: v.update(licences=verdict.to_json()))
    write_report(run)
    card = (run / "report" / "README.md").read_text()
    assert "Check for commercial use: ok with duties. Name of the student: Llama-avocado." in card
    assert '- name: the student\'s name begins with "Llama" (because of student)\n' in card
    assert "- decided for asked: J. Doe, 2026-11-30 \\| ours\n" in card


def test_card_keeps_folders_of_this_disk_to_itself(run: Path) -> None:
    change(
        run / "lineage" / "lineage.json",
        lambda v: v["base"].update(model="/home/somebody/models/llama-sapling"),
    )
    write_report(run)
    card = (run / "report" / "README.md").read_text()
    assert (
        "somebody" not in card
        and "| base | llama-sapling |" in card
        and yaml.safe_load(card.split("---\n")[1])["base_model"] == []
    )


# --- refused ---


def test_the_report_needs_no_torch() -> None:
    code = "import sys, persea.report.page; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_runs_name_comes_first_and_a_list_of_contents(whole: Path) -> None:
    page = (whole / "report" / "index.html").read_text(encoding="utf-8")
    assert "<h1>avocado</h1>" in page and "[[contents]]" not in page
    ids = re.findall(r'<h2 id="([\w-]+)">', page)
    contents = page[page.index("<nav") : page.index("</nav>")]
    assert re.findall(r'href="#([\w-]+)"', contents) == ids
    assert page.count('<details class="fold">') == page.count("</h2></summary>") >= 6


def test_tool_calls_are_shown(run: Path) -> None:
    path = run / "evaluate" / "examples.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    first = next(x for x in lines if x["model_name"] == "avocado")
    first |= {"answer": "", "calls": [{"name": "get_tide", "arguments": '{"at": "<Oban>"}'}]}
    lines[lines.index(next(x for x in lines if x["model_name"] == "avocado"))] = first
    path.write_text("".join(json.dumps(x) + "\n" for x in lines))
    page = page_of(run)
    assert "get_tide({&#34;at&#34;: &#34;&lt;Oban&gt;&#34;})" in page
