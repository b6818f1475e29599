"""Tiny random models with the sizes that kernels ask for, their pruned results, and what transformers makes of them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

from clients.answers import GENERATED, LAYERS, VOCABULARY, Answer, is_mtp, prompts
from clients.parts import add_mtp, write_tokenizer
from streamprune.config import RunSettings
from streamprune.pipeline.run import run

EXPERTS, KEPT = 16, 12
#: Wanted sizes; a family takes those that its config has. All are whole blocks and groups of 128, each projection of
#: attention too: vLLM joins q, k and v, and wants whole blocks in each.
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 512,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "vocab_size": VOCABULARY,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "moe_num_experts": EXPERTS,
}
#: Multi-head latent attention as wide as in DeepSeek-V3: vLLM's kernels for CPUs take no other.
_MLA = {"kv_lora_rank": 512, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 64}
#: Of families whose configs leave these open.
_ROUTED = {"n_routed_experts": EXPERTS, "num_experts_per_tok": 4, "n_shared_experts": 1}
_LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
}  # fmt: skip
_YARN = {
    "rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
    "original_max_position_embeddings": 4096, "truncate": True,
}  # fmt: skip
#: The text part of those that see, and what they see with.
_TEXT_PARTS = {"qwen3_5_moe": "qwen3_5_moe_text"}
_VISION = {"hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "depth": 1, "out_hidden_size": 128}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"norm_topk_prob": True, "head_dim": 64, "num_key_value_heads": 2},
    "qwen2_moe": {},
    "mixtral": {"head_dim": 64, "num_key_value_heads": 2},
    "olmoe": {},
    "glm4_moe": {"head_dim": 64, "num_key_value_heads": 2},
    "deepseek_v3": {**_MLA, "head_dim": 64, "q_lora_rank": 128, "n_group": 4, "topk_group": 2},
    # Full attention only: vLLM's kernels for linear attention want bfloat16.
    "qwen3_next": {"head_dim": 64, "num_key_value_heads": 2, "layer_types": ["full_attention"] * 4},
    # llama.cpp's converter takes the width of shared experts to be the dense one by the number of key heads.
    "ernie4_5_moe": {"moe_k": 4, "intermediate_size": 1024},
    "deepseek_v2": {**_MLA, **_ROUTED, "head_dim": 64, "q_lora_rank": 128},
    # As published, but truncated: llama.cpp always is.
    "gpt_oss": {"head_dim": 64, "num_key_value_heads": 2, "max_position_embeddings": 131072, "rope_parameters": _YARN},
    "minimax_m2": {"head_dim": 64, "num_key_value_heads": 2, "rotary_dim": 32},
    "dots1": {**_ROUTED, "head_dim": 64},
    "granitemoe": {"num_key_value_heads": 2},
    "qwen3_next-linear": {"head_dim": 64, "num_key_value_heads": 2, **_LINEAR},
    "qwen3_5_moe": {"head_dim": 64, "num_key_value_heads": 2, **_LINEAR},
}
#: Some of those that are published with layers for multi-token prediction, with these.
_PREDICTING = ("glm4_moe", "deepseek_v3", "qwen3_next", "qwen3_next-linear", "qwen3_5_moe")
FAMILIES |= {f"{each}-mtp": FAMILIES[each] for each in _PREDICTING}
#: What published config.json files say, and transformers' config classes neither need nor write.
_SAID: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    "deepseek_v2": {"scoring_func": "softmax", "topk_method": "greedy", "n_group": 1, "topk_group": 1},
    "dots1": {"scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    "minimax_m2": {
        "scoring_func": "sigmoid", "use_routing_bias": True, "use_qk_norm": True, "qk_norm_type": "per_layer",
        "attn_type_list": [1] * 4,
    },
}  # fmt: skip
_NO_CORRECTION = ("ernie4_5_moe",)
#: Calibration: sequences, and tokens in each.
SEQUENCES, LENGTH = 24, 48


def make_source(family: str, folder: Path, seed: int = 0) -> None:
    """Write a random model of a family, float32, in 4 layers of 16 experts, and a tokenizer. Needs a new folder."""
    torch.manual_seed(seed)
    model = _model(_config(family))
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.08)
        elif name.endswith("bias"):
            parameter.data.normal_(0, 0.05)
    for name, tensor in model.state_dict().items():
        # vLLM's router for CPUs leaves it out where scores are a softmax.
        if name.endswith("correction_bias"):
            tensor.normal_(0, 0.05) if family not in _NO_CORRECTION else tensor.zero_()
    model.save_pretrained(folder, max_shard_size="1MB")
    write_tokenizer(folder)
    path, (name, *variants) = folder / "config.json", family.split("-")
    said = json.loads(path.read_text(encoding="utf-8")) | _SAID.get(name, {})
    path.write_text(json.dumps(said, indent=2), encoding="utf-8")
    if "mtp" in variants:
        add_mtp(folder)


def _config(family: str) -> transformers.PreTrainedConfig:
    """The config of a family's tiny model, with a part for vision where it has one."""
    name = family.partition("-")[0]
    part = _TEXT_PARTS.get(name, name)
    kind = CONFIG_MAPPING[part]
    plain = kind()
    sizes = {each: value for each, value in SIZES.items() if getattr(plain, each, None) is not None} | FAMILIES[family]
    config = kind(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False)
    if part != name:
        text = config.to_dict()
        config = CONFIG_MAPPING[name](text_config=text, vision_config=_VISION, tie_word_embeddings=False)
    config.dtype = torch.float32
    return config


def _model(config: transformers.PreTrainedConfig) -> Any:
    """The model of a config, with all its parts."""
    has_parts = config is not config.get_text_config(decoder=True)
    return (AutoModelForImageTextToText if has_parts else AutoModelForCausalLM).from_config(config)


def make_result(source: Path, output: Path, weights: str) -> None:
    """Prune a source to 12 of its 16 experts and store it as `--weights` says. Raises StreampruneError."""
    draw = random.Random(9)
    text = output.with_name("calibration.jsonl")
    rows = [[draw.randrange(3, VOCABULARY) for _ in range(LENGTH)] for _ in range(SEQUENCES)]
    text.write_text("\n".join(json.dumps({"input_ids": row}) for row in rows), encoding="utf-8")
    settings = RunSettings(
        model=str(source), output=output, calibration=(str(text),), keep=KEPT, weights=weights, device="cpu",
        dtype="float32",
    )  # fmt: skip
    run(settings, quiet=True)


def reference(folder: Path) -> Answer:
    """What stock transformers answers in float32, with decoded weights. Raises ValueError for keys that do not fit."""
    section = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    how: dict[str, Any] = {}
    if section is not None:
        kinds = {"fp8": transformers.FineGrainedFP8Config, "compressed-tensors": transformers.CompressedTensorsConfig}
        how["quantization_config"] = kinds[section["quant_method"]](dequantize=True)
    architecture = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    kind = AutoModelForImageTextToText if "ConditionalGeneration" in architecture else AutoModelForCausalLM
    model, told = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **how)
    told["unexpected_keys"] = [name for name in told["unexpected_keys"] if not is_mtp(name)]
    if wrong := {kind: names for kind, names in told.items() if names}:
        raise ValueError(f"transformers loads {folder} with {wrong}")
    rows, greedy = [], []
    with torch.no_grad():
        for ids in prompts():
            logits = model(torch.tensor([ids])).logits[0].float()
            rows.append(logits.log_softmax(-1).tolist())
            made = model.generate(torch.tensor([ids]), max_new_tokens=GENERATED, do_sample=False, eos_token_id=None)
            greedy.append(made[0, len(ids) :].tolist())
    return Answer(rows, greedy)
