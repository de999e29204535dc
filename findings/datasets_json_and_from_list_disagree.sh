#!/usr/bin/env bash
# datasets 5.2.0: the same rows by load_dataset("json") and by Dataset.from_list().
#
# Guess: both give the same rows.
# Seen: they differ in three ways. (1) Tool calls with different arguments: the file keeps each object as it is, from_list
# adds every other call's keys with None. (2) A text column whose rows are all ISO dates becomes timestamps in the file
# reader (one date that is none, and it stays text), and stays text in from_list. (3) An integer above 2**64 becomes a
# float in the file reader, without a word; from_list raises.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -q --disable-pip-version-check datasets==5.2.0 pyarrow==26.0.1
cd "$dir"
HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1 HF_HOME="$dir/hub" "$dir/env/bin/python" - <<'PY'
import datetime
import json

import datasets


def both(rows: list[dict], name: str) -> tuple[list, object]:
    with open(f"{name}.jsonl", "w") as file:
        file.write("\n".join(json.dumps(row) for row in rows))
    read = [dict(r) for r in datasets.load_dataset("json", data_files=f"{name}.jsonl", split="train")]
    try:
        made: object = [dict(r) for r in datasets.Dataset.from_list(rows)]
    except Exception as error:
        made = type(error).__name__
    print(f"{name}: file {read}, from_list {made}")
    return read, made


print("datasets", datasets.__version__)
calls = [{"calls": [{"name": "f", "arguments": {"x": 1}}]}, {"calls": [{"name": "g", "arguments": {"y": "2"}}]}]
read, made = both(calls, "calls")
assert read == calls and made[0]["calls"][0]["arguments"] == {"x": 1, "y": None}
dates = [{"answer": "2020-05-05"}, {"answer": "1999-12-31"}]
read, made = both(dates, "dates")
assert read[0]["answer"] == datetime.datetime(2020, 5, 5) and made == dates
read, made = both([*dates, {"answer": "soon"}], "texts")
assert read == made
read, made = both([{"answer": 12345678901234567890123}], "large")
assert read == [{"answer": 1.2345678901234568e22}] and isinstance(made, str)
PY
