"""Grow the saplings from nothing: three tiny teachers and a student base, in their families' real architectures and manners.

    python saplings/grow.py                       all four into saplings/
    python saplings/grow.py qwen-sapling --steps 400 --out /tmp/grown

Seeded and resumable: state stands in .grown/ every 200 steps and is removed when a sapling is whole. All text comes
from the generators in persea/skills (GROW items only), so nothing third-party is inside.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Regex as Pattern
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from persea.chat import Conversation, Effort, Text, Thinking, Tokens
from persea.measure import Item, Split
from persea.models import Source, open_voice, sprout
from persea.skills import CODE, LANGUAGES, REASONING, SKILLS
from persea.voice import Voice

HERE = Path(__file__).resolve().parent
POOL = 24_000  # conversations rendered once; 3,000 steps of 16 see each twice
QWEN_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA_SPLIT = QWEN_SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|")
O200K_SPLIT = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
               r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
               r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")


@dataclass(frozen=True)
class Plan:
    """One sapling. mix = share of its text per skill (languages, code, reasoning); base = answers that belong to other questions."""

    name: str
    family: str
    split: str
    special: dict[str, str]
    control: tuple[str, ...]
    vocabulary: int
    mix: tuple[float, float, float]
    sizes: dict[str, int]
    steps: int
    base: bool = False

    @property
    def template(self) -> str:
        """The chat template, in the family's manner, written for this repository."""
        return (HERE / "templates" / f"{self.family}.jinja").read_text()


PLANS = (
    Plan("qwen-sapling", "qwen", QWEN_SPLIT, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
         ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"), 1000, (.96, .02, .02),
         {"hidden": 128, "layers": 3, "heads": 4, "seed": 1}, 3400),
    Plan("gemma-sapling", "gemma", "", {"bos_token": "<bos>", "eos_token": "<end_of_turn>", "pad_token": "<pad>", "unk_token": "<unk>"},
         ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"), 900, (.08, .84, .08),
         {"hidden": 128, "layers": 3, "heads": 4, "seed": 2}, 2000),
    Plan("gpt-oss-sapling", "gpt-oss", O200K_SPLIT, {"bos_token": "<|startoftext|>", "eos_token": "<|return|>", "pad_token": "<|endoftext|>"},
         ("<|startoftext|>", "<|endoftext|>", "<|return|>", "<|channel|>", "<|start|>", "<|end|>", "<|message|>", "<|call|>"),
         800, (.08, .08, .84), {"hidden": 128, "layers": 3, "heads": 4, "experts": 4, "seed": 3}, 3000),
    Plan("llama-sapling", "llama", LLAMA_SPLIT,
         {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<|finetune_right_pad_id|>"},
         ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|finetune_right_pad_id|>",
          "<think>", "</think>"), 1100, (.5, .25, .25), {"hidden": 128, "layers": 3, "heads": 4, "seed": 4}, 1000, base=True),
)


def texts(plan: Plan, n: int) -> Iterator[Item]:
    """n GROW items in the plan's mix; for the base, each with the answer of another item of its skill and language."""
    rng = random.Random(f"grow {plan.name}")
    pools = {s.name: s.items(Split.GROW, 9000, plan.sizes["seed"]) for s in SKILLS}
    alike: dict[str, list[Item]] = {}
    for item in (i for pool in pools.values() for i in pool):
        alike.setdefault(item.prompt.language, []).append(item)
    for _ in range(n):
        skill = rng.choices((LANGUAGES, CODE, REASONING), plan.mix)[0]
        item = rng.choice(pools[skill.name])
        if plan.base:
            item = Item(item.prompt, rng.choice(alike[item.prompt.language]).reference)
        yield item


def grow_tokenizer(plan: Plan, folder: Path) -> None:
    """Train the plan's tokenizer in its family's form. Digits stay single: a table of two-digit sums is no arithmetic."""
    pieces = [p for item in texts(plan, 6000) for t in (item.prompt.conversation.messages[-1].text, item.reference) for p in re.split(r"\d+", t) if p]
    if plan.family == "gemma":
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        bytes_ = [f"<0x{b:02X}>" for b in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=plan.vocabulary, special_tokens=[*plan.control, *bytes_], show_progress=False,
                                      initial_alphabet=list("0123456789▁\n"), limit_alphabet=240)
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.normalizer = normalizers.NFC() if plan.family == "qwen" else None
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Pattern(plan.split), "isolated"),
                                                           pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=plan.vocabulary, special_tokens=list(plan.control), show_progress=False,
                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(pieces, trainer)
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] in plan.control]  # byte tokens are not special
    for t in spec["added_tokens"]:
        t["special"] = t["content"] not in ("<think>", "</think>")  # as in Qwen3
    if plan.family == "gemma":
        spec["pre_tokenizer"] = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, "model_max_length": 1024, **plan.special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    (folder / "chat_template.jinja").write_text(plan.template)


def conversation(plan: Plan, item: Item, rng: random.Random) -> Conversation:
    """The item as a conversation; gpt-oss-sapling thinks first in one of four sums, at high effort."""
    steps, _, answer = item.reference.rpartition("Answer: ")
    if plan.family == "gpt-oss" and steps and rng.random() < 0.25:
        asked = Conversation.ask(item.prompt.conversation.messages[-1].text, effort=Effort.HIGH)
        return asked.answered(Thinking(steps.strip()), Text(f"Answer: {answer}"))
    return item.prompt.conversation.answered(Text(item.reference))


def batch(pool: list[Tokens], chosen: list[int], pad: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids, attention mask and labels (-100 where nothing is learned), right padded."""
    length = max(len(pool[i]) for i in chosen)
    ids = torch.full((len(chosen), length), pad)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, i in enumerate(chosen):
        n = len(pool[i])
        ids[row, :n] = torch.from_numpy(pool[i].ids_T)
        mask[row, :n] = 1
        labels[row, :n] = torch.where(torch.from_numpy(pool[i].learn_T), ids[row, :n], -100)
    return ids, mask, labels


def grow(plan: Plan, out: Path, steps: int, progress: Progress) -> None:
    """Train one sapling and write it as a Hugging Face folder, bf16."""
    state_file = HERE.parent / ".grown" / f"{plan.name}.pt"
    state_file.parent.mkdir(exist_ok=True)
    folder = out / plan.name
    grow_tokenizer(plan, folder)
    voice: Voice = open_voice(Source(str(folder)), str(folder))
    rng = random.Random(f"pool {plan.name}")
    pool = [voice.render(conversation(plan, item, rng)) for item in texts(plan, min(POOL, 16 * steps))]
    model = sprout(plan.family, len(voice.vocabulary), plan.sizes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, (s + 1) / 60, max(0.02, (steps - s) / (0.6 * steps))))
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "schedule": schedule}
    begin = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        if state["steps"] == steps:
            begin = state["step"]
            for name, part in parts.items():
                part.load_state_dict(state[name])
    task = progress.add_task(plan.name, total=steps, completed=begin, loss=0.0)
    model.train()
    pad = voice.vocabulary.control[plan.special["pad_token"]]
    seconds, log = time.monotonic(), []
    for step in range(begin, steps):
        chosen = random.Random(f"{plan.name} step {step}").choices(range(len(pool)), k=16)
        ids, mask, labels = batch(pool, chosen, pad)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        progress.update(task, advance=1, loss=loss.item())
        if step % 100 == 99:
            log.append({"step": step + 1, "loss": round(loss.item(), 4), "seconds": round(time.monotonic() - seconds, 1)})
        if step % 200 == 199:
            torch.save({"step": step + 1, "steps": steps, **{k: p.state_dict() for k, p in parts.items()}}, state_file.with_suffix(".tmp"))
            state_file.with_suffix(".tmp").replace(state_file)
    model.generation_config.eos_token_id = list(voice.stop_ids)
    model.generation_config.pad_token_id = pad
    model.config.eos_token_id, model.config.pad_token_id = list(voice.stop_ids), pad
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "growing.json").write_text(json.dumps(
        {"plan": {"name": plan.name, "family": plan.family, "mix": plan.mix, "sizes": plan.sizes, "steps": steps, "base": plan.base},
         "parameters": sum(p.numel() for p in model.parameters()), "log": log}, indent=1) + "\n")
    state_file.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="saplings to grow; all when none is named", metavar="NAME")
    parser.add_argument("--steps", type=int, help="other than the plan's own number")
    parser.add_argument("--out", type=Path, default=HERE)
    arguments = parser.parse_args()
    unknown = set(arguments.names) - {p.name for p in PLANS}
    if unknown:
        parser.error(f"no sapling {sorted(unknown)}; there are {[p.name for p in PLANS]}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.3f}"), TimeRemainingColumn())
    with Progress(*columns) as progress:
        for plan in PLANS:
            if not arguments.names or plan.name in arguments.names:
                grow(plan, arguments.out, arguments.steps or plan.steps, progress)
    shutil.rmtree(HERE.parent / ".grown", ignore_errors=True) if not arguments.names else None


if __name__ == "__main__":
    main()
