#!/usr/bin/env bash
# llama.cpp b11549 (xllamacpp 2026.10.11549), route /completion with return_tokens: the same answer streamed and whole.
#
# Guess: the tokens of all events of a stream are the tokens of the answer.
# Seen: where several tokens make up a character, the stream has the id of the last of them only, as it holds the text
# back until the character is whole; the answer that is not streamed has them all.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -q --disable-pip-version-check gguf==0.19.0 xllamacpp==2026.10.11549
cd "$dir"
cat > tiny.py <<'PY'
import gguf
import numpy as np


def byte_characters():
    """GPT-2's printable character of each byte."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    return {b: chr(b) for b in shown} | {b: chr(256 + k) for k, b in enumerate(hidden)}


def make(path):
    """A random llama of one layer whose tokenizer has 256 bytes."""
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
    writer.add_add_bos_token(False)
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
        answer = urllib.request.urlopen(request, timeout=60).read().decode()
        if not body.get("stream"):
            return json.loads(answer)
        lines = [line[5:].strip() for line in answer.splitlines() if line.startswith("data:")]
        return [json.loads(line) for line in lines if line != "[DONE]"]

    post.server = server  # it lives as long as the function
    return post
PY
OMP_NUM_THREADS=1 "$dir/env/bin/python" - 2> run.log <<'PY' || { tail -5 run.log; exit 1; }
import os

from tiny import make, serve

make("tiny.gguf")
post = serve("tiny.gguf")
body = {
    "prompt": [10, 11, 12], "n_predict": 16, "temperature": 0, "return_tokens": True,
    "grammar": 'root ::= "h\u00e9"',  # the only answer, so that the weights do not matter
}
whole = post("/completion", body | {"stream": False})["tokens"]
events = post("/completion", body | {"stream": True})
streamed = [token for event in events for token in event.get("tokens", [])]
text = "".join(event.get("content", "") for event in events)
print(f"the answer {text!r}: whole {whole}, streamed {streamed}", flush=True)
expected = [2 + b for b in "h\u00e9".encode()]
is_same = whole[:3] == expected and streamed[:2] == [expected[0], expected[2]] and expected[1] not in streamed
if not is_same:
    print("changed", flush=True)
os._exit(0 if is_same else 1)  # the server ends with the process
PY
