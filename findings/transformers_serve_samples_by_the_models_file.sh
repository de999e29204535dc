#!/usr/bin/env bash
# transformers 5.24.0: `transformers serve` and the temperature of a request.
#
# Guess: `temperature` above 0 samples, as on every OpenAI route; `seed` decides the draw.
# Seen: without do_sample: true in the model's own generation_config.json every temperature and every seed gives the
# greedy words, with status 200. With do_sample: true in the file the same requests draw.
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
import json, shutil
shutil.copytree("m", "drawn")
settings = json.load(open("drawn/generation_config.json"))
json.dump(settings | {"do_sample": True}, open("drawn/generation_config.json", "w"))
PY
port=$("$dir/env/bin/python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
"$dir/env/bin/transformers" serve --host 127.0.0.1 --port "$port" > serve.log 2>&1 &
server=$!
"$dir/env/bin/python" - "$port" "$dir" <<'PY' || { tail -5 serve.log; exit 1; }
import json
import sys
import time
import urllib.error
import urllib.request
from importlib.metadata import version

url, folder = f"http://127.0.0.1:{sys.argv[1]}", sys.argv[2]


def post(**body):
    data = json.dumps({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 12} | body).encode()
    request = urllib.request.Request(url + "/v1/chat/completions", data, {"Content-Type": "application/json"})
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


def words(model, **body):
    status, text = post(model=f"{folder}/{model}", **body)
    return json.loads(text)["choices"][0]["message"]["content"] if status == 200 else (status, text[:120])


greedy = words("m", temperature=0)
hot = {words("m", temperature=5.0, seed=seed) for seed in range(4)}
print("temperature 5, four seeds, no do_sample in the file:", len(hot), "answer, the greedy one:", hot == {greedy})
assert hot == {greedy}
drawn = {words("drawn", temperature=5.0, seed=seed) for seed in range(4)}
print("with do_sample in the file:", len(drawn), "answers")
assert len(drawn) == 4
PY
