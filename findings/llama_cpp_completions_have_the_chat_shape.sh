#!/usr/bin/env bash
# llama.cpp b11549 (xllamacpp 2026.10.11549): what its OpenAI route /v1/completions answers.
#
# Guess: the completions route has OpenAI's completions shape: logprobs.tokens / token_logprobs, `echo` repeats the
# prompt, max_tokens 0 generates nothing, an unknown model or key is an error, usage adds up over several prompts.
# Seen: logprobs have the CHAT shape (content: [{id, token, bytes, logprob, top_logprobs}]); echo is ignored;
# max_tokens 0 generates one token; an unknown model name and unknown keys pass; for a list of two prompts the usage
# is that of one of them. A client that scores given text by echo gets the log-probability of generated text instead.
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
greedy = {"prompt": "hi there", "temperature": 0}
print("xllamacpp", version("xllamacpp"))
one = post("/v1/completions", greedy | {"max_tokens": 1, "logprobs": 2, "echo": True, "model": "none", "x": 1})
choice = one["choices"][0]
print("echo and logprobs:", repr(choice["text"]), sorted(choice["logprobs"]), sorted(choice["logprobs"]["content"][0]))
assert sorted(choice["logprobs"]) == ["content"] and len(choice["logprobs"]["content"]) == 1
assert not choice["text"].startswith("hi")
zero = post("/v1/completions", greedy | {"max_tokens": 0})["usage"]
print("max_tokens 0:", zero["completion_tokens"], "token generated")
assert zero["completion_tokens"] == 1
prompts = ["hi there", "hi"]
alone = [post("/v1/completions", greedy | {"prompt": p, "max_tokens": 1})["usage"]["prompt_tokens"] for p in prompts]
both = post("/v1/completions", greedy | {"prompt": prompts, "max_tokens": 1})
print("prompt tokens one by one", alone, "as a list", both["usage"]["prompt_tokens"], "choices", len(both["choices"]))
assert len(both["choices"]) == 2 and both["usage"]["prompt_tokens"] in alone and len(set(alone)) == 2
PY
