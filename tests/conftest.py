"""Quiet libraries, which tests run (`--all`, `gpu`), and fixtures that several test files share."""

from __future__ import annotations

import gc
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pytest
import torch
import transformers

from tests.found_once import found_once
from tests.handshakes import Points, wrapping

if TYPE_CHECKING:
    from streamprune.demo.demo import DemoModel, DemoResult
    from tests.reports import Reported

# A report takes a second, of which there would be hundreds; its own tests ask for it.
os.environ["STREAMPRUNE_REPORT"] = "0"
# Triton reads this when it is imported, which libraries do too: without a GPU its kernels are interpreted.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
warnings.filterwarnings("ignore", module=r"(transformers|torch)\b")


FSYNC = os.fsync
#: How many tests were left out, sent by each worker of pytest-xdist to the process that prints the result.
LEFT_OUT = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all", action="store_true",
        help="run the tests marked `thorough` as well: every crossing of families and features, fuzzing in depth, the "
        "long kill matrix",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    # pytest-xdist's own, which a machine with a GPU may lack.
    config.addinivalue_line("markers", "xdist_group(name): tests that one worker runs")


# (Before pytest-xdist, which reads the groups there.)
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Whoever names a single test wants it.
    if not config.getoption("--all") and not any("::" in argument for argument in config.args):
        left_out = [item for item in items if item.get_closest_marker("thorough")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("thorough")]
        config.stash[LEFT_OUT] = len(left_out)
    for item in items:
        if isinstance(item, pytest.Function) and not item.get_closest_marker("xdist_group") and _has_own_fixtures(item):
            item.add_marker(pytest.mark.xdist_group(item.module.__name__))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def pytest_collection_finish() -> None:
    # What was imported stays: the garbage collector need not go through it again and again.
    gc.freeze()


def pytest_unconfigure() -> None:
    # Triton complains of what is not collected at the end.
    gc.unfreeze()


def _has_own_fixtures(item: pytest.Function) -> bool:
    """Whether it uses what is made once for its file: two workers would make that twice."""
    return any(each[-1].scope == "module" for each in item._fixtureinfo.name2fixturedefs.values())


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash.get(LEFT_OUT, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Called where the result is printed, when a worker of pytest-xdist ends: all of them leave out the same tests."""
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", 0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    left_out = config.stash.get(LEFT_OUT, 0)
    if left_out:
        terminalreporter.write_line(f"{left_out} thorough tests were left out; `./tools/test --all` runs them too.")


@pytest.fixture(scope="session")
def thoroughly(pytestconfig: pytest.Config) -> bool:
    """Whether `--all` was given: for tests that go through many cases of their own."""
    return bool(pytestconfig.getoption("--all"))


@pytest.fixture(autouse=True)
def no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is only said of a step that takes a second is not said: a test's outcome must not depend on the machine.

    (`test_first_seconds.py` tests it.)
    """
    monkeypatch.setattr("streamprune.progress.SILENT_SECONDS", 1e6)


@pytest.fixture(scope="session", autouse=True)
def facts_found_once() -> Iterator[None]:
    with found_once():
        yield


@pytest.fixture(scope="session", autouse=True)
def not_flushed() -> Iterator[None]:
    """Files of tests need not be on the disk, which takes a tenth of the time of some: only a power cut would show it.

    (`test_faults.py` tests that files are flushed, and when.)
    """
    with patch.object(os, "fsync", check_descriptor):
        yield


def check_descriptor(descriptor: int) -> None:
    """In place of os.fsync: raises OSError for what is not open, and does not wait."""
    os.fstat(descriptor)


@pytest.fixture(scope="module")
def flushed(not_flushed: None) -> Iterator[None]:
    """Files are flushed for tests of the system's cache, which keeps what is not on the disk."""
    with patch.object(os, "fsync", FSYNC):
        yield


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny random model of the plainest family. (Other fixtures of this name stand in the files that use them.)"""
    from tests.tiny import FAMILIES, make_model, tiny_config

    return make_model(tmp_path / "model", tiny_config(FAMILIES[0]))


@dataclass(frozen=True)
class DemoRun:
    """The demo as it was run in `folder` with the model that comes with the package, and what it printed."""

    folder: Path
    model: DemoModel
    result: DemoResult
    lines: list[str]


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> DemoRun:
    """The demo, run once for all tests that look at it (xdist_group "demo")."""
    from streamprune.demo.demo import run_demo, shipped_model

    folder, lines = tmp_path_factory.mktemp("demo"), list[str]()
    model = shipped_model(folder, echo=lines.append)
    # A quarter of the text that it is measured on shows the same.
    model = replace(model, held_out={name: rows[:16] for name, rows in model.held_out.items()})
    return DemoRun(folder, model, run_demo(folder, model, echo=lines.append), lines)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Commands of every kind on a model of four blocks."""
    from tests.interruptions import make_commands

    return make_commands(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same with two blocks, for what has to be done many times."""
    from tests.interruptions import make_commands

    return make_commands(tmp_path_factory.mktemp("short"), blocks=2)


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Reported:
    """An output with its report; tests leave it as it is."""
    from tests.reports import make_reported

    return make_reported(tmp_path_factory.mktemp("report"))


@pytest.fixture
def copied(reported: Reported, tmp_path: Path) -> Path:
    """A copy of that output which a test may change, with its log."""
    shutil.copytree(reported.output, tmp_path / "out")
    shutil.copy(f"{reported.output}.streamprune.log", tmp_path / "out.streamprune.log")
    return tmp_path / "out"


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    """A folder on another file system than `tmp_path`."""
    shared = Path("/dev/shm")
    if not shared.is_dir() or shared.stat().st_dev == tmp_path.stat().st_dev or not os.access(shared, os.W_OK):
        pytest.skip("needs /dev/shm as another file system")
    folder = shared / f"streamprune-{os.getpid()}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def points() -> Points:
    """What happens on several threads, in order."""
    return Points()


@pytest.fixture
def around(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts something before and after what a class does, for the length of a test."""
    return wrapping(monkeypatch)
