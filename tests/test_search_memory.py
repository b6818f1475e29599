"""A search takes the memory of a layer and the candidates' versions of it, however many layers the model has."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest

from streamprune.config import SearchSettings
from streamprune.pipeline.search import search
from streamprune.streaming.layer_loop import LayerLoop
from streamprune.streaming.stages import LayerTask
from streamprune.streaming.written_tensors import WrittenTensor
from tests.helpers import known_family
from tests.peak import Peak
from tests.tiny import make_model, tiny_config, write_token_ids

CANDIDATES = ("weights=w4a16", "keep=6,weights=fp8-dynamic,refit")


def peak_of_search(folder: Path, layers: int) -> int:
    """The bytes of all tensors of a search of a model with so many layers, at most."""
    config = tiny_config(known_family("qwen3_moe"))
    config.num_hidden_layers = layers
    make_model(folder / f"model-{layers}", config)
    given: dict[str, Any] = {"budget_gib": 2.0, "context": 64, "drop_above": 0.0, "anchor": "none", "device": "cpu"}
    settings = SearchSettings(
        model=str(folder / f"model-{layers}"), output=folder / f"out-{layers}", candidates=CANDIDATES,
        calibration=(str(write_token_ids(folder / "ids.jsonl", sequences=30)),), batch_tokens=512, **given,
    )  # fmt: skip
    with Peak() as peak:
        search(settings, quiet=True)
    return peak.nbytes


def test_more_layers_take_no_more_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual, tables = LayerLoop.run_layer, list[int]()

    def run_layer(self: LayerLoop, task: LayerTask, following: int | None) -> None:
        usual(self, task, following)
        gc.collect()
        tables.append(sum(isinstance(each, WrittenTensor) for each in gc.get_objects()))

    monkeypatch.setattr(LayerLoop, "run_layer", run_layer)
    few = peak_of_search(tmp_path, 3)
    many = peak_of_search(tmp_path, 4)
    assert many < 1.02 * few
    # What describes the output's tensors is there of one layer as well, for each candidate.
    assert len(tables) == 7
    assert max(tables[3:]) <= max(tables[:3])
