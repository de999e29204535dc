"""Models load from folders without code and pickles, and only with a matching vocabulary."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedModel

from persea.alignment.event_map import build_event_map, event_map_digest
from persea.cache.unit import CachedAnswer
from persea.chat.messages import (
    PINNED_DATE,
    Conversation,
    FinishReason,
    Text,
    ThinkingEffort,
)
from persea.chat.renderer import ChatRenderer
from persea.distributions import SparseDistributions
from persea.errors import DataError
from persea.losses import event_kl_loss
from persea.models.hub import download_snapshot
from persea.models.identity import fingerprint, model_warnings
from persea.models.loading import (
    ModelSource,
    download_model,
    eos_token_ids,
    load_model,
    load_renderer,
    local_folder,
    local_tokenizer_folder,
    resolve_model_source,
)
from persea.models.random_init import random_init
from persea.models.tokenizer_files import copy_tokenizer_files
from persea.teachers.engines.transformers import TransformersEngine
from persea.teachers.teacher import Answer
from persea.training.dataset import DistillDataset, build_dataset
from persea.training.student import StudentModel
from tests.chat.families.test_generic import END, HEAD, ROLES, TURN, folder_of
from tests.conftest import Speaker
from tests.models.conftest import SIZES, configure
from tests.training.test_dataset import one as single

# ---- where ---------------------------------------------------------------------------------------


def test_folders_and_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "file").touch()
    assert local_folder(str(tmp_path), "w") == tmp_path
    assert local_folder("here", "w") == Path("here")
    assert local_folder("./here", "w") == Path("here")
    assert local_folder("Qwen/Qwen3-8B", "w") is None
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_folder("~/here", "w") == tmp_path / "here"


@pytest.mark.parametrize(
    "reference",
    [
        "./none",
        "../none/x",
        "/none",
        "~/none",
        "none",
        "a/b/c",
        "file",
        "",
        "https://huggingface.co/Qwen/Qwen3-8B",
        "x" * 300,
        "/" + "x" * 300,
        "org/a\0b",
        "~no-such-user/x",
        "loop",
    ],
)
def test_a_missing_folder_is_refused_and_not_looked_up(
    reference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    for call in (
        lambda: local_folder(reference, "teachers.a"),
        lambda: load_renderer(ModelSource(reference), "teachers.a"),
        lambda: fingerprint(ModelSource(reference), "teachers.a"),
    ):
        with pytest.raises(DataError, match="no model folder") as caught:
            call()
        assert caught.value.where == "teachers.a"


def test_a_folder_below_home_is_opened(
    copy: Path, llama: tuple[Path, ChatRenderer], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOME", str(copy.parent))
    assert load_renderer(ModelSource("~/copy"), "w").vocabulary.digest == llama[1].vocabulary.digest
    assert load_model(ModelSource("~/copy"), llama[1], "w").config.hidden_size == 32


def test_a_hub_id_that_cannot_be_had_is_refused_in_one_line():
    with pytest.raises(DataError, match="cannot fetch 'nobody/nothing'") as caught:
        load_renderer(ModelSource("nobody/nothing", revision="0" * 40), "teachers.a")
    assert "\n" not in str(caught.value)


# ---- voices --------------------------------------------------------------------------------------


def test_a_renderer_depends_on_its_folder_and_date(tiny: Speaker):
    renderer = load_renderer(ModelSource(str(tiny.folder)), "w")
    assert renderer.digest == tiny.renderer.digest
    assert renderer.template_date == PINNED_DATE
    assert renderer.template_text == (tiny.folder / "chat_template.jinja").read_text()
    assert (
        load_renderer(ModelSource(str(tiny.folder)), "w", template_date=date(2026, 1, 1)).digest
        != renderer.digest
    )
    generic = load_renderer(ModelSource(str(tiny.folder), family="generic"), "w")
    assert generic.family.name == "generic" != renderer.family.name
    assert generic.digest != renderer.digest
    assert (
        load_renderer(ModelSource("random", tokenizer=str(tiny.folder)), "w").digest
        == renderer.digest
    )


def test_a_folder_or_hub_id_alone_is_enough(copy: Path, llama: tuple[Path, ChatRenderer]):
    renderer = load_renderer(str(copy))
    assert renderer.digest == llama[1].digest
    with pytest.raises(DataError, match="none: no model folder"):
        load_renderer("./none")


def test_a_run_folder_is_its_student(copy: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(copy, run / "train" / "student")
    (run / "recipe.yaml").write_text("student: {family: llama}\ntoday: 2026-01-02\n")
    source, template_date = resolve_model_source(str(run), "chat")
    assert source == ModelSource(str(run / "train" / "student"), family="llama")
    assert template_date == date(2026, 1, 2)
    for broken in ("", "[1]"):
        (run / "recipe.yaml").write_text(broken)
        with pytest.raises(DataError, match="recipe of this run is no mapping"):
            resolve_model_source(str(run), "chat")


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="no tokenizer in") as caught:
        load_renderer(ModelSource(str(tmp_path)), "w")
    assert "tokenizer.json" in caught.value.remedy


@pytest.mark.parametrize("content", ["", "{", "{}", '{"model": {}}'])
def test_a_broken_tokenizer_is_refused(copy: Path, content: str):
    (copy / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match="no tokenizer in"):
        load_renderer(ModelSource(str(copy)), "w")


def test_a_model_without_a_chat_template_is_a_text_model(copy: Path):
    template = copy / "chat_template.jinja"
    mine = template.rename(copy / "mine.jinja")
    renderer = load_renderer(ModelSource(str(copy)), "w")
    assert renderer.is_text
    assert renderer.family.efforts == (ThinkingEffort.NONE,)
    named = load_renderer(ModelSource(str(copy), chat_template=str(mine)), "w")
    assert named.family.name == "llama"
    mine.rename(template)
    assert named.digest == load_renderer(ModelSource(str(copy)), "w").digest
    asked_for = load_renderer(ModelSource(str(copy), family="text"), "w")
    assert asked_for.digest == renderer.digest


@pytest.mark.parametrize("family", ["llama", "generic"])
def test_a_family_needs_a_chat_template(copy: Path, family: str):
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match=f"no chat template, which `family: {family}` needs") as e:
        load_renderer(ModelSource(str(copy), family=family), "w")
    assert "chat_template: FILE.jinja" in e.value.remedy


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_a_chat_template_that_cannot_be_read_is_refused(copy: Path, content: bytes | None):
    path = copy / "other.jinja"
    if content:
        path.write_bytes(content)
    with pytest.raises(DataError, match="cannot read the chat template"):
        load_renderer(ModelSource(str(copy), chat_template=str(path)), "w")


def test_of_several_chat_templates_the_default_is_taken(copy: Path):
    before = load_renderer(str(copy))
    (copy / "additional_chat_templates").mkdir()
    (copy / "additional_chat_templates" / "tool_use.jinja").write_text("x")
    renderer = load_renderer(str(copy))
    assert renderer.digest == before.digest
    assert "several chat templates (default, tool_use)" in renderer.family.limitations
    assert "several" not in before.family.limitations


def test_several_chat_templates_without_a_default_are_refused(copy: Path):
    config = json.loads((copy / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": name, "template": "x"} for name in ("tool_use", "rag")]
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match="none called default: rag, tool_use") as caught:
        load_renderer(ModelSource(str(copy)), "w")
    assert "chat_template.jinja" in caught.value.remedy


def test_a_chat_template_that_does_not_compile_is_refused(copy: Path):
    (copy / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(DataError, match="does not compile"):
        load_renderer(ModelSource(str(copy)), "w")


def test_an_unknown_family_is_refused(copy: Path):
    with pytest.raises(DataError, match="unknown family 'falcon'"):
        load_renderer(ModelSource(str(copy), family="falcon"), "w")


# ---- weights -------------------------------------------------------------------------------------


def test_weights_load_as_they_were_saved(llama: tuple[Path, ChatRenderer]):
    folder, renderer = llama
    model = load_model(ModelSource(str(folder)), renderer, "w")
    assert not model.training
    for ours, saved in zip(
        model.parameters(),
        random_init("llama", len(renderer.vocabulary), SIZES).parameters(),
        strict=True,
    ):
        assert torch.equal(ours.cpu(), saved)


def test_too_few_logits_are_refused(copy: Path, llama: tuple[Path, ChatRenderer]):
    renderer = llama[1]
    random_init("llama", len(renderer.vocabulary) - 1, SIZES).save_pretrained(copy)
    with pytest.raises(
        DataError,
        match=f"{len(renderer.vocabulary) - 1} logits for a vocabulary of "
        f"{len(renderer.vocabulary)} tokens",
    ):
        load_model(ModelSource(str(copy)), renderer, "w")
    random_init("llama", len(renderer.vocabulary) + 27, SIZES).save_pretrained(
        copy
    )  # a padded matrix is usual
    assert (
        load_model(ModelSource(str(copy)), renderer, "w").config.vocab_size
        == len(renderer.vocabulary) + 27
    )


def add_control_token(folder: Path, content: str) -> int:
    """Add a control token behind all others; return its id, which is the rows of the weights."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([content])
    tokenizer.save(str(folder / "tokenizer.json"))
    token_id: int = tokenizer.token_to_id(content)
    return token_id


def test_a_placeholder_without_a_row_is_dropped_and_named(
    copy: Path, llama: tuple[Path, ChatRenderer], tmp_path: Path
):
    """As in Gemma 3 270M: one token for pictures more than rows."""
    rows = add_control_token(copy, "<image_soft_token>")
    assert rows == len(llama[1].vocabulary)
    source = ModelSource(str(copy))
    renderer = load_renderer(source, "w")
    assert len(renderer.vocabulary) == rows
    assert (
        "control tokens more than the model has logits; they are left out: <image_soft_token>."
        in (model_warnings(source, renderer, "w"))
    )
    hello = Conversation.from_question("a <image_soft_token> b").with_answer(Text("Hello"))
    tokens = renderer.render(hello)
    assert tokens.ids_T.max() < rows
    assert np.array_equal(tokens.ids_T, llama[1].render(hello).ids_T)
    model = load_model(source, renderer, "w")
    engine = TransformersEngine(model, rows)
    (logprobs_NW,) = engine.compute_logprobs([tokens.ids_T], [tokens.loss_mask_T])
    assert logprobs_NW.shape[1] == rows
    model.save_pretrained(tmp_path / "student")  # as a trained student is saved
    copy_tokenizer_files(copy, tmp_path / "student")
    again = load_renderer(str(tmp_path / "student"))
    assert again.digest == renderer.digest
    assert event_map_digest(again, renderer) == event_map_digest(renderer, renderer)


def test_a_control_token_that_the_template_writes_needs_a_row(copy: Path):
    rows = add_control_token(copy, "<|turn|>")
    template = copy / "chat_template.jinja"
    template.write_text("<|turn|>" + template.read_text())
    with pytest.raises(DataError, match=r"writes <\|turn\|>, which has no row of logits"):
        load_renderer(ModelSource(str(copy), family="llama"), "w")
    configure(copy, config={"vocab_size": rows + 1})
    assert load_renderer(ModelSource(str(copy), family="llama"), "w")


def test_a_stop_token_needs_a_row(copy: Path, llama: tuple[Path, ChatRenderer]):
    rows, stop = len(llama[1].vocabulary), "<|eot_id|>"
    spec = json.loads((copy / "tokenizer.json").read_text())
    for token in spec["added_tokens"]:
        token["id"] = rows if token["content"] == stop else token["id"]
    spec["model"]["vocab"][stop] = rows
    (copy / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(DataError, match=r"writes <\|eot_id\|>, which has no row of logits"):
        load_renderer(ModelSource(str(copy), family="llama"), "w")


def test_pickled_weights_are_refused(copy: Path, llama: tuple[Path, ChatRenderer]):
    (copy / "model.safetensors").unlink()
    torch.save(
        random_init("llama", len(llama[1].vocabulary), SIZES).state_dict(),
        copy / "pytorch_model.bin",
    )
    with pytest.raises(DataError, match=r"no model\.safetensors in"):
        load_model(ModelSource(str(copy)), llama[1], "w")


def test_truncated_weights_are_refused(copy: Path, llama: tuple[Path, ChatRenderer]):
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(DataError, match="is no safetensors file: the file is cut off"):
        load_model(ModelSource(str(copy)), llama[1], "w")


@pytest.mark.parametrize(
    "content", [None, "", "{", "\ud800".encode("utf-8", "surrogatepass"), "3", "[]", "null"]
)
def test_a_missing_or_broken_config_is_refused(
    copy: Path, llama: tuple[Path, ChatRenderer], content: str | bytes | None
):
    (copy / "config.json").unlink()
    if content is not None:
        (copy / "config.json").write_bytes(
            content if isinstance(content, bytes) else content.encode()
        )
    with pytest.raises(DataError, match=r"config\.json|cannot load"):
        load_model(ModelSource(str(copy)), llama[1], "w")


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_folder_with_its_own_code_is_refused_unread(
    copy: Path, llama: tuple[Path, ChatRenderer], file: str
):
    """The code would leave a mark. A known class is beside it, so only persea's own check can
    refuse."""
    mark = copy / "ran"
    (copy / "own.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    config = json.loads((copy / file).read_text())
    config["auto_map"] = {
        "AutoConfig": "own.Config",
        "AutoModelForCausalLM": "own.Model",
        "AutoTokenizer": ["own.Slow", "own.Fast"],
    }
    (copy / file).write_text(json.dumps(config))
    calls = [lambda: load_renderer(ModelSource(str(copy)), "w")]
    if file == "config.json":
        calls.append(lambda: load_model(ModelSource(str(copy)), llama[1], "w"))
    for call in calls:
        with pytest.raises(DataError, match="brings its own code"):
            call()
    assert not mark.exists()


# ---- a model's own configuration -----------------------------------------------------------------


def test_where_a_configuration_names_its_ends(copy: Path):
    source = configure(copy, generation_config={"eos_token_id": [3, 0]}, config={"eos_token_id": 5})
    assert eos_token_ids(source, "w") == (3, 0)
    assert eos_token_ids(configure(copy, generation_config={"eos_token_id": None}), "w") == (5,)
    assert eos_token_ids(configure(copy, generation_config=None), "w") == (5,)
    assert eos_token_ids(configure(copy, config={"eos_token_id": 0}), "w") == (0,)
    config = json.loads((copy / "config.json").read_text())
    del config["eos_token_id"]
    (copy / "config.json").write_text(json.dumps(config | {"text_config": {"eos_token_id": 7}}))
    assert eos_token_ids(source, "w") == (7,)
    assert eos_token_ids(configure(copy, config=None), "w") == ()
    (copy / "generation_config.json").write_text("[")
    with pytest.raises(DataError, match="is not JSON"):
        eos_token_ids(source, "w")


def test_generation_stops_at_the_turns_end_despite_the_configuration(
    copy: Path, llama: tuple[Path, ChatRenderer]
):
    """The model generates the stop token first; its configuration alone would let it continue."""
    renderer = llama[1]
    source = configure(
        copy,
        generation_config={
            "eos_token_id": renderer.vocabulary.control_token_ids["<|begin_of_text|>"],
            "min_new_tokens": 9,
        },
    )
    model = always(
        load_model(source, renderer, "w"), renderer.vocabulary.control_token_ids["<|eot_id|>"]
    )
    (answer,) = TransformersEngine(model, len(renderer.vocabulary)).generate(
        [renderer.render_prompt(Conversation.from_question("Hi")).ids_T], renderer.stop_ids, 20
    )
    assert answer.tolist() == [renderer.vocabulary.control_token_ids["<|eot_id|>"]]


def test_a_student_taught_to_end_its_turns_is_saved_so(
    copy: Path, llama: tuple[Path, ChatRenderer], tmp_path: Path
):
    renderer = llama[1]
    text = renderer.vocabulary.control_token_ids["<|end_of_text|>"]
    for keys, want in (
        ({"eos_token_id": text}, {text, *renderer.stop_ids}),
        (None, set(renderer.stop_ids)),
        ({"eos_token_id": [*renderer.stop_ids, 0]}, {*renderer.stop_ids, 0}),
    ):
        source = configure(copy, generation_config=keys)
        StudentModel(load_model(source, renderer, "w"), renderer, source).save(tmp_path / "student")
        saved = ModelSource(str(tmp_path / "student"))
        assert set(eos_token_ids(saved, "w")) == want
        assert (
            set(np.ravel(load_model(saved, renderer, "w").generation_config.eos_token_id)) == want
        )
        assert model_warnings(saved, renderer, "w") == ""


def always(model: PreTrainedModel, token: int) -> PreTrainedModel:
    """A model that generates one token only."""
    head = torch.nn.Linear(model.config.hidden_size, model.get_output_embeddings().weight.shape[0])
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(
            torch.nn.functional.one_hot(torch.tensor(token), len(head.bias)).float() * 9
        )
    model.set_output_embeddings(head)
    return model


# ---- padded rows ---------------------------------------------------------------------------------


def widened(model: PreTrainedModel, folder: Path, rows: int) -> Path:
    """The same weights in a matrix with more rows, such as 152,064 for 151,665 tokens; the new ones
    are large."""
    wide = random_init("llama", model.config.vocab_size + rows, SIZES)
    state = model.state_dict()
    loud = (
        40
        * state["lm_head.weight"].abs().max()
        * torch.randn((rows, model.config.hidden_size), generator=torch.Generator().manual_seed(5))
    )
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        state[name] = torch.cat([state[name], loud])
    wide.load_state_dict(state)
    wide.save_pretrained(folder)
    return folder


def feed_of(renderer: ChatRenderer, teacher: ChatRenderer) -> DistillDataset:
    """Three answers, of whose tokens the teacher is certain."""
    captures = []
    for k, text in enumerate(("Hello there", "一二三", "x = [1]\n")):
        conversation = Conversation.from_question(f"question {k}").with_answer(Text(text))
        tokens = teacher.render(conversation)
        n = int(tokens.loss_mask_T.sum())
        rows = SparseDistributions(
            np.arange(n + 1, dtype=np.int64),
            tokens.ids_T[tokens.loss_mask_T],
            np.full(n, 0.9, np.float32),
            np.full(n, np.log(0.9), np.float32),
        )
        captures.append(
            CachedAnswer(
                Answer(f"p{k}", "t", "languages", "", conversation, FinishReason.STOP), tokens, rows
            )
        )
    return build_dataset(
        single(captures),
        renderer,
        {"t": build_event_map(teacher, renderer)},
        batch_size=3,
        seed=0,
        max_length=512,
    )


def test_padded_rows_change_no_loss_no_score_and_no_answer(
    llama: tuple[Path, ChatRenderer], tiny_of: Callable[[str], Speaker], tmp_path: Path
):
    folder, renderer = llama
    shutil.copytree(tiny_of("llama").folder, tmp_path / "wide")
    small = load_model(ModelSource(str(folder)), renderer, "w")
    source = ModelSource(str(widened(small, tmp_path / "wide", 271)))
    assert load_renderer(source, "w").digest == renderer.digest
    wide = load_model(source, renderer, "w")
    assert wide.get_output_embeddings().weight.shape[0] == len(renderer.vocabulary) + 271
    batch = feed_of(renderer, tiny_of("qwen").renderer).batch(0)
    losses, grads = [], []
    for model in (small, wide):
        student = StudentModel(model, renderer, source)
        out = event_kl_loss(
            student.logits(batch.ids_BS, batch.mask_BS, batch.row_N, batch.position_N),
            batch.labels_N,
            batch.targets,
            0.8,
        )
        losses.append(float(out.loss.detach()))
        model.zero_grad()
        out.loss.backward()
        grads.append(model.get_input_embeddings().weight.grad)
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert torch.allclose(grads[0], grads[1][: len(renderer.vocabulary)], atol=1e-6)
    assert not grads[1][len(renderer.vocabulary) :].any()
    sequences, learn = (
        [
            row[: int(m.sum())].numpy().astype(np.int32)
            for row, m in zip(batch.ids_BS, batch.mask_BS, strict=True)
        ],
        [],
    )
    for sequence in sequences:
        learn.append(np.arange(len(sequence)) > 3)
    engines = [TransformersEngine(m, len(renderer.vocabulary)) for m in (small, wide)]
    for one, other in zip(*(e.compute_logprobs(sequences, learn) for e in engines), strict=True):
        assert one.shape == other.shape
        assert torch.allclose(one, other, atol=1e-6)
    with torch.inference_mode():  # the trap is set
        assert int(
            wide(input_ids=torch.from_numpy(sequences[0])[None].long()).logits[0, -1].argmax()
        ) >= len(renderer.vocabulary)
    answers = [
        [a.tolist() for a in e.generate([s[:9] for s in sequences], renderer.stop_ids, 6)]
        for e in engines
    ]
    assert answers[0] == answers[1]


# ---- pad == eos ----------------------------------------------------------------------------------


def test_the_stop_is_learned_and_scored_when_it_is_the_padding_too(
    copy: Path, tiny_of: Callable[[str], Speaker]
):
    """Many models pad with their eos; masking the labels of padding ids would unlearn the stop."""
    config = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": "<|eot_id|>"}))
    stop = load_renderer(ModelSource(str(copy)), "w").vocabulary.control_token_ids["<|eot_id|>"]
    source = configure(
        copy,
        config={"pad_token_id": stop, "eos_token_id": stop},
        generation_config={"pad_token_id": stop, "eos_token_id": stop},
    )
    renderer = load_renderer(source, "w")
    assert (
        AutoTokenizer.from_pretrained(copy).pad_token_id
        == AutoTokenizer.from_pretrained(copy).eos_token_id
        == stop
    )  # the trap is set
    batch = feed_of(renderer, tiny_of("qwen").renderer).batch(0)
    assert len({int(m.sum()) for m in batch.mask_BS}) > 1  # some rows are padded
    stops = torch.isin(batch.labels_N, torch.tensor(renderer.stop_ids))
    assert sorted(batch.row_N[stops].tolist()) == [0, 1, 2]
    model = load_model(source, renderer, "w")
    assert model.config.pad_token_id == stop
    student = StudentModel(model, renderer, source)
    taught = []
    for row in range(3):  # alone, at equal weight, and with its gradient on the stop's logit
        logits = student.logits(batch.ids_BS, batch.mask_BS, batch.row_N, batch.position_N)
        logits.retain_grad()
        event_kl_loss(logits, batch.labels_N, batch.targets, 0.8).loss.backward()
        taught.append(float(logits.grad[torch.logical_and(stops, batch.row_N == row), stop]))
    assert all(g < -0.5 / len(batch.labels_N) for g in taught)
    sequences = [
        r[: int(m.sum())].numpy().astype(np.int32)
        for r, m in zip(batch.ids_BS, batch.mask_BS, strict=True)
    ]
    learn = [
        np.isin(np.arange(len(s)), batch.position_N[batch.row_N == k] + 1)
        for k, s in enumerate(sequences)
    ]
    engine = TransformersEngine(model, len(renderer.vocabulary))
    for k, rows in enumerate(engine.compute_logprobs(sequences, learn)):
        with torch.inference_mode():
            alone = torch.log_softmax(
                model(input_ids=torch.from_numpy(sequences[k])[None].long()).logits[0], -1
            )
        assert torch.allclose(rows, alone[np.flatnonzero(learn[k]) - 1], atol=1e-5)
        assert sequences[k][np.flatnonzero(learn[k])[-1]] == stop
    stopping_model = always(model, stop)
    assert [
        a.tolist()
        for a in TransformersEngine(stopping_model, len(renderer.vocabulary)).generate(
            [s[:5] for s in sequences], renderer.stop_ids, 8
        )
    ] == [[stop]] * 3


# ---- BOS -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize(
    ("front", "bos"), [("", 0), ("{{ bos_token }}", 1), ("<s>", 1), ("{{ bos_token }}<s>", 2)]
)
def test_a_rendering_has_the_templates_bos_and_no_other(
    tmp_path: Path, front: str, bos: int, adds: bool
):
    folder = folder_of(
        tmp_path / "bos",
        front + HEAD + TURN + END,
        bos="<s>",
        eos="<|stop|>",
        controls=ROLES,
        adds_bos=adds,
    )
    source = ModelSource(str(folder))
    renderer, tokenizer = load_renderer(source, "w"), AutoTokenizer.from_pretrained(folder)
    start = renderer.vocabulary.control_token_ids["<s>"]
    assert (tokenizer("Hi").input_ids[0] == start) is adds  # the trap is set
    for text in ("Hi", "<s> Hi"):
        for tokens in (
            renderer.render_prompt(Conversation.from_question(text)),
            renderer.render(Conversation.from_question(text).with_answer(Text(text))),
        ):
            assert tokens.ids_T.tolist().count(start) == bos
            assert tokens.ids_T[:bos].tolist() == [start] * bos
    assert renderer.render_prompt(
        Conversation.from_question("Hi")
    ).ids_T.tolist() == tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_dict=False
    )
    note = model_warnings(source, renderer, "w")
    assert (f"puts <s> ({start}) before every text, its chat template does not" in note) == (
        adds and not bos
    )
    assert (f"begins with <s> ({start}) twice" in note) == (bos == 2)


def test_a_hub_model_that_cannot_be_downloaded_has_its_own_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def offline(*names: object, **options: object) -> None:
        raise OSError("We couldn't connect:\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(
        DataError, match=r"cannot fetch 'some/model': We couldn't connect -> fetch it first"
    ):
        load_renderer(ModelSource("some/model"), "teachers.0")


@pytest.fixture
def hub_copy(
    copy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[tuple[ModelSource, Path]]:
    """A hub model as the hub's cache keeps it: a snapshot of links to blobs."""
    monkeypatch.setenv("PERSEA_HOME", str(tmp_path / "home"))
    snapshot = tmp_path / "models--some--model" / "snapshots" / ("1" * 40)
    blobs = snapshot.parent.parent / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in copy.iterdir():
        file.rename(blobs / file.name)
        (snapshot / file.name).symlink_to(blobs / file.name)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **how: str(snapshot))
    download_snapshot.cache_clear()
    yield ModelSource("some/model", revision="1" * 40), snapshot
    download_snapshot.cache_clear()


def test_a_hub_models_tokenizer_is_opened_in_the_child_first(
    hub_copy: tuple[ModelSource, Path],
    llama: tuple[Path, ChatRenderer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The library gets the folder of the commit, after a child has opened the same file."""
    source, snapshot = hub_copy
    opened: list[str] = []
    run = subprocess.run

    def noted(command: list[str], **how: Any) -> Any:
        opened.append(command[3])
        return run(command, **how)

    monkeypatch.setattr(subprocess, "run", noted)
    assert load_renderer(source, "w").digest == llama[1].digest
    assert opened[0] == str(snapshot / "tokenizer.json")


def test_an_endless_tokenizer_of_the_hub_is_refused(hub_copy: tuple[ModelSource, Path]) -> None:
    source, snapshot = hub_copy
    content = json.loads((snapshot / "tokenizer.json").read_text())
    grow = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 16}
    content["normalizer"] = {"type": "Sequence", "normalizers": [grow] * 12}
    (snapshot / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="takes more than"):
        load_renderer(source, "teachers.0")


def test_a_link_out_of_a_hub_snapshot_is_refused(
    hub_copy: tuple[ModelSource, Path], tmp_path: Path
) -> None:
    source, snapshot = hub_copy
    (tmp_path / "outside.json").write_text("{}")
    (snapshot / "vocab.json").symlink_to(tmp_path / "outside.json")
    with pytest.raises(DataError, match="leads out of the model's folder"):
        load_renderer(source, "teachers.0")


def test_a_student_of_a_hub_model_gets_the_tokenizer_of_its_commit(
    hub_copy: tuple[ModelSource, Path], llama: tuple[Path, ChatRenderer], tmp_path: Path
) -> None:
    source, snapshot = hub_copy
    assert local_tokenizer_folder(source, "student") == snapshot
    (tmp_path / "student").mkdir()
    copy_tokenizer_files(snapshot, tmp_path / "student")
    for name in ("tokenizer.json", "chat_template.jinja"):
        written = tmp_path / "student" / name
        assert written.read_bytes() == (llama[0] / name).read_bytes() and not written.is_symlink()


@pytest.mark.parametrize("weights", [False, True])
def test_only_requested_files_of_a_hub_model_are_downloaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, weights: bool
) -> None:
    """Weights are downloaded only on request, and not those that a repository holds a second
    time."""
    asked: dict[str, Any] = {}
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda name, **how: (asked.update(how), str(tmp_path))[1],
    )
    assert download_model(ModelSource("some/model"), "extend", weights) == tmp_path
    names = [
        "config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "model-00001-of-00002.safetensors",
        "consolidated.safetensors",
        "original/model.safetensors",
        "pytorch_model.bin",
        "additional_chat_templates/rag.jinja",
        "original/tokenizer.model",
        "tokenizer.model",
        "tiktoken.model",
        "merges.txt",
        "tokenization_own.py",
        "modeling_own.py",
    ]
    downloaded = list(
        filter_repo_objects(
            names, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
        )
    )
    rest = ["additional_chat_templates/rag.jinja", *names[-5:-1]]
    assert downloaded == names[:3] + names[3:4] * weights + rest
