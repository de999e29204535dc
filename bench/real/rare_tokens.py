"""How often the training text has each new token of the longer vocabulary, by language.

    python -m bench.real.rare_tokens --models FOLDER --cache FOLDER [--count 6000]

Needs the tokenizer that `python -m bench.real` made for these languages and this much text. Writes
bench/results/real_rare_tokens.json.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from statistics import median

from bench.real.__main__ import RESULTS
from bench.real.models import student_speaker
from bench.real.texts import LANGUAGES, train_texts
from bench.real.world import World

RARE = 10  # occurrences


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.real.rare_tokens")
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--count", type=int, default=6000)
    parser.add_argument("--kilobytes", type=int, default=100)
    options = parser.parse_args()
    world = World(options.models, options.cache)
    first_new = len(world.student.vocabulary)
    longer = student_speaker(world.spec(options.count, LANGUAGES, options.kilobytes))
    found = {}
    for language in LANGUAGES:
        texts = [t.text for t in train_texts(language, options.kilobytes)]
        ids = longer.vocabulary.encode_batch(texts)
        times = Counter(i for one in ids for i in one if i >= first_new)
        tokens = sum(map(len, ids))
        found[language] = {
            "tokens": tokens,
            "tokens_in_own_vocabulary": sum(map(len, world.student.vocabulary.encode_batch(texts))),
            "new_tokens_used": len(times),
            "median_occurrences": median(times.values()),
            "share_of_rare_ones": round(sum(n < RARE for n in times.values()) / len(times), 3),
            "share_of_text": round(sum(times.values()) / tokens, 3),
        }
        print(language, found[language], flush=True)
    (RESULTS / "real_rare_tokens.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
