"""Loading a full model with transformers, for what cannot be done layer by layer (generation and tasks)."""

from __future__ import annotations

from dataclasses import dataclass, field
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
from streamprune.models.open import load_config
from streamprune.models.per_layer_experts import read_per_layer_experts

#: Memory for a model and its computation, as a multiple of its weights: caches and activations of a few short
#: sequences are small, and batches shrink where they are not.
ROOM = 1.1
#: transformers' names for weights that are in no file, which it would initialize at random.
_LACKING = ("missing_keys", "mismatched_keys", "error_msgs")


@dataclass(frozen=True)
class FullModel:
    """A model on disk that is to be loaded in full: its name as the user gave it, its files and its config."""

    name: str
    checkpoint: Checkpoint = field(repr=False)
    config: PreTrainedConfig = field(repr=False)
    trust_remote_code: bool

    @property
    def needed_bytes(self) -> int:
        """Memory that the model takes, including its computation."""
        return int(self.checkpoint.nbytes * ROOM)

    @property
    def positions(self) -> int | None:
        """The model's longest sequence, in tokens; None without a limit."""
        return getattr(self.config.get_text_config(decoder=True), "max_position_embeddings", None)


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory, ready to compute. `device` is where its inputs go."""

    model: Any = field(repr=False)
    device: torch.device
    notes: tuple[str, ...] = ()


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
        return LoadedModel(model.eval(), place, notes)
    except StreampruneError:
        raise
    except Exception as error:
        problem = first_line(str(error)) or type(error).__name__
        if not is_out_of_memory(error):
            raise CheckpointError(f"transformers cannot load {full.name}: {problem}.") from error
    # Outside the `except` clause nothing refers to the partly loaded model any more.
    free_after_failure(place)
    raise ResourceError(f"Memory ran out while {full.name} was loaded ({problem}). {_ADVICE}")


_ADVICE = "Free memory, or use a machine with more. (`streamprune eval --data` streams the layers instead.)"


def _place(full: FullModel, device: str) -> tuple[torch.device, Any]:
    """The device for inputs, and the `device_map` for transformers (None: the CPU)."""
    chosen, needed = choose_device(device), full.needed_bytes
    places: list[tuple[str, int, torch.device, Any]] = []
    if is_gpu(chosen) and device == "auto":
        gpus = all_gpus()
        places = [(f"{len(gpus)} GPUs", sum(map(free_device_bytes, gpus)), chosen, "auto")]
    elif is_gpu(chosen):
        places = [(str(chosen), free_device_bytes(chosen), chosen, {"": chosen})]
    if not is_gpu(chosen) or device == "auto":
        places.append(("RAM", available_memory_bytes(), torch.device("cpu"), None))
    for _, free, place, device_map in places:
        if free >= needed:
            return place, device_map
    free_text = ", ".join(f"{format_bytes(free)} in {name}" for name, free, *_ in places)
    raise ResourceError(
        f"{full.name} has weights of {format_bytes(full.checkpoint.nbytes)}, and needs about {format_bytes(needed)} "
        f"to be loaded in full; free are {free_text}. {_ADVICE}"
    )


def _load(full: FullModel, device_map: Any) -> tuple[Any, tuple[str, ...]]:
    options = {
        "dtype": "auto", "trust_remote_code": full.trust_remote_code, "use_safetensors": True,
        "output_loading_info": True, **({"device_map": device_map} if device_map is not None else {}),
    }  # fmt: skip
    folder = full.checkpoint.folder
    try:
        model, info = AutoModelForCausalLM.from_pretrained(folder, **options)
    except ValueError as error:
        # Some multimodal models have no class for text alone.
        if "Unrecognized configuration class" not in str(error):
            raise
        model, info = AutoModelForImageTextToText.from_pretrained(folder, **options)
    lacking = {kind: sorted(map(str, info[kind])) for kind in _LACKING if info.get(kind)}
    if lacking:
        problems = "; ".join(f"{kind} {', '.join(keys[:3])}" for kind, keys in lacking.items())
        count = sum(map(len, lacking.values()))
        raise CheckpointError(f"{full.name} cannot be loaded: {count} problems, first {problems}.")
    unused = len(info.get("unexpected_keys", ()))
    note = f"{full.name}: {unused} tensors of its files are not used by the model that transformers builds."
    return model, (note,) if unused else ()
