"""Hidden states in memory and in a file: the same to the bit, in place, split by sequences, and gone afterwards."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from streamprune.errors import InterruptedRunError, NonFiniteError, ResourceError
from streamprune.streaming.batches import MicroBatches
from streamprune.streaming.forward import LayerForward
from streamprune.streaming.stages import ForwardStage
from streamprune.streaming.states import HiddenStates
from streamprune.work.saved_states import BatchState
from tests.helpers import CPU, known_family, prune, tree_bytes
from tests.thorough import thorough
from tests.tiny import make_model, tiny_config, write_token_ids

PLAIN_RUN_BLOCK = LayerForward.run_layer


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param("qwen3_moe", "bfloat16", marks=thorough),
        ("gemma4_text", "float32"),
        pytest.param("glm_moe_dsa", "float32", marks=thorough),
    ],
)
def test_scores_are_the_same_to_the_bit_wherever_states_lie(name: str, dtype: str, tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", tiny_config(known_family(name)))
    trees = []
    for states in ("auto", "device", "ram", "disk"):
        result = prune(
            source, tmp_path / states, dtype=dtype, states=states, keep=known_family(name).keep, batch_tokens=48
        )
        assert result.summary["states"] == {"auto": "ram", "device": "ram"}.get(states, states)
        trees.append(tree_bytes(tmp_path / states))
    assert trees[0] == trees[1] == trees[2] == trees[3]


def open_deleted_files(folder: Path) -> list[str]:
    links = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return [link for link in links if link.startswith(str(folder)) and link.endswith("(deleted)")]


@pytest.mark.parametrize("fails", [False, True])
def test_the_file_of_states_lies_beside_the_output_and_goes_with_the_run(
    fails: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def run_layer(self: LayerForward, index: int, *arguments: Any) -> BatchState:
        seen.append(len(open_deleted_files(tmp_path / "out.work")))
        if fails and index == 2:
            raise KeyError("anything")
        return PLAIN_RUN_BLOCK(self, index, *arguments)

    monkeypatch.setattr(LayerForward, "run_layer", run_layer)
    if fails:
        with pytest.raises(KeyError):
            prune(model, tmp_path / "out", states="disk")
    else:
        prune(model, tmp_path / "out", states="disk")
    assert set(seen) == {1}
    assert open_deleted_files(tmp_path) == []
    # What is finished stays for a later resume; the file has no name there.
    assert (tmp_path / "out.work").exists() is fails
    assert (tmp_path / "out").exists() is not fails


def test_a_disk_that_fills_up_in_mid_run_is_one_clear_error(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, calls = os.pwrite, []

    def pwrite(*arguments: Any) -> int:
        calls.append(arguments)
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return plain(*arguments)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(ResourceError, match=r"hidden states in .*out\.work could not be written: No space left"):
        prune(model, tmp_path / "out", states="disk", batch_tokens=24)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.work").exists()


def odd_state(seed: int) -> BatchState:
    """Tensors of many dtypes, nested: strided, empty, without dimensions, and things that are no tensors."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(4, 6, 8, generator=generator)
    output = (
        hidden.bfloat16(),
        [hidden.transpose(1, 2), {"flat": hidden.double().view(24, 8), "flag": hidden > 0}],
        None,
        "text",
        7,
        torch.tensor(1.5 + seed),
        torch.zeros(0, 3),
        torch.arange(6) + seed,
    )
    return BatchState(output, {"shared": {("full", 1): (hidden.half(), hidden.long())}})


def same_states(a: BatchState, b: BatchState) -> bool:
    (a_leaves, a_structure), (b_leaves, b_structure) = (pytree.tree_flatten((s.output, s.carried)) for s in (a, b))
    return a_structure == b_structure and all(
        torch.equal(x, y) and x.dtype == y.dtype if isinstance(x, torch.Tensor) else x == y
        for x, y in zip(a_leaves, b_leaves, strict=True)
    )


@pytest.mark.parametrize("on_disk", [False, True])
def test_states_of_any_structure_come_back_as_they_were(on_disk: bool, tmp_path: Path) -> None:
    states = HiddenStates(2, folder=tmp_path if on_disk else None)
    for seed in range(3):
        for number in range(2):
            states.store(number, odd_state(10 * number + seed))
        assert all(same_states(states.load(n, CPU), odd_state(10 * n + seed)) for n in range(2))
    states.store(0, BatchState(torch.ones(2, 2)))
    assert same_states(states.load(0, CPU), BatchState(torch.ones(2, 2)))
    assert same_states(states.load(1, CPU), odd_state(12))
    states.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("on_disk", [False, True])
def test_split_states_are_the_rows_of_their_sequences(on_disk: bool, tmp_path: Path) -> None:
    """Sequences of 6 tokens, four of them: (4, …) and (24, …) are cut; what has 6 rows, or none, is shared."""
    states = HiddenStates(2, folder=tmp_path if on_disk else None)
    whole, other = odd_state(1), odd_state(2)
    states.store(0, whole)
    states.store(1, other)
    states.split(0, (4, 6), [3, 1])
    assert same_states(states.load(2, CPU), other)
    for number, rows in ((0, slice(0, 3)), (1, slice(3, 4))):
        part = states.load(number, CPU)
        assert torch.equal(part.output[0], whole.output[0][rows])
        assert torch.equal(part.output[1][1]["flat"].view(-1, 6, 8), whole.output[1][1]["flat"].view(4, 6, 8)[rows])
        assert torch.equal(part.output[7], whole.output[7])
        assert torch.equal(part.carried["shared"]["full", 1][1], whole.carried["shared"]["full", 1][1][rows])
    # The parts are apart: what one of them stores, in its own rows or in what was shared, the other does not see.
    changed = pytree.tree_map(lambda x: x * 0 if isinstance(x, torch.Tensor) else x, states.load(0, CPU).output)
    before = pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, states.load(1, CPU).output)
    states.store(0, BatchState(changed))
    assert same_states(BatchState(states.load(1, CPU).output), BatchState(before))


@pytest.mark.parametrize("computing", ["gpu", "cpu"])
def test_states_of_a_gpu_pass_through_page_locked_memory_on_their_way_to_the_disk(
    computing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With streams played: what is written has arrived, and what was read is waited for by the stream that computes.

    States of the CPU take no page-locked memory.
    """
    log: list[str] = []

    class Stream:
        def __init__(self, device: torch.device) -> None:
            self.wait_event = lambda event: log.append("computing waits")
            self.wait_stream = lambda other: log.append("copying waits")

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    def locked(shape: Any, dtype: torch.dtype) -> torch.Tensor:
        log.append("locked")
        return torch.full(tuple(shape), 7, dtype=dtype)

    def pwrite(*arguments: Any) -> int:
        log.append("written")
        return plain(*arguments)

    plain, event = os.pwrite, SimpleNamespace(synchronize=lambda: log.append("arrived"))
    monkeypatch.setattr(os, "pwrite", pwrite)
    if computing == "gpu":
        monkeypatch.setattr("streamprune.streaming.states.is_gpu", lambda device: True)
    monkeypatch.setattr("streamprune.streaming.states.page_locked", locked)
    monkeypatch.setattr("streamprune.streaming.states.record_event", lambda stream: event)
    monkeypatch.setattr(torch, "Stream", Stream)
    monkeypatch.setattr(torch.accelerator, "current_stream", Stream)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    states = HiddenStates(1, folder=tmp_path, computing=CPU)
    hidden = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    states.store(0, BatchState(hidden))
    states.prefetch(0, CPU)
    assert torch.equal(states.load(0, CPU).output, hidden)
    states.close()
    expected = ["locked", "copying waits", "arrived", "written", "locked", "computing waits"]
    assert log == (expected if computing == "gpu" else ["written"])


def test_the_file_of_states_does_not_grow_while_sizes_stay(tmp_path: Path) -> None:
    states = HiddenStates(3, folder=tmp_path)
    file = states._store._file  # type: ignore[attr-defined]
    sizes = []
    for seed in range(3):
        for number in range(3):
            states.store(number, BatchState((torch.full((4, 5, 8), float(seed)), torch.zeros(4, 5))))
        states.synchronize()
        sizes.append(os.fstat(file._file.fileno()).st_size)
    assert sizes == [3 * 4 * 5 * 9 * 4] * 3
    # Another structure finds another place, since the old state must stay until the new one is there; what it gave back
    # is used by the next.
    states.store(0, BatchState(torch.zeros(4, 5, 8)))
    states.synchronize()
    grown = os.fstat(file._file.fileno()).st_size
    assert grown == sizes[0] + 4 * 5 * 8 * 4
    states.store(1, BatchState((torch.zeros(4, 5, 8), torch.zeros(2, 5), torch.zeros(2, 5))))
    assert os.fstat(file._file.fileno()).st_size == grown


def test_a_store_that_runs_out_of_memory_leaves_the_old_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Carried values appear for the first time: no memory for them, and the micro-batch must be able to run again."""
    states = HiddenStates(1)
    states.store(0, BatchState(torch.zeros(2, 3)))
    plain = torch.Tensor.to

    def to(self: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        if options.get("copy"):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain(self, *arguments, **options)

    monkeypatch.setattr(torch.Tensor, "to", to)
    with pytest.raises(torch.OutOfMemoryError):
        states.store(0, BatchState(torch.ones(2, 3), {"shared": {0: torch.ones(2)}}))
    assert same_states(states.load(0, CPU), BatchState(torch.zeros(2, 3)))


@pytest.mark.parametrize("on_disk", [False, True])
def test_what_is_prefetched_is_loaded_as_it_was_stored(on_disk: bool, tmp_path: Path) -> None:
    """Whatever was prefetched, what is loaded is the micro-batch that was asked for, as it is by then."""
    states = HiddenStates(3, folder=tmp_path if on_disk else None)
    for number in range(3):
        states.store(number, odd_state(number))
    states.prefetch(1, CPU)
    assert same_states(states.load(1, CPU), odd_state(1))
    states.prefetch(1, CPU)
    assert same_states(states.load(2, CPU), odd_state(2)), "another one was prefetched"
    states.prefetch(1, CPU)
    states.store(1, odd_state(5))
    states.store(2, odd_state(6))
    assert same_states(states.load(1, CPU), odd_state(5)), "it has changed since it was prefetched"
    states.prefetch(0, CPU)
    states.split(0, (4, 6), [1, 3])
    assert torch.equal(states.load(0, CPU).output[0], odd_state(0).output[0][:1]), "it was split since"
    assert same_states(states.load(3, CPU), odd_state(6))
    states.prefetch(2, CPU)
    states.drop_prefetch()
    states.close()


def test_what_fails_behind_is_raised_where_it_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that fails behind the computing ends in the same clear error, at the latest when all has to be there."""

    def pwrite(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    states = HiddenStates(2, folder=tmp_path)
    monkeypatch.setattr(os, "pwrite", pwrite)
    states.store(0, BatchState(torch.zeros(2, 3)))
    with pytest.raises(ResourceError, match="could not be written: Input/output error"):
        states.synchronize()
    states.store(0, BatchState(torch.zeros(2, 3)))
    with pytest.raises(ResourceError, match="could not be written: Input/output error"):
        states.store(1, BatchState(torch.zeros(2, 3)))
    states.close()


def test_states_that_nobody_looked_at_are_not_saved(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a card they are looked at when a block ends. A run stopped before would save what cannot be trusted."""
    plain_run, plain_check, within = MicroBatches.run, ForwardStage.check_finite, [False]

    def run(self: MicroBatches, *arguments: Any) -> None:
        within[0] = True
        try:
            plain_run(self, *arguments)
        finally:
            within[0] = False

    def check(self: ForwardStage) -> None:
        # As it is on a card.
        if not within[0]:
            plain_check(self)

    def run_layer(self: LayerForward, index: int, block: nn.Module, ids: torch.Tensor, state: BatchState) -> BatchState:
        result = PLAIN_RUN_BLOCK(self, index, block, ids, state)
        if index == 1:
            result.output[0, 0, 0] = poison
            os.kill(os.getpid(), signal.SIGINT)
        return result

    monkeypatch.setattr(MicroBatches, "run", run)
    monkeypatch.setattr(ForwardStage, "check_finite", check)
    monkeypatch.setattr(LayerForward, "run_layer", run_layer)
    ids = write_token_ids(tmp_path / "ids.jsonl", sequences=4, length=16)
    for poison, error in ((1.0, InterruptedRunError), (float("nan"), NonFiniteError)):
        out = tmp_path / f"out{poison}"
        with pytest.raises(error):
            prune(model, out, calibration=(str(ids),), batch_tokens=16)
        work = Path(f"{out}.work")
        assert bool(list((work / "states").iterdir())) is (error is InterruptedRunError)
        assert [path.name for path in sorted((work / "layers").glob("0*"))] == ["00000.json"]
