#!/usr/bin/env bash
# lm-eval 0.4.13: the grader of IFEval's instruction keywords:letter_frequency.
#
# Guess: an answer is graded against the letter that the prompt asks for.
# Seen: two prompts of IFEval ask for a sign, "#" or "!". The grader takes only a to z: it draws another letter at random,
# without a word, and counts that one. The same answer passes in one run and fails in the next, whatever the model wrote.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -q --disable-pip-version-check --no-deps lm-eval==0.4.13
"$dir/env/bin/pip" install -q --disable-pip-version-check nltk langdetect immutabledict packaging
cd "$dir"
"$dir/env/bin/python" - <<'PY'
import importlib.util
import pathlib
import random
import sys
import types

import nltk

nltk.download = lambda *a, **k: True  # sentences are not counted here
nltk.data.find = lambda *a, **k: None
# lm_eval/tasks/__init__.py imports every dependency of lm-eval; the grader needs none of them
home = pathlib.Path(importlib.util.find_spec("lm_eval").origin).parent
tasks = types.ModuleType("lm_eval.tasks")
tasks.__path__ = [str(home / "tasks")]
sys.modules["lm_eval.tasks"] = tasks
from lm_eval.tasks.ifeval.utils import InputExample, test_instruction_following_strict

# key 1122 of google/IFEval: "Include at least 4 hashtags, starting with '#'"
ARGUMENTS = {"let_relation": "at least", "letter": "#", "let_frequency": 4}


def passes(letter: str, answer: str, seed: int) -> bool:
    random.seed(seed)
    example = InputExample(0, ["keywords:letter_frequency"], "x", [ARGUMENTS | {"letter": letter}])
    return test_instruction_following_strict(example, answer).follow_all_instructions


signs = [passes("#", "####", seed) for seed in range(20)]
words = [passes("#", "eeee eeee", seed) for seed in range(60)]
letters = [passes("b", "bbbb", seed) for seed in range(20)]
print(f"#### passes {sum(signs)} of 20; eeee eeee passes {sum(words)} of 60; bbbb for b {sum(letters)} of 20")
assert not any(signs) and 0 < sum(words) < 60 and all(letters)
PY
