"""Export models to GGUF, load each in a real llama.cpp, compare greedy tokens with transformers.

    python bench/export.py [MODEL_FOLDER ...] [--out bench/results/export.json]

Without folders: the saplings that llama.cpp has an architecture for. llama.cpp comes from the wheel
xllamacpp, in a virtual environment of its own; PERSEA_LLAMACPP_PYTHON names a Python that has it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

import torch

from persea.export.gguf_file import GgufPrecision, write_gguf

ROOT = Path(__file__).resolve().parent.parent
LLAMACPP = "xllamacpp==2026.10.11549"
SAPLINGS = tuple(ROOT / "saplings" / f"{name}-sapling" for name in ("llama", "qwen", "gemma"))
QUESTIONS = (
    "What is 7 + 5?",
    "Write a Python function that returns the larger of two numbers.",
    "Terjemahkan: selamat pagi.",
    "안녕하세요?\n\nเที่ยวทะเลไหม",
)
NEW_TOKENS = 24
CLIENT = """
import json, sys, urllib.request, xllamacpp
path, jobs = sys.argv[1], json.load(open(sys.argv[2]))
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.warmup, params.n_parallel = path, 1024, False, 1
params.cpuparams.n_threads = 1
server = xllamacpp.Server(params)
def post(route, body):
    request = urllib.request.Request(
        server.listening_address + route, json.dumps(body).encode(),
        {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(request, timeout=300))
told = []
for job in jobs:
    text = {"content": job["text"], "add_special": False, "parse_special": True}
    tokens = post("/tokenize", text)
    answer = post("/completion", {"prompt": job["ids"], "n_predict": job["n"], "temperature": 0,
                                  "return_tokens": True, "top_k": 1, "cache_prompt": False})
    chat = post("/apply-template", {"messages": job["messages"]})
    told.append({"ids": tokens["tokens"], "new": answer["tokens"], "prompt": chat["prompt"]})
json.dump(told, open(sys.argv[3], "w"))
import os
os._exit(0)
"""


def llamacpp_python(folder: Path) -> str:
    """Return a Python that has xllamacpp; make one if none is named."""
    if named := os.environ.get("PERSEA_LLAMACPP_PYTHON"):
        return named
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "-q", LLAMACPP], check=True)
    return python


def greedy(model: Any, ids: list[int], stop_ids: set[int]) -> tuple[list[int], float]:
    """Return transformers' greedy tokens, and the smallest lead of a chosen token in nats."""
    new, lead = list[int](), float("inf")
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            logits = model(torch.tensor([ids + new])).logits[0, -1].float()
            best = logits.topk(2).values
            lead = min(lead, float(best[0] - best[1]))
            new.append(int(logits.argmax()))
            if new[-1] in stop_ids:
                break
    return new, lead


def compare(folder: Path, python: str, work: Path) -> dict[str, Any]:
    """Export one model, ask llama.cpp and transformers the same, and return both answers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    file = write_gguf(folder, work / f"{folder.name}.gguf", folder.name, GgufPrecision.F32)
    eos = model.generation_config.eos_token_id
    stop_ids = set(eos if isinstance(eos, list) else [eos])
    jobs, expected = [], []
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        jobs.append({"text": text, "ids": ids, "n": NEW_TOKENS, "messages": messages})
        expected.append(greedy(model, ids, stop_ids))
    (work / "jobs.json").write_text(json.dumps(jobs))
    (work / "client.py").write_text(CLIENT)
    subprocess.run(
        [python, "client.py", str(file.path), "jobs.json", "told.json"],
        check=True,
        cwd=work,
        stderr=subprocess.DEVNULL,
        timeout=900,
    )
    told = json.loads((work / "told.json").read_text())
    answers = []
    for job, (new, lead), one in zip(jobs, expected, told, strict=True):
        # llama.cpp returns no stop token, or returns it as the last
        text = [i for i in new if i not in stop_ids]
        answers.append(
            {
                "prompt_ids_equal": one["ids"] == job["ids"],
                "template_equal": _without_bos(one["prompt"], tokenizer)
                == _without_bos(job["text"], tokenizer),
                "greedy_equal": [i for i in one["new"] if i not in stop_ids] == text,
                "tokens": len(text),
                "smallest_lead_nats": round(lead, 4),
            }
        )
    return {
        "model": folder.name,
        "architecture": file.architecture,
        "tensors": file.num_tensors,
        "answers": answers,
    }


def _without_bos(text: str, tokenizer: Any) -> str:
    return text.removeprefix(tokenizer.bos_token or "")


def main() -> None:
    """Compare the models and write the results; exit code 1 if one differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        python = llamacpp_python(work / "env")
        results = [compare(f.resolve(), python, work) for f in arguments.folders or SAPLINGS]
    for result in results:
        for answer in result["answers"]:
            print(result["model"], json.dumps(answer))
    if arguments.out:
        arguments.out.write_text(json.dumps({"llama.cpp": LLAMACPP, "models": results}, indent=1))
    checks = ("prompt_ids_equal", "template_equal", "greedy_equal")
    sys.exit(not all(a[c] for r in results for a in r["answers"] for c in checks))


if __name__ == "__main__":
    main()
