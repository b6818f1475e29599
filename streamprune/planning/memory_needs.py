"""The memory that a run needs, and that the machine has: the numbers by which `hardware.memory_plan` decides."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from streamprune.calibration.refit_text import fitted_tokens
from streamprune.calibration.sequences import FIT, JUDGE, Calibration
from streamprune.common_settings import COMFORTABLE_BATCH_TOKENS, ComputeSettings
from streamprune.config import RunSettings
from streamprune.distributed.processes import ALONE, Processes
from streamprune.fit.cache import Recording, scoring_workspace_bytes
from streamprune.fit.published import DTYPE_NAMES
from streamprune.formats.plain import PLAIN
from streamprune.hardware import device as devices
from streamprune.hardware import memory as machine
from streamprune.hardware.device import CPU, all_gpus, context_bytes, is_gpu
from streamprune.hardware.memory import format_bytes
from streamprune.hardware.memory_plan import STAGING_BYTES, Limit, MemoryPlan, Needs, Room, RoundingNeeds, choose
from streamprune.models.config_json import ExpertSpec, ModelShape, stated_shape
from streamprune.models.open import OpenedModel
from streamprune.models.skeleton import Decoder
from streamprune.planning.prepare import PreparedModel
from streamprune.planning.recording import recording_on
from streamprune.planning.refit import refit_sizes
from streamprune.planning.rounding import rounding_needs
from streamprune.refit.activations import down_sizes

#: Bytes for each value of a matrix that is being decoded: float32, and as much again for codes and scales twice.
DECODING_BYTES = 16
#: Reserve on a GPU: for cuBLAS's workspaces, and fragmentation in torch's allocator.
DEVICE_MARGIN = 256 * 1024**2
#: Reserve below --ram-gib: for libraries' growth during the run (15 MiB were measured), and fragmentation when hidden
#: states are loaded and stored in a thread of their own. (With 32 MiB a test's run went 14 to 17 MiB over its cap.)
HOST_MARGIN = 80 * 1024**2


def sums_per_token(compared: int = 1) -> int:
    """Bytes that are summed up for each token over the vocabulary of so many models and the original.

    `streaming.predictions` has four numbers for each of them, and one more for each that is compared.
    """
    return 8 * (4 * (compared + 1) + compared)


def plan_memory(
    settings: ComputeSettings,
    needs: Needs,
    output_bytes: int,
    device: torch.device,
    folder: Path,
    processes: Processes = ALONE,
) -> MemoryPlan:
    """Decide, before a weight is read, where hidden states are stored and how much is computed at a time.

    `output_bytes` will be written to the disk of `folder`, where hidden states may go too. Each of several `processes`
    decides for itself: it has its share of the hidden states, and of its machine's free memory. Raises ResourceError,
    with the numbers, if the run does not fit.
    """
    needs = replace(needs, processes=processes.count)
    room = measure_room(settings, output_bytes, device, folder, processes)
    most = settings.most_batch_tokens(device.type)
    usual = COMFORTABLE_BATCH_TOKENS["gpu" if is_gpu(device) else "cpu"]
    return choose(needs, room, settings.states, most, usual, str(device))


def agree_on_batch_tokens(processes: Processes, calibration: Calibration, plan: MemoryPlan) -> MemoryPlan:
    """The plan with one micro-batch size for all ranks.

    It is the smallest that a rank planned, reduced until there is a micro-batch for each rank, if possible.
    """
    tokens = min(processes.collect(plan.batch_tokens))
    while processes.count > 1:
        batches = calibration.micro_batches(tokens)
        largest = max((batch.ids.shape for batch in batches if len(batch.ids) > 1), key=math.prod, default=None)
        if len(batches) >= processes.count or largest is None:
            break
        # One sequence less than in the largest micro-batch, which is therefore divided.
        tokens = math.prod(largest) - largest[1]
    return replace(plan, batch_tokens=tokens)


def find_needs(
    settings: RunSettings, prepared: PreparedModel, calibration: Calibration, device: torch.device = CPU
) -> Needs:
    """The memory that a run on `device` needs, from the model on the meta device and the calibration text."""
    held, spec = calibration.held_out, prepared.skeleton.spec
    through = held is not None or settings.needs_text or settings.imatrix is not None
    scores_mtp = settings.scores is None and prepared.written.layout.mtp_layer is not None
    through |= scores_mtp
    last = prepared.skeleton.layer_count - 1 if through else prepared.layout.expert_layers[-1]
    # Share of each layer's experts in the pruned copy next to it.
    copies: dict[int, float] = {}
    if settings.propagate == "pruned" or settings.sends_text or held is not None:
        # Without counts yet, assume that all experts stay.
        counts = prepared.counts or dict.fromkeys(prepared.skeleton.experts, spec.count)
        copies = {layer: count / spec.count for layer, count in counts.items()}
    # Pruned layers and those for multi-token prediction run transformers' own forward of experts.
    recording = recording_on(device, prepared) if not copies and not scores_mtp else None
    needs = needs_of(prepared, calibration, last + 1, copies, spec, recording)
    if scores_mtp:
        needs = with_mtp_layer(needs, prepared)
    needs = channel_sums(needs, settings, prepared, calibration)
    if settings.refit:
        needs = _with_refit(needs, prepared, calibration)
    if copies and settings.is_quantizing:
        needs = _with_rounding(needs, settings, prepared, calibration)
    if settings.imatrix is not None:
        needs = _with_imatrix(needs, settings, prepared, calibration)
    if held is None:
        return needs
    # Held-out text has the states of both models, and sums over the vocabulary.
    needs = _with_two_sided(needs, needs_of(prepared, held, last + 1))
    return replace(needs, states=needs.states + held.tokens * sums_per_token())


def with_mtp_layer(needs: Needs, prepared: PreparedModel) -> Needs:
    """The needs with those of scoring the MTP layer, if it is written and its form is known."""
    form = prepared.layout.mtp_form if prepared.written.layout.mtp_layer is not None else None
    if form is None:
        return needs
    # It is as large as the layer whose class it has; in addition there is what makes its input, which is read last.
    tensors = prepared.checkpoint.tensors
    more = sum(tensors[name].nbytes for name in (form.embedding_norm, form.hidden_norm, form.projection))
    return replace(needs, layer=needs.layer + more, loading=needs.loading + 2 * more)


def channel_sums(needs: Needs, settings: RunSettings, prepared: PreparedModel, calibration: Calibration) -> Needs:
    """The needs with those of the scores of channels, if they are recorded."""
    width = prepared.recorded_width if settings.channels else None
    if width is None:
        return needs
    energies = len(calibration.sources) * prepared.skeleton.spec.count * width
    # A layer's in float64: in all, of the last micro-batch, and copied where they are saved or added up. Those of all
    # layers in float32, and one layer's as text on the way to the disk.
    return replace(needs, sums=3 * 8 * energies, recorded=(4 * len(prepared.skeleton.experts) + 64) * energies)


def _with_two_sided(needs: Needs, more: Needs) -> Needs:
    """The needs with those of more text, which goes through both models."""
    return replace(
        needs,
        states=needs.states + 2 * more.states,
        sequences=needs.sequences + more.sequences,
        tokens=needs.tokens + more.tokens,
        sides=max(2, needs.sides),
    )


def _with_refit(needs: Needs, prepared: PreparedModel, calibration: Calibration) -> Needs:
    """The needs with those of a refit: what it computes with, and the second model's states of the text it uses."""
    assert prepared.plan.counts is not None
    fitted, judging = (fitted_tokens(calibration, use) for use in (FIT, JUDGE))
    sizes = refit_sizes(prepared.skeleton, prepared.plan.counts, prepared.dtype.itemsize, fitted + judging, judging)
    usual = needs.workspace
    # The outputs of both models and what is missing, in float32, of a micro-batch.
    collecting = 20 * sizes.hidden
    used = [ids for ids, use in zip(calibration.sequences, calibration.refit, strict=True) if use]
    needs = replace(
        needs,
        # The pruned model's; and what the original experts gave, which some models need.
        states=needs.states + 2 * states_bytes(prepared, used),
        workspace=lambda tokens: usual(tokens) + tokens * collecting,
        sides=3,
        refit=sizes.needs,
    )
    if calibration.anchor is None:
        return needs
    anchor = needs_of(prepared, calibration.anchor, 0)
    needs = _with_two_sided(needs, anchor)
    return replace(needs, states=needs.states + anchor.states, sides=3)


def _with_rounding(needs: Needs, settings: RunSettings, prepared: PreparedModel, calibration: Calibration) -> Needs:
    """The needs with those of rounded layers, and of rounding them by text, which goes through both models."""
    rounding = rounding_of(settings, prepared, calibration)
    if settings.refit or not settings.needs_text:
        return replace(needs, rounding=rounding)
    used = [ids for ids, use in zip(calibration.sequences, calibration.refit, strict=True) if use]
    states = needs.states + states_bytes(prepared, used)
    return replace(needs, rounding=rounding, states=states, sides=max(2, needs.sides))


def rounding_of(settings: RunSettings, prepared: PreparedModel, calibration: Calibration) -> RoundingNeeds:
    """What rounding the layers of a model needs, by text if the settings say so."""
    counts, spec = prepared.counts, prepared.skeleton.spec
    kept = max(counts.values()) if counts else spec.count
    tensors, itemsize = prepared.planned_tensors, prepared.dtype.itemsize
    if not settings.needs_text:
        return RoundingNeeds(copy=rounding_needs(tensors, kept, spec.top_k, 0, 0, itemsize).copy)
    tokens = sum(fitted_tokens(calibration, use) for use in (FIT, JUDGE))
    hidden = max(
        down_sizes(prepared.skeleton.layers[layer].get_submodule(path))[1]
        for layer, path in prepared.skeleton.experts.items()
    )
    return rounding_needs(tensors, kept, spec.top_k, hidden, tokens, itemsize)


def _with_imatrix(needs: Needs, settings: RunSettings, prepared: PreparedModel, calibration: Calibration) -> Needs:
    """The needs with those of an importance matrix: sums, and the pruned model's states of the text, if it is not
    there for something else."""
    counts, skeleton, sums = prepared.counts, prepared.skeleton, 0
    kept, width = max(counts.values()) if counts else skeleton.spec.count, 0
    for index, layer in enumerate(skeleton.layers):
        columns = sum(each.in_features for each in layer.modules() if isinstance(each, nn.Linear))
        if index in skeleton.experts:
            sizes = down_sizes(layer.get_submodule(skeleton.experts[index]))
            # In all, and over the last micro-batch.
            columns += 2 * kept * sum(sizes)
            width = max(width, *sizes)
        sums = max(sums, 8 * columns)
    needs = replace(needs, sums=needs.sums + sums)
    if settings.refit:
        return needs
    usual = needs.workspace
    # The experts' inputs and outputs of a micro-batch, and what enters one of them, in float32.
    needs = replace(needs, workspace=lambda tokens: usual(tokens) + 20 * tokens * width)
    if settings.needs_text:
        return needs
    used = [ids for ids, use in zip(calibration.sequences, calibration.refit, strict=True) if use]
    return replace(needs, states=needs.states + states_bytes(prepared, used), sides=max(2, needs.sides))


def states_bytes(opened: OpenedModel, sequences: Iterable[torch.Tensor]) -> int:
    """Bytes of the hidden states of some sequences, of one model."""
    text, itemsize = opened.skeleton.model.config.get_text_config(decoder=True), opened.dtype.itemsize
    return sum(len(ids) * states_per_token(text, itemsize, len(ids)) for ids in sequences)


def needs_of(
    opened: OpenedModel,
    calibration: Calibration,
    layers: int,
    copies: Mapping[int, float] | None = None,
    spec: ExpertSpec | None = None,
    recording: Recording | None = None,
) -> Needs:
    """The memory that streaming the first `layers` layers of a model needs.

    `copies` is the share of each layer's experts in the pruned copy next to it. `spec` describes the experts if the
    config does so under unusual names. `recording` is how experts are computed, if all text is recorded.
    """
    skeleton, text = opened.skeleton, opened.skeleton.model.config.get_text_config(decoder=True)
    # (Tensors with places are read to where they stay.)
    parts = {(each.name, each.stored.parameter) for each in opened.targets.values() if each.place is None}
    joined = Counter(name for name, _ in parts)
    shape, itemsize = _shape_of(text), opened.dtype.itemsize
    if spec is not None:
        shape = replace(shape, top_k=spec.top_k, experts=spec.count)
    # Held-out sequences and those of an anchor go through the same layers, and may be longer.
    others = [part.sequences for part in (calibration.held_out, calibration.anchor) if part is not None]
    longest = max(map(len, chain(calibration.sequences, *others)))
    read, recast = _as_read(opened)
    decoding = _decoding_bytes(opened)
    # A non-layer weight that is cast to another dtype is in memory in both dtypes for a while.
    loading = sum(size for name, size in recast.items() if _is_non_layer(skeleton, name))
    largest, rows = 0, skeleton.expert_rows
    for index, module in enumerate(skeleton.layers[:layers]):
        prefix = f"{skeleton.layers_path}.{index}."
        sizes = {prefix + name: tensor.nbytes for name, tensor in _tensors(module)}
        # While a parameter's tensors (one per expert) are joined, its memory is needed twice more. If the checkpoint
        # has it in another dtype, it is in memory in both for a while; all but the experts' together.
        more = [2 * size for name, size in sizes.items() if joined[name] > 1]
        more += [min(size, recast[name]) for name, size in sizes.items() if name in recast and name in rows]
        more += [decoding[name] for name in sizes if name in decoding]
        small = sum(size for name, size in sizes.items() if name in recast and name not in rows)
        pruned = sum(size for name, size in sizes.items() if name in rows) * (copies or {}).get(index, 0.0)
        largest = max(largest, sum(sizes.values()) + round(pruned))
        loading = max(loading, max(sum(sizes.values()), read[index]) + max(more, default=0), read[index] + small)
    return Needs(
        layer=largest,
        reading=max(read.values()),
        loading=loading,
        staging=STAGING_BYTES,
        non_layer=_non_layer_bytes(skeleton),
        states=states_bytes(opened, calibration.sequences),
        workspace=lambda tokens: scoring_workspace_bytes(shape, tokens, longest, itemsize, recording),
        sequences=len(calibration.sequences),
        longest=longest,
        tokens=calibration.tokens,
        itemsize=itemsize,
    )


def _as_read(opened: OpenedModel) -> tuple[dict[int, int], Counter[str]]:
    """Bytes of the weights in the checkpoint's dtypes: by layer, and by parameter that is cast to another dtype."""
    dtypes = {name: DTYPE_NAMES.get(tensor.dtype) for name, tensor in _tensors(opened.skeleton.model)}
    read, recast = dict.fromkeys(range(len(opened.skeleton.layers)), 0), Counter[str]()
    for name, target in opened.targets.items():
        entry = opened.checkpoint.tensors[name]
        if target.layer is not None:
            read[target.layer] += entry.nbytes
        if target.name is not None and entry.dtype != dtypes.get(target.name):
            recast[target.name] += entry.nbytes
    return read, recast


def _decoding_bytes(opened: OpenedModel) -> dict[str, int]:
    """For each parameter that is stored in a quantized format, what decoding it takes on top of its plain values.

    That is its stored bytes, and the values of one matrix (one expert's, where there are several) on the way from codes
    to the computing dtype.
    """
    parameters, stored, matrices = dict(_tensors(opened.skeleton.model)), Counter[str](), dict[str, int]()
    for name, target in opened.targets.items():
        if target.name is None or target.stored.format is PLAIN:
            continue
        stored[target.name] += opened.checkpoint.tensors[name].nbytes
        shape = parameters[target.name].shape
        matrices[target.name] = math.prod(shape[-2:])
    return {name: stored[name] + DECODING_BYTES * size for name, size in matrices.items()}


def _is_non_layer(skeleton: Decoder, name: str) -> bool:
    """Whether a parameter is the decoder's, and of no layer."""
    decoder = skeleton.layers_path.rpartition(".")[0]
    return name.startswith(decoder + "." if decoder else "") and skeleton.layer_of(name) is None


def states_per_token(text: Any, itemsize: int, length: int) -> int:
    """Bytes per token that go from layer to layer in a sequence of `length` tokens, by the text config."""

    def number(name: str) -> int:
        value = getattr(text, name, None)
        return value if isinstance(value, int) else 0

    # Models with several residual streams (hyper-connections) pass all of them on.
    values = number("hidden_size") * max(1, number("hc_count"), number("hc_mult"))
    if number("num_kv_shared_layers"):
        # Layers without keys and values of their own use the last ones of their kind.
        heads, width = number("num_key_value_heads"), number("head_dim")
        values += 2 * heads * width
        values += 2 * (number("num_global_key_value_heads") or heads) * (number("global_head_dim") or width)
    # The indices that an indexer chose, if layers without an indexer reuse those of the layer before.
    chosen = min(number("index_topk"), length) if getattr(text, "indexer_types", None) else 0
    return values * itemsize + chosen * torch.int32.itemsize


def _shape_of(text: Any) -> ModelShape:
    stated = {name: value for name, value in text.to_dict().items() if value is not None}
    # Models without attention, or with names of their own, lack some of these in the plain dictionary.
    least = {"hidden_size": int(text.hidden_size), "num_attention_heads": 1, "vocab_size": 1}
    shape = stated_shape(least | stated)
    assert shape is not None
    return shape


def _non_layer_bytes(skeleton: Decoder) -> int:
    """Bytes of what `LayerWeights.load_non_layer_weights` loads without the head: the decoder without its layers."""
    inside = [tensor for name, tensor in _tensors(skeleton.model) if _is_non_layer(skeleton, name)]
    inside += [tensor for _, tensor in _tensors(skeleton.model.get_input_embeddings())]
    return sum({id(tensor): tensor.nbytes for tensor in inside}.values())


def _tensors(module: nn.Module) -> Sequence[tuple[str, torch.Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def measure_room(
    settings: ComputeSettings, output_bytes: int, device: torch.device, folder: Path, processes: Processes = ALONE
) -> Room:
    """The memory that the run may use now: free memory, limited by --vram-gib and --ram-gib, and `folder`'s disk.

    The `processes` on this machine divide its RAM, and those on one GPU its memory; the caps are for each of them.
    """
    free = max(0, machine.free_disk_bytes(folder) - output_bytes)
    disk = Limit(
        free,
        f"only {format_bytes(free)} are free on the disk of {folder} after the output is written",
        "choose another disk with -o, or use fewer --samples",
    )
    available, resident = machine.available_memory_bytes() // processes.local_count, machine.resident_bytes()
    remedy = "close other programs, or use a machine with more memory"
    ram = Limit(available, f"only {format_bytes(available)} are available", remedy)
    cap = settings.ram_bytes
    if cap is not None and cap - resident - HOST_MARGIN < available:
        left = max(0, cap - resident - HOST_MARGIN)
        words = f"--ram-gib {settings.ram_gib:g} leaves {format_bytes(left)} (resident now: {format_bytes(resident)})"
        ram = Limit(left, words, "raise --ram-gib")
    if not is_gpu(device):
        return Room(ram, None, disk)
    # With --device auto, processes take the GPUs in turn; with a GPU's number, all take that one.
    sharing = -(-processes.local_count // len(all_gpus())) if settings.device == "auto" else 0
    return Room(_gpu_limit(settings, device, sharing or processes.local_count), ram, disk)


def _gpu_limit(settings: ComputeSettings, device: torch.device, sharing: int) -> Limit:
    free = max(0, devices.free_device_bytes(device) // sharing - DEVICE_MARGIN)
    if settings.vram_bytes is not None:
        context = context_bytes(device)
        left = max(0, settings.vram_bytes - context - DEVICE_MARGIN)
        if left < free:
            words = (
                f"--vram-gib {settings.vram_gib:g} leaves {format_bytes(left)} (CUDA itself: {format_bytes(context)})"
            )
            return Limit(left, words, "raise --vram-gib, or use --device cpu")
    remedy = "use a GPU with more memory, or --device cpu"
    return Limit(free, f"only {format_bytes(free)} can be used on {device}", remedy)
