"""Language benchmarks: translation by chrF, choices by likelihood per byte, and the language of
answer and thinking.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from persea.chat.messages import Message
from persea.data.language_id import LANGUAGE_NAMES, detect_language, is_same_language
from persea.errors import DataError
from persea.tasks.benchmarks.benchmark import (
    Benchmark,
    BenchmarkItems,
    BenchmarkSource,
    Grader,
    GradingOptions,
    binary_grade,
    malformed_grade,
)
from persea.tasks.benchmarks.readers import (
    BenchmarkRow,
    benchmark_item,
    collect_items,
    read_benchmark_rows,
    read_json_lines,
    read_text,
)
from persea.tasks.task import Grade, TaskItem, Verdict


def read_translation_lines(path: str) -> Iterator[BenchmarkRow]:
    """Yield one row for each line, with the field `text`."""
    lines = read_text(path).removesuffix("\n").split("\n")
    yield from (
        BenchmarkRow(f"{path}:{k + 1}", k, {"text": line})
        for k, line in enumerate(lines)
        if line or len(lines) > 1
    )


# --- translation ---


def translations(source: BenchmarkSource) -> BenchmarkItems:
    """Load the lines of a text (`file`) and of its translation (`answers`) into `language`.

    Raises:
        DataError: If there is no file of translations, or it has another number of lines.
    """
    if not source.answers:
        raise DataError(
            "no file of translations",
            where=source.file,
            remedy="add `answers:`, a file with one translation per line",
        )
    sources, targets = (
        list(read_translation_lines(source.file)),
        list(read_translation_lines(source.answers)),
    )
    if len(sources) != len(targets):
        raise DataError(
            f"{len(sources):,} lines, but {len(targets):,} translations",
            where=f"{source.file}, {source.answers}",
            remedy="both files need the same sentences, one per line",
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
            for a, b in zip(sources, targets, strict=True)
        ),
        source,
    )


def grade_translation(
    item: TaskItem, answer: Message, min_correct_chrf: float = GradingOptions.min_correct_chrf
) -> Grade:
    """Grade by chrF against the reference: character n-grams up to 6, beta 2, as sacrebleu computes
    it.

    Args:
        item: The sentence and its translation.
        answer: The model's translation.
        min_correct_chrf: chrF in [0, 1] from which the answer is labelled right, for readers of the
            examples.

    Returns:
        A grade whose value is the chrF in [0, 1].
    """
    from sacrebleu.metrics.chrf import CHRF

    text = answer.text.strip()
    if not text:
        return malformed_grade("empty answer")
    value = CHRF().sentence_score(text, [item.reference]).score / 100
    return Grade(
        Verdict.RIGHT if value >= min_correct_chrf else Verdict.WRONG,
        min(1.0, value),
        f"chrF {100 * value:.1f}",
    )


def _translation_grader(options: GradingOptions) -> Grader:
    return partial(grade_translation, min_correct_chrf=options.min_correct_chrf)


# --- choices ---

XCOPA_CONNECTIVES = {  # language -> words that join the premise to its cause, and to its effect
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
    """Load premises, each with two candidates for its cause or its effect.

    Raises:
        DataError: If the language has no connectives here.
    """
    if source.language not in XCOPA_CONNECTIVES:
        raise DataError(
            f"no connectives for {source.language!r}",
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
    """Load Japanese questions with five choices each."""

    def one(row: BenchmarkRow) -> TaskItem:
        choices, label = tuple(row.text(f"choice{k}") for k in range(5)), row.value("label", int)
        if not 0 <= label < 5:
            raise row.data_error(f"`label` {label} is not 0 to 4")
        return benchmark_item(
            "jcommonsenseqa", row, "ja", row.text("question"), choices[label], choices=choices
        )

    # The published .json file holds one object per line.
    return collect_items(map(one, read_benchmark_rows(source, read_json_lines)), source)


def grade_choice(item: TaskItem, answer: Message) -> Grade:
    """Grade the most likely choice per byte, which the evaluation puts in the answer; any other
    text is malformed.
    """
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
    """Grade whether the answer is in the item's language; the reason also names the language of the
    thinking.
    """
    if not answer.text.strip():
        return malformed_grade("empty answer")
    found = detect_language(answer.text)
    thinking = (
        f", thinking {detect_language(answer.thinking) or 'unknown'}"
        if answer.thinking.strip()
        else ""
    )
    return binary_grade(
        is_same_language(found, item.answer_key), f"answer {found or 'unknown'}{thinking}"
    )


def grade_thinking_language(item: TaskItem, answer: Message) -> Grade:
    """Grade whether the thinking is in the item's language.

    An answer without thinking is malformed and not wrong: measure this at an effort that thinks.
    """
    if not answer.thinking.strip():
        return malformed_grade("no thinking")
    found = detect_language(answer.thinking)
    return binary_grade(
        is_same_language(found, item.answer_key),
        f"thinking {found or 'unknown'}, answer {detect_language(answer.text) or 'unknown'}",
    )


BENCHMARKS = (
    Benchmark(
        "translation",
        "",
        translations,
        grade_translation,
        ("sacrebleu",),
        make_grader=_translation_grader,
    ),
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
