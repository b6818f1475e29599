"""Which tensors of a plain checkpoint are matrices that can be quantized, and why others are not.

Those are the projections of the experts and the weights of the Linear modules in the decoder's layers, less what the
usual tools leave plain too: routers and gates, and projections so narrow that they cost little and are sensitive.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from streamprune.checkpoint.safetensors_file import TensorEntry
from streamprune.models.expert_layout import Target
from streamprune.models.skeleton import Skeleton

#: The names of experts' parameters that are matrices, in transformers' experts modules.
EXPERT_MATRICES = frozenset({"gate_up_proj", "up_proj", "down_proj"})
#: Linear modules that stay plain, by the last part of their name, and why. The projections down to MLA's latents
#: (DeepSeek-V3: 576 rows, which are no whole blocks of 128, and which transformers 5.23 misreads in FP8; engines join
#: both, so both stay), and those to the gates of linear attention, have few rows. Gates decide where everything goes.
_STAYS_PLAIN = (
    (re.compile(r"(q|kv)_a_proj(_with_mqa)?"), "narrow projections of multi-head latent attention"),
    (re.compile(r"in_proj_(a|b|ba)|[bfg]_[ab]_proj|(a|b|dt|x)_proj"), "small projections of linear attention"),
    (re.compile(r"(.*_)?(gate|router|weights_proj)"), "routers and gates"),
)
#: Projections of one input, by the last part of their name, that engines join to one matrix (vLLM: `qkv_proj`,
#: `gate_up_proj`; its `is_layer_skipped` refuses models that quantize only some of those).
_JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True)
class LinearWeights:
    """Names of a checkpoint's matrices: `experts` and `others` can be quantized; `plain` cannot, with the reason.

    Engines with tensor parallelism divide the columns of the `split` ones among GPUs. `modules` are the names that the
    model has for the modules of `others` and `plain`, which the checkpoint may name otherwise; `head` is that of its
    output head, which has no tensor of its own where it is tied to the embeddings. `rows` has the numbers of rows of a
    matrix of `others` and of those that engines join with it.
    """

    experts: frozenset[str] = field(repr=False)
    others: frozenset[str] = field(repr=False)
    split: frozenset[str] = field(repr=False)
    plain: Mapping[str, str] = field(repr=False)
    modules: Mapping[str, str] = field(repr=False)
    rows: Mapping[str, tuple[int, ...]] = field(repr=False)
    head: str | None = None


def find_linear_weights(
    skeleton: Skeleton, targets: Mapping[str, Target], tensors: Mapping[str, TensorEntry]
) -> LinearWeights:
    """The matrices of a plain checkpoint that can be quantized, and those that stay plain (but for embeddings).

    `targets` say what each tensor feeds. A matrix of experts is a tensor of its own for each expert (see
    `separate_experts.py`), with the shape (out, in), as every weight of a Linear module has.
    """
    hidden = skeleton.model.config.get_text_config(decoder=True).hidden_size
    experts, others, split = set(), set(), set()
    plain, modules = {}, {}
    for name, target in targets.items():
        if not name.endswith(".weight") or len(tensors[name].shape) != 2:
            continue
        path, _, leaf = (target.name or "").rpartition(".")
        if leaf in EXPERT_MATRICES and path.endswith(f".{target.layer}.{skeleton.experts.get(target.layer or 0)}"):
            experts.add(name)
            split |= {name} if leaf == "down_proj" else set()
            continue
        module = skeleton.model.get_submodule(path) if target.name is not None else None
        if isinstance(module, nn.Embedding):
            continue
        reason = _why_plain(target, module, path)
        modules[name] = path if module is not None else name.removesuffix(".weight")
        if reason is None:
            others.add(name)
            # What reads hidden states is divided by its rows; what reads anything else, mostly by its columns.
            split |= {name} if tensors[name].shape[1] != hidden else set()
        else:
            plain[name] = reason
    output = skeleton.model.get_output_embeddings()
    head = next((path for path, module in skeleton.model.named_modules() if module is output), None)
    rows = {name: tuple(tensors[each].shape[0] for each in _joined(name) if each in others) for name in others}
    return LinearWeights(frozenset(experts), frozenset(others), frozenset(split), plain, modules, rows, head)


def _joined(name: str) -> tuple[str, ...]:
    """The names of a matrix (`….weight`) and of those that engines join with it, as far as they exist."""
    path, _, leaf = name.removesuffix(".weight").rpartition(".")
    leaves = next((each for each in _JOINED if leaf in each), (leaf,))
    return tuple(f"{path}.{each}.weight" for each in leaves)


def _why_plain(target: Target, module: nn.Module | None, path: str) -> str | None:
    """Why the matrix that feeds the weight of the module at `path` stays plain; None if it can be quantized."""
    if target.layer is None or module is None:
        return "outside the decoder's layers"
    if target.rows is not None:
        return "routers and gates"
    leaf = path.rpartition(".")[2]
    reason = next((reason for pattern, reason in _STAYS_PLAIN if pattern.fullmatch(leaf)), None)
    if reason is not None:
        return reason
    if not isinstance(module, nn.Linear):
        return f"weights of {type(module).__name__}"
    if target.pattern is not None or target.also:
        return "weights that transformers converts while loading"
    return None
