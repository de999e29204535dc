"""An unknown model is rendered by its own template exactly as transformers does, or refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)

from persea.chat import families
from persea.chat.families.generic import GENERIC_FAMILY_NAME
from persea.chat.messages import (
    Conversation,
    FinishReason,
    Message,
    Role,
    Text,
    Thinking,
    ThinkingEffort,
    Tool,
    ToolCall,
    ToolResult,
)
from persea.chat.renderer import ChatRenderer
from persea.chat.template_probing import StripRule
from persea.config.recipe import load_recipe
from persea.errors import DataError
from persea.models.identity import model_warnings
from persea.models.loading import ModelSource, load_renderer
from persea.pipeline.run_context import RunContext
from persea.pipeline.stages import run_check
from tests.cli.test_cli import recipe
from tests.conftest import Speaker, _speaker

# What these models' own configurations say: their eos and bos tokens, and further ends of
# generation_config.json.
UNKNOWN: dict[str, dict[str, Any]] = {
    "smollm3": {"bos": None, "eos": "<|im_end|>", "ends": ()},
    "deepseek-v3.1": {"bos": "<｜begin▁of▁sentence｜>", "eos": "<｜end▁of▁sentence｜>", "ends": ()},
    "apertus": {"bos": "<s>", "eos": "<|assistant_end|>", "ends": ()},
    "glm-4.6": {"bos": None, "eos": "<|endoftext|>", "ends": ("<|user|>", "<|observation|>")},
}
OPEN = ("apertus", "glm-4.6")  # whose templates leave the last answer open
SAID = [
    "Hello",
    " two  words ",
    "\n x\n\n",
    "1 + 1 = 2",
    "你好，世界",
    "မင်္ဂလာပါ",
    "👩‍👩‍👧",
    "<b>",
    "\t",
    "x = [1]\n",
]


# Pieces of text as in Llama 3 and Qwen: line breaks stay together.
PRETOKENS = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def folder_of(
    path: Path,
    template: str,
    *,
    bos: str | None,
    eos: str,
    ends: tuple[str, ...] = (),
    controls: tuple[str, ...] = (),
    adds_bos: bool = False,
    config_eos: tuple[str, ...] = (),
    gpt2: bool = False,
) -> Path:
    """Make a tokenizer folder: byte-level BPE with the control tokens that the template writes."""
    looks = re.findall(r"<[|｜][^>{}'\"]{1,40}[|｜]>|</?think>|\[gMASK\]|<sop>", template)
    names = list(dict.fromkeys([t for t in (bos, eos, *ends, *controls, *looks) if t]))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(PRETOKENS), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        if not gpt2
        else pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([template, *SAID], trainer)
    tokenizer.add_tokens(
        [AddedToken(n, special=n != "<｜User｜>", normalized=False) for n in names]
    )  # DeepSeek's is not special
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    special = {"eos_token": eos} | ({"bos_token": bos} if bos else {})
    (path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **special})
    )
    (path / "chat_template.jinja").write_text(template)
    if ends or config_eos:
        ids = [tokenizer.token_to_id(t) for t in (config_eos or (eos, *ends))]
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    return path


@pytest.fixture(scope="module")
def unknown_of(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Speaker]:
    """Name -> that model's real template on a tiny tokenizer."""
    speakers: dict[str, Speaker] = {}

    def of(name: str) -> Speaker:
        if name not in speakers:
            folder = folder_of(
                tmp_path_factory.mktemp("unknown") / name,
                (data / "templates" / f"{name}.jinja").read_text(),
                **UNKNOWN[name],
            )
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(families, "FAMILIES", ())
                speakers[name] = _speaker(folder, name)
        return speakers[name]

    return of


@pytest.fixture(params=UNKNOWN)
def unknown(request: pytest.FixtureRequest, unknown_of: Callable[[str], Speaker]) -> Speaker:
    return unknown_of(request.param)


def conversations_of() -> list[Conversation]:
    """Each text as question, answer, earlier answer and system text."""
    found = []
    for k, text in enumerate(SAID):
        other = SAID[(k + 3) % len(SAID)]
        found.append(Conversation.from_question(text).with_answer(Text(other)))
        found.append(Conversation.from_question(text, system=other).with_answer(Text(text)))
        more = Conversation.from_question(other).with_answer(Text(text))
        found.append(
            replace(
                more,
                messages=(
                    *more.messages,
                    *Conversation.from_question(text).with_answer(Text(other)).messages,
                ),
            )
        )
    return found


def theirs(speaker: Speaker, conversation: Conversation, generate: bool) -> list[int]:
    messages = [{"role": m.role.value, "content": m.text} for m in conversation.messages]
    ids: list[int] = speaker.tokenizer.apply_chat_template(
        messages,
        add_generation_prompt=generate,
        tokenize=True,
        return_dict=False,
        enable_thinking=False,
    )
    return ids


# ---- templates persea has no file for ------------------------------------------------------------


@pytest.mark.realdata
def test_an_unknown_model_is_rendered_as_transformers_does(unknown: Speaker):
    today = unknown.today()
    for conversation in conversations_of():
        asked = replace(conversation, messages=conversation.messages[:-1])
        assert today.render_prompt(asked).ids_T.tolist() == theirs(unknown, asked, generate=True)
        ids = today.render(conversation).ids_T.tolist()
        if unknown.folder.name not in OPEN:
            assert ids == theirs(unknown, conversation, generate=False)
            continue
        assert ids[:-1] == theirs(unknown, conversation, generate=False)
        onward = replace(
            conversation,
            messages=(*conversation.messages, *Conversation.from_question("and?").messages),
        )
        assert (
            ids == theirs(unknown, onward, generate=False)[: len(ids)]
        )  # what closes it is what the template itself writes next


@pytest.mark.realdata
def test_an_unknown_model_is_parsed_and_learns_its_answer(unknown: Speaker):
    renderer = unknown.renderer
    for conversation in conversations_of():
        tokens, retained = renderer.render(conversation), renderer.family.normalise(conversation)
        learned = np.flatnonzero(tokens.loss_mask_T)
        before = len(
            renderer.render_prompt(replace(conversation, messages=conversation.messages[:-1]))
        )
        assert learned.tolist() == list(range(before, int(learned[-1]) + 1))
        assert tokens.ids_T[learned[-1]] == renderer.stop_ids[0]
        assert not any(i in renderer.stop_ids for i in tokens.ids_T[learned[:-1]])
        assert renderer.parse(tokens.ids_T[learned].tolist(), ThinkingEffort.NONE) == (
            (Text(retained.messages[-1].text),),
            FinishReason.STOP,
        )
        assert renderer.family.normalise(retained) == retained


@pytest.mark.realdata
def test_results_of_probing(unknown_of: Callable[[str], Speaker]):
    found = {name: unknown_of(name).renderer for name in UNKNOWN}
    assert {n: v.family.name for n, v in found.items()} == dict.fromkeys(
        UNKNOWN, GENERIC_FAMILY_NAME
    )
    assert {n: v.family.stop_tokens for n, v in found.items()} == {
        "smollm3": ("<|im_end|>",),
        "deepseek-v3.1": ("<｜end▁of▁sentence｜>",),
        "apertus": ("<|assistant_end|>",),
        "glm-4.6": ("<|user|>", "<|observation|>", "<|endoftext|>"),
    }
    conversation = Conversation(
        (
            Message(Role.SYSTEM, (Text("\n s \n"),)),
            Message(Role.USER, (Text("\n q \n"),)),
            Message(Role.ASSISTANT, (Thinking("t"), Text("\n a \n"))),
        )
    )
    assert {
        n: [p.text for p in v.family.normalise(conversation).parts()] for n, v in found.items()
    } == {
        "smollm3": ["\n s", "\n q \n", "", " a \n"],
        "deepseek-v3.1": ["\n s \n", "\n q \n", "", "\n a \n"],
        "apertus": ["\n s \n", "\n q \n", "", "\n a \n"],
        "glm-4.6": ["\n s \n", "\n q \n", "", "a"],
    }
    for name, renderer in found.items():
        note = model_warnings(ModelSource(str(unknown_of(name).folder)), renderer, "w")
        assert "does not know this family" in note
        assert renderer.family.stop_tokens[0] in note
        assert ("only before the next question" in note) == (name in OPEN)
        assert "\n" not in note


@pytest.mark.realdata
def test_control_tokens_in_a_text_stay_text(unknown: Speaker):
    """This includes DeepSeek's <｜User｜>, which its tokenizer does not declare special."""
    renderer = unknown.renderer
    added = json.loads((unknown.folder / "tokenizer.json").read_text())["added_tokens"]
    names = [t["content"] for t in added if "think" not in t["content"]]
    assert set(names) <= renderer.vocabulary.control_token_ids.keys()
    pieces = Conversation.from_question("x " + " ".join(names)).with_answer(
        Text("y" + "".join(names) + "y")
    )
    plain = Conversation.from_question("x").with_answer(Text("y"))
    controls = [
        [i for i in renderer.render(c).ids_T.tolist() if renderer.vocabulary.bytes_W[i] is None]
        for c in (pieces, plain)
    ]
    assert controls[0] == controls[1]
    tokens = renderer.render(pieces)
    assert (
        renderer.parse(tokens.ids_T[tokens.loss_mask_T].tolist(), ThinkingEffort.NONE)[0]
        == pieces.messages[-1].parts
    )


@pytest.mark.realdata
def test_an_open_answer_needs_a_known_end(data: Path, tmp_path: Path):
    """GLM's turns end with the next role's token; only generation_config.json declares it as an
    end."""
    text = (data / "templates" / "glm-4.6.jinja").read_text()
    folder = folder_of(
        tmp_path / "glm", text, bos=None, eos="<|endoftext|>", controls=("<|user|>",)
    )
    with pytest.raises(
        DataError,
        match=r"ends an answer with no control token; the next question begins with <\|user\|>",
    ) as caught:
        load_renderer(ModelSource(str(folder)), "teachers.0.model")
    assert caught.value.where == "teachers.0.model"
    assert "new_family" in caught.value.remedy


# ---- small templates, each with one habit --------------------------------------------------------

HEAD = "{% for m in messages %}"
TURN = "<|{{ m['role'] }}|>{{ m['content'] }}<|stop|>"
END = "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
ROLES = ("<|user|>", "<|assistant|>", "<|system|>", "<|stop|>")


def small(path: Path, template: str, eos: str = "<|stop|>", **more: Any) -> ModelSource:
    return ModelSource(
        str(
            folder_of(
                path / "small", template, **{"bos": None, "eos": eos, "controls": ROLES} | more
            )
        )
    )


@pytest.mark.parametrize(
    "cut", ["", "trim", "strip(' ')", "lstrip('\\n')", "rstrip()", "strip('\\n ')"]
)
@pytest.mark.parametrize("role", ["user", "assistant", "system"])
def test_strip_rules_are_found_for_each_role(tmp_path: Path, role: str, cut: str):
    content = "m['content']" + ("" if not cut else " | trim" if cut == "trim" else f".{cut}")
    turn = (
        f"<|{{{{ m['role'] }}}}|>{{{{ ({content}) if m['role'] == '{role}' else m['content'] "
        f"}}}}<|stop|>"
    )
    renderer = load_renderer(small(tmp_path, HEAD + turn + END), "w")
    text = " \n \t\u3000x\u3000\t \n "
    want = {
        "": text,
        "trim": "x",
        "strip(' ')": text.strip(" "),
        "lstrip('\\n')": text.lstrip("\n"),
        "rstrip()": text.rstrip(),
        "strip('\\n ')": text.strip(" \n"),
    }[cut]
    conversation = Conversation.from_question(text, system=text).with_answer(Text(text))
    retained = renderer.family.normalise(conversation)
    assert [m.text for m in retained.messages] == [
        want if m.role.value == role else text for m in conversation.messages
    ]
    tokens = renderer.render(conversation)
    assert renderer.parse(tokens.ids_T[tokens.loss_mask_T].tolist(), ThinkingEffort.NONE) == (
        retained.messages[-1].parts,
        FinishReason.STOP,
    )


@pytest.mark.parametrize("where", ["loop.last", "not loop.last"])
def test_earlier_answers_may_be_trimmed_differently(tmp_path: Path, where: str):
    content = f"m['content'] | trim if m['role'] == 'assistant' and {where} else m['content']"
    renderer = load_renderer(
        small(tmp_path, HEAD + f"<|{{{{ m['role'] }}}}|>{{{{ {content} }}}}<|stop|>" + END), "w"
    )
    first = Conversation.from_question(" q ").with_answer(Text(" a "))
    conversation = replace(first, messages=first.messages * 2)
    want = [
        "a" if m.role is Role.ASSISTANT and (k == 3) == (where == "loop.last") else m.text
        for k, m in enumerate(conversation.messages)
    ]
    assert [m.text for m in renderer.family.normalise(conversation).messages] == want
    assert renderer.family.normalise(first).messages[-1].text == want[3]
    tokens = renderer.render(conversation)
    assert renderer.parse(tokens.ids_T[tokens.loss_mask_T].tolist(), ThinkingEffort.NONE) == (
        (Text(want[3]),),
        FinishReason.STOP,
    )


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (
            HEAD
            + TURN
            + "{% endfor %}{% if add_generation_prompt %}<|assistant|>Sure: {% endif %}",
            "does not write an answer where its prompt ends",
        ),
        (
            HEAD + "<|{{ m['role'] }}|>{{ m['content'] | upper }}<|stop|>" + END,
            "rewrites the user's text",
        ),
        (
            HEAD + "<|{{ m['role'] }}|>{{ m['content'] }}{{ m['content'] }}<|stop|>" + END,
            "drops or repeats a question or an answer",
        ),
        (
            HEAD + "{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt "
            "%}assistant: {% endif %}",
            "ends an answer with no control token$",
        ),
        ("{{ raise_exception('no chat') }}", "no chat"),
        (
            HEAD + "{% if m['content'] != m['content'] | trim %}!{% endif %}" + TURN + END,
            "changes with the white space around the user's",
        ),
        (
            HEAD + "<|{{ m['role'] }}|>{{ m['content'].replace(' ', '_') }}<|stop|>" + END,
            "rewrites the user's text",
        ),
        (
            HEAD
            + "<|{{ m['role'] }}|>{{ m['content'] if m['role'] == 'user' else '' }}<|stop|>"
            + END,
            "drops or repeats a question or an answer",
        ),
        (
            # Firefunction: variables that no caller of a chat template sets.
            "{{ 'Functions: ' + functions }}" + HEAD + TURN + END,
            "'functions' is undefined",
        ),
        (
            # Solar Open: thought and answer are two messages, each with the same end.
            HEAD + "<|{{ m.role }}|>{% if m.reasoning %}<think>{{ m.reasoning }}<|stop|>"
            "<|assistant|>{% endif %}{{ m.content }}<|stop|>" + END,
            "ends an answer, between thought and answer",
        ),
    ],
)
def test_templates_generic_cannot_follow_are_refused_when_opened(
    tmp_path: Path, template: str, reason: str
):
    with pytest.raises(DataError) as caught:
        load_renderer(small(tmp_path, template), "teachers.0.model")
    assert re.search(reason, caught.value.message)
    assert "`model: text_only`" in caught.value.remedy
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (
            "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% "
            "endif %}" + HEAD + TURN + END,
            "no system here",
        ),
        (
            HEAD + "{% if m['role'] != 'system' %}" + TURN + "{% endif %}" + END,
            "drops the text",
        ),
    ],
)
def test_a_missing_system_role_is_reported_and_refused(tmp_path: Path, template: str, why: str):
    source = small(tmp_path, template)
    renderer = load_renderer(source, "teachers.0.model")
    assert why in renderer.family.limitations
    assert "takes no system text" in model_warnings(source, renderer, "w")
    renderer.render(Conversation.from_question("Hi").with_answer(Text("Hello")))
    for call in (renderer.render_prompt, lambda c: renderer.render(c.with_answer(Text("Hello")))):
        with pytest.raises(DataError, match="takes no system text") as caught:
            call(Conversation.from_question("Hi", system="Be brief."))
        assert caught.value.where == "teachers.0.model"
        assert "\n" not in str(caught.value)


def test_template_text_around_an_answer_is_in_the_loss_mask_and_removed_by_parse(tmp_path: Path):
    turn = (
        "<|{{ m['role'] }}|>{{ '\n\nSays: ' if m['role'] == 'assistant' }}{{ m['content'] "
        "}}\n<|stop|>"
    )
    renderer = load_renderer(small(tmp_path, HEAD + turn + END), "w")
    for text in ("Hello", "", "Says: ", "\n"):
        tokens = renderer.render(Conversation.from_question("Hi").with_answer(Text(text)))
        learned = tokens.ids_T[tokens.loss_mask_T].tolist()
        assert renderer.vocabulary.decode(learned[:-1]).decode() == f"\n\nSays: {text}\n"
        assert renderer.parse(learned, ThinkingEffort.NONE) == ((Text(text),), FinishReason.STOP)
    assert renderer.parse(
        [*renderer.vocabulary.encode("bare"), renderer.stop_ids[0]], ThinkingEffort.NONE
    ) == ((Text("bare"),), FinishReason.STOP)


def test_an_eos_that_is_not_the_turns_end_is_reported_and_stops_too(tmp_path: Path):
    source = small(tmp_path, HEAD + TURN + END, eos="<|text_end|>")
    renderer = load_renderer(source, "w")
    assert renderer.family.stop_tokens == ("<|stop|>", "<|text_end|>")
    assert "its configuration ends a text with <|text_end|> instead" in renderer.family.limitations
    body = renderer.vocabulary.encode("Hi")
    assert {renderer.parse([*body, i, *body], ThinkingEffort.NONE) for i in renderer.stop_ids} == {
        ((Text("Hi"),), FinishReason.STOP)
    }
    assert renderer.parse(
        [*body, renderer.vocabulary.control_token_ids["<|user|>"], renderer.stop_ids[0]],
        ThinkingEffort.NONE,
    ) == ((), FinishReason.MALFORMED)


def test_generic_is_one_of_the_names_a_recipe_may_use(tiny: Speaker):
    """Forced on a known model, the inferred family renders plain conversations as the model's
    family does."""
    renderer = load_renderer(ModelSource(str(tiny.folder), family=GENERIC_FAMILY_NAME), "w")
    conversation = Conversation.from_question(" Hi\n").with_answer(Text("\n Hello "))
    assert (
        renderer.render(conversation).ids_T.tolist()
        == tiny.renderer.render(conversation).ids_T.tolist()
    )
    assert (
        renderer.render(conversation).loss_mask_T.tolist()
        == tiny.renderer.render(conversation).loss_mask_T.tolist()
    )
    assert renderer.digest != tiny.renderer.digest


def test_a_run_reports_families_and_their_limitations(tmp_path: Path):
    context = RunContext(
        load_recipe(recipe(tmp_path), ["teachers.0.family=generic", "teachers.1.family=gemma"]),
        tmp_path / "run",
    )
    info: list[str] = []
    run_check(context, tmp_path / "check", lambda stage, share, words: info.append(words))
    found = json.loads((tmp_path / "check" / "check.json").read_text())["families"]
    note = found["qwen-sapling"].pop("note")
    assert "does not know this family" in note
    assert found == {
        "qwen-sapling": {"family": "generic", "detected": False},
        "gemma-sapling": {"family": "gemma", "detected": False, "note": ""},
        "gpt-oss-sapling": {"family": "gpt-oss", "detected": True, "note": ""},
        "student": {"family": "llama", "detected": True, "note": ""},
    }
    assert [words for words in info if "(" in words] == [
        "qwen-sapling (generic, see its note in check.json)",
        "gemma-sapling (gemma)",
        "gpt-oss-sapling (gpt-oss)",
    ]
    assert context.models.lineage_parent("qwen-sapling").licence == "apache-2.0"  # its own card's


def test_tools_are_refused_and_not_lost(tmp_path: Path):
    renderer = load_renderer(small(tmp_path, HEAD + TURN + END), "w")
    asked = replace(Conversation.from_question("Hi"), tools=(Tool("clock", "the time", "{}"),))
    call = Conversation.from_question("Hi").with_answer(ToolCall("clock", "{}"))
    result = replace(
        call, messages=(*call.messages, Message(Role.TOOL, (ToolResult("clock", "noon"),)))
    )
    for conversation in (asked, call, result):
        with pytest.raises(DataError, match="tools"):
            renderer.render_prompt(conversation)


# ---- thoughts ------------------------------------------------------------------------------------

THOUGHT = "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
ASSISTANT = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
HABITS = {
    # Ministral 3: thoughts are content parts; there is no switch.
    "content parts": HEAD + "<|{{ m.role }}|>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}"
    "{{ '[THINK]' + p.thinking + '[/THINK]' if p.type == 'thinking' else p.text }}"
    "{% endfor %}{% endif %}<|stop|>" + END,
    # DeepSeek R1: the prompt opens a thought, conversations have none.
    "opened": HEAD
    + TURN
    + "{% endfor %}{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}",
    # Kimi K2 Thinking: an empty thought before each answer.
    "empty": HEAD
    + "<|{{ m.role }}|>{{ '<think></think>' if m.role == 'assistant' }}{{ m.content }}<|stop|>"
    + END,
    # Qwen 3: a switch, and thoughts of the last answer only.
    "switch": HEAD
    + "<|{{ m.role }}|>{% if loop.last and m.role == 'assistant' %}"
    + THOUGHT
    + "{% endif %}{{ m.content }}<|stop|>{% endfor %}"
    + ASSISTANT
    + "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}",
    # Efforts in a system turn; every thought is kept.
    "efforts": "<|system|>Effort: {{ reasoning_effort or 'high' }}<|stop|>"
    + HEAD
    + "<|{{ m.role }}|>{{ '<think>' + m.reasoning + '</think>' if m.reasoning }}"
    "{{ m.content }}<|stop|>" + END,
    # GLM 5.3: an effort that the template does not know is its highest.
    "known efforts": "<|system|>Effort: {{ (reasoning_effort if reasoning_effort in ['low', 'high']"
    " else 'max') | capitalize }}<|stop|>"
    + HEAD
    + "<|{{ m.role }}|>{{ '<think>' + m.reasoning + '</think>' if m.reasoning }}"
    "{{ m.content }}<|stop|>" + END,
    # EXAONE Deep: the prompt opens a thought, and no conversation has one.
    "opened otherwise": HEAD
    + "<|{{ m.role }}|>{{ m.content }}<|stop|>{% endfor %}"
    + ASSISTANT
    + "{{ '<thought>\n' if add_generation_prompt }}",
    # Muse: thought and answer are messages of one turn.
    "messages": HEAD
    + "<|{{ m.role }}|>{% if m.role == 'assistant' %}{% if m.thinking %} to=self<|say|>"
    "{{ m.thinking }}<|eom|><|assistant|>{% endif %} to=user<|say|>{% endif %}{{ m.content }}"
    "<|stop|>" + END,
}
EFFORTS = {
    "content parts": ["high"],
    "opened": ["high"],
    "empty": ["high"],
    "switch": ["none", "high"],
    "efforts": ["low", "medium", "high"],
    "known efforts": ["low", "high"],
    "opened otherwise": ["high"],
    "messages": ["high"],
}
MARKS = (*ROLES, "<|say|>", "<|eom|>", "[THINK]", "[/THINK]", "<think>", "</think>")


def thinking_of(path: Path, habit: str, controls: tuple[str, ...] = MARKS) -> ChatRenderer:
    return load_renderer(small(path, HABITS[habit], controls=controls), "w")


@pytest.mark.parametrize("habit", HABITS)
@pytest.mark.parametrize(
    "controls", [MARKS, (*ROLES, "<|say|>", "<|eom|>")], ids=["tokens", "text"]
)
def test_thoughts_are_rendered_and_parsed(tmp_path: Path, habit: str, controls: tuple[str, ...]):
    """The markers are control tokens, or plain text."""
    renderer = thinking_of(tmp_path, habit, controls)
    assert [e.value for e in renderer.family.efforts] == EFFORTS[habit]
    effort = ThinkingEffort.HIGH
    asked = Conversation.from_question("2 + 3?", effort=effort)
    conversation = asked.with_answer(Thinking("Two and three."), Text("It is 5."))
    tokens, prompt = renderer.render(conversation), renderer.render_prompt(asked)
    assert tokens.ids_T[: len(prompt)].tolist() == prompt.ids_T.tolist()
    answer = tokens.ids_T[tokens.loss_mask_T].tolist()
    assert renderer.parse(answer, effort) == (
        (Thinking("Two and three."), Text("It is 5.")),
        FinishReason.STOP,
    )
    covered = [k for k, s in enumerate(tokens.starts_T) if s >= 0 and tokens.loss_mask_T[k]]
    said = b"".join(renderer.vocabulary.bytes_W[tokens.ids_T[k]] or b"" for k in covered)
    assert said.startswith(b"Two and three") and said.endswith(b"5.")
    for cut in range(len(answer)):  # an answer that is cut off is never an exception
        assert renderer.parse(answer[:cut], effort)[1] is FinishReason.LENGTH
    assert renderer.family.thought_ends
    assert (
        "no tools" in renderer.family.limitations and "thought ends" in renderer.family.limitations
    )


@pytest.mark.parametrize(
    ("habit", "want"),
    [
        ("opened", "<|user|>q<|stop|><|assistant|><think>\nso\n</think>\n\na<|stop|>"),
        ("empty", "<|user|>q<|stop|><|assistant|><think>so</think>a<|stop|>"),
        ("switch", "<|user|>q<|stop|><|assistant|><think>\nso\n</think>\n\na<|stop|>"),
        (
            "messages",
            "<|user|>q<|stop|><|assistant|> to=self<|say|>so<|eom|>"
            "<|assistant|> to=user<|say|>a<|stop|>",
        ),
        ("content parts", "<|user|>q<|stop|><|assistant|>[THINK]so[/THINK]a<|stop|>"),
    ],
)
def test_where_a_thought_goes(tmp_path: Path, habit: str, want: str):
    renderer = thinking_of(tmp_path, habit)
    conversation = Conversation.from_question("q", effort=ThinkingEffort.HIGH)
    ids = renderer.render(conversation.with_answer(Thinking("so"), Text("a"))).ids_T.tolist()
    pieces = renderer.vocabulary.decode_pieces(ids)
    assert "".join(p if isinstance(p, str) else p.decode() for p in pieces) == want


def test_an_answer_at_once_of_a_model_that_always_thinks(tmp_path: Path):
    """Asked at once it thinks nevertheless; its thought is parsed, and counted by the caller."""
    renderer = thinking_of(tmp_path, "opened")
    asked = Conversation.from_question("q")
    assert renderer.render_prompt(asked).ids_T.tolist() == (
        renderer.render_prompt(replace(asked, effort=ThinkingEffort.HIGH)).ids_T.tolist()
    )
    tokens = renderer.render(asked.with_answer(Thinking("so"), Text("a")))
    answer = tokens.ids_T[tokens.loss_mask_T].tolist()
    assert renderer.parse(answer, ThinkingEffort.NONE)[0] == (Thinking("so"), Text("a"))
    plain = renderer.render(asked.with_answer(Text("a")))
    pieces = renderer.vocabulary.decode_pieces(plain.ids_T.tolist())
    assert pieces[-4:] == (b"\n", "</think>", b"\n\na", "<|stop|>")


@pytest.mark.parametrize(("habit", "kept"), [("switch", False), ("efforts", True)])
def test_earlier_thoughts_are_kept_as_the_template_keeps_them(
    tmp_path: Path, habit: str, kept: bool
):
    renderer = thinking_of(tmp_path, habit)
    first = Conversation.from_question("q", effort=ThinkingEffort.HIGH)
    first = first.with_answer(Thinking("so"), Text("a"))
    conversation = replace(first, messages=first.messages * 2)
    thoughts = [m.thinking for m in renderer.family.normalise(conversation).messages]
    assert thoughts == ["", "so" if kept else "", "", "so"]


def test_markers_in_plain_text_are_refused(tmp_path: Path):
    renderer = thinking_of(tmp_path, "content parts", ROLES)
    asked = Conversation.from_question("q", effort=ThinkingEffort.HIGH)
    with pytest.raises(DataError, match="marks a thought"):
        renderer.render(asked.with_answer(Thinking("a [/THINK] b"), Text("a")))
    with pytest.raises(DataError, match="marks a thought"):
        renderer.render(asked.with_answer(Text("[THINK] a")))


def test_a_system_text_can_change_what_is_trimmed(tmp_path: Path):
    """Llama 2 trims system text and question as one."""
    template = (
        "{% set s = '' %}{% set rest = messages %}{% if messages[0].role == 'system' %}"
        "{% set s = '<<SYS>>' + messages[0].content + '<</SYS>>' %}"
        "{% set rest = messages[1:] %}{% endif %}"
        "{% for m in rest %}<|{{ m.role }}|>"
        "{{ ((s if loop.first else '') + m.content) | trim }}<|stop|>" + END
    )
    renderer = load_renderer(small(tmp_path, template), "w")
    texts = {}
    for system in ("", "你好，世界"):
        asked = Conversation.from_question(" two  words ", system=system)
        ids = renderer.render_prompt(asked).ids_T.tolist()
        texts[system] = b"".join(
            p for p in renderer.vocabulary.decode_pieces(ids) if isinstance(p, bytes)
        ).decode()
    assert texts == {"": "two  words", "你好，世界": "<<SYS>>你好，世界<</SYS>> two  words"}


CALLS = (
    "{% if tools %}<|system|>{{ tools | tojson }}<|stop|>{% endif %}"
    + HEAD
    + "<|{{ m.role }}|>{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ '<tool_call>' + {'name': c.function.name, 'arguments': c.function.arguments} | tojson"
    " + '</tool_call>' }}{% endfor %}<|stop|>" + END
)
TOOL = Tool("clock", "the time", "{}")
TOOL_MARKS = (*ROLES, "<|tool|>", "<tool_call>", "</tool_call>")


@pytest.mark.parametrize("controls", [TOOL_MARKS, (*ROLES, "<|tool|>")], ids=["tokens", "text"])
def test_calls_of_a_common_notation_are_found(tmp_path: Path, controls: tuple[str, ...]):
    renderer = load_renderer(small(tmp_path, CALLS, controls=controls), "w")
    assert "no tools" not in renderer.family.limitations
    call = ToolCall("clock", '{"zone": "အာရှ", "n": 7}')
    asked = replace(Conversation.from_question("q"), tools=(TOOL,))
    tokens = renderer.render(asked.with_answer(call))
    answer = tokens.ids_T[tokens.loss_mask_T].tolist()
    assert renderer.parse(answer, ThinkingEffort.NONE, (TOOL,)) == ((call,), FinishReason.STOP)
    result = Message(Role.TOOL, (ToolResult("clock", "noon"),))
    done = Conversation((*asked.with_answer(call).messages, result), tools=(TOOL,))
    ids = renderer.render(done.with_answer(Text("Noon."))).ids_T.tolist()
    assert b"noon" in renderer.vocabulary.decode_pieces(ids)
    tokens = renderer.render(asked.with_answer(Text("So:"), call))
    answer = tokens.ids_T[tokens.loss_mask_T].tolist()
    assert renderer.parse(answer, ThinkingEffort.NONE, (TOOL,))[0] == (Text("So:"), call)


def test_a_call_in_plain_text_is_text_where_calls_have_control_tokens(tmp_path: Path):
    renderer = load_renderer(small(tmp_path, CALLS, controls=TOOL_MARKS), "w")
    text = '<tool_call>{"name": "clock", "arguments": {}}</tool_call>'
    tokens = renderer.render(Conversation.from_question("q").with_answer(Text(text)))
    answer = tokens.ids_T[tokens.loss_mask_T].tolist()
    assert renderer.parse(answer, ThinkingEffort.NONE, (TOOL,))[0] == (Text(text),)


def test_a_template_for_pictures_takes_texts(tmp_path: Path):
    template = (
        HEAD
        + "<|{{ m.role }}|>{% for p in m.content %}{{ '<image>' if p.type == 'image' else p.text }}"
        "{% endfor %}<|stop|>" + END
    )
    renderer = load_renderer(small(tmp_path, template), "w")
    conversation = Conversation.from_question("q").with_answer(Text("a"))
    pieces = renderer.vocabulary.decode_pieces(renderer.render(conversation).ids_T.tolist())
    assert pieces == ("<|user|>", b"q", "<|stop|>", "<|assistant|>", b"a", "<|stop|>")


def test_a_prompt_whose_last_tokens_change_is_refused(tmp_path: Path):
    """GPT-2's tokenizer writes two line breaks as one token, but as two before a word."""
    template = (
        HEAD + TURN + "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n\n{% endif %}"
    )
    template = template.replace("<|{{ m['role'] }}|>", "<|{{ m['role'] }}|>\n\n")
    with pytest.raises(DataError, match="last tokens of the prompt change"):
        load_renderer(small(tmp_path / "gpt2", template, gpt2=True), "w")
    assert load_renderer(small(tmp_path / "llama", template), "w").family.name == "generic"


def test_a_template_that_needs_tools_is_refused(tmp_path: Path):
    template = "{% for t in tools %}{{ t }}{% endfor %}" + HEAD + TURN + END
    with pytest.raises(DataError, match="needs tools") as caught:
        load_renderer(small(tmp_path, template), "w")
    assert "default" in caught.value.remedy


def test_trim():
    assert StripRule("\n", None)("\n x \n") == " x"
    assert StripRule("", "")("\n x \n") == "\n x \n"
