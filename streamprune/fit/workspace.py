"""What a forward needs beside weights and caches: the intermediate results of one block, and the logits. Pure formulas.

They count the tensors that the library's own code holds at the same time (checked against torch's allocator in
tests/test_workspace.py); attention is taken to be fused, so that no scores of tokens × tokens are kept.
"""

from __future__ import annotations

from streamprune.source.config_facts import ModelShape


def block_workspace_bytes(shape: ModelShape, tokens: int, itemsize: int) -> int:
    """Peak bytes of the intermediate results of one block's forward over `tokens` tokens.

    `itemsize` is the bytes per value in which the model computes. The attention and the experts never need theirs at
    the same time, so the larger of the two counts, with the residual stream and its normalised copies beside it.
    """
    # Residual, its float32 copy inside the norm, the normed result and the block's input.
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


def scoring_workspace_bytes(shape: ModelShape, tokens: int, sequence_length: int, itemsize: int) -> int:
    """Peak bytes of the intermediate results of scoring one block on a micro-batch of `tokens` tokens.

    Beside the forward's own: the statistics' dense rows (one float64 and one flag per token and expert, see
    `saliency.ExpertStatistics`), float32 copies for the norms, and the attention mask of one sequence.
    """
    statistics = tokens * ((shape.experts + 1) * 9 * 2 + shape.top_k * shape.hidden * 4)
    return block_workspace_bytes(shape, tokens, itemsize) + statistics + sequence_length**2


def prefill_workspace_bytes(shape: ModelShape, chunk: int, context: int, batch: int, itemsize: int) -> int:
    """Peak bytes of the intermediate results of a prefill chunk of `chunk` tokens, of `batch` sequences.

    The mask of the chunk against the whole context takes one byte per pair; logits are taken of the last token of each
    sequence, in the model's dtype and in float32.
    """
    chunk = min(chunk, context)
    logits = batch * shape.vocabulary * (itemsize + 4)
    return max(block_workspace_bytes(shape, batch * chunk, itemsize) + batch * chunk * context, logits)
