#!/usr/bin/env bash
# llama.cpp b11549 (xllamacpp 2026.10.11549): the native route /completion with n_probs and return_tokens.
#
# Guess: `tokens` and `completion_probabilities` have the same length; a logit bias, top_k and a grammar change the
# log-probabilities that are returned; the first token of a character that needs several has an entry as any other.
# Seen: a character of several tokens has ONE entry: the id and number of its last token beside the bytes of all, so the
# two lists cannot be zipped, and the earlier tokens' numbers are nowhere. A lone first token of a character has no
# entry at all. Numbers are those of the raw softmax whatever is forced: a token made certain by a logit bias of 1000
# comes with its own unbiased log-probability, and top_logprobs are those of the unforced position. So given text CAN be
# scored on this route, one forced token at a time; half characters by forcing a letter beside them.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -q --disable-pip-version-check gguf==0.19.0 xllamacpp==2026.10.11549 numpy==2.4.6
cd "$dir"
cat > tiny.py <<'PY'
import gguf
import numpy as np


def byte_characters():
    """GPT-2's printable character of each byte."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    return {b: chr(b) for b in shown} | {b: chr(256 + k) for k, b in enumerate(hidden)}


def make(path, pre):
    """A random llama of one layer whose tokenizer has 256 bytes and three merges."""
    merges = [("1", "2"), ("Ġ", "Ġ"), ("h", "i")]
    characters = byte_characters()
    tokens = ["<|end|>", *(characters[b] for b in range(256)), *(a + b for a, b in merges)]
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
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3, *[1] * (size - 1)])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_eos_token_id(0)
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
        return json.load(urllib.request.urlopen(request, timeout=60))

    post.server = server  # it lives as long as the function
    return post
PY
"$dir/env/bin/python" - <<'PY' 2> "$dir/log" || { tail -5 "$dir/log"; exit 1; }
from importlib.metadata import version

from tiny import make, serve

make("tiny.gguf", "gpt-2")
post = serve("tiny.gguf")
print("xllamacpp", version("xllamacpp"))
prompt = post("/tokenize", {"content": "hi there", "add_special": False})["tokens"]
letter, thai = (post("/tokenize", {"content": t, "add_special": False})["tokens"] for t in ("a", "\u0e01"))
assert len(letter) == 1 and len(thai) == 3


def forced(ids, token, **more):
    body = {"prompt": ids, "n_predict": 1, "n_probs": 260, "return_tokens": True, "temperature": 0}
    answer = post("/completion", body | {"logit_bias": [[token, 1000.0]]} | more)
    assert answer["tokens"] == [token]
    return answer.get("completion_probabilities") or []


(plain,) = forced(prompt, letter[0])
(other,) = forced(prompt, letter[0] + 1, top_k=1)
rows = [{e["id"]: e["logprob"] for e in one["top_logprobs"]} for one in (plain, other)]
shift = max(abs(rows[0][i] - rows[1][i]) for i in rows[0])
print(f"two tokens forced: rows differ by {shift:.1e}, own number {plain['logprob']:.3f}, listed {rows[0][letter[0]]:.3f}")
assert shift < 1e-4 and abs(plain["logprob"] - rows[0][letter[0]]) < 1e-4 and plain["logprob"] < -1
first = forced(prompt, thai[0])
print("first token of a Thai letter:", len(first), "entries")
assert first == []
grammar = 'root ::= "\u0e01" "\u0e01"'
body = {"prompt": prompt, "n_predict": 6, "n_probs": 2, "return_tokens": True, "temperature": 0, "grammar": grammar}
answer = post("/completion", body)
entries = answer["completion_probabilities"]
content = [i for i in answer["tokens"] if i != 0]
print("tokens", content, "entries", [(e["id"], e["bytes"]) for e in entries])
assert content[:6] == thai * 2 and [e["id"] for e in entries[:2]] == [thai[-1]] * 2
assert all(bytes(e["bytes"]).decode() == "\u0e01" for e in entries[:2]) and len(entries) < len(answer["tokens"])
PY
