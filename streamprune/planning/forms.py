"""Reads a model's footprint, with its size in every form in which its weights can be written.

No torch before the size in another form is asked for: what is quantized of a model follows from its modules.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from streamprune.errors import UnsupportedModelError
from streamprune.fit.estimate import Footprint
from streamprune.fit.footprint import read_model
from streamprune.formats.pick import refuse_quantized
from streamprune.models.per_layer_experts import refuse_per_layer_experts
from streamprune.planning.counts import refuse_new_values
from streamprune.planning.sizes import NOT_NARROWER, PlainTensors, WrittenSizes
from streamprune.selection.widths import check_width
from streamprune.targets import PruningTarget, Storage


def read_forms(
    model: str,
    revision: str | None,
    trust_remote_code: bool,
    storage: Storage,
    width: int | None = None,
    before_loading: Callable[[], None] | None = None,
) -> Footprint:
    """The footprint of `model` as `fit.footprint` reads it, with its size in every form; `storage` says what schemes
    quantize.

    The model is built when the first of these sizes is asked for; `before_loading` is called before that imports torch.
    Raises UnsupportedModelError or SettingsError if its experts cannot have `width` channels.
    """
    read = read_model(model, revision, trust_remote_code, before_loading)

    def load() -> PlainTensors:
        refuse_per_layer_experts(read.raw, model)
        refuse_quantized(read.raw, read.folder)
        if before_loading is not None:
            before_loading()
        # Imported only here: it imports torch and transformers, which takes seconds.
        from streamprune.models.open import describe_model
        from streamprune.planning.written import plain_tensors

        described = read.described or describe_model(read.folder, read.raw, trust_remote_code)
        return plain_tensors(storage, described.raw, described.skeleton, read.tensors, read.footprint.weights)

    forms = WrittenSizes(load)
    if width is not None:
        refuse_new_values(read.raw, PruningTarget(width=width))
        spec = forms.plain.layout.width
        if spec is None:
            raise UnsupportedModelError(NOT_NARROWER.format(forms.plain.layout.fixed_width))
        check_width(spec, width)
    return replace(read.footprint, forms=forms, config=read.raw)
