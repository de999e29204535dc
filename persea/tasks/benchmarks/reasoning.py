"""Reasoning benchmarks: GSM8K, MGSM and SVAMP by the final number, BIG-Bench Hard by the final
words.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from persea.chat.messages import Message
from persea.tasks.benchmarks.benchmark import (
    Benchmark,
    BenchmarkItems,
    BenchmarkSource,
    Grader,
    GradingOptions,
    binary_grade,
    malformed_grade,
)
from persea.tasks.benchmarks.math_verify import Equivalence, math_verifier
from persea.tasks.benchmarks.number_parsing import find_numbers, possible_values
from persea.tasks.benchmarks.readers import (
    BenchmarkRow,
    benchmark_item,
    collect_items,
    read_benchmark_rows,
    read_delimited,
    read_json_lines,
    read_json_list,
)
from persea.tasks.task import Grade, TaskItem

ANSWER_INSTRUCTION = (
    "Think step by step. End with a line that holds #### and then the answer alone."
)
MAX_FORMULA_CHARS = 1000  # a longer answer is not given to math-verify
BOXED_ANSWER = re.compile(r"\\boxed\s*\{")
ANSWER_PHRASE = re.compile(
    r"(?:the (?:final )?answer is|final answer|answer|jawaban(?:nya)?(?: adalah)?|đáp (?:án|"
    r"số)(?: là)?|câu trả lời(?: là)?|"
    r"答案是?|答え(?:は)?|คำตอบ(?:คือ)?|답(?:은|변은)?)\s*[:：]?\s*\**\s*",
    re.IGNORECASE,
)


ALTERNATIVE = re.compile(
    r"\s*(?:,?\s*\b(?:or|oder|atau|hoặc)\b|或者?|または|หรือ|또는)\s*", re.IGNORECASE
)


def has_two_numbers(answer: str, language: str) -> bool:
    """Return whether a final answer offers two different numbers, such as "7 or 8".

    Example:
        >>> has_two_numbers("7 or 8.", "en"), has_two_numbers("18 dollars for 3 days", "en")
        (True, False)
    """
    offered = [find_numbers(part) for part in ALTERNATIVE.split(answer)]
    values = [possible_values(found[0], language) for found in offered if found]
    return len(values) > 1 and any(not values[0] & other for other in values[1:])


def extract_final_answer(text: str) -> str:
    r"""Return the final answer of a text; "" if it gives none.

    It follows the last ####, or is in the last \boxed{}, or follows the last "the answer is"
    (in seven languages).
    """
    if "####" in text:
        return text.rpartition("####")[2].strip().partition("\n")[0].strip(" *`")
    boxes = [m.end() for m in BOXED_ANSWER.finditer(text)]
    if boxes:
        depth = 1
        for k in range(boxes[-1], len(text)):
            depth += {"{": 1, "}": -1}.get(text[k], 0)
            if not depth:
                return text[boxes[-1] : k].strip()
        return ""
    ends = [m.end() for m in ANSWER_PHRASE.finditer(text)]
    return text[ends[-1] :].partition("\n")[0].strip(" *`") if ends else ""


# --- numbers ---


def _number_item(
    row: BenchmarkRow, name: str, language: str, question: str, reference: str
) -> TaskItem:
    if len(possible_values(reference, "en")) != 1:
        raise row.data_error(f"{reference!r} is not a number")
    return benchmark_item(
        name,
        row,
        language,
        f"{question}\n\n{ANSWER_INSTRUCTION}",
        f"#### {reference}",
        answer_key=reference,
    )


def gsm8k(source: BenchmarkSource) -> BenchmarkItems:
    """Load word problems whose answer follows ####. The reference is the worked solution without
    <<calculator>> marks.
    """

    def one(row: BenchmarkRow) -> TaskItem:
        question, answer = row.text("question"), row.text("answer")
        steps, mark, number = answer.rpartition("####")
        if not mark:
            raise row.data_error("`answer` has no ####")
        item = _number_item(row, "gsm8k", "en", question, number.strip())
        worked = re.sub(r"<<[^>]*>>", "", steps)
        return TaskItem(item.prompt, f"{worked}#### {number.strip()}", answer_key=item.answer_key)

    return collect_items(map(one, read_benchmark_rows(source, read_json_lines)), source)


def mgsm(source: BenchmarkSource) -> BenchmarkItems:
    """Load translations of GSM8K: question, tab, number."""

    def one(row: BenchmarkRow) -> TaskItem:
        return _number_item(
            row,
            "mgsm",
            source.language,
            row.text("question"),
            str(row.fields.get("answer", row.fields.get("answer_number"))).strip(),
        )

    def local(path: str) -> Iterator[BenchmarkRow]:
        return read_delimited(path, "\t", ("question", "answer"))

    return collect_items(map(one, read_benchmark_rows(source, local)), source)


def svamp(source: BenchmarkSource) -> BenchmarkItems:
    """Load easy word problems: Body, Question, Answer."""

    def one(row: BenchmarkRow) -> TaskItem:
        value = row.value("Answer", (int, float))
        body = row.text("Body").rstrip(".")
        return _number_item(
            row,
            "svamp",
            "en",
            f"{body}. {row.text('Question')}",
            str(int(value)) if value == int(value) else repr(value),
        )

    return collect_items(map(one, read_benchmark_rows(source, read_json_list)), source)


def grade_number(
    item: TaskItem, answer: Message, timeout_s: float = GradingOptions.math_timeout_s
) -> Grade:
    """Grade the final number, in any way its language writes numbers; formulas go to math-verify.

    Args:
        item: The question and its number.
        answer: The model's answer.
        timeout_s: Seconds for one comparison by math-verify.

    Returns:
        The grade.

    Raises:
        TimeoutError: If math-verify is late, so that the answer counts as a grader error and not as
            wrong.
    """
    language, (gold,) = (
        item.prompt.language,
        possible_values(extract_final_answer(item.reference) or item.reference, "en"),
    )
    end = extract_final_answer(answer.text)
    numbers = find_numbers(end) if end else find_numbers(answer.text)[-1:]
    if has_two_numbers(end, language):
        return binary_grade(False, f"two final numbers: {end[:60]}")
    if numbers:
        # After a mark the first number counts (18 dollars for 3 days), unless an equation leads to
        # the last.
        written = numbers[-1] if "=" in end or not end else numbers[0]
        values = possible_values(written, language)
        if gold in values:
            return binary_grade(True, f"final number {written}")
        if re.fullmatch(r"[-+$€£¥฿₫₩\s\d.,'/%]*\D{0,40}", end) and values:
            return binary_grade(False, f"final number {written}")
    if end and len(end) <= MAX_FORMULA_CHARS:
        result = math_verifier().compare(f"${gold}$", f"${end}$", timeout_s)
        if result is Equivalence.TIMEOUT:
            raise TimeoutError(f"math-verify took more than {timeout_s:g} s for {end[:60]!r}")
        if result is not Equivalence.FAILED:
            return binary_grade(result is Equivalence.SAME, f"math-verify: {result}")
    if not numbers:
        return malformed_grade("no number")
    return binary_grade(False, f"final number {numbers[0] if end else numbers[-1]}")


def _number_grader(options: GradingOptions) -> Grader:
    return partial(grade_number, timeout_s=options.math_timeout_s)


# --- words ---


def bbh(source: BenchmarkSource) -> BenchmarkItems:
    """Load one task of BIG-Bench Hard: `input` and `target`, in the list `examples`."""
    task = Path(source.file).stem if not source.config else source.config

    def one(row: BenchmarkRow) -> TaskItem:
        target = row.text("target")
        named = BenchmarkRow(row.location, row.index, {"id": f"{task}-{row.index}"})
        return benchmark_item(
            "bbh",
            named,
            "en",
            f"{row.text('input')}\n\n{ANSWER_INSTRUCTION}",
            f"#### {target}",
            answer_key=target,
        )

    return collect_items(
        map(one, read_benchmark_rows(source, lambda path: read_json_list(path, "examples"))), source
    )


def normalize_words(text: str) -> str:
    """Normalise words: no brackets, no stops, no case. (B) becomes b; 1,234 keeps its comma."""
    text = unicodedata.normalize("NFKC", text).casefold().replace("−", "-")
    return " ".join(re.sub(r"[()\[\]{}\"'`*$]|[.,;:!](?=\s|$)", " ", text).split())


def grade_words(item: TaskItem, answer: Message) -> Grade:
    """Grade the final words by exact match; of an answer such as "(B) 12/25/1937" the letter alone
    counts.
    """
    gold = normalize_words(extract_final_answer(item.reference) or item.reference)
    end = normalize_words(
        extract_final_answer(answer.text) or answer.text.strip().rpartition("\n")[2]
    )
    if not end:
        return malformed_grade("no answer")
    letter = re.fullmatch(r"[a-z]", gold) and re.match(r"(?:option )?([a-z])(?= |$)", end)
    return binary_grade(
        end == gold or bool(letter and letter[1] == gold), f"final words {end[:80]!r}"
    )


BENCHMARKS = (
    Benchmark("gsm8k", "en", gsm8k, grade_number, ("math_verify",), make_grader=_number_grader),
    Benchmark("mgsm", "", mgsm, grade_number, ("math_verify",), make_grader=_number_grader),
    Benchmark("svamp", "en", svamp, grade_number, ("math_verify",), make_grader=_number_grader),
    Benchmark("bbh", "en", bbh, grade_words),
)
