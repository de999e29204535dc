"""Fixtures of several tests: the real data, four tiny models, and their families' real
tokenizers."""

from __future__ import annotations

import atexit
import gc
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import date
from functools import cache, cached_property, lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports huggingface_hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# One home for all workers; answers and event maps cached by earlier code must not be used.
if "PERSEA_TEST_HOME" not in os.environ:
    os.environ["PERSEA_TEST_HOME"] = os.environ["PERSEA_HOME"] = tempfile.mkdtemp(
        prefix="persea-tests-"
    )
    atexit.register(shutil.rmtree, os.environ["PERSEA_HOME"], ignore_errors=True)

import pytest
from hypothesis import HealthCheck, settings

atexit.register(gc.unfreeze)  # extension modules count what is left at the end
ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("PERSEA_DATA", str(ROOT.parent / "shared" / "data"))  # beside the checkout
sys.path.insert(0, str(ROOT / "bench"))  # worlds and baselines are tested like the package
FAMILIES = ("llama", "qwen", "gemma", "gpt-oss")
REAL = {
    "llama": "llama3",
    "qwen": "qwen3",
    "gemma": "gemma3",
    "gpt-oss": "gpt-oss",
}  # family -> folder in data/tokenizers
# Of 17 to 70 CPU seconds. The first makes the event maps of real vocabularies, the second the
# whole tiny run, which many other files read.
LONGEST_FILES = (
    "pipeline/test_real_vocabularies.py",
    "pipeline/test_stages.py",
    "bench/test_worlds.py",
    "bench/test_objectives.py",
    "pipeline/test_train_stage.py",
    "training/distributed/test_launcher.py",
    "alignment/test_boundary_mask.py",
    "alignment/test_event_map.py",
)

if "torch" in sys.modules:
    sys.modules["torch"].set_num_threads(1)
# Test machines may be slow: no deadline and few examples. HYPOTHESIS_PROFILE=thorough runs 1,000
# examples a test, so that more than 10,000 conversations are rendered and parsed.
slow = (HealthCheck.too_slow, HealthCheck.data_too_large)
settings.register_profile("quick", deadline=None, max_examples=40, suppress_health_check=slow)
settings.register_profile("thorough", deadline=None, max_examples=1000, suppress_health_check=slow)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Import all test modules without the garbage collector, which would search what stays anyway:
    a third of the time of a collection."""
    gc.disable()
    yield
    gc.freeze()
    gc.enable()


def pytest_configure(config: pytest.Config) -> None:
    """Let pytest-xdist keep the order of the files, which it would sort by their number of tests:
    long files of few tests would be last, and one worker would wait for the other."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files."""
    places = {ROOT / "tests" / name: place for place, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the fork server here, where no test has changed the folder or the environment, and
    before the product starts one of its own, which has imported less."""
    commands = sys.modules.get("tests.cli.test_cli")  # a collected module uses it
    if commands and session.items and not session.config.option.collectonly:
        commands.warm()


@dataclass(frozen=True, repr=False)
class Speaker:
    """A ChatRenderer, and transformers' tokenizer of the same folder as the reference for its
    renderings."""

    folder: Path
    renderer: Any

    @cached_property
    def tokenizer(self) -> Any:
        """transformers' tokenizer; opening a real one takes seconds, and not all tests need it."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder)

    def __repr__(self) -> str:
        return f"Speaker({self.folder.name})"  # a vocabulary's own repr has megabytes

    def today(self) -> Any:
        """Return the renderer with today's date, the only date that transformers can write."""
        return _dated(self.renderer, date.today())


@lru_cache(maxsize=64)
def _dated(renderer: Any, today: date) -> Any:
    """Keep the copy, because a renderer makes tables of its tokens when it is first used."""
    return replace(renderer, template_date=today)


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real tokenizers, templates and texts."""
    folder = Path(os.environ["PERSEA_DATA"])
    if not (folder / "tokenizers").is_dir():
        pytest.skip(
            "real data not found: set PERSEA_DATA to the folder that holds tokenizers/ and "
            "parallel/"
        )
    return folder


@pytest.fixture(scope="session")
def grow() -> ModuleType:
    """saplings/grow.py, imported by its path."""
    spec = importlib.util.spec_from_file_location("grow", ROOT / "saplings" / "grow.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["grow"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    sys.modules["torch"].set_num_threads(1)
    return module


def _speaker(folder: Path, name: str) -> Speaker:
    """Load a renderer and keep the tokenizer that it opens, if it has to open one."""
    from transformers import AutoTokenizer

    from persea.models.loading import ModelSource, load_renderer

    opened: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        real = AutoTokenizer.from_pretrained
        patch.setattr(
            AutoTokenizer,
            "from_pretrained",
            lambda *a, **k: opened.append(real(*a, **k)) or opened[-1],
        )
        speaker = Speaker(folder, load_renderer(ModelSource(str(folder)), name))
    if opened:
        (speaker.__dict__["tokenizer"],) = opened
    gc.freeze()
    return speaker


@pytest.fixture(scope="module", autouse=True)
def _kept_objects_are_not_searched_again() -> Iterator[None]:
    """A worker keeps real vocabularies, whose millions of objects the garbage collector would
    search again and again: a tenth of the time of all tests."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_of() -> Callable[[str], Speaker]:
    """Family -> the tiny tokenizer and template of that family's sapling."""
    return cache(lambda family: _speaker(ROOT / "saplings" / f"{family}-sapling", family))


@pytest.fixture(scope="session")
def real_of(data: Path) -> Callable[[str], Speaker]:
    """Family -> the real tokenizer and template; loading one takes 2 to 7 s."""
    return cache(lambda family: _speaker(data / "tokenizers" / REAL[family], REAL[family]))


@pytest.fixture(scope="session", params=FAMILIES)
def tiny(request: pytest.FixtureRequest, tiny_of: Callable[[str], Speaker]) -> Speaker:
    """Each of the four tiny tokenizers in turn."""
    return tiny_of(request.param)


@pytest.fixture(scope="session", params=FAMILIES)
def real(request: pytest.FixtureRequest, real_of: Callable[[str], Speaker]) -> Speaker:
    """Each of the four real tokenizers in turn."""
    return real_of(request.param)
