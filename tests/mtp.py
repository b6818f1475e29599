"""Layers for multi-token prediction (MTP) as published checkpoints have them: transformers saves none."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.helpers import read_tensors

#: Config keys that say how many such layers there are.
COUNTS = {"further": "num_nextn_predict_layers", "mtp": "mtp_num_hidden_layers"}


#: What makes the input of such a layer: the norm of the embedding, the norm of the hidden state, and the matrix.
ENTRANCE = {
    "further": ("{path}.enorm.weight", "{path}.hnorm.weight", "{path}.eh_proj.weight"),
    "mtp": ("mtp.pre_fc_norm_embedding.weight", "mtp.pre_fc_norm_hidden.weight", "mtp.fc.weight"),
}


def entrance(path: str, style: str, width: int) -> dict[str, torch.Tensor]:
    """Random weights of what makes the input of an MTP layer, by name, in the order of ENTRANCE."""
    generator = torch.Generator().manual_seed(7)
    shapes = ((width,), (width,), (width, 2 * width))
    return {
        name.format(path=path): torch.randn(shape, generator=generator) * (0.3 if len(shape) > 1 else 1)
        for name, shape in zip(ENTRANCE[style], shapes, strict=True)
    }


def add_mtp(folder: Path, style: str = "further", known: bool = False) -> str:
    """Add an MTP layer to a checkpoint, and say so in its config.json: the last layer with its weights negated, and
    what is its own. Returns the path of the layer.

    `known`: with all that makes its input, so that its experts can be scored; else a norm is missing.

    Further: behind the last, as DeepSeek and GLM publish theirs. mtp: beside the layers, as Qwen3-Next and Qwen3.5 do.
    """
    config = json.loads((folder / "config.json").read_text())
    text = config.get("text_config", config)
    width, count = text["hidden_size"], text["num_hidden_layers"]
    tensors = read_tensors(folder)
    last = last_layer(tensors, count)
    path = "mtp.layers.0" if style == "mtp" else f"{last.rpartition('.')[0]}.{count}"
    more = {name: negated(name, tensor) for name, tensor in of_layer(tensors, last, path).items()}
    if known:
        more |= entrance(path, style, width)
    elif style == "mtp":
        more["mtp.fc.weight"] = torch.ones(width, 2 * width)
        more |= {f"mtp.{name}.weight": torch.ones(width) for name in ("norm", "pre_fc_norm_hidden")}
    else:
        more |= {f"{path}.eh_proj.weight": torch.ones(width, 2 * width), f"{path}.enorm.weight": torch.ones(width)}
    save_file(more, folder / "mtp.safetensors", {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    listed["weight_map"] |= dict.fromkeys(more, "mtp.safetensors")
    index.write_text(json.dumps(listed))
    text[COUNTS[style]] = 1
    (folder / "config.json").write_text(json.dumps(config))
    return path


def last_layer(tensors: dict[str, torch.Tensor], count: int) -> str:
    """The path of the last of `count` layers in a checkpoint."""
    inside = f"layers.{count - 1}."
    name = next(name for name in tensors if inside in name and not name.startswith("mtp."))
    return name.partition(inside)[0] + inside[:-1]


def of_layer(tensors: dict[str, torch.Tensor], path: str, named: str) -> dict[str, torch.Tensor]:
    """The tensors of the layer at a path, by their names in one at the path `named`."""
    return {f"{named}{name[len(path) :]}": each for name, each in tensors.items() if name.startswith(f"{path}.")}


def negated(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of weights with the other sign, also in FP8; scales and packed codes as they are."""
    if "scale" in name or not tensor.is_floating_point():
        return tensor.clone()
    return (tensor.view(torch.uint8) ^ 128).view(tensor.dtype) if tensor.element_size() == 1 else -tensor


def check_mtp(output: Path, path: str, count: int = 4) -> None:
    """Assert that the MTP layer in `output` keeps, of every tensor of `add_mtp`, what the last layer keeps."""
    tensors = read_tensors(output)
    wanted = of_layer(tensors, last_layer(tensors, count), path)
    assert any("experts" in name for name in wanted)
    for name, tensor in wanted.items():
        expected = negated(name, tensor)
        assert tensors[name].dtype == expected.dtype, name
        assert torch.equal(tensors[name].reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8)), name
    own = {name for name in tensors if name.startswith(("mtp.", f"{path}."))} - wanted.keys()
    assert own == {
        f"{path}.eh_proj.weight", f"{path}.enorm.weight"
    } or own == {"mtp.fc.weight", "mtp.norm.weight", "mtp.pre_fc_norm_hidden.weight"}  # fmt: skip
