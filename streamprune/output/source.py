"""What an output is cut from: the source's own bytes, what they decode to, or what they are quantized to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from streamprune.checkpoint.safetensors_file import TensorEntry
from streamprune.errors import SettingsError, UnsupportedModelError
from streamprune.formats.quantization import Quantization
from streamprune.models.expert_layout import Layout
from streamprune.models.linear_weights import find_linear_weights
from streamprune.models.open import OpenedMoE
from streamprune.models.per_layer_experts import LoadingFacts
from streamprune.models.separate_experts import with_separate_experts
from streamprune.models.skeleton import Skeleton, map_checkpoint
from streamprune.models.survey import survey
from streamprune.output.dequantized import dequantized, dequantized_layout
from streamprune.output.encoded import Encoding
from streamprune.output.plan import OutputSource, written_layout
from streamprune.output.tensors import output_tensors
from streamprune.quantize.schemes import Scheme, require_library
from streamprune.targets import Storage


def output_source(opened: OpenedMoE, loading: LoadingFacts, storage: Storage, width: int | None = None) -> OutputSource:
    """What an output of the opened model is cut from, by how they are to be stored, with `width` channels per expert.

    Raises SettingsError and UnsupportedModelError for weights that cannot be written so.
    """
    checkpoint, layout = opened.checkpoint, written_layout(opened.layout, storage)
    if storage.weights == "source":
        return OutputSource(checkpoint, layout, loading)
    plain = dequantized(checkpoint) if Quantization.of(checkpoint.config).method else checkpoint
    if storage.weights == "bf16":
        return OutputSource(plain, dequantized_layout(layout, plain), loading)
    apart, encoding, layout = quantizing(storage, opened.skeleton, plain.config, plain.tensors)
    # (The columns that stay decide how large groups are, and what can be divided among GPUs.)
    counts = dict.fromkeys(layout.expert_layers, layout.spec.count)
    scheme = encoding.scheme(output_tensors(layout, apart, counts, width))
    require_library(scheme.name)
    _refuse_same(opened, scheme)
    if opened.layout.mtp_form is None:
        # What is decoded may be known where what is stored is not; but it is what is stored that is scored.
        layout = layout.without_mtp_scores(opened.layout.mtp_unscored)
    return OutputSource(replace(plain, tensors=apart), layout, loading, encoding)


def quantizing(
    storage: Storage, skeleton: Skeleton, config: Mapping[str, Any], plain: Mapping[str, TensorEntry]
) -> tuple[Mapping[str, TensorEntry], Encoding, Layout]:
    """The `plain` tensors with separate experts, what of them is quantized, and how they can be cut.

    `config` is a config.json of plain weights. Raises UnsupportedModelError if experts cannot be separated.
    """
    targets = map_checkpoint(skeleton, plain, config)
    apart = with_separate_experts(skeleton, targets, plain)
    if apart is not plain:
        targets = map_checkpoint(skeleton, apart, config)
    found = find_linear_weights(skeleton, targets, apart)
    if not found.experts:
        raise UnsupportedModelError(
            f"The experts of this {skeleton.model.config.model_type} model cannot be quantized: its checkpoint has no "
            "matrices of single experts, nor tensors that transformers takes apart into such. Use --weights source."
        )
    layout = written_layout(survey(config, skeleton, apart, targets), storage)
    return apart, Encoding.of(storage, found, apart, layout), layout


def _refuse_same(opened: OpenedMoE, scheme: Scheme) -> None:
    """Raise SettingsError if the source's experts are stored by the scheme already."""
    stored = {target.stored.format for target in opened.targets.values() if target.rows is not None}
    if scheme.format in stored:
        raise SettingsError(
            f"The experts of {opened.checkpoint.folder} are stored as {scheme.format.name} already. Leave out "
            f"--weights {scheme.name}: their own bytes are kept, which loses nothing."
        )
