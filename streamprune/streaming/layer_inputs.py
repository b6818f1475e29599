"""What enters the matrices of a layer: how many tokens, and the sums of squares and products of their inputs.

A weight is rounded (GPTQ), or its importance stated (llama.cpp's imatrix), by these sums over the text that goes
through the layer. Those of Linear modules are added up in every forward; those of routed experts are made later from
the tokens that are kept for them (`collected.py`).

Products of a Linear's inputs are computed in float32 for one sequence at a time, and added in float64: so that the sums
depend neither on the size of micro-batches nor, beyond float64's last digits, on the order of the sequences or the
number of processes.

Shapes: B sequences of a micro-batch, n rows of the input for one sequence, C its columns; N tokens, k experts chosen
for each, H hidden size.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from streamprune.distributed.processes import Processes
from streamprune.errors import UnsupportedModelError
from streamprune.refit.activations import activation
from streamprune.refit.least_squares import PART_TOKENS


@dataclass
class InputSums:
    """Sums over the inputs of one Linear, or of several that get the same tensor.

    `tokens` rows were added. `squares` (C,) are the sums of squares by column, and `products` (C, C) is XᵀX, if it was
    asked for; both float64, on the device.
    """

    squares: torch.Tensor
    products: torch.Tensor | None = None
    tokens: int = 0

    @classmethod
    def zero(cls, columns: int, device: torch.device, with_products: bool) -> InputSums:
        """Sums over nothing."""
        size = (columns, columns)
        products = torch.zeros(size, dtype=torch.float64, device=device) if with_products else None
        return cls(torch.zeros(columns, dtype=torch.float64, device=device), products)

    def add(self, rows: torch.Tensor) -> None:
        """Add the rows (n, C) of one sequence. Memory: their float32 copy, and XᵀX in float32.

        Raises torch's error if memory runs out, before anything is changed.
        """
        exact = rows.float()
        squares = exact.square().sum(dim=0, dtype=torch.float64)
        if self.products is not None:
            product = exact.T @ exact
            self.products += product
        self.squares += squares
        self.tokens += len(rows)

    def add_up(self, processes: Processes) -> None:
        """Replace the sums by those over all processes."""
        self.tokens = sum(processes.collect(self.tokens))
        for sums in (self.squares, self.products):
            if sums is not None:
                processes.add_up(sums)


class LinearInputs:
    """The sums over the inputs of a layer's Linear modules at `paths`, relative to the layer.

    With `products` each has XᵀX too. Call `listening` around every forward of a micro-batch, and `commit` once it has
    succeeded: what a forward that ran out of memory has added already is not added again when its parts are repeated.
    """

    def __init__(self, paths: Iterable[str], device: torch.device, products: bool) -> None:
        self._paths, self._device, self._products = tuple(paths), device, products
        self._sums: dict[str, InputSums] = {}
        #: For each module, the one that gets the same tensor and has the sums: the first to be called.
        self._owners: dict[str, str] = {}
        #: How many sequences are in the sums, by module and by its how-manieth call within one forward.
        self._added: Counter[tuple[str, int]] = Counter()
        self._committed = 0

    @contextmanager
    def listening(self, layer: nn.Module, sequences: int) -> Iterator[None]:
        """Within the context, add the inputs of one forward of `layer` with a micro-batch of so many sequences."""
        forward = _Forward(sequences)
        with ExitStack() as stack:
            for path in self._paths:
                hook = layer.get_submodule(path).register_forward_pre_hook(
                    partial(self._before_call, forward, path), with_kwargs=True
                )
                stack.callback(hook.remove)
            yield

    def commit(self, sequences: int) -> None:
        """Count a micro-batch of so many sequences as done."""
        self._committed += sequences

    def sums(self, processes: Processes) -> Mapping[str, InputSums]:
        """The sums over all processes, by module. Modules that get the same tensor have the same object.

        Modules that were never called are left out.
        """
        owners: dict[str, str] = {}
        columns: dict[str, int] = {}
        # (A process whose share is empty knows neither.)
        for theirs, sizes in processes.collect(
            (self._owners, {path: len(each.squares) for path, each in self._sums.items()})
        ):
            owners |= theirs
            columns |= sizes
        for path in sorted(columns):
            self._sums.setdefault(path, InputSums.zero(columns[path], self._device, self._products)).add_up(processes)
        return {path: self._sums[owner] for path, owner in owners.items()}

    def _before_call(
        self, forward: _Forward, path: str, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]
    ) -> None:
        given: torch.Tensor = args[0] if args else named["input"]
        owner = forward.owner_of(path, given)
        if self._owners.setdefault(path, owner) != owner:
            raise UnsupportedModelError(
                f"{path} ({type(module).__name__}) does not get the same input as {self._owners[path]} in every "
                "forward, so what enters it cannot be summed. Please report this model; --rounding rtn needs no sums."
            )
        if owner != path:
            return
        if path not in self._sums:
            self._sums[path] = InputSums.zero(given.shape[-1], self._device, self._products)
        call = (path, forward.calls[path])
        forward.calls[path] += 1
        # Rows of one sequence follow each other, whether the module gets (B, n, C) or (B x n, C).
        rows = given.detach().reshape(-1, given.shape[-1])
        pieces = rows.chunk(forward.sequences) if len(rows) % forward.sequences == 0 else [rows]
        for number, piece in enumerate(pieces, start=self._committed):
            if number >= self._added[call]:
                self._sums[path].add(piece)
                self._added[call] = number + 1


class _Forward:
    """One forward of a micro-batch of `sequences`: which tensors have been seen in it."""

    def __init__(self, sequences: int) -> None:
        self.sequences = sequences
        self.calls: Counter[str] = Counter()
        self._seen: list[tuple[weakref.ref[torch.Tensor], int, str]] = []

    def owner_of(self, path: str, given: torch.Tensor) -> str:
        """The first module that got this very tensor with these values; `path` itself if it is the first."""
        for seen, version, owner in self._seen:
            if seen() is given and version == given._version:
                return owner
        self._seen.append((weakref.ref(given), given._version, path))
        return path


@dataclass(frozen=True)
class RoutedInputs:
    """What this process's tokens bring to the experts of the loaded, pruned `module`, computed on `device`.

    `tokens` are their input (N, H), and the places (N, k) of the experts chosen; empty if there are none.
    """

    module: nn.Module
    tokens: tuple[torch.Tensor, ...]
    device: torch.device

    def count(self, experts: int, processes: Processes) -> list[int]:
        """How many tokens of all processes are routed to each of the experts."""
        found = torch.zeros(experts, dtype=torch.float64)
        if self.tokens:
            index = self.tokens[1].long().clamp(max=experts).reshape(-1).cpu()
            found += torch.bincount(index, minlength=experts + 1)[:-1]
        processes.add_up(found)
        return [int(count) for count in found]

    def products(self, expert: int, columns: int, of_down: bool) -> torch.Tensor:
        """XᵀX (C, C), float64, of what enters an expert, or its down projection before the gate weight.

        Products are made in float32 of some thousand tokens at a time, in their order, and added in float64.
        """
        total = torch.zeros(columns, columns, dtype=torch.float64, device=self.device)
        if not self.tokens:
            return total
        hidden, index = self.tokens
        rows = (index == expert).any(dim=1).nonzero().flatten()
        for part in torch.split(rows, PART_TOKENS):
            given = hidden[part].to(self.device)
            exact = (activation(self.module, expert, given) if of_down else given).float()
            total += exact.T @ exact
        return total
