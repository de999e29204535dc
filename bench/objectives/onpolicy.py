"""Continue training on real text, on the student's own text, or on both in turn.

Students trained on events continue for half as many steps, on windows that are new to them. "text"
trains on these windows with the teacher's distributions. "own" trains on their first quarter,
continued by the student and scored by persea's own on-policy objective
(persea.training.on_policy.loss: whole distributions, reverse KL over events, masks, spans). "both"
alternates, with the first half of the windows used both ways.

Measured on held-out windows: bits per byte of the real text; for the student's continuation of each
window's first quarter, the teacher's bits per byte (`taught`) and the student's (`self`). Their
difference is the reverse KL of whole continuations per byte, from one sample each. The teacher
scores the tokens of its own tokenizer, not every possible spelling.
"""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaForCausalLM

from bench.objectives.arms import Arm, World, held_out, measure
from bench.objectives.data import ASKED, Window
from bench.objectives.examples import Lesson, Teacher, collate, plain
from bench.objectives.methods import Setting, events, prepare
from bench.objectives.models import optimizer, order, padded, rate, states, step_with
from bench.objectives.vocabularies import Speaker
from bench.objectives.words import AT_ONCE, drawn, given
from persea.losses import LMHead
from persea.teachers.engines.transformers import TransformersEngine
from persea.teachers.teacher import Teacher as Asked
from persea.tokenization.tokens import RenderedTokens
from persea.training.on_policy.candidates import MIN_CANDIDATE_PROB, candidates_from_hidden
from persea.training.on_policy.loss import build_on_policy_loss
from persea.training.on_policy.teacher_scores import TeacherScorer

ON = ("none", "text", "both", "own")
MORE = 0.5  # of a size's steps
REFRESH = 8  # steps per round of sampling


@dataclass(frozen=True)
class More:
    """One run: its data, the peak learning rate, the student's seed; part as in Arm."""

    on: str
    rate: float
    seed: int
    part: str = "test"

    def key(self, size: str) -> str:
        return json.dumps({"size": size, **asdict(self)})


@dataclass(frozen=True, eq=False)
class Begun:
    """The shared part of all runs: the world, the first students, their new windows and
    examples.
    """

    world: World
    arm: Arm

    def student(self, seed: int) -> LlamaForCausalLM:
        """Return the student trained by events on `unlimited` text, cached per seed."""
        size, path = (
            self.world.size,
            self.world.folder / f"begun {self.arm.method} {self.arm.rate} {seed}.pt",
        )
        model = self.world.begun(seed)
        if not path.is_file():
            adam, arm = optimizer(model, self.arm.rate), Arm(**asdict(self.arm) | {"seed": seed})
            for step, batch in zip(range(size.steps), self.world.batches(arm), strict=False):
                learn(
                    adam,
                    model,
                    self.world,
                    batch,
                    Setting(arm.method, arm.rows, arm.share),
                    rate(step, size.steps, arm.rate),
                )
            torch.save(model.state_dict(), path)
        model.load_state_dict(torch.load(path, weights_only=True))
        return model

    @cached_property
    def examples(self) -> dict[str, list[Lesson]]:
        """By domain, of the windows after those of length 1."""
        return self.world.examples(1, 1 + MORE)

    @property
    def windows(self) -> dict[str, list[Window]]:
        return {d: [one.window for one in pool] for d, pool in self.examples.items()}

    def pairs(self) -> dict[str, TeacherScorer]:
        """Return a scorer for each teacher, as for teachers with local weights."""
        return {
            who: TeacherScorer(
                asked(who, teacher), self.world.pairs[who].event_map, MIN_CANDIDATE_PROB
            )
            for who, teacher in self.world.teachers.items()
        }


def asked(who: str, teacher: Teacher) -> Asked:
    return Asked(
        who,
        teacher.speaker.renderer,
        TransformersEngine(teacher.model, len(teacher.speaker.vocabulary)),
    )


def learn(
    adam: torch.optim.AdamW,
    model: LlamaForCausalLM,
    world: World,
    batch: Any,
    setting: Setting,
    lr: float,
) -> None:
    prepare(batch, world.pairs, setting)
    logits_NV = states(model, batch.ids_BS, batch.learn_BS) @ model.lm_head.weight.T
    step_with(adam, model, events(logits_NV, batch, world.pairs, setting), lr)


@dataclass(frozen=True)
class Own:
    """A window's first quarter and its continuation, in the model's tokens.

    Whole characters, composed (NFC) as tokenizers require.
    """

    window: Window
    text: str
    prefix: int
    ids: tuple[int, ...]


def own_words(speaker: Speaker, window: Window, ids: Sequence[int]) -> Own | None:
    """Return None where less than a token of the continuation is text."""
    prefix, size = len(given(window, speaker)), len(window.text.encode())
    ends_T = np.cumsum(speaker.vocabulary.lengths_W[np.array(ids)])
    for n in range(int(np.searchsorted(ends_T, size, "right")), prefix, -1):
        try:
            text = speaker.vocabulary.decode(ids[:n]).decode()
        except UnicodeDecodeError:
            continue
        return (
            Own(window, text, prefix, tuple(ids[:n]))
            if unicodedata.is_normalized("NFC", text)
            else None
        )
    return None


def both_tokens(
    own: Own, student: Speaker, teacher: Speaker
) -> tuple[RenderedTokens, RenderedTokens]:
    """Return the continuation in student and teacher tokens, each behind a start token.

    Supervised from the start of the student's continuation.
    """
    begins = int(student.vocabulary.lengths_W[list(own.ids[: own.prefix])].sum())
    found = []
    for speaker, ids in ((student, own.ids), (teacher, teacher.vocabulary.encode(own.text))):
        said = plain(ids, speaker)
        nowhere = np.full(1, -1, np.int32)
        found.append(
            RenderedTokens(
                np.concatenate([np.full(1, speaker.start, np.int32), said.ids_T]),
                np.concatenate([nowhere, said.starts_T]),
                np.concatenate([nowhere, said.ends_T]),
                np.concatenate([np.zeros(1, bool), said.starts_T >= begins]),
            )
        )
    return found[0], found[1]


def sample_continuations(
    model: LlamaForCausalLM, speaker: Speaker, windows: Sequence[Window], seed: int
) -> list[Own | None]:
    model.eval()
    ids = [
        one
        for at in range(0, len(windows), AT_ONCE)
        for one in drawn(Teacher(speaker, model), windows[at : at + AT_ONCE], seed + at)
    ]
    model.train()
    return [own_words(speaker, w, one) for w, one in zip(windows, ids, strict=True)]


def on_policy_loss(
    model: LlamaForCausalLM,
    speakers: Mapping[str, Speaker],
    some: Sequence[Own],
    pairs: Mapping[str, TeacherScorer],
) -> torch.Tensor:
    """Return persea's loss on the student's text, as persea.training.on_policy.rollouts builds
    it.
    """
    student, spoken, first = (
        speakers["student"],
        dict[str, list[tuple[RenderedTokens, RenderedTokens]]](),
        0,
    )
    for own in some:
        who = ASKED[own.window.domain]
        mine, theirs = both_tokens(own, student, speakers[who])
        if (
            mine.loss_mask_T.any() and theirs.loss_mask_T.any()
        ):  # a few bytes may all lie in a token that began before them
            spoken.setdefault(who, []).append((mine, theirs))
    answers = [mine for members in spoken.values() for mine, _ in members]
    ids_BS, _ = padded([a.ids_T[1:].tolist() for a in answers], student.start)
    learn_BS = torch.zeros_like(ids_BS, dtype=torch.bool)
    for b, one in enumerate(answers):
        learn_BS[b, : len(one) - 1] = torch.from_numpy(one.loss_mask_T[1:])
    hidden_LD, targets_L = states(model, ids_BS, learn_BS), ids_BS[:, 1:][learn_BS[:, :-1]]
    head, parts = (
        LMHead(model.lm_head.weight, len(student.vocabulary)),
        list[tuple[torch.Tensor, int]](),
    )
    found = candidates_from_hidden(hidden_LD, head)
    for who, members in spoken.items():
        last = first + sum(int(mine.loss_mask_T.sum()) for mine, _ in members)
        said = build_on_policy_loss(
            pairs[who], members, "events", found.slice_positions(first, last)
        )
        parts.append(
            (
                said.loss_fn(
                    hidden_LD[first:last][said.position_P],
                    head,
                    targets_L[first:last][said.position_P],
                ).loss,
                said.num_terms,
            )
        )
        first = last
    return torch.stack([loss * weight for loss, weight in parts]).sum() / sum(
        weight for _, weight in parts
    )


def batches(begun: Begun, model: LlamaForCausalLM, seed: int, steps: int) -> Iterator[list[Own]]:
    """Yield the student's continuations, REFRESH steps sampled at once, without invalid text."""
    size, student = begun.world.size, begun.world.speakers["student"]
    walk = order(begun.windows, size.batch, seed)
    for at in range(0, steps, REFRESH):
        n = min(REFRESH, steps - at)
        chosen = [next(walk) for _ in range(n)]
        said = iter(
            sample_continuations(
                model, student, [w for some in chosen for w in some], seed=1000 * seed + at
            )
        )
        for some in chosen:
            yield [own for own in (next(said) for _ in some) if own is not None]


def run(begun: Begun, more: More, pairs: Mapping[str, TeacherScorer]) -> dict[str, Any]:
    world, size = begun.world, begun.world.size
    model, student = begun.student(more.seed), world.speakers["student"]
    adam, steps = optimizer(model, more.rate), round(size.steps * MORE)
    setting = Setting(begun.arm.method, begun.arm.rows, begun.arm.share)
    text = order(begun.examples, size.batch, more.seed)
    own = batches(begun, model, more.seed, steps if more.on == "own" else steps // 2)
    tokens, left_out = 0, 0
    for step in range(steps if more.on != "none" else 0):
        lr = rate(step, steps, more.rate)
        if more.on == "own" or (more.on == "both" and step % 2):
            some = next(own)
            left_out += size.batch - len(some)
            tokens += sum(len(one.ids) - one.prefix for one in some)
            step_with(adam, model, on_policy_loss(model, world.speakers, some, pairs), lr)
        else:
            batch = collate(next(text), student)
            tokens += len(batch.labels_N)
            learn(adam, model, world, batch, setting, lr)
    windows = held_out(world, more.part, size.test)
    found = measure(model, student, windows)
    return {
        "mean": round(found.mean(), 4),
        "bits_per_byte": {d: round(v, 4) for d, v in found.bits_per_byte().items()},
        "calibration": round(found.calibration, 4),
        "tokens": tokens,
        "left_out": left_out,
    } | spoken_by(model, world.speakers, windows, pairs)


def spoken_by(
    model: LlamaForCausalLM,
    speakers: Mapping[str, Speaker],
    windows: Sequence[Window],
    pairs: Mapping[str, TeacherScorer],
) -> dict[str, Any]:
    """Return, for each continued window, (teacher's bits, student's bits, bytes).

    From the first common boundary; None where the continuation is not text.
    """
    student, out = speakers["student"], list[Any]()
    for own in sample_continuations(model, student, windows, seed=7):
        if own is None:
            out.append(None)
            continue
        who = ASKED[own.window.domain]
        mine, theirs = both_tokens(own, student, speakers[who])
        common = set(mine.starts_T[mine.loss_mask_T].tolist()) & set(
            theirs.starts_T[theirs.loss_mask_T].tolist()
        )
        if not common:
            out.append(None)
            continue
        bits = []
        for engine, tokens in (
            (pairs[who].teacher.engine, theirs),
            (TransformersEngine(model, len(student.vocabulary)), mine),
        ):
            counted_T = tokens.starts_T >= min(common)
            (logprobs_NW,) = engine.compute_logprobs([tokens.ids_T], [counted_T])
            said_N = logprobs_NW[
                torch.arange(len(logprobs_NW)), torch.from_numpy(tokens.ids_T[counted_T]).long()
            ]
            bits.append(-float(said_N.double().sum()) / math.log(2))
        out.append([round(bits[0], 2), round(bits[1], 2), len(own.text.encode()) - min(common)])
    taught, own_bits, size = (sum(one[k] for one in out if one is not None) for k in range(3))
    return {
        "taught": round(taught / size, 4),
        "self": round(own_bits / size, 4),
        "no_text": out.count(None),
        "continued": out,
    }


def run_all(world: World, arm: Arm, runs: Sequence[More], results: Path) -> list[dict[str, Any]]:
    """Run the arms without a result line; return all lines."""
    begun, out = Begun(world, arm), []
    pairs = begun.pairs()
    for more in runs:
        done = (
            {line["key"]: line for line in map(json.loads, results.read_text().splitlines())}
            if results.is_file()
            else {}
        )
        key = more.key(world.size.name)
        if key not in done:
            done[key] = {"key": key, **asdict(more), **run(begun, more, pairs)}
            with results.open("a") as file:
                file.write(json.dumps(done[key]) + "\n")
            print(
                {
                    k: v
                    for k, v in done[key].items()
                    if k not in ("continued", "bits_per_byte", "key")
                },
                flush=True,
            )
        out.append(done[key])
    return out
