"""Sizes of caches (keys and values, recurrent states) and of a forward's workspace, as formulas. No torch.

For plain attention the sizes of caches follow from config and headers (`stated_cache`); for everything else
`structure.trace_cache` runs the model on shapes. The workspace is the intermediate results of one layer, and the
logits: the tensors that transformers' own code holds at the same time (checked against torch's allocator in
tests/test_workspace.py). Attention is assumed to be fused, so that no scores of tokens × tokens are kept.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from streamprune.checkpoint.safetensors_file import TensorEntry
from streamprune.errors import SettingsError
from streamprune.models.config_json import ModelShape, first_number, text_part

#: Bytes per cached value. fp8 and int8 as vLLM and TensorRT-LLM keep them, with one scale for a whole tensor.
KV_ITEMSIZE = {"bf16": 2, "fp16": 2, "fp8": 1, "int8": 1}
KV_DTYPES = ("auto", *KV_ITEMSIZE)

#: Config keys of models with anything but plain attention in some layer, or with another form of cache.
_NOT_PLAIN = re.compile(
    r"window|sliding|chunk|linear|mamba|ssm|conv_|_conv|shar|index_|compress|hybrid|layer_types|interval|pattern|"
    r"attn_type|attention_type|block_types|attn_layer|recurrent|lightning|latent_attention|cross_attention|per_layer|"
    r"full_attn|kda|attn_config|indexer|sparse_attention"
)
#: Keys that match the pattern above, but are unrelated.
_HARMLESS = re.compile(r"shared_expert|shared_intermediate|linear_bias|share_expert|router|tie_word|max_window_layers")


#: Key and value projections, or a joint one to a latent.
_PROJECTION = re.compile(r"(^|\.)layers\.(\d+)\.\w*attn\.(k_proj|v_proj|kv_a_proj_with_mqa)\.weight$")
_PLAIN_ATTENTION = {("k_proj", "v_proj"), ("kv_a_proj_with_mqa",)}
#: Bytes per value of the dtypes that a model can compute in, as configs and safetensors headers name them.
_FLOAT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "BF16": 2, "F16": 2, "F32": 4}


@dataclass(frozen=True)
class LayerCache:
    """The cache of one layer per sequence: `values_per_token` values for each of the last `window` tokens (None: for
    all), and `state_bytes` for any number of tokens.

    `index_bytes` are added for each of those tokens: positions and the like, which no cache dtype makes smaller.
    """

    values_per_token: int = 0
    window: int | None = None
    state_bytes: int = 0
    index_bytes: int = 0


@dataclass(frozen=True)
class CacheSizes:
    """The caches of all layers. `itemsize` is the bytes per value in the model's own dtype."""

    layers: tuple[LayerCache, ...]
    itemsize: int

    def kv_bytes(self, context: int, batch: int, kv_dtype: str = "auto") -> int:
        """Bytes of all keys and values of `batch` sequences of `context` tokens each."""
        itemsize = self.item_bytes(kv_dtype)
        return batch * sum(
            (layer.values_per_token * itemsize + layer.index_bytes)
            * (context if layer.window is None else min(context, layer.window))
            for layer in self.layers
        )

    def item_bytes(self, kv_dtype: str) -> int:
        """Bytes per cached value for one of KV_DTYPES."""
        if kv_dtype not in KV_DTYPES:
            raise SettingsError(f"--kv-dtype {kv_dtype!r} is unknown. Choose one of: {', '.join(KV_DTYPES)}.")
        return KV_ITEMSIZE.get(kv_dtype, self.itemsize)

    def state_bytes(self, batch: int) -> int:
        """Bytes of the recurrent and convolution states of `batch` sequences."""
        return batch * sum(layer.state_bytes for layer in self.layers)


def stated_cache(config: Mapping[str, Any], tensors: Mapping[str, TensorEntry]) -> CacheSizes | None:
    """The caches of a model whose layers all have plain attention; None if config or tensors do not show this clearly.

    Plain means: every layer has key and value projections, whose rows are cached for each token (multi-head,
    grouped-query and multi-query attention), or one joint projection to a latent and a rotary part (multi-head latent
    attention, DeepSeek-V2, arXiv:2405.04434, section 2.1).
    """
    _, text = text_part(config)
    depth = first_number((text,), ("num_hidden_layers",))
    if depth is None or _hints_at_more(text) or any("indexer" in name for name in tensors):
        return None
    projections: dict[int, list[TensorEntry]] = defaultdict(list)
    for name, entry in tensors.items():
        match = _PROJECTION.search(name)
        if match and len(entry.shape) == 2 and int(match[2]) < depth:
            projections[int(match[2])].append(entry)
    kinds = {tuple(sorted(entry.name.split(".")[-2] for entry in entries)) for entries in projections.values()}
    stored = [entry.dtype for entries in projections.values() for entry in entries]
    # All layer numbers are below `depth`, so these are all layers if there are that many.
    if len(projections) != depth or not kinds <= _PLAIN_ATTENTION:
        return None
    # Packed integers have a different number of rows than the projection.
    if not all(dtype.startswith(("F", "BF")) for dtype in stored):
        return None
    itemsize = served_itemsize(config) or _FLOAT_BYTES.get(projections[0][0].dtype)
    layers = tuple(LayerCache(sum(entry.shape[0] for entry in projections[layer])) for layer in range(depth))
    return CacheSizes(layers, itemsize) if itemsize is not None else None


def served_itemsize(config: Mapping[str, Any]) -> int | None:
    """Bytes of a value in the dtype that a config.json names, for its text part or at its top; None if it names none.

    Engines compute and cache in that dtype, whatever a model is scored in.
    """
    _, text = text_part(config)
    named = (str(part.get(name)) for part in (text, config) for name in ("dtype", "torch_dtype"))
    return next((_FLOAT_BYTES[dtype] for dtype in named if dtype in _FLOAT_BYTES), None)


def _hints_at_more(text: Mapping[str, Any]) -> bool:
    unused = {"sliding_window"} if text.get("use_sliding_window") is False else set()
    return any(
        value not in (None, False, 0, [], {})
        and _NOT_PLAIN.search(name)
        and not _HARMLESS.search(name)
        and name not in unused
        for name, value in text.items()
    )


def layer_workspace_bytes(shape: ModelShape, tokens: int, itemsize: int) -> int:
    """Peak bytes of the intermediate results of one layer's forward over `tokens` tokens.

    `itemsize` is the bytes per value in which the model computes. Attention and experts never need theirs at the same
    time, so the larger of the two counts, plus the residual stream and its normalised copies.
    """
    # Residual, its float32 copy inside the norm, the normed result and the layer's input.
    stream = shape.hidden * (3 * itemsize + 4)
    # Queries, keys and values repeated to all heads, the rotated copies of the first two, and the output.
    attention = shape.attention * 6 * itemsize
    # transformers' chunked linear attention works in float32, with about 16 such values per head and dimension.
    linear = shape.linear * 16 * 4
    # Per pair of a token and a chosen expert: input, weighted output and output; gate and up, and their product.
    experts = shape.top_k * (3 * shape.hidden + 3 * shape.expert) * itemsize + shape.experts * 4 * 3
    if shape.wide_routing:
        experts += shape.top_k * shape.hidden * 4
    dense = 3 * shape.dense * itemsize
    return tokens * (stream + max(attention, linear, experts, dense))


@dataclass(frozen=True)
class Recording:
    """How a device computes experts that are recorded (see `saliency.hooks`).

    Behind the products `part_values` values are worked on at a time. Of each expert's rows up to a share `padding` of
    all pairs, divided by the experts, is added.
    """

    part_values: int
    padding: float


def scoring_workspace_bytes(
    shape: ModelShape, tokens: int, sequence_length: int, itemsize: int, recording: Recording | None = None
) -> int:
    """Peak bytes of the intermediate results of scoring one layer on a micro-batch of `tokens` tokens.

    With `recording` all text goes through experts that are computed as it says, and none through transformers' own
    forward of experts. In addition to the forward: the statistics' dense rows (one float64 and one flag per token and
    expert, see `saliency.ExpertStatistics`), and the attention mask of one sequence.
    """
    statistics = tokens * (shape.experts + 1) * 9 * 2 + sequence_length**2
    if recording is None:
        # Float32 copies for the norms.
        return layer_workspace_bytes(shape, tokens, itemsize) + tokens * shape.top_k * shape.hidden * 4 + statistics
    around = layer_workspace_bytes(replace(shape, top_k=0, expert=0, experts=0), tokens, itemsize)
    # The embeddings stay, since the model's own forward is entered anew for each layer.
    embedded = tokens * shape.hidden * itemsize
    return embedded + max(around, _recorded_bytes(shape, tokens, itemsize, recording)) + statistics


def _recorded_bytes(shape: ModelShape, tokens: int, itemsize: int, recording: Recording) -> int:
    """Peak bytes of a layer while its experts are recorded, step by step as in `saliency.hooks.forward_with_pairs`."""
    pairs = round(tokens * shape.top_k * (1 + recording.padding))
    # The layer's input, the residual, what enters the experts, and what a shared expert gives. The router's logits and
    # their softmax.
    stream = tokens * (4 * shape.hidden * itemsize + shape.experts * 4 * 3)
    # The numbers by which pairs are sorted.
    sorting = pairs * 6 * 8
    # Input, gate and up; gate and up, and as much on the way to their product. (The down projection takes less.)
    up = pairs * (shape.hidden + 2 * shape.expert) * itemsize
    gate = pairs * 4 * shape.expert * itemsize
    output = pairs * shape.hidden * itemsize
    # Of a part: the outputs, the same in float32, and another result of that size. The sums, in parts and joined.
    part = min(tokens * shape.top_k * shape.hidden, recording.part_values) * (itemsize + 8)
    sums = 2 * tokens * shape.hidden * (4 if shape.wide_routing else itemsize)
    return stream + sorting + max(up, gate, output + part + sums)


def prefill_workspace_bytes(shape: ModelShape, chunk: int, context: int, batch: int, itemsize: int) -> int:
    """Peak bytes of the intermediate results of a prefill chunk of `chunk` tokens, of `batch` sequences.

    The mask of the chunk against the whole context takes one byte per pair; logits are taken of the last token of each
    sequence, in the model's dtype and in float32.
    """
    chunk = min(chunk, context)
    logits = batch * shape.vocabulary * (itemsize + 4)
    return max(layer_workspace_bytes(shape, batch * chunk, itemsize) + batch * chunk * context, logits)
