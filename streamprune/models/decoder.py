"""A model on the meta device, and where in it the decoder's blocks are: all that streaming it needs."""

from __future__ import annotations

import copy
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from streamprune.checkpoint.index import CONFIG_NAME
from streamprune.errors import CheckpointError, UnsupportedModelError
from streamprune.models.tensor_slices import ExpertRows


@dataclass(frozen=True)
class Decoder:
    """A model on the meta device.

    `layers_path` is the dotted path of the decoder's list of blocks; `expert_rows` maps expert-indexed parameters to
    where in them the experts lie (empty where nobody has looked for them).
    """

    model: PreTrainedModel
    layers_path: str
    expert_rows: Mapping[str, ExpertRows]

    @property
    def layer_count(self) -> int:
        return len(self.blocks)

    @property
    def blocks(self) -> nn.ModuleList:
        blocks = self.model.get_submodule(self.layers_path)
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    def layer_of(self, name: str) -> int | None:
        """The index of the block that a parameter belongs to; None outside the blocks."""
        match = re.match(re.escape(self.layers_path) + r"\.(\d+)\.", name)
        return int(match.group(1)) if match else None


def build_model(config: PreTrainedConfig, dtype: torch.dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model class that transformers gives for text generation, on the meta device, without any weight.

    A multimodal model for which transformers has no text-only class is built whole; its vision tower then simply never
    gets weights, since text alone does not reach it.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{config.model_type} is an encoder-decoder; only decoders can be streamed.")
    problem: Exception | None = None
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        try:
            with torch.device("meta"):
                model = auto.from_config(copy.deepcopy(config), dtype=dtype, trust_remote_code=trust_remote_code)
            return model.eval()
        except ValueError as error:
            problem = problem or error
        except Exception as error:
            # The model's own constructor fails on values that its config class let pass.
            where = f"{config.name_or_path}/{CONFIG_NAME}" if config.name_or_path else f"this {CONFIG_NAME}"
            raise CheckpointError(
                f"A {config.model_type} model cannot be built from {where}: {type(error).__name__}: "
                f"{textwrap.shorten(str(error), 500)}"
            ) from error
    raise UnsupportedModelError(
        f"transformers cannot build a {config.model_type} model for text: {problem}"
    ) from problem


def find_decoder(config: PreTrainedConfig, dtype: torch.dtype, trust_remote_code: bool = False) -> Decoder:
    """Build any decoder-only model on meta, with or without experts, and find its blocks.

    Raises UnsupportedModelError where they are not one list of as many as the config has layers.
    """
    model = build_model(config, dtype, trust_remote_code)
    decoder = model.get_decoder()
    prefix = next((f"{name}." if name else "" for name, module in model.named_modules() if module is decoder), None)
    count = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    lists = [
        name
        for name, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and not re.search(r"\.\d+\.", f".{name}.")
    ]
    if prefix is None or len(lists) != 1:
        raise UnsupportedModelError(
            f"{type(model).__name__}: {len(lists)} lists of {count} blocks were found in its decoder; exactly one can "
            "be streamed."
        )
    return Decoder(model, prefix + lists[0], {})
