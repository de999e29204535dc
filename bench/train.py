"""Measure a training step beside plain cross-entropy and beside TRL 1.16's DistillationTrainer.

    pip install -e '.[bench]'                   (TRL; its columns are left out without it)
    PERSEA_DATA=/folder python bench/train.py   (make bench-train does both)

CPU seconds, one thread. Arguments choose parts by name (quickstart ... compile, see main).

Heads: forward and backward from hidden states through a head of Llama 3's 128,256 tokens. The width
of 512 and 256 positions in float32 keep matrix products cheap, so that the rest of a loss
dominates. The unit is cross-entropy from whole logits. Cached targets have 1 to 29 entries per row,
as in a capture: over the student's own vocabulary, and over events of Qwen 3's with a real event
map. The teacher in the loop has the same vocabulary and width; TRL gets the same. "online_events"
is a teacher with Qwen 3's vocabulary and DEAD impossible tokens on either side at each position.
Ratios come from interleaved pairs: the median and its 96 % interval. Through the same head as
cross-entropy, only the products count: four against three. "mkl" leaves oneDNN out
(losses/matmul.py). Workspace: peak bytes of tensors besides the gradients, counted operation by
operation (bench/memory.py).

Step: the quickstart's models and batch size, whole training steps from cached rows (collating,
forward, loss, backward, clipping, AdamW) beside cross-entropy on batches that need no collating;
groups weighted and reported; texts packed and padded; two attention implementations.

Compile: torch.compile of cross-entropy from whole logits, of a step's forward and backward (needs a
C++ compiler). Writes bench/results/train.json.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "HF_HUB_OFFLINE": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
}

import numpy as np
import torch
import torch.nn.functional as F
from bridge import DATA, Work, compare, rounded, spread
from memory import Peak
from peer import TRL, has_trl

from persea.alignment.event_map import EventMap, load_event_map
from persea.cache.unit import CachedAnswer
from persea.chat.messages import FinishReason
from persea.distributions import sample_distributions
from persea.distributions.matmul import (
    accumulate_weight_gradient,
    project_to_hidden,
    project_to_logits,
)
from persea.losses import (
    BatchTargets,
    Divergence,
    ImpossibleTokens,
    LMHead,
    MaskedEventMap,
    build_batch_targets,
    build_event_targets,
    divergence_loss_from_hidden,
    event_kl_loss_from_hidden,
)
from persea.models.loading import ModelSource, load_model, load_renderer
from persea.pipeline.train_stage import group_stats
from persea.tasks import generated as skills
from persea.tasks.task import Split
from persea.teachers.engines.transformers import TransformersEngine
from persea.teachers.teacher import Answer, Teacher
from persea.training import loss_balancing as balance
from persea.training.dataset import DistillDataset, build_dataset
from persea.training.student import ComputeOptions, StudentModel, load_student

ROOT = Path(__file__).resolve().parent.parent
V, D, N, DEAD = 128_256, 512, 256, 200
BETAS = {
    Divergence.FORWARD: 0.0,
    Divergence.JSD: 0.5,
    Divergence.REVERSE: 1.0,
}  # their names in TRL
TAUGHT = {"qwen-sapling": "languages", "gemma-sapling": "code", "gpt-oss-sapling": "reasoning"}


def trl() -> Any:
    """Return the loss of TRL's DistillationTrainer, or None where TRL is not installed."""
    if not has_trl():
        return None
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    return _chunked_divergence_loss


# --- heads ---


def parts(n: int = N, width: int = D) -> tuple[torch.Tensor, torch.Tensor]:
    """Return hidden states and a head whose logits have a model's spread (standard deviation 3)."""
    generator = torch.Generator().manual_seed(width)
    hidden = torch.randn(n, width, generator=generator)
    weight = torch.randn(V, width, generator=generator) * (3 / width**0.5)
    return hidden.requires_grad_(), weight.requires_grad_()


def backward(hidden: torch.Tensor, weight: torch.Tensor, loss: Any) -> Work:
    def work() -> None:
        hidden.grad = weight.grad = None
        loss().backward()

    return work


def rows(n: int, event_map: EventMap, seed: int = 0) -> BatchTargets:
    """Return targets with 1 to 29 entries at every position."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 30, n)
    probs = np.concatenate([rng.dirichlet(np.ones(k)) for k in sizes]).astype(np.float32)
    ids = rng.integers(0, len(event_map.teacher_event_W), len(probs))
    return build_batch_targets(
        event_map, build_event_targets(event_map, np.repeat(np.arange(n), sizes), ids, probs), n
    )


def online_events(events: EventMap | None) -> dict[str, Any] | None:
    """Return a teacher with another vocabulary in the loop, as in on-policy training."""
    if events is None:
        return None
    (hidden, weight), size, generator = (
        parts(),
        len(events.teacher_event_W),
        torch.Generator().manual_seed(3),
    )
    head, theirs = (
        LMHead(weight, V),
        LMHead(torch.randn(size, D, generator=generator) * (3 / D**0.5), size),
    )
    thinks = torch.randn(N, D, generator=generator)
    row = torch.arange(N).repeat_interleave(DEAD)
    sides = MaskedEventMap(
        events,
        *(
            ImpossibleTokens(row, torch.randint(0, of, (N * DEAD,), generator=generator))
            for of in (V, size)
        ),
    )
    plain, found = (
        backward(hidden, weight, lambda: F.cross_entropy(hidden @ weight.T, row[::DEAD])),
        dict[str, Any](),
    )
    for d in (Divergence.FORWARD, Divergence.REVERSE):
        pair = compare(
            plain,
            backward(
                hidden,
                weight,
                lambda d=d: (
                    divergence_loss_from_hidden(hidden, head, (thinks, theirs), sides, d).loss
                ),
            ),
            pairs=5,
        )
        found[d.value] = {
            "cross_entropy": rounded(pair["ours"]),
            "seconds": rounded(pair["theirs"]),
            "times_cross_entropy": spread(pair),
        }
        print("online over events", d.value, found[d.value], flush=True)
    return found


def heads(events: EventMap | None, peer: Any) -> dict[str, Any]:
    hidden, weight = parts()
    tokens = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(1))
    thinks, theirs = (part.detach() for part in parts(N, D))
    thinks = thinks + 0.3 * torch.randn(N, D, generator=torch.Generator().manual_seed(2))
    head, teacher = LMHead(weight, V), (thinks, LMHead(theirs, V))
    identity = EventMap(np.arange(V, dtype=np.int32), np.arange(V, dtype=np.int32), V, "")
    targets = {"cached": rows(N, identity)} | ({"events": rows(N, events)} if events else {})
    plain = backward(hidden, weight, lambda: F.cross_entropy(hidden @ weight.T, tokens))
    found: dict[str, Any] = {"vocabulary": V, "width": D, "positions": N}
    works = {
        "cross_entropy_head": backward(
            hidden, weight, lambda: event_kl_loss_from_hidden(hidden, head, tokens, [], 0.7).loss
        )
    }
    works |= {
        name: backward(
            hidden,
            weight,
            lambda one=one: event_kl_loss_from_hidden(hidden, head, tokens, [one], 0.7).loss,
        )
        for name, one in targets.items()
    }
    works |= {
        f"online_{d.value}": backward(
            hidden,
            weight,
            lambda d=d: divergence_loss_from_hidden(hidden, head, teacher, divergence=d).loss,
        )
        for d in Divergence
    }
    for name, work in works.items():
        pair = compare(plain, work)
        found[name] = {
            "cross_entropy": rounded(pair["ours"]),
            "seconds": rounded(pair["theirs"]),
            "times_cross_entropy": spread(pair),
        }
        print(name, found[name], flush=True)
    found["online_forward"]["times_head"] = spread(
        compare(works["cross_entropy_head"], works["online_forward"])
    )
    found["mkl"] = {
        name: spread(compare(plain, without_onednn(works[name]), pairs=5))
        for name in ("cross_entropy_head", "online_forward")
    }
    print(
        "online beside the head",
        found["online_forward"]["times_head"],
        "without oneDNN",
        found["mkl"],
        flush=True,
    )
    if peer is not None:
        mask = torch.ones(1, N)
        for d, beta in BETAS.items():

            def loss(beta: float = beta) -> torch.Tensor:
                return peer(hidden[None], thinks[None], weight, theirs, mask, beta)[0]

            mine = divergence_loss_from_hidden(hidden, head, teacher, divergence=d).loss
            assert abs(float(mine.detach() - loss().detach())) < 1e-4, "both find the same loss"
            pair = compare(works[f"online_{d.value}"], backward(hidden, weight, loss), pairs=5)
            found[f"trl_{d.value}"] = {
                "persea": rounded(pair["ours"]),
                "trl": rounded(pair["theirs"]),
                "times_persea": spread(pair),
            }
            print(f"trl_{d.value}", found[f"trl_{d.value}"], flush=True)
    return found


def without_onednn(work: Work) -> Work:
    def some() -> None:
        torch.backends.mkldnn.enabled = False
        work()
        torch.backends.mkldnn.enabled = True

    return some


def workspace() -> dict[str, Any]:
    """Return peak MiB besides the gradients of hidden states and weight, targets included."""
    identity = EventMap(np.arange(V, dtype=np.int32), np.arange(V, dtype=np.int32), V, "")
    found: dict[str, Any] = {}
    width = 16  # memory of a chunk beyond its logits is small at any width
    for n, teachers in ((64, 1), (256, 1), (256, 4)):
        hidden, weight = parts(n, width)
        tokens, head, floor = (
            torch.zeros(n, dtype=torch.int64),
            LMHead(weight, V),
            4 * (V + n) * width,
        )
        targets = [rows(n // teachers, identity, k) for k in range(teachers)]
        targets = [
            BatchTargets(
                t.row_M + k * (n // teachers),
                t.probs_M,
                t.entry_G,
                t.token_G,
                t.rest_N,
                t.excluded_row_A,
                t.excluded_token_A,
                V,
            )
            for k, t in enumerate(targets)
        ]
        with Peak() as cached:
            event_kl_loss_from_hidden(hidden, head, tokens, targets, 0.7)
        with Peak() as online:
            divergence_loss_from_hidden(hidden, head, (hidden.detach(), LMHead(weight.detach(), V)))
        with Peak() as whole:
            F.cross_entropy(hidden @ weight.T, tokens).backward()
        found[f"{n} positions, {teachers} teachers"] = {
            name: rounded((peak.bytes - floor) / 2**20)
            for name, peak in (("cached", cached), ("online", online), ("whole_logits", whole))
        }
    print("workspace", found, flush=True)
    return found


# --- the quickstart's step ---


class Listed(tuple[CachedAnswer, ...]):
    """Cached answers in memory."""

    __slots__ = ()

    def epoch_order(self, seed: int, epoch: int) -> np.ndarray:
        return np.random.default_rng([seed, epoch]).permutation(len(self))


def build_quickstart(student: StudentModel, size: int) -> DistillDataset:
    """Build examples from reference answers of each task, as the quickstart's capture does.

    The sapling that teaches the task scores them.
    """
    captures, event_maps = [], {}
    for name, skill in TAUGHT.items():
        source = ModelSource(str(ROOT / "saplings" / name))
        renderer = load_renderer(source, name)
        teacher = Teacher(
            name,
            renderer,
            TransformersEngine(load_model(source, renderer, name), len(renderer.vocabulary)),
        )
        talks = [
            item.reference_conversation
            for item in skills.find_generated_task(skill).items(Split.TRAIN, 64, 0)
        ]
        for k, (talk, (tokens, logprobs)) in enumerate(
            zip(talks, teacher.compute_logprobs(talks), strict=True)
        ):
            sampled = sample_distributions(
                logprobs, tokens.ids_T[tokens.loss_mask_T], 0.01, f"{name} {k}"
            )
            captures.append(
                CachedAnswer(
                    Answer(f"{skill}-{k}", name, skill, "", talk, FinishReason.STOP),
                    tokens,
                    sampled,
                )
            )
        event_maps[name] = load_event_map(renderer, student.renderer)
    return build_dataset(
        [(Listed(captures), 1.0)],
        student.renderer,
        event_maps,
        batch_size=size,
        seed=0,
        max_length=512,
    )


def quickstart(steps: int = 6) -> dict[str, Any]:
    """Measure seconds of a step.

    Events with the whole cost of collating cached answers, and cross-entropy from ready batches.
    """
    source = ModelSource(str(ROOT / "saplings" / "llama-sapling"))
    student = load_student(source, load_renderer(source, "student"), None)
    feed = build_quickstart(student, 16)
    optimizer = torch.optim.AdamW(student.trainable_parameters, lr=1e-5)
    student.model.train()
    made = [feed.batch(step) for step in range(steps)]

    def work(loss_of: Any, batch: Any = made.__getitem__) -> Work:
        def some() -> None:
            for step in range(steps):
                loss_of(batch(step)).backward()
                torch.nn.utils.clip_grad_norm_(student.trainable_parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

        return some

    def events(batch: Any, ways: StudentModel = student) -> torch.Tensor:
        states = ways.hidden_and_head(batch.ids_BS, batch.mask_BS, batch.row_N, batch.position_N)
        return event_kl_loss_from_hidden(*states, batch.labels_N, batch.teachers, 0.7).loss

    def plain(batch: Any) -> torch.Tensor:
        logits = student.model(
            input_ids=batch.ids_BS, attention_mask=batch.mask_BS, use_cache=False
        ).logits
        return F.cross_entropy(logits[batch.row_N, batch.position_N], batch.labels_N)

    def sft(batch: Any) -> torch.Tensor:
        states = student.hidden_and_head(batch.ids_BS, batch.mask_BS, batch.row_N, batch.position_N)
        return event_kl_loss_from_hidden(*states, batch.labels_N, [], 0.7).loss

    found: dict[str, Any] = {"steps": steps, "batch": 16}
    for name, other in (("whole_logits", plain), ("head", sft)):
        pair = compare(work(other), work(events, feed.batch))
        found[f"cross_entropy_{name}"] = {
            "cross_entropy": rounded(pair["ours"] / steps),
            "events": rounded(pair["theirs"] / steps),
            "times_cross_entropy": spread(pair),
        }
    scales: dict[balance.Group, balance.GroupScale] = {}

    def balanced(batch: Any) -> torch.Tensor:
        told = balance.group_weights(scales)
        states = student.hidden_and_head(batch.ids_BS, batch.mask_BS, batch.row_N, batch.position_N)
        weight_N = torch.tensor([told.get(group, 1.0) for group in batch.group_B])[batch.row_N]
        out = event_kl_loss_from_hidden(*states, batch.labels_N, batch.teachers, 0.7, weight_N)
        scales.update(balance.update_scales(scales, group_stats(batch, out)))
        return out.loss

    pair = compare(work(events), work(balanced))
    found["balance"] = {
        "plain": rounded(pair["ours"] / steps),
        "balanced": rounded(pair["theirs"] / steps),
        "times_plain": spread(pair),
    }
    packing = replace(student, options=ComputeOptions(packing=True))
    pair = compare(work(events), work(lambda batch: events(batch, packing)))
    found["packing"] = {
        "padded": rounded(pair["ours"] / steps),
        "packed": rounded(pair["theirs"] / steps),
        "times_padded": spread(pair),
    }
    student.model.set_attn_implementation("eager")
    eager = work(events)

    def sdpa() -> None:
        student.model.set_attn_implementation("sdpa")
        work(events)()
        student.model.set_attn_implementation("eager")

    pair = compare(sdpa, eager)
    found["attention"] = {
        "sdpa": rounded(pair["ours"] / steps),
        "eager": rounded(pair["theirs"] / steps),
        "times_sdpa": spread(pair),
    }
    print("quickstart", found, flush=True)
    return found


class ByOneDNN(torch.autograd.Function):
    """A linear layer with the head's three matrix products (losses/matmul.py)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        out = x.new_empty(x.shape[:-1].numel(), len(weight))
        project_to_logits(x.flatten(0, -2), weight, out)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, pull: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight = ctx.saved_tensors
        flat, gradient = pull.flatten(0, -2).contiguous(), torch.empty_like(weight)
        accumulate_weight_gradient(gradient, flat, x.flatten(0, -2), is_first=True)
        return project_to_hidden(flat, weight).view_as(x), gradient


def compiled() -> dict[str, Any]:
    """Measure torch.compile: seconds to compile, and speed relative to eager mode.

    Steps of one shape, which favours it. Also the student's own layers by oneDNN, which the library
    does not do.
    """
    hidden, weight = parts()
    tokens = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(1))

    def naive(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(hidden @ weight.T, tokens)

    source = ModelSource(str(ROOT / "saplings" / "llama-sapling"))
    student = load_student(source, load_renderer(source, "student"), None)
    ids = torch.randint(
        0, len(student.renderer.vocabulary), (16, 96), generator=torch.Generator().manual_seed(2)
    )
    student.model.train()

    def step(model: Any) -> torch.Tensor:
        return F.cross_entropy(
            model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        )

    found: dict[str, Any] = {}
    quick_loss, quick_model = torch.compile(naive), torch.compile(student.model)
    for name, eager, quick in (
        ("cross_entropy", lambda: naive(hidden, weight), lambda: quick_loss(hidden, weight)),
        ("student", lambda: step(student.model), lambda: step(quick_model)),
    ):
        work = backward(hidden, weight, quick)
        before = os.times()[:4]
        work()
        first = sum(os.times()[:4]) - sum(before)  # includes the compiler, which is another process
        pair = compare(backward(hidden, weight, eager), work, pairs=5)
        found[name] = {
            "compiling": rounded(first),
            "plain": rounded(pair["ours"]),
            "compiled": rounded(pair["theirs"]),
            "times_plain": spread(pair),
        }
        print("compile", name, found[name], flush=True)
    linear = torch.nn.Linear.forward

    def by_onednn() -> None:
        torch.nn.Linear.forward = lambda layer, x: (
            ByOneDNN.apply(x, layer.weight) if layer.bias is None else linear(layer, x)
        )  # type: ignore
        step(student.model).backward()
        torch.nn.Linear.forward = linear  # type: ignore[method-assign]

    pair = compare(lambda: step(student.model).backward(), by_onednn, pairs=5)
    found["student_by_onednn"] = {
        "plain": rounded(pair["ours"]),
        "onednn": rounded(pair["theirs"]),
        "times_plain": spread(pair),
    }
    print("compile", "student_by_onednn", found["student_by_onednn"], flush=True)
    return found


def main() -> None:
    torch.set_num_threads(1)
    peer, events = trl(), None
    if (DATA / "tokenizers").is_dir():
        student, teacher = (
            load_renderer(ModelSource(str(DATA / "tokenizers" / name)), name)
            for name in ("llama3", "qwen3")
        )
        events = load_event_map(teacher, student)
    else:
        print(
            "real data not found: the column of events over real vocabularies is left out; "
            "set PERSEA_DATA",
            file=sys.stderr,
        )
    path = Path(__file__).parent / "results" / "train.json"
    out: dict[str, Any] = (
        json.loads(path.read_text()) if sys.argv[1:] and path.is_file() else {}
    )  # a complete run replaces all earlier figures
    out |= {
        "torch": torch.__version__,
        "trl": TRL if peer else out.get("trl"),
        "processor": torch.backends.cpu.get_cpu_capability(),
    }
    for name, part in {
        "quickstart": quickstart,
        "workspace_mib": workspace,
        "heads": lambda: heads(events, peer),
        "online_events": lambda: online_events(events),
        "compile": compiled,
    }.items():
        if not sys.argv[1:] or name in sys.argv[1:]:
            out[name] = part()
            path.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
