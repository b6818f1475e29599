"""The models to measure with: configs of named shapes, random checkpoints and tokens of them, and their arithmetic."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parent.parent.parent
SHAPES = ROOT / "configs" / "shapes"
INDEX = "model.safetensors.index.json"
#: Bytes of a value of the weights and the hidden states, by the config's dtype.
ITEMSIZE = {"bfloat16": 2, "float32": 4}
#: Files that are written at a time.
WRITERS = 4
#: What `Work` counts, and where it is from.
FLOP_FORMULA = (
    "per token and layer: 2 x the parameters of the matrices that are active (attention, router, top-k experts), plus "
    "4 x L x heads x head_dim for attention over L tokens (PaLM, arXiv:2204.02311, appendix B, forward only), of which "
    "half is counted: no more is needed where attention is causal"
)


def shape_names() -> list[str]:
    """The shapes that there are, in order."""
    return sorted(path.stem for path in SHAPES.glob("*.json"))


def config_of(shape: str, layers: int | None = None, dtype: str | None = None) -> dict[str, Any]:
    """The config.json of a named shape, with so many decoder layers, and in the dtype, instead of its own."""
    config: dict[str, Any] = json.loads((SHAPES / f"{shape}.json").read_text())
    if layers is not None:
        config["num_hidden_layers"] = layers
    if dtype is not None:
        config["dtype"] = dtype
    return config


@dataclass(frozen=True)
class Work:
    """The arithmetic of a forward of one token through one decoder layer, in FLOP, within `length` tokens.

    `FLOP_FORMULA` says what is counted. Norms, softmax, rotary embedding and the activation are not.
    """

    matrices: int
    attention_causal: int
    attention_full: int

    @property
    def counted(self) -> int:
        """FLOP per token and layer that have to be computed."""
        return self.matrices + self.attention_causal


def work_of(config: Mapping[str, Any], length: int) -> Work:
    """The work of a layer of a model with this config, for sequences of `length` tokens."""
    hidden, head = config["hidden_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    attention = hidden * (2 * queries + 2 * keys)
    experts = config["num_experts_per_tok"] * 3 * hidden * config["moe_intermediate_size"]
    matrices = 2 * (attention + hidden * config["num_experts"] + experts)
    full = 4 * length * queries
    return Work(matrices, full // 2, full)


def write_tokens(path: Path, samples: int, length: int, vocabulary: int) -> None:
    """Random calibration sequences, the same every time: JSON lines with `input_ids`."""
    rng = random.Random(0)
    with path.open("w") as stream:
        for _ in range(samples):
            stream.write(json.dumps({"input_ids": rng.choices(range(vocabulary), k=length)}) + "\n")


def is_built(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether the folder holds the whole checkpoint of this config: its index is written last."""
    try:
        return (folder / INDEX).is_file() and json.loads((folder / "config.json").read_text()) == config
    except (OSError, ValueError):
        return False


def build(config: Mapping[str, Any], folder: Path, device: str = "cpu") -> None:
    """Write a random checkpoint of the config, one expert tensor after another, as published checkpoints are.

    The first file holds what lies around the layers, each of the others one layer. The numbers are drawn on `device`: a
    GPU is done with gigabytes in seconds.
    """
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    sizes = [_surroundings(config), *(_layer(config, layer) for layer in range(config["num_hidden_layers"]))]
    files = [f"model-{number + 1:05d}-of-{len(sizes):05d}.safetensors" for number in range(len(sizes))]

    def write(number: int) -> None:
        # (Each file has numbers of its own, so that they are the same whichever is drawn first.)
        generator = torch.Generator(device).manual_seed(number)
        save_file(_drawn(sizes[number], config["dtype"], generator), folder / files[number], metadata={"format": "pt"})

    # Several files at a time keep a disk busy; more would take a layer's memory each.
    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(write, range(len(sizes))))
    index = {name: file for file, names in zip(files, sizes, strict=True) for name in names}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))


#: Values that share a scale in FP8 (DeepSeek-V3, arXiv:2412.19437, section 3.3.2).
_FP8_BLOCK = 128


def quantize(plain: Path, folder: Path, device: str = "cpu") -> None:
    """Write a checkpoint of `build` again, with the matrices of attention and experts in FP8, as published ones are.

    The values are computed on `device`.
    """
    from safetensors.torch import load_file, save_file

    folder.mkdir()
    index: dict[str, str] = {}
    for path in weight_files(plain):
        stored: dict[str, torch.Tensor] = {}
        for name, weight in load_file(path).items():
            stored |= _in_fp8(name, weight.to(device)) if "_proj." in name else {name: weight}
        save_file(stored, folder / path.name, metadata={"format": "pt"})
        index |= dict.fromkeys(stored, path.name)
    section = {"quant_method": "fp8", "weight_block_size": [_FP8_BLOCK, _FP8_BLOCK], "activation_scheme": "dynamic"}
    config = {**json.loads((plain / "config.json").read_text()), "quantization_config": section}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))


def _in_fp8(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    import torch
    from torch.nn.functional import pad

    rows, columns = weight.shape
    padded = pad(weight.float(), (0, -columns % _FP8_BLOCK, 0, -rows % _FP8_BLOCK))
    blocks = padded.reshape(padded.shape[0] // _FP8_BLOCK, _FP8_BLOCK, -1, _FP8_BLOCK)
    scale = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
    values = (blocks / scale[:, None, :, None]).flatten(2).flatten(0, 1)[:rows, :columns]
    return {name: values.to(torch.float8_e4m3fn).contiguous().cpu(), f"{name}_scale_inv": scale.cpu()}


def _drawn(sizes: Mapping[str, tuple[int, ...]], dtype: str, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Tensors of these sizes: vectors of ones, all else random."""
    import torch

    kind = getattr(torch, dtype)
    return {
        name: torch.ones(size, dtype=kind)
        if len(size) == 1
        else (torch.randn(size, generator=generator, device=generator.device) * 0.03).to(kind).cpu()
        for name, size in sizes.items()
    }


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights, in order."""
    return sorted(folder.glob("*.safetensors"))


def layer_bytes(folder: Path) -> int:
    """The largest layer of a checkpoint of `build`."""
    return max(path.stat().st_size for path in weight_files(folder)[1:])


def _surroundings(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    return {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "lm_head.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
    }


def _layer(config: Mapping[str, Any], layer: int) -> dict[str, tuple[int, ...]]:
    hidden, width, head = config["hidden_size"], config["moe_intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    sizes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "self_attn.q_norm.weight": (head,),
        "self_attn.k_norm.weight": (head,),
        "mlp.gate.weight": (config["num_experts"], hidden),
    }
    for expert in range(config["num_experts"]):
        for name, size in (("gate", (width, hidden)), ("up", (width, hidden)), ("down", (hidden, width))):
            sizes[f"mlp.experts.{expert}.{name}_proj.weight"] = size
    return {f"model.layers.{layer}.{name}": size for name, size in sizes.items()}
