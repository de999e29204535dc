"""Everything that comes in is kept or accounted for, and nothing that is tested is taught."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persea.chat.messages import Conversation, Message, Role, Text, ThinkingEffort
from persea.data.formats import MAX_LINE_BYTES, read_prompts
from persea.data.prompts import (
    GOLDEN_RATIO_STEP,
    SILVER_RATIO_STEP,
    Corpus,
    MalformedLine,
    Prompt,
    RemovalReason,
    RemovedPrompt,
    assign_efforts,
    build_corpus,
    pick_by_share,
)
from persea.data.tables import PREFIX_BYTES
from persea.errors import DataError


def prompt(text: str, id_: str = "", system: str = "") -> Prompt:
    return Prompt(id_ or text, Conversation.from_question(text, system=system), "skill", "en")


def write(folder: Path, *lines: str | bytes) -> Path:
    path = folder / "prompts.jsonl"
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else x.encode() for x in lines))
    return path


def read(folder: Path, *lines: str | bytes) -> list[Prompt]:
    return list(read_prompts(write(folder, *lines), "skill", "en"))


# --- gather ---

few = st.lists(
    st.sampled_from(
        ["a", "A", " a ", "b", "a b", "a\tb", "B", "c", "é", "e\u0301", "É", "ß", "SS", "", " \n"]
    ),
    max_size=12,
)


@given(sources=st.lists(few, max_size=4), tested=few)
def test_every_input_is_kept_or_removed(sources: list[list[str]], tested: list[str]):
    named = [
        [prompt(t, f"{s}/{k}") for k, t in enumerate(texts)] for s, texts in enumerate(sources)
    ]
    corpus = build_corpus(named, [prompt(t) for t in tested])
    came = [p for source in named for p in source]
    assert Counter(p.id for p in came) == Counter(p.id for p in corpus.prompts) + Counter(
        r.prompt.id for r in corpus.removed
    )
    order = {p.id: k for k, p in enumerate(came)}
    assert [order[p.id] for p in corpus.prompts] == sorted(order[p.id] for p in corpus.prompts)
    assert [order[r.prompt.id] for r in corpus.removed] == sorted(
        order[r.prompt.id] for r in corpus.removed
    )

    def fold(text: str) -> str:  # these few texts: NFC, case and white space by hand
        return " ".join(
            text.replace("e\u0301", "é").replace("É", "é").replace("SS", "ß").lower().split()
        )

    kept = [fold(p.conversation.messages[0].text) for p in corpus.prompts]
    assert len(kept) == len(set(kept))
    assert not set(kept) & {fold(t) for t in tested}
    texts = {p.id: fold(p.conversation.messages[0].text) for p in came}
    for r in corpus.removed:
        text = texts[r.prompt.id]
        assert r.reason is (
            RemovalReason.EMPTY
            if not text
            else RemovalReason.TEST_ITEM
            if text in {fold(t) for t in tested}
            else RemovalReason.DUPLICATE
        )
        assert bool(r.matched_id) is (r.reason is not RemovalReason.EMPTY)
    assert {t for t in texts.values() if t} - {fold(t) for t in tested} == set(kept)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("How are you?", "how  ARE\tyou?\n"),
        ("caf\u00e9", "cafe\u0301"),
        ("STRASSE", "straße"),
        ("a\u3000b", "a b"),
        ("ΣΊΣΥΦΟΣ", "σίσυφος"),
    ],
)
def test_folded_equals_are_the_same_prompt(first: str, second: str):
    one, two = (
        prompt(first, "1"),
        Prompt("2", Conversation((Message(Role.USER, (Text(second),)),)), "skill", "en"),
    )
    assert build_corpus([[one], [two]], []) == Corpus(
        (one,), (RemovedPrompt(two, RemovalReason.DUPLICATE, "1"),)
    )
    assert build_corpus([[one]], [two]) == Corpus(
        (), (RemovedPrompt(one, RemovalReason.TEST_ITEM, "2"),)
    )


def test_different_prompts_stay_different():
    different = [
        prompt("a b"),
        prompt("ab"),
        prompt("a b c"),
        prompt("a", "with a rule", system="Be kind."),
        prompt("a"),
    ]
    assert build_corpus([different], []).prompts == tuple(different)


QUESTION = (
    "A farmer has seventeen sheep and buys four times as many goats; "
    "how many animals stand in the field?"
)


@pytest.mark.parametrize(
    ("text", "answer", "why"),
    [
        (f"Solve this for me, please. {QUESTION} Thank you.", "", RemovalReason.CONTAMINATED),
        ("What do you know of farms?", f"I know this: {QUESTION}", RemovalReason.CONTAMINATED),
        (
            "has seventeen sheep and buys four times as many goats; how many",
            "",
            None,
        ),  # twelve words of it
        (
            "has SEVENTEEN sheep, and buys four times as many goats: how many animals stand",
            "",
            RemovalReason.CONTAMINATED,
        ),
        (QUESTION.upper(), "", RemovalReason.TEST_ITEM),
        (
            "A farmer has seven sheep and buys twice as many goats; "
            "how many animals stand in the field?",
            "",
            None,
        ),
    ],
)
def test_a_prompt_that_holds_a_test_item_is_removed(
    text: str, answer: str, why: RemovalReason | None
):
    one = Prompt("1", Conversation.from_question(text), "skill", "en", answer)
    corpus = build_corpus([[one]], [prompt(QUESTION, "test/7")])
    assert corpus == (
        Corpus((), (RemovedPrompt(one, why, "test/7"),)) if why else Corpus((one,), ())
    )


def test_near_duplicates_are_removed_from_sources_with_a_threshold():
    first, second = prompt(QUESTION, "1"), prompt(QUESTION.replace("A farmer", "The farmer"), "2")
    other = prompt("How many animals are there?", "3")
    assert build_corpus([[first, second, other]], []).removed == ()
    assert build_corpus([[first, second, other]], [], [0.8]) == Corpus(
        (first, other), (RemovedPrompt(second, RemovalReason.NEAR_DUPLICATE, "1"),)
    )
    assert build_corpus([[first], [second, other]], [], [0.8, None]).removed == ()
    assert (
        build_corpus([[first], [second, other]], [], [None, 0.8]).removed == ()
    )  # a generator's questions are no measure
    assert build_corpus([[first], [second]], [], [0.8, 0.8]).removed == (
        RemovedPrompt(second, RemovalReason.NEAR_DUPLICATE, "1"),
    )
    assert build_corpus([[first, second]], [], [1.0]).removed == ()
    assert RemovedPrompt(second, RemovalReason.NEAR_DUPLICATE, "1").to_json() == {
        "id": "2",
        "reason": "near-duplicate",
        "matched_id": "1",
        "skill": "skill",
        "language": "en",
        "conversation": second.conversation.to_json(),
        "answer": "",
    }


# --- read_prompts ---


def test_the_forms_of_a_line(tmp_path: Path):
    lines = [
        {"prompt": "Why?"},
        {"prompt": "e\u0301", "id": 7, "skill": "code", "language": "fr", "answer": "o\u0308"},
        {
            "messages": [
                {"role": "system", "content": "Be kind."},
                {"role": "user", "content": "Hi"},
            ]
        },
        {
            "messages": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello"},
                {"role": "user", "content": "Bye"},
                {"role": "assistant", "content": "o\u0308"},
            ]
        },
    ]
    got = read(
        tmp_path,
        *(json.dumps(line) for line in lines),
        "",
        "  \r",
        json.dumps({"prompt": "last"}) + "\r",
    )
    assert [(p.id, p.skill, p.language, p.answer) for p in got] == [
        ("prompts.jsonl:1", "skill", "en", ""),
        ("7", "code", "fr", "ö"),
        ("prompts.jsonl:3", "skill", "en", ""),
        ("prompts.jsonl:4", "skill", "en", "ö"),
        ("prompts.jsonl:7", "skill", "en", ""),
    ]
    assert [[(m.role.value, m.text) for m in p.conversation.messages] for p in got] == [
        [("user", "Why?")],
        [("user", "é")],
        [("system", "Be kind."), ("user", "Hi")],
        [("user", "Hi"), ("assistant", "Hello"), ("user", "Bye")],
        [("user", "last")],
    ]


@given(
    texts=st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20), max_size=5
    ),
    ascii_=st.booleans(),
)
def test_every_line_comes_out_once(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], ascii_: bool
):
    folder = tmp_path_factory.mktemp("lines")
    got = read(
        folder,
        *(
            json.dumps({"prompt": t, "id": f"{k}"}, ensure_ascii=ascii_)
            for k, t in enumerate(texts)
        ),
    )
    assert [p.id for p in got] == [str(k) for k in range(len(texts))]
    assert [p.conversation for p in got] == [Conversation.from_question(t) for t in texts]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("prompt", "not JSON"),
        (b'{"prompt": "\xff"}', "not JSON"),
        ('{"prompt": "a"} {"prompt": "b"}', "not JSON: Extra data"),
        ('{"prompt": "a"},', "not JSON: Extra data"),
        ('{"prompt": "a",}', "not JSON"),
        ("# a comment", "not JSON"),
        ("// a comment", "not JSON"),
        ('{"prompt": "a"} # a comment', "not JSON: Extra data"),
        ('{"prompt": "cut \\ud83d emoji"}', "surrogates not allowed"),
        ('{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}", "not JSON"),
        ('{"prompt": "a", "id": ' + "9" * 5000 + "}", "not JSON"),
        ("[]", "a row is list"),
        ('"prompt"', "a row is str"),
        ("3", "a row is int"),
        ('{"text": "a"}', "`text` alone"),
        ('{"prompt": null}', "the row has nothing"),
        ('{"prompt": ["a"]}', "the user's turn is list"),
        ('{"prompt": "a", "answer": 3}', "content is int, not a text"),
        ('{"messages": []}', "list of messages is empty"),
        ('{"messages": null}', "the row has nothing"),
        ('{"messages": "Hi"}', "the messages are str"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "no user turn"),
        ('{"messages": [{"role": "system", "content": "a"}]}', "no user turn"),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}]}',
            "a tool result without a call",
        ),
        (
            '{"messages": [{"role": "user", "content": [{"type": "text"}]}]}',
            "a text part of its content has no text",
        ),
        ('{"messages": [{"content": "a"}]}', "message 1: a message has role None"),
        ('{"messages": ["a"]}', "message 1: a message is str"),
    ],
)
def test_a_malformed_line_is_refused_with_its_number(tmp_path: Path, line: Any, reason: str):
    path = write(tmp_path, '{"prompt": "fine"}', "", line, '{"prompt": "fine too"}')
    prompts = read_prompts(path, "skill", "en")
    assert next(prompts).conversation == Conversation.from_question("fine")
    with pytest.raises(DataError, match=reason) as caught:
        next(prompts)
    assert caught.value.where.startswith(f"{path}:3")
    assert caught.value.remedy
    assert len(str(caught.value)) < 1000


def test_lines_that_end_in_a_carriage_return_alone_are_refused(tmp_path: Path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'{"prompt": "a"}\r{"prompt": "b"}\r')
    with pytest.raises(DataError, match="not JSON: Extra data") as caught:
        list(read_prompts(path, "skill", "en"))
    assert caught.value.where == f"{path}:1"


def test_a_line_without_end_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="a line of 16,777,230 bytes"):
        read(tmp_path, b'{"prompt": "' + b"a" * MAX_LINE_BYTES + b'"}')


def test_a_malformed_line_is_quarantined_with_a_callback(tmp_path: Path):
    lines = [
        '{"prompt": "one"}',
        "{",
        b'{"prompt": "\xff"}',
        '{"prompt": "cut \\ud83d emoji"}',
        b'{"prompt": "NUL \x00"}',
        "",
        '{"text": "a"}',
        b'{"prompt": "' + b"a" * MAX_LINE_BYTES + b'"}',
        '{"prompt": "NUL \\u0000 as JSON writes it"}',
    ]
    path, aside = write(tmp_path, *lines), list[MalformedLine]()
    got = list(read_prompts(path, "skill", "en", aside.append))
    assert [p.id for p in got] == ["prompts.jsonl:1", "prompts.jsonl:9"]
    assert [b.location for b in aside] == [f"{path}:{n}" for n in (2, 3, 4, 5, 7, 8)]
    reasons = (
        "not JSON",
        "not JSON",
        "surrogates not allowed",
        "not JSON",
        "`text` alone",
        "16,777,230 bytes",
    )
    for one, reason in zip(aside, reasons, strict=True):
        assert reason in one.reason
    assert [b.num_bytes for b in aside] == [len(lines[n - 1]) for n in (2, 3, 4, 5, 7, 8)]
    assert (aside[1].prefix, len(aside[-1].prefix)) == (
        '{"prompt": "\\xff"}',
        PREFIX_BYTES,
    )
    assert len(got) + len(aside) == sum(1 for line in lines if line)


@given(
    st.dictionaries(st.sampled_from(ThinkingEffort), st.floats(0.01, 1), min_size=1),
    st.integers(0, 5000),
    st.integers(20, 300),
)
def test_effort_shares_hold_in_every_stretch(
    weights: dict[ThinkingEffort, float], begin: int, n: int
):
    modes = {effort: w / sum(weights.values()) for effort, w in weights.items()}
    some = assign_efforts((prompt(str(k)) for k in range(begin + n)), modes)
    counts = Counter(p.effort for p in some[begin:])
    assert counts.keys() <= modes.keys()
    assert all(abs(counts[effort] - share * n) < 4 for effort, share in modes.items())
    assert [p.id for p in some] == [str(k) for k in range(begin + n)]
    assert some == assign_efforts(
        (prompt(str(k)) for k in range(begin + n)), dict(reversed(modes.items()))
    )


def test_without_effort_shares_a_prompt_has_no_effort():
    assert [p.effort for p in assign_efforts([prompt("a"), prompt("b")], {})] == [None, None]


def test_teacher_and_effort_are_independent():
    """With one step for both, each teacher would get one mode alone."""
    halves = [("a", 0.5), ("b", 0.5)]
    pairs = Counter(
        (pick_by_share(halves, k, GOLDEN_RATIO_STEP), pick_by_share(halves, k, SILVER_RATIO_STEP))
        for k in range(400)
    )
    assert len(pairs) == 4
    assert all(abs(count - 100) <= 6 for count in pairs.values())
    assert (
        len(
            {
                (
                    pick_by_share(halves, k, GOLDEN_RATIO_STEP),
                    pick_by_share(halves, k, GOLDEN_RATIO_STEP),
                )
                for k in range(400)
            }
        )
        == 2
    )


def test_a_missing_file_is_refused(tmp_path: Path):
    for path, why in ((tmp_path / "none.jsonl", "no such file"), (tmp_path, "holds no table")):
        with pytest.raises(DataError, match=why) as caught:
            next(read_prompts(path, "skill", "en"))
        assert caught.value.where == str(path)


@pytest.mark.realdata
def test_real_prompts_are_read_and_duplicates_found(data: Path, tmp_path: Path):
    rows = [
        json.loads(line)
        for line in (data / "eval" / "gsm8k.train.jsonl")
        .read_text(encoding="utf-8")
        .splitlines()[:300]
    ]
    path = write(
        tmp_path, *(json.dumps({"prompt": r["question"], "answer": r["answer"]}) for r in rows)
    )
    prompts = list(read_prompts(path, "reasoning", "en"))
    again = [
        Prompt(
            "again " + p.id,
            Conversation.from_question(p.conversation.messages[0].text.upper()),
            p.skill,
            p.language,
        )
        for p in prompts
    ]
    corpus = build_corpus([prompts, again], prompts[:100])
    assert len(prompts) == 300
    assert corpus.prompts == tuple(prompts[100:])
    assert Counter(r.reason for r in corpus.removed) == {
        RemovalReason.TEST_ITEM: 200,
        RemovalReason.DUPLICATE: 200,
    }


def test_null_counts_as_missing(tmp_path: Path) -> None:
    (one,) = read(
        tmp_path, json.dumps({"prompt": "Why?", "id": None, "skill": None, "language": None})
    )
    (other,) = read(tmp_path, json.dumps({"prompt": "Why?"}))
    assert one == other


# --- given answers and documents ---


def test_given_answers_of_one_prompt_are_compared_with_their_prompt() -> None:
    rows = [
        prompt_of(k, "Berita:", answer=f"Harga beras naik {k} persen di pasar kota.")
        for k in range(120)
    ]
    again = prompt_of(120, " BERITA: ", answer=rows[3].answer.upper())
    given = build_corpus([[*rows, again]], [], are_answers_given=True)
    assert len(given.prompts) == 120
    assert [(r.reason, r.matched_id) for r in given.removed] == [(RemovalReason.DUPLICATE, "3")]
    assert given.count_removed() == {"duplicate": 1}
    asked = build_corpus([[*rows, again]], [])
    assert len(asked.prompts) == 1


def test_near_duplicates_of_given_answers_are_compared_with_their_answers() -> None:
    answer = "one two three four five six seven eight nine ten eleven twelve"
    rows = [
        prompt_of(0, "News:", answer=answer),
        prompt_of(1, "News:", answer=answer + " thirteen"),
        prompt_of(2, "News:", answer="nothing of the first is said in this one at all, is it"),
    ]
    corpus = build_corpus([rows], [], [0.7], are_answers_given=True)
    assert [p.id for p in corpus.prompts] == ["0", "2"]
    assert corpus.removed[0].reason is RemovalReason.NEAR_DUPLICATE


def test_documents_are_compared_with_documents_and_held_out_texts() -> None:
    words = "the price of rice in the market of the town rose by seven percent on monday"
    texts = ["a text", "A  TEXT", " \n", words, f"news: {words} said the minister", "2 + 2?"]
    documents = [
        Prompt(str(k), Conversation.from_document(t), "languages", "en")
        for k, t in enumerate(texts)
    ]
    question = prompt_of(9, "a text")
    corpus = build_corpus(
        [[*documents, question]], [prompt_of(10, "2 + 2?")], held_out_texts=[("held", words)]
    )
    assert [p.id for p in corpus.prompts] == ["0", "9"]  # a question is no document
    assert corpus.count_removed() == {
        "duplicate": 1,
        "empty": 1,
        "test item": 2,
        "holds a test item": 1,
    }


def test_an_empty_prompt_with_a_given_answer_stays() -> None:
    rows = [prompt_of(0, "", answer="Once upon a time."), prompt_of(1, "", answer=" ")]
    assert [p.id for p in build_corpus([rows], [], are_answers_given=True).prompts] == ["0"]


def test_malformed_lines_are_counted_with_the_reasons() -> None:
    line = MalformedLine("a.jsonl:1", "not JSON", 3, "{")
    assert Corpus((), (), (line, line)).count_removed() == {"malformed line": 2}


def prompt_of(k: int, text: str, **changes: Any) -> Prompt:
    return Prompt(str(k), Conversation.from_question(text), "languages", "id", **changes)
