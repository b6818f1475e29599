"""What the programs that serve a model take: a table of rules, read in their sources. No torch.

To add a rule: an entry in RULES, with the file of the engine's repository that says so. Read in vLLM 0.32 and its main
branch, llama.cpp 0c1e57098 (2026-10-01), and SGLang and TensorRT-LLM of 2026. Rules that are `checked` by "run"
were tried as well: vLLM's router on a CPU, llama-quantize on small files, stock transformers by our own tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from streamprune.formats.quantization import Quantization
from streamprune.models.config_json import ExpertSpec, first_number, text_part
from streamprune.quantize.schemes import SCHEMES
from streamprune.selection.widths import K_QUANT, is_aligned

#: How messages call the engines.
NAMES = {"vllm": "vLLM", "llama.cpp": "llama.cpp", "transformers": "transformers", "tensorrt-llm": "TensorRT-LLM",
         "sglang": "SGLang"}  # fmt: skip
#: Numbers of experts, beside powers of two up to 512, that routing on GPUs is compiled for.
VLLM_COUNTS, LLAMA_COUNTS = (192, 320, 384, 448, 576), (288, 576)
#: Most experts of a layer in llama.cpp (`LLAMA_MAX_EXPERTS`).
LLAMA_MOST = 1024
#: Values of a block in the formats that llama-quantize falls back to.
_SMALL_BLOCK = 32
#: What llama.cpp's converter decodes: by `quant_method`, and for compressed-tensors by `format`.
_LLAMA_METHODS = ("", "fp8", "gptq", "compressed-tensors", "modelopt", "mxfp4", "bitnet")
_LLAMA_FORMATS = (
    "float-quantized", "int-quantized", "naive-quantized", "pack-quantized", "nvfp4-pack-quantized", "mixed-precision",
)  # fmt: skip
#: GPUs that experts are usually divided among.
GPUS = (2, 4, 8)


@dataclass(frozen=True)
class Served:
    """What of a result decides whether an engine takes it.

    `counts` are the different numbers of experts of its layers, ascending. `width` is the number of channels of each
    expert; None where it is unknown. `weights` is how it is stored, one of WEIGHTS, and `config` the source's
    config.json.
    """

    spec: ExpertSpec
    counts: tuple[int, ...]
    weights: str = "source"
    width: int | None = None
    itemsize: int = 2
    config: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def count(self) -> int:
        """Experts of the layer that has most."""
        return self.counts[-1]

    def with_count(self, count: int) -> Served:
        """The same with `count` experts in every layer."""
        return replace(self, counts=(count,))

    @property
    def quantization(self) -> Quantization:
        """The quantization section of the source, if its weights stay as they are."""
        return Quantization.of(self.config) if self.weights == "source" else Quantization()

    @property
    def hidden(self) -> int | None:
        """The hidden size; None if it is unknown."""
        return first_number((text_part(self.config)[1],), ("hidden_size", "n_embd", "d_model"))


@dataclass(frozen=True)
class Rule:
    """What `engine` takes: `takes` says whether a result is so, `says` what happens if not.

    `says` is a sentence without its full stop, with the fields of `engines.sentence`. By a rule that `refuses` the
    engine ends, or computes something else without a word; the others cost it speed, or some of its kernels. `about` is
    count, layers, router, width or stored; `rounds` says that a number of experts is good only if it meets the rule.
    `source` is the file of the engine's repository that has it; `checked` how that was verified: read, or run too.
    """

    engine: str
    about: str
    refuses: bool
    takes: Callable[[Served], bool]
    says: str
    source: str
    checked: str = "read"
    rounds: bool = False


def _equal_layers(served: Served) -> bool:
    return len(served.counts) == 1


def _whole_groups(served: Served) -> bool:
    groups = served.spec.groups
    return groups == 1 or all(count > groups and count % groups == 0 for count in served.counts)


def _some_groups(served: Served) -> bool:
    return served.spec.groups == 1 or served.spec.topk_groups < served.spec.groups


def _is_power_of_two(count: int) -> bool:
    return count & (count - 1) == 0


def _compiled_for(served: Served, others: tuple[int, ...]) -> bool:
    return (_is_power_of_two(served.count) and served.count <= 512) or served.count in others


def _is_sqrtsoftplus(served: Served) -> bool:
    """Whether the router scores by the root of softplus, as that of DeepSeek-V4 does."""
    text = text_part(served.config)[1]
    return text.get("scoring_func") == "sqrtsoftplus" or text.get("model_type") == "deepseek_v4"


def _flashinfer_fp8(served: Served) -> bool:
    is_fp8 = served.weights == "fp8" or served.quantization.method == "fp8"
    return not is_fp8 or (served.count % 4 == 0 and served.count <= 512)


def _llama_reads(served: Served) -> bool:
    found = served.quantization
    known = found.method != "compressed-tensors" or found.values.get("format") in _LLAMA_FORMATS
    return found.method in _LLAMA_METHODS and known


def _stock_reads(served: Served) -> bool:
    found = served.quantization
    packed = found.values.get("format") in ("nvfp4-pack-quantized", "int-quantized")
    return found.method not in ("gptq", "awq", "auto-round") and not packed


def _width_in(multiple: int, weights: str | None = None) -> Callable[[Served], bool]:
    """Whether the width is a multiple of this; asked only of these `weights`, if any are named."""

    def takes(served: Served) -> bool:
        return served.width is None or weights not in (None, served.weights) or served.width % multiple == 0

    return takes


def _k_quants(served: Served) -> bool:
    # (What has no block of 32 is another rule's.)
    return served.width is None or served.width % K_QUANT == 0 or served.width % _SMALL_BLOCK != 0


def _is_aligned(served: Served) -> bool:
    return served.weights in SCHEMES or served.width is None or is_aligned(served.width, served.itemsize)


def _marlin_hidden(served: Served) -> bool:
    return served.weights not in ("w4a16", "w8a16") or served.hidden is None or served.hidden % 128 == 0


_VLLM_MOE = "vllm/model_executor/layers/fused_moe"
_TRTLLM_FP8 = "cpp/tensorrt_llm/thop/fp8BlockScaleMoe.cpp"
_COUNTS = "powers of two up to 512 and {vllm_counts}"

RULES: tuple[Rule, ...] = (
    *(
        Rule(
            engine, "layers", True, _equal_layers,
            "{name} reads one number of experts for all layers, and they keep {least} to {count}; prune with "
            "--schedule uniform",
            source,
        )
        for engine, source in (
            ("vllm", "vllm/model_executor/models/qwen3_moe.py"),
            ("llama.cpp", "src/llama-hparams.h"),
            ("tensorrt-llm", "tensorrt_llm/_torch/models/modeling_qwen3_moe.py"),
            ("sglang", "python/sglang/srt/models/qwen3_moe.py"),
        )
    ),
    Rule(
        "transformers", "layers", False, _equal_layers,
        "transformers loads layers that keep {least} to {count} experts only from version 5.14 on, and with "
        "trust_remote_code=True",
        "src/transformers/dynamic_module_utils.py", "run",
    ),
    Rule(
        "vllm", "count", True, _whole_groups,
        "vLLM's router drops its {groups} groups without a word, and picks other experts, unless each has equally many "
        "of the {count} experts, and more than one",
        f"{_VLLM_MOE}/router/grouped_topk_router.py", "run", rounds=True,
    ),
    Rule(
        "llama.cpp", "count", True, _whole_groups,
        "llama.cpp ends with an error unless each of the router's {groups} groups has equally many of the {count} "
        "experts, and more than one",
        "src/llama-model.cpp", "run", rounds=True,
    ),
    Rule(
        "llama.cpp", "router", True, _some_groups,
        "llama.cpp ends with an error where the router picks all of its {groups} groups",
        "src/llama-model.cpp", "run",
    ),
    Rule(
        "llama.cpp", "count", True, lambda served: served.count <= LLAMA_MOST,
        f"llama.cpp takes at most {LLAMA_MOST:,} experts per layer, not {{count}}",
        "src/llama-hparams.h", "run", rounds=True,
    ),
    Rule(
        "vllm", "count", True, lambda served: not _is_sqrtsoftplus(served) or _compiled_for(served, VLLM_COUNTS),
        f"vLLM's router for DeepSeek-V4 takes, on GPUs, no {{count}} experts: only {_COUNTS}",
        "csrc/libtorch_stable/moe/topk_softplus_sqrt_kernels.cu", rounds=True,
    ),
    Rule(
        "vllm", "count", False, lambda served: _is_sqrtsoftplus(served) or _compiled_for(served, VLLM_COUNTS),
        f"vLLM routes {{count}} experts by a slower kernel: its fast one is for {_COUNTS}",
        "csrc/libtorch_stable/moe/topk_softmax_kernels.cu", rounds=True,
    ),
    Rule(
        "vllm", "count", False, _flashinfer_fp8,
        "vLLM's FlashInfer kernels for FP8 experts on Blackwell GPUs want a multiple of 4 up to 512, not {count}",
        f"{_VLLM_MOE}/experts/trtllm_fp8_moe.py", rounds=True,
    ),
    Rule(
        "llama.cpp", "count", False, lambda served: _compiled_for(served, LLAMA_COUNTS),
        "llama.cpp does not fuse the routing of {count} experts on CUDA, only of powers of two up to 512 and "
        "{llama_counts}",
        "ggml/src/ggml-cuda/topk-moe.cu", rounds=True,
    ),
    Rule(
        "sglang", "count", False, lambda served: _is_power_of_two(served.count),
        "SGLang's fused routing wants a power of two, not {count}; AITER's, on AMD GPUs, may fail with others",
        "python/sglang/srt/layers/moe/topk.py", rounds=True,
    ),
    Rule(
        "tensorrt-llm", "count", False, lambda served: served.count % 4 == 0 and served.count > served.spec.top_k,
        "TensorRT-LLM's kernels for FP8 and FP4 experts on Blackwell GPUs want a multiple of 4 above the {top_k} that "
        "a token gets, not {count}",
        _TRTLLM_FP8, rounds=True,
    ),
    Rule(
        "vllm", "count", False, lambda served: served.count % GPUS[-1] == 0,
        "vLLM's expert parallelism with load balancing needs redundant experts, or a number of GPUs that divides "
        "{count}: {gpus}",
        f"{_VLLM_MOE}/layer.py",
    ),
    Rule(
        "tensorrt-llm", "count", False, lambda served: served.count % GPUS[-1] == 0,
        "TensorRT-LLM's expert parallelism without load balancing needs a number of GPUs that divides {count}: {gpus}",
        "tensorrt_llm/_torch/moe/fused_moe/interface.py",
    ),
    Rule(
        "vllm", "width", True, _width_in(32, "fp8"),
        "vLLM's FP8 in blocks takes no experts of {width} channels: they are no multiple of 32",
        f"{_VLLM_MOE}/oracle/fp8.py",
    ),
    Rule(
        "vllm", "width", False, _width_in(128, "fp8"),
        "vLLM runs FP8 experts of {width} channels, no multiple of 128, by its Triton kernels only",
        f"{_VLLM_MOE}/oracle/fp8.py",
    ),
    Rule(
        "tensorrt-llm", "width", False, _width_in(128, "fp8"),
        "TensorRT-LLM's kernels for FP8 experts on Blackwell GPUs want channels in multiples of 128, not {width}",
        _TRTLLM_FP8,
    ),
    Rule(
        "vllm", "stored", False, _marlin_hidden,
        "vLLM's Marlin kernels for integers want a hidden size in multiples of 128, not {hidden}; others are slower",
        "vllm/model_executor/layers/quantization/utils/marlin_utils.py",
    ),
    Rule(
        "llama.cpp", "width", False, _width_in(_SMALL_BLOCK),
        "llama-quantize leaves down projections with {width} channels in 16 bits: they are no multiple of 32",
        "src/llama-quant.cpp", "run",
    ),
    Rule(
        "llama.cpp", "width", False, _k_quants,
        "llama-quantize stores down projections with {width} channels, no multiple of 256, in larger formats than the "
        "k-quant that is asked for",
        "src/llama-quant.cpp", "run",
    ),
    Rule(
        "transformers", "width", False, _is_aligned,
        "transformers' grouped matrix product needs channels in multiples of {aligned} (16 bytes), not {width}: load "
        'the result with experts_implementation="eager", which is slower',
        "src/transformers/integrations/moe.py", "run",
    ),
    Rule(
        "llama.cpp", "stored", True, _llama_reads,
        "llama.cpp's converter does not read weights stored as {stored}; write them decoded with --weights bf16",
        "conversion/base.py",
    ),
    Rule(
        "transformers", "stored", False, _stock_reads,
        "transformers needs a package for weights stored as {stored}, or misreads them; --weights bf16 decodes them",
        "src/transformers/quantizers/auto.py", "run",
    ),
)  # fmt: skip
