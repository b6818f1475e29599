"""Loading and decoding a layer of a quantized checkpoint takes no more memory than planned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from streamprune.calibration.sequences import Calibration
from streamprune.config import RunSettings
from streamprune.planning.memory_needs import find_needs
from streamprune.streaming.layer_weights import LayerWeights
from tests.helpers import CPU, known_family, prepare_whole
from tests.peak import Peak
from tests.quantized import make_quantized
from tests.thorough import crossed

LARGE: dict[str, Any] = {"hidden_size": 128, "moe_intermediate_size": 96, "intermediate_size": 96}


@pytest.mark.parametrize(
    ("scheme", "dtype"),
    crossed(
        ["fp8", "fp8-fused", "mxfp4", "deepseek-v4", "ct-w4", "ct-nvfp4", "gptq-act-order", "awq"],
        ["bfloat16", "float32"],
        usual=[("fp8", "float32"), ("mxfp4", "bfloat16"), ("ct-w4", "float32"), ("gptq-act-order", "bfloat16")],
    ),
)
def test_decoding_takes_no_more_than_planned(
    scheme: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As the command line sets it: what other threads make would not be seen here.
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    family = "gpt_oss" if scheme == "mxfp4" else "qwen3_moe"
    source = make_quantized(tmp_path, scheme, family, LARGE, dtype=torch.bfloat16).source
    settings = RunSettings(model=str(source), output=tmp_path / "out", keep=known_family(family).keep, dtype=dtype)
    prepared = prepare_whole(settings)
    ids = torch.zeros(8, dtype=torch.long)
    predicted = find_needs(settings, prepared, Calibration((ids,), ("test",), (0,), ""))
    weights, largest = LayerWeights(prepared, CPU), 0
    for index in range(prepared.skeleton.layer_count):
        with Peak() as peak, weights.layer(index) as layer:
            plain = sum(each.nbytes for each in layer.parameters())
        largest = max(largest, peak.nbytes)
    weights.close()
    # What is read is smaller than what it decodes to, and both are known apart.
    assert predicted.reading < plain <= predicted.layer
    # (Between tensors that lie in one memory there are gaps of up to 63 bytes.)
    assert 0.7 * predicted.loading < largest < predicted.loading + 64 * len(prepared.targets)
