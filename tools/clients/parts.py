"""What a published checkpoint has beside transformers' own tensors: a tokenizer, layers for multi-token prediction."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from clients.answers import LAYERS, WORDS

_FILE = "model-mtp.safetensors"


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of whole characters and made-up words: llama.cpp's server does not tell halves of characters."""
    merges = [("t", "h"), ("i", "n"), ("e", "r")]
    pieces = ["<pad>", "<s>", "</s>", *map(chr, range(33, 127)), "\u0120", "\u010a", *map("".join, merges)]
    pieces += [f"x{number}" for number in range(len(pieces), WORDS)]
    found = Tokenizer(models.BPE({piece: at for at, piece in enumerate(pieces)}, merges, unk_token="<pad>"))
    found.pre_tokenizer, found.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=found, **named).save_pretrained(folder)


def add_mtp(folder: Path) -> None:
    """Add a layer for multi-token prediction, as published: like the last layer (full attention, experts), with other
    weights, and its own parts. Qwen's lie beside the model's layers, others behind the last one."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text, is_qwen = config.get("text_config", config), config["model_type"].startswith("qwen")
    tensors = {name: each for file in folder.glob("*.safetensors") for name, each in load_file(file).items()}
    inside = f"layers.{LAYERS - 1}."
    last = next(name for name in sorted(tensors) if inside in name).partition(inside)[0] + inside
    path = "mtp.layers.0." if is_qwen else f"model.layers.{LAYERS}."
    more = {path + name[len(last) :]: each.flip(-1) for name, each in tensors.items() if name.startswith(last)}
    width = text["hidden_size"]
    joint, norms = f"{path}eh_proj.weight", [f"{path}{name}.weight" for name in ("enorm", "hnorm", "shared_head.norm")]
    if is_qwen:
        joint, norms = "mtp.fc.weight", [f"mtp.{name}.weight" for name in _QWEN_NORMS]
    else:
        more[f"{path}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        more[f"{path}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    more |= {joint: torch.randn(width, 2 * width) * 0.05, **{name: torch.ones(width) for name in norms}}
    save_file({name: each.contiguous() for name, each in more.items()}, folder / _FILE, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text(encoding="utf-8"))
    listed["weight_map"] |= dict.fromkeys(more, _FILE)
    index.write_text(json.dumps(listed), encoding="utf-8")
    text["mtp_num_hidden_layers" if config["model_type"] == "qwen3_5_moe" else "num_nextn_predict_layers"] = 1
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


_QWEN_NORMS = ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
