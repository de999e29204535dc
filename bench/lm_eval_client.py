"""openai, litellm and lm-eval as clients of one server. bench/clients.py runs this.

    python bench/lm_eval_client.py URL MODEL_FOLDER OUT     in an environment with the three

Needs no persea. The tasks are made here from fixed words: nothing is downloaded.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

WORDS = {
    "two": ("hai", "ba", "bốn", "năm"),
    "three": ("三", "四", "五", "六"),
    "house": ("rumah", "jalan", "ikan", "pagi"),
    "water": ("น้ำ", "ไฟ", "บ้าน", "คน"),
    "seventy-eight": ("칠십팔", "팔십칠", "칠십", "팔"),
}
PROMPT = "To another language: {word}"
MAX_TOKENS = 24
CHOICE_TASK = """
task: words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "To another language: {{{{word}}}}\\n"
doc_to_choice: choices
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""
ROLLING_TASK = """
task: lines
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{line}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""
ANSWER_TASK = """
task: answers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "To Vietnamese: {{{{word}}}}"
doc_to_target: ""
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: 24, temperature: 0}}
metric_list: [{{metric: exact_match}}]
"""


def write_tasks(folder: Path) -> None:
    """Write the three tasks and their data."""
    rows = [
        {"word": w, "choices": list(c), "line": f"{w}: {', '.join(c)}"} for w, c in WORDS.items()
    ]
    data = folder / "words.jsonl"
    data.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    for name, text in (("words", CHOICE_TASK), ("lines", ROLLING_TASK), ("answers", ANSWER_TASK)):
        (folder / f"{name}.yaml").write_text(text.format(data=data))


def evaluate(folder: Path, model: str, settings: dict[str, Any], tasks: list[str]) -> Any:
    """Run lm-eval; return the responses of each task's samples, in order, and its results."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    found: Any = simple_evaluate(
        model=model,
        model_args=settings,
        tasks=tasks,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        apply_chat_template=model == "local-chat-completions",
        batch_size=1,
        log_samples=True,
        bootstrap_iters=0,
    )
    samples = {
        name: [s["filtered_resps"] for s in sorted(rows, key=lambda s: s["doc_id"])]
        for name, rows in found["samples"].items()
    }
    return samples, found["results"]


def compare_lm_eval(url: str, model: str, folder: Path) -> dict[str, Any]:
    """Compare local-completions with the hf backend."""
    name = Path(model).name
    tasks = ["words", "lines"]
    far = {
        "base_url": f"{url}/v1/completions",
        "model": name,
        "tokenizer": model,
        "max_retries": 1,
        "num_concurrent": 1,
    }
    served, served_results = evaluate(folder, "local-completions", far, tasks)
    here = {"pretrained": model, "dtype": "float32", "device": "cpu"}
    local, local_results = evaluate(folder, "hf", here, tasks)
    pairs = [
        (s, h)
        for served_row, local_row in zip(served["words"], local["words"], strict=True)
        for s, h in zip(served_row, local_row, strict=True)
    ]
    rolling = [
        abs(_number(s) - _number(h)) for s, h in zip(served["lines"], local["lines"], strict=True)
    ]
    return {
        "log_likelihoods": len(pairs),
        "max_difference_nats": float(f"{max(abs(s[0] - h[0]) for s, h in pairs):.3g}"),
        "greedy_flags_equal": f"{sum(s[1] == h[1] for s, h in pairs)} of {len(pairs)}",
        "rolling": len(rolling),
        "max_difference_nats_rolling": float(f"{max(rolling):.3g}"),
        "acc": [r["words"]["acc,none"] for r in (served_results, local_results)],
        "bits_per_byte": [
            round(r["lines"]["bits_per_byte,none"], 6) for r in (served_results, local_results)
        ],
    }


def _number(response: Any) -> float:
    """Return the number of a rolling log-likelihood, which lm-eval wraps in lists."""
    while isinstance(response, list | tuple):
        response = response[0]
    return float(response)


def compare_chat(url: str, model: str, folder: Path) -> dict[str, Any]:
    """Compare the answers that lm-eval, litellm and openai get to the same questions."""
    import litellm
    import openai

    name = Path(model).name
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="x")
    questions = [f"To Vietnamese: {word}" for word in WORDS]
    direct, by_litellm = [], []
    for question in questions:
        messages: Any = [{"role": "user", "content": question}]
        answer = client.chat.completions.create(
            model=name, messages=messages, max_tokens=MAX_TOKENS, temperature=0, stop=["\n\n"]
        )
        direct.append(answer.choices[0].message.content)
        streamed = litellm.completion(
            model=f"openai/{name}",
            api_base=f"{url}/v1",
            api_key="x",
            messages=messages,
            max_tokens=MAX_TOKENS,
            temperature=0,
            stop=["\n\n"],
            stream=True,
        )
        by_litellm.append("".join(e.choices[0].delta.content or "" for e in streamed))
    far = {"base_url": f"{url}/v1/chat/completions", "model": name, "max_retries": 1}
    samples, _ = evaluate(folder, "local-chat-completions", far, ["answers"])
    by_lm_eval = [row[0] for row in samples["answers"]]
    return {
        f"litellm {version('litellm')}, streamed chat": _equal(by_litellm, direct),
        f"lm-eval {version('lm_eval')} local-chat-completions": _equal(by_lm_eval, direct),
        f"openai {version('openai')}": {"answers": len(direct), "empty": direct.count("")},
    }


def _equal(found: list[Any], expected: list[Any]) -> dict[str, Any]:
    equal = sum(a == b for a, b in zip(found, expected, strict=True))
    return {"answers_equal_openai": f"{equal} of {len(expected)}"}


def main() -> None:
    """Run the three clients, and write one JSON object."""
    url, model, out = sys.argv[1:]
    folder = Path(out).parent
    write_tasks(folder)
    results = compare_chat(url, model, folder)
    key = f"lm-eval {version('lm_eval')} local-completions"
    results[key] = compare_lm_eval(url, model, folder)
    Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
