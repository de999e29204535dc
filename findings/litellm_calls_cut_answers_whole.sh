#!/usr/bin/env bash
# litellm 1.108.0: the finish reasons of servers that OpenAI's list does not have.
#
# Guess: litellm hands a reason that it does not know through, or calls the answer an error: a truncated answer must not look whole.
# Seen: every unknown reason becomes `stop`. vLLM's and SGLang's `abort`, DeepSeek's `insufficient_system_resource`, Mistral's
# `model_length` (cut at the context's end), `error`, `cancelled`, `incomplete` come back as `stop`, with `openai/` and with
# `hosted_vllm/`; only `max_tokens` becomes `length`. The server's own word is in `provider_specific_fields` as
# `native_finish_reason`. The same answers streamed: `error` raises, the others end with `stop`.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -q --disable-pip-version-check litellm==1.108.0
cd "$dir"
LITELLM_LOCAL_MODEL_COST_MAP=True "$dir/env/bin/python" - <<'PY' 2> "$dir/log" || { tail -20 "$dir/log"; exit 1; }
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version

import litellm

EXPECTED = {  # a server's reason -> litellm's, and whether a stream raises
    "stop": ("stop", False),
    "length": ("length", False),
    "content_filter": ("content_filter", False),
    "max_tokens": ("length", False),
    "abort": ("stop", False),
    "model_length": ("stop", False),
    "insufficient_system_resource": ("stop", False),
    "incomplete": ("stop", False),
    "cancelled": ("stop", False),
    "error": ("stop", True),
}


class Server(BaseHTTPRequestHandler):
    """Ends half an answer for the reason that the question names."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        reason = body["messages"][-1]["content"]
        half = {"role": "assistant", "content": "half an ans"}
        head = {"id": "x", "created": 1, "model": "m"}
        if body.get("stream"):
            parts = [{"index": 0, "delta": half, "finish_reason": None}, {"index": 0, "delta": {}, "finish_reason": reason}]
            events = [json.dumps({**head, "object": "chat.completion.chunk", "choices": [part]}) for part in parts]
            answer, kind = "".join(f"data: {one}\n\n" for one in [*events, "[DONE]"]), "text/event-stream"
        else:
            choice = {"index": 0, "message": half, "finish_reason": reason}
            usage = {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4}
            answer = json.dumps({**head, "object": "chat.completion", "choices": [choice], "usage": usage})
            kind = "application/json"
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer.encode())

    def log_message(self, *arguments):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
print("litellm", version("litellm"))
for reason, (expected, raises) in EXPECTED.items():
    asked = {"api_base": f"http://127.0.0.1:{server.server_port}/v1", "api_key": "none",
             "messages": [{"role": "user", "content": reason}]}
    seen = {}
    for provider in ("openai", "hosted_vllm"):
        choice = litellm.completion(model=f"{provider}/m", **asked).choices[0]
        seen[provider] = choice.finish_reason
        own = (choice.provider_specific_fields or {}).get("native_finish_reason", reason)
        assert own == reason, own
    try:
        seen["stream"] = [c.choices[0].finish_reason for c in litellm.completion(model="openai/m", stream=True, **asked)][-1]
    except Exception as error:
        seen["stream"] = type(error).__name__
    print(f"{reason}: {seen}")
    assert seen["openai"] == seen["hosted_vllm"] == expected
    assert seen["stream"] == ("MidStreamFallbackError" if raises else expected)
PY
