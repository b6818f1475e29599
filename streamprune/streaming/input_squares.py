"""Sums of squares of what enters the weights of a written layer, for llama.cpp's importance matrix.

They are collected while text goes through the pruned layer, as it will be written: with the experts that stay, refitted
and rounded if they are. Linear modules have hooks (`layer_inputs.py`); what enters an expert's projections is computed
from the tokens that are routed to it, by the same steps as in transformers' forward.

Shapes: T tokens of a micro-batch, k experts chosen per token, K experts that stay, n tokens of one of them, C columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from streamprune.distributed.processes import Processes
from streamprune.errors import NonFiniteError, UnsupportedModelError
from streamprune.refit.activations import DOWN, ExpertsCall, activation, down_sizes, listening
from streamprune.saliency.hooks import sort_by_expert
from streamprune.saliency.scores import pack
from streamprune.streaming.layer_inputs import LinearInputs
from streamprune.work.layer_records import WeightInputs


class ExpertInputs:
    """The sums over what enters the projections of the experts that stay in a layer.

    `experts` is the loaded experts module, at `path` in its layer. Call `listening` around the forward of each
    micro-batch, and `commit` once it has succeeded.
    """

    def __init__(self, experts: nn.Module, path: str, device: torch.device) -> None:
        self._experts, self._path = experts, path
        first = "gate_up_proj" if experts.has_gate else "up_proj"
        shape = getattr(experts, first).shape
        self._count, hidden = shape[0], shape[1] if experts.is_transposed else shape[2]
        sizes = {first: hidden, DOWN: down_sizes(experts)[0]}
        self._first = first
        self._tokens = self._zeros(device)
        self._squares = {leaf: self._zeros(device, size) for leaf, size in sizes.items()}
        self._last: tuple[torch.Tensor, dict[str, torch.Tensor]] | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within the context, sum over the one call of the experts in the forward of a micro-batch."""
        self._last = None
        with listening(self._experts) as calls:
            yield
        if len(calls) != 1:
            raise UnsupportedModelError(
                f"--imatrix cannot sum what enters the experts {self._path}: their layer called them {len(calls)} "
                "times for each token. Run without --imatrix."
            )
        self._last = self._sums_of(calls[0])

    def commit(self) -> None:
        """Add the sums over the last micro-batch. Allocates nothing, so it cannot fail half-way."""
        assert self._last is not None
        tokens, squares = self._last
        self._tokens += tokens
        for leaf, values in squares.items():
            self._squares[leaf] += values
        self._last = None

    def take(self, processes: Processes) -> dict[str, WeightInputs]:
        """The sums over all processes, by the path of the parameter in the layer."""
        processes.add_up(self._tokens)
        for values in self._squares.values():
            processes.add_up(values)
        counts = [int(count) for count in self._tokens.tolist()]
        return {f"{self._path}.{leaf}": _recorded(values, counts) for leaf, values in self._squares.items()}

    @torch.no_grad()
    def _sums_of(self, call: ExpertsCall) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Tokens (K,) and sums of squares (K, C) over a micro-batch, float64.

        Memory: one expert's tokens and activations, in float32. The order of the sums is fixed.
        """
        rows = sort_by_expert(call.index, self._count)
        squares = {leaf: torch.zeros_like(values) for leaf, values in self._squares.items()}
        ends = rows.ends_E.tolist()
        for expert, (begin, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            if begin < end:
                hidden = call.hidden[rows.token_R[begin:end]]
                inner = activation(self._experts, expert, hidden)
                for leaf, entering in ((self._first, hidden), (DOWN, inner)):
                    squares[leaf][expert] = entering.float().square().sum(dim=0, dtype=torch.float64)
        return rows.counts_E.double(), squares

    def _zeros(self, device: torch.device, *columns: int) -> torch.Tensor:
        return torch.zeros(self._count, *columns, dtype=torch.float64, device=device)


class LayerInputSquares:
    """The sums of one written layer: its Linear modules, and its experts at `experts_path` (None: it has none)."""

    def __init__(self, layer: nn.Module, experts_path: str | None, device: torch.device) -> None:
        paths = [path for path, module in layer.named_modules() if isinstance(module, nn.Linear)]
        self._layer, self._linear = layer, LinearInputs(paths, device, products=False)
        self._experts = None
        if experts_path is not None:
            self._experts = ExpertInputs(layer.get_submodule(experts_path), experts_path, device)

    @contextmanager
    def listening(self, sequences: int) -> Iterator[None]:
        """Within the context, sum over the forward of a micro-batch of so many sequences."""
        with ExitStack() as stack:
            stack.enter_context(self._linear.listening(self._layer, sequences))
            if self._experts is not None:
                stack.enter_context(self._experts.listening())
            yield

    def commit(self, sequences: int) -> None:
        """Count the last micro-batch."""
        self._linear.commit(sequences)
        if self._experts is not None:
            self._experts.commit()

    def take(self, processes: Processes) -> Mapping[str, WeightInputs]:
        """The sums over all processes, by path in the layer. Raises NonFiniteError if float32 cannot hold them."""
        linear = self._linear.sums(processes)
        found = {path: _recorded(sums.squares[None], [sums.tokens]) for path, sums in linear.items()}
        return found | (self._experts.take(processes) if self._experts is not None else {})


def _recorded(squares: torch.Tensor, counts: list[int]) -> WeightInputs:
    exact = squares.float().cpu()
    if not torch.isfinite(exact).all():
        raise NonFiniteError(
            "What enters a Linear module is too large to be squared and summed in float32, as an importance matrix has "
            "it. Run without --imatrix."
        )
    return WeightInputs(counts, pack(exact.numpy()))
