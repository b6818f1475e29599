"""Asks vLLM on the CPU: `python ask_vllm.py FOLDER...`, with vLLM's own Python. Writes results beside each folder.

`FOLDER-vllm.json` is what vLLM answers as it is. For a quantized model there is `FOLDER-vllm-decoded.json` too, where
vLLM loads the model and its weights are then decoded (see `decoded_vllm`), and for a plain one with layers for
multi-token prediction `FOLDER-vllm-drafting.json`, where these draft tokens. A result that is there is left alone: a
folder that kills the process has one, and the next process goes on behind it.
"""

from __future__ import annotations

import json
import re
import sys
import traceback
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from clients.answers import GENERATED, VOCABULARY, Answer, Failure, is_mtp, prompts, save

INDEX = "model.safetensors.index.json"
#: How vLLM 0.32 says that it knows a format and has no kernel for it here.
NO_KERNEL = re.compile(r"No \w+ MoE backend supports|[Ff]ailed to find a kernel|Unsupported FP8 MoE backend: NONE")
#: vLLM 0.32's own rotary embedding on CPUs rotates (tokens, heads, 64), as multi-head latent attention has it, wrongly.
_OPS = ["all", "-rotary_embedding"]


def ask(folder: Path, dtype: str, drafting: bool = False) -> Answer:
    """What vLLM answers, computing in a dtype; of tokens that are drafted, only which it generates."""
    from vllm import LLM, SamplingParams

    options: dict[str, Any] = {
        "compilation_config": {"custom_ops": _OPS},
        "enforce_eager": True,
        "enable_prefix_caching": False,
    }
    if "ConditionalGeneration" in (folder / "config.json").read_text(encoding="utf-8"):
        options["limit_mm_per_prompt"] = {"image": 0, "video": 0}
    if drafting:
        options |= {"speculative_config": {"method": "mtp", "num_speculative_tokens": 1}, "disable_log_stats": False}
    engine = LLM(
        model=str(folder), skip_tokenizer_init=True, dtype=dtype, max_model_len=128, max_num_seqs=4,
        max_logprobs=VOCABULARY, seed=0, **options,
    )  # fmt: skip
    how = SamplingParams(
        temperature=0, max_tokens=GENERATED, prompt_logprobs=None if drafting else VOCABULARY, ignore_eos=True,
        detokenize=False,
    )  # fmt: skip
    done = engine.generate([{"prompt_token_ids": ids} for ids in prompts()], how, use_tqdm=False)
    greedy = [list(each.outputs[0].token_ids) for each in done]
    if drafting:
        counted = {each.name: getattr(each, "value", 0) for each in engine.get_metrics()}
        return Answer([], greedy, int(counted["vllm:spec_decode_num_draft_tokens"]))
    # Row n tells the token at n from those before, so row 0 is None; there is none behind the last token.
    rows = [
        [[told[token].logprob for token in range(VOCABULARY)] for told in each.prompt_logprobs[1:]] for each in done
    ]
    return Answer(rows, greedy)


def result(folder: Path, context: AbstractContextManager[None], dtype: str, drafting: bool) -> Answer | Failure:
    """What vLLM answers within a context, or why it does not."""
    from vllm.distributed import cleanup_dist_env_and_memory

    try:
        with context:
            return ask(folder, dtype, drafting)
    except Exception as error:
        traceback.print_exc()
        lines = [line for line in str(error).splitlines() if line.strip()] or ["(no message)"]
        found = next((line.removesuffix(" Reasons: ") for line in lines if NO_KERNEL.search(line)), None)
        return Failure(f"{type(error).__name__}: {found or lines[0]}", no_kernel=found is not None)
    finally:
        cleanup_dist_env_and_memory()


def main(folders: list[Path]) -> None:
    """Write a result, or two, for each folder."""
    from clients.decoded_vllm import decoded

    for folder in folders:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        section = config.get("quantization_config", {})
        # Its kernels for native FP8 refuse float32.
        own = "bfloat16" if section.get("quant_method") == "fp8" else "float32"
        ways = [("vllm", nullcontext, own), ("vllm-decoded", decoded, "float32")]
        predicts = any(map(is_mtp, json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]))
        last = [ways[1]] if section else [("vllm-drafting", nullcontext, "float32")] if predicts else []
        for way, context, dtype in [ways[0], *last]:
            path = folder.with_name(f"{folder.name}-{way}.json")
            if path.exists():
                continue
            print(f"=== {path}", flush=True)
            save(Failure("the process died"), path)
            save(result(folder, context(), dtype, way == "vllm-drafting"), path)


if __name__ == "__main__":
    main([Path(each) for each in sys.argv[1:]])
