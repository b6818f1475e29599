"""Layers for multi-token prediction (MTP): they keep what the last layer with experts keeps, or are dropped and said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from streamprune.config import PruneSettings
from streamprune.errors import VerifyError
from streamprune.fit.estimate import Fit
from streamprune.output.verify import verify
from streamprune.pipeline.prune import prune as prune_by_scores
from streamprune.planning.sizes import read_forms
from streamprune.targets import ServingSpec, Storage
from tests.helpers import known_family, prune, read_tensors, tree_bytes
from tests.mtp import COUNTS, add_mtp, check_mtp
from tests.quantized import make_quantized
from tests.test_run import invoke
from tests.tiny import make_model, tiny_config

GIB = 2**30
STYLES = [("deepseek_v3", "further"), ("glm4_moe", "further"), ("qwen3_next", "mtp"), ("qwen3_5_moe", "mtp")]


def make_source(folder: Path, family: str = "glm4_moe", style: str = "further") -> tuple[Path, str]:
    """A tiny model with an MTP layer, and the path of that."""
    source = make_model(folder / "model", tiny_config(known_family(family)))
    return source, add_mtp(source, style)


def text_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    part: dict[str, Any] = config.get("text_config", config)
    return part


@pytest.mark.parametrize(("family", "style"), STYLES)
def test_it_keeps_what_the_last_layer_keeps(tmp_path: Path, family: str, style: str) -> None:
    source, path = make_source(tmp_path, family, style)
    result = prune(source, tmp_path / "out", keep=6)
    check_mtp(tmp_path / "out", path)
    assert text_config(tmp_path / "out")[COUNTS[style]] == 1
    record = json.loads((tmp_path / "out" / "streamprune.json").read_text())
    assert record["dropped"] == []
    assert record["mtp"] == {"tensors": result.summary["mtp_tensors"], "experts_of": 3}
    assert "that layer 3 keeps by number" in (tmp_path / "out" / "README.md").read_text()
    assert verify(tmp_path / "out", source).tensors == len(read_tensors(tmp_path / "out"))
    # Counted before a weight is read as it is written.
    whole = Fit(read_forms(str(source), None, False, Storage()), ServingSpec(keep=6), GIB)
    assert whole.weights_bytes == result.summary["output_bytes"]
    # The output can be pruned again.
    prune(tmp_path / "out", tmp_path / "again", keep=4)
    check_mtp(tmp_path / "again", path)
