#!/usr/bin/env bash
# transformers 5.24.0 reading GGUF tokenizers, beside llama.cpp b11549 (xllamacpp 2026.10.11549) on the same files: BOS.
#
# Guess: whether a text begins with BOS is what `tokenizer.ggml.add_bos_token` says, and one rule decides where a file
# lacks that key.
# Seen: where the key is there, both follow it. Where it is missing, llama.cpp puts BOS before a text for the pre-tokenizer
# llama-bpe, transformers does not, and neither does the tokenizer that transformers saves: the first token of every
# text differs.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -q --disable-pip-version-check gguf==0.19.0 xllamacpp==2026.10.11549 \
  torch==2.13.0 transformers==5.24.0
cd "$dir"
cat > tiny.py <<'PY'
import gguf
import numpy as np


def byte_characters():
    """GPT-2's printable character of each byte."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    return {b: chr(b) for b in shown} | {b: chr(256 + k) for k, b in enumerate(hidden)}


def make(path, adds_bos):
    """A random llama of one layer whose tokenizer has 256 bytes; None = add_bos_token is not in the file."""
    merges = [("h", "i")]
    characters = byte_characters()
    tokens = ["<|end|>", "<|begin|>", *(characters[b] for b in range(256)), *(a + b for a, b in merges)]
    writer, width, inner, size = gguf.GGUFWriter(path, "llama"), 32, 64, len(tokens)
    writer.add_context_length(256)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width // 4)
    writer.add_vocab_size(size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, *[1] * (size - 2)])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(1)
    if adds_bos is not None:
        writer.add_add_bos_token(adds_bos)
    dice = np.random.default_rng(0)
    shapes = {"token_embd": (size, width), "output": (size, width), "blk.0.ffn_down": (width, inner)}
    shapes |= {f"blk.0.attn_{n}": (width, width) for n in ("q", "k", "v", "output")}
    shapes |= {f"blk.0.ffn_{n}": (inner, width) for n in ("gate", "up")}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", (0.3 * dice.standard_normal(shape)).astype(np.float32))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(width, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def serve(path):
    """llama.cpp's own HTTP server on a free port of this machine; a function that posts to it."""
    import json
    import urllib.request

    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.warmup, params.n_parallel = path, 256, False, 1
    params.cpuparams.n_threads = 1
    server = xllamacpp.Server(params)

    def post(route, body):
        request = urllib.request.Request(
            server.listening_address + route, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        return json.load(urllib.request.urlopen(request, timeout=60))

    post.server = server  # it lives as long as the function
    return post
PY
HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 "$dir/env/bin/python" - 2> run.log <<'PY' || { tail -5 run.log; exit 1; }
import os

from tiny import make, serve
from transformers import AutoTokenizer

seen, servers = {}, []
for adds_bos in (None, False, True):
    name = f"{adds_bos}.gguf"
    make(name, adds_bos)
    servers.append(serve(name))  # kept: one that ends right behind its first answer may never end
    theirs = servers[-1]("/tokenize", {"content": "hi", "add_special": True})["tokens"]
    tokenizer = AutoTokenizer.from_pretrained(".", gguf_file=name)
    own = tokenizer("hi").input_ids
    tokenizer.save_pretrained(f"saved-{adds_bos}")
    again = AutoTokenizer.from_pretrained(f"saved-{adds_bos}")("hi").input_ids
    seen[adds_bos] = [ids[:1] == [1] for ids in (theirs, own, again)]
    print(f"add_bos_token {adds_bos}: llama.cpp {theirs}, transformers {own}, saved and opened again {again}", flush=True)
is_same = seen == {None: [True, False, False], False: [False] * 3, True: [True] * 3}
if not is_same:
    print(f"changed: {seen}", flush=True)
os._exit(0 if is_same else 1)  # the servers end with the process
PY
