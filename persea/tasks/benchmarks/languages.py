"""Languages: translation by chrF, choices by likelihood per byte, and whether answer and thought are in the language asked in."""

from __future__ import annotations

from collections.abc import Iterator

from persea.chat.messages import Message
from persea.data.language_id import NAMES, same, tongue
from persea.errors import DataError
from persea.tasks.benchmarks.readers import Asked, Published, Row, Source, every, item, json_lines, malformed, read_text, right, rows
from persea.tasks.task import Grade, Item, Verdict

GOOD = 0.5  # chrF from which a translation is labelled right, for people who read examples; scores take the value itself


def lines(path: str) -> Iterator[Row]:
    """One text a line, none of them empty."""
    found = read_text(path).removesuffix("\n").split("\n")
    yield from (Row(f"{path}:{k + 1}", k, {"text": line}) for k, line in enumerate(found) if line or len(found) > 1)


# --- translation ---


def translations(source: Source) -> Asked:
    """Lines of a text (file) and of its translation (answers) into `language`."""
    if not source.answers:
        raise DataError("no file of translations", where=source.file, remedy="add `answers:`, a file with one translation a line")
    asked, told = list(lines(source.file)), list(lines(source.answers))
    if len(asked) != len(told):
        raise DataError(f"{len(asked):,} lines, and {len(told):,} translations", where=f"{source.file}, {source.answers}",
                        remedy="both files need the same lines, one a sentence")
    name = NAMES.get(source.language, source.language)
    return every((item("translation", a, source.language, f"Translate into {name}. Write the translation only.\n\n{a.text('text')}",
                                      b.text("text")) for a, b in zip(asked, told, strict=True)), source)


def grade_translation(item: Item, said: Message) -> Grade:
    """chrF (character n-grams up to 6, beta 2) against the one reference, as sacrebleu computes it. In [0, 1]."""
    from sacrebleu.metrics.chrf import CHRF

    text = said.text.strip()
    if not text:
        return malformed("nothing said")
    value = CHRF().sentence_score(text, [item.reference]).score / 100
    return Grade(Verdict.RIGHT if value >= GOOD else Verdict.WRONG, min(1.0, value), f"chrF {100 * value:.1f}")


# --- choices ---

LINKS = {  # language -> what joins the premise to its cause, and to its effect
    "id": ("karena", "maka"), "vi": ("bởi vì", "vì vậy"), "th": ("เพราะ", "ดังนั้น"), "zh": ("因为", "所以"), "en": ("because", "so"),
    "it": ("perché", "quindi"), "et": ("sest", "seetõttu"), "sw": ("kwa sababu", "kwa hiyo"), "ta": ("ஏனெனில்", "எனவே"), "tr": ("çünkü", "bu yüzden"),
    "ht": ("paske", "donk"), "qu": ("imataq", "chaymi")}


def xcopa(source: Source) -> Asked:
    """A premise, and which of two is its cause or its effect."""
    if source.language not in LINKS:
        raise DataError(f"no link words for {source.language!r}", where=source.file, remedy=f"one of {', '.join(LINKS)}")

    def one(row: Row) -> Item:
        label, kind = row.value("label", int), row.text("question")
        if label not in (0, 1) or kind not in ("cause", "effect"):
            raise row.broken(f"`label` {label} is not 0 or 1, or `question` {kind!r} not cause or effect")
        choices = (row.text("choice1"), row.text("choice2"))
        link = LINKS[source.language][kind == "effect"]
        return item("xcopa", row, source.language, f"{row.text('premise').rstrip('.。')} {link} …", choices[label], choices=choices)

    return every(map(one, rows(source, json_lines)), source)


def jcommonsenseqa(source: Source) -> Asked:
    """A question in Japanese and which of five answers it."""
    def one(row: Row) -> Item:
        choices, label = tuple(row.text(f"choice{k}") for k in range(5)), row.value("label", int)
        if not 0 <= label < 5:
            raise row.broken(f"`label` {label} is none of the five")
        return item("jcommonsenseqa", row, "ja", row.text("question"), choices[label], choices=choices)

    return every(map(one, rows(source, json_lines)), source)  # its .json file holds one object a line


def grade_choice(item: Item, said: Message) -> Grade:
    """The choice that was likeliest per byte is said as it stands: anything else was no choice."""
    if said.text not in item.choices:
        return malformed("none of the choices")
    return right(said.text == item.reference)


# --- fidelity ---


def _prompts(name: str, source: Source) -> Asked:
    return every((item(name, row, source.language, row.text("prompt"), key=source.language) for row in rows(source, json_lines)), source)


def grade_fidelity(item: Item, said: Message) -> Grade:
    """Whether the answer is in the item's language; the thought's language is told beside it."""
    if not said.text.strip():
        return malformed("nothing said")
    found = tongue(said.text)
    thought = f", thought {tongue(said.thinking) or 'unknown'}" if said.thinking.strip() else ""
    return right(same(found, item.key), f"answer {found or 'unknown'}{thought}")


def grade_thought(item: Item, said: Message) -> Grade:
    """Whether the thought is in the item's language. Who does not think is malformed, not wrong: measure it at an effort that thinks."""
    if not said.thinking.strip():
        return malformed("no thought")
    found = tongue(said.thinking)
    return right(same(found, item.key), f"thought {found or 'unknown'}, answer {tongue(said.text) or 'unknown'}")


SETS = (
    Published("translation", "", translations, grade_translation, ("sacrebleu",)),
    Published("xcopa", "", xcopa, grade_choice),
    Published("jcommonsenseqa", "ja", jcommonsenseqa, grade_choice),
    Published("fidelity", "", lambda source: _prompts("fidelity", source), grade_fidelity),
    Published("fidelity-thought", "", lambda source: _prompts("fidelity-thought", source), grade_thought),
)
