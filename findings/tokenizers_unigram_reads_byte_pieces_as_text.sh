#!/usr/bin/env bash
# tokenizers 0.23.3 against sentencepiece 0.2.3: a Unigram model with byte fallback and the text "<0x41>".
#
# Guess: the byte pieces <0x00>..<0xFF> stand for bytes that no other piece spells; a text that contains the six
# characters "<0x41>" is spelt by characters and comes back as it was.
# Seen: sentencepiece does that. tokenizers' Unigram matches the byte piece's NAME in the text: "<0x41>" becomes the
# single token for byte 0x41, and the usual ByteFallback decoder returns "A". A converted Unigram tokenizer is
# therefore not lossless on such text, and gives other ids than the original.
# Also seen: the byte pieces' scores do not matter; a listed character with score -1000 beats bytes with score 0.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -q --disable-pip-version-check tokenizers==0.23.3 sentencepiece==0.2.3
cd "$dir"
"$dir/env/bin/python" - <<'PY'
import string
from importlib.metadata import version

import sentencepiece
from tokenizers import Tokenizer, decoders, models

TEXT = "<0x41>"
with open("corpus.txt", "w") as file:
    for k in range(400):
        file.write(" ".join(string.ascii_letters[(k + j) % 52] * 2 for j in range(8)) + " <0 x41> 0x41\n")
sentencepiece.SentencePieceTrainer.train(
    input="corpus.txt", model_prefix="m", vocab_size=319, model_type="unigram", byte_fallback=True,
    character_coverage=1.0, add_dummy_prefix=False, minloglevel=2,
)
original = sentencepiece.SentencePieceProcessor(model_file="m.model")
pieces = [(original.id_to_piece(i), original.get_score(i)) for i in range(original.get_piece_size())]
converted = Tokenizer(models.Unigram(pieces, original.unk_id(), byte_fallback=True))
converted.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
there, here = original.encode(TEXT, out_type=str), converted.encode(TEXT).tokens
back = converted.decode(converted.encode(TEXT).ids)
print("tokenizers", version("tokenizers"), "sentencepiece", version("sentencepiece"))
print("sentencepiece", there, "->", repr(original.decode(original.encode(TEXT))))
print("tokenizers   ", here, "->", repr(back))
assert len(there) > 1 and original.decode(original.encode(TEXT)) == TEXT
assert here == ["<0x41>"] and back == "A", "the converted tokenizer now spells the text"

rare = [("<unk>", 0.0), ("é", -1000.0), *((f"<0x{b:02X}>", 0.0) for b in range(256))]
chosen = Tokenizer(models.Unigram(rare, 0, byte_fallback=True)).encode("é").tokens
print("é listed at -1000, bytes at 0:", chosen)
assert chosen == ["é"]
PY
