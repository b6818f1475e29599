"""Where memory runs out: micro-batches shrink, nothing is counted twice, and the user is told."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from streamprune.calibration.sequences import Calibration, MicroBatch
from streamprune.cli import main
from streamprune.config import RunSettings
from streamprune.errors import ResourceError
from streamprune.hardware.device import is_out_of_memory
from streamprune.hardware.memory_plan import Limit, MemoryPlan, Needs, Room
from streamprune.pipeline.finish import RunResult
from streamprune.progress import Progress
from streamprune.streaming import batches
from streamprune.streaming.batches import MicroBatches, Runtime
from streamprune.streaming.forward import LayerForward
from streamprune.work.saved_states import BatchState
from tests.helpers import CPU, known_family, prune
from tests.thorough import crossed, thorough
from tests.tiny import FAMILIES, make_model, tiny_config, write_token_ids

QWEN = FAMILIES[0]
PLAIN_RUN_BLOCK = LayerForward.run_layer


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model", tiny_config(QWEN))


def same_but_for_rounding(result: RunResult, undisturbed: RunResult) -> None:
    assert len(result.layers) == len(undisturbed.layers) > 0
    for got, wanted in zip(result.layers, undisturbed.layers, strict=True):
        assert (got.index, got.kept, got.tokens) == (wanted.index, wanted.kept, wanted.tokens)
        assert got.scores == pytest.approx(wanted.scores, rel=1e-6)


class OutOfMemoryAt:
    """Stands in for `LayerForward.run_layer`: its n-th call runs out of memory, before or after the real forward.

    So do the next ones, `times` in all.
    """

    def __init__(self, position: int, late: bool, error: Exception, times: int = 1) -> None:
        self.failing, self.late, self.error, self.calls = range(position, position + times), late, error, 0

    def __get__(self, stream: LayerForward, _: Any = None) -> Any:
        def run_layer(*arguments: Any) -> BatchState:
            number, self.calls = self.calls, self.calls + 1
            if number in self.failing and not self.late:
                raise self.error
            state = PLAIN_RUN_BLOCK(stream, *arguments)
            if number in self.failing:
                raise self.error
            return state

        return run_layer


@pytest.mark.parametrize(
    ("propagate", "late"),
    [("original", False), pytest.param("original", True, marks=thorough), ("pruned", True)],
)
def test_out_of_memory_at_every_micro_batch_changes_nothing(
    propagate: str, late: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, thoroughly: bool
) -> None:
    """Five sequences in micro-batches of two, two and one: wherever the failure comes, nothing is counted twice.

    With a single sequence, the block that was read ahead makes room first; only then there is nothing left to do.
    """
    ids = write_token_ids(tmp_path / "ids.jsonl", sequences=5, length=16)
    options = {"calibration": (str(ids),), "batch_tokens": 32, "propagate": propagate}
    count = OutOfMemoryAt(-1, late, MemoryError())
    monkeypatch.setattr(LayerForward, "run_layer", count)
    undisturbed = prune(model, tmp_path / "undisturbed", **options)
    assert count.calls == 4 * 3 * (2 if propagate == "pruned" else 1)
    assert undisturbed.summary["shrinks"] == []
    # Some of either kind, in the first block and in the last one.
    some = {0, 5, count.calls // 2, count.calls - 1}
    for position in range(count.calls) if thoroughly else sorted(some):
        out, single = tmp_path / f"at{position}", position % 3 == 2
        ahead = position < count.calls - count.calls // 4
        if single:
            failing = OutOfMemoryAt(position, late, torch.OutOfMemoryError("CUDA out of memory."), 2 if ahead else 1)
            monkeypatch.setattr(LayerForward, "run_layer", failing)
            with pytest.raises(ResourceError, match="with a single sequence of 16 tokens"):
                prune(model, out, **options)
            if not ahead:
                continue
            shutil.rmtree(f"{out}.work", ignore_errors=True)
        failing = OutOfMemoryAt(position, late, torch.OutOfMemoryError("CUDA out of memory."))
        monkeypatch.setattr(LayerForward, "run_layer", failing)
        result = prune(model, out, **options)
        same_but_for_rounding(result, undisturbed)
        shrinks = [(shrink["sequences"], shrink["to"]) for shrink in result.summary["shrinks"]]
        assert shrinks == ([] if single else [(2, 1)])


def limit_sequences(monkeypatch: pytest.MonkeyPatch, most: int, from_block: int = 0, error: Any = None) -> None:
    """Memory for at most so many sequences at a time, from some block on."""

    def run_layer(self: LayerForward, index: int, block: nn.Module, ids: torch.Tensor, state: BatchState) -> BatchState:
        result = PLAIN_RUN_BLOCK(self, index, block, ids, state)
        if index >= from_block and len(ids) > most:
            raise error or torch.OutOfMemoryError("CUDA out of memory.")
        return result

    monkeypatch.setattr(LayerForward, "run_layer", run_layer)


@pytest.mark.parametrize(
    ("name", "states"),
    crossed(
        ["qwen3_moe", "gemma4_text", "glm_moe_dsa", "qwen4_exp_text", "minimax", "jamba"],
        ["ram", "disk"],
        usual=[("gemma4_text", "disk"), ("glm_moe_dsa", "ram"), ("qwen3_moe", "disk")],
    ),
)
def test_states_of_every_structure_are_split(
    name: str, states: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys and values that layers share (gemma4), tuples (glm_moe_dsa): from block 2 on seven sequences go in pairs."""
    source = make_model(tmp_path / "model", tiny_config(known_family(name)))
    ids = write_token_ids(tmp_path / "ids.jsonl", sequences=7, length=14)
    options = {"calibration": (str(ids),), "keep": known_family(name).keep, "states": states}
    undisturbed = prune(source, tmp_path / "undisturbed", **options)
    limit_sequences(monkeypatch, 2, from_block=2)
    result = prune(source, tmp_path / "split", **options)
    same_but_for_rounding(result, undisturbed)
    assert [(shrink["block"], shrink["sequences"], shrink["to"]) for shrink in result.summary["shrinks"]] == [
        (2, 7, 4),
        (2, 4, 2),
    ]


def test_shrinking_is_told_once_recorded_and_kept_for_the_run(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"
    limit_sequences(monkeypatch, 1, error=RuntimeError(message))
    ids = write_token_ids(tmp_path / "ids.jsonl")
    arguments = ["run", str(model), "-o", str(tmp_path / "out"), "--keep", "4", "--calibration", str(ids), "--json"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    notes = [line for line in result.stderr.splitlines() if line.startswith("note: out of memory")]
    assert notes == [
        "note: out of memory in layer 0 with 4 sequences at a time; continuing with 2.",
        "note: out of memory in layer 0 with 2 sequences at a time; continuing with 1.",
    ]
    summary = json.loads(result.stdout)
    assert [shrink["to"] for shrink in summary["shrinks"]] == [2, 1]
    assert summary["batch_tokens"] == 24
    report = json.loads((tmp_path / "out" / "streamprune.json").read_text())
    assert report["settings"]["batch_tokens"] == 24
    events = [json.loads(line) for line in (tmp_path / "out.streamprune.log").read_text().splitlines()]
    assert [event["event"] for event in events] == ["shrink"] * 2 + ["block"] * 4 + ["summary"]


def test_what_a_failed_attempt_held_is_freed_before_the_next(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error's traceback holds frames and so tensors; none of them may be alive when memory is given back."""
    import gc
    import weakref

    held: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []
    plain = batches.free_after_failure

    def run_layer(self: LayerForward, index: int, block: nn.Module, ids: torch.Tensor, state: BatchState) -> BatchState:
        result = PLAIN_RUN_BLOCK(self, index, block, ids, state)
        if len(ids) > 1:
            held.append(weakref.ref(result.output))
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return result

    def free(device: torch.device) -> None:
        gc.collect()
        alive.append(sum(each() is not None for each in held))
        plain(device)

    monkeypatch.setattr(LayerForward, "run_layer", run_layer)
    monkeypatch.setattr(batches, "free_after_failure", free)
    prune(model, tmp_path / "out")
    assert len(held) == 2
    assert alive == [0, 0]


def test_other_errors_are_not_taken_for_a_lack_of_memory(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_sequences(monkeypatch, 1, error=RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        prune(model, tmp_path / "out")


def test_the_cpu_allocators_own_error_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"))
    assert is_out_of_memory(RuntimeError("could not create a primitive"))
    assert not is_out_of_memory(RuntimeError("could not create a primitive descriptor for a matmul primitive"))
    assert not is_out_of_memory(ValueError("out of memory"))


@pytest.mark.parametrize("inside", [False, True], ids=["while reading", "while converting"])
def test_out_of_memory_while_weights_are_loaded_names_the_block(
    inside: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.core_model_loading import MergeModulelist

    from streamprune.models import skeleton
    from streamprune.streaming import layer_weights

    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    if inside:
        # transformers catches what goes wrong here and goes on. (Usually experts are read as joined.)
        monkeypatch.setattr(skeleton, "find_places", lambda *_: {})
        monkeypatch.setattr(MergeModulelist, "convert", fail)
    else:
        plain = layer_weights.LayerWeights._load
        monkeypatch.setattr(
            layer_weights.LayerWeights,
            "_load",
            lambda self, reading, groups, index: fail() if index == 2 else plain(self, reading, groups, index),
        )
    words = rf"Out of memory on cpu while loading the weights of layer {0 if inside else 2} \(.*2.00 GiB"
    with pytest.raises(ResourceError, match=words):
        prune(model, tmp_path / "out")
    assert (tmp_path / "out.work").exists() is not inside, "finished blocks are kept"


def test_states_leave_the_card_before_the_run_gives_up(tmp_path: Path) -> None:
    """Only while their place was left to us; here the CPU's memory stands in for the card's."""
    calibration = Calibration(tuple(torch.full((8,), number) for number in range(4)), ("test",), (0,) * 4, "")
    room = Room(Limit(1000, "", ""), Limit(1000, "", ""), Limit(1000, "", ""))
    plan = MemoryPlan("device", 32, Needs(1, 1, 1, 1, 1, 100, lambda tokens: tokens, 4, 8, 32, 4), room, "cuda:0")

    def carry(states: str) -> tuple[MicroBatches, list[int], str]:
        shown, committed = io.StringIO(), []
        settings = RunSettings(model="m", output=tmp_path, keep=4, states=states)
        runtime = Runtime(settings, plan, CPU, Progress(1, quiet=False, stream=shown), tmp_path)
        micro = MicroBatches(runtime, calibration)

        def compute(number: int, batch: MicroBatch, state: BatchState) -> BatchState:
            if micro.place == "device" and number == 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return BatchState(batch.ids.float() + (0 if state.output is None else state.output))

        micro.batch_tokens = 8
        for _ in range(2):
            micro.run(0, compute, lambda done, batch: committed.append(done))
        return micro, committed, shown.getvalue()

    micro, committed, shown = carry("auto")
    assert micro.place == "ram"
    assert len(committed) == 8
    assert shown == ("note: out of memory in layer 0 with a single sequence; the hidden states move from cpu to RAM.\n")
    assert [float(micro._states.load(number, CPU).output.mean()) for number in range(4)] == [0, 2, 4, 6]
    with pytest.raises(ResourceError, match=r"with a single sequence of 8 tokens .* --states ram"):
        carry("device")
