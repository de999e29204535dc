"""Real servers as teachers: handshake, scores, faults, and a run whose server is killed.

    make engines        installs the servers into environments of their own, and runs
                        everything (an hour on two cores after the downloads)
    python bench/engines.py ENVS [NAME ...]     only entries whose name holds one of these, such as
                                                "persea serve" or "serve, chat"; ENVS holds, or
                                                gets, the servers' environments

PERSEA_GGUF names a real model's GGUF file; without it the sapling alone goes through llama.cpp.
PERSEA_SERVER_START_S is the time that a server may take to start (900 s).

Result: bench/results/engines.json, and the table in docs/engines.md. One entry for each server and
protocol, compared with the same model by transformers in float32 in this process (greedy answers,
log-probabilities of given tokens, the scores of audition and evaluation, the answers kept):

    wrong_name, wrong_tokenizer, too_long   the refusal; for too_long also how often it was asked
    faults      requests that failed by 429, 503, a cut, slow or silent connection, and how many of
                the answers equal those without faults
    run         `persea run` with the server as its teacher, over 100 prompts while the server is
                killed and started again, or over 12 without that: prompts lost, and asked again
                after their unit was committed
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench.real_servers import (  # noqa: E402
    SERVERS,
    Asked,
    RealServer,
    ServerRun,
    environment,
    named_gguf,
)
from persea.chat.messages import Conversation  # noqa: E402
from persea.chat.renderer import ChatRenderer  # noqa: E402
from persea.errors import PerseaError  # noqa: E402
from persea.models.loading import ModelSource, load_model, load_renderer  # noqa: E402
from persea.tasks.generated import GENERATED_TASKS  # noqa: E402
from persea.tasks.task import Split  # noqa: E402
from persea.teachers.engines import (  # noqa: E402
    Engine,
    EngineFailure,
    EngineOptions,
    find_engine,
)
from persea.teachers.engines.http_client import HttpClient, RetryPolicy  # noqa: E402
from persea.teachers.engines.transformers import TransformersEngine  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "engines.json"
PAGE = ROOT / "docs" / "engines.md"
HEAD = "server, protocol||greedy answers equal|largest difference, nats|equal with faults|"
COLUMNS = (HEAD + "answers kept|audition, evaluation").split("|")
TABLE_MARKS = ("<!-- table of bench/engines.py -->", "<!-- end of the table -->")
STUDENT = ROOT / "saplings" / "llama-sapling"
OTHER_TOKENIZER = ROOT / "saplings" / "gemma-sapling"
NUM_PROMPTS, UNIT = 100, 20  # of a run whose server is killed
NUM_PROMPTS_UNDISTURBED = 12
RESTART_DELAY_S = 10
MAX_NEW_TOKENS = 24
TOO_LONG_TOKENS = 3000  # every server here has fewer positions
STALL_TIMEOUT_S = 60.0
# Of every third request, one after the other: the others must not suffer.
FAULTS = ("429", "503", "cut", "slow", "429", "503", "stall")


def open_far(run: ServerRun, protocol: str, renderer: ChatRenderer, served: str) -> Engine:
    """Connect to the server through its proxy."""
    policy = RetryPolicy(concurrency=2, max_attempts=4, stall_timeout_s=STALL_TIMEOUT_S)
    client = HttpClient(run.url, run.server.name, policy)
    options = EngineOptions("far", renderer, client=client, served_model_name=served)
    return find_engine(protocol).open(options)


class Questions:
    """What a model is asked, and its answers and scores by transformers in this process."""

    def __init__(self, model: Path) -> None:
        source = ModelSource(str(model))
        self.renderer = load_renderer(source, "model")
        items = [i for task in GENERATED_TASKS for i in task.items(Split.TEST, 2, 0)]
        every = [i.prompt.conversation for i in items]
        self.conversations = [c for c in every if not c.tools]
        self.here = here = TransformersEngine(
            load_model(source, self.renderer, "model"), len(self.renderer.vocabulary)
        )
        self.prompts = [self.renderer.render_prompt(c).ids_T for c in self.conversations]
        self.answers = here.generate(self.prompts, self.renderer.stop_ids, MAX_NEW_TOKENS)
        self.sequences = [
            np.concatenate([p, e]) for p, e in zip(self.prompts, self.answers, strict=True)
        ]
        self.masks = [
            np.arange(len(s)) >= len(p) for s, p in zip(self.sequences, self.prompts, strict=True)
        ]
        self.logprobs = [
            rows.numpy()[np.arange(len(rows)), ids[mask]]
            for rows, ids, mask in zip(
                here.compute_logprobs(self.sequences, self.masks),
                self.sequences,
                self.masks,
                strict=True,
            )
        ]

    def ask(self, far: Engine) -> list[Any]:
        """Return the server's answers: token ids, content parts, or the reason of a failure."""
        if not far.capabilities.takes_token_ids:
            return [
                a.reason if isinstance(a, EngineFailure) else a
                for a in far.chat(self.conversations, MAX_NEW_TOKENS)
            ]
        found = far.generate(self.prompts, self.renderer.stop_ids, MAX_NEW_TOKENS)
        return [a.reason if isinstance(a, EngineFailure) else a.tolist() for a in found]

    def expected(self, far: Engine) -> list[Any]:
        """Return the answers by transformers in the form of `ask`."""
        if far.capabilities.takes_token_ids:
            return [a.tolist() for a in self.answers]
        return [
            self.renderer.parse(a.tolist(), c.effort, c.tools)
            for a, c in zip(self.answers, self.conversations, strict=True)
        ]


# --- one server and protocol ---


def measure(run: ServerRun, protocol: str, questions: Questions) -> dict[str, Any]:
    """Shake hands, compare answers and scores, and cause faults."""
    far = open_far(run, protocol, questions.renderer, run.server.served)
    begin = time.monotonic()
    fingerprint = far.handshake()  # type: ignore[attr-defined]
    kinds = {"log-probabilities": fingerprint.handshake_logprobs, "answers": fingerprint.answers}
    found: dict[str, Any] = {
        "handshake": "passed",
        "handshake_s": round(time.monotonic() - begin, 1),
        "identified_by": next((kind for kind, values in kinds.items() if values), "name"),
        "requests_of_a_handshake": len(run.proxy.asked),
    }
    begin = time.monotonic()
    answers = questions.ask(far)
    found["seconds"] = round(time.monotonic() - begin, 1)
    found["greedy_equal"] = count_equal(answers, questions.expected(far))
    if far.capabilities.takes_token_ids:
        found |= compare_scores(far, questions)
    found["too_long"] = ask_too_long(run, far)
    found["faults"] = ask_with_faults(run, far, questions, answers)
    found["wrong_name"] = refusal(run, protocol, questions.renderer, "no-such-model")
    other = load_renderer(ModelSource(str(OTHER_TOKENIZER)), "other")
    found["wrong_tokenizer"] = refusal(run, protocol, other, run.server.served)
    return found


def count_equal(answers: Sequence[Any], expected: Sequence[Any]) -> str:
    """Return how many answers are equal, as text."""
    equal = sum(a == e for a, e in zip(answers, expected, strict=True))
    return f"{equal} of {len(expected)}"


def compare_scores(far: Engine, questions: Questions) -> dict[str, Any]:
    """Return the differences of log-probabilities of given tokens from transformers."""
    drift: list[float] = []
    for row, exact_N in zip(
        far.compute_sparse_distributions(questions.sequences, questions.masks),
        questions.logprobs,
        strict=True,
    ):
        if isinstance(row, EngineFailure):
            raise RuntimeError(row.reason)
        drift += np.abs(exact_N - row.target_logprob_N).tolist()
    return {
        "scored_tokens": len(drift),
        "max_drift_nats": float(f"{max(drift):.3g}"),
        "mean_drift_nats": float(f"{np.mean(drift):.3g}"),
    }


def ask_too_long(run: ServerRun, far: Engine) -> dict[str, Any]:
    """Ask a prompt beyond the model's positions: it must fail alone, and be asked once."""
    before = len(run.proxy.asked)
    long = "house " * TOO_LONG_TOKENS
    if far.capabilities.takes_token_ids:
        prompt = np.ones(TOO_LONG_TOKENS, np.int32)
        (answer,) = far.generate([prompt], (2,), 8)
    else:
        (answer,) = far.chat([Conversation.from_question(long)], 8)
    asked = run.proxy.asked[before:]
    return {
        "answer": answer.reason[:160] if isinstance(answer, EngineFailure) else "accepted",
        "asked": sum(len(json.dumps(a.body)) > TOO_LONG_TOKENS for a in asked),
    }


def ask_with_faults(
    run: ServerRun, far: Engine, questions: Questions, answers: Sequence[Any]
) -> dict[str, Any]:
    """Ask everything again while one request in three fails, and compare the answers."""
    before = len(run.proxy.asked)
    run.proxy.set_fault(
        lambda n, path: FAULTS[n // 3 - 1] if n % 3 == 0 and n // 3 <= len(FAULTS) else ""
    )
    try:
        found = questions.ask(far)
        if far.capabilities.takes_token_ids:
            compare_scores(far, questions)
    finally:
        run.proxy.set_fault(lambda n, path: "")
    caused = Counter(a.fault for a in run.proxy.asked[before:] if a.fault)
    if not caused:
        raise RuntimeError("no fault was caused")
    return {"caused": dict(caused), "equal": count_equal(found, answers)}


def refusal(run: ServerRun, protocol: str, renderer: ChatRenderer, served: str) -> str:
    """Return the message with which persea refuses the server; "accepted" if it does not."""
    try:
        open_far(run, protocol, renderer, served).handshake()  # type: ignore[attr-defined]
    except PerseaError as error:
        return str(error)[:200]
    return "accepted"


# --- a whole run with a server that is killed ---

RECIPE = """
name: engines
threads: 1
student: {{model: {student}}}
teachers:
  - model: {model}
    name: far
    licence: Apache-2.0
    {endpoint}
corpus:
  - {{skill: languages, generate: {prompts}}}
audition: {{items: 8}}
capture: {{max_new_tokens: {tokens}, prompts_per_unit: {unit}}}
training: {{steps: 2}}
evaluation: {{items: 8, max_new_tokens: {tokens}}}
"""
ENDPOINT = (
    'endpoint: {{url: "{url}", protocol: {protocol}, served_model_name: "{served}", '
    "concurrency: 2, stall_timeout_s: 120}}"
)


def start_run(
    folder: Path, model: Path, endpoint: str, num_prompts: int
) -> subprocess.Popen[bytes]:
    """Start `persea run` in a folder of its own."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        RECIPE.format(
            student=STUDENT,
            model=model,
            endpoint=endpoint,
            prompts=num_prompts,
            tokens=MAX_NEW_TOKENS,
            unit=UNIT,
        )
    )
    command = [sys.executable, "-m", "persea.cli", "run", str(recipe), "--out", str(folder / "run")]
    variables = os.environ | {"PERSEA_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(command, env=variables, stderr=log, stdout=log)


def run_with_kills(run: ServerRun, protocol: str, model: Path, num_kills: int) -> dict[str, Any]:
    """Run everything; the server is killed each time that another unit of answers is committed."""
    folder = run.folder / protocol
    endpoint = ENDPOINT.format(url=run.url, protocol=protocol, served=run.server.served)
    begin, asked_before, kills = time.monotonic(), len(run.proxy.asked), 0
    num_prompts = NUM_PROMPTS if num_kills else NUM_PROMPTS_UNDISTURBED
    process = start_run(folder, model, endpoint, num_prompts)
    while process.poll() is None:
        if kills < num_kills and num_committed(folder) > kills:
            time.sleep(1)  # into the next unit
            run.kill()
            kills += 1
            time.sleep(RESTART_DELAY_S)
            run.start()
        time.sleep(0.2)
    log = (folder / "log").read_text(errors="replace").strip().splitlines()
    found: dict[str, Any] = {
        "exit": process.returncode,
        "kills": kills,
        "seconds": round(time.monotonic() - begin, 1),
    }
    if process.returncode:
        return found | {"error": " ".join(log[-3:])[:400]}
    asked = run.proxy.asked[asked_before:]
    return found | read_scores(folder) | count_repeats(asked, folder, protocol)


def num_committed(folder: Path) -> int:
    """Return the number of committed units of a capture."""
    return len(list((folder / "run" / "capture" / "commits").glob("*")))


def read_scores(folder: Path) -> dict[str, Any]:
    """Return what a finished run says of its teacher."""
    stages = folder / "run"
    summary = json.loads((stages / "capture" / "summary.json").read_text())
    cast = json.loads((stages / "audition" / "cast.json").read_text())
    evaluation = json.loads((stages / "evaluate" / "evaluation.json").read_text())
    left_out = sum(summary["left_out"].values())
    return {
        "prompts": summary["prompts"],
        "kept": summary["kept"],
        "left_out": summary["left_out"],
        "lost": summary["prompts"] - summary["kept"] - left_out,
        "audition": teacher_score(cast["scores"]),
        "evaluate": teacher_score(evaluation["scores"]),
    }


def teacher_score(scores: list[dict[str, Any]]) -> str:
    """Return the teacher's share of right answers to all questions; "" if it was not asked."""
    values = [s for s in scores if s["model_name"] == "far" and not s["language"]]
    return f"{values[0]['value']:.2f} (n = {values[0]['n']})" if values else ""


def count_repeats(asked: Sequence[Asked], folder: Path, protocol: str) -> dict[str, Any]:
    """Count prompts that were asked for again, before and after their unit was committed.

    Units come one after the other: the prompts that are asked between two commits are the next
    unit's. Questions of the handshake, which identify the server, are asked before the capture.
    """
    commits = sorted(p.stat().st_mtime for p in (folder / "run/capture/commits").glob("*"))
    begin = (folder / "run/audition/done.json").stat().st_mtime
    requests = [(a.at, prompt_key(a.body)) for a in asked if is_generation(a, protocol)]
    earlier = {key for at, key in requests if at < begin}
    first: dict[str, float] = {}
    again_before = again_after = 0
    for at, key in requests:
        if key in earlier or not begin <= at <= commits[-1]:
            continue
        if key not in first:
            first[key] = at
        elif at > next(c for c in commits if c > first[key]):
            again_after += 1
        else:
            again_before += 1
    return {
        "prompts_asked": len(first),
        "asked_again_before_commit": again_before,
        "asked_again_after_commit": again_after,
    }


def is_generation(asked: Asked, protocol: str) -> bool:
    """Return whether a request was for an answer, not for scores or tokens."""
    if not isinstance(asked.body, dict):
        return False
    return bool(asked.body.get("stream")) or (protocol == "chat" and "messages" in asked.body)


def prompt_key(body: dict[str, Any]) -> str:
    """Return the prompt of a request as text."""
    names = ("token_ids", "prompt", "messages", "input_ids")
    return json.dumps([body[name] for name in names if name in body])


# --- all ---


def local_run(folder: Path, model: Path) -> dict[str, Any]:
    """Return the same run's numbers by the engine in this process."""
    path = folder / "local"
    process = start_run(path, model, "engine: local", NUM_PROMPTS)
    if process.wait():
        raise RuntimeError(f"the local run failed: see {path / 'log'}")
    return read_scores(path)


def measure_server(
    server: RealServer, protocols: Sequence[str], envs: Path, results: dict[str, Any]
) -> None:
    """Measure protocols of a server, and write the results after each."""
    env = environment(server, envs)
    folder = envs / "work" / server.name.replace(" ", "-").replace(",", "").lower()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model = server.make_model(folder)
    locals_: dict[str, Any] = results.setdefault("local engine", {})
    key = model.stem
    if any(server.kills) and key not in locals_:
        locals_[key] = local_run(folder, model)
    questions = Questions(model)
    run = ServerRun(server, env, folder, model)
    try:
        for protocol in protocols:
            entry: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "model": key}
            try:
                if run.process is None:
                    run.start()
                run.proxy.asked.clear()
                if server.must_refuse:
                    told = refusal(run, protocol, questions.renderer, server.served)
                    if server.must_refuse not in told:
                        raise RuntimeError(f"persea does not refuse: {told}")
                    entry["handshake"] = f"refused: {told}"
                else:
                    entry |= measure(run, protocol, questions)
                    if server.kills:
                        kills = server.kills[server.protocols.index(protocol)]
                        entry["run"] = run_with_kills(run, protocol, model, kills)
            except (PerseaError, RuntimeError, subprocess.CalledProcessError) as error:
                entry["failure"] = str(error)[:300]
            entry["start_seconds"] = run.start_seconds[:]
            results["servers"][entry_name(server, protocol)] = entry
            text = json.dumps(results, indent=2, sort_keys=True) + "\n"
            RESULTS.write_text(text.replace(f"{envs}/work", "ENVS").replace(f"{model.parent}/", ""))
            print(f"{server.name}, {protocol}: {json.dumps(entry)}", flush=True)
    finally:
        run.kill()


def entry_name(server: RealServer, protocol: str) -> str:
    """Return the name of a result."""
    return f"{server.name}, {protocol}"


def table_row(name: str, entry: dict[str, Any]) -> str:
    """Return a row of the table in docs/engines.md."""
    run, faults, failure = entry.get("run", {}), entry.get("faults"), entry.get("failure", "")
    handshake = entry.get("handshake", "")
    ran = f"failed {entry['date']}: {failure.replace('|', '/')}"
    if not failure:
        ran = f"ran {entry['date']}{': refused, as it must be' * handshake.startswith('refused')}"
    kept = f"{run['kept']} of {run['prompts']}" if "kept" in run else "-"
    if run.get("exit"):
        kept = f"the run failed: exit {run['exit']}"
    elif run.get("kills"):
        kills = f"{run['kills']} kill{'s' * (run['kills'] > 1)}"
        kept = f"{kept}, {kills}, {run['asked_again_after_commit']} asked twice"
    cells = [
        *(name, ran, entry.get("greedy_equal", "-")),
        str(entry.get("max_drift_nats", "-")),
        f"{faults['equal']}, {sum(faults['caused'].values())} faults" if faults else "-",
        kept,
        f"{run['audition'][:4]}, {run['evaluate'][:4]}" if "audition" in run else "-",
    ]
    return "| " + " | ".join(cells) + " |"


def write_table(results: dict[str, Any]) -> None:
    """Write the table of all results into docs/engines.md, between its marks."""
    rows = [table_row(name, entry) for name, entry in sorted(results["servers"].items())]
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|", *rows]
    before, begin, rest = PAGE.read_text(encoding="utf-8").partition(TABLE_MARKS[0])
    end, after = rest.partition(TABLE_MARKS[1])[1:]
    text = "\n".join((begin, "", *lines, "", end))
    PAGE.write_text(before + text + after, encoding="utf-8")


def main(arguments: list[str]) -> None:
    """Measure the entries that are named, or all, and write the results."""
    envs = Path(arguments[0]).resolve()
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results.setdefault("servers", {})
    results["machine"] = {
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
    }
    for server in SERVERS:
        protocols = [
            p
            for p in server.protocols
            if not arguments[1:] or any(a in entry_name(server, p) for a in arguments[1:])
        ]
        if not protocols:
            continue
        if server.make_model is named_gguf and "PERSEA_GGUF" not in os.environ:
            print(f"{server.name}: left out; PERSEA_GGUF names no GGUF file")
            continue
        measure_server(server, protocols, envs, results)
        write_table(results)


if __name__ == "__main__":
    main(sys.argv[1:])
