"""The system's cache of files is left as it was found: whatever a command reads or writes of weights is put out."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from streamprune.checkpoint.index import open_checkpoint
from streamprune.config import PruneSettings, RunSettings
from streamprune.files import page_cache as cached_pages
from streamprune.files.page_cache import (
    Stretch,
    cache_unchanged,
    cached_flags,
    drop_files_from_cache,
    drop_from_cache,
    uncached_ranges,
)
from streamprune.pipeline.prune import prune
from streamprune.pipeline.run import run
from streamprune.streaming.forward import LayerForward
from streamprune.streaming.layer_weights import LayerWeights
from streamprune.work.saved_states import BatchState
from tests.helpers import known_family
from tests.tiny import make_model, tiny_config, write_token_ids

PAGE = mmap.PAGESIZE
#: Pages by file.
Pages = dict[str, set[int]]


def cached(path: Path) -> set[int]:
    """The numbers of a file's pages that are in the cache."""
    with path.open("rb") as stream:
        flags = cached_flags(stream.fileno(), 0, path.stat().st_size)
    assert flags is not None
    return {number for number, flag in enumerate(flags) if flag & 1}


def cached_in(folder: Path) -> Pages:
    return {str(path.relative_to(folder)): cached(path) for path in sorted(folder.rglob("*.safetensors"))}


def empty(path: Path) -> None:
    """Put a whole file out of the cache, once it is on the disk."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
        drop_from_cache(stream.fileno(), [(0, path.stat().st_size)])


def touch(path: Path, pages: set[int]) -> None:
    """Bring just these pages into the cache."""
    with path.open("rb") as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        for page in pages:
            os.pread(stream.fileno(), 1, page * PAGE)


@pytest.fixture(scope="module", autouse=True)
def file_system(flushed: None, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skip where nobody tells what is cached, or nothing can be put out (tmpfs)."""
    path = tmp_path_factory.mktemp("probe") / "probe"
    path.write_bytes(bytes(8 * PAGE))
    with path.open("rb") as stream:
        if cached_flags(stream.fileno(), 0, 8 * PAGE) is None:
            pytest.skip("this system does not tell what is cached")
    empty(path)
    if cached(path):
        pytest.skip("this file system keeps what it is asked to put out")


@dataclass(frozen=True)
class Model:
    """A model of three blocks of 3 MiB, calibration and scores, and what is cached once it is only opened."""

    folder: Path
    tokens: Path
    scores: Path
    opened: Pages

    def empty(self) -> None:
        for path in self.folder.glob("*.safetensors"):
            empty(path)

    def run(self, output: Path, **settings: Any) -> None:
        given = {"calibration": (str(self.tokens),), "batch_tokens": 24, **settings}
        run(RunSettings(model=str(self.folder), output=output, **given), quiet=True)

    def prune(self, output: Path, **settings: Any) -> None:
        prune(PruneSettings(model=str(self.folder), output=output, scores=self.scores, keep=5, **settings), quiet=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("model")
    config = tiny_config(known_family("qwen3_moe"))
    config.num_hidden_layers, config.moe_intermediate_size = 3, 512
    source = make_model(folder / "model", config, max_shard_size="4MB")
    made = Model(source, write_token_ids(folder / "ids.jsonl"), folder / "scores", {})
    made.run(made.scores, only_score=True)
    made.empty()
    # Headers, and the pages that the fingerprint is taken of: a few dozen per file, however large that is.
    open_checkpoint(source).fingerprint()
    opened = cached_in(source)
    assert len(opened) == 3
    assert all(0 < len(pages) < 60 for pages in opened.values())
    return Model(made.folder, made.tokens, made.scores, opened)


COMMANDS: dict[str, Callable[[Model, Path], None]] = {
    "run": lambda model, output: model.run(output, keep=5),
    "run pruned": lambda model, output: model.run(output, keep=5, propagate="pruned", states="disk"),
    "run global": lambda model, output: model.run(output, keep=5, schedule="global", verify=False),
    "score": lambda model, output: model.run(output, only_score=True),
    "prune": lambda model, output: model.prune(output, verify=False),
    "prune verified": lambda model, output: model.prune(output, verify=True),
}


@pytest.fixture
def asked_out(model: Model, monkeypatch: pytest.MonkeyPatch) -> Callable[[Pages], Pages]:
    """Call it with what is cached of the model: it returns what the product then asks the system to put out.

    A system that is short of memory (a virtual machine's, above all) takes pages by itself, 32 at a time, so that what
    is missing afterwards says nothing. What was cached at the beginning is therefore told as cached throughout, and
    what matters is that nothing of it is ever asked for.
    """
    told, tell, put = Pages(), cached_pages.cached_flags, cached_pages.drop_from_cache
    asked: Pages = {}

    def name(file: int) -> str:
        return os.path.relpath(Path(f"/proc/self/fd/{file}").readlink(), model.folder)

    def cached_flags(file: int, begin: int, size: int) -> bytes | None:
        flags = tell(file, begin, size)
        known = told.get(name(file), set())
        return flags and bytes(flag | (begin // PAGE + number in known) for number, flag in enumerate(flags))

    def drop_from_cache(file: int, stretches: Iterable[Stretch]) -> None:
        stretches = list(stretches)
        for begin, size in stretches:
            # Whole pages only, as the system does it.
            asked.setdefault(name(file), set()).update(range(-(-begin // PAGE), (begin + size) // PAGE))
        put(file, stretches)

    def watch(cached: Pages) -> Pages:
        told.update(cached)
        return asked

    monkeypatch.setattr(cached_pages, "cached_flags", cached_flags)
    monkeypatch.setattr(cached_pages, "drop_from_cache", drop_from_cache)
    return watch


@pytest.mark.parametrize("command", COMMANDS)
def test_what_was_not_cached_is_not_afterwards_and_what_was_stays(
    command: str, model: Model, asked_out: Callable[[Pages], Pages], tmp_path: Path
) -> None:
    model.empty()
    sizes = {path.name: path.stat().st_size // PAGE for path in model.folder.glob("*.safetensors")}
    # A stretch in the middle of every file, and every ninth page behind it.
    for name, size in sizes.items():
        touch(model.folder / name, {*range(size // 3, size // 2), *range(size // 2, size, 9)})
    before = cached_in(model.folder)
    asked = asked_out(before)
    COMMANDS[command](model, tmp_path / "out")
    after = cached_in(model.folder)
    for name in sizes:
        assert len(before[name]) > 150
        assert len(asked[name]) > 300, "what is read is put out"
        assert not before[name] & asked[name], "what was cached stays"
        assert after[name] <= before[name] | model.opened[name], "what was not is put out"


@pytest.mark.parametrize("command", ["run", "prune", "prune verified"])
def test_what_is_written_does_not_stay(command: str, model: Model, tmp_path: Path) -> None:
    COMMANDS[command](model, tmp_path / "out")
    shards = {path: cached(path) for path in (tmp_path / "out").glob("*.safetensors")}
    assert len(shards) == 4
    assert sum(path.stat().st_size for path in shards) > 5 * 2**20
    # The headers are read once more in the end, for which the system reads its usual least.
    assert all(pages <= set(range(8)) for pages in shards.values())


def test_a_block_that_was_read_ahead_and_is_given_up_does_not_stay(
    model: Model, asked_out: Callable[[Pages], Pages], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is so short that the next block must make room: it is read again, and put out again."""
    usual, drop, failed, seen = LayerForward.run_layer, LayerWeights.free_prefetched, list[int](), list[int]()
    asked = asked_out({})

    def run_layer(self: LayerForward, index: int, *arguments: Any) -> BatchState:
        if index == 1 and not failed:
            failed.append(index)
            raise MemoryError
        return usual(self, index, *arguments)

    def free_prefetched(self: LayerWeights) -> bool:
        for reading in self._prefetched.values():
            reading.wait()
        before = sum(map(len, asked.values()))
        dropped = drop(self)
        if dropped:
            seen.append(sum(map(len, asked.values())) - before)
        return dropped

    monkeypatch.setattr(LayerForward, "run_layer", run_layer)
    monkeypatch.setattr(LayerWeights, "free_prefetched", free_prefetched)
    model.empty()
    model.run(tmp_path / "out", keep=5)
    (pages_out,) = seen
    assert pages_out > 600, "a block of 3 MiB was there, and is not any more"
    assert all(pages <= model.opened[name] for name, pages in cached_in(model.folder).items())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(20 * PAGE + 100))
    empty(path)
    assert cached(path) == set()
    return path


def test_stretches_that_are_not_cached_are_told_in_whole_pages(file: Path) -> None:
    touch(file, {3, 4, 10, 20})
    with file.open("rb") as stream:
        number = stream.fileno()
        assert uncached_ranges(number, 0, 21 * PAGE) == [(0, 3 * PAGE), (5 * PAGE, 5 * PAGE), (11 * PAGE, 9 * PAGE)]
        assert uncached_ranges(number, PAGE + 7, PAGE) == [(PAGE, 2 * PAGE)]
        assert uncached_ranges(number, 3 * PAGE, 2 * PAGE) == []
        assert uncached_ranges(number, 5 * PAGE, 0) == []


def test_what_is_read_within_is_put_out_also_after_an_error(file: Path, tmp_path: Path) -> None:
    touch(file, {2})
    stretches = {file: [(PAGE, 4 * PAGE), (20 * PAGE, 100)], tmp_path / "missing": [(0, PAGE)]}
    with pytest.raises(KeyError), cache_unchanged(stretches):  # noqa: PT012
        touch(file, {1, 2, 3, 4, 20})
        assert cached(file) == {1, 2, 3, 4, 20}
        raise KeyError
    assert cached(file) == {2}
    drop_files_from_cache({file: [(0, 3 * PAGE)], tmp_path / "missing": [(0, PAGE)]})
    assert cached(file) == set()


def test_where_the_system_does_not_tell_nothing_is_put_out(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cached_pages, "cached_flags", lambda *_: None)
    with cache_unchanged({file: [(0, 21 * PAGE)]}):
        touch(file, {7})
    monkeypatch.undo()
    assert cached(file) == {7}
