#!/usr/bin/env bash
# tokenizers 0.23.3: `encode_special_tokens`, the switch that makes "</s>" in a user's text plain text, and copies.
#
# Guess: a tokenizer that is saved, written with to_str(), pickled or copied encodes as the original does.
# Seen: the switch is part of none of them. A copy reads control tokens out of plain text again, without a warning:
# after from_str(to_str()), save() and from_file(), pickle (which worker processes use) and copy.deepcopy.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -q --disable-pip-version-check tokenizers==0.23.3
cd "$dir"
"$dir/env/bin/python" - <<'PY'
import copy
import pickle
from importlib.metadata import version

from tokenizers import Tokenizer, models

TEXT = "a</s>b"
original = Tokenizer(models.BPE({c: i for i, c in enumerate("ab</s>")}, []))
original.add_special_tokens(["</s>"])
original.encode_special_tokens = True
original.save("tokenizer.json")
copies = {
    "to_str": Tokenizer.from_str(original.to_str()),
    "save": Tokenizer.from_file("tokenizer.json"),
    "pickle": pickle.loads(pickle.dumps(original)),
    "deepcopy": copy.deepcopy(original),
}
print("tokenizers", version("tokenizers"))
print("original", original.encode(TEXT).tokens)
assert "</s>" not in original.encode(TEXT).tokens
for name, other in copies.items():
    print(f"{name:8}", other.encode(TEXT).tokens)
    assert other.encode(TEXT).tokens == ["a", "</s>", "b"] and not other.encode_special_tokens, name
PY
