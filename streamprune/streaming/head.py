"""A model's output head, of which only a slice of the vocabulary is there at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from streamprune.errors import UnsupportedModelError
from streamprune.streaming.blocks import BlockLoader
from streamprune.streaming.stream import BatchState, BlockStream


class SlicedHead:
    """The head of the model that `loader` loads and `stream` runs. Peak memory: the weights of a slice.

    What the model's forward does with logits behind the head (scaling, soft-capping) it does with those of a slice,
    which is the same for whatever treats each logit by itself. Raises UnsupportedModelError for a head that is no
    linear layer.
    """

    def __init__(self, loader: BlockLoader, stream: BlockStream) -> None:
        self._loader, self._stream, self._model = loader, stream, loader.model
        self._head, self._path = find_head(self._model)

    @property
    def vocabulary(self) -> int:
        """How many logits a token has."""
        return int(self._head.weight.shape[0])

    @property
    def row_bytes(self) -> int:
        """Bytes of the weights for one token of the vocabulary."""
        return self._head.weight[0].nbytes

    @contextmanager
    def rows(self, begin: int, end: int) -> Iterator[None]:
        """Within, `logits` gives those of the tokens from `begin` to `end` of the vocabulary."""
        names = [name for name in ("weight", "bias") if getattr(self._head, name) is not None]
        weights = self._loader.rows([f"{self._path}.{name}" for name in names], begin, end)
        owner = self._model.get_submodule(self._path.rpartition(".")[0])
        attribute = self._path.rpartition(".")[2]
        setattr(owner, attribute, _Slice(*weights))
        try:
            yield
        finally:
            setattr(owner, attribute, self._head)

    def logits(self, ids: torch.Tensor, state: BatchState) -> torch.Tensor:
        """The logits (B, L, v) of the present slice from token ids (B, L) and the state after a block."""
        return self._stream.logits(ids, state)


def find_head(model: PreTrainedModel) -> tuple[nn.Linear, str]:
    """A model's output head and its dotted path. Raises UnsupportedModelError for one that is no linear layer."""
    head = model.get_output_embeddings()
    path = next((name for name, module in model.named_modules() if module is head), None)
    if not isinstance(head, nn.Linear) or path is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no linear output head ({type(head).__name__}), so that its predictions cannot "
            "be computed slice by slice. Please report this model."
        )
    return head, path


class _Slice(nn.Module):
    """A linear layer with some of the rows of another."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight, requires_grad=False), None
        if bias is not None:
            self.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return functional.linear(hidden, self.weight, self.bias)
