"""Full-size models as published, with headers of every tensor and no data: sparse files that take kilobytes on disk."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

CONFIGS = Path(__file__).parent / "model_configs"
ITEMSIZE = {"BF16": 2, "F16": 2, "F32": 4, "F8_E4M3": 1, "U8": 1, "I32": 4, "I64": 8}

Tensors = dict[str, tuple[str, tuple[int, ...]]]


def config_only(name: str, folder: Path) -> Path:
    """A folder that holds nothing but the published config."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(CONFIGS / name / "config.json", folder)
    return folder


def published(name: str, folder: Path) -> Path:
    """The whole checkpoint of `name` in its published layout, all in BF16, one file per block."""
    config_only(name, folder)
    return write_sparse(folder, {name: ("BF16", shape) for name, shape in _published_shapes(folder)})


def _published_shapes(folder: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """transformers joins the experts of a block in two tensors; most authors publish them one by one."""
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    names = ("w1", "w3", "w2") if config.model_type == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    for name, tensor in model.state_dict().items():
        shape = tuple(tensor.shape)
        if config.model_type == "mixtral":
            name = name.replace(".mlp.", ".block_sparse_moe.")
        moe, _, kind = name.rpartition(".experts.")
        if config.model_type == "qwen3_5_moe_text" or kind not in ("gate_up_proj", "down_proj"):
            yield name, shape
            continue
        for expert in range(shape[0]):
            if kind == "down_proj":
                yield f"{moe}.experts.{expert}.{names[2]}.weight", shape[1:]
            else:
                for half in names[:2]:
                    yield f"{moe}.experts.{expert}.{half}.weight", (shape[1] // 2, shape[2])


def write_sparse(folder: Path, tensors: Tensors) -> Path:
    """Files with these tensors (dtype and shape by name), real headers, and holes in place of the data; and an index.

    Every decoder block gets a file of its own.
    """
    files: dict[str, Tensors] = {}
    for name, fact in tensors.items():
        numbers = [part for part in name.split(".") if part.isdigit()]
        files.setdefault(numbers[0] if "layers." in name and numbers else "rest", {})[name] = fact
    index = {}
    for number, members in enumerate(files.values(), start=1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        write_header(folder / file, members)
        index.update(dict.fromkeys(members, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def write_header(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """A safetensors file with these tensors, whose data is a hole of the right size."""
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + math.prod(shape) * ITEMSIZE[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        stream.truncate(8 + len(encoded) + end)
