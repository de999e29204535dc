"""TransformersEngine equals one-by-one greedy decoding and a plain forward: batches, padding and
caches change nothing.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from persea.chat.messages import Conversation, ThinkingEffort
from persea.chat.renderer import ChatRenderer
from persea.distributions import SparseDistributions, concat_distributions
from persea.distributions.blocks import BlockedLogits
from persea.errors import TeacherError
from persea.models.loading import ModelSource, load_model, load_renderer
from persea.tasks.generated import CODE_TASK, LANGUAGES_TASK, REASONING_TASK
from persea.tasks.task import Split
from persea.teachers.engines import transformers as local
from persea.teachers.engines.transformers import TransformersEngine

torch.set_num_threads(
    1
)  # sums of one thread are always the same: children of these tests have one too
SAPLINGS = Path(__file__).resolve().parents[3] / "saplings"
NAMES = ("qwen-sapling", "gemma-sapling", "gpt-oss-sapling", "llama-sapling")
NEW = 20  # tokens an answer may have here


@functools.cache
def opened(name: str) -> tuple[ChatRenderer, torch.nn.Module]:
    """A sapling, opened once; whoever changes the model copies it first."""
    source = ModelSource(str(SAPLINGS / name))
    renderer = load_renderer(source, name)
    return renderer, load_model(source, renderer, name)


def engine(name: str, batch: int = 64) -> TransformersEngine:
    renderer, model = opened(name)
    return TransformersEngine(model, len(renderer.vocabulary), batch)


def asked(renderer: ChatRenderer, effort: ThinkingEffort = ThinkingEffort.NONE) -> list[np.ndarray]:
    """Twelve prompts of very different lengths."""
    conversations = [
        i.prompt.conversation
        for skill in (LANGUAGES_TASK, CODE_TASK, REASONING_TASK)
        for i in skill.items(Split.TEST, 3, 0)
    ]
    conversations += [
        Conversation.from_question("Hi"),
        Conversation.from_question("一二三 " * 12, system="Be brief."),
        Conversation.from_question("x" * 120),
    ]
    prompts = [
        renderer.render_prompt(Conversation(c.messages, effort)).ids_T for c in conversations
    ]
    assert len(prompts) == 12
    assert (
        max(map(len, prompts)) > 4 * min(map(len, prompts))
        or max(map(len, prompts)) - min(map(len, prompts)) > 60
    )
    return prompts


def greedy(name: str, prompt: np.ndarray, stops: Sequence[int], new: int) -> list[int]:
    """The definition: the most likely token after all before it, no cache, no batch, no padding."""
    renderer, model = opened(name)
    ids = prompt.tolist()
    with torch.inference_mode():
        while len(ids) < len(prompt) + new:
            ids.append(
                int(
                    model(input_ids=torch.tensor([ids]))
                    .logits[0, -1, : len(renderer.vocabulary)]
                    .argmax()
                )
            )
            if ids[-1] in stops:
                break
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", NAMES)
def test_generate_is_greedy_decoding_one_by_one(name: str) -> None:
    renderer, _ = opened(name)
    prompts = asked(renderer)
    answers = engine(name).generate(prompts, renderer.stop_ids, NEW)
    assert [a.tolist() for a in answers] == [
        greedy(name, p, renderer.stop_ids, NEW) for p in prompts
    ]
    assert {len(a) for a in answers} != {NEW}  # some ended by themselves
    assert all(a.dtype == np.int32 for a in answers)
    assert [
        a.tolist() for a in engine(name, batch=5).generate(prompts, renderer.stop_ids, NEW)
    ] == [a.tolist() for a in answers]


def test_an_answer_ends_with_its_first_stop_token_whichever_that_is() -> None:
    renderer, _ = opened("qwen-sapling")
    prompts = asked(renderer)
    free = engine("qwen-sapling").generate(prompts, renderer.stop_ids, NEW)
    stops = (renderer.stop_ids[0], int(free[0][2]))
    for answer, longer in zip(
        engine("qwen-sapling").generate(prompts, stops, NEW), free, strict=True
    ):
        cut = np.flatnonzero(np.isin(longer, stops))
        assert answer.tolist() == (longer[: cut[0] + 1] if len(cut) else longer).tolist()
    assert local._truncate_after_stop(np.array([5, 2, 7, 2], np.int32), (2,)).tolist() == [5, 2]
    assert local._truncate_after_stop(np.array([5, 7], np.int32), (2, 9)).tolist() == [5, 7]


def test_nothing_to_ask_is_nothing_to_answer() -> None:
    renderer, _ = opened("qwen-sapling")
    assert engine("qwen-sapling").generate([], renderer.stop_ids, NEW) == []
    assert list(engine("qwen-sapling").compute_logprobs([], [])) == []


def padded(name: str, rows: int) -> TransformersEngine:
    """The sapling with more rows in its matrix than words in its vocabulary, where a padded row
    always has the largest logit.
    """
    renderer, model = opened(name)
    model = deepcopy(model)
    model.resize_token_embeddings(len(renderer.vocabulary) + rows, mean_resizing=False)
    head = torch.nn.Linear(model.config.hidden_size, len(renderer.vocabulary) + rows)
    with torch.no_grad():
        head.weight.copy_(model.get_output_embeddings().weight)
        head.bias.zero_()
        head.bias[len(renderer.vocabulary) :] = 1e3
    model.set_output_embeddings(head)
    return TransformersEngine(model, len(renderer.vocabulary))


def test_padded_rows_of_the_matrix_are_never_spoken_and_have_no_probability() -> None:
    name = "llama-sapling"
    renderer, _ = opened(name)
    prompts, wide = asked(renderer), padded(name, 9)
    with torch.inference_mode():  # the trap is set
        assert wide.model(input_ids=torch.tensor([prompts[0].tolist()])).logits[
            0, -1
        ].argmax() >= len(renderer.vocabulary)
    answers = wide.generate(prompts, renderer.stop_ids, NEW)
    assert [a.tolist() for a in answers] == [
        a.tolist() for a in engine(name).generate(prompts, renderer.stop_ids, NEW)
    ]
    learn = [np.arange(len(p)) > 0 for p in prompts]
    for one, other in zip(
        wide.compute_logprobs(prompts, learn),
        engine(name).compute_logprobs(prompts, learn),
        strict=True,
    ):
        assert one.shape == other.shape == (len(one), len(renderer.vocabulary))
        assert torch.allclose(one, other, atol=1e-4)


def test_penalties_that_come_with_a_model_do_not_bend_its_answers(tmp_path: Path) -> None:
    """Qwen2.5's generation_config.json has a repetition penalty of 1.05; transformers would add it
    to what we ask for.
    """
    folder = tmp_path / "penalised"
    shutil.copytree(SAPLINGS / "qwen-sapling", folder)
    config = json.loads((folder / "generation_config.json").read_text())
    penalties = {
        "repetition_penalty": 5.0,
        "no_repeat_ngram_size": 1,
        "min_new_tokens": NEW,
        "do_sample": True,
        "temperature": 5.0,
        "num_beams": 2,
    }
    (folder / "generation_config.json").write_text(json.dumps(config | penalties))
    source = ModelSource(str(folder))
    renderer = load_renderer(source, "penalised")
    model = load_model(source, renderer, "penalised")
    assert model.generation_config.repetition_penalty == 5.0  # the trap is set
    prompts = asked(renderer)
    answers = TransformersEngine(model, len(renderer.vocabulary)).generate(
        prompts, renderer.stop_ids, NEW
    )
    assert [a.tolist() for a in answers] == [
        a.tolist() for a in engine("qwen-sapling").generate(prompts, renderer.stop_ids, NEW)
    ]


# --- score ---


@pytest.mark.parametrize("name", NAMES)
def test_a_row_is_the_distribution_its_token_was_drawn_from(name: str) -> None:
    renderer, model = opened(name)
    prompts = asked(renderer)
    answers = engine(name).generate(prompts, renderer.stop_ids, NEW)
    whole = [np.concatenate([p, a]) for p, a in zip(prompts, answers, strict=True)]
    learn = [np.arange(len(w)) >= len(p) for w, p in zip(whole, prompts, strict=True)]
    for k, rows in enumerate(engine(name, batch=5).compute_logprobs(whole, learn)):
        with torch.inference_mode():
            direct = torch.log_softmax(
                model(input_ids=torch.tensor([whole[k].tolist()]))
                .logits[0, :, : len(renderer.vocabulary)]
                .double(),
                -1,
            )
        assert torch.allclose(rows.double(), direct[len(prompts[k]) - 1 : -1], atol=1e-4)
        assert torch.allclose(
            rows.double().exp().sum(-1), torch.ones(len(rows), dtype=torch.float64), atol=1e-5
        )
        assert (
            rows.argmax(-1).tolist() == answers[k].tolist()
        )  # greedy tokens are the likeliest of their rows
    assert k == 11


def test_learned_tokens_may_have_gaps() -> None:
    renderer, _ = opened("gemma-sapling")
    sequence = asked(renderer)[4]
    (every,) = engine("gemma-sapling").compute_logprobs([sequence], [np.arange(len(sequence)) > 0])
    some = np.zeros(len(sequence), bool)
    some[[2, 3, 7, len(sequence) - 1]] = True
    (rows,) = engine("gemma-sapling").compute_logprobs([sequence], [some])
    assert torch.allclose(rows, every[np.flatnonzero(some) - 1], atol=1e-5)


@pytest.mark.parametrize("is_known", [True, False])
def test_a_forward_has_no_more_positions_and_logits_than_it_may(
    monkeypatch: pytest.MonkeyPatch, is_known: bool
) -> None:
    """Hidden states and the head, and whole logits where the head is not known."""
    name = "qwen-sapling"
    renderer, model = opened(name)
    prompts = asked(renderer)
    learn = [np.arange(len(p)) > 0 for p in prompts]
    together = list(engine(name).compute_logprobs(prompts, learn))
    shapes: list[tuple[torch.Size, torch.Size]] = []
    hook = model.register_forward_hook(
        lambda module, args, given, out: shapes.append(
            (given["input_ids"].shape, out.logits.shape)
        ),
        with_kwargs=True,
    )
    made = []
    real = local._require_finite_blocks
    monkeypatch.setattr(
        local,
        "_require_finite_blocks",
        lambda blocks, index_N: (made.append(len(blocks)), real(blocks, index_N)),
    )
    monkeypatch.setattr(local, "MAX_TOKENS_PER_FORWARD", 250)
    width = model.get_output_embeddings().weight.shape[0]
    monkeypatch.setattr(local, "MAX_LOGIT_BYTES", {"cpu": 4 * 100 * width})
    if not is_known:
        monkeypatch.setattr(local, "_scaling_of", lambda model, vocab_size: None)
    try:
        apart = list(engine(name).compute_logprobs(prompts, learn))
    finally:
        hook.remove()
    assert len(shapes) > 3
    assert any(ids[0] > 1 for ids, _ in shapes)
    most = 250 if is_known else 100
    assert all(ids.numel() <= most for ids, _ in shapes)
    last = model.config.hidden_size if is_known else width
    assert {out[-1] for _, out in shapes} == {last}  # the head ran at supervised positions only
    assert max(made) <= 100
    assert sum(made) == sum(int(one.sum()) for one in learn)
    for one, other in zip(together, apart, strict=True):
        assert torch.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_long_answer_comes_in_pieces_that_are_the_whole(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where keys and values of a sliding window are dropped on the way, and beside a sequence
    of which nothing is learned.
    """
    renderer, model = opened(name)
    long = np.resize(np.concatenate(asked(renderer)), 400).astype(np.int32)
    assert 400 > 2 * (getattr(model.config.get_text_config(), "sliding_window", None) or 1)
    sequences, learn = (
        [long, long[:3], long[:90]],
        [np.arange(400) > 30, np.zeros(3, bool), np.arange(90) == 40],
    )
    whole = list(engine(name).compute_logprobs(sequences, learn))
    assert [len(w) for w in whole] == [369, 0, 1]
    monkeypatch.setattr(local, "MAX_TOKENS_PER_FORWARD", 150)
    width = model.get_output_embeddings().weight.shape[0]
    monkeypatch.setattr(local, "MAX_LOGIT_BYTES", {"cpu": 4 * 37 * width})
    pieces = list(engine(name).iter_logprobs(sequences, learn))
    assert max(len(some) for _, some in pieces) <= 37
    # 119, 150 and 100 supervised tokens in three pieces of the text, and each text once
    assert [k for k, _ in pieces] == [0] * (4 + 5 + 3) + [2, 1]
    for k, one in enumerate(whole):
        assert torch.allclose(
            torch.cat([some for number, some in pieces if number == k]), one, atol=1e-4
        )
    for one, other in zip(whole, engine(name).compute_logprobs(sequences, learn), strict=True):
        assert torch.allclose(one, other, atol=1e-4)


class Whole:
    """A reducer that stores every token, so that nothing is lost."""

    def reduce(
        self, blocks: BlockedLogits, index_N: np.ndarray, row_N: np.ndarray, target_N: np.ndarray
    ) -> SparseDistributions:
        logprobs_NW = blocks.logits_NW[:, : blocks.vocab_size] - blocks.log_total_N[:, None]
        n, width = logprobs_NW.shape
        return SparseDistributions(
            np.arange(n + 1) * width,
            np.tile(np.arange(width, dtype=np.int32), n),
            logprobs_NW.exp().float().numpy().ravel(),
            blocks.token_logprobs(target_N),
        )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("is_known", [True, False])
def test_reduced_distributions_are_those_of_each_sequence_whatever_the_order(
    name: str, is_known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_known:
        monkeypatch.setattr(local, "_scaling_of", lambda model, vocab_size: None)
    renderer, _ = opened(name)
    prompts = asked(renderer)
    learn = [np.arange(len(p)) % 3 == 1 for p in prompts]
    learn[4][:] = False
    parts: dict[int, list[SparseDistributions]] = {}
    order = []
    for k, part in engine(name).reduce_distributions(prompts, learn, Whole()):
        assert isinstance(part, SparseDistributions)
        parts.setdefault(k, []).append(part)
        order.append(k)
    assert order != sorted(order)  # the longest are first
    for k, rows in enumerate(engine(name).compute_logprobs(prompts, learn)):
        found = concat_distributions(parts[k])
        assert len(found) == len(rows) == int(learn[k].sum())
        assert np.allclose(found.probs_M.reshape(rows.shape), rows.exp().numpy(), atol=1e-5)
        target = prompts[k][learn[k]]
        assert np.allclose(found.target_logprob_N, rows[range(len(rows)), target], atol=1e-4)


# --- broken weights ---


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_a_teacher_error(tmp_path: Path, value: float) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(SAPLINGS / "qwen-sapling", folder)
    weights = load_file(folder / "model.safetensors")
    layer = next(n for n in weights if "layers.1" in n and "down_proj" in n)
    weights[layer][0, 0] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    source = ModelSource(str(folder))
    renderer = load_renderer(source, "broken")
    broken = TransformersEngine(load_model(source, renderer, "broken"), len(renderer.vocabulary))
    prompts = asked(renderer)[:2]
    with pytest.raises(TeacherError, match="not finite") as caught:
        list(broken.compute_logprobs(prompts, [np.arange(len(p)) > 0 for p in prompts]))
    assert caught.value.exit_code == 5
    with pytest.raises(TeacherError, match="not finite"):
        broken.generate(prompts, renderer.stop_ids, 4)


def test_the_models_own_generation_config_comes_back_also_after_an_exception(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    renderer, model = opened("qwen-sapling")
    own = model.generation_config

    def fail(*arguments: Any, **options: Any) -> None:
        assert model.generation_config is not own
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "generate", fail)
    with pytest.raises(KeyboardInterrupt):
        engine("qwen-sapling").generate_rollouts(
            asked(renderer)[:1], renderer.stop_ids, 2, temperature=1.0, seed=0
        )
    assert model.generation_config is own


@pytest.mark.parametrize(
    ("scores", "fails"),
    [
        ([[0.0, float("-inf")], [1.0, 2.0]], False),
        ([[0.0, float("nan")], [1.0, 2.0]], True),
        ([[0.0, float("inf")], [1.0, 2.0]], True),
        ([[0.0, 1.0], [float("-inf"), float("-inf")]], True),
    ],
)
def test_logits_without_a_finite_maximum_are_refused(
    scores: list[list[float]], fails: bool
) -> None:
    logits = torch.tensor(scores)
    if fails:
        with pytest.raises(TeacherError, match="not finite"):
            local.require_finite_logits(logits)
    else:
        local.require_finite_logits(logits)
