"""Tiny random models of every Mixture-of-Experts family that transformers knows, made on the spot."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig

VOCAB = 256
EXPERTS = 8

#: Wanted sizes; a family takes those that its config has.
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "vocab_size": VOCAB,
    "shared_expert_intermediate_size": 32,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "first_k_dense_replace": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_group": 1,
    "topk_group": 1,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_heads": 4,
    "linear_head_dim": 16,
    "sliding_window": 16,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "moe_num_experts": EXPERTS,
}
MLA = {"num_key_value_heads": 4, "head_dim": 8}
INDEXER = {"index_n_heads": 4, "index_head_dim": 16, "index_topk": 8}
ROUTED = {"n_routed_experts": EXPERTS, "num_experts_per_tok": 2}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
MAMBA = {"use_mamba_kernels": False}
VISION_TOWER = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
SAM = {
    "hidden_size": 32, "output_channels": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 64,
    "mlp_dim": 32, "downsample_channels": [8, 8], "global_attn_indexes": [0],
}  # fmt: skip
ENCODER = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 32, "layer_types": ["full_attention"],
}  # fmt: skip
INKLING = {
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16, "sliding_window_size": 16,
    "rel_extent": 16, "d_rel": 4, "unpadded_vocab_size": VOCAB, "layer_types": ["hybrid_sliding", "hybrid"] * 2,
}  # fmt: skip
MINIMAX_M3 = {"shared_intermediate_size": 32, "dense_intermediate_size": 96}
#: Of the layers with a sliding window, which have sizes of their own.
DOTS_SLIDING = MLA | {
    "num_attention_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "qk_rope_head_dim": 8, "head_dim": 24,
}  # fmt: skip
VISION_SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "depth": 1, "out_hidden_size": 64}


@dataclass(frozen=True)
class Family:
    """How to make a tiny model: `sizes` beside SIZES (None: leave out); `text` nests them in a multimodal config.

    `like` is another family, of whose code this one's is a copy as far as streaming and pruning go: tests with this one
    are thorough. `since` is the version of transformers that has its experts in a form that can be scored.
    """

    name: str
    sizes: dict[str, Any] = field(default_factory=dict)
    text: str | None = None
    outer: dict[str, Any] = field(default_factory=dict)
    keep: int = 5
    label: str | None = None
    like: str | None = None
    since: str = "5.17"

    @property
    def id(self) -> str:
        return self.label or self.name


ALL_FAMILIES = [
    Family("qwen3_moe"),
    Family("qwen2_moe"),
    Family("qwen3_next"),
    Family("qwen3_5_moe_text"),
    Family("qwen3_5_moe", text="qwen3_5_moe_text", outer={"vision_config": {**VISION_SMALL}}),
    Family(
        "qwen3_vl_moe",
        text="qwen3_vl_moe_text",
        outer={"vision_config": {**VISION_SMALL, "deepstack_visual_indexes": [0]}},
    ),
    Family("mixtral"),
    Family("deepseek_v2", {**MLA, **ROUTED, "n_shared_experts": 1}),
    Family("deepseek_v3", {**MLA, "n_group": 2, "topk_group": 1}, keep=4),
    Family("deepseek_v32", {**MLA, **INDEXER}),
    Family("olmoe"),
    Family("flex_olmo"),
    Family("glm4_moe"),
    Family("glm4_moe_lite", MLA),
    Family("glm_moe_dsa", {**MLA, **INDEXER}),
    Family("glm4v_moe", {"rope_parameters": MROPE}, text="glm4v_moe_text", outer={"vision_config": {**VISION_SMALL}}),
    Family("gpt_oss"),
    Family("ernie4_5_moe", {"moe_k": 2}),
    Family("minimax"),
    Family("minimax_m2", {"rotary_dim": 8}),
    Family("phimoe"),
    Family("granitemoe"),
    Family("granitemoeshared"),
    Family(
        "granitemoehybrid",
        {
            "layer_types": ["mamba", "attention"] * 2,
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 16,
            "shared_intermediate_size": 32,
        },
    ),
    Family("hunyuan_v1_moe", {"head_dim": 16, "moe_topk": 2, "num_experts_per_tok": None}),
    Family("dots1", {**ROUTED, "n_shared_experts": 1, "max_window_layers": 4}),
    Family("lfm2_moe", {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1}),
    Family(
        "jamba",
        {
            **MAMBA,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 8,
        },
    ),
    Family(
        "nemotron_h",
        {
            **MAMBA,
            "layers_block_type": ["mamba", "moe", "attention", "moe"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 32,
            "ssm_state_size": 8,
            "n_groups": 1,
            "chunk_size": 16,
            "num_hidden_layers": None,
            "moe_shared_expert_intermediate_size": 32,
            "moe_latent_size": None,
        },
    ),
    Family("llama4_text", {"intermediate_size_mlp": 96, "moe_layers": None, "interleave_moe_layer_step": 2}),
    Family("afmoe"),
    Family("mimo_v2_flash"),
    Family("kimi_linear"),
    Family("exaone_moe"),
    Family("hy_v3"),
    Family("bailing_hybrid"),
    Family("cohere2_moe"),
    Family("solar_open"),
    Family("mellum"),
    Family(
        "qwen4_exp_text",
        {
            "indexer_n_heads": 4,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 16,
            "indexer_compress_ratio": 4,
            "hc_count": 2,
            "hc_lowrank": 8,
            "ple_layer_ids": [2],
            "ngram_vocab_size_base": 64,
            "split_ngram_parts": 2,
            "heads_per_ngram": 2,
            "make_ngram_vocab_size_divisible_by": 8,
        },
    ),
    Family(
        "gemma4_text",
        {
            "enable_moe_block": True,
            "num_experts": EXPERTS,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "global_head_dim": 16,
            "num_global_key_value_heads": 2,
        },
    ),
    Family(
        "llama4",
        {"intermediate_size_mlp": 96, "moe_layers": None, "interleave_moe_layer_step": 2},
        text="llama4_text",
        outer={
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "vision_output_dim": 32,
                "projector_input_dim": 32,
                "projector_output_dim": 32,
                "image_size": 28,
                "patch_size": 14,
            }
        },
    ),
    Family("dbrx"),
    Family("inkling_text", {**INKLING, "n_shared_experts": 1, "mlp_layer_types": ["dense", *["sparse"] * 3]}),
    Family("minimax_m3_vl_text", MINIMAX_M3),
    Family("axk1", MLA, like="deepseek_v3"),
    Family("axk2", MLA, like="deepseek_v32"),
    Family(
        "dots3_note_text",
        {
            **MLA,
            **INDEXER,
            "shared_experts_intermediate_size": 32,
            "layer_types": ["indexed_attention", "sliding_attention"] * 2,
            "per_layer_config": {"1": DOTS_SLIDING, "3": DOTS_SLIDING},
        },
        like="deepseek_v32",
    ),
    Family("granitemoe_swa", like="granitemoe"),
    Family("aria_text", like="mixtral", since="5.18"),
    Family("beam", like="minimax_m3_vl_text"),
    Family("flint", like="qwen3_moe"),
    Family("hy_v4", like="minimax_m3_vl_text"),
    Family("kolibri1", like="qwen3_moe"),
    Family("laguna", like="qwen3_moe"),
    Family("mistral4", {**MLA, **ROUTED, "n_shared_experts": 1}, like="deepseek_v3"),
    Family(
        "mistral_large4",
        {**MLA, **ROUTED},
        text="mistral_large4_text",
        outer={"vision_config": {"model_type": "pixtral", **VISION_TOWER, "head_dim": 16}},
        like="deepseek_v3",
    ),
    Family(
        "glm5_next",
        {**MLA, **INDEXER, "qk_rope_head_dim": 0, "head_dim": 0, "index_kpool": 2, "hc_mult": 2},
        text="glm5_next_text",
        outer={"vision_config": {**VISION_SMALL, "projection_intermediate_size": 32}},
        like="minimax_m3_vl_text",
    ),
    Family(
        "step3p7",
        {
            "sliding_window": 16,
            "layer_types": ["full_attention", "sliding_attention"] * 2,
            "share_expert_dim": 32,
            "mlp_layer_types": ["dense", *["sparse"] * 3],
        },
        text="step3p5",
        outer={"vision_config": VISION_TOWER},
        like="minimax_m3_vl_text",
    ),
    Family(
        "muse_spark",
        {"moe_hidden_size": 32},
        text="muse_spark_text",
        outer={
            "out_hidden_size": 64,
            "projector_hidden_size": 32,
            "vision_config": {**VISION_TOWER, "patch_size": 4, "pos_emb_height": 4, "pos_emb_width": 4},
            "audio_config": {"hidden_sizes": [8] * 4, "depths": [1] * 4, "out_hidden_size": 64},
        },
        like="deepseek_v3",
    ),
    Family(
        "qwen3_omni_moe_thinker",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}},
        text="qwen3_omni_moe_text",
        outer={
            "vision_config": {**VISION_SMALL, "deepstack_visual_indexes": [0]},
            "audio_config": {
                "d_model": 32,
                "encoder_layers": 1,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": 32,
                "output_dim": 64,
                "downsample_hidden_size": 8,
                "num_mel_bins": 16,
            },
        },
        like="qwen3_moe",
    ),
    Family(
        "unlimited_ocr",
        text="unlimited_ocr_text",
        outer={"vision_config": {"sam_config": SAM, "encoder_config": VISION_TOWER}},
        like="deepseek_v2",
    ),
    Family(
        "deepseek_ocr2",
        {**ROUTED, "mlp_layer_types": ["dense", *["sparse"] * 3]},
        text="deepseek_ocr2_text",
        outer={"vision_config": {"sam_config": SAM, "encoder_config": ENCODER}},
        like="deepseek_v2",
    ),
]

#: Those that the installed transformers knows in a form that can be scored: older ones lack the newest.
FAMILIES = [
    family
    for family in ALL_FAMILIES
    if family.name in CONFIG_MAPPING and Version(transformers.__version__) >= Version(family.since)
]

#: Model types whose text part has the code of another one, which is tested.
ALIASES = {
    "aria": "aria_text",
    "dots3_note": "dots3_note_text",
    "gemma4": "gemma4_text",
    "inkling2": "inkling2_text",
    "inkling_mm_model": "inkling_text",
    "minimax_m3_vl": "minimax_m3_vl_text",
    "qwen4_exp": "qwen4_exp_text",
}

#: Families that cannot be scored, and words of the reason that the user is told.
ALL_REFUSED = [
    (Family("deepseek_v4"), "a table of expert numbers"),
    (
        Family(
            "longcat_flash",
            {
                **MLA,
                "num_layers": 2,
                "num_hidden_layers": 4,
                "zero_expert_num": 4,
                "expert_ffn_hidden_size": 32,
                "ffn_hidden_size": 96,
                "moe_topk": 2,
                "num_experts_per_tok": None,
                "intermediate_size": None,
                "moe_intermediate_size": None,
            },
        ),
        "a single expert",
    ),
    (Family("jetmoe"), "work in another way"),
    (Family("doge", {"is_moe": True, "num_experts": 64}), "one after the other"),
    (Family("inkling2_text", INKLING), "hidden states of layers far before"),
    (Family("zaya", {"num_experts_per_tok": 1, "router_hidden_size": 32}), "tokens that skip all experts"),
    (
        Family(
            "ernie4_5_vl_moe",
            {
                "moe_k": 2,
                "moe_intermediate_size": [32, 32],
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 4]},
            },
            text="ernie4_5_vl_moe_text",
            outer={"vision_config": VISION_SMALL},
        ),
        "2 modules that take",
    ),
    (
        Family(
            "diffusion_gemma",
            {"num_experts": EXPERTS, "top_k_experts": 2, "moe_intermediate_size": 32},
            text="diffusion_gemma_text",
            outer={
                "vision_config": {
                    "model_type": "gemma4_vision",
                    **VISION_TOWER,
                    "num_key_value_heads": 2,
                    "head_dim": 16,
                    "position_embedding_size": 16,
                }
            },
        ),
        "outside the decoder layers",
    ),
]
REFUSED = [(family, reason) for family, reason in ALL_REFUSED if family.name in CONFIG_MAPPING]
#: Families that are tested without `--all`.
USUAL = [family.id for family in FAMILIES if family.like is None]


def tiny_config(family: Family) -> PreTrainedConfig:
    """The config of a tiny model: four blocks, eight experts, two of them per token."""
    if family.text is not None:
        text = _sized(family.text, family.sizes).to_dict()
        config = CONFIG_MAPPING[family.name](text_config=text, **family.outer)
    elif family.name == "dbrx":
        ffn = {"ffn_hidden_size": 32, "moe_num_experts": EXPERTS, "moe_top_k": 2}
        attention = {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}
        config = CONFIG_MAPPING["dbrx"](
            d_model=64, n_heads=4, n_layers=4, max_seq_len=256, vocab_size=VOCAB, ffn_config=ffn, attn_config=attention
        )
    else:
        config = _sized(family.name, family.sizes)
    config.dtype = torch.float32
    return config


def _sized(name: str, sizes: dict[str, Any]) -> PreTrainedConfig:
    kind = CONFIG_MAPPING[name]
    try:
        base = kind()
    except Exception:
        base = None
    wanted = {key: value for key, value in SIZES.items() if base is not None and _has(base, key)} | sizes
    wanted = {key: value for key, value in wanted.items() if value is not None}
    return kind(**wanted, pad_token_id=0, bos_token_id=1, eos_token_id=2)


def _has(config: PreTrainedConfig, key: str) -> bool:
    try:
        return getattr(config, key, None) is not None
    except RuntimeError:
        # A config with per-layer values has the key, but will not name one value for it.
        return True


def make_model(folder: Path, config: PreTrainedConfig, seed: int = 0, **save: Any) -> Path:
    """Save a random model of `config` in `folder`, with weights large enough that experts differ."""
    torch.manual_seed(seed)
    try:
        model = AutoModelForCausalLM.from_config(config).eval()
        if type(model.config) is not type(config):
            raise ValueError("a text-only class for a multimodal config")
    except ValueError:
        model = AutoModelForImageTextToText.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.08)
    for name, buffer in model.named_buffers():
        if "correction_bias" in name or "expert_bias" in name:
            buffer.data.normal_(0, 0.05)
    model.save_pretrained(folder, **({"max_shard_size": "200KB"} | save))
    return folder


def write_token_ids(path: Path, sequences: int = 4, length: int = 24, seed: int = 1) -> Path:
    """A JSONL file of random token sequences."""
    generator = torch.Generator().manual_seed(seed)
    lines = [
        json.dumps({"input_ids": torch.randint(3, VOCAB, (length,), generator=generator).tolist()})
        for _ in range(sequences)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
