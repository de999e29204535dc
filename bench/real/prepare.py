"""python -m bench.real.prepare FOLDER: all that recipes/real.yaml names, and a copy of it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.real.texts import ENGLISH, LANGUAGES, held_out, train_texts
from bench.real.world import World
from persea.models.tokenizer_files import copy_tokenizer_files
from persea.storage import open_atomic_folder, write_atomic

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "real.yaml"
SCORED = 8  # kilobytes of each language in which the teacher finds likely tokens
ASKED = (
    "What is the capital of France?",
    "Name three fruits.",
    "Say hello to my friend Anna.",
    "What do bees make?",
    "Write one sentence about the sea.",
    "How many days has a week?",
    "What is the opposite of cold?",
    "Give me a short tip for better sleep.",
    "What colour is the sky on a clear day?",
    "Write a polite reply to an invitation.",
    "Which animal barks?",
    "What is 7 plus 5?",
    "Explain what a library is in one sentence.",
    "Name a country in Asia.",
    "What is water made of?",
    "Write a title for a story about a lost dog.",
    "What do we use a thermometer for?",
    "Name two kinds of weather.",
    "How do I boil an egg?",
    "What is the largest planet of the solar system?",
    "Give one reason to learn a language.",
    "What does a doctor do?",
    "Translate 'good morning' into Spanish.",
    "Who wrote Romeo and Juliet?",
)


def write_lines(path: Path, rows: Sequence[object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomic(path, text.encode())


def write_texts(folder: Path, kilobytes: int) -> None:
    """Write training and held-out documents of each language, and the prompts for the chat."""
    for language in (*LANGUAGES, ENGLISH):
        for part, texts in (
            ("train", train_texts(language, kilobytes)),
            ("test", held_out(language, "test")),
        ):
            write_lines(folder / f"{language}.{part}.jsonl", [{"text": t.text} for t in texts])
    write_lines(folder / "chat.jsonl", [{"prompt": prompt} for prompt in ASKED])


def write_student(world: World, folder: Path, count: int, kilobytes: int) -> None:
    """Write SmolLM2 with about `count` tokens of the teacher's vocabulary."""
    from bench.real.extension import extend
    from bench.real.models import load

    source = world.student_folder
    model = load(source, torch.float32)
    spec = world.spec(count, LANGUAGES, min(kilobytes, SCORED))
    longer = extend(model, world.student, spec, "ridge", world.teacher)
    with open_atomic_folder(folder) as part:
        model.save_pretrained(part)
        copy_tokenizer_files(source, part)
        (part / "tokenizer.json").write_text(spec, encoding="utf-8")
    print(f"student: {len(longer.vocabulary):,} tokens, {len(world.student.vocabulary):,} before")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.real.prepare")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kilobytes", type=int, default=12, help="training text of a language")
    parser.add_argument(
        "--new-tokens",
        type=int,
        default=0,
        help="tokens of Gemma's vocabulary to add to the student; with 12 kB of text their rows "
        "are not learned (bench/results/real-run-extended.json)",
    )
    options = parser.parse_args()
    torch.set_num_threads(2)
    folder: Path = options.folder
    write_texts(folder / "texts", options.kilobytes)
    recipe = RECIPE.read_text(encoding="utf-8")
    if options.new_tokens:
        if not (folder / "student" / "config.json").is_file():
            world = World(folder, folder / "kept")
            write_student(world, folder / "student", options.new_tokens, options.kilobytes)
        recipe = recipe.replace(
            "model: ./smollm2   # the student", "model: ./student   # extended", 1
        )
    write_atomic(folder / "real.yaml", recipe.encode())
    print(f"wrote {folder / 'real.yaml'}")


if __name__ == "__main__":
    main()
