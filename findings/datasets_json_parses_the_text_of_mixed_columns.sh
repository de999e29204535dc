#!/usr/bin/env bash
# datasets 5.2.0: load_dataset("json") on chat data whose `content` is a text in some rows and a list of parts in others
# (the OpenAI form), or whose `arguments` is an object in some rows and JSON text in others.
#
# Guess: the column is refused, or each row comes back as it was written.
# Seen: the column becomes `Json`, and every TEXT in it that happens to be valid JSON is parsed: "007" comes back as the
# number 7, "1e3" as 1000.0, "true" as True, "null" and "NaN" as None, '"quoted"' without its quotes; JSON text becomes
# an object. A user's message "5" is then the integer 5, and "null" is no message at all. Nothing is logged.
# Texts that are not JSON are untouched, so the fault shows only in some rows. The same file read by
# Dataset.from_list(rows) is refused with an ArrowInvalid error.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -q --disable-pip-version-check datasets==5.2.0 pyarrow==26.0.1
cd "$dir"
HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1 HF_HOME="$dir/hub" "$dir/env/bin/python" - <<'PY'
import json

import datasets

PARTS = [{"type": "text", "text": "hi"}]
TEXTS = ["hello", "007", "1e3", "true", "null", "NaN", '"quoted"', '{"x": 1}']
SEEN = ["hello", 7, 1000.0, True, None, None, "quoted", {"x": 1}]


def load(rows: list[dict], name: str) -> datasets.Dataset:
    with open(f"{name}.jsonl", "w") as file:
        file.write("\n".join(json.dumps(row) for row in rows))
    return datasets.load_dataset("json", data_files=f"{name}.jsonl", split="train")


print("datasets", datasets.__version__)
chats = [[{"role": "user", "content": content}] for content in (*TEXTS, PARTS)]
read = load([{"messages": chat} for chat in chats], "mixed")
contents = [row["messages"][0]["content"] for row in read]
for text, content in zip(TEXTS, contents, strict=False):
    print(f"written {text!r}, read {content!r}")
assert contents == [*SEEN, PARTS], "texts of a mixed column come back in another way now"

plain = load([{"messages": chat} for chat in chats[:-1]], "texts")
assert [row["messages"][0]["content"] for row in plain] == TEXTS  # without a list in the column all is well
try:
    datasets.Dataset.from_list([{"messages": chat} for chat in chats])
    refused = False
except Exception as error:
    refused = True
    print("from_list:", type(error).__name__)
assert refused
PY
