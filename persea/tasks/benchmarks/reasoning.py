"""Reasoning: GSM8K, MGSM, SVAMP by the number at the end; BIG-Bench Hard by the words at the end."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from persea.chat.messages import Message
from persea.tasks.benchmarks.math_verify import Said, verifier
from persea.tasks.benchmarks.number_parsing import found, readings
from persea.tasks.benchmarks.readers import Asked, Published, Row, Source, every, item, json_lines, json_list, malformed, right, rows, table
from persea.tasks.task import Grade, Item

ASK = "Think step by step. End with a line that holds #### and then the answer alone."
BOXED = re.compile(r"\\boxed\s*\{")
SAYS = re.compile(r"(?:the (?:final )?answer is|final answer|answer|jawaban(?:nya)?(?: adalah)?|đáp (?:án|số)(?: là)?|câu trả lời(?: là)?|"
                  r"答案是?|答え(?:は)?|คำตอบ(?:คือ)?|답(?:은|변은)?)\s*[:：]?\s*\**\s*", re.IGNORECASE)


def final(text: str) -> str:
    """What an answer gives as its end: behind the last ####, in the last \\boxed{}, behind the last "the answer is"; "" where it says none."""
    if "####" in text:
        return text.rpartition("####")[2].strip().partition("\n")[0].strip(" *`")
    boxes = [m.end() for m in BOXED.finditer(text)]
    if boxes:
        depth = 1
        for k in range(boxes[-1], len(text)):
            depth += {"{": 1, "}": -1}.get(text[k], 0)
            if not depth:
                return text[boxes[-1]:k].strip()
        return ""
    ends = [m.end() for m in SAYS.finditer(text)]
    return text[ends[-1]:].partition("\n")[0].strip(" *`") if ends else ""


# --- numbers ---


def _number(row: Row, name: str, language: str, question: str, reference: str) -> Item:
    if len(readings(reference, "en")) != 1:
        raise row.broken(f"{reference!r} is no number")
    return item(name, row, language, f"{question}\n\n{ASK}", f"#### {reference}", key=reference)


def gsm8k(source: Source) -> Asked:
    """Word problems; the answer stands behind ####. The worked steps are the reference, without their <<calculator>> marks."""
    def one(row: Row) -> Item:
        question, answer = row.text("question"), row.text("answer")
        steps, mark, number = answer.rpartition("####")
        if not mark:
            raise row.broken("`answer` has no ####")
        made = _number(row, "gsm8k", "en", question, number.strip())
        worked = re.sub(r"<<[^>]*>>", "", steps)
        return Item(made.prompt, f"{worked}#### {number.strip()}", key=made.key)

    return every(map(one, rows(source, json_lines)), source)


def mgsm(source: Source) -> Asked:
    """GSM8K by translators: question, tab, number."""
    def one(row: Row) -> Item:
        return _number(row, "mgsm", source.language, row.text("question"), str(row.fields.get("answer", row.fields.get("answer_number"))).strip())

    def local(path: str) -> Iterator[Row]:
        return table(path, "\t", ("question", "answer"))

    return every(map(one, rows(source, local)), source)


def svamp(source: Source) -> Asked:
    """Easy word problems: Body, Question, Answer."""
    def one(row: Row) -> Item:
        value = row.value("Answer", (int, float))
        body = row.text("Body").rstrip(".")
        return _number(row, "svamp", "en", f"{body}. {row.text('Question')}", str(int(value)) if value == int(value) else repr(value))

    return every(map(one, rows(source, json_list)), source)


def grade_number(item: Item, said: Message) -> Grade:
    """The number at the answer's end is the reference, in any way its language writes numbers; else math-verify may say so of a formula."""
    language, (gold,) = item.prompt.language, readings(final(item.reference) or item.reference, "en")
    end = final(said.text)
    numbers = found(end) if end else found(said.text)[-1:]
    if numbers:
        # behind a mark the first number counts (18 dollars for 3 days), unless an equation leads to the last
        written = numbers[-1] if "=" in end or not end else numbers[0]
        values = readings(written, language)
        if gold in values:
            return right(True, f"{written} ends it")
        if re.fullmatch(r"[-+$€£¥฿₫₩\s\d.,'/%]*\D{0,40}", end) and values:
            return right(False, f"{written} ends it")
    if end and len(end) <= 1000:
        says = verifier().same(f"${gold}$", f"${end}$")
        if says is not Said.FAILED:
            return right(says is Said.SAME, f"math-verify: {says}")
    return right(False, f"{numbers[0] if end else numbers[-1]} ends it") if numbers else malformed("no number")


# --- words ---


def bbh(source: Source) -> Asked:
    """One task of BIG-Bench Hard: `input` and its `target`, under `examples`."""
    task = Path(source.file).stem if not source.config else source.config

    def one(row: Row) -> Item:
        target = row.text("target")
        named = Row(row.where, row.number, {"id": f"{task}-{row.number}"})
        return item("bbh", named, "en", f"{row.text('input')}\n\n{ASK}", f"#### {target}", key=target)

    return every(map(one, rows(source, lambda path: json_list(path, "examples"))), source)


def plain(text: str) -> str:
    """An answer's words without brackets, stops and case: (B) is b, and 1,234 stays apart from 1234 only by its comma."""
    text = unicodedata.normalize("NFKC", text).casefold().replace("−", "-")
    return " ".join(re.sub(r"[()\[\]{}\"'`*$]|[.,;:!](?=\s|$)", " ", text).split())


def grade_words(item: Item, said: Message) -> Grade:
    """The words at the answer's end are the target; of "(B) 12/25/1937" the letter alone counts, and stands first."""
    gold = plain(final(item.reference) or item.reference)
    end = plain(final(said.text) or said.text.strip().rpartition("\n")[2])
    if not end:
        return malformed("no answer")
    letter = re.fullmatch(r"[a-z]", gold) and re.match(r"(?:option )?([a-z])(?= |$)", end)
    return right(end == gold or bool(letter and letter[1] == gold), f"{end[:80]!r} ends it")


SETS = (
    Published("gsm8k", "en", gsm8k, grade_number, ("math_verify",)),
    Published("mgsm", "", mgsm, grade_number, ("math_verify",)),
    Published("svamp", "en", svamp, grade_number, ("math_verify",)),
    Published("bbh", "en", bbh, grade_words),
)

