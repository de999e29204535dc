"""Instructions: IFEval's constraints, each checked by what the words say. An instruction nobody can check leaves its question out, counted."""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from persea.chat.messages import Message
from persea.data.language_id import same, tongue
from persea.tasks.benchmarks.readers import Asked, Published, Row, Source, every, item, json_lines, malformed, rows
from persea.tasks.task import Grade, Item, Verdict

Check: TypeAlias = Callable[..., bool]
RELATIONS: Mapping[str, Callable[[int, int], bool]] = {"at least": operator.ge, "less than": operator.lt}
WORD = re.compile(r"\w+(?:['’-]\w+)*")
# An end of a sentence: a stop and a space behind it, not the stop of a title, an initial or a number.
SENTENCE = re.compile(r"(?<!\bMr)(?<!\bMs)(?<!\bDr)(?<!\bSt)(?<!\bvs)(?<!\bMrs)(?<!\be\.g)(?<!\bi\.e)(?<!\b[A-Z])[.!?。！？]+[\"'”’)\]]*(?=\s|$)")
RULE = re.compile(r"^[ \t]*(?:\*[ \t]*){3,}$", re.MULTILINE)  # ***, which parts paragraphs
CHOICES = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def _related(count: int, relation: str, wanted: int) -> bool:
    return RELATIONS[relation](count, wanted)


def _has(text: str, word: str) -> int:
    """How often a word or phrase stands in a text, as a whole, whatever its case."""
    return len(re.findall(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE))


def no_comma(text: str) -> bool:
    return not re.search("[,，、]", text)


def number_words(text: str, relation: str, num_words: int) -> bool:
    return _related(len(WORD.findall(text)), relation, num_words)


def number_sentences(text: str, relation: str, num_sentences: int) -> bool:
    parts = [p for p in SENTENCE.split(text) if WORD.search(p)]
    return _related(len(parts), relation, num_sentences)


def number_paragraphs(text: str, num_paragraphs: int) -> bool:
    """Parts between lines of ***; one at either end may be empty, none between."""
    parts = RULE.split(text)
    inner = [p for k, p in enumerate(parts) if p.strip() or 0 < k < len(parts) - 1]
    return len(inner) == num_paragraphs and all(p.strip() for p in inner)


def nth_paragraph_first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    parts = [p.strip() for p in re.split(r"\n[ \t]*\n", text) if p.strip()]
    if len(parts) != num_paragraphs or nth_paragraph > len(parts):
        return False
    first = WORD.search(parts[nth_paragraph - 1])
    return first is not None and first.group().casefold() == first_word.casefold()


def keywords(text: str, keywords: list[str]) -> bool:
    return all(_has(text, k) for k in keywords)


def forbidden_words(text: str, forbidden_words: list[str]) -> bool:
    return not any(_has(text, k) for k in forbidden_words)


def frequency(text: str, relation: str, keyword: str, frequency: int) -> bool:
    return _related(_has(text, keyword.strip()), relation, frequency)


def letter_frequency(text: str, letter: str, let_relation: str, let_frequency: int) -> bool:
    return _related(text.casefold().count(letter.casefold()), let_relation, let_frequency)


def highlighted(text: str, num_highlights: int) -> bool:
    """*so* or **so**, with words between."""
    found = re.findall(r"\*\*[^\n*]*\w[^\n*]*\*\*|(?<!\*)\*[^\n*]*\w[^\n*]*\*(?!\*)", text)
    return len(found) >= num_highlights


def bullets(text: str, num_bullets: int) -> bool:
    return len(re.findall(r"^[ \t]*(?:\*(?!\*)|-(?!-))[ \t]*\S.*$", text, re.MULTILINE)) == num_bullets


def sections(text: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"(?<!\w){re.escape(section_spliter.strip())}\s?\d+", text, re.IGNORECASE)) >= num_sections


def title(text: str) -> bool:
    return bool(re.search(r"<<[^\n<>]*\w[^\n<>]*>>", text))


def json_format(text: str) -> bool:
    """One JSON value and nothing else, fenced or not. NaN is none."""
    bare = re.sub(r"\A\s*```(?:json)?\s*\n?|\n?\s*```\s*\Z", "", text, flags=re.IGNORECASE).strip()

    def no_constant(name: str) -> None:
        raise ValueError(name)

    try:
        json.loads(bare, parse_constant=no_constant)
    except (ValueError, RecursionError):
        return False
    return True


def placeholders(text: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[[^\[\]\n]+\]", text)) >= num_placeholders


def postscript(text: str, postscript_marker: str) -> bool:
    """A line that begins with the marker, its stops and spaces as one likes, and says something."""
    letters = r"\s?\.?\s?".join(map(re.escape, postscript_marker.strip().replace(".", "").upper()))
    return bool(re.search(rf"^\W*{letters}\b\.?:?\s*\S", text, re.IGNORECASE | re.MULTILINE))


def constrained(text: str) -> bool:
    return any(c in text for c in CHOICES)


def two_responses(text: str) -> bool:
    """Two different answers with ****** between."""
    parts = [p.strip() for p in re.split(r"\*{6,}", text)]
    parts = [p for k, p in enumerate(parts) if p or 0 < k < len(parts) - 1]
    return len(parts) == 2 and all(parts) and parts[0] != parts[1]


def repeat_prompt(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().casefold().startswith(prompt_to_repeat.strip().casefold())


def capital_words(text: str, capital_frequency: int, capital_relation: str) -> bool:
    return _related(sum(w.isupper() for w in WORD.findall(text)), capital_relation, capital_frequency)


def english_capital(text: str) -> bool:
    return text.isupper() and tongue(text.lower()) == "en"


def english_lowercase(text: str) -> bool:
    return text.islower() and tongue(text) == "en"


def end_checker(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"”').casefold().endswith(end_phrase.strip().casefold())


def quotation(text: str) -> bool:
    bare = text.strip()
    return len(bare) > 1 and bare[0] in '"“' and bare[-1] in '"”'


def response_language(text: str, language: str) -> bool:
    return same(tongue(text), language)


CHECKS: Mapping[str, Check] = {
    "punctuation:no_comma": no_comma, "length_constraints:number_words": number_words, "length_constraints:number_sentences": number_sentences,
    "length_constraints:number_paragraphs": number_paragraphs, "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
    "keywords:existence": keywords, "keywords:forbidden_words": forbidden_words, "keywords:frequency": frequency,
    "keywords:letter_frequency": letter_frequency, "detectable_format:number_highlighted_sections": highlighted,
    "detectable_format:number_bullet_lists": bullets, "detectable_format:multiple_sections": sections, "detectable_format:title": title,
    "detectable_format:json_format": json_format, "detectable_format:constrained_response": constrained,
    "detectable_content:number_placeholders": placeholders, "detectable_content:postscript": postscript, "combination:two_responses": two_responses,
    "combination:repeat_prompt": repeat_prompt, "change_case:capital_word_frequency": capital_words, "change_case:english_capital": english_capital,
    "change_case:english_lowercase": english_lowercase, "startend:end_checker": end_checker, "startend:quotation": quotation,
    "language:response_language": response_language}


def ifeval(source: Source) -> Asked:
    """Prompts with the ids and numbers of their instructions."""
    def one(row: Row) -> Item | str:
        ids, numbers = row.value("instruction_id_list", list), row.value("kwargs", list)
        if not ids or len(ids) != len(numbers) or not all(isinstance(k, dict) for k in numbers):
            raise row.broken("`instruction_id_list` and `kwargs` are not of one length")
        unknown = [i for i in ids if i not in CHECKS]
        if unknown:
            return f"no checker for {unknown[0]}"
        given = [{k: v for k, v in some.items() if v is not None} for some in numbers]  # hub copies fill what is not there with null
        for name, some in zip(ids, given, strict=True):
            try:
                CHECKS[name]("Probe.", **some)
            except (TypeError, KeyError, AttributeError) as error:
                raise row.broken(f"`kwargs` of {name} do not fit: {error}") from error
        return item("ifeval", Row(row.where, row.number, {"id": str(row.fields.get("key", row.number))}), "en", row.text("prompt"),
                    key=json.dumps([*zip(ids, given, strict=True)]))

    return every(map(one, rows(source, json_lines)), source)


def grade_instructions(item: Item, said: Message) -> Grade:
    """The share of its instructions that an answer follows; right where it follows all."""
    if not said.text.strip():
        return malformed("nothing said")
    wanted: list[tuple[str, dict[str, Any]]] = json.loads(item.key)
    missed = [name for name, some in wanted if not CHECKS[name](said.text, **some)]
    return Grade(Verdict.WRONG if missed else Verdict.RIGHT, 1 - len(missed) / len(wanted), f"not: {', '.join(missed)}" if missed else "")


SETS = (Published("ifeval", "en", ifeval, grade_instructions),)
