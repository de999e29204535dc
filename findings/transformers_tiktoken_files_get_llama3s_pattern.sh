#!/usr/bin/env bash
# transformers 5.24.0 with tiktoken 0.14.0: a folder whose tokenizer is a tiktoken.model file.
#
# Guess: the file's tokens are used with the split pattern of the model's family, or the folder is refused, because a
# tiktoken file holds no pattern.
# Seen: every folder gets Llama 3's pattern, whatever config.json says. A family that splits numbers into single digits
# (Qwen) gets tokens of three digits, and Chinese and Latin letters, which others split (Kimi), stay one word.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -q --disable-pip-version-check transformers==5.24.0 tiktoken==0.14.0
cd "$dir"
"$dir/env/bin/python" - <<'PY'
import base64
import json
import os
from importlib.metadata import version

from transformers import AutoTokenizer

TOKENS = [*(bytes([b]) for b in range(256)), b"12", b"123", "你好".encode(), "你好a".encode()]
print("transformers", version("transformers"), "tiktoken", version("tiktoken"))
for family in ("llama", "qwen2", "deepseek_v3"):
    os.makedirs(family)
    with open(f"{family}/tiktoken.model", "w") as file:
        for i, raw in enumerate(TOKENS):
            file.write(f"{base64.b64encode(raw).decode()} {i}\n")
    with open(f"{family}/config.json", "w") as file:
        json.dump({"model_type": family}, file)
    with open(f"{family}/tokenizer_config.json", "w") as file:
        json.dump({"tokenizer_class": "PreTrainedTokenizerFast"}, file)
    tokenizer = AutoTokenizer.from_pretrained(family)
    splits = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("1234 你好a")
    print(f"{family:12}", [part for part, _ in splits])
    assert r"\p{N}{1,3}" in str(tokenizer.backend_tokenizer.pre_tokenizer), family
    assert [b - a for _, (a, b) in splits] == [3, 1, 4], splits
PY
