#!/usr/bin/env bash
# transformers 5.24.0: `transformers serve`, its OpenAI routes.
#
# Guess: a stream ends with `data: [DONE]`; `logprobs`, `echo` and `n` are obeyed or refused, since unknown keys are
# refused with 422; a stream says the same text as a plain answer.
# Seen: no [DONE] (the last event has finish_reason and, unasked, usage). `logprobs: true` and `n: 3` on chat and `echo`
# and `logprobs` on completions are accepted and ignored: one choice, no log-probabilities, no prompt. A list of token
# ids is refused. Where max_tokens cuts a character in two, the plain answer ends with U+FFFD and the stream drops it.
set -euo pipefail
dir=$(mktemp -d)
server=
trap '[ -z "$server" ] || kill "$server" 2>/dev/null || true; wait 2>/dev/null || true; rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -q --disable-pip-version-check torch==2.13.0
"$dir/env/bin/pip" install -q --disable-pip-version-check "transformers[serving]==5.24.0"
cd "$dir"
export HF_HUB_OFFLINE=1 HF_HOME="$dir/hub" TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
"$dir/env/bin/python" - <<'PY' > make.log 2>&1 || { cat make.log; exit 1; }
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

torch.manual_seed(0)
letters = sorted(pre_tokenizers.ByteLevel.alphabet())
backend = Tokenizer(models.BPE({c: k for k, c in enumerate(letters)} | {"<end>": 256, "<bos>": 257}, []))
backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", bos_token="<bos>")
tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
tokenizer.save_pretrained("m")
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
config = LlamaConfig(vocab_size=258, max_position_embeddings=256, bos_token_id=257, eos_token_id=256, **sizes)
LlamaForCausalLM(config).save_pretrained("m")
PY
port=$("$dir/env/bin/python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
"$dir/env/bin/transformers" serve --host 127.0.0.1 --port "$port" > serve.log 2>&1 &
server=$!
"$dir/env/bin/python" - "$port" "$dir/m" <<'PY' || { tail -5 serve.log; exit 1; }
import json
import sys
import time
import urllib.error
import urllib.request
from importlib.metadata import version

url, model = f"http://127.0.0.1:{sys.argv[1]}", sys.argv[2]


def post(route, **body):
    data = json.dumps({"model": model, "temperature": 0} | body).encode()
    request = urllib.request.Request(url + route, data, {"Content-Type": "application/json"})
    try:
        return 200, urllib.request.urlopen(request, timeout=60).read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


for _ in range(120):
    try:
        urllib.request.urlopen(url + "/health", timeout=2)
        break
    except OSError:
        time.sleep(0.5)
print("transformers", version("transformers"))
chat, completions = "/v1/chat/completions", "/v1/completions"
hi = [{"role": "user", "content": "hi"}]
_, stream = post(chat, messages=hi, max_tokens=3, stream=True)
events = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
print("[DONE] in the stream:", "[DONE]" in stream, "usage in the last event:", "usage" in events[-1])
assert "[DONE]" not in stream and events[-1]["choices"][0]["finish_reason"] == "length" and "usage" in events[-1]
streamed = "".join(e["choices"][0]["delta"].get("content", "") for e in events)
plain = json.loads(post(chat, messages=hi, max_tokens=3)[1])["choices"][0]["message"]["content"]
print("plain", ascii(plain), "streamed", ascii(streamed))
assert plain == streamed + "\ufffd"
status, text = post(chat, messages=hi, max_tokens=2, logprobs=True, top_logprobs=2, n=3)
choices = json.loads(text)["choices"]
print("chat with logprobs and n=3:", status, len(choices), "choice, keys", sorted(choices[0]))
assert status == 200 and len(choices) == 1 and "logprobs" not in choices[0]
status, text = post(completions, prompt="hi", max_tokens=2, echo=True, logprobs=1)
choice = json.loads(text)["choices"][0]
print("completions with echo and logprobs:", status, sorted(choice), ascii(choice["text"]))
assert status == 200 and "logprobs" not in choice and not choice["text"].startswith("hi")
print("unknown key:", *post(chat, messages=hi, max_tokens=2, nothing=1))
assert post(chat, messages=hi, max_tokens=2, nothing=1)[0] == 422
print("token ids:", *post(completions, prompt=[1, 2], max_tokens=1))
assert post(completions, prompt=[1, 2], max_tokens=1)[0] >= 400
PY
