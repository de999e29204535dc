"""Languages: translation by chrF, choices by likelihood per byte, and whether answer and thought are in the language asked in."""

from __future__ import annotations

from collections.abc import Iterator

from persea.chat.messages import Message
from persea.data.language_id import LANGUAGE_NAMES, detect_language, is_same_language
from persea.errors import DataError
from persea.tasks.benchmarks.readers import (
    Benchmark,
    BenchmarkItems,
    BenchmarkRow,
    BenchmarkSource,
    benchmark_item,
    binary_grade,
    collect_items,
    malformed_grade,
    read_benchmark_rows,
    read_json_lines,
    read_text,
)
from persea.tasks.task import Grade, TaskItem, Verdict

MIN_CORRECT_CHRF = 0.5  # chrF from which a translation is labelled right, for people who read examples; scores take the value itself


def read_translation_lines(path: str) -> Iterator[BenchmarkRow]:
    """One text a line, none of them empty."""
    found = read_text(path).removesuffix("\n").split("\n")
    yield from (
        BenchmarkRow(f"{path}:{k + 1}", k, {"text": line})
        for k, line in enumerate(found)
        if line or len(found) > 1
    )


# --- translation ---


def translations(source: BenchmarkSource) -> BenchmarkItems:
    """Lines of a text (file) and of its translation (answers) into `language`."""
    if not source.answers:
        raise DataError(
            "no file of translations",
            where=source.file,
            remedy="add `answers:`, a file with one translation a line",
        )
    asked, told = (
        list(read_translation_lines(source.file)),
        list(read_translation_lines(source.answers)),
    )
    if len(asked) != len(told):
        raise DataError(
            f"{len(asked):,} lines, and {len(told):,} translations",
            where=f"{source.file}, {source.answers}",
            remedy="both files need the same lines, one a sentence",
        )
    name = LANGUAGE_NAMES.get(source.language, source.language)
    return collect_items(
        (
            benchmark_item(
                "translation",
                a,
                source.language,
                f"Translate into {name}. Write the translation only.\n\n{a.text('text')}",
                b.text("text"),
            )
            for a, b in zip(asked, told, strict=True)
        ),
        source,
    )


def grade_translation(item: TaskItem, answer: Message) -> Grade:
    """ChrF (character n-grams up to 6, beta 2) against the one reference, as sacrebleu computes it. In [0, 1]."""
    from sacrebleu.metrics.chrf import CHRF

    text = answer.text.strip()
    if not text:
        return malformed_grade("nothing said")
    value = CHRF().sentence_score(text, [item.reference]).score / 100
    return Grade(
        Verdict.RIGHT if value >= MIN_CORRECT_CHRF else Verdict.WRONG,
        min(1.0, value),
        f"chrF {100 * value:.1f}",
    )


# --- choices ---

XCOPA_CONNECTIVES = {  # language -> what joins the premise to its cause, and to its effect
    "id": ("karena", "maka"),
    "vi": ("bởi vì", "vì vậy"),
    "th": ("เพราะ", "ดังนั้น"),
    "zh": ("因为", "所以"),
    "en": ("because", "so"),
    "it": ("perché", "quindi"),
    "et": ("sest", "seetõttu"),
    "sw": ("kwa sababu", "kwa hiyo"),
    "ta": ("ஏனெனில்", "எனவே"),
    "tr": ("çünkü", "bu yüzden"),
    "ht": ("paske", "donk"),
    "qu": ("imataq", "chaymi"),
}


def xcopa(source: BenchmarkSource) -> BenchmarkItems:
    """A premise, and which of two is its cause or its effect."""
    if source.language not in XCOPA_CONNECTIVES:
        raise DataError(
            f"no link words for {source.language!r}",
            where=source.file,
            remedy=f"one of {', '.join(XCOPA_CONNECTIVES)}",
        )

    def one(row: BenchmarkRow) -> TaskItem:
        label, kind = row.value("label", int), row.text("question")
        if label not in (0, 1) or kind not in ("cause", "effect"):
            raise row.data_error(
                f"`label` {label} is not 0 or 1, or `question` {kind!r} not cause or effect"
            )
        choices = (row.text("choice1"), row.text("choice2"))
        link = XCOPA_CONNECTIVES[source.language][kind == "effect"]
        return benchmark_item(
            "xcopa",
            row,
            source.language,
            f"{row.text('premise').rstrip('.。')} {link} …",
            choices[label],
            choices=choices,
        )

    return collect_items(map(one, read_benchmark_rows(source, read_json_lines)), source)


def jcommonsenseqa(source: BenchmarkSource) -> BenchmarkItems:
    """A question in Japanese and which of five answers it."""

    def one(row: BenchmarkRow) -> TaskItem:
        choices, label = tuple(row.text(f"choice{k}") for k in range(5)), row.value("label", int)
        if not 0 <= label < 5:
            raise row.data_error(f"`label` {label} is none of the five")
        return benchmark_item(
            "jcommonsenseqa", row, "ja", row.text("question"), choices[label], choices=choices
        )

    return collect_items(
        map(one, read_benchmark_rows(source, read_json_lines)), source
    )  # its .json file holds one object a line


def grade_choice(item: TaskItem, answer: Message) -> Grade:
    """The choice that was likeliest per byte is said as it stands: anything else was no choice."""
    if answer.text not in item.choices:
        return malformed_grade("none of the choices")
    return binary_grade(answer.text == item.reference)


# --- fidelity ---


def _fidelity_items(name: str, source: BenchmarkSource) -> BenchmarkItems:
    return collect_items(
        (
            benchmark_item(
                name, row, source.language, row.text("prompt"), answer_key=source.language
            )
            for row in read_benchmark_rows(source, read_json_lines)
        ),
        source,
    )


def grade_answer_language(item: TaskItem, answer: Message) -> Grade:
    """Whether the answer is in the item's language; the thought's language is told beside it."""
    if not answer.text.strip():
        return malformed_grade("nothing said")
    found = detect_language(answer.text)
    thought = (
        f", thought {detect_language(answer.thinking) or 'unknown'}"
        if answer.thinking.strip()
        else ""
    )
    return binary_grade(
        is_same_language(found, item.answer_key), f"answer {found or 'unknown'}{thought}"
    )


def grade_thinking_language(item: TaskItem, answer: Message) -> Grade:
    """Whether the thought is in the item's language. Who does not think is malformed, not wrong: measure it at an effort that thinks."""
    if not answer.thinking.strip():
        return malformed_grade("no thought")
    found = detect_language(answer.thinking)
    return binary_grade(
        is_same_language(found, item.answer_key),
        f"thought {found or 'unknown'}, answer {detect_language(answer.text) or 'unknown'}",
    )


BENCHMARKS = (
    Benchmark("translation", "", translations, grade_translation, ("sacrebleu",)),
    Benchmark("xcopa", "", xcopa, grade_choice),
    Benchmark("jcommonsenseqa", "ja", jcommonsenseqa, grade_choice),
    Benchmark(
        "fidelity", "", lambda source: _fidelity_items("fidelity", source), grade_answer_language
    ),
    Benchmark(
        "fidelity-thought",
        "",
        lambda source: _fidelity_items("fidelity-thought", source),
        grade_thinking_language,
    ),
)
