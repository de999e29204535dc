"""Every verb, every bad input in one line with its exit code, and nothing heavy before it is
needed.

`start()`, `persea()` and `flowed()` serve other tests too: the command line in a process of its
own, and a whole tiny run.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import yaml

import persea as package
from persea import cli
from persea.cli.options import count_available_cores
from persea.config.bundled import portable_recipe
from persea.config.recipe import load_recipe
from persea.errors import RunInterrupted
from tests.once import made_once

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before a child begins: floating-point sums of one thread are always the same

ROOT = Path(__file__).resolve().parents[2]
SAPLINGS = ROOT / "saplings"
STAGES = ("check", "audition", "capture", "train", "evaluate", "lineage", "report")
TINY: dict[str, Any] = {
    "name": "tiny",
    "student": {"model": str(SAPLINGS / "llama-sapling")},
    "teachers": [
        {"model": str(SAPLINGS / "qwen-sapling")},
        {"model": str(SAPLINGS / "gemma-sapling")},
        {"model": str(SAPLINGS / "gpt-oss-sapling")},
    ],
    "corpus": [
        {"skill": "languages", "generate": 24},
        {"skill": "code", "generate": 24},
        {"skill": "reasoning", "generate": 24},
    ],
    "audition": {
        "items": 8,
        "pinned": {
            "languages": "qwen-sapling",
            "code": "gemma-sapling",
            "reasoning": "gpt-oss-sapling",
        },
    },
    # a store of its own beside each recipe: tests of a capture must not find another test's units
    "capture": {"max_new_tokens": 48, "prompts_per_unit": 8, "store": "shared-captures"},
    "training": {
        "steps": 8,
        "batch_size": 4,
        "warmup_steps": 2,
        "checkpoint_every": 3,
        "log_every": 2,
        # the golden digests are of these
        "weight_decay_on": "all",
        "save_dtype": "float32",
    },
    "evaluation": {"items": 8, "max_new_tokens": 48},
}


# --- the command line in a process of its own ---


@dataclass(frozen=True)
class Ended:
    """How a process ended; code is negative where a signal ended it."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Started:
    """A persea that runs."""

    process: BaseProcess
    said: Path

    def err(self) -> str:
        return (self.said / "err").read_text() if (self.said / "err").exists() else ""

    def signal_when(self, words: str, number: int) -> None:
        """Send a signal once stderr holds these words."""
        until = time.monotonic() + 120
        while words not in self.err():
            assert self.process.is_alive(), self.err()
            assert time.monotonic() < until, f"never said {words!r}: {self.err()}"
            time.sleep(0.005)
        assert self.process.pid
        os.kill(self.process.pid, number)

    def wait(self) -> Ended:
        self.process.join(120)
        assert self.process.exitcode is not None, "did not end"
        ended = Ended(self.process.exitcode, (self.said / "out").read_text(), self.err())
        shutil.rmtree(self.said)
        return ended


def enter(arguments: tuple[str, ...], folder: Path, said: Path) -> None:
    """What a child does: the entry point, its outputs in files."""
    os.chdir(folder)
    os.environ["COLUMNS"] = "120"
    for name, descriptor in (("out", 1), ("err", 2)):
        os.dup2(os.open(said / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    sys.argv = ["persea", *arguments]
    cli.main()


@functools.cache
def warm() -> ForkServerContext:
    """Children of a server that has imported everything once (`tests.preload`): each is a process
    of its own and starts at once.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preload"])
    forkserver.ensure_running()
    return context


def start(*arguments: object, folder: Path) -> Started:
    """Begin `persea ARGUMENTS` in a folder."""
    said = Path(tempfile.mkdtemp())
    process = warm().Process(target=enter, args=(tuple(map(str, arguments)), folder, said))
    process.start()
    return Started(process, said)


def persea(*arguments: object, folder: Path) -> Ended:
    """`persea ARGUMENTS` in a folder, to its end."""
    return start(*arguments, folder=folder).wait()


def command(*arguments: object, folder: Path) -> Ended:
    """The same, cold: as a person's shell starts it."""
    done = subprocess.run(
        [Path(sys.executable).with_name("persea"), *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "120"},
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def recipe(folder: Path, **sections: Any) -> Path:
    """The tiny recipe with other sections."""
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY | sections, sort_keys=False))
    return path


@functools.cache
def flowed() -> tuple[Path, Ended]:
    """A whole tiny run, made once: the folder that holds tiny.yaml and run/, and how its process
    ended.
    """

    def make(folder: Path) -> None:
        (folder / "whole").mkdir()
        path = recipe(folder / "whole")
        ended = command("run", path, "--out", "run", folder=folder / "whole")
        (folder / "ended.json").write_text(json.dumps(asdict(ended)))

    folder = made_once("tiny-run", make)
    return folder / "whole", Ended(**json.loads((folder / "ended.json").read_text()))


def flowed_copy(to: Path, *stages: str) -> Path:
    """A folder with tiny.yaml and a run/ that holds the output of some stages of the whole run."""
    folder, ended = flowed()
    assert ended.code == 0, ended.err
    shutil.copy(folder / "tiny.yaml", to)
    (to / "run").mkdir()
    for stage in stages:
        shutil.copytree(folder / "run" / stage, to / "run" / stage)
    return to


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# --- small verbs ---


def test_under_torchrun_one_process_of_a_machine_prints_an_error_of_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad.yaml").write_text("students: 1\n")
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    for rank in ("0", "1"):
        for name, value in (variables | {"RANK": rank, "LOCAL_RANK": rank}).items():
            monkeypatch.setenv(name, value)
        ended = command("train", "bad.yaml", folder=tmp_path)
        assert ended.code == 2
        assert ("students" in ended.err) is (rank == "0")
        assert bool(ended.err) is (rank == "0")


def test_help_names_every_verb() -> None:
    """How quick it is depends on what it imports (next test) and on the machine: `make bench`
    tells.
    """
    ended = command("--help", folder=ROOT)
    assert ended.code == 0
    verbs = (
        "run",
        "quickstart",
        "plan",
        "validate",
        "schema",
        "doctor",
        "pilot",
        "extend",
        "recipes",
        *STAGES,
        "status",
        "compare",
        "runs",
        "audit",
        "export",
        "chat",
        "serve",
        "cache",
    )
    assert re.findall(r"^│ ([a-z]+) ", ended.out, re.MULTILINE) == list(
        verbs
    )  # in the order in which they are wanted


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["run", "--help"],
        ["--version"],
        ["recipes", "ls"],
        ["validate", "recipes/quickstart.yaml"],
        ["schema"],
        ["frobnicate"],
    ],
    ids=" ".join,
)
def test_a_small_verb_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nsys.argv = ['persea', *sys.argv[1:]]\nfrom persea.cli import main\ntry:\n"
        "    main()\nexcept SystemExit:\n    pass\n"
        "heavy = ('torch', 'transformers', 'peft', 'datasets', 'jinja2')\n"
        "sys.stderr.write('\\nheavy:' + ' '.join(m for m in heavy if m in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stderr.splitlines()[-1] == "heavy:"


def test_version() -> None:
    assert command("--version", folder=ROOT) == Ended(0, f"persea {package.__version__}\n", "")


def test_without_a_verb_it_shows_the_help() -> None:
    ended = command(folder=ROOT)
    assert (ended.code, ended.err) == (2, "")
    assert "Usage: persea" in ended.out


def test_recipes_are_listed_and_shown(tmp_path: Path) -> None:
    listed = command("recipes", "ls", folder=tmp_path)
    names = [line.split()[0] for line in listed.out.splitlines()]
    assert listed.code == 0
    assert names == sorted(p.stem for p in (ROOT / "recipes").glob("*.yaml"))
    assert all(len(line.split()) > 3 for line in listed.out.splitlines())
    shown = command("recipes", "show", "quickstart", folder=tmp_path)
    text = (ROOT / "recipes" / "quickstart.yaml").read_text()
    assert shown == Ended(0, portable_recipe(text), "")
    (tmp_path / "mine.yaml").write_text(shown.out)
    mine = load_recipe(tmp_path / "mine.yaml")
    assert mine.name == "mine"
    assert Path(mine.student.model).is_dir()
    assert mine.teachers[0].name == "qwen-sapling"


def test_validate_says_name_and_hash(tmp_path: Path) -> None:
    said = persea("validate", recipe(tmp_path), folder=tmp_path)
    assert said.code == 0
    assert re.search(r"tiny\.yaml: a valid recipe, tiny [0-9a-f]{12}\n", said.out)
    assert "only the recipe was read: persea plan also reads data files" in said.out
    assert said.out.endswith("licences: ok, for commercial use; the student: tiny, any licence\n")
    value = json.loads(persea("validate", "tiny.yaml", "--json", folder=tmp_path).out)
    assert value["name"] == "tiny"
    assert value["licences"]["outcome"] == "ok"
    assert value["hash"][:12] in said.out
    other = json.loads(
        persea("validate", "tiny.yaml", "--json", "--set", "training.steps=9", folder=tmp_path).out
    )
    assert other["hash"] != value["hash"]


def test_schema_is_a_json_schema_of_the_recipe() -> None:
    value = json.loads(command("schema", folder=ROOT).out)
    assert set(TINY) <= set(value["properties"])
    assert "name" not in value["required"]


def test_plan_and_dry_run_tell_the_same_and_write_nothing(tmp_path: Path) -> None:
    path = recipe(tmp_path)
    before = tree(tmp_path)
    plan, dry = (
        persea("plan", path, folder=tmp_path),
        persea("run", path, "--dry-run", folder=tmp_path),
    )
    assert (plan.code, dry.code, plan.err, dry.err) == (0, 0, "", "")
    # others use this disk and this processor: seconds, and hours far below one, differ
    figures = re.compile(
        r"\d+ GB free|[\d,]+ billion|\b[\d.]+\s+(s|min|h)\b|\b0\.0\d*|\b[\d.]+e-\d+|\s+"
    )
    assert figures.sub("", plan.out) == figures.sub("", dry.out)
    value = json.loads(persea("plan", path, "--json", folder=tmp_path).out)
    assert [(s["stage"], s["state"]) for s in value["stages"]] == [
        (s, "to do" if s in ("check", "audition", "capture") else "waits") for s in STAGES
    ]
    assert value["answers"] == 3 * 8 * 2 + 72 + 3 * 8 * 5
    assert tree(tmp_path) == before


def test_quickstart_runs_the_bundled_recipe(tmp_path: Path) -> None:
    small = [
        "training.steps=2",
        "training.batch_size=2",
        "audition.items=2",
        "evaluation.items=2",
        "capture.max_new_tokens=40",
        "evaluation.max_new_tokens=40",
        *(f"corpus.{k}.generate=4" for k in range(5)),
        "audition.pinned={languages: qwen-sapling, code: gemma-sapling, safety: gemma-sapling, "
        "reasoning: gpt-oss-sapling, "
        "tools: gpt-oss-sapling}",
    ]
    ended = persea(
        "quickstart", *(a for s in small for a in ("--set", s)), "--json", folder=tmp_path
    )
    assert (ended.code, ended.err) == (0, "")
    assert set(json.loads(ended.out)["skills"]) == {
        "languages",
        "code",
        "safety",
        "reasoning",
        "tools",
    }
    assert (tmp_path / "runs" / "quickstart" / "train" / "student" / "model.safetensors").is_file()
    record = json.loads(
        (
            tmp_path / "runs" / "quickstart" / "train" / "checkpoints" / "step-00000002.json"
        ).read_text()
    )
    assert record["world"] == min(2, count_available_cores())
    verified = persea("lineage", "verify", "runs/quickstart", folder=tmp_path)
    assert (verified.code, verified.err) == (0, "")
    assert " 0 problems" in verified.out


# --- bad input ---


def model_without(folder: Path, *names: str) -> Path:
    """A sapling that lacks some files."""
    broken = folder / "broken"
    shutil.copytree(SAPLINGS / "qwen-sapling", broken, ignore=shutil.ignore_patterns(*names))
    return broken


def with_teacher(folder: Path, model: Path) -> Path:
    """The tiny recipe where the first teacher's model stands there."""
    return recipe(
        folder, teachers=[{"name": "qwen-sapling", "model": str(model)}, *TINY["teachers"][1:]]
    )


def no_template(folder: Path) -> list[object]:
    return ["run", with_teacher(folder, model_without(folder, "chat_template.jinja"))]


def no_tokenizer(folder: Path) -> list[object]:
    return [
        "run",
        recipe(folder),
        "--set",
        f"student.model={model_without(folder, 'tokenizer.json')}",
    ]


def no_weights(folder: Path) -> list[object]:
    return ["audition", with_teacher(folder, model_without(folder, "*.safetensors"))]


def torn_weights(folder: Path) -> list[object]:
    path = model_without(folder) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    return ["audition", with_teacher(folder, path.parent)]


def prompts(folder: Path, third: str) -> list[object]:
    (folder / "p.jsonl").write_text('{"prompt": "one"}\n\n' + third + '\n{"prompt": "four"}\n')
    corpus = [
        {"skill": "languages", "generate": 4},
        {"skill": "code", "file": "p.jsonl"},
        {"skill": "reasoning", "generate": 4},
    ]
    return ["plan", recipe(folder, corpus=corpus)]


def text(folder: Path, words: str) -> list[object]:
    path = recipe(folder)
    path.write_text(path.read_text().replace("steps: 8", words))
    return ["run", path]


def unknown_skill(folder: Path) -> list[object]:
    return ["run", recipe(folder, corpus=[{"skill": "poetry", "generate": 4}], audition={})]


def file_in_place(folder: Path) -> list[object]:
    (folder / "taken").write_text("a file")
    return ["run", recipe(folder), "--out", "taken"]


def checked_high(folder: Path) -> list[object]:
    return ["check", recipe(folder), "--set", "check.min_common_share=0.99"]


BAD: dict[str, tuple[Callable[[Path], list[object]], int, str]] = {
    "misspelt key": (
        lambda f: text(f, "stepz: 8"),
        2,
        r"tiny\.yaml:\d+:3: training\.stepz: unknown key -> did you mean 'steps'\?",
    ),
    "wrong type": (
        lambda f: text(f, "steps: many"),
        2,
        r"tiny\.yaml:\d+:3: training\.steps: should be a whole number \(got 'many'\) -> .*",
    ),
    "missing recipe": (
        lambda f: ["run", recipe(f).with_name("tinny.yaml")],
        2,
        r".*tinny\.yaml: cannot read the recipe: No such file .* -> did you mean .*tiny\.yaml\?",
    ),
    "unknown verb": (
        lambda f: ["frobnicate"],
        2,
        r"No such command 'frobnicate'\. -> persea --help",
    ),
    "no argument": (lambda f: ["run"], 2, r"Missing argument 'recipe'\. -> persea --help"),
    "unknown option": (
        lambda f: ["run", recipe(f), "--outt", "x"],
        2,
        r"No such option: --outt .*--out.* -> persea --help",
    ),
    "no checkpoint": (
        lambda f: ["run", recipe(f), "--resume", "step-7"],
        3,
        r"step-7: no checkpoint found -> name a checkpoints/.*",
    ),
    "unknown recipe": (
        lambda f: ["recipes", "show", "avocados"],
        2,
        r"no recipe 'avocados' -> persea recipes ls lists them",
    ),
    "missing model": (
        lambda f: ["run", recipe(f), "--set", "student.model=./nowhere"],
        3,
        r"student.*: no model folder '.*nowhere' -> .*",
    ),
    "no chat template": (
        no_template,
        3,
        r"corpus: qwen-sapling has no chat template, so it cannot answer .* -> give it plain .*",
    ),
    "no tokenizer": (
        no_tokenizer,
        3,
        r"student\.model: no tokenizer in '.*broken': .* -> the folder needs tokenizer\.json .*",
    ),
    "no weights": (
        no_weights,
        3,
        r"qwen-sapling: no model\.safetensors in broken -> give a folder with safetensors .*",
    ),
    "torn weights": (
        torn_weights,
        3,
        (
            r"qwen-sapling: broken/model\.safetensors is no safetensors file: the file is cut off"
            r".* -> fetch the weights again, .*"
        ),
    ),
    "broken line": (
        lambda f: prompts(f, '{"prompt": "thr'),
        3,
        r".*p\.jsonl:3: not JSON: .* -> .*correct or delete the row, .*",
    ),
    "a line of another skill": (
        lambda f: prompts(f, '{"prompt": "x", "skill": "poetry"}'),
        3,
        r".*p\.jsonl: prompt p\.jsonl:3 is of skill 'poetry', .*",
    ),
    "unknown skill": (
        unknown_skill,
        2,
        r".*tiny\.yaml: corpus\.0\.skill: unknown skill 'poetry' -> one of languages, .*",
    ),
    "unknown set": (
        lambda f: [
            "validate",
            recipe(f, evaluation={"benchmarks": [{"benchmark": "gsm8", "file": "nowhere.jsonl"}]}),
        ],
        2,
        (
            r".*tiny\.yaml: evaluation\.benchmarks\.0\.benchmark: unknown benchmark 'gsm8' -> did "
            r"you mean 'gsm8k'\?"
        ),
    ),
    "high floor": (
        checked_high,
        4,
        (
            r"[a-z-]+-sapling -> student, [a-z]+ [a-z]+: only \d+% .* \(floor 99%\) -> .*lower "
            r"check\.min_common_share"
        ),
    ),
    "another executor": (
        lambda f: ["run", recipe(f), "--executor", "spark"],
        2,
        r"--set executor\.kind=spark: .* \(got 'spark'\) -> one of local, ray",
    ),
    "another executor of an evaluation": (
        lambda f: ["evaluate", recipe(f), "--executor", "spark"],
        2,
        r"--set executor\.kind=spark: .* \(got 'spark'\) -> one of local, ray",
    ),
    "another executor of a training": (
        lambda f: ["train", recipe(f), "--executor", "spark"],
        2,
        r"--set executor\.kind=spark: .* \(got 'spark'\) -> one of local, ray",
    ),
    "no worker": (
        lambda f: ["capture", recipe(f), "--workers", "0"],
        2,
        r"--set executor\.workers=0: executor\.workers: 0, but `kind` is local -> write at least 1",
    ),
    "a file in place of the folder": (file_in_place, 6, r"taken/?.*: cannot write: .* -> .*"),
    "report before all": (
        lambda f: ["report", recipe(f)],
        3,
        r"runs/tiny/check/done\.json: not there -> .* check/ first: `persea check RECIPE`",
    ),
    "train before capture": (
        lambda f: ["train", recipe(f)],
        3,
        r"runs/tiny/capture/.*: not there -> .* capture/ first: `persea capture RECIPE`",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_line_an_exit_code_and_nothing_half_written(
    tmp_path: Path, what: str
) -> None:
    make, code, words = BAD[what]
    arguments = make(tmp_path)
    before = tree(tmp_path)
    if arguments[0] not in ("frobnicate", "recipes"):
        arguments.append(
            "--json"
        )  # no progress on stderr, so that nothing but the refusal is there
    ended = persea(*arguments, folder=tmp_path)
    assert (ended.code, ended.out) == (code, "")
    assert ended.err.count("\n") == 1, ended.err
    assert re.fullmatch(f"persea: {words}\n", ended.err.replace(f"{tmp_path}/", "")), ended.err
    new = tree(tmp_path).keys() - before.keys()
    stood = (
        {"check/check.json", "recipe.yaml"}
        if what == "high floor"
        else {"recipe.yaml"}
        if "weights" in what or what == "train before capture"
        else set()
    )
    assert new <= {f"runs/tiny/{n}" for n in {"lock", "status.json", *stood}}
    assert {n: v for n, v in tree(tmp_path).items() if n in before} == before


def test_a_folder_that_another_process_holds_is_refused_with_its_pid(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom persea import storage as store\n"
        "with store.lock_run_folder(Path('runs/tiny')):\n    print('held', flush=True)\n"
        "    sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout and holder.stdout.readline() == b"held\n"
        ended = persea("run", recipe(tmp_path), folder=tmp_path)
        assert holder.poll() is None
    assert ended.code == 6
    assert re.fullmatch(
        rf"persea: runs/tiny: another run holds this folder \(pid {holder.pid} on .*\) "
        r"-> wait for it, .*\n",
        ended.err,
    )
    assert [p.name for p in (tmp_path / "runs" / "tiny").iterdir()] == ["lock"]


def test_several_mistakes_are_told_at_once(tmp_path: Path) -> None:
    ended = persea(
        "validate",
        recipe(tmp_path),
        "--set",
        "training.steps=0",
        "--set",
        "training.batchh=1",
        folder=tmp_path,
    )
    assert ended.code == 2
    assert "training.steps" in ended.err
    assert "training.batchh" in ended.err
    assert "Traceback" not in ended.err


def test_a_bug_of_ours_is_called_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(**options: object) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(cli, "app", broken)
        patch.setattr(
            cli.signal, "signal", lambda number, handler: None
        )  # pytest's own handlers stay
        with pytest.raises(ZeroDivisionError):
            cli.main()
    assert capsys.readouterr().err == (
        "persea: this is a bug in persea; please report it with the traceback below and "
        "the recipe\n"
    )


def test_a_signal_is_not_an_error_that_a_library_could_swallow() -> None:
    """`except Exception` stands at every place where a library may raise anything; a Ctrl-C there
    must still end the run.
    """
    with pytest.raises(RunInterrupted) as caught, suppress(Exception):
        cli._raise_interrupted(15, None)
    assert caught.value.exit_code == 143
    assert (
        str(caught.value)
        == "stopped by SIGTERM; committed work is kept -> run the same command to continue"
    )
