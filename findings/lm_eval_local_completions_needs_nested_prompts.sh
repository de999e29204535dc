#!/usr/bin/env bash
# lm-eval 0.4.13: what `--model local-completions` asks of a server with OpenAI's completions route.
#
# Guess: one request is one prompt, a text or a list of token ids; log-likelihoods are asked with max_tokens 0 and echo.
# Seen: by default (tokenized_requests=True) `prompt` is a list of LISTS of ids even for a single request, so a server
# that takes one list of ids cannot be measured; with tokenized_requests=False it is one plain string. Log-likelihoods
# are asked with max_tokens 1, echo true, `logprobs: 1` and `seed: 1234`; the client drops the entry of the generated token.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -q --disable-pip-version-check torch==2.13.0
"$dir/env/bin/pip" install -q --disable-pip-version-check "lm-eval[api]==0.4.13" transformers==5.24.0
cd "$dir"
HF_HUB_OFFLINE=1 HF_HOME="$dir/hub" TOKENIZERS_PARALLELISM=false "$dir/env/bin/python" - <<'PY' 2> "$dir/log" || { tail -20 "$dir/log"; exit 1; }
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version

from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

BODIES = []


class Server(BaseHTTPRequestHandler):
    """Answers every completion with a log-probability of -1 a token."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        BODIES.append(body)
        prompts = body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]
        choices = []
        for k, prompt in enumerate(prompts):
            n = len(prompt) + 1
            tokens = [str(j) for j in range(n)]
            choices.append({"index": k, "text": "x", "finish_reason": "length", "logprobs": {
                "tokens": tokens, "token_logprobs": [None, *[-1.0] * (n - 1)],
                "top_logprobs": [None, *[{t: -1.0} for t in tokens[1:]]], "text_offset": list(range(n))}})
        answer = json.dumps({"choices": choices, "model": "m", "object": "text_completion"}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *arguments):
        pass


letters = sorted(pre_tokenizers.ByteLevel.alphabet())
backend = Tokenizer(models.BPE({c: k for k, c in enumerate(letters)} | {"<end>": len(letters)}, []))
backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>").save_pretrained("tokenizer")
server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
url = f"http://127.0.0.1:{server.server_port}/v1/completions"
print("lm-eval", version("lm-eval"))
for tokenized in (True, False):
    BODIES.clear()
    model = LocalCompletionsAPI(
        base_url=url, model="m", tokenizer="tokenizer", tokenizer_backend="huggingface",
        tokenized_requests=tokenized, num_concurrent=1, max_retries=1,
    )
    ask = Instance("loglikelihood", {}, ("ab", " cd"), 0)
    got = model.loglikelihood([ask], disable_tqdm=True)
    (body,) = BODIES
    print("tokenized_requests", tokenized, json.dumps(body), "->", got)
    assert body["prompt"] == ([[64, 65, 220, 66, 67]] if tokenized else "ab cd")
    assert got == [(-3.0, True)]  # three tokens of the continuation; the fourth answer entry is not counted
    assert (body["max_tokens"], body["echo"], body["logprobs"], body["seed"]) == (1, True, 1, 1234)
PY
