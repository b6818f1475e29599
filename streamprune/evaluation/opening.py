"""Opening the models of an evaluation: what has to be known of them before anything is computed."""

from __future__ import annotations

from pathlib import Path

import torch

from streamprune.decision import refuse_quantized
from streamprune.disk.disk_errors import reading
from streamprune.errors import SettingsError, UnsupportedModelError
from streamprune.evaluation.settings import EvalSettings
from streamprune.output.uneven_input import read_uneven
from streamprune.prepare import dtype_of_weights
from streamprune.source.architecture import declared_dtype, load_config
from streamprune.source.checkpoint import CONFIG_NAME, open_checkpoint, read_json
from streamprune.source.decoder import find_decoder
from streamprune.source.hub import resolve_model
from streamprune.source.integrity import check_fit
from streamprune.source.opened import Opened
from streamprune.source.skeleton import map_checkpoint
from streamprune.streaming.head import find_head


def config_folder(model: str, revision: str | None, trust_remote_code: bool) -> Path:
    """A folder with a model's config and tokenizer, and perhaps no more.

    Raises UnsupportedModelError where its config already says that it cannot be streamed.
    """
    folder = resolve_model(model, revision, trust_remote_code, config_only=True)
    raw = read_json(folder / CONFIG_NAME)
    refuse_quantized(raw, folder)
    if read_uneven(raw) is not None and not trust_remote_code:
        raise UnsupportedModelError(
            f"The blocks of {model} keep different numbers of experts, for which it brings its own code. If you trust "
            "who made it, add --trust-remote-code."
        )
    return folder


def open_model(settings: EvalSettings, model: str, revision: str | None) -> Opened:
    """Open a model, with or without experts, and make sure that its weights are all there.

    Raises a StreampruneError where they are not, or where its predictions cannot be computed.
    """
    checkpoint = open_checkpoint(resolve_model(model, revision, settings.trust_remote_code))
    config = load_config(checkpoint.folder, settings.trust_remote_code)
    dtype = getattr(torch, settings.dtype) if settings.dtype != "auto" else declared_dtype(config)
    if dtype is None:
        dtype = dtype_of_weights(checkpoint)
    decoder = find_decoder(config, dtype, settings.trust_remote_code)
    find_head(decoder.model)
    targets = map_checkpoint(decoder.model, checkpoint.tensors)
    check_fit(decoder, targets, checkpoint.tensors)
    return Opened(checkpoint, decoder, targets, dtype)


def check_comparable(model: Opened, original: Opened, settings: EvalSettings) -> None:
    """Raise SettingsError unless two models' predictions are about the same tokens."""
    ours, theirs = (vocabulary_of(opened) for opened in (model, original))
    if ours != theirs:
        raise SettingsError(
            f"{settings.model} predicts {ours:,} tokens and {settings.against} {theirs:,}: only models with the same "
            "vocabulary can be compared. Is --against the model that it was made from?"
        )


def same_tokenizer(original: Path, model: Path) -> bool:
    """Whether two models' tokenizers are the same file, as far as both have one."""
    files = [folder / "tokenizer.json" for folder in (model, original)]
    with reading(files[0]):
        return not all(file.is_file() for file in files) or files[0].read_bytes() == files[1].read_bytes()


def vocabulary_of(opened: Opened) -> int:
    """How many tokens a model predicts."""
    head, _ = find_head(opened.skeleton.model)
    return int(head.weight.shape[0])
