#!/usr/bin/env bash
# tokenizers 0.23.3: a BPE vocabulary that lacks a character, or a byte, and has no unk_token.
#
# Guess: encoding such a text fails, or marks the place; at least the tokens on both sides stay apart.
# Seen: the character is dropped without an error, and its neighbours are merged ACROSS the gap: "aéb" becomes the one
# token "ab". Its offsets are wrong, too: they cover "aé". The same happens to byte-level vocabularies that lack a byte
# (several published ones do).
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -q --disable-pip-version-check tokenizers==0.23.3
cd "$dir"
"$dir/env/bin/python" - <<'PY'
from importlib.metadata import version

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

print("tokenizers", version("tokenizers"))
plain = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
found = plain.encode("aéb")
print(repr("aéb"), found.tokens, found.offsets)
assert found.tokens == ["ab"]
assert found.offsets == [(0, 2)], found.offsets

byte_level = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
byte_level.decoder = decoders.ByteLevel()
found = byte_level.encode("a\x04b")
print(repr("a\x04b"), found.tokens, repr(byte_level.decode(found.ids)))
assert found.tokens == ["ab"] and byte_level.decode(found.ids) == "ab"
PY
