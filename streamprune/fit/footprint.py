"""Reads a model's footprint from a folder, a Hub id or a config. Imports torch only if tensor names are ambiguous.

Only the headers of the weights are read, through range requests for a model on the Hub.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamprune.checkpoint.hub import read_hub_headers, resolve_model
from streamprune.checkpoint.index import CONFIG_NAME, INDEX_NAME, SINGLE_NAME, open_checkpoint, read_json
from streamprune.checkpoint.safetensors_file import TensorEntry
from streamprune.errors import CheckpointError, UnsupportedModelError
from streamprune.fit.cache import stated_cache
from streamprune.fit.estimate import Footprint
from streamprune.fit.positions import max_positions
from streamprune.fit.weights import weights_by_name
from streamprune.formats.base import StoredTensor
from streamprune.formats.pick import pick_formats, refuse_quantized
from streamprune.formats.quantization import Quantization
from streamprune.models.config_json import stated_experts, stated_shape, states_experts
from streamprune.models.per_layer_experts import read_per_layer_experts

if TYPE_CHECKING:
    from streamprune.models.open import DescribedModel

#: Files that show that a folder holds a checkpoint, and not only a config.
_WEIGHT_FILES = ("*.safetensors", INDEX_NAME, "*.bin", "*.pt", "*.gguf")


@dataclass(frozen=True)
class ReadModel:
    """A model of which config and headers have been read: `folder` has its config.json, whose content `raw` is.

    `tensors` are its checkpoint's, None for a config alone; `described` is its model on the meta device, if the names
    of its tensors did not suffice, and it has experts.
    """

    footprint: Footprint
    folder: Path
    raw: Mapping[str, Any] = field(repr=False)
    tensors: Mapping[str, TensorEntry] | None = field(repr=False)
    described: DescribedModel | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Headers:
    """All tensors of a model, by name; None for a local folder without weights of any kind. `notes` are for people."""

    tensors: Mapping[str, TensorEntry] | None = field(default=None, repr=False)
    notes: tuple[str, ...] = ()


def read_footprint(model: str, revision: str | None = None, trust_remote_code: bool = False) -> Footprint:
    """The footprint of `model`, as of `read_model`."""
    return read_model(model, revision, trust_remote_code).footprint


def read_model(
    model: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
    before_loading: Callable[[], None] | None = None,
) -> ReadModel:
    """Config, headers and footprint of `model`: a checkpoint folder, a Hub id, or a folder with only a config.json.

    `before_loading` is called before torch is imported, where the model has to be built for this.

    Raises CheckpointError or UnsupportedModelError when it cannot be read or understood.
    """
    folder = resolve_model(model, revision, trust_remote_code, config_only=True)
    raw = read_json(folder / CONFIG_NAME)
    headers, per_layer = read_headers(model, folder), read_per_layer_experts(raw)
    tensors = headers.tensors
    config = per_layer.stock if per_layer else raw
    spec, weights = stated_experts(config), None
    stored, unsupported = _stored(tensors or {}, config, folder)
    notes = (*headers.notes, *unsupported)
    if tensors is not None and (spec is not None or not states_experts(config)):
        weights = weights_by_name(tensors, config, spec, per_layer.differing if per_layer else None, stored)
    if tensors is not None and weights is not None:
        cache, shape = stated_cache(config, tensors), stated_shape(config)
        if cache is not None and shape is not None:
            spec, method = None if weights.counts else spec, Quantization.of(config).method
            most = max_positions(config)
            found = Footprint(model, weights, spec, cache, shape, cache.itemsize, most, notes, quantization=method)
            return ReadModel(found, folder, raw, tensors)
    if before_loading is not None:
        before_loading()
    from streamprune.fit.structure import footprint_of_model

    footprint, described = footprint_of_model(model, folder, raw, tensors, weights, trust_remote_code)
    return ReadModel(replace(footprint, notes=(*notes, *footprint.notes)), folder, raw, tensors, described)


def _stored(
    tensors: Mapping[str, TensorEntry], config: Mapping[str, Any], folder: Path
) -> tuple[Mapping[str, StoredTensor], tuple[str, ...]]:
    """How the tensors are stored. In a format that cannot be pruned: nothing, and a note that says why."""
    try:
        refuse_quantized(config, folder)
        return pick_formats(tensors, config), ()
    except UnsupportedModelError as error:
        return {}, (f"This model can be served, but not pruned. {error}",)


def read_headers(model: str, folder: Path) -> Headers:
    """The headers of a model's weights; `folder` holds its config.

    For a Hub id that is not in the cache, its safetensors headers are fetched, and nothing else.
    """
    if Path(model).expanduser().is_dir():
        if not any(next(folder.glob(pattern), None) for pattern in _WEIGHT_FILES):
            return Headers()
        return _headers_of(folder)
    if (folder / SINGLE_NAME).is_file() or (folder / INDEX_NAME).is_file():
        # A copy in the Hub cache may be complete; then nothing need be fetched.
        with suppress(CheckpointError):
            return _headers_of(folder)
    # By commit, so that config and headers match even if the branch moves in between.
    return Headers(*read_hub_headers(model, folder.name))


def _headers_of(folder: Path) -> Headers:
    checkpoint = open_checkpoint(folder)
    return Headers(checkpoint.tensors, checkpoint.notes)
