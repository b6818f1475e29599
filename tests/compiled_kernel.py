"""Compiles the kernel for kinds of GPUs, which needs none, and prints what came out as JSON.

In a process of its own, since Triton either interprets its kernels or compiles them. Each argument is a compute
capability and the dtype of the gates, as 8.6:fp32; the outputs are bfloat16.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from streamprune.saliency.pair_kernel import _combine_tokens, sizes_for


def compiled(capability: str, gates: str) -> dict[str, Any]:
    """The bytes of the kernel's machine code and of shared memory, and its instructions that round."""
    sizes = sizes_for(2048, 8)
    pointers = {"output_RH": "*bf16", "row_TK": "*i64", "gates_TK": f"*{gates}", "sum_TH": f"*{gates}"}
    pointers |= dict.fromkeys(("norms_TK", "peaks_TK", "dots_TK", "sum_norms_T"), "*fp32")
    source = ASTSource(_combine_tokens, pointers | dict.fromkeys(sizes, "constexpr"), sizes)
    target = GPUTarget("cuda", int(capability.replace(".", "")), 32)
    kernel = triton.compile(source, target=target, options={"enable_fp_fusion": False})
    words = {word for line in kernel.asm["ptx"].splitlines() for word in line.split()[:2]}
    rounding = sorted(word for word in words if word.startswith(("cvt.r", "fma.", "mul.f", "mul.r", "add.f", "add.r")))
    return {"bytes": len(kernel.asm["cubin"]), "shared": kernel.metadata.shared, "rounding": rounding}


if __name__ == "__main__":
    print(json.dumps({argument: compiled(*argument.split(":")) for argument in sys.argv[1:]}))
