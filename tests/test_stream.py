"""One block in memory at a time, hidden states updated in place, and the memory that all of it takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from streamprune.checkpoint.index import INDEX_NAME, open_checkpoint
from streamprune.errors import UnsupportedModelError
from streamprune.models.open import open_moe
from streamprune.streaming.forward import LayerForward, non_finite_tokens
from streamprune.streaming.layer_weights import LayerWeights
from streamprune.streaming.states import HiddenStates
from streamprune.work.saved_states import BatchState
from tests.helpers import CPU, known_family, load_whole, prune
from tests.tiny import FAMILIES, make_model, tiny_config

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("propagate", ["original", "pruned"])
def test_only_the_running_block_has_weights(propagate: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    plain = LayerForward.run_layer

    def watch(self: LayerForward, index: int, block: nn.Module, *arguments: Any) -> BatchState:
        loaded = [
            number
            for number, other in enumerate(self._decoder.layers)
            if any(not parameter.is_meta for parameter in other.parameters())
        ]
        seen.append((index, loaded))
        return plain(self, index, block, *arguments)

    monkeypatch.setattr(LayerForward, "run_layer", watch)
    prune(make_model(tmp_path / "model", tiny_config(FAMILIES[0])), tmp_path / "out", propagate=propagate)
    assert {index for index, _ in seen} == {0, 1, 2, 3}
    assert all(loaded == [index] for index, loaded in seen)


def test_more_than_ten_experts_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    """Not of their names: 0, 1, 10, 11, 2."""
    config: Any = tiny_config(known_family("qwen3_moe"))
    config.num_experts = 12
    model = make_model(tmp_path / "model", config)
    whole, opened = load_whole(model), open_moe(open_checkpoint(model))
    with closing(LayerWeights(opened, CPU)) as weights, weights.loaded(1) as layer:
        for name in ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"):
            assert torch.equal(layer.get_parameter(name), whole.get_parameter(f"model.layers.1.{name}"))


@pytest.mark.parametrize("file", ["a.safetensors", "z.safetensors"])
def test_experts_that_are_there_one_by_one_and_joined_are_loaded_as_by_transformers(file: str, tmp_path: Path) -> None:
    """Wherever they come in the index."""
    model = make_model(tmp_path / "model", tiny_config(known_family("qwen3_moe")))
    name = "model.layers.1.mlp.experts.gate_up_proj"
    wanted = load_whole(model).get_parameter(name).clone()
    save_file({name: torch.full_like(wanted, 7.0)}, model / file)
    index = json.loads((model / INDEX_NAME).read_text())
    files = index["weight_map"]
    index["weight_map"] = {name: file, **files} if file < "m" else {**files, name: file}
    (model / INDEX_NAME).write_text(json.dumps(index))
    wanted = load_whole(model).get_parameter(name)
    with closing(LayerWeights(open_moe(open_checkpoint(model)), CPU)) as weights, weights.loaded(1) as layer:
        assert torch.equal(layer.get_parameter("mlp.experts.gate_up_proj"), wanted)


def test_hidden_states_are_updated_in_place() -> None:
    states = HiddenStates(1)
    states.store(0, BatchState((torch.zeros(2, 3, 4), None)))
    kept = states.load(0, CPU).output[0]
    states.store(0, BatchState((torch.ones(2, 3, 4), None), {"shared": {"full": (torch.ones(1),)}}))
    assert states.load(0, CPU).output[0] is kept
    assert bool((kept == 1).all())
    assert states.load(0, CPU).carried["shared"]["full"][0].item() == 1


def test_stored_states_do_not_hold_on_to_what_they_were_cut_from() -> None:
    states = HiddenStates(1)
    states.store(0, BatchState(torch.zeros(1000, 3, 4)[:1]))
    assert states.load(0, CPU).output.untyped_storage().nbytes() == 3 * 4 * 4


def test_non_finite_tokens_are_counted_and_large_sums_are_not() -> None:
    hidden = torch.zeros(2, 5, 4, dtype=torch.float16)
    hidden[0, 1, 2] = float("nan")
    hidden[1, 3] = float("inf")
    assert non_finite_tokens(BatchState(hidden)) == 2
    assert non_finite_tokens(BatchState(torch.full((2, 5, 4), 60000.0, dtype=torch.float16))) == 0


def test_a_forward_that_changes_states_between_blocks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Re-entering such a forward would apply the change once for every block: wrong without a sign of it."""
    from transformers.models.qwen3_moe import modeling_qwen3_moe as modeling

    plain = modeling.Qwen3MoeModel.forward

    def forward(self: Any, *arguments: Any, **keywords: Any) -> Any:
        first = self.layers[0].forward
        self.layers[0].forward = lambda *a, **k: first(*a, **k).mul_(2.0)
        try:
            return plain(self, *arguments, **keywords)
        finally:
            self.layers[0].forward = first

    monkeypatch.setattr(modeling.Qwen3MoeModel, "forward", forward)
    source = make_model(tmp_path / "model", tiny_config(FAMILIES[0]))
    with pytest.raises(UnsupportedModelError, match="in place between its layers"):
        prune(source, tmp_path / "out")


def test_memory_does_not_grow_with_depth(tmp_path: Path) -> None:
    """Three times the blocks, and peak resident memory grows by less than the weights of one block, as `tools/bench`
    measures it, with the least that it can be asked for: each figure takes processes that import torch.

    oneDNN's and torch's caches of compiled CPU kernels, bounded but slow to fill, are switched off: they are no part of
    what a block may leave behind.
    """
    saved = tmp_path / "figures.json"
    command = [sys.executable, str(ROOT / "tools" / "bench"), "--shape", "mid", "--samples", "2", "--seq-len", "64"]
    command += ["--rounds", "0", "--depths", "2", "6", "--dtype", "float32", "--output", str(saved)]
    environment = {**os.environ, "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1", "LRU_CACHE_CAPACITY": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads(saved.read_text())
    assert json.loads(done.stdout) == figures
    assert (figures["shape"], figures["dtype"], figures["tokens"]) == ("mid", "float32", 128)
    peaks = figures["peak_mib_by_layers"]
    assert list(peaks) == ["2", "6"]
    assert all(100 < figures["import_peak_mib"] < peak for peak in peaks.values())
    assert figures["depth_growth_in_layers"] < 1.0, figures
