"""What an importance matrix needs, decided before a weight is read: that its weights have names and can be seen."""

from __future__ import annotations

from pathlib import Path

from streamprune.errors import OutputError, UnsupportedModelError
from streamprune.models.skeleton import Skeleton
from streamprune.quantize.imatrix import GgufNames
from streamprune.refit.activations import why_unseen


def gguf_names(skeleton: Skeleton) -> GgufNames:
    """llama.cpp's names for the weights of a model.

    Raises UnsupportedModelError if it has none, or if what enters the experts' projections cannot be seen, and
    SettingsError if the package that knows them is missing.
    """
    config = skeleton.model.config.get_text_config(decoder=True)
    # (The text part of a multimodal model has a type of its own.)
    names = GgufNames(config.model_type.removesuffix("_text"), skeleton.layer_count, skeleton.experts)
    for layer, path in skeleton.experts.items():
        problem = why_unseen(skeleton.layers[layer].get_submodule(path))
        if problem is not None:
            raise UnsupportedModelError(f"--imatrix cannot sum what enters the experts of layer {layer}: {problem}.")
    return names


def check_imatrix_file(path: Path, overwrite: bool) -> None:
    """Raise OutputError unless an importance matrix may be written to `path`."""
    if not path.absolute().parent.is_dir():
        raise OutputError(f"--imatrix {path}: the folder {path.absolute().parent} does not exist. Create it first.")
    if path.is_dir() or (path.exists() and not overwrite):
        raise OutputError(f"--imatrix {path} exists already. Choose another file, or replace it with --overwrite.")
