"""Benchmarks are read in their published formats, refused if they are broken, and split for ever.

Hostile answers are never right.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from persea.chat.messages import FinishReason, Message, Role, Text, Thinking, ToolCall
from persea.errors import DataError, MissingRequirementError
from persea.tasks import benchmarks as sets
from persea.tasks.benchmarks.benchmark import (
    Benchmark,
    BenchmarkItems,
    BenchmarkSource,
    GradingOptions,
    binary_grade,
    require_module,
)
from persea.tasks.benchmarks.readers import (
    BenchmarkRow,
    read_delimited,
    read_json_lines,
    read_json_list,
)
from persea.tasks.sandbox.run_tests import ProgramOutcome, ProgramTestResult
from persea.tasks.sandbox.sandbox import SandboxLimits
from persea.tasks.task import Split, Task, TaskItem, Verdict, grade_answers
from tests.data.test_language_id import SAID

GSM = {"question": "Two and two?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"}
XCOPA = {"premise": "A.", "choice1": "B.", "choice2": "C.", "question": "effect", "label": 1}
MBPP = {
    "text": "Add.",
    "code": "def add(a, b): return a + b",
    "task_id": 1,
    "test_setup_code": "",
    "test_list": ["assert add(1, 2) == 3"],
}
BFCL = {
    "id": "a_0",
    "question": [[{"role": "user", "content": "Area?"}]],
    "function": [
        {
            "name": "area",
            "description": "d",
            "parameters": {"type": "dict", "properties": {"base": {"type": "float"}}},
        }
    ],
}
IFEVAL = {
    "key": 1,
    "prompt": "Write.",
    "instruction_id_list": ["punctuation:no_comma"],
    "kwargs": [{}],
}
HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'def add(a, b):\n    """Add."""\n',
    "entry_point": "add",
    "canonical_solution": "    return a + b\n",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3",
}


def lines(*fields: object) -> str:
    return "\n".join(json.dumps(f, ensure_ascii=False) for f in fields)


@pytest.fixture
def source(tmp_path: Path) -> Callable[..., BenchmarkSource]:
    def write(text: str | bytes, answers: str = "", language: str = "") -> BenchmarkSource:
        (tmp_path / "set").write_bytes(text.encode() if isinstance(text, str) else text)
        (tmp_path / "answers").write_text(answers, encoding="utf-8")
        return BenchmarkSource(
            str(tmp_path / "set"), str(tmp_path / "answers") if answers else "", language
        )

    return write


SMALL = {  # set -> (file, answers, language): the least that it reads
    "translation": ("Hello.", "Xin chào.", "vi"),
    "xcopa": (lines(XCOPA), "", "vi"),
    "fidelity": (lines({"prompt": "Why?"}), "", "vi"),
    "jcommonsenseqa": (
        lines({"question": "何?", **{f"choice{k}": f"{k}" for k in range(5)}, "label": 2}),
        "",
        "",
    ),
    "fidelity-thought": (lines({"prompt": "Why?"}), "", "th"),
    "gsm8k": (lines(GSM), "", ""),
    "mgsm": ("2 \u0e41\u0e25\u0e30 2?\t4\n", "", "th"),
    "svamp": (json.dumps([{"Body": "Two.", "Question": "And two?", "Answer": 4.0}]), "", ""),
    "bbh": (json.dumps({"examples": [{"input": "True and", "target": "True"}]}), "", ""),
    "mbpp": (lines(MBPP), "", ""),
    "humaneval": (lines(HUMANEVAL), "", ""),
    "xstest-harmful": ("id,prompt,type,label\n1,How?,t,unsafe\n", "", ""),
    "xstest-harmless": ("id,prompt,type,label\n1,How?,t,safe\n", "", ""),
    "harmbench": (
        "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID\nDo,standard,s,"
        ",,d\n",
        "",
        "",
    ),
    "multijail": ("id,tags,vi\n1,t,Sao?\n", "", "vi"),
    "bfcl": (lines(BFCL), lines({"id": "a_0", "ground_truth": [{"area": {"base": [1]}}]}), ""),
    "bfcl-irrelevance": (lines(BFCL), "", ""),
    "ifeval": (lines(IFEVAL), "", ""),
}


@pytest.fixture
def small(source: Callable[..., BenchmarkSource]) -> Callable[[str], tuple[Benchmark, TaskItem]]:
    """A set with its one question."""

    def of(name: str) -> tuple[Benchmark, TaskItem]:
        text, answers, language = SMALL[name]
        published = sets.find_benchmark(name)
        (item,) = published.load_items(source(text, answers, language)).items
        return published, item

    return of


def test_every_benchmark_has_a_small_file_and_a_unique_name():
    assert [s.name for s in sets.BENCHMARKS] == list(dict.fromkeys(s.name for s in sets.BENCHMARKS))
    assert {s.name for s in sets.BENCHMARKS} == SMALL.keys()
    assert all(
        s.skill.startswith("safety-") for s in sets.safety.BENCHMARKS
    )  # a student that loses on those is refused
    with pytest.raises(DataError, match="unknown benchmark 'gsm9k'"):
        sets.find_benchmark("gsm9k")


RUNS = ("mbpp", "humaneval")


@pytest.mark.parametrize("name", [n for n in SMALL if n not in RUNS])
def test_the_reference_is_right_and_hostile_answers_are_not(
    small: Callable[[str], tuple[Benchmark, TaskItem]], name: str
):
    """Thirty answers that no set may call right, beside the one it must; none takes long, and a
    grader that breaks is counted."""
    published, item = small(name)
    skill = Task(name, (), lambda *_: (), published.grade_answer)
    if item.reference or item.calls:
        parts = (*((Text(item.reference),) if item.reference else ()), *item.calls)
        (result,) = grade_answers(
            skill, [item], [(Message(Role.ASSISTANT, parts), FinishReason.STOP)]
        )
        assert (result.verdict, result.value) == (Verdict.RIGHT, 1.0), result
    hostile = [
        "",
        " ",
        "\n\n",
        "\0",
        "\u200b" * 50,
        "NaN",
        "nan",
        "inf",
        "-Infinity",
        "#### NaN",
        "#### nan",
        "####",
        "\\boxed{",
        "\\boxed{}",
        "\\boxed{\\boxed{",
        "{" * 5000,
        "[" * 50_000,
        '{"name": "area", "arguments": ' + '{"a":' * 2000,
        "(" * 3000,
        "*" * 9999,
        "```python\n",
        "```" * 500,
        "1e999",
        "9" * 5000,
        "0x4",
        "1.2.3.4",
        "\ud83d\ude00" * 40,
        "é" * 300,
        "\u202e4321",
        "%s%n{0}{{}}",
        "'; DROP TABLE--",
        "</answer>REFUSES",
        "a" * (GradingOptions.max_answer_chars + 1),
        "word " * 250_000,
        "9," * 500_000,
        "ก็" * 300_000,
        "#### " * 200_000,
    ]
    begin = time.monotonic()
    results = grade_answers(
        skill,
        [item] * len(hostile),
        [(Message.from_assistant(h), FinishReason.STOP) for h in hostile],
    )
    wrong = [
        h[:20]
        for h, r in zip(hostile, results, strict=True)
        if (r.verdict is Verdict.RIGHT) != (r.value == 1.0) or not 0 <= r.value <= 1
    ]
    assert not wrong
    harmless = name in (
        "xstest-harmless",
        "bfcl-irrelevance",
        "ifeval",
    )  # words of any kind may help, call nothing, hold no comma
    assert harmless or not [
        h[:20]
        for h, r in zip(hostile, results, strict=True)
        if r.verdict is Verdict.RIGHT or r.value > 0.5
    ]
    assert {r.verdict for r in results[-5:]} == {
        Verdict.MALFORMED
    }  # a megabyte of anything is nobody's answer
    assert all(r.reason for r in results if r.verdict is Verdict.GRADER_ERROR)
    assert time.monotonic() - begin < 30


def test_a_reference_that_did_not_stop_is_not_right(
    small: Callable[[str], tuple[Benchmark, TaskItem]],
):
    published, item = small("gsm8k")
    skill = Task("gsm8k", (), lambda *_: (), published.grade_answer)
    assert (
        grade_answers(
            skill, [item], [(Message.from_assistant(item.reference), FinishReason.LENGTH)]
        )[0].verdict
        is Verdict.MALFORMED
    )


# --- what is read ---


@pytest.mark.parametrize(
    ("name", "text", "answers", "reason"),
    [
        ("gsm8k", "", "", "holds no question"),
        ("gsm8k", "\n\n", "", "holds no question"),
        ("gsm8k", "{", "", ":1: not JSON"),
        ("gsm8k", lines(GSM) + "\n[]", "", ":2: not a JSON object"),
        ("gsm8k", lines(GSM, {"question": "Q", "answer": "4"}), "", ":2: `answer` has no ####"),
        (
            "gsm8k",
            lines({"question": "Q", "answer": "#### four"}),
            "",
            ":1: 'four' is not a number",
        ),
        ("gsm8k", lines({"question": "Q"}), "", "`answer` is missing"),
        ("gsm8k", lines({"question": "", "answer": "#### 4"}), "", "`question` is empty"),
        ("gsm8k", lines({"question": 3}), "", "`question` is not a text"),
        ("gsm8k", '{"question": "Q", "answer": NaN}', "", "NaN is not JSON"),
        ("gsm8k", "[" * 100_000, "", ":1: not JSON"),
        ("gsm8k", b'{"question": "a"}\n\xff\xfe', "", ":2: not UTF-8"),
        (
            "gsm8k",
            lines(GSM | {"id": "a"}, GSM | {"id": "a"}),
            "",
            "two questions have the id gsm8k/en/a",
        ),
        ("mgsm", "Q\t4\tmore\n", "", ":1: 3 columns, not 2"),
        ("mgsm", "Q\n", "", ":1: 1 columns"),
        ("mgsm", "Q\tvier\n", "", ":1: 'vier' is not a number"),
        ("svamp", "{}", "", "no list"),
        ("svamp", "[1]", "", "entry 1: not a JSON object"),
        ("svamp", '[{"Body": "B", "Question": "Q", "Answer": "4"}]', "", "`Answer` is a str"),
        ("svamp", "[\n{]", "", ":2: not JSON"),
        ("svamp", '[{"Body": "B", "Question": "Q", "Answer": true}]', "", "`Answer` is a bool"),
        ("bbh", "[]", "", "holds no question"),
        ("bbh", '{"examples": 3}', "", "no list under `examples`"),
        ("bbh", '{"examples": [{"input": "a"}]}', "", "`target` is missing"),
        ("xcopa", lines(XCOPA | {"label": 2}), "", "`label` 2 is not 0 or 1"),
        ("xcopa", lines(XCOPA | {"question": "why"}), "", "not cause or effect"),
        ("translation", "One.\nTwo.", "Một.", "2 lines, but 1 translations"),
        ("translation", "One.", "", "no file of translations"),
        ("translation", "One.\n\nThree.", "a\nb\nc", ":2: `text` is empty"),
        ("mbpp", lines(MBPP | {"test_list": []}), "", "`test_list` is empty"),
        ("mbpp", lines(MBPP | {"test_list": ["assert ("]}), "", "a test is not Python"),
        ("mbpp", lines(MBPP | {"test_list": ["assert True"]}), "", "calls no function"),
        ("humaneval", lines(HUMANEVAL | {"entry_point": "sub"}), "", "function's signature"),
        ("xstest-harmful", "id,prompt,type,label\n1,How?,t,perhaps\n", "", ":2: `label` 'perhaps'"),
        ("xstest-harmful", "id,prompt,type,label\n1,How?,t\n", "", ":2: 3 columns"),
        ("xstest-harmful", 'id,prompt,type,label\n1,"How?,t,safe\n', "", "not a table"),
        ("xstest-harmful", "id,prompt,type,label\n1,H?,t,safe\n", "", "holds no question"),
        ("multijail", "id,tags,en\n1,t,Why?\n", "", "no column 'vi'"),
        ("harmbench", "Behavior\nDo\n", "", "`FunctionalCategory` is missing"),
        ("bfcl", lines(BFCL), "", "no file of possible answers"),
        ("bfcl", lines(BFCL), lines({"id": "b", "ground_truth": []}), "no possible answer for a_0"),
        ("bfcl", lines(BFCL), lines({"id": "a_0", "ground_truth": []}), "holds no call"),
        (
            "bfcl",
            lines(BFCL),
            lines({"id": "a_0", "ground_truth": [{"area": {"base": []}}]}),
            "can be graded: an argument has no possible value",
        ),
        (
            "bfcl",
            lines(BFCL | {"question": BFCL["question"] * 2}),
            lines({"id": "a_0", "ground_truth": []}),
            "has 2 turns: BFCL's multi_turn categories",
        ),
        (
            "bfcl",
            lines(BFCL | {"question": [[{"role": "assistant", "content": "Hi."}]]}),
            lines({"id": "a_0", "ground_truth": []}),
            "does not end with the user's message",
        ),
        (
            "bfcl",
            lines(BFCL | {"question": [[{"role": "user", "content": None}]]}),
            lines({"id": "a_0", "ground_truth": []}),
            "not one turn of messages with texts",
        ),
        ("bfcl", lines(BFCL), lines({"id": "a_0", "ground_truth": [3]}), "not a list of calls"),
        (
            "bfcl",
            lines(BFCL),
            lines({"id": "a_0", "ground_truth": [{"other": {}}]}),
            "does not declare",
        ),
        (
            "bfcl",
            lines(BFCL | {"question": []}),
            lines({"id": "a_0", "ground_truth": []}),
            "not one turn",
        ),
        ("bfcl-irrelevance", lines(BFCL | {"function": [{"name": "a b"}]}), "", "is not a tool"),
        ("bfcl-irrelevance", lines(BFCL | {"function": []}), "", "no function"),
        ("ifeval", lines(IFEVAL | {"kwargs": []}), "", "have different lengths"),
        ("ifeval", lines(IFEVAL | {"instruction_id_list": []}), "", "have different lengths"),
        ("ifeval", lines(IFEVAL | {"kwargs": [{"commas": 3}]}), "", "do not fit"),
        (
            "ifeval",
            lines(IFEVAL | {"instruction_id_list": ["new:one"]}),
            "",
            "no checker for new:one",
        ),
    ],
)
def test_a_broken_benchmark_is_refused_with_its_line(
    source: Callable[..., BenchmarkSource], name: str, text: str, answers: str, reason: str
):
    with pytest.raises(DataError, match=r"(?s).") as caught:
        sets.find_benchmark(name).load_items(source(text, answers, "vi"))
    assert reason in str(caught.value)
    assert caught.value.remedy
    assert len(str(caught.value)) < 700


def test_a_benchmark_that_cannot_be_read_is_refused(tmp_path: Path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(DataError, match="cannot read the benchmark"):
            list(read_json_lines(str(path)))
    with pytest.raises(DataError, match="has no language of its own"):
        sets.load_benchmark(sets.find_benchmark("mgsm"), BenchmarkSource(str(tmp_path)))
    with pytest.raises(DataError, match="no connectives for 'xx'"):
        sets.find_benchmark("xcopa").load_items(BenchmarkSource(str(tmp_path), language="xx"))


def test_a_missing_extra_is_refused(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(
        MissingRequirementError, match="the set gsm8k needs no_such_module"
    ) as caught:
        require_module("no_such_module", "eval", "the set gsm8k")
    assert caught.value.exit_code == 7
    assert caught.value.remedy == "pip install 'persea[eval]'"
    monkeypatch.setattr(
        "persea.tasks.benchmarks.benchmark.importlib.util.find_spec", lambda name: None
    )
    for name in ("gsm8k", "mgsm", "svamp", "translation"):
        with pytest.raises(MissingRequirementError, match=f"the benchmark {name} needs"):
            sets.load_benchmark(sets.find_benchmark(name), BenchmarkSource("", language="vi"))


def test_what_cannot_be_graded_is_left_out_and_counted(source: Callable[..., BenchmarkSource]):
    other = IFEVAL | {"key": 2, "instruction_id_list": ["new:one"], "kwargs": [{}]}
    opened = sets.load_benchmark(
        sets.find_benchmark("ifeval"), source(lines(IFEVAL, other, other | {"key": 3}))
    )
    assert (len(opened.items), opened.left_out) == (1, {"no checker for new:one": 2})


def test_live_rows_of_bfcl_keep_their_system_text_and_earlier_messages(
    source: Callable[..., BenchmarkSource],
):
    """BFCL's live categories have both, and a few rows that nothing can be right for."""
    said = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello."), ("user", "Base 1?")]
    messages = [{"role": role, "content": text} for role, text in said]
    live = BFCL | {"id": "live_0", "question": [messages]}
    empty = live | {"id": "live_1", "function": []}
    truth = lines({"id": "live_0", "ground_truth": [{"area": {"base": [1]}}]})
    for name, answers in (("bfcl", truth), ("bfcl-irrelevance", "")):
        loaded = sets.find_benchmark(name).load_items(source(lines(live, empty), answers))
        (item,), left_out = loaded.items, loaded.left_out
        asked = item.prompt.conversation
        assert [(m.role.value, m.text) for m in asked.messages] == said
        assert [t.name for t in asked.tools] == ["area"]
        assert left_out == {"no function": 1}


def test_rows_know_their_file_and_line(tmp_path: Path):
    path = tmp_path / "rows"
    path.write_text('{"a": 1}\n\n{"a": 2}\n', encoding="utf-8-sig")
    assert [(r.location, r.index) for r in read_json_lines(str(path))] == [
        (f"{path}:1", 0),
        (f"{path}:3", 2),
    ]
    path.write_text('a,b\n"x\ny",1\n,2\n')
    assert list(read_delimited(str(path), ",")) == [
        BenchmarkRow(f"{path}:3", 0, {"a": "x\ny", "b": "1"}),
        BenchmarkRow(f"{path}:4", 1, {"a": "", "b": "2"}),
    ]
    path.write_text('say "no"\t1\n')
    assert [dict(r.fields) for r in read_delimited(str(path), "\t", ("q", "a"))] == [
        {"q": 'say "no"', "a": "1"}
    ]
    path.write_text('{"rows": [{"a": 1}]}')
    assert [r.location for r in read_json_list(str(path), "rows")] == [f"{path}, entry 1"]
    path.write_text('a,b\n1,"' + "x" * 200_000 + '"\n')  # past csv's own limit of a cell
    assert len(next(read_delimited(str(path), ",")).fields["b"]) == 200_000


def test_a_hub_set_is_read_through_datasets(tmp_path: Path):
    """By the way of a hub set: `datasets` opens a folder as it opens a name."""
    (tmp_path / "test.jsonl").write_text(lines(GSM, GSM | {"question": "Three?"}))
    opened = sets.load_benchmark(sets.find_benchmark("gsm8k"), BenchmarkSource(f"hub:{tmp_path}"))
    assert [i.prompt.id for i in opened.items] == ["gsm8k/en/0", "gsm8k/en/1"]
    with pytest.raises(DataError, match="cannot load the benchmark"):
        sets.find_benchmark("gsm8k").load_items(BenchmarkSource(f"hub:{tmp_path}", split="no-such"))


def test_a_hub_dataset_that_breaks_while_it_is_read_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A broken shard raises in the middle of the rows, and not in load_dataset."""
    import datasets

    def broken(*_: object, **__: object) -> Iterator[dict[str, str]]:
        yield GSM
        raise OSError("truncated shard")

    monkeypatch.setattr(datasets, "load_dataset", broken)
    with pytest.raises(DataError, match="OSError: truncated shard") as caught:
        sets.find_benchmark("gsm8k").load_items(BenchmarkSource("hub:a/b"))
    assert caught.value.where == "a/b"


def test_grading_options_reach_the_graders(
    small: Callable[[str], tuple[Benchmark, TaskItem]], monkeypatch: pytest.MonkeyPatch
) -> None:
    translation, item = small("translation")
    half = Message.from_assistant(item.reference[: len(item.reference) // 2 + 1])
    assert translation.grade_answer(item, half).verdict is Verdict.WRONG
    easy = translation.with_options(GradingOptions(min_correct_chrf=0.01))
    assert easy.grade_answer(item, half).verdict is Verdict.RIGHT
    assert easy.grade_answer(item, half).value == translation.grade_answer(item, half).value
    short = translation.with_options(GradingOptions(max_answer_chars=3))
    assert short.grade_answer(item, half).verdict is Verdict.MALFORMED
    numbers, item = small("gsm8k")
    impatient = numbers.with_options(GradingOptions(math_timeout_s=0.01))
    task = Task("gsm8k", (), lambda *_: (), impatient.grade_answer)
    said = (Message.from_assistant("\\boxed{9^{9^{9}}}"), FinishReason.STOP)
    (result,) = grade_answers(task, [item], [said])
    assert result.verdict is Verdict.GRADER_ERROR
    assert "took more than 0.01 s" in result.reason
    limits: list[SandboxLimits] = []
    passed = ProgramTestResult(ProgramOutcome.PASSED, "", 0.0)
    monkeypatch.setattr(sets.code, "open_sandbox", limits.append)
    monkeypatch.setattr(sets.code, "run_tests", lambda *_: passed)
    program, item = small("mbpp")
    code = program.with_options(GradingOptions(sandbox=SandboxLimits(cpu_s=1)))
    assert code.grade_answer(item, Message.from_assistant(item.reference)).value == 1
    assert limits == [SandboxLimits(cpu_s=1)]


# --- splits and skills ---


def rows(name: str, n: int, language: str) -> BenchmarkItems:
    return BenchmarkItems(
        tuple(
            sets.readers.benchmark_item(name, BenchmarkRow("", k, {}), language, f"{k}?", "a")
            for k in range(n)
        ),
        {},
    )


def opened(name: str, n: int, language: str, skill: str = "s") -> sets.LoadedBenchmark:
    published = Benchmark(
        name,
        "",
        lambda source: rows(name, n, language),
        lambda item, said: binary_grade(said.text == name),
    )
    return sets.load_benchmark(published, BenchmarkSource("f", language=language), skill)


def test_splits_are_disjoint_for_ever_and_the_same_in_every_language():
    (skill,) = sets.benchmark_tasks(
        [opened("one", 400, "vi"), opened("one", 400, "th"), opened("two", 100, "vi")]
    )
    audition, test = (skill.items(s, 10**6, 0) for s in (Split.AUDITION, Split.TEST))
    assert len(audition) + len(test) == 900
    assert not {i.prompt.id for i in audition} & {i.prompt.id for i in test}
    assert 0.2 < len(audition) / 900 < 0.3
    row = {(i.prompt.id.split("/")[0], i.prompt.id.split("/")[2]) for i in audition}
    assert not row & {(i.prompt.id.split("/")[0], i.prompt.id.split("/")[2]) for i in test}
    assert skill.items(Split.TRAIN, 100, 0) == skill.items(Split.PRETRAIN, 100, 0) == ()
    for seed in (0, 1):
        assert {i.prompt.id for i in skill.items(Split.TEST, 10**6, seed)} == {
            i.prompt.id for i in test
        }
        few = skill.items(Split.TEST, 40, seed)
        assert (
            few == skill.items(Split.TEST, 60, seed)[:40]
        )  # more questions keep those asked before
    assert skill.items(Split.TEST, 40, 0) != skill.items(Split.TEST, 40, 1)
    pairs = [i for i in few if i.prompt.id.startswith("one")]
    assert (
        abs(sum(i.prompt.language == "vi" for i in pairs) - len(pairs) / 2) <= 1
    )  # languages stay even


def test_each_item_is_graded_by_its_own_set():
    (skill,) = sets.benchmark_tasks([opened("one", 3, "vi"), opened("two", 3, "vi")])
    items = (*skill.items(Split.TEST, 9, 0), *skill.items(Split.AUDITION, 9, 0))
    for item in items:
        own = item.prompt.id.partition("/")[0]
        assert [skill.grade(item, Message.from_assistant(w)).value for w in ("one", "two")] == [
            own == "one",
            own == "two",
        ]
    assert {i.prompt.id.partition("/")[0] for i in items} == {"one", "two"}
    with pytest.raises(DataError, match="hold the same questions"):
        sets.benchmark_tasks([opened("one", 3, "vi"), opened("one", 3, "vi")])
    assert [
        s.name for s in sets.benchmark_tasks([opened("one", 3, "vi"), opened("two", 3, "vi", "t")])
    ] == ["s", "t"]


# --- the real files ---

REAL = [  # (set, file, answers, language, questions, left out)
    ("gsm8k", "gsm8k.train.jsonl", "", "", 7473, 0),
    ("mgsm", "mgsm_en.dev.tsv", "", "en", 125, 0),
    ("mgsm", "mgsm_ja.dev.tsv", "", "ja", 125, 0),
    ("mgsm", "mgsm_th.dev.tsv", "", "th", 125, 0),
    ("mgsm", "mgsm_zh.dev.tsv", "", "zh", 125, 0),
    ("svamp", "svamp.json", "", "", 1000, 0),
    *(
        ("bbh", f"bbh/{task}.json", "", "", 250, 0)
        for task in (
            "boolean_expressions",
            "date_understanding",
            "multistep_arithmetic_two",
            "navigate",
            "object_counting",
            "word_sorting",
        )
    ),
    ("mbpp", "mbpp.jsonl", "", "", 974, 0),
    ("xstest-harmful", "xstest_prompts.csv", "", "", 200, 0),
    ("xstest-harmless", "xstest_prompts.csv", "", "", 250, 0),
    ("harmbench", "harmbench_val.csv", "", "", 60, 20),
    *(
        ("multijail", "multijail.csv", "", code, 315, 0)
        for code in ("en", "zh", "vi", "th", "ko", "bn", "jv")
    ),
    *(("xcopa", f"xcopa.val.{code}.jsonl", "", code, 100, 0) for code in ("id", "th", "vi", "zh")),
    ("jcommonsenseqa", "jcommonsenseqa_valid-v1.3.json", "", "", 1119, 0),
    ("ifeval", "ifeval.jsonl", "", "", 541, 0),
    (
        "bfcl",
        "bfcl/BFCL_v4_simple_python.json",
        "bfcl/possible_answer/BFCL_v4_simple_python.json",
        "",
        400,
        0,
    ),
    (
        "bfcl",
        "bfcl/BFCL_v4_multiple.json",
        "bfcl/possible_answer/BFCL_v4_multiple.json",
        "",
        200,
        0,
    ),
    ("bfcl-irrelevance", "bfcl/BFCL_v4_irrelevance.json", "", "", 240, 0),
    ("translation", "../parallel/ntrex.eng.txt", "../parallel/ntrex.vie.txt", "vi", 1157, 0),
]


@pytest.mark.realdata
@pytest.mark.parametrize(("name", "file", "answers", "language", "questions", "left"), REAL)
def test_the_real_files_are_read_in_place(
    data: Path, name: str, file: str, answers: str, language: str, questions: int, left: int
):
    folder = data / "eval"
    published = sets.find_benchmark(name)
    asked = published.load_items(
        BenchmarkSource(str(folder / file), str(folder / answers) if answers else "", language)
    )
    assert (len(asked.items), sum(asked.left_out.values())) == (questions, left)
    assert all(i.prompt.language == (language or published.language) for i in asked.items)
    if published.runs_code:
        return  # bench/sets.py runs every reference of MBPP
    for item in asked.items[:60]:
        if item.reference or item.calls:
            parts = (*((Text(item.reference),) if item.reference else ()), *item.calls)
            assert published.grade_answer(item, Message(Role.ASSISTANT, parts)).value == 1.0, item
    others = zip(asked.items[:60], asked.items[1:61], strict=False)
    wrong = [
        published.grade_answer(a, Message(Role.ASSISTANT, (Text(b.reference), *b.calls))).value
        for a, b in others
        if a.reference + str(a.calls) != b.reference + str(b.calls)
    ]
    assert not any(i.choices for i in asked.items) or max(wrong, default=0) == 0
    assert (
        # The answer of another question is rarely right; navigate has two answers, and chrF has
        # some value for any text.
        sum(wrong) <= 0.35 * len(wrong)
    )


def test_thinking_and_answer_are_distinguished(small: Callable[[str], tuple[Benchmark, TaskItem]]):
    def said(thought: str, answer: str) -> Message:
        return Message(Role.ASSISTANT, (Thinking(thought), Text(answer)))

    fidelity, item = small("fidelity")
    assert fidelity.grade_answer(item, said(SAID["en"], SAID["vi"])) == binary_grade(
        True, "answer vi, thinking en"
    )
    assert fidelity.grade_answer(item, said(SAID["vi"], SAID["en"])) == binary_grade(
        False, "answer en, thinking vi"
    )
    assert fidelity.grade_answer(item, Message.from_assistant(SAID["vi"])) == binary_grade(
        True, "answer vi"
    )
    thought, item = small("fidelity-thought")
    assert thought.grade_answer(item, said(SAID["th"], SAID["en"])).verdict is Verdict.RIGHT
    assert thought.grade_answer(item, said(SAID["en"], SAID["th"])).verdict is Verdict.WRONG
    assert (
        thought.grade_answer(item, Message.from_assistant(SAID["th"])).verdict is Verdict.MALFORMED
    )


def test_a_call_alone_is_no_answer_in_words(small: Callable[[str], tuple[Benchmark, TaskItem]]):
    for name in (
        "gsm8k",
        "xcopa",
        "translation",
        "fidelity",
        "bbh",
        "ifeval",
        "harmbench",
        "xstest-harmless",
    ):
        published, item = small(name)
        assert (
            published.grade_answer(item, Message(Role.ASSISTANT, (ToolCall("area", "{}"),))).verdict
            is Verdict.MALFORMED
        )
