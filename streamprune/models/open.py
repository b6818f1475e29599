"""Opening a model: config, structure on the meta device, and checkpoint.

Every command that needs a model's structure opens it here, before a weight is read.
"""

from __future__ import annotations

import json
import platform
import re
import tempfile
import textwrap
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel

from streamprune import __version__
from streamprune.checkpoint.index import CONFIG_NAME, Checkpoint, read_json
from streamprune.checkpoint.safetensors_file import TensorEntry
from streamprune.errors import CheckpointError, UnsupportedModelError
from streamprune.files.json_text import show_some
from streamprune.formats.pick import format_names
from streamprune.formats.quantization import checkpoint_notes
from streamprune.hardware.half_precision import quicker_dtype, slowdown
from streamprune.models.check_fit import check_fit
from streamprune.models.config_json import absurdity, mtp_layers
from streamprune.models.expert_channels import find_channels
from streamprune.models.expert_layout import Layout, Target
from streamprune.models.mtp import find_mtp_tensors, further_layers
from streamprune.models.per_layer_experts import counts_of, read_per_layer_experts
from streamprune.models.skeleton import Decoder, Skeleton, build_skeleton, find_decoder, map_checkpoint
from streamprune.models.survey import survey


@dataclass(frozen=True)
class DescribedModel:
    """A Mixture-of-Experts model as its config alone describes it.

    `raw` and `config` give all layers with experts the same number of them. `counts` are the experts of every such
    layer: other numbers where config.json has a table of them. `dtype` is None where neither user nor config names one.
    """

    raw: Mapping[str, Any] = field(repr=False)
    config: PreTrainedConfig = field(repr=False)
    dtype: torch.dtype | None
    skeleton: Skeleton = field(repr=False)
    counts: Mapping[int, int]


@dataclass(frozen=True)
class OpenedModel:
    """A checkpoint, its model on meta, which tensor feeds which parameter, and the dtype in which it is computed."""

    checkpoint: Checkpoint
    skeleton: Decoder
    targets: Mapping[str, Target] = field(repr=False)
    dtype: torch.dtype

    @property
    def formats(self) -> tuple[str, ...]:
        """How the quantized tensors are stored, for people; empty if all are plain."""
        return format_names(self.checkpoint.tensors, {name: each.stored for name, each in self.targets.items()})

    @property
    def dtype_name(self) -> str:
        """The dtype in which it is computed, such as "bfloat16"."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def left_out(self) -> Collection[str]:
        """The tensors of multi-token prediction, of which an output has none."""
        names = find_mtp_tensors(self.targets, self.skeleton.layer_count)
        further = further_layers(names, self.skeleton.layer_count, mtp_layers(self.checkpoint.config))
        return set(names) - set(further)

    @property
    def notes(self) -> tuple[str, ...]:
        """What of the checkpoint is ignored, or computed in another dtype than stored, for people."""
        tensors, unused = self.checkpoint.tensors, unused_names(self.skeleton.model, self.targets, self.left_out)
        wide = [name for name, each in self.targets.items() if each.name and tensors[name].dtype == "F64"]
        notes = list(checkpoint_notes(self.checkpoint))
        if unused:
            notes.append(f"the model that transformers builds has no place for {show_some(unused)}: ignored.")
        if wide:
            notes.append(f"float64 weights ({show_some(wide)}) are computed in {self.dtype_name}.")
        return tuple(notes)


@dataclass(frozen=True)
class OpenedMoE(OpenedModel):
    """A Mixture-of-Experts model that is opened, with where its experts lie."""

    skeleton: Skeleton
    config: PreTrainedConfig = field(repr=False)
    layout: Layout

    @property
    def left_out(self) -> Collection[str]:
        return {*self.layout.dropped, *self.layout.mtp, *self.layout.ignored}


def load_config(folder: Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The model's config as transformers reads it.

    Raises UnsupportedModelError when transformers does not know the model, and CheckpointError for values that no model
    has.
    """
    raw = read_json(folder / CONFIG_NAME)
    absurd = absurdity(raw)
    if absurd is not None:
        raise CheckpointError(f"{folder / CONFIG_NAME} names {absurd}. No model has that: download it again.")
    try:
        stock = _config_class_by_architecture(raw)
        if stock is None:
            return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        return _read_config(stock, folder)
    except Exception as problem:
        # Configs are validated by each model's own code, which may raise anything on bad values.
        error = problem
    said = str(error)
    text = textwrap.shorten(said.replace("TypeError: ", "").replace("ValueError: ", ""), 300, placeholder=" …")
    if "trust_remote_code" in said:
        raise UnsupportedModelError(
            f"{folder} needs its own Python code, which is not run without your consent. If you trust its author "
            "and have read the code, add --trust-remote-code."
        ) from error
    if (isinstance(error, (ValueError, KeyError)) and "model_type" in said) or "does not recognize" in said:
        raise UnsupportedModelError(
            f"transformers {transformers.__version__} does not know the model in {folder}: {text}\n"
            "A newer transformers may: `pip install --upgrade transformers`."
        ) from error
    raise CheckpointError(f"{folder / CONFIG_NAME} is not a usable model config: {text}") from error


def _config_class_by_architecture(raw: Mapping[str, Any]) -> type[PreTrainedConfig] | None:
    """The config class of a model whose `model_type` transformers does not know, but whose architecture it does.

    Kimi-K2 is a DeepseekV3ForCausalLM with a `model_type` of its own, and code of its own that keeps every expert in a
    module. vLLM goes by the architecture too. None for all other models.
    """
    if raw.get("model_type") in CONFIG_MAPPING:
        return None
    names = raw.get("architectures")
    for name in names if isinstance(names, list) else []:
        found = getattr(transformers, name, None) if isinstance(name, str) and name.endswith("ForCausalLM") else None
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            config_class: type[PreTrainedConfig] = getattr(found, "config_class")  # noqa: B009
            return config_class
    return None


def _read_config(config_class: type[PreTrainedConfig], folder: Path) -> PreTrainedConfig:
    config: PreTrainedConfig = config_class.from_pretrained(folder)
    if config.model_type not in CONFIG_MAPPING:
        # A model that is known by its architecture: conversions go by the type, and its own code is not needed.
        config.model_type = config_class.model_type
        vars(config).pop("auto_map", None)
    return config


def config_from_dict(like: PreTrainedConfig, raw: Mapping[str, Any]) -> PreTrainedConfig:
    """Build a config of the same class as `like` from the contents of a `config.json`."""
    # Through a file, since only that way transformers decodes values that JSON cannot express (infinity).
    with tempfile.TemporaryDirectory(prefix="streamprune-") as folder:
        (Path(folder) / CONFIG_NAME).write_text(json.dumps(raw), encoding="utf-8")
        return _read_config(type(like), Path(folder))


def declared_dtype(config: PreTrainedConfig) -> torch.dtype | None:
    """The dtype that a config names for its text part, else at its top; None if it names none."""
    declared = getattr(config.get_text_config(decoder=True), "dtype", None) or getattr(config, "dtype", None)
    return declared if isinstance(declared, torch.dtype) else None


def describe_model(
    folder: Path,
    raw: Mapping[str, Any],
    trust_remote_code: bool = False,
    dtype: str = "auto",
    device: torch.device | None = None,
) -> DescribedModel:
    """Build the model of `folder`'s config.json (`raw`) on the meta device, as far as the config alone describes it.

    `dtype` is what the user chose to compute in, or `auto`: the config's, or what is quicker on `device`. Raises
    CheckpointError for a config that cannot be used, UnsupportedModelError for a model that cannot be streamed or has
    no experts.
    """
    config = load_config(folder, trust_remote_code)
    per_layer = read_per_layer_experts(raw)
    if per_layer is not None:
        raw, config = per_layer.stock, config_from_dict(config, per_layer.stock)
    chosen = _chosen_dtype(dtype, declared_dtype(config), device)
    skeleton = _moe_skeleton(config, chosen or torch.bfloat16, trust_remote_code)
    usual = dict.fromkeys(skeleton.experts, skeleton.spec.count)
    return DescribedModel(raw, config, chosen, skeleton, counts_of(per_layer, usual) if per_layer else usual)


def _moe_skeleton(config: PreTrainedConfig, dtype: torch.dtype, trust_remote_code: bool) -> Skeleton:
    skeleton = build_skeleton(config, dtype, trust_remote_code)
    return find_channels(config, skeleton, dtype, trust_remote_code)


def open_moe(
    checkpoint: Checkpoint,
    trust_remote_code: bool = False,
    model: DescribedModel | None = None,
    device: torch.device | None = None,
) -> OpenedMoE:
    """Open a Mixture-of-Experts model; `model` is what its config describes, if that is known already.

    Where config.json does not say what to compute in, it is the weights' dtype, or a quicker one on `device`. Raises
    CheckpointError or UnsupportedModelError where checkpoint and config do not belong together, or the checkpoint
    cannot be sliced.
    """
    if model is None:
        model = describe_model(checkpoint.folder, checkpoint.config, trust_remote_code, device=device)
    chosen, skeleton = model.dtype, model.skeleton
    if chosen is None:
        chosen = quicker_dtype(dtype_of_weights(checkpoint), device)
        skeleton = _moe_skeleton(model.config, chosen, trust_remote_code)
    targets = map_checkpoint(skeleton, checkpoint.tensors, checkpoint.config)
    check_fit(skeleton, targets, checkpoint, model.counts)
    layout = survey(model.raw, skeleton, checkpoint.tensors, targets, model.counts)
    return OpenedMoE(checkpoint, skeleton, targets, chosen, model.config, layout)


def open_model(
    checkpoint: Checkpoint, trust_remote_code: bool = False, dtype: str = "auto", device: torch.device | None = None
) -> OpenedModel:
    """Open any decoder-only model, with or without experts, whose layers may have different numbers of them.

    `dtype` and `device` are as in `describe_model`. Raises like `open_moe`.
    """
    config = load_config(checkpoint.folder, trust_remote_code)
    chosen = _chosen_dtype(dtype, declared_dtype(config) or dtype_of_weights(checkpoint), device)
    assert chosen is not None
    decoder = find_decoder(config, chosen, trust_remote_code)
    targets = map_checkpoint(decoder, checkpoint.tensors, checkpoint.config)
    check_fit(decoder, targets, checkpoint)
    return OpenedModel(checkpoint, decoder, targets, chosen)


def _chosen_dtype(name: str, stored: torch.dtype | None, device: torch.device | None) -> torch.dtype | None:
    """The dtype to compute in: what the user chose; or that of the weights, if it is known, or a quicker one.

    float32 for float64, which torch's grouped products of experts do not take.
    """
    if name == "auto":
        return torch.float32 if stored is torch.float64 else stored and quicker_dtype(stored, device)
    chosen = getattr(torch, name)
    assert isinstance(chosen, torch.dtype)
    return chosen


def dtype_note(chosen: str, opened: OpenedModel, device: torch.device) -> str | None:
    """What to know of a model that is computed in float32, since half precision is slow on `device`; None for others.

    `chosen` is what the user chose to compute in, or `auto`.
    """
    stored = dtype_of_weights(opened.checkpoint)
    if chosen != "auto" or stored is opened.dtype or quicker_dtype(stored, device) is stored:
        return None
    half = str(stored).removeprefix("torch.")
    return (
        f"computed in float32 from {half} weights, since this CPU takes {slowdown(stored):.0f} times as long for a "
        f"product in {half}. What is measured differs from that in {half} by rounding. --dtype {half} computes in "
        f"{half}, in less memory."
    )


def unused_names(model: PreTrainedModel, targets: Mapping[str, Target], expected: Collection[str]) -> list[str]:
    """The tensors that feed nothing, except the `expected` ones and those of which transformers says nothing either."""
    silent = [r"rotary_emb\.inv_freq", r"(^|\.)position_ids$", *(model._keys_to_ignore_on_load_unexpected or ())]
    pattern, known = re.compile("|".join(f"({each})" for each in silent)), set(expected)
    return [name for name, each in targets.items() if not each.name and name not in known and not pattern.search(name)]


def dtype_of_weights(checkpoint: Checkpoint) -> torch.dtype:
    """The floating-point dtype that most bytes of the weights have; float32 for float64."""
    return dtype_of_tensors(checkpoint.tensors)


def dtype_of_tensors(tensors: Mapping[str, TensorEntry]) -> torch.dtype:
    """The floating-point dtype that most bytes of these tensors have; float32 for float64, bfloat16 without any."""
    sizes = {"BF16": 0, "F16": 0, "F32": 0, "F64": 0}
    for entry in tensors.values():
        if entry.dtype in sizes:
            sizes[entry.dtype] += entry.nbytes
    most = max(sizes, key=lambda key: sizes[key])
    return {"BF16": torch.bfloat16, "F16": torch.float16}.get(most, torch.float32)


def versions() -> dict[str, str]:
    """The versions of everything that may change the digits of a result."""
    libraries = {module.__name__: module.__version__ for module in (torch, transformers, safetensors)}
    return {"streamprune": __version__, **libraries, "python": platform.python_version()}
