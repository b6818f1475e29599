"""Storage formats on a GPU: decoded and written there as on the CPU.

On a machine with a GPU there may be little beside the package: what needs compressed-tensors is skipped without it.
"""

from __future__ import annotations

import pytest
import torch

from streamprune.checkpoint.reader import DTYPES
from streamprune.formats.integers import PackedIntegers
from streamprune.quantize.schemes import SCHEMES, scheme_of
from tests import packers
from tests.stored import PRESETS, matrix, preset, read

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", PRESETS)
def test_weights_are_decoded_where_they_are(name: str) -> None:
    packed, config = preset(name, matrix(64, 96, 3, torch.bfloat16))
    on_gpu = read({leaf: tensor.cuda() for leaf, tensor in packed.parts.items()}, config, torch.bfloat16)
    assert on_gpu.values.is_cuda
    assert torch.equal(on_gpu.values.cpu(), read(packed.parts, config, torch.bfloat16).values)


@pytest.mark.parametrize("g_idx", ["plain", "shuffled"])
def test_gptq_and_awq_are_decoded_where_they_are(g_idx: str) -> None:
    for packed, section in (
        (packers.gptq(matrix(64, 96, 4), g_idx=g_idx), {"quant_method": "gptq", "bits": 4, "group_size": 32}),
        (packers.awq(matrix(64, 96, 5)), {"quant_method": "awq", "bits": 4, "group_size": 32}),
    ):
        parts = {leaf: tensor.cuda() for leaf, tensor in packed.parts.items()}
        on_gpu = read(parts, {"quantization_config": section}).values
        assert on_gpu.is_cuda
        assert torch.equal(on_gpu.cpu(), packed.values)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_a_gpu_writes_the_same_bytes(name: str, dtype: str) -> None:
    weight, made = matrix(300, 2048, 9, DTYPES[dtype]), scheme_of(name, [2048], dtype=dtype)
    if isinstance(made.format, PackedIntegers):
        pytest.importorskip("compressed_tensors")
    weight[5], weight[6, 7] = 0, 1e-7
    ours = made.encode(weight)
    theirs = made.encode(weight.cuda())
    for part, tensor in ours.items():
        assert theirs[part].is_cuda
        assert torch.equal(theirs[part].cpu().view(torch.uint8), tensor.view(torch.uint8))
