"""llama.cpp's quantizations by name: which type each tensor of a GGUF file gets, and its bytes. No torch.

The rules are those of `llama_tensor_get_type` in llama.cpp's src/llama-quant.cpp (2026-11), as `llama-quantize` follows
them without options and without an importance matrix, which changes sizes only of IQ4_XS and IQ4_NL (smaller) and Q4_0
(larger by less than 1 %). Types below three bits that need an importance matrix are left out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

#: Values of a block, and its bytes, by type of tensor.
BLOCKS = {
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q8_0": (32, 34), "Q6_K": (256, 210), "Q5_K": (256, 176),
    "Q5_1": (32, 24), "Q5_0": (32, 22), "Q4_K": (256, 144), "Q4_0": (32, 18), "IQ4_NL": (32, 18), "IQ4_XS": (256, 136),
    "MXFP4": (32, 17), "Q3_K": (256, 110), "Q2_K": (256, 84),
}  # fmt: skip
#: The quantizations, the largest first, and the type that most tensors of each have.
GGUF_TYPES = {
    "F16": "F16", "BF16": "BF16", "Q8_0": "Q8_0", "Q6_K": "Q6_K", "Q5_K_M": "Q5_K", "Q5_K_S": "Q5_K", "Q4_K_M": "Q4_K",
    "Q4_K_S": "Q4_K", "Q4_0": "Q4_0", "IQ4_NL": "IQ4_NL", "IQ4_XS": "IQ4_XS", "MXFP4_MOE": "MXFP4", "Q3_K_L": "Q3_K",
    "Q3_K_M": "Q3_K", "Q3_K_S": "Q3_K", "Q2_K": "Q2_K",
}  # fmt: skip
#: What a tensor becomes whose rows are not multiples of a block's values.
_FALLBACK = {"IQ4_XS": "IQ4_NL", "Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
#: The roles of tensors, by what their names end with. (llama.cpp goes by its own names, which its converter makes.)
_ROLES = (
    ("qkv", re.compile(r"(qkv\w*|query_key_value|in_proj_qkvz?)$")),
    ("mla", re.compile(r"kv_b_proj$")),
    ("value", re.compile(r"attn\w*\.v_proj$|attention\.v_proj$")),
    ("key", re.compile(r"attn\w*\.k_proj$|attention\.k_proj$")),
    ("query", re.compile(r"attn\w*\.q_proj$|attention\.q_proj$")),
    ("output", re.compile(r"(?<!linear_)attn\w*\.(o_proj|out_proj|dense|wo)$|attention\.(o_proj|dense|wo)$")),
    ("down", re.compile(r"(down_proj\w*|\bw2\w*|output_linear|down)$")),
)
#: The roles of which llama.cpp counts the tensors as attention values.
_VALUES = ("value", "qkv")


@dataclass(frozen=True)
class GgufModel:
    """What the rules ask of a model: its `layers` and `experts` per layer, the query heads for each key and value head,
    the layers that have tensors of attention values, and whether embeddings and head are one tensor."""

    layers: int
    experts: float
    heads_per_key: float
    value_layers: tuple[int, ...]
    is_tied: bool


def role_of(name: str) -> str:
    """The role of a layer's tensor with this name in a checkpoint; "other" for those without rules of their own."""
    name = name.removesuffix("_blocks").removesuffix(".weight")
    return next((role for role, pattern in _ROLES if pattern.search(name)), "other")


def tensor_type(quantization: str, role: str, layer: int, columns: int, model: GgufModel) -> str:
    """The type in BLOCKS of a matrix with `columns` values in a row, of a role, or "embeddings" or "head".

    `quantization` is one of GGUF_TYPES; `layer` is -1 outside the layers. Not for the tensors that stay in F32.
    """
    default = GGUF_TYPES[quantization]
    if default in ("F16", "BF16"):
        return default
    found = _chosen(quantization, default, role, layer, columns, model)
    if columns % BLOCKS[found][0]:
        found = _FALLBACK.get(found, found)
    return "F16" if columns % BLOCKS[found][0] else found


def _chosen(quantization: str, default: str, role: str, layer: int, columns: int, model: GgufModel) -> str:
    if role == "head" or (role == "embeddings" and model.is_tied):
        if quantization == "MXFP4_MOE" or default == "Q8_0" or columns % BLOCKS[default][0]:
            return "Q8_0"
        return "Q6_K"
    if quantization == "MXFP4_MOE":
        return "MXFP4" if role in ("experts", "expert down") else "Q8_0"
    if role in _VALUES:
        return _of_values(quantization, default, model.value_layers.index(layer), model)
    if role == "key":
        return "Q8_0" if model.experts == 8 else default
    if role in ("down", "expert down"):
        return _of_down(quantization, default, layer, model.layers)
    if role == "output":
        if model.experts == 8:
            medium = ("Q2_K", "Q3_K_S", "Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M", "IQ4_XS")
            return "Q5_K" if quantization in medium else default
        return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(quantization, default)
    return default


def _of_values(quantization: str, default: str, number: int, model: GgufModel) -> str:
    """The type of the attention values, of which it is the one with this number."""
    if model.experts == 8:
        return "Q8_0"
    is_grouped = model.heads_per_key >= 4
    if quantization == "Q2_K":
        return "Q4_K" if is_grouped else "Q3_K"
    if quantization == "Q3_K_M":
        return "Q5_K" if number < 2 else "Q4_K"
    if quantization == "Q3_K_L" or (quantization in ("IQ4_NL", "IQ4_XS") and is_grouped):
        return "Q5_K"
    if quantization in ("Q4_K_M", "Q5_K_M") and _gets_more(number, len(model.value_layers)):
        return "Q6_K"
    return "Q5_K" if quantization == "Q4_K_S" and number < 4 else default


def _of_down(quantization: str, default: str, layer: int, layers: int) -> str:
    if quantization == "Q3_K_M":
        return "Q5_K" if layer < layers // 16 else "Q4_K"
    if quantization in ("Q4_K_M", "Q5_K_M") and _gets_more(layer, layers):
        return "Q6_K"
    if quantization in ("Q4_K_S", "IQ4_NL", "IQ4_XS") and layer < layers // 8:
        return "Q5_K"
    return {"Q2_K": "Q3_K", "Q3_K_L": "Q5_K"}.get(quantization, default)


def _gets_more(number: int, count: int) -> bool:
    """Whether a tensor is among those that get more bits: the first and last eighth, and every third between."""
    first = count // 8
    return number < first or number >= 7 * count // 8 or (number - first) % 3 == 2


def row_bytes(kind: str, columns: int) -> int:
    """Bytes of a row of `columns` values in a type of BLOCKS."""
    values, nbytes = BLOCKS[kind]
    return columns // values * nbytes
