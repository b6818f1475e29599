"""Loading a full model with transformers, for what cannot be done layer by layer (generation and tasks)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig

from streamprune.checkpoint.hub import first_line, resolve_model
from streamprune.checkpoint.index import Checkpoint, open_checkpoint
from streamprune.errors import CheckpointError, ResourceError, StreampruneError
from streamprune.hardware.device import (
    all_gpus,
    choose_device,
    free_after_failure,
    free_device_bytes,
    is_gpu,
    is_out_of_memory,
)
from streamprune.hardware.memory import available_memory_bytes, format_bytes
from streamprune.models.config import load_config
from streamprune.models.per_layer_experts import read_per_layer_experts

#: Memory for a model and its computation, as a multiple of its weights: caches and activations of a few short
#: sequences are small, and batches shrink where they are not.
ROOM = 1.1
#: transformers' names for weights that no file holds, which it would initialize at random.
_LACKING = ("missing_keys", "mismatched_keys", "error_msgs")


@dataclass(frozen=True)
class FullModel:
    """A model on disk that is to be loaded in full: its name as the user gave it, its folder, files and config."""

    name: str
    checkpoint: Checkpoint = field(repr=False)
    config: PreTrainedConfig = field(repr=False)
    trust_remote_code: bool

    @property
    def folder(self) -> Path:
        return self.checkpoint.folder

    @property
    def needed_bytes(self) -> int:
        """Memory that the model takes, with room to compute."""
        return int(self.checkpoint.nbytes * ROOM)

    @property
    def positions(self) -> int | None:
        """The longest sequence that the model knows, in tokens; None without a limit."""
        return getattr(self.config.get_text_config(decoder=True), "max_position_embeddings", None)


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory, ready to compute. `device` is where its inputs go."""

    model: Any = field(repr=False)
    device: torch.device
    notes: tuple[str, ...] = ()

    @property
    def vocabulary(self) -> int:
        """How many tokens the model knows."""
        return int(self.model.get_input_embeddings().weight.shape[0])


def find_full_model(model: str, revision: str | None = None, trust_remote_code: bool = False) -> FullModel:
    """The model that the user names, a folder or a Hub id. No weight is read yet.

    Raises CheckpointError or UnsupportedModelError for what is no model, or not one of safetensors files; SettingsError
    for a revision of a local folder.
    """
    checkpoint = open_checkpoint(resolve_model(model, revision, trust_remote_code))
    if not trust_remote_code and read_per_layer_experts(checkpoint.config) is not None:
        # transformers would only report mismatched sizes.
        raise CheckpointError(
            f"The layers of {model} keep different numbers of experts, so that it brings code that loads it. "
            "Allow that with --trust-remote-code."
        )
    return FullModel(model, checkpoint, load_config(checkpoint.folder, trust_remote_code), trust_remote_code)


def load_full_model(full: FullModel, device: str = "auto") -> LoadedModel:
    """Load a model as `AutoModelForCausalLM.from_pretrained(…, dtype="auto")` does.

    `device` is `cpu`, a GPU such as `cuda:0`, or `auto`: all GPUs together (`device_map="auto"`) if they hold it,
    else the CPU. Raises ResourceError where there is not enough memory for it, as a rule before anything is read;
    CheckpointError where a weight does not find its place or transformers cannot load it; SettingsError for an unknown
    device.
    """
    place, device_map = _place(full, device)
    try:
        model, notes = _load(full, device_map)
    except StreampruneError:
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            reason = first_line(str(error)) or type(error).__name__
            raise CheckpointError(f"transformers cannot load {full.name}: {reason}.") from error
        problem = first_line(str(error))
    else:
        return LoadedModel(model.eval(), place, notes)
    free_after_failure(place)
    raise ResourceError(f"Memory ran out while {full.name} was loaded ({problem}). {_ADVICE}")


def release(device: torch.device) -> None:
    """Free what a model took on `device`, once nothing refers to it."""
    free_after_failure(device)


_ADVICE = "Free memory, or use a machine with more. (`streamprune eval --data` streams the layers instead.)"


def _place(full: FullModel, device: str) -> tuple[torch.device, Any]:
    """The device for inputs, and the `device_map` for transformers (None: the CPU)."""
    chosen, needed = choose_device(device), full.needed_bytes
    free = [("RAM", available_memory_bytes())]
    if is_gpu(chosen) and device == "auto":
        gpus = all_gpus()
        free = [(f"{len(gpus)} GPUs", sum(map(free_device_bytes, gpus))), *free]
        if free[0][1] >= needed:
            return chosen, "auto"
    elif is_gpu(chosen):
        free = [(str(chosen), free_device_bytes(chosen))]
        if free[0][1] >= needed:
            return chosen, {"": chosen}
    if free[-1][0] == "RAM" and free[-1][1] >= needed:
        return torch.device("cpu"), None
    places = ", ".join(f"{format_bytes(size)} in {name}" for name, size in free)
    raise ResourceError(
        f"{full.name} has weights of {format_bytes(full.checkpoint.nbytes)}, and needs about {format_bytes(needed)} "
        f"to be loaded in full; free are {places}. {_ADVICE}"
    )


def _load(full: FullModel, device_map: Any) -> tuple[Any, tuple[str, ...]]:
    options: dict[str, Any] = {"dtype": "auto", "trust_remote_code": full.trust_remote_code, "use_safetensors": True}
    if device_map is not None:
        options["device_map"] = device_map
    try:
        model, info = AutoModelForCausalLM.from_pretrained(full.folder, output_loading_info=True, **options)
    except ValueError as error:
        # Some multimodal models have no class for text alone.
        if "Unrecognized configuration class" not in str(error):
            raise
        model, info = AutoModelForImageTextToText.from_pretrained(full.folder, output_loading_info=True, **options)
    lacking = {kind: sorted(map(str, info[kind])) for kind in _LACKING if info.get(kind)}
    if lacking:
        problems = "; ".join(f"{kind} {', '.join(keys[:3])}" for kind, keys in lacking.items())
        count = sum(map(len, lacking.values()))
        raise CheckpointError(f"{full.name} cannot be loaded: {count} problems, first {problems}.")
    unused = len(info.get("unexpected_keys", ()))
    note = f"{full.name}: {unused} tensors of its files have no place in the model that transformers builds."
    return model, (note,) if unused else ()
