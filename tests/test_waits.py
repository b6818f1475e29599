"""What makes the host wait for a GPU: on the CPU the operators are counted whose results the host has to know."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils

from streamprune.checkpoint.index import open_checkpoint
from streamprune.models.open import open_moe
from streamprune.saliency.hooks import recorded_width, tap_experts
from streamprune.saliency.statistics import ExpertStatistics
from streamprune.streaming.forward import hidden_states_of
from streamprune.streaming.layer_weights import LayerWeights
from streamprune.work.saved_states import BatchState
from tests.helpers import CPU
from tests.thorough import by_family
from tests.tiny import FAMILIES, Family, make_model, tiny_config

#: The host asks for a number, or for how many elements there are.
ASKING = {"_local_scalar_dense", "equal", "is_nonzero", "item", "masked_select", "nonzero", "unique_dim", "_unique2"}
#: Families of which transformers' own code asks in every forward: loops over the experts that were chosen, and masks
#: that select rows.
ASKING_FAMILIES = {"dbrx", "glm5_next", "muse_spark", "qwen4_exp_text", "step3p7"}


class Questions(TorchDispatchMode):
    """Counts what the host asks of tensors, by the name of the operator."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name in ASKING or (name in ("index", "index_put", "index_put_") and _has_mask(arguments[1])):
            self.counts[name] += 1
        return function(*arguments, **(named or {}))


def _has_mask(indices: Any) -> bool:
    return any(isinstance(each, torch.Tensor) and each.dtype == torch.bool for each in indices)


@by_family()
def test_the_host_asks_nothing_in_the_second_micro_batch_of_a_shape(family: Family, tmp_path: Path) -> None:
    """While it is recorded; and what comes out is the same to the bit as where the model's own masks were asked."""
    opened = open_moe(open_checkpoint(make_model(tmp_path / "model", tiny_config(family))))
    skeleton = opened.skeleton
    taps = tap_experts({index: skeleton.layers[index].get_submodule(path) for index, path in skeleton.experts.items()})
    width, weights = recorded_width(skeleton), LayerWeights(opened, CPU)
    weights.load_non_layer_weights()
    ids, state = torch.randint(0, 60, (2, 12), generator=torch.Generator().manual_seed(0)), BatchState()
    asked = [Counter[str](), Counter[str]()]
    for index, tap in sorted((taps | dict.fromkeys(set(range(weights.decoder.layer_count)) - set(taps))).items()):
        with weights.layer(index) as layer:
            outputs = []
            for counts in asked:
                with _recorded(tap, layer, skeleton.spec.count, width), Questions() as questions:
                    outputs.append(weights.forward.run_layer(index, layer, ids, state))
                counts.update(questions.counts)
        first, second = map(hidden_states_of, outputs)
        assert torch.equal(first, second)
        state = outputs[1]
    weights.close()
    assert bool(asked[1]) is (family.id in ASKING_FAMILIES), asked[1]


@contextmanager
def _recorded(tap: Any, layer: nn.Module, experts: int, width: int | None) -> Iterator[None]:
    """Record what goes through the layer, if it has experts."""
    if tap is None:
        yield
        return
    with tap.listening(layer):
        tap.statistics = ExpertStatistics(experts, CPU, width=width)
        yield


def test_packed_sequences_are_looked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For each shape; and the function of the library is its own again after each forward."""
    shapes = []
    usual = masking_utils.find_packed_sequence_indices

    def find(position_ids: torch.Tensor) -> torch.Tensor | None:
        shapes.append(tuple(position_ids.shape))
        found: torch.Tensor | None = usual(position_ids)
        return found

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", find)
    opened = open_moe(open_checkpoint(make_model(tmp_path / "model", tiny_config(FAMILIES[0]))))
    weights = LayerWeights(opened, CPU)
    weights.load_non_layer_weights()
    with weights.layer(0) as layer:
        for size in ((2, 12), (2, 12), (1, 12), (2, 12)):
            weights.forward.run_layer(0, layer, torch.zeros(size, dtype=torch.long), BatchState())
            assert masking_utils.find_packed_sequence_indices is find
    weights.close()
    assert shapes == [(2, 12), (1, 12)]
