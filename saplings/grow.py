"""Train the saplings from nothing: three tiny teachers and a base model for the student.

    python saplings/grow.py                       all four into saplings/
    python saplings/grow.py qwen-sapling --steps 400 --out /tmp/grown

They have their families' real architectures, tokenizers and templates. Training is seeded and
resumable: its state is saved to .grown/ every 200 steps and removed when a sapling is complete. All
text comes from the generators in persea/tasks/generated (only items of Split.PRETRAIN), so the
saplings contain nothing from third parties.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Regex as Pattern
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from persea.chat.messages import Conversation, ThinkingEffort
from persea.chat.renderer import ChatRenderer
from persea.models.loading import ModelSource, load_model, load_renderer
from persea.models.random_init import random_init
from persea.tasks import generated as skills
from persea.tasks.task import Split, grade_answers, score_results
from persea.teachers.engines.transformers import TransformersEngine
from persea.teachers.teacher import Teacher
from persea.tokenization.tokens import RenderedTokens

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from plans import DIAL, PLANS, Plan  # noqa: E402
from prose import small_talk  # noqa: E402
from text import THOUGHTS, texts, tokens_of, words_of  # noqa: E402

POOL = 30_000  # conversations rendered once; 4,000 steps of 24 see each three times
BATCH = 24
MARK = "<!-- grow.py writes the text below -->"
RATE = 4e-3  # highest learning rate
TEMPLATE_WORDS = [f"Reasoning: {e}" for e in ThinkingEffort] + [
    "system",
    "user",
    "assistant",
    "model",
    "developer",
    "# Tools\n",
    "Functions:\n",
    "analysis",
    "final",
    " to=functions.",
    "commentary",
    " json",
    '{"name": "',
    '", "parameters": {"',
    '", "arguments": {"',
    "tools",
]


CARD = """\
---
license: apache-2.0
---

# {name}

A small model trained from nothing by persea, for its tests and its quickstart. See
[saplings/README.md](../README.md).
"""


def grow_tokenizer(plan: Plan, folder: Path) -> None:
    """Train the plan's tokenizer in its family's form.

    Digits stay single, as in Qwen and Gemma, except for families with whole numbers.
    """
    words = [t for item, _ in texts(plan, 8000) for t in words_of(item)] + TEMPLATE_WORDS * 100
    pieces = words if plan.whole_numbers else [p for t in words for p in re.split(r"\d+", t) if p]
    if plan.family == "gemma":
        pieces = [
            p for t in pieces for p in re.split(r"(\n+)", t) if p
        ]  # as Gemma's: a line end is never one token with what follows
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        bytes_ = [f"<0x{b:02X}>" for b in range(256)]
        trainer = trainers.BpeTrainer(
            vocab_size=plan.vocabulary,
            special_tokens=[*plan.control, *bytes_],
            show_progress=False,
            initial_alphabet=list("0123456789▁\n"),
            limit_alphabet=240,
        )
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.normalizer = normalizers.NFC() if plan.family == "qwen" else None
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Pattern(plan.split), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=plan.vocabulary,
            special_tokens=list(plan.control),
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
    tokenizer.train_from_iterator(pieces, trainer)
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = [
        t for t in spec["added_tokens"] if t["content"] in plan.control
    ]  # byte tokens are not special
    for t in spec["added_tokens"]:
        t["special"] = t["content"] not in ("<think>", "</think>")  # as in Qwen3
    if plan.family == "gemma":
        spec["pre_tokenizer"] = {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(
        json.dumps(spec, ensure_ascii=False, separators=(",", ":")), encoding="utf-8"
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
        **plan.special,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    (folder / "chat_template.jinja").write_text(plan.template)


def batch(
    pool: list[RenderedTokens], chosen: list[int], pad: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ids, attention mask and labels (-100 for positions without a loss), padded on the
    right."""
    length = max(len(pool[i]) for i in chosen)
    ids = torch.full((len(chosen), length), pad)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, i in enumerate(chosen):
        n = len(pool[i])
        ids[row, :n] = torch.from_numpy(pool[i].ids_T)
        mask[row, :n] = 1
        labels[row, :n] = torch.where(torch.from_numpy(pool[i].loss_mask_T), ids[row, :n], -100)
    return ids, mask, labels


def neighbours(pool: list[RenderedTokens], rng: random.Random) -> list[int]:
    """Return a random batch of conversations of similar length.

    It is a random quarter, in order of length, of four times as many random conversations.
    """
    drawn = sorted(rng.choices(range(len(pool)), k=4 * BATCH), key=lambda i: len(pool[i]))
    place = rng.randrange(4) * BATCH
    return drawn[place : place + BATCH]


def optimizers_of(model: torch.nn.Module) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Return Muon for the matrices between the embeddings and AdamW for the rest.

    After 350 steps of gpt-oss-sapling the loss was 0.88; with AdamW alone it was 1.03.
    """
    inner = [
        p
        for name, p in model.named_parameters()
        if p.ndim == 2 and "embed" not in name and "lm_head" not in name
    ]
    mine = {id(p) for p in inner}
    return (
        torch.optim.Muon(
            inner, lr=RATE, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(
            [p for p in model.parameters() if id(p) not in mine],
            lr=RATE,
            betas=(0.9, 0.98),
            weight_decay=0.01,
        ),
    )


def grow(plan: Plan, out: Path, steps: int, progress: Progress) -> None:
    """Train one sapling and write it as a Hugging Face folder in bf16."""
    state_file = HERE.parent / ".grown" / f"{plan.name}.pt"
    state_file.parent.mkdir(exist_ok=True)
    folder = out / plan.name
    grow_tokenizer(plan, folder)
    renderer: ChatRenderer = load_renderer(ModelSource(str(folder)), str(folder))
    rng = random.Random(f"pool {plan.name}")
    pool = [
        tokens_of(plan, renderer, item, answer, rng)
        for item, answer in texts(plan, min(POOL, BATCH * steps))
    ]
    model = random_init(plan.family, len(renderer.vocabulary), plan.sizes)
    optimizers = optimizers_of(model)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            o, lambda s: min(1.0, (s + 1) / 60, max(0.02, (steps - s) / (0.6 * steps)))
        )
        for o in optimizers
    ]
    parts: dict[str, Any] = {"model": model} | {
        f"{name} {k}": part
        for name, group in (("optimizer", optimizers), ("schedule", schedules))
        for k, part in enumerate(group)
    }
    begin = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        if state["steps"] == steps:
            begin = state["step"]
            for name, part in parts.items():
                part.load_state_dict(state[name])
    task = progress.add_task(plan.name, total=steps, completed=begin, loss=0.0)
    model.train()
    pad = renderer.vocabulary.control_token_ids[plan.special["pad_token"]]
    seconds, log = time.process_time(), []
    losses: list[float] = []
    for step in range(begin, steps):
        chosen = neighbours(pool, random.Random(f"{plan.name} step {step}"))
        ids, mask, labels = batch(pool, chosen, pad)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in (*optimizers, *schedules):
            part.step()
        model.zero_grad(set_to_none=True)
        losses = [*losses[-99:], loss.item()]
        progress.update(task, advance=1, loss=losses[-1])
        if step % 100 == 99:
            log.append(
                {
                    "step": step + 1,
                    "loss": round(sum(losses) / len(losses), 4),
                    "seconds": round(time.process_time() - seconds, 1),
                }
            )
        if step % 200 == 199:
            print(
                f"{plan.name} {step + 1} loss {sum(x['loss'] for x in log[-2:]) / 2:.3f}",
                flush=True,
            )
            torch.save(
                {"step": step + 1, "steps": steps, **{k: p.state_dict() for k, p in parts.items()}},
                state_file.with_suffix(".tmp"),
            )
            state_file.with_suffix(".tmp").replace(state_file)
    model.generation_config.eos_token_id = list(renderer.stop_ids)
    model.generation_config.pad_token_id = pad
    model.config.eos_token_id, model.config.pad_token_id = list(renderer.stop_ids), pad
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "growing.json").write_text(
        json.dumps(
            {
                "plan": {
                    "name": plan.name,
                    "family": plan.family,
                    "mix": plan.mix,
                    "home": plan.home,
                    "sizes": plan.sizes,
                    "steps": steps,
                    "batch": BATCH,
                },
                "parameters": sum(p.numel() for p in model.parameters()),
                "log": log,
            },
            indent=1,
        )
        + "\n"
    )
    state_file.unlink(missing_ok=True)
    (folder / "README.md").write_text(CARD.format(name=plan.name))
    metrics = json.loads((folder / "growing.json").read_text()) | measured(plan, folder)
    metrics["sha256"] = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    (folder / "growing.json").write_text(json.dumps(metrics, indent=1) + "\n")


def speaker(plan: Plan, folder: Path, effort: ThinkingEffort = ThinkingEffort.NONE) -> Teacher:
    """Load a grown sapling as a teacher."""
    source = ModelSource(str(folder))
    renderer = load_renderer(source, plan.name)
    return Teacher(
        plan.name,
        renderer,
        TransformersEngine(load_model(source, renderer, plan.name), len(renderer.vocabulary), 128),
        effort,
    )


def measured(plan: Plan, folder: Path, n: int = 100) -> dict[str, Any]:
    """Measure a grown sapling.

    Returns:
        Its scores on each task's AUDITION items at each of its efforts, and its mean entropy (nats
        for each token with a loss) on unseen small talk and on reference answers.
    """
    found: dict[str, Any] = {"scores": {}, "entropy": {}, "thought": {}}
    one = speaker(plan, folder)
    rng = random.Random("held out")
    found["entropy"]["prose"] = entropy(
        one, [small_talk(rng).reference_conversation for _ in range(n)]
    )
    for skill in skills.GENERATED_TASKS:
        items = skill.items(Split.AUDITION, n, 1)
        said = [i.reference_conversation for i in items if one.can_render(i.reference_conversation)]
        if said:
            found["entropy"][skill.name] = entropy(one, said)
        for effort in plan.efforts if skill.name in THOUGHTS else (ThinkingEffort.NONE,):
            answers = replace(one, effort=effort).answer([i.prompt for i in items], 80)
            results = grade_answers(
                skill, items, [(a.conversation.messages[-1], a.finish) for a in answers]
            )
            found["scores"][f"{skill.name} {effort}"] = score_results(
                plan.name, skill.name, results, effort
            ).value
            found["thought"][f"{skill.name} {effort}"] = sum(
                len(r.answer.thinking) for r in results
            ) / len(results)
    return found


def entropy(one: Teacher, conversations: list[Conversation]) -> float:
    """Return the mean entropy of a model's distributions in nats for each token with a loss."""
    entropies = [
        -(logprobs.exp() * logprobs).sum(-1) for _, logprobs in one.compute_logprobs(conversations)
    ]
    return round(float(torch.cat(entropies).mean()), 3)


def table(folder: Path) -> str:
    """Return the measurements of all saplings (growing.json) as Markdown tables."""
    metrics = {
        plan.name: json.loads((folder / plan.name / "growing.json").read_text()) for plan in PLANS
    }
    lines = ["| sapling | parameters | bytes | sha256 of model.safetensors |", "|---|---|---|---|"]
    lines += [
        f"| {n} | {t['parameters']:,} | {(folder / n / 'model.safetensors').stat().st_size:,} | "
        f"{t['sha256']} |"
        for n, t in metrics.items()
    ]
    lines += [
        "",
        "| answered directly | " + " | ".join(metrics) + " |",
        "|---|" + "---|" * len(metrics),
    ]
    for skill in (s.name for s in skills.GENERATED_TASKS):
        lines.append(
            f"| {skill} | "
            + " | ".join(f"{t['scores'][f'{skill} none']:.2f}" for t in metrics.values())
            + " |"
        )
    for kind in ("prose", *(s.name for s in skills.GENERATED_TASKS)):
        lines.append(
            f"| entropy, {kind} | "
            + " | ".join(
                f"{t['entropy'][kind]:.2f}" if kind in t["entropy"] else "-"
                for t in metrics.values()
            )
            + " |"
        )
    lines += [
        "",
        "| reasoning by gpt-oss-sapling at effort | correct | characters of thought |",
        "|---|---|---|",
    ]
    oss = metrics["gpt-oss-sapling"]
    lines += [
        f"| {e} | {oss['scores'][f'reasoning {e}']:.2f} | {oss['thought'][f'reasoning {e}']:.0f} |"
        for e in DIAL
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names", nargs="*", help="saplings to grow; all when none is named", metavar="NAME"
    )
    parser.add_argument("--steps", type=int, help="number of steps; default: the plan's")
    parser.add_argument("--out", type=Path, default=HERE)
    arguments = parser.parse_args()
    unknown = set(arguments.names) - {p.name for p in PLANS}
    if unknown:
        parser.error(f"no sapling {sorted(unknown)}; there are {[p.name for p in PLANS]}")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        for plan in PLANS:
            if not arguments.names or plan.name in arguments.names:
                grow(plan, arguments.out, arguments.steps or plan.steps, progress)
    if arguments.out == HERE:
        page_ = HERE / "README.md"
        page_.write_text(page_.read_text().partition(MARK)[0] + MARK + "\n\n" + table(HERE))
    shutil.rmtree(HERE.parent / ".grown", ignore_errors=True) if not arguments.names else None


if __name__ == "__main__":
    main()
