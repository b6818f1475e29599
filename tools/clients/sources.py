"""Tiny random models with the sizes that kernels ask for, their pruned results, and what transformers makes of them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from clients.answers import GENERATED, VOCABULARY, Answer, prompts
from streamprune.config import RunSettings
from streamprune.pipeline.run import run

EXPERTS, KEPT = 16, 12
#: Wanted sizes; a family takes those that its config has. All are whole blocks and groups of 128, each projection of
#: attention too: vLLM joins q, k and v, and wants whole blocks in each.
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
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
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"norm_topk_prob": True, "head_dim": 64, "num_key_value_heads": 2},
    "qwen2_moe": {},
    "mixtral": {"head_dim": 64, "num_key_value_heads": 2},
    "olmoe": {},
    "glm4_moe": {"head_dim": 64, "num_key_value_heads": 2},
    "deepseek_v3": {**_MLA, "head_dim": 64, "q_lora_rank": 128, "n_group": 4, "topk_group": 2},
    # Full attention only: vLLM's kernels for linear attention want bfloat16.
    "qwen3_next": {"head_dim": 64, "num_key_value_heads": 2, "layer_types": ["full_attention"] * 4},
    "ernie4_5_moe": {"moe_k": 4},
}
#: What published config.json files say, and transformers' config classes neither need nor write.
_SAID = {"deepseek_v3": {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}}
_NO_CORRECTION = ("ernie4_5_moe",)
#: Calibration: sequences, and tokens in each.
SEQUENCES, LENGTH = 24, 48


def make_source(family: str, folder: Path, seed: int = 0) -> None:
    """Write a random model of a family, float32, in 4 layers of 16 experts. Needs a new folder."""
    torch.manual_seed(seed)
    kind = CONFIG_MAPPING[family]
    plain = kind()
    sizes = {name: value for name, value in SIZES.items() if getattr(plain, name, None) is not None} | FAMILIES[family]
    config = kind(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False)
    config.dtype = torch.float32
    model = AutoModelForCausalLM.from_config(config)
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
    path = folder / "config.json"
    said = json.loads(path.read_text(encoding="utf-8")) | _SAID.get(family, {})
    path.write_text(json.dumps(said, indent=2), encoding="utf-8")


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
    model, told = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **how)
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
