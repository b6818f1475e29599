"""What several tests need: running, whole-model references, and an independent check of a pruned checkpoint."""

from __future__ import annotations

import json
import re
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from streamprune.checkpoint.index import open_checkpoint
from streamprune.config import RunSettings
from streamprune.models.expert_channels import find_channels
from streamprune.models.open import OpenedModel, load_config
from streamprune.models.skeleton import build_skeleton, map_checkpoint
from streamprune.pipeline.finish import RunResult
from streamprune.pipeline.run import run
from streamprune.planning.prepare import PreparedModel, plan_pruning, prepare
from streamprune.saliency.hooks import recorded_width, tap_experts
from streamprune.saliency.scores import FIELDS, LayerStatistics
from streamprune.saliency.statistics import ExpertStatistics
from streamprune.streaming.layer_weights import LayerWeights
from streamprune.work.saved_states import BatchState
from tests.tiny import FAMILIES, VOCAB, Family, write_token_ids

#: Where tools/environment keeps Triton. Were it among the other packages, every process that imports torch would import
#: it too, which takes a second and 70 MiB. It goes behind all others: torch's builds for GPUs bring their own.
TRITON = str(Path(sys.prefix) / "triton")
CPU = torch.device("cpu")
#: Earlier versions of transformers round the experts that they decode from compressed-tensors' floats to bfloat16.
DECODES_FLOATS = Version(transformers.__version__) >= Version("5.21")


def prune(model: Path, output: Path, **settings: Any) -> RunResult:
    """Run streamprune on token ids made on the spot, unless the settings say otherwise."""
    if "calibration" not in settings:
        settings["calibration"] = (str(write_token_ids(output.parent / "calibration.jsonl")),)
    if not {"ratio", "budget_gib", "gpu"} & settings.keys():
        settings.setdefault("keep", 5)
    return run(RunSettings(model=str(model), output=output, **settings), quiet=True)


def known_family(name: str) -> Family:
    """The tiny model of a family; the test is skipped where the installed transformers is too old for it."""
    for each in FAMILIES:
        if each.id == name:
            return each
    pytest.skip(f"the installed transformers does not know {name}")


def token_ids(batch: int = 2, length: int = 32, seed: int = 3) -> torch.Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def load_whole(folder: Path, **options: Any) -> Any:
    """The whole model in memory, through the Auto class that takes it for text.

    Its parameters are copied out of the mapped file: matrix products of unaligned memory may round differently, so
    that even one model's logits depend on where its file puts the weights (seen with dbrx).
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
    except ValueError:
        model = AutoModelForImageTextToText.from_pretrained(folder, **options)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model.eval()


def load_as_declared(folder: Path) -> tuple[Any, dict[str, Any]]:
    """The model through the class that its config names, and transformers' report on missing or unexpected keys."""
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, info = getattr(transformers, architecture).from_pretrained(folder, output_loading_info=True)
    return model, info


def streamed(folder: Path, ids: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, dict[int, LayerStatistics]]:
    """Logits of a model streamed layer by layer, with every MoE layer scored on the way."""
    checkpoint = open_checkpoint(folder)
    skeleton = build_skeleton(load_config(folder), dtype)
    opened = OpenedModel(checkpoint, skeleton, map_checkpoint(skeleton, checkpoint.tensors, checkpoint.config), dtype)
    weights = LayerWeights(opened, CPU)
    width = recorded_width(find_channels(load_config(folder), skeleton, dtype))
    taps = tap_experts({index: skeleton.layers[index].get_submodule(path) for index, path in skeleton.experts.items()})
    weights.load_non_layer_weights(head=True)
    state = BatchState()
    statistics = {}
    for index in range(skeleton.layer_count):
        with weights.layer(index) as layer, ExitStack() as stack:
            if index in taps:
                stack.enter_context(taps[index].listening(layer))
                taps[index].statistics = heard = ExpertStatistics(skeleton.spec.count, CPU, width=width)
            state = weights.forward.run_layer(index, layer, ids, state)
            if index in taps:
                statistics[index] = heard.of_layer(index)
    return weights.forward.logits(ids, state), statistics


def field_of(layer: LayerStatistics, name: str) -> list[float]:
    """One field of the statistics of a layer, (E,), of all sources together."""
    values = layer.values[list(FIELDS).index(name)]
    return list(values.max(axis=0) if name == "peaks" else values.sum(axis=0))


def prepare_whole(settings: RunSettings) -> PreparedModel:
    """Decide and open, as a run does before it reads a weight."""
    return prepare(settings, plan_pruning(settings))


def prune_in_memory(source: Path, output: Path, kept: dict[int, list[int]]) -> Any:
    """The source model loaded whole, its parameters cut to the kept experts, in the class of the output's config."""
    whole = load_whole(source)
    config = AutoConfig.from_pretrained(output)
    torch.manual_seed(0)
    try:
        small = AutoModelForCausalLM.from_config(config)
    except ValueError:
        small = AutoModelForImageTextToText.from_config(config)
    state = small.state_dict()
    sliced = {}
    for name, tensor in whole.state_dict().items():
        wanted = state[name].shape
        for axis, (have, want) in enumerate(zip(tensor.shape, wanted, strict=True)):
            if have != want:
                block = int(re.search(r"\.(\d+)\.", name).group(1))  # type: ignore[union-attr]
                width = (have - want) // (8 - len(kept[block]))
                rows = [expert * width + row for expert in kept[block] for row in range(width)]
                rows += range(8 * width, have)  # rows of shared experts, behind the others'
                tensor = tensor.index_select(axis, torch.tensor(rows))
        sliced[name] = tensor
    small.load_state_dict(sliced)  # copies into small's own memory
    return small.eval()


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(path))
    return tensors


def check_bytes(source: Path, output: Path, kept: dict[int, list[int]], experts: int = 8) -> int:
    """Assert that every output tensor is, bit for bit, what the kept experts say; returns how many belong to experts.

    Knows nothing of streamprune's own mapping: it goes by names and shapes.
    """
    before, after = read_tensors(source), read_tensors(output)
    expert_tensors = 0
    seen = set()
    for name, tensor in after.items():
        number = re.search(r"experts\.(\d+)\.", name)
        if number is not None and re.search(r"layers\.\d+\.", name):
            expert_tensors += 1
            block = int(re.search(r"layers\.(\d+)\.", name).group(1))  # type: ignore[union-attr]
            origin = name.replace(number.group(0), f"experts.{kept[block][int(number.group(1))]}.")
            expected = before[origin]
            seen.add(origin)
        else:
            expected = before[name]
            seen.add(name)
            for axis, (have, want) in enumerate(zip(expected.shape, tensor.shape, strict=True)):
                if have != want:
                    expert_tensors += 1
                    block = int(re.search(r"\.(\d+)\.", name).group(1))  # type: ignore[union-attr]
                    width = have // experts
                    rows = [expert * width + row for expert in kept[block] for row in range(width)]
                    rows += range(experts * width, have)
                    expected = expected.index_select(axis, torch.tensor(rows))
        assert tensor.dtype == expected.dtype, name
        assert torch.equal(tensor.view(torch.uint8), expected.contiguous().view(torch.uint8)), name
    removed = [name for name in before if name not in seen]
    assert all("experts." in name for name in removed), removed[:3]
    return expert_tensors


def tree_bytes(folder: Path) -> dict[str, bytes]:
    """Every file under a folder with its contents."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
