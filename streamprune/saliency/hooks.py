"""Recording what every expert contributes while the model's own forward runs.

Experts modules are switched to `_tapped_forward`. If a module would run transformers' grouped_mm implementation,
`forward_with_pairs` computes the same steps with a bit-identical result, and measures every pair on the way. Other
modules run their plain forward, and a second time for the single experts (`bare_pairs`). Tests compare the two with
each other and with the complete model. If the experts work in a latent space (Nemotron-H), f_j is their output there,
before the projection back.

Shapes: T tokens, K experts chosen per token, P = T·K pairs, R rows (the pairs and padding), E experts, W channels of
an expert, H hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import (
    ALL_EXPERTS_FUNCTIONS,
    _default_apply_gate,
    _grouped_linear,
    grouped_mm_experts_forward,
)

from streamprune.errors import UnsupportedModelError
from streamprune.models.skeleton import DENSE_EXPERTS, Skeleton, dispatches_experts
from streamprune.saliency.channels import channel_count, squared_column_norms, weighted_squares
from streamprune.saliency.combine import combine, gated_sums
from streamprune.saliency.statistics import ExpertStatistics, Pairs, exact_dtype, measure, norms

#: On a CPU in half precision an expert's rows are padded to a multiple of this share of the mean: oneDNN compiles a
#: kernel for every number of rows, at 0.2 ms and up to a MiB each, and routers produce all kinds of numbers.
FILL_SHARE = 8
#: The name of our forward in transformers' experts interface.
IMPLEMENTATION = "streamprune"


@dataclass
class ExpertsTap:
    """Records one experts module. `plain` is the forward the module had; with `statistics` None nothing is recorded.

    `grouped` means that `plain` is transformers' grouped_mm implementation, whose steps are also computed here, so that
    recording costs little. Otherwise `plain` runs a second time. `residual_T` are the norms of the residual stream that
    last entered the layer. `column_norms` are ‖down[:, j]‖² (E, W) of all channels, once they were needed.
    """

    plain: Callable[..., torch.Tensor]
    grouped: bool
    statistics: ExpertStatistics | None = None
    residual_T: torch.Tensor | None = None
    column_norms: torch.Tensor | None = None

    @contextmanager
    def listening(self, layer: nn.Module) -> Iterator[None]:
        """Within the context, record into `statistics`; `layer` is the layer with these experts."""
        hook = layer.register_forward_pre_hook(self._entering, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()
            self.statistics = self.residual_T = self.column_norms = None

    def _entering(self, layer: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        stream = args[0] if args else named["hidden_states"]
        # (B, L, H); with several residual streams (B, L, N, H), taken together.
        self.residual_T = norms(stream.reshape(stream.shape[0] * stream.shape[1], -1))

    def record(self, pairs: Pairs) -> None:
        """Add a micro-batch's pairs to the statistics."""
        assert self.statistics is not None
        if self.residual_T is None or len(self.residual_T) != len(pairs.index):
            raise UnsupportedModelError(
                f"A layer's experts got {len(pairs.index)} tokens, but another number entered the layer; the two "
                "cannot be compared. Please report this model."
            )
        self.statistics.add(pairs, self.residual_T)

    def record_channels(self, module: Any, inner_RW: torch.Tensor, rows: Rows, gates_TK: torch.Tensor) -> None:
        """Add the energies of a micro-batch's channels to the statistics, from the activations of its rows."""
        assert self.statistics is not None
        assert self.statistics.channels is not None
        if self.column_norms is None:
            self.column_norms = squared_column_norms(module)
        squares_P = gates_TK.to(exact_dtype(inner_RW)).square().reshape(-1)
        squares_R = squares_P.new_zeros(len(inner_RW)).index_copy_(0, rows.row_TK.reshape(-1), squares_P)
        sums_EW = weighted_squares(inner_RW, squares_R, rows.ends_E, rows.counts_E)
        self.statistics.channels[0] += sums_EW.mul_(self.column_norms)


def recorded_width(skeleton: Skeleton) -> int | None:
    """The channels of each expert whose energies can be recorded; None if they cannot.

    That is so if experts cannot be made narrower (`Skeleton.fixed_width`), if some module does not run transformers'
    grouped_mm implementation, whose activations are seen here, or if it has a norm behind the down projection, so that
    channels do not simply add up. The modules may be tapped already.
    """
    modules = [skeleton.layers[index].get_submodule(path) for index, path in skeleton.experts.items()]
    for module in modules:
        grouped = _make_tap(module).grouped and not getattr(module, "_is_expert_parallel", False)
        if not grouped or getattr(module, "has_post_expert_norm", False):
            return None
    widths = {channel_count(module) for module in modules}
    return widths.pop() if skeleton.width is not None and len(widths) == 1 else None


def computes_in_parts(skeleton: Skeleton) -> bool:
    """Whether all experts are computed by `forward_with_pairs` or `forward_in_parts`, with no step of their own in it.

    Such steps are biases, gates that are more than the activation times up, and norms behind the down projection.
    """
    modules = [skeleton.layers[index].get_submodule(path) for index, path in skeleton.experts.items()]
    return all(
        _make_tap(module).grouped
        and not getattr(module, "_is_expert_parallel", False)
        and not getattr(module, "has_bias", False)
        and not getattr(module, "has_post_expert_norm", False)
        and getattr(type(module), "_apply_gate", None) is _default_apply_gate
        for module in modules
    )


def tap_experts(modules: Mapping[int, nn.Module]) -> dict[int, ExpertsTap]:
    """Make experts modules (by layer) record to the returned taps. Their outputs stay bit-identical.

    Modules that dispatch through transformers' experts interface are switched to our entry in it, which no fused
    kernel bypasses; the others (older ones, which loop over their experts) get our forward in place of their own.
    """
    taps = {index: _make_tap(module) for index, module in modules.items()}
    for index, module in modules.items():
        module._streamprune_tap = taps[index]  # type: ignore[assignment]
        if dispatches_experts(module):
            module.config._experts_implementation = IMPLEMENTATION  # type: ignore[union-attr]
        else:
            module.forward = functools.partial(_tapped_forward, module)
    return taps


def _make_tap(module: nn.Module) -> ExpertsTap:
    earlier = getattr(module, "_streamprune_tap", None)
    if earlier is not None:
        # Already tapped: the module's current forward is ours.
        return ExpertsTap(earlier.plain, earlier.grouped)
    plain = type(module).forward
    if dispatches_experts(module):
        implementation = module.config._experts_implementation  # type: ignore[union-attr]
        plain = ALL_EXPERTS_FUNCTIONS.get(implementation, plain.__wrapped__)  # type: ignore[attr-defined]
    return ExpertsTap(plain, grouped=plain is grouped_mm_experts_forward)


def _tapped_forward(
    module: Any, hidden_states: torch.Tensor, *routing: torch.Tensor, **named: torch.Tensor
) -> torch.Tensor:
    """The forward of a tapped experts module, with the output of its plain one, and the statistics if any are recorded.

    If they are not, it still takes no more memory than planned, which a replayed layer needs.
    """
    tap: ExpertsTap = module._streamprune_tap
    # (With expert parallelism the module has some of the experts only.)
    grouped = tap.grouped and not getattr(module, "_is_expert_parallel", False)
    if tap.statistics is None and not grouped:
        return tap.plain(module, hidden_states, *routing, **named)
    if type(module).__name__ in DENSE_EXPERTS:
        output = tap.plain(module, hidden_states)
        tap.record(dense_pairs(module.num_experts, hidden_states, output))
        return output
    index_TK, gates_TK = (*routing, *(named[name] for name in ("top_k_index", "top_k_weights") if name in named))
    hidden_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
    if gates_TK.shape != index_TK.shape or len(index_TK) != len(hidden_TH):
        raise UnsupportedModelError(
            f"{type(module).__name__} got weights {list(gates_TK.shape)} for chosen experts {list(index_TK.shape)} and "
            f"{len(hidden_TH)} tokens, which do not match. Please report this model."
        )
    if tap.statistics is None:
        return forward_in_parts(module, hidden_TH, index_TK, gates_TK)
    if grouped:
        channels = tap.record_channels if tap.statistics.channels is not None else None
        output, pairs = forward_with_pairs(module, hidden_TH, index_TK, gates_TK, channels)
    else:
        # (`recorded_width` has said so.)
        assert tap.statistics.channels is None
        output = tap.plain(module, hidden_states, *routing, **named)
        pairs = bare_pairs(tap, module, hidden_TH, index_TK, gates_TK, output.reshape(len(hidden_TH), -1))
    tap.record(pairs)
    return output


def dense_pairs(experts: int, hidden_states: torch.Tensor, output: torch.Tensor) -> Pairs:
    """Every token paired with every expert, (T, E), from a dense experts module's input and output.

    Llama4TextExperts gets every token once per expert, already multiplied by its router score, with zero rows for the
    experts that the token was not routed to. The model does not weight the experts' outputs, so the gate weight is 1
    and the score is the mean norm of what the expert adds. (Its own code runs every expert on every token.)
    `hidden_states` and `output` are (E·T, H), expert by expert. An expert that was not chosen gets the index E.
    """
    hidden_TEH, output_TEH = (
        tensor.view(experts, -1, tensor.shape[-1]).transpose(0, 1) for tensor in (hidden_states, output)
    )
    routed_TE = hidden_TEH.any(dim=-1)
    everyone_TE = torch.arange(experts, device=output.device).expand(routed_TE.shape)
    index_TE = torch.where(routed_TE, everyone_TE, experts)
    gates_TE = torch.ones(routed_TE.shape, dtype=exact_dtype(output), device=output.device)
    # The rows of a token are its hidden state times the scores, so their norms have the order of the scores.
    ranks_TE = norms(hidden_TEH)
    return Pairs(index_TE, gates_TE, ranks_TE, *measure(output_TEH, gates_TE, output_TEH.sum(dim=1)))


def bare_pairs(
    tap: ExpertsTap,
    module: nn.Module,
    hidden_TH: torch.Tensor,
    index_TK: torch.Tensor,
    gates_TK: torch.Tensor,
    sum_TH: torch.Tensor,
) -> Pairs:
    """The measurements of each pair, by the module's own forward; `sum_TH` is its output for all chosen experts.

    Each pair of a token and a chosen expert is passed to it as a token of its own with weight one, so that its code
    returns every expert's output with all biases, clamps or norms that it applies.
    """
    output_TKH = tap.plain(
        module,
        hidden_TH.repeat_interleave(index_TK.shape[1], dim=0),
        index_TK.reshape(-1, 1),
        torch.ones_like(gates_TK).reshape(-1, 1),
    ).view(*index_TK.shape, hidden_TH.shape[-1])
    return Pairs(index_TK, gates_TK, gates_TK, *measure(output_TKH, gates_TK, sum_TH))


#: Gets an experts module, the activations (R, W) that enter its down projection, the rows that they are of, and the
#: gate weights (T, K).
OnInner = Callable[[Any, torch.Tensor, "Rows", torch.Tensor], None]


def forward_with_pairs(
    module: Any,
    hidden_TH: torch.Tensor,
    index_TK: torch.Tensor,
    gates_TK: torch.Tensor,
    on_inner: OnInner | None = None,
) -> tuple[torch.Tensor, Pairs]:
    """The experts' combined output (T, H), and the measurements of each pair, in float32 or wider.

    `on_inner` sees the activations before the output exists, since both together would take more memory.

    torch (as of 2.10) has a fused grouped product for bfloat16 on NVIDIA GPUs of compute capability 9 and 10, where
    nothing here waits for the GPU. On others (8.0 to 8.9 and 12.0: GeForce RTX 3090, 4090, 5090), and for float16 and
    float32 on all, both grouped products copy the offsets to the host, which waits for them, and start a product for
    each expert.
    """
    output_RH, rows = _outputs(module, hidden_TH, index_TK, gates_TK, on_inner)
    found = combine(output_RH, rows.row_TK, gates_TK)
    pairs = Pairs(index_TK, gates_TK, gates_TK, found.norms, found.peaks, found.cosines)
    return found.sums.to(hidden_TH.dtype), pairs


def forward_in_parts(
    module: Any, hidden_TH: torch.Tensor, index_TK: torch.Tensor, gates_TK: torch.Tensor
) -> torch.Tensor:
    """The experts' combined output (T, H) alone. It takes half of the memory of transformers' own forward."""
    output_RH, rows = _outputs(module, hidden_TH, index_TK, gates_TK)
    return gated_sums(output_RH, rows.row_TK, gates_TK).to(hidden_TH.dtype)


def _outputs(
    module: Any,
    hidden_TH: torch.Tensor,
    index_TK: torch.Tensor,
    gates_TK: torch.Tensor,
    on_inner: OnInner | None = None,
) -> tuple[torch.Tensor, Rows]:
    """The output of every chosen expert before its gate, (R, H), and the rows that they are of."""
    rows = sort_by_expert(index_TK, module.num_experts, tile_of(hidden_TH, index_TK, module.num_experts))

    def linear(inputs: torch.Tensor, name: str) -> torch.Tensor:
        bias = getattr(module, f"{name}_bias")[rows.expert_R] if module.has_bias else None
        output: torch.Tensor = _grouped_linear(
            inputs, getattr(module, name), rows.ends_E, bias=bias, is_transposed=module.is_transposed
        )
        return output

    inner = linear(hidden_TH.index_select(0, rows.token_R), "gate_up_proj" if module.has_gate else "up_proj")
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    if on_inner is not None:
        on_inner(module, inner, rows, gates_TK)
    output_RH = linear(inner, "down_proj")
    if getattr(module, "has_post_expert_norm", False):
        output_RH = module.post_expert_norm(output_RH)
    return output_RH, rows


@dataclass(frozen=True)
class Rows:
    """Pairs in the order of their experts: each row's token and expert, where each expert's rows end, each pair's row.

    Padding rows have some token and some expert, and belong to no pair: of each expert's rows, `counts_E` pairs come
    first. (Counts may be floats.)
    """

    token_R: torch.Tensor
    expert_R: torch.Tensor
    ends_E: torch.Tensor
    counts_E: torch.Tensor
    row_TK: torch.Tensor


def tile_of(hidden_TH: torch.Tensor, index_TK: torch.Tensor, experts: int) -> int:
    """Experts' rows are padded to a multiple of this number; 1 if padding would gain nothing.

    In half precision a row's product is bit-identical for any number of rows. In float32 it is not, and its kernels are
    not compiled for each size.
    """
    if hidden_TH.device.type != "cpu" or hidden_TH.dtype not in (torch.bfloat16, torch.float16):
        return 1
    return max(1, index_TK.numel() // experts // FILL_SHARE)


def sort_by_expert(index_TK: torch.Tensor, experts: int, tile: int = 1) -> Rows:
    """Sort pairs by expert, with a multiple of `tile` rows for each; pairs of experts beyond the last come at the end.

    Does not wait for a GPU if `tile` is 1, as it is there.
    """
    chosen = index_TK.shape[1]
    expert_P, order_P = torch.sort(index_TK.reshape(-1))
    # As in transformers: histc takes floats on the CPU and integers on CUDA.
    countable_P = expert_P.float() if expert_P.device.type == "cpu" else expert_P.int()
    counts_E = torch.histc(countable_P, bins=experts, min=0, max=experts - 1)
    filled_E = counts_E
    token_R, expert_R = order_P // chosen, expert_P
    row_P = torch.arange(order_P.numel(), device=order_P.device)
    if tile > 1:
        fill_E = -counts_E.long() % tile
        filled_E = counts_E + fill_E
        before = torch.nn.functional.pad(torch.cumsum(fill_E, dim=0), (1, 0))
        row_P = row_P + before[expert_P.clamp(max=experts)]
        filled = order_P.numel() + int(before[-1])
        token_R, expert_R = (
            torch.zeros(filled, dtype=torch.long).index_copy_(0, row_P, values) for values in (token_R, expert_R)
        )
    row_TK = torch.empty_like(order_P).index_copy_(0, order_P, row_P).view(index_TK.shape)
    return Rows(token_R, expert_R, torch.cumsum(filled_E, dim=0, dtype=torch.int32), counts_E, row_TK)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _tapped_forward)
