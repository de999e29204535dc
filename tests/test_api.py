"""The public API: names resolve lazily, signatures are pinned, examples of docstrings run."""

from __future__ import annotations

import ast
import doctest
import functools
import inspect
import subprocess
import sys
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch

import persea
from tests.cli.test_cli import flowed_copy
from tests.once import made_once

ROOT = Path(__file__).resolve().parents[1]
CALLABLES = [name for name in persea.__all__ if name not in ("__version__", "errors", "losses")]
LOSSES = ("CrossEntropy", "EventDivergence", "EventKL", "SpanLikelihood")

# A change of a public signature is a decision: it goes here and into CHANGELOG.md.
# Of Recipe, whose fields are in its own schema, it is that of from_yaml.
SIGNATURES: dict[str, str] = {
    "ChatRenderer": (
        "(family: 'Family', vocabulary: 'Vocabulary', template: 'ChatTemplate', "
        "template_text: 'str', template_date: 'date' = Ellipsis, special_tokens: "
        "'Mapping[str, str]' = Ellipsis) -> None"
    ),
    "Conversation": (
        "(messages: 'tuple[Message, ...]', effort: 'ThinkingEffort' = <ThinkingEffort.NONE: "
        "'none'>, tools: 'tuple[Tool, ...]' = Ellipsis) -> None"
    ),
    "DistillDataset": (
        "(cache: 'AnswerSource | Sequence[CachedAnswer] | Sequence[tuple[AnswerSource, "
        "float]]', *, student: 'ChatRenderer', teachers: 'Mapping[str, ChatRenderer] | None' "
        "= None, event_maps: 'Mapping[str, EventMap] | None' = None, batch_size: 'int' = 16, "
        "seed: 'int' = 0, max_length: 'int' = 512, partial_tokens: 'bool' = False, "
        "teach_end: 'TeachEnd' = 'auto') -> 'None'"
    ),
    "DistillResult": "(folder: 'Path') -> None",
    "EventMap": (
        "(teacher_event_W: 'npt.NDArray[np.int32]', student_event_V: 'npt.NDArray[np.int32]', "
        "num_events: 'int', digest: 'str', teacher_mask: 'BoundaryMask | None' = None, "
        "student_mask: 'BoundaryMask | None' = None) -> None"
    ),
    "Recipe": "(path: 'str | Path', overrides: 'Sequence[str]' = Ellipsis) -> 'Recipe'",
    "align": "(student: 'RenderedTokens', teacher: 'RenderedTokens') -> 'Alignment'",
    "audition": (
        "(teachers: 'Sequence[Teacher | str]', tasks: 'Sequence[Task | str]' = Ellipsis, *, "
        "items: 'int' = 100, max_new_tokens: 'int' = 64, batch_size: 'int' = 64, seed: 'int' "
        "= 0, min_score: 'float' = 0.05, pinned: 'Mapping[str, str] | None' = None, settings: "
        "'RaceSettings' = Ellipsis, progress: 'Callable[[float, str], None]' = Ellipsis) -> "
        "'Cast'"
    ),
    "check": (
        "(teacher: 'ChatRenderer | str', student: 'ChatRenderer | str', *, tasks: "
        "'Sequence[Task | str]' = Ellipsis, texts: 'Mapping[str, str] | None' = None, "
        "load_weights: 'bool' = False, items: 'int' = 64, max_lines: 'int' = 200, batch_size: "
        "'int' = 64, seed: 'int' = 0, min_common_share: 'float' = 0.3, "
        "max_disagreement: 'float' = 0.1, max_unwritable_share: 'float' = 0.05, "
        "max_template_excess: 'float' = 0.25, "
        "min_counted_probability: 'float' = 0.001, "
        "max_measured_logits: 'int' = 400000000) -> 'CompatibilityResult'"
    ),
    "distill": (
        "(recipe: 'Recipe | str | Path', out: 'str | Path | None' = None, *, overrides: "
        "'Sequence[str]' = Ellipsis, num_processes: 'int' = 1, parallel: 'ParallelStrategy' = "
        "<ParallelStrategy.DDP: 'ddp'>, resume: 'str' = 'auto', progress: 'Callable[[str, "
        "float, str], None] | None' = None) -> 'DistillResult'"
    ),
    "evaluate": (
        "(models: 'Sequence[Teacher | str]', tasks: 'Sequence[Task | str]' = Ellipsis, *, "
        "items: 'int' = 200, max_new_tokens: 'int' = 64, batch_size: 'int' = 64, seed: 'int' "
        "= 0, progress: 'Callable[[float, str], None]' = Ellipsis) -> 'Evaluation'"
    ),
    "event_map": "(*, teacher: 'ChatRenderer', student: 'ChatRenderer') -> 'EventMap'",
    "load_renderer": (
        "(source: 'ModelSource | str', where: 'str' = '', template_date: 'date' = Ellipsis) "
        "-> 'ChatRenderer'"
    ),
    "open_cache": "(folder: 'str | Path', teacher: 'str' = '') -> 'CacheReader'",
    "losses.CrossEntropy": "(*args: Any, **kwargs: Any) -> None",
    "losses.EventDivergence": (
        "(event_map: 'EventMap | None' = None, divergence: 'Divergence' = "
        "<Divergence.FORWARD: 'forward'>) -> 'None'"
    ),
    "losses.EventKL": (
        "(event_map: 'EventMap | None' = None, event_weight: 'float' = 0.7) -> 'None'"
    ),
    "losses.SpanLikelihood": "(*args: Any, **kwargs: Any) -> None",
}


def public_object(name: str) -> Any:
    """Return a public callable by its dotted name below persea."""
    package, _, loss = name.rpartition(".")
    return getattr(persea.losses, loss) if package else getattr(persea, name)


def signature_of(target: Any) -> str:
    """Return a signature as text, with `...` for defaults whose repr has an address."""
    found = inspect.signature(target)
    plain = (int, float, str, Enum, type(None), type(inspect.Parameter.empty))
    parameters = [
        p if isinstance(p.default, plain) or p.default is p.empty else p.replace(default=...)
        for p in found.parameters.values()
    ]
    return str(found.replace(parameters=parameters))


def in_new_process(code: str) -> str:
    """Stdout of a fresh interpreter, where nothing is imported yet."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_import_persea_loads_no_heavy_library() -> None:
    out = in_new_process(
        "import sys, time; begin = time.process_time(); import persea; dir(persea)\n"
        "seconds = time.process_time() - begin\n"
        "print(seconds, [m for m in ('torch', 'transformers', 'numpy', 'pydantic')"
        " if m in sys.modules])"
    )
    seconds, loaded = out.split(maxsplit=1)
    assert loaded.strip() == "[]"
    assert float(seconds) < 0.3


def test_dir_lists_the_public_names() -> None:
    assert dir(persea) == sorted(persea.__all__)
    assert persea.__version__.count(".") == 2


def test_every_public_name_resolves() -> None:
    for name in persea.__all__:
        assert getattr(persea, name) is not None, name


def test_submodules_are_reachable_without_an_import_of_their_own() -> None:
    out = in_new_process(
        "import persea; print(persea.errors.PerseaError.__name__, persea.losses.__name__)"
    )
    assert out.split() == ["PerseaError", "persea.losses"]


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'distil'"):
        _ = persea.distil  # type: ignore[attr-defined]


def test_type_checkers_see_what_the_lazy_table_gives() -> None:
    """The imports under TYPE_CHECKING name the same modules as the table of lazy names."""
    tree = ast.parse(Path(persea.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    lazy = persea._MODULE_OF | dict.fromkeys(persea._SUBMODULES, "persea")
    assert seen == lazy
    assert {*seen, "__version__"} == set(persea.__all__)


def test_the_package_is_typed_and_its_docstring_is_short() -> None:
    assert (Path(persea.__file__).parent / "py.typed").is_file()
    assert len((persea.__doc__ or "").strip().splitlines()) <= 25


@pytest.mark.parametrize("name", [*CALLABLES, *(f"losses.{name}" for name in LOSSES)])
def test_public_signatures_are_pinned(name: str) -> None:
    target = persea.Recipe.from_yaml if name == "Recipe" else public_object(name)
    assert signature_of(target) == SIGNATURES.get(name)


# --- a tiny run, and the API on its results ---


@functools.cache
def tiny_run() -> persea.DistillResult:
    """Train and evaluate on the capture of the whole tiny run, once, with the public API."""

    def make(folder: Path) -> None:
        flowed_copy(folder, "check", "audition", "capture")
        recipe = persea.Recipe.from_yaml(folder / "tiny.yaml", overrides=["evaluation.items=4"])
        run = persea.distill(recipe, out=folder / "run", progress=lambda *_: None)
        assert run.folder == folder / "run"

    return persea.DistillResult(made_once("api-run", make) / "run")


@pytest.mark.timeout(600)
def test_distill_returns_student_report_and_evaluation() -> None:
    run = tiny_run()
    assert (run.student / "model.safetensors").is_file()
    assert (run.folder / "report" / "index.html").is_file()
    assert run.report and run.evaluation


@pytest.mark.timeout(600)
def test_a_captured_cache_trains_with_a_dataloader() -> None:
    """Cache, dataset, torch DataLoader, loss: metrics are tensors, and the gradient is finite."""
    run, saplings = tiny_run(), ROOT / "saplings"
    student = persea.load_renderer(str(saplings / "llama-sapling"))
    teachers = {
        one: persea.load_renderer(str(saplings / one))
        for one in ("qwen-sapling", "gemma-sapling", "gpt-oss-sapling")
    }
    dataset = persea.DistillDataset(
        persea.open_cache(run.folder), student=student, teachers=teachers
    )
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=4, shuffle=True, collate_fn=dataset.collate_fn
    )
    inputs = next(iter(loader))
    assert inputs["input_ids"].shape == inputs["labels"].shape == inputs["attention_mask"].shape
    batch = inputs["batch"]
    logits_NV = torch.randn(len(batch.labels_N), len(student.vocabulary), requires_grad=True)
    out = persea.losses.EventKL(event_weight=0.7)(logits_NV, batch.labels_N, batch.targets)
    out.loss.backward()
    assert out.num_tokens == len(batch.labels_N)
    assert all(isinstance(value, torch.Tensor) for value in out.metrics.values())
    assert bool(torch.isfinite(logits_NV.grad).all()) and bool(logits_NV.grad.any())
    supervised = inputs["labels"] != -100
    assert int(supervised.sum()) == len(batch.labels_N)
    assert torch.equal(inputs["labels"][supervised], inputs["input_ids"][supervised])


@pytest.mark.parametrize("name", [*CALLABLES, *(f"losses.{name}" for name in LOSSES)])
def test_public_docstrings_have_an_example_that_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each example runs in an empty folder that links the repository's data."""
    target = persea.Recipe.from_yaml if name == "Recipe" else public_object(name)
    doc = inspect.getdoc(target) or ""
    assert "Example" in doc and ">>>" in doc, f"persea.{name} shows no example"
    for folder in ("saplings", "recipes", "tests"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    names = vars(sys.modules[target.__module__]) | {"persea": persea}
    tests = [
        test
        for test in doctest.DocTestFinder(recurse=False).find(target, name, globs=names)
        if test.examples
    ]
    assert tests
    for test in tests:
        runner.run(test)
    assert runner.failures == 0
