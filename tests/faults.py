"""Runs that are disturbed: a small model, what an undisturbed run makes of it, and ways to break a later one."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from streamprune.config import RunSettings
from streamprune.pipeline.finish import RunResult
from streamprune.pipeline.run import resume, run
from tests.helpers import known_family, tree_bytes
from tests.tiny import make_model, tiny_config, write_token_ids


class Injected(Exception):
    """Ends a run in the middle, as no part of it expects."""


@dataclass
class Case:
    """A model and its calibration, and the files of an undisturbed run's output."""

    model: Path
    tokens: Path
    output: Path
    settings: dict[str, Any]
    expected: dict[str, bytes]

    @property
    def work(self) -> Path:
        return self.output.with_name(self.output.name + ".work")

    def at(self, output: Path) -> Case:
        """The same, with another output."""
        return Case(self.model, self.tokens, output, self.settings, self.expected)

    def run(self, **changes: Any) -> RunResult:
        given = {"calibration": (str(self.tokens),), **self.settings, **changes}
        return run(RunSettings(model=str(self.model), output=self.output, **given), quiet=True)

    def resume(self, **changes: Any) -> RunResult:
        return resume(self.work, quiet=True, **changes)

    def check(self) -> None:
        """The output is to the byte that of the undisturbed run, and no work folder is left."""
        found = tree_bytes(self.output)
        assert sorted(found) == sorted(self.expected)
        assert [name for name in found if found[name] != self.expected[name]] == []
        assert not self.work.exists()

    def interrupt(self, at: int = 2, **changes: Any) -> None:
        """Run until block `at` is to be scored, and end there without any warning."""
        with breaking_at(at), pytest.raises(Injected):
            self.run(**changes)
        assert not self.output.exists()


def make_case(folder: Path, family: str = "qwen3_moe", blocks: int = 4, sequences: int = 4, **settings: Any) -> Case:
    kind = known_family(family)
    config = tiny_config(kind)
    if blocks != 4:
        config.num_hidden_layers = blocks
    model = make_model(folder / "model", config)
    (model / "tokenizer_config.json").write_text('{"model_max_length": 256}')
    given = {"keep": kind.keep, "batch_tokens": 24, "checkpoint_every": 0.0, **settings}
    case = Case(model, write_token_ids(folder / "ids.jsonl", sequences), folder / "undisturbed", given, {})
    case.run()
    case.expected = tree_bytes(case.output)
    return case


@contextmanager
def breaking_at(block: int) -> Iterator[None]:
    """Raise Injected when a layer is about to be scored."""
    from streamprune.streaming.layer_loop import LayerLoop
    from streamprune.streaming.stages import LayerTask

    usual = LayerLoop.run_layer

    def run_layer(self: LayerLoop, task: LayerTask, following: int | None) -> None:
        if task.index == block and not task.replayed:
            raise Injected
        usual(self, task, following)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LayerLoop, "run_layer", run_layer)
        yield


@dataclass
class Trap:
    """Counts the calls of the file system that change something, and lets the `nth` fail; 0: only count.

    `calls` says what they were. Only paths under `folder` count.
    """

    folder: Path
    nth: int = 0
    code: int = errno.ENOSPC
    calls: list[str] | None = None

    def passes(self, what: str, path: Any) -> None:
        if not str(path).startswith(str(self.folder)):
            return
        assert self.calls is not None
        self.calls.append(f"{what} {Path(str(path)).name}")
        if len(self.calls) == self.nth:
            raise OSError(self.code, os.strerror(self.code), str(path))


@contextmanager
def trap(folder: Path, nth: int = 0, code: int = errno.ENOSPC) -> Iterator[Trap]:
    """Let the `nth` write, flush, rename, mkdir or unlink under `folder` fail."""
    one = Trap(folder, nth, code, [])
    usual_open, usual_fsync = Path.open, os.fsync

    class Stream:
        """A file whose writes go through the trap."""

        def __init__(self, path: Path, stream: Any) -> None:
            self.path, self.stream = path, stream

        def __enter__(self) -> Stream:
            return self

        def __exit__(self, *error: object) -> None:
            self.stream.close()

        def write(self, data: Any) -> int:
            one.passes("write", self.path)
            return int(self.stream.write(data))

        def __getattr__(self, name: str) -> Any:
            return getattr(self.stream, name)

    def open_(path: Path, mode: str = "r", *more: Any, **named: Any) -> Any:
        if not set(mode) & set("wax+"):
            return usual_open(path, mode, *more, **named)
        one.passes("open", path)
        return Stream(path, usual_open(path, mode, *more, **named))

    def fsync(descriptor: int) -> None:
        one.passes("fsync", Path(f"/proc/self/fd/{descriptor}").readlink())
        usual_fsync(descriptor)

    def on(name: str) -> Callable[..., Any]:
        usual = getattr(Path, name)

        def call(path: Path, *more: Any, **named: Any) -> Any:
            one.passes(name, path)
            return usual(path, *more, **named)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", open_)
        patch.setattr(os, "fsync", fsync)
        for name in ("rename", "mkdir", "unlink", "touch"):
            patch.setattr(Path, name, on(name))
        yield one


def damage(path: Path, how: str) -> None:
    """Cut, flip, empty or remove a file, without changing when it was changed."""
    facts, data = path.stat(), bytearray(path.read_bytes())
    middle = len(data) // 2
    if how == "remove":
        path.unlink()
        return
    if how == "flip" and data:
        data[middle] ^= 4
    path.write_bytes(b"" if how == "empty" else data[:middle] if how == "cut" else bytes(data))
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def invalid_argument(*_: Any) -> None:
    """Stands in for a call of the system that this file system does not take."""
    raise OSError(errno.EINVAL, "Invalid argument")
