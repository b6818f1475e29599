"""llama.cpp's importance matrix: how strongly each column of a weight is used, for `llama-quantize --imatrix`.

For every weight of the converted model the file has the sum of squares of what enters each of its columns, and over how
many tokens; for routed experts one row of sums each. llama-quantize divides one by the other, and where it rounds, a
column counts by that mean. The format is that of llama.cpp's tools/imatrix and common/imatrix-loader.cpp:

| in the GGUF file | what it is |
|---|---|
| `general.type` | "imatrix" |
| `imatrix.datasets`, `imatrix.chunk_count`, `imatrix.chunk_size` | the text: names; sequences; tokens of the longest |
| `NAME.in_sum2`, `NAME.counts` | of the weight NAME: float32 (experts or 1, columns) and (experts or 1, 1) |

Names are those that llama.cpp's converter gives, by the package `gguf`, which comes from llama.cpp. The converter may
put rows of a weight in another order (Mixtral's heads), but not the columns, in any of ARCHITECTURES: each was
converted, and its names and sizes compared. It splits MLA's kv_b_proj in two, whose inputs no Linear module gets; the
embeddings and the output head get no sums either, as with llama-imatrix.

No torch. E experts of a layer, or 1; C columns.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamprune.errors import SettingsError, UnsupportedModelError

#: llama.cpp's architectures by the `model_type` of a config.json (that of its text part).
ARCHITECTURES = {
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "ernie4_5_moe": "ernie4_5-moe",
    "glm4_moe": "glm4moe",
    "gpt_oss": "gpt-oss",
    "minimax_m2": "minimax-m2",
    "mixtral": "llama",
    "olmoe": "olmoe",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
}
#: The weights of routed experts that have the inputs of a parameter of transformers' experts modules.
_EXPERTS = {
    "gate_up_proj": ("FFN_GATE_EXP", "FFN_UP_EXP"),
    "up_proj": ("FFN_UP_EXP",),
    "down_proj": ("FFN_DOWN_EXP",),
}
#: Modules without a weight of their own in a converted model, although the package has a name for it.
_SPLIT = frozenset({"kv_b_proj"})
_SPLIT_NOTE = (
    "llama.cpp splits kv_b_proj into attn_k_b and attn_v_b, which llama-quantize refuses to round to the smallest "
    "types without an entry. For IQ3_XXS and below, or Q2_K_S, give them another: --tensor-type 'attn_(k|v)_b=q8_0'."
)


@dataclass(frozen=True)
class InputSquares:
    """Sums of squares (E, C) of what enters a weight's columns, float32, over `counts` (E,) tokens of each expert."""

    squares: NDArray[np.float32]
    counts: NDArray[np.int64]

    @property
    def is_partial(self) -> bool:
        """Whether no token was routed to some of the experts."""
        return not self.counts.all()

    def filled(self) -> InputSquares:
        """The same, where experts without tokens have the mean over all tokens of all experts, as one token.

        For a count of 0, llama-quantize takes all columns to be equally important (`load_imatrix` in its
        quantize.cpp); that of the other experts is a better guess, since they get the same kind of input. Such a weight
        without a single token stays as it is.
        """
        if not self.is_partial or not self.counts.any():
            return self
        missing = self.counts == 0
        mean = self.squares.sum(axis=0, dtype=np.float64) / self.counts.sum()
        squares = np.where(missing[:, None], mean.astype(np.float32), self.squares)
        return InputSquares(squares, np.where(missing, 1, self.counts))


@dataclass(frozen=True)
class ImatrixText:
    """The text that sums are over: the names of its sources, its sequences, and the tokens of the longest."""

    datasets: Sequence[str]
    sequences: int
    longest: int


class GgufNames:
    """The names that llama.cpp gives the weights of a model of this `model_type`, with so many layers.

    `experts` are the paths of the experts modules within the layers that have one. Raises UnsupportedModelError for a
    model type that is not in ARCHITECTURES, and SettingsError without the package gguf.
    """

    def __init__(self, model_type: str, layers: int, experts: Mapping[int, str]) -> None:
        gguf = _gguf()
        architecture = ARCHITECTURES.get(model_type)
        if architecture is None:
            raise UnsupportedModelError(
                f"--imatrix cannot name the weights of a {model_type} model as llama.cpp does. It knows those of "
                f"{', '.join(sorted(ARCHITECTURES))}. Run without --imatrix, and use llama-imatrix on the converted "
                "model."
            )
        known = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
        self._map = gguf.get_tensor_name_map(known[architecture], layers)
        self._experts, self._gguf = dict(experts), gguf

    def of(self, layer: int, path: str) -> tuple[str, ...]:
        """The weights with the inputs of a module, or of an experts' parameter, at `path` in a layer; maybe none."""
        owner, _, leaf = path.rpartition(".")
        if owner == self._experts.get(layer) and leaf in _EXPERTS:
            kinds = (getattr(self._gguf.MODEL_TENSOR, kind) for kind in _EXPERTS[leaf])
            return tuple(f"{self._gguf.TENSOR_NAMES[kind].format(bid=layer)}.weight" for kind in kinds)
        if leaf in _SPLIT:
            return ()
        # (As text models call their layers, whatever the path in this one.)
        name = self._map.get_name(f"model.layers.{layer}.{path}")
        return (f"{name}.weight",) if name is not None else ()


@dataclass(frozen=True)
class Imatrix:
    """An importance matrix: the `entries` by the names of weights, and the names of modules that have none."""

    entries: Mapping[str, InputSquares]
    unnamed: tuple[str, ...]

    @classmethod
    def of(cls, names: GgufNames, layers: Mapping[int, Mapping[str, InputSquares]]) -> Imatrix:
        """The matrix of a model, from the sums of all its layers, by path within the layer."""
        entries: dict[str, InputSquares] = {}
        unnamed: set[str] = set()
        for layer, sums in sorted(layers.items()):
            for path, found in sorted(sums.items()):
                own = names.of(layer, path)
                entries |= dict.fromkeys(own, found.filled())
                if not own:
                    unnamed.add(path)
        return cls(entries, tuple(sorted(unnamed)))

    @property
    def notes(self) -> tuple[str, ...]:
        """What to know where modules have no entry."""
        leaves = {path.rpartition(".")[2] for path in self.unnamed}
        return (_SPLIT_NOTE,) if leaves & _SPLIT else ()

    def write(self, path: Path, text: ImatrixText) -> None:
        """Write the file. The same matrix and text give the same bytes. Raises OSError."""
        gguf = _gguf()
        writer = gguf.GGUFWriter(path, "", use_temp_file=False)
        # (An imatrix has a type, and no architecture, which the writer puts first.)
        writer.kv_data[0].clear()
        writer.add_type(gguf.GGUFType.IMATRIX)
        writer.add_array(gguf.Keys.IMatrix.DATASETS, list(text.datasets))
        writer.add_uint32(gguf.Keys.IMatrix.CHUNK_COUNT, text.sequences)
        writer.add_uint32(gguf.Keys.IMatrix.CHUNK_SIZE, text.longest)
        for name, entry in self.entries.items():
            writer.add_tensor(f"{name}.in_sum2", entry.squares)
            writer.add_tensor(f"{name}.counts", entry.counts.astype(np.float32)[:, None])
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


def _gguf() -> Any:
    if importlib.util.find_spec("gguf") is None:
        raise SettingsError(
            "--imatrix needs the package gguf, which has llama.cpp's names, and it is not installed: pip install "
            "'streamprune[imatrix]'"
        )
    import gguf

    return gguf
