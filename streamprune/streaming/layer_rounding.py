"""Rounding the matrices of a layer by what enters them (GPTQ), and encoding what a refit has computed.

The results are tensors of the output, as they are written. What GPTQ cannot round well is left to rounding to nearest:
matrices without a factored Hessian, and experts with few tokens. These are made again from the source when they are
written, or from the refitted values. GPTQ leaves scales as they are: made again from the source to verify them, they
prove which matrix the codes beside them were computed of.

Shapes: K matrices or experts at a time, R rows, C columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from streamprune.distributed.processes import Processes
from streamprune.formats.base import KeptExperts
from streamprune.hardware.device import free_after_failure, lack_of_memory
from streamprune.output.encoded import SCALE
from streamprune.output.tensors import ComputedTensors, StageTensor
from streamprune.quantize.gptq import gptq
from streamprune.quantize.schemes import Scheme
from streamprune.streaming.written_tensors import WrittenTensor, WrittenTensors

#: The name of the stage that computes these tensors.
GPTQ = "gptq"
#: Experts with fewer routed tokens are rounded to nearest. (With about 100, GPTQ still halved the loss of the demo's
#: model; fewer were not measured.)
LEAST_TOKENS = 64

#: Matrices with the same input, which are rounded by one Hessian.
Group = Sequence[WrittenTensor]


@dataclass
class Outcome:
    """What came of rounding some groups: computed `parts`, the places of those that `failed`, and relative `errors`.

    Each error is ‖X(W - Q)ᵀ‖ / ‖XWᵀ‖ over the tokens that the group was rounded by: rounded to nearest, and by GPTQ.
    """

    parts: dict[str, StageTensor] = field(default_factory=dict)
    failed: set[int] = field(default_factory=set)
    errors: list[tuple[float, float]] = field(default_factory=list)

    def __iadd__(self, other: Outcome) -> Outcome:
        self.parts |= other.parts
        self.failed |= other.failed
        self.errors += other.errors
        return self


class LayerRounding:
    """Rounds the matrices of one layer, of whose experts `kept` stays; `refitted` has plain tensors of the refit.

    All processes call its methods alike; rank 0 rounds, and all get the result.
    """

    def __init__(
        self, written: WrittenTensors, layer: int, kept: KeptExperts, refitted: ComputedTensors, processes: Processes
    ) -> None:
        self._written, self._layer, self._kept, self._refitted = written, layer, kept, refitted
        self._processes = processes
        self.outcome = Outcome()

    @property
    def computed(self) -> ComputedTensors:
        """All that is computed of the layer so far, refitted plain tensors included."""
        return ComputedTensors(self._refitted.plain, self.outcome.parts)

    def add(self, groups: Sequence[Group], hessians: torch.Tensor) -> set[int]:
        """Round groups of equal shapes by XᵀX (K, C, C) over all processes, float32; returns which failed.

        Raises torch's error if memory runs out.
        """
        outcome = self._processes.on_first(lambda: self._round(groups, hessians))
        self.outcome += Outcome(outcome.parts, set(), outcome.errors)
        return outcome.failed

    def add_experts(self, groups: Sequence[Group], hessian: Callable[[int], torch.Tensor], chunk: int) -> set[int]:
        """Round a group of each of some experts, `chunk` of them at a time; returns the places of those that failed.

        `hessian` returns this process's XᵀX (C, C), float64, for a place. If the memory of the only process runs out,
        chunks are halved.
        """
        failed: set[int] = set()
        begin = 0
        while begin < len(groups):
            places = range(begin, min(begin + chunk, len(groups)))
            attempt = partial(self._add_chunk, [groups[place] for place in places], hessian, places, failed)
            if self._processes.count > 1 or chunk == 1:
                attempt()
            elif lack_of_memory(attempt) is not None:
                free_after_failure(self._written.device)
                chunk //= 2
                continue
            begin = places.stop
        return failed

    def _add_chunk(
        self, groups: Sequence[Group], hessian: Callable[[int], torch.Tensor], places: range, failed: set[int]
    ) -> None:
        columns = groups[0][0].plain.shape[1]
        exact = torch.empty((len(places), columns, columns), dtype=torch.float64, device=self._written.device)
        for number, place in enumerate(places):
            exact[number] = hessian(place)
        self._processes.add_up(exact)
        hessians = exact.float()
        del exact
        failed |= {places[place] for place in self.add(groups, hessians)}

    def _round(self, groups: Sequence[Group], hessians: torch.Tensor) -> Outcome:
        """The same for this process alone."""
        scheme = groups[0][0].scheme
        assert scheme is not None
        outcome = Outcome()
        with self._written.reading([each for group in groups for each in group], self._kept, self._refitted):
            if all(_is_joinable(each, scheme) for each in groups[0]):
                return self._round_joined(groups, hessians, scheme)
            for place in range(len(groups[0])):
                outcome += self._round_joined([[group[place]] for group in groups], hessians, scheme)
        return outcome

    def _round_joined(self, groups: Sequence[Group], hessians: torch.Tensor, scheme: Scheme) -> Outcome:
        weights = torch.stack([torch.cat([self._weight(each) for each in group]) for group in groups])
        rounding = gptq(weights, hessians, scheme)
        outcome = Outcome(failed=set(rounding.failed))
        nearest = scheme.rounded(scheme.round(weights, rounding.scales), rounding.scales)
        for place, group in enumerate(groups):
            if place in outcome.failed:
                continue
            found = [weights[place], weights[place] - nearest[place], weights[place] - rounding.values[place]]
            whole, *lost = (_energy(each, hessians[place]) for each in found)
            before, after = (math.sqrt(each / whole) if whole else 0.0 for each in lost)
            outcome.errors.append((before, after))
            begin = 0
            for each in group:
                rows = each.plain.shape[0]
                high, _ = scheme.block(each.plain.shape)
                own = slice(begin // high, -(-(begin + rows) // high))
                parts = scheme.pack(rounding.codes[place, begin : begin + rows], rounding.scales[place, own])
                made = each.stage_tensors(parts, GPTQ)
                if each.name not in self._refitted.plain:
                    scale = each.parts[SCALE].name
                    made[scale] = replace(made[scale], from_source=True)
                outcome.parts |= made
                begin += rows
        return outcome

    def _weight(self, written: WrittenTensor) -> torch.Tensor:
        plain = self._written.plain_values(written.plain, self._kept, self._refitted)
        return plain.to(self._written.device).float()


def encode_refitted(written: WrittenTensors, layer: int, computed: ComputedTensors) -> ComputedTensors:
    """Computed tensors of a layer as the output has them: plain ones that it rounds, and that have no parts yet, are
    rounded to nearest."""
    plain, parts = dict(computed.plain), dict(computed.parts)
    for each in written.of_layer(layer):
        if each.scheme is None or each.name not in plain:
            continue
        refitted = plain.pop(each.name)
        if not each.has_parts(computed):
            weight = written.plain_values(each.plain, KeptExperts(), computed).to(written.device).float()
            parts |= each.stage_tensors(each.scheme.encode(weight), refitted.stage)
    return ComputedTensors(plain, parts)


def _is_joinable(written: WrittenTensor, scheme: Scheme) -> bool:
    """Whether the rows of a matrix are whole blocks, so that others can be put below it."""
    return written.plain.shape[0] % scheme.block(written.plain.shape)[0] == 0


def _energy(weight: torch.Tensor, hessian: torch.Tensor) -> float:
    """‖XWᵀ‖² of W (R, C), from XᵀX (C, C)."""
    return max(0.0, float(((weight @ hessian) * weight).sum(dtype=torch.float64)))
