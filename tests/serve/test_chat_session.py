"""Words come as they are said and never half a character; switches and history do what they say; in
a terminal and through a pipe.
"""

from __future__ import annotations

import io
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persea import cli
from persea.chat.messages import (
    Conversation,
    FinishReason,
    Text,
    Thinking,
    ThinkingEffort,
    ToolCall,
)
from persea.chat.renderer import ChatRenderer
from persea.cli.chat import PipeDisplay
from persea.errors import DataError
from persea.models.loading import resolve_model_source
from persea.models.random_init import random_init
from persea.serve import chat_session as talk
from persea.serve.chat_session import ChatSession, load_chat_model, run_chat, sanitize_for_terminal
from persea.serve.streaming import StreamingAnswerParser
from persea.tasks.generated import REASONING_TASK
from persea.tasks.task import Split
from persea.teachers.engines.transformers import TransformersEngine
from persea.teachers.teacher import Teacher
from tests.chat.test_renderer import FRAGMENTS, generated, texts
from tests.cli.test_cli import SAPLINGS, flowed, warm
from tests.conftest import Speaker
from tests.teachers.engines.test_transformers import engine, opened

OSS = str(SAPLINGS / "gpt-oss-sapling")


@dataclass
class Script:
    """A screen that reads given lines and keeps what it is told."""

    lines: list[str]
    thought: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)

    def read_line(self) -> str | None:
        return self.lines.pop(0) if self.lines else None

    def write_delta(self, thinking: str, text: str) -> None:
        self.thought.append(thinking)
        self.said.append(text)

    def end_answer(self, note: str) -> None:
        self.ends.append(note)

    def show_note(self, text: str) -> None:
        self.notes.append(text)


def talked(
    name: str, *lines: str, effort: ThinkingEffort | None = None, most: int = 100, context: int = 0
) -> tuple[Script, ChatSession]:
    speaker = Teacher(name, opened(name)[0], engine(name), max_context_tokens=context)
    one, screen = ChatSession.start(speaker.renderer), Script(list(lines))
    one.effort = effort or one.effort
    run_chat(speaker, one, screen, most)
    return screen, one


def question() -> str:
    return REASONING_TASK.items(Split.TRAIN, 1, 0)[0].prompt.conversation.messages[-1].text


# ---- as it is said
# -------------------------------------------------------------------------------------------------


def heard(
    renderer: ChatRenderer, ids: Sequence[int], effort: ThinkingEffort
) -> tuple[list[str], list[str], FinishReason]:
    one = StreamingAnswerParser(renderer, effort, ())
    pieces = [one.add_token(i) for i in ids]
    rest, _, finish = one.finish()
    thoughts, words = (
        [p.get(key, "") for p in (*pieces, rest)] for key in ("reasoning_content", "content")
    )
    return thoughts, words, finish


@given(
    thought=texts(FRAGMENTS),
    text=texts(FRAGMENTS),
    effort=st.sampled_from([ThinkingEffort.NONE, ThinkingEffort.HIGH]),
)
def test_the_pieces_are_the_answer(tiny: Speaker, thought: str, text: str, effort: ThinkingEffort):
    said = Conversation.from_question("q", effort=effort).with_answer(
        *((Thinking(thought),) if thought else ()), Text(text)
    )
    ids = generated(tiny.renderer.render(said))
    parts, finish = tiny.renderer.parse(ids, effort)
    thoughts, pieces, ended = heard(tiny.renderer, ids, effort)
    assert ended is finish is FinishReason.STOP
    assert (
        "".join(thoughts).strip()
        == "".join(p.text for p in parts if isinstance(p, Thinking)).strip()
    )
    assert "".join(pieces) == "".join(p.text for p in parts if isinstance(p, Text))


@pytest.mark.parametrize("family", ["llama", "qwen", "gpt-oss"])
def test_a_thought_and_a_text_come_before_their_end(tiny_of, family: str):
    renderer = tiny_of(family).renderer
    said = Conversation.from_question("q", effort=ThinkingEffort.HIGH).with_answer(
        Thinking("one two three four"), Text("five six seven")
    )
    thoughts, pieces, _ = heard(renderer, generated(renderer.render(said)), ThinkingEffort.HIGH)
    assert len([p for p in thoughts if p]) > 3
    assert len([p for p in pieces if p]) > 2
    last_thought = max(k for k, p in enumerate(thoughts) if p)
    assert last_thought < min(k for k, p in enumerate(pieces) if p)


def test_half_a_character_waits(tiny_of):
    renderer = tiny_of("llama").renderer
    ids = generated(
        renderer.render(Conversation.from_question("q").with_answer(Text("a မြန် 👩‍👩‍👧 z")))
    )
    assert any(b"\x80" <= (renderer.vocabulary.bytes_W[i] or b"")[:1] < b"\xc0" for i in ids), (
        "no token begins inside a character"
    )
    _, pieces, _ = heard(renderer, ids, ThinkingEffort.NONE)
    assert "".join(pieces) == "a မြန် 👩‍👩‍👧 z"
    assert "\ufffd" not in "".join(pieces)
    assert len([p for p in pieces if p]) > 3


def test_half_a_marker_waits():
    """Where <think> is plain text, neither it nor its end is ever shown, however the model cuts
    them.
    """
    from persea.models.loading import ModelSource, load_renderer

    renderer = load_renderer(ModelSource(str(SAPLINGS / "gemma-sapling"), thinking=True), "student")
    assert "<think>" not in renderer.vocabulary.control_token_ids
    for answer in ("<think>\nso it is\n</think>\n\nHi <b>", "<thinly said"):
        ids = [i for c in answer for i in renderer.vocabulary.encode(c)]
        thoughts, pieces, _ = heard(renderer, [*ids, renderer.stop_ids[0]], ThinkingEffort.HIGH)
        told = "".join(thoughts) + "|" + "".join(pieces)
        assert told == ("so it is|Hi <b>" if "so" in answer else "|<thinly said")


def test_what_could_steer_a_terminal_is_not_shown():
    assert (
        sanitize_for_terminal("a\x1b[2J\x07b\r\n\tç\ud800") == "a\ufffd[2J\ufffdb\ufffd\n\tç\ufffd"
    )


# ---- switches and history
# ------------------------------------------------------------------------------------------


def test_a_question_is_answered_as_the_teacher_answers_it():
    screen, one = talked("gpt-oss-sapling", question(), effort=ThinkingEffort.HIGH)
    speaker = Teacher(
        "t", opened("gpt-oss-sapling")[0], engine("gpt-oss-sapling"), ThinkingEffort.HIGH
    )
    (want,) = speaker.answer([replace(REASONING_TASK.items(Split.TRAIN, 1, 0)[0].prompt)], 100)
    assert "".join(screen.thought) == want.conversation.messages[-1].thinking != ""
    assert "".join(screen.said) == want.text != ""
    assert len([p for p in screen.said if p]) > 1
    assert screen.ends == [""]
    assert one.messages == list(want.conversation.messages)


def test_turns_are_remembered_and_thoughts_are_not_said_again():
    screen, one = talked("qwen-sapling", question(), "And again?", "/history", "/reset", "/history")
    assert [m.role.value for m in one.messages] == []
    told = screen.notes[0].splitlines()
    assert [line.split(":")[0] for line in told] == ["user", "assistant", "user", "assistant"]
    assert told[0] == f"user: {question()}"
    assert screen.notes[1:] == ["new conversation", "no message yet"]
    both = ChatSession.start(opened("qwen-sapling")[0])
    both.messages = list(
        Conversation.from_question("q").with_answer(Thinking("hm"), Text("a")).messages
    )
    assert [m.text for m in both.build_conversation("next").messages] == ["q", "a", "next"]
    prompt = both.renderer.vocabulary.decode_pieces(
        both.renderer.render_prompt(both.build_conversation("next")).ids_T.tolist()
    )
    assert b"hm" not in b"".join(p for p in prompt if isinstance(p, bytes))


@pytest.mark.parametrize(
    ("name", "word", "told", "effort"),
    [
        ("gpt-oss-sapling", "on", "thinking: high", ThinkingEffort.HIGH),
        (
            "gpt-oss-sapling",
            "off",
            "this model has no off; it has low, medium, high",
            ThinkingEffort.LOW,
        ),
        ("gpt-oss-sapling", "MEDIUM", "thinking: medium", ThinkingEffort.MEDIUM),
        ("gpt-oss-sapling", "", "thinking: low", ThinkingEffort.LOW),
        ("qwen-sapling", "off", "thinking: none", ThinkingEffort.NONE),
        (
            "qwen-sapling",
            "low",
            "this model has no low; it has none, high",
            ThinkingEffort.NONE,
        ),
        ("gemma-sapling", "on", "this model has no on; it has none", ThinkingEffort.NONE),
        (
            "qwen-sapling",
            "hard",
            "/think hard? on, off, none, low, medium, high",
            ThinkingEffort.NONE,
        ),
    ],
)
def test_think(name: str, word: str, told: str, effort: ThinkingEffort):
    one = ChatSession.start(opened(name)[0])
    assert one.run_command(f"/think {word}") == told
    assert one.effort is effort
    assert one.build_conversation("x").effort is effort


def test_lang_is_a_system_line():
    one = ChatSession.start(opened("qwen-sapling")[0])
    assert (
        one.run_command("/lang vi")
        == one.run_command("/lang Vietnamese")
        == one.run_command("/lang")
        == "the model is asked to answer in Vietnamese"
    )
    one.messages = list(Conversation.from_question("q").with_answer(Text("a")).messages)
    assert [(m.role.value, m.text) for m in one.build_conversation("x").messages] == [
        ("system", "Answer in Vietnamese."),
        ("user", "q"),
        ("assistant", "a"),
        ("user", "x"),
    ]
    assert "en English" in one.run_command("/lang klingon")
    assert one.language == "vi"
    assert one.run_command("/lang off") == "the model chooses the language of its answers"
    assert [m.role.value for m in one.build_conversation("x").messages] == [
        "user",
        "assistant",
        "user",
    ]
    named = one.run_command("/lang ?").split("? ")[-1].split(", ")
    assert {
        "zh Chinese",
        "vi Vietnamese",
        "id Indonesian",
        "ja Japanese",
        "ko Korean",
        "th Thai",
    } <= set(named)


def test_what_is_no_command_is_told_in_a_line_and_help_names_all():
    one = ChatSession.start(opened("qwen-sapling")[0])
    assert "no command /fly" in one.run_command("/fly me") and "\n" not in one.run_command(
        "/fly me"
    )
    assert [line.split()[0] for line in one.run_command("/help").splitlines()] == list(
        talk.CHAT_COMMAND_HELP
    )
    screen, _ = talked("qwen-sapling", " /help is a word", "", "   ", "/quit", "never read", most=3)
    assert (screen.notes, screen.lines, len(screen.ends)) == ([], ["never read"], 1)


def test_what_cannot_be_said_is_told_and_forgotten():
    screen, one = talked(
        "gpt-oss-sapling", "half a \ud83d", question(), effort=ThinkingEffort.HIGH, most=4
    )
    assert "surrogate" in screen.notes[0]
    assert screen.ends == [
        "cut after 4 tokens; this turn is not in the history"
    ]  # the thought did not end
    assert one.messages == []
    screen, one = talked("gemma-sapling", question(), most=4)
    assert screen.ends == ["cut after 4 tokens"]
    assert one.messages[-1].text == "".join(screen.said) != ""
    screen, one = talked("gemma-sapling", question(), "/reset", context=10)
    assert "10 positions: /reset" in screen.notes[0]
    screen, _ = talked(
        "gemma-sapling",
        question(),
        context=len(
            opened("gemma-sapling")[0].render_prompt(Conversation.from_question(question()))
        )
        + 2,
    )
    assert screen.ends == ["cut after 2 tokens"]


def test_an_answer_that_is_stopped_is_kept_as_far_as_it_came(monkeypatch: pytest.MonkeyPatch):
    stream = TransformersEngine.stream

    def interrupted(*arguments: Any) -> Iterator[int]:
        yield from islice(stream(*arguments), 6)
        raise KeyboardInterrupt

    monkeypatch.setattr(TransformersEngine, "stream", interrupted)
    screen, one = talked("gemma-sapling", question(), question())
    assert screen.ends == ["stopped", "stopped"]
    assert len(one.messages) == 4
    assert one.messages[1].text and one.messages[1].text in "".join(screen.said)


def test_a_call_is_shown_as_it_is_written(monkeypatch: pytest.MonkeyPatch):
    renderer = opened("qwen-sapling")[0]
    if "<tool_call>" not in renderer.vocabulary.control_token_ids:
        pytest.skip("this crop of saplings has no token for calls")
    call = ToolCall("clock", '{"zone": "UTC"}')
    ids = generated(renderer.render(Conversation.from_question("q").with_answer(call)))
    monkeypatch.setattr(TransformersEngine, "stream", lambda *arguments: iter(ids))
    screen, one = talked("qwen-sapling", "q", "/history")
    assert "".join(screen.said) == 'clock({"zone": "UTC"})'
    assert one.messages[-1].calls == (call,)
    assert screen.notes == ['user: q\nassistant: clock({"zone": "UTC"})']


# ---- who is talked to
# ----------------------------------------------------------------------------------------------


def test_a_run_is_its_student_and_a_folder_is_a_model(tmp_path: Path):
    folder, _ = flowed()
    source, today = resolve_model_source(str(folder / "run"), "chat")
    assert (Path(source.model), today.isoformat()) == (
        folder / "run" / "train" / "student",
        "2025-01-01",
    )
    assert resolve_model_source(OSS, "chat")[0].model == OSS
    assert load_chat_model(str(folder / "run")).max_context_tokens == 1024
    (tmp_path / "recipe.yaml").write_text("student: {model: x}\n")
    with pytest.raises(DataError, match=r"no student yet -> train it first"):
        resolve_model_source(str(tmp_path), "chat")
    with pytest.raises(DataError, match="no model folder and no run"):
        resolve_model_source(str(tmp_path / "nowhere"), "chat")


@pytest.mark.parametrize(("terminal", "shown"), [(True, "\ufffd[2Jx"), (False, "\x1b[2Jx")])
def test_a_pipe_whose_other_end_is_a_terminal_steers_it_no_more_than_a_talk_there(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, shown: str
):
    out, err = io.StringIO(), io.StringIO()
    for name, stream in (("stdout", out), ("stderr", err)):
        monkeypatch.setattr(stream, "isatty", lambda: terminal)
        monkeypatch.setattr(f"sys.{name}", stream)
    PipeDisplay().write_delta("\x1b[2Jx", "\x1b[2Jx")
    assert (out.getvalue(), err.getvalue()) == (shown, shown)


def test_a_line_that_is_no_text_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), "utf-8"))
    with pytest.raises(DataError, match="a line is not UTF-8"):
        PipeDisplay().read_line()


# ---- processes of their own
# ----------------------------------------------------------------------------------------


def entered(
    arguments: tuple[str, ...], folder: Path, terminal: str, pipes: tuple[Path, Path, Path] | None
) -> None:
    """Run the command line in a child, on a terminal of its own or with files as streams."""
    os.chdir(folder)
    os.environ |= {"TERM": "xterm-256color", "COLUMNS": "120", "PYTHONIOENCODING": "utf-8"}
    if pipes is None:
        os.setsid()
        streams = (os.open(terminal, os.O_RDWR),) * 3
    else:
        streams = (
            os.open(pipes[0], os.O_RDONLY),
            *(os.open(p, os.O_WRONLY | os.O_CREAT) for p in pipes[1:]),
        )  # type: ignore[assignment]
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.argv = ["persea", *arguments]
    cli.main()


def piped(folder: Path, lines: str, *arguments: str) -> tuple[int | None, str, str]:
    paths = tuple(folder / name for name in ("in", "out", "err"))
    paths[0].write_text(lines)
    process = warm().Process(
        target=entered, args=(("chat", *arguments), folder, "", paths), daemon=True
    )
    process.start()
    process.join(120)
    return process.exitcode, paths[1].read_text(), paths[2].read_text()


class OnTerminal:
    """A persea on a pseudo-terminal."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.mine, theirs = pty.openpty()
        self.process = warm().Process(
            target=entered, args=(arguments, folder, os.ttyname(theirs), None), daemon=True
        )
        self.process.start()
        self.theirs, self.select_examples = theirs, ""

    def until(self, words: str, seconds: float = 60) -> str:
        """What was shown from the last time on, up to these words."""
        end = time.monotonic() + seconds
        while words not in self.select_examples:
            assert time.monotonic() < end, f"never showed {words!r}: {self.select_examples!r}"
            if select.select([self.mine], [], [], 0.1)[0]:
                self.select_examples += os.read(self.mine, 1 << 16).decode(errors="replace")
        before, _, self.select_examples = self.select_examples.partition(words)
        return before + words

    def type(self, text: str) -> None:
        os.write(self.mine, text.encode())

    def press_until(self, words: str) -> None:
        """Press Ctrl-C until it works: readline misses a signal while it draws its prompt."""
        for _ in range(30):
            time.sleep(0.3)
            self.type("\x03")
            with suppress(AssertionError):
                self.until(words, 2)
                return
        raise AssertionError(f"Ctrl-C was not heard: {self.select_examples!r}")

    def end(self) -> int | None:
        self.process.join(60)
        os.close(self.theirs)
        os.close(self.mine)
        return self.process.exitcode


def test_in_a_terminal(tmp_path: Path):
    one = OnTerminal(tmp_path, "chat", OSS, "--think", "high")
    assert "thinking low, medium, high" in one.until("/help lists the commands.")
    one.until("> ")
    one.type(f"{question()}\n")
    shown = one.until("Answer: ")
    assert "\x1b[2m" in shown  # a thought is dim
    one.until("> ")
    one.type("/fly\n")
    one.until("no command /fly")
    one.until("> ")
    one.type("/think low\n")
    one.until("thinking: low")
    one.until("> ")
    one.press_until("/quit or Ctrl-D ends")
    one.until("> ")
    one.type("\x04")
    assert one.end() == 0


def test_ctrl_c_stops_an_answer_and_not_the_talk(tmp_path: Path):
    """Random weights never end by themselves."""
    folder = Path(shutil.copytree(SAPLINGS / "llama-sapling", tmp_path / "random"))
    renderer = opened("llama-sapling")[0]
    model = random_init(
        "llama", len(renderer.vocabulary), {"hidden": 32, "layers": 1, "heads": 2, "seed": 1}
    )
    model.save_pretrained(folder)
    prompt = renderer.render_prompt(Conversation.from_question("Hi")).ids_T
    assert (
        len(
            TransformersEngine(model.eval(), len(renderer.vocabulary)).generate(
                [prompt], renderer.stop_ids, 300
            )[0]
        )
        == 300
    )
    one = OnTerminal(tmp_path, "chat", str(folder), "--max-new-tokens", "900")
    one.until("> ")
    one.type("Hi\n")
    one.until("Hi\r\n")
    one.press_until("(stopped")
    one.until("> ")
    one.type("/history\n")
    one.until("user: Hi")
    one.type("/quit\n")
    assert one.end() == 0


def test_through_a_pipe(tmp_path: Path):
    code, out, err = piped(
        tmp_path, f"/think high\n{question()}\n/nonsense\n/reset\n{question()}\n/quit\nnever\n", OSS
    )
    assert code == 0
    answers = out.splitlines()
    assert len(answers) == 2
    assert answers[0] == answers[1]
    assert answers[0].startswith("Answer: ")
    assert "thinking: high" in err
    assert "no command /nonsense" in err
    assert re.search(r"\d\+\d", err)  # the thought
    assert "Traceback" not in err


def test_a_reader_that_goes_ends_the_talk(tmp_path: Path):
    os.mkfifo(tmp_path / "out")
    reader = os.open(tmp_path / "out", os.O_RDONLY | os.O_NONBLOCK)
    (tmp_path / "in").write_text(f"{question()}\n" * 3)
    process = warm().Process(
        target=entered,
        daemon=True,
        args=(("chat", OSS), tmp_path, "", tuple(tmp_path / n for n in ("in", "out", "err"))),
    )
    process.start()
    until = time.monotonic() + 100
    while not select.select([reader], [], [], 0.1)[0]:
        assert time.monotonic() < until
    os.close(reader)
    process.join(100)
    assert process.exitcode == 0
    assert "Traceback" not in (tmp_path / "err").read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("runs/none",), 3, "no model folder and no run 'runs/none' -> give a run folder"),
        (("./none",), 3, "no model folder './none'"),
        ((".",), 3, "no tokenizer in '.'"),
        ((OSS, "--think", "off"), 2, "--think: this model has no off"),
        ((OSS, "--max-new-tokens", "0"), 2, "persea --help"),
    ],
)
def test_who_cannot_be_talked_to_is_refused_in_a_line(
    tmp_path: Path, arguments: tuple[str, ...], code: int, told: str
):
    ended, out, err = piped(tmp_path, "Hi\n", *arguments)
    assert (ended, out) == (code, "")
    assert told in err
    assert len(err.strip().splitlines()) == 1


def test_the_verb_is_there():
    done = subprocess.run(
        [Path(sys.executable).with_name("persea"), "chat", "--help"],
        capture_output=True,
        text=True,
        env=os.environ,
    )
    assert done.returncode == 0
    assert "Ctrl-D" in done.stdout
