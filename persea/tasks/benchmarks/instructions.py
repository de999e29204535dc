"""IFEval: one checker for each constraint, named by IFEval's instruction ids.

A prompt with an instruction that has no checker is left out and counted. Parameters of checkers are
keys of the published data.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from persea.chat.messages import Message
from persea.data.language_id import detect_language, is_same_language
from persea.storage import parse_strict_json
from persea.tasks.benchmarks.benchmark import (
    Benchmark,
    BenchmarkItems,
    BenchmarkSource,
    malformed_grade,
)
from persea.tasks.benchmarks.readers import (
    BenchmarkRow,
    benchmark_item,
    collect_items,
    read_benchmark_rows,
    read_json_lines,
)
from persea.tasks.task import Grade, TaskItem, Verdict

ConstraintChecker: TypeAlias = Callable[..., bool]
RELATIONS: Mapping[str, Callable[[int, int], bool]] = {
    "at least": operator.ge,
    "less than": operator.lt,
}
IFEVAL_WORD = re.compile(r"\w+(?:['’-]\w+)*")
COUNTED_WORD = re.compile(r"\w+")  # as lm-eval and IFEval's authors count: "it's" is two
# End of a sentence: a stop before a space, but not the stop of a title, an initial or a number.
SENTENCE_END = re.compile(
    r"(?<!\bMr)(?<!\bMs)(?<!\bDr)(?<!\bSt)(?<!\bvs)(?<!\bMrs)(?<!\be\.g)(?<!\bi\.e)(?<!\b[A-Z])[.!?。！？]+[\"'”’)\]]*(?=\s|$)"
)
# A line of ***, which separates paragraphs.
PARAGRAPH_DIVIDER = re.compile(r"^[ \t]*(?:\*[ \t]*){3,}$", re.MULTILINE)
CONSTRAINED_RESPONSES = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def _satisfies_relation(count: int, relation: str, wanted: int) -> bool:
    return RELATIONS[relation](count, wanted)


def _count_phrase(text: str, word: str) -> int:
    """Count a word or phrase in a text, as a whole and in any case."""
    return len(re.findall(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE))


def no_comma(text: str) -> bool:
    """Check that the text has no comma."""
    return not re.search("[,，、]", text)


def number_words(text: str, relation: str, num_words: int) -> bool:
    """Check the number of words."""
    return _satisfies_relation(len(COUNTED_WORD.findall(text)), relation, num_words)


def number_sentences(text: str, relation: str, num_sentences: int) -> bool:
    """Check the number of sentences."""
    parts = [p for p in SENTENCE_END.split(text) if IFEVAL_WORD.search(p)]
    return _satisfies_relation(len(parts), relation, num_sentences)


def number_paragraphs(text: str, num_paragraphs: int) -> bool:
    """Check the number of parts between lines of ***; only the outermost parts may be empty."""
    parts = PARAGRAPH_DIVIDER.split(text)
    inner = [p for k, p in enumerate(parts) if p.strip() or 0 < k < len(parts) - 1]
    return len(inner) == num_paragraphs and all(p.strip() for p in inner)


def nth_paragraph_first_word(
    text: str, num_paragraphs: int, nth_paragraph: int, first_word: str
) -> bool:
    """Check the number of paragraphs and the first word of one."""
    parts = [p.strip() for p in re.split(r"\n[ \t]*\n", text) if p.strip()]
    if len(parts) != num_paragraphs or nth_paragraph > len(parts):
        return False
    first = IFEVAL_WORD.search(parts[nth_paragraph - 1])
    return first is not None and first.group().casefold() == first_word.casefold()


def keyword_existence(text: str, keywords: list[str]) -> bool:
    """Check that every keyword occurs."""
    return all(_count_phrase(text, k) for k in keywords)


def forbidden_words(text: str, forbidden_words: list[str]) -> bool:
    """Check that no forbidden word occurs."""
    return not any(_count_phrase(text, k) for k in forbidden_words)


def keyword_frequency(text: str, relation: str, keyword: str, frequency: int) -> bool:
    """Check how often a keyword occurs."""
    return _satisfies_relation(_count_phrase(text, keyword.strip()), relation, frequency)


def letter_frequency(text: str, letter: str, let_relation: str, let_frequency: int) -> bool:
    """Check how often a letter occurs."""
    return _satisfies_relation(
        text.casefold().count(letter.casefold()), let_relation, let_frequency
    )


def highlighted_sections(text: str, num_highlights: int) -> bool:
    """Check the number of *highlighted* or **highlighted** sections."""
    found = re.findall(r"\*\*[^\n*]*\w[^\n*]*\*\*|(?<!\*)\*[^\n*]*\w[^\n*]*\*(?!\*)", text)
    return len(found) >= num_highlights


def bullet_lists(text: str, num_bullets: int) -> bool:
    """Check the number of bullet points."""
    return (
        len(re.findall(r"^[ \t]*(?:\*(?!\*)|-(?!-))[ \t]*\S.*$", text, re.MULTILINE)) == num_bullets
    )


def multiple_sections(text: str, section_spliter: str, num_sections: int) -> bool:
    """Check the number of section headings, such as "Section 3", in the prompt's own capitals."""
    heading = rf"(?<!\w){re.escape(section_spliter.strip())}\s?\d+"
    return len(re.findall(heading, text)) >= num_sections


def title(text: str) -> bool:
    """Check that the text has a <<title>>."""
    return bool(re.search(r"<<[^\n<>]*\w[^\n<>]*>>", text))


def json_format(text: str) -> bool:
    """Check that the text is one JSON value, fenced or not. NaN is not JSON."""
    bare = re.sub(r"\A\s*```(?:json)?\s*\n?|\n?\s*```\s*\Z", "", text, flags=re.IGNORECASE).strip()
    try:
        parse_strict_json(bare)
    except (ValueError, RecursionError):
        return False
    return True


def placeholders(text: str, num_placeholders: int) -> bool:
    """Check the number of [placeholders]."""
    return len(re.findall(r"\[[^\[\]\n]+\]", text)) >= num_placeholders


def postscript(text: str, postscript_marker: str) -> bool:
    """Check for the marker behind white space, with any stops and spaces in it, and text after."""
    letters = r"\s?\.?\s?".join(map(re.escape, postscript_marker.strip().replace(".", "").upper()))
    marker = rf"(?:^\W*|(?<=\s)[*_\"'(]*){letters}\b[.:\s]*[^\s.:]"
    return bool(re.search(marker, text, re.IGNORECASE | re.MULTILINE))


def constrained_response(text: str) -> bool:
    """Check that the text holds one of the three allowed answers."""
    return any(c in text for c in CONSTRAINED_RESPONSES)


def two_responses(text: str) -> bool:
    """Check for two different answers separated by ******."""
    parts = [p.strip() for p in re.split(r"\*{6,}", text)]
    parts = [p for k, p in enumerate(parts) if p or 0 < k < len(parts) - 1]
    return len(parts) == 2 and all(parts) and parts[0] != parts[1]


def repeat_prompt(text: str, prompt_to_repeat: str) -> bool:
    """Check that the text begins with the prompt."""
    return text.strip().casefold().startswith(prompt_to_repeat.strip().casefold())


def capital_word_frequency(text: str, capital_frequency: int, capital_relation: str) -> bool:
    """Check the number of words in capitals."""
    return _satisfies_relation(
        sum(w.isupper() for w in IFEVAL_WORD.findall(text)), capital_relation, capital_frequency
    )


def english_capital(text: str) -> bool:
    """Check that the text is English in capitals."""
    return text.isupper() and detect_language(text.lower()) == "en"


def english_lowercase(text: str) -> bool:
    """Check that the text is English in lower case."""
    return text.islower() and detect_language(text) == "en"


def end_checker(text: str, end_phrase: str) -> bool:
    """Check that the text ends with a phrase."""
    return text.strip().strip('"”').casefold().endswith(end_phrase.strip().casefold())


def quotation(text: str) -> bool:
    """Check that the text is in double quotation marks."""
    bare = text.strip()
    return len(bare) > 1 and bare[0] in '"“' and bare[-1] in '"”'


def response_language(text: str, language: str) -> bool:
    """Check the language of the text."""
    return is_same_language(detect_language(text), language)


CONSTRAINT_CHECKERS: Mapping[str, ConstraintChecker] = {
    "punctuation:no_comma": no_comma,
    "length_constraints:number_words": number_words,
    "length_constraints:number_sentences": number_sentences,
    "length_constraints:number_paragraphs": number_paragraphs,
    "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
    "keywords:existence": keyword_existence,
    "keywords:forbidden_words": forbidden_words,
    "keywords:frequency": keyword_frequency,
    "keywords:letter_frequency": letter_frequency,
    "detectable_format:number_highlighted_sections": highlighted_sections,
    "detectable_format:number_bullet_lists": bullet_lists,
    "detectable_format:multiple_sections": multiple_sections,
    "detectable_format:title": title,
    "detectable_format:json_format": json_format,
    "detectable_format:constrained_response": constrained_response,
    "detectable_content:number_placeholders": placeholders,
    "detectable_content:postscript": postscript,
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": repeat_prompt,
    "change_case:capital_word_frequency": capital_word_frequency,
    "change_case:english_capital": english_capital,
    "change_case:english_lowercase": english_lowercase,
    "startend:end_checker": end_checker,
    "startend:quotation": quotation,
    "language:response_language": response_language,
}


def ifeval(source: BenchmarkSource) -> BenchmarkItems:
    """Load prompts with the ids and arguments of their instructions."""

    def one(row: BenchmarkRow) -> TaskItem | str:
        ids, arguments = row.value("instruction_id_list", list), row.value("kwargs", list)
        if not ids or len(ids) != len(arguments) or not all(isinstance(k, dict) for k in arguments):
            raise row.data_error("`instruction_id_list` and `kwargs` have different lengths")
        unknown = [i for i in ids if i not in CONSTRAINT_CHECKERS]
        if unknown:
            return f"no checker for {unknown[0]}"
        # Copies on the hub fill absent arguments with null.
        given = [{k: v for k, v in some.items() if v is not None} for some in arguments]
        for name, some in zip(ids, given, strict=True):
            try:
                CONSTRAINT_CHECKERS[name]("Probe.", **some)
            except (TypeError, KeyError, AttributeError) as error:
                raise row.data_error(
                    f"`kwargs` of {name} do not fit its checker: {error}"
                ) from error
        return benchmark_item(
            "ifeval",
            BenchmarkRow(row.location, row.index, {"id": str(row.fields.get("key", row.index))}),
            "en",
            row.text("prompt"),
            answer_key=json.dumps([*zip(ids, given, strict=True)]),
        )

    return collect_items(map(one, read_benchmark_rows(source, read_json_lines)), source)


def grade_instructions(item: TaskItem, answer: Message) -> Grade:
    """Grade by the share of the instructions that the answer follows; right if it follows all."""
    if not answer.text.strip():
        return malformed_grade("empty answer")
    instructions: list[tuple[str, dict[str, Any]]] = json.loads(item.answer_key)
    missed = [
        name for name, some in instructions if not CONSTRAINT_CHECKERS[name](answer.text, **some)
    ]
    return Grade(
        Verdict.WRONG if missed else Verdict.RIGHT,
        1 - len(missed) / len(instructions),
        f"not followed: {', '.join(missed)}" if missed else "",
    )


BENCHMARKS = (Benchmark("ifeval", "en", ifeval, grade_instructions, grader_version=2),)
