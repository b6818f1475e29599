"""A layer's weights on the device: loaded, prefetched, pruned, and freed again.

This and `written_tensors.py`, which does it for what is written, turn checkpoint tensors into parameters.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import TypeVar, cast

import torch
from torch import nn
from transformers import PreTrainedModel, initialization

from streamprune.checkpoint.reader import Reading, ShardReader
from streamprune.checkpoint.safetensors_file import TensorEntry
from streamprune.errors import CheckpointError, ResourceError
from streamprune.files.page_cache import drop_files_from_cache
from streamprune.formats.base import ChannelRows, ExpertRows, KeptExperts, StoredTensor, decode_tensors
from streamprune.hardware.device import free_after_failure, is_gpu, lack_of_memory
from streamprune.hardware.memory import release_freed_memory
from streamprune.models.expert_layout import Target
from streamprune.models.open import OpenedModel
from streamprune.models.skeleton import Decoder, Skeleton
from streamprune.progress import Busy
from streamprune.streaming.batches import MicroBatches
from streamprune.streaming.conversion import Conversion
from streamprune.streaming.forward import LayerForward, layers_replaced
from streamprune.streaming.mtp_layer import MtpLayer

#: The group of small tensors, which are each a parameter of their own.
_SINGLES = ""

T = TypeVar("T")


class LayerWeights:
    """The layers of an opened model, loaded into its own modules one at a time, through transformers' conversion.

    Peak memory of a load: the layer's weights, in the checkpoint's or the computing dtype, plus those of its largest
    converted parameter: twice while its tensors are joined (one per expert into one for all), once while its dtype is
    converted. One that is only joined, from tensors of one dtype, is read as joined: to where it stays, unless it is
    computed in another dtype. A quantized parameter is in memory as stored until it is decoded, one matrix of it in
    float32 too. A prefetched layer takes its weights' stored bytes in addition. Set `batches` to the micro-batches
    whose hidden states may be offloaded for weights. Close it to end the reader threads.
    """

    def __init__(
        self,
        opened: OpenedModel,
        device: torch.device,
        busy: Busy | None = None,
        prefetch: bool = True,
        mtp: MtpLayer | None = None,
    ) -> None:
        self.decoder: Decoder = opened.skeleton
        self.model = self.decoder.model
        self.device, self.dtype = device, opened.dtype
        self.batches: MicroBatches | None = None
        self.forward = LayerForward(self.decoder)
        self._may_prefetch = prefetch
        self._checkpoint = opened.checkpoint
        self._reader = ShardReader(opened.checkpoint, device, busy or Busy())
        self._prefetched: dict[int, Reading] = {}
        self._read: dict[int | None, Reading] = {}
        self._conversion = Conversion(self.model, opened.dtype, device, opened.checkpoint.folder)
        # Checkpoint tensors by layer and by the parameter they feed, so that each parameter is converted on its own.
        self._groups: dict[int | None, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        #: How each tensor is stored: all parts of a parameter are read together, and decoded before the conversion.
        self._stored: dict[str, StoredTensor] = {}
        #: Where a tensor lies in its parameter, if this is read to one piece of memory that needs no conversion.
        self._places: dict[str, int] = {}
        for name, target in opened.targets.items():
            self._add(name, target, target.layer)
        #: The layer for multi-token prediction, a further layer, if it is to be loaded too.
        self.mtp = mtp
        if mtp is not None:
            for name, target in mtp.tensors.items():
                self._add(name, target, mtp.index)

    def _add(self, name: str, target: Target, layer: int | None) -> None:
        self._stored[name] = target.stored
        if target.name is not None:
            self._groups[layer][target.name].append(name)
        if target.place is not None:
            self._places[name] = target.place

    def close(self) -> None:
        """End the reader threads, and free what they have read."""
        self.free_prefetched()
        for index in list(self._read):
            self.drop_cached_pages(index)
        self._reader.close()

    def prefetch(self, index: int) -> bool:
        """Start reading layer `index` while another one is in use. False if there is no memory for it.

        After that, nothing is prefetched any more: `layer` reads each layer when it is called.
        """

        def start() -> None:
            self._prefetched[index] = self._start(index)

        if self._may_prefetch and index not in self._prefetched and lack_of_memory(start) is not None:
            free_after_failure(self.device)
            self._may_prefetch = False
        return self._may_prefetch

    def drop_prefetch(self) -> bool:
        """Free what was prefetched, and prefetch no more; False if there was nothing."""
        self._may_prefetch = False
        return self.free_prefetched()

    def free_prefetched(self) -> bool:
        """Free what was prefetched; False if there was nothing."""
        readings = list(self._prefetched.values())
        self._prefetched.clear()
        for reading in readings:
            self._reader.discard(reading)
        return bool(readings)

    def drop_cached_pages(self, index: int | None) -> None:
        """Drop the pages from the system's page cache that reading a layer (None: the non-layer weights) added."""
        reading = self._read.pop(index, None)
        if reading is not None:
            drop_files_from_cache(reading.cached)

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Layer `index` with its weights on the device, freed on exit.

        Raises CheckpointError for missing or misfitting tensors, and torch's error if memory runs out.
        """
        mtp = self.mtp if self.mtp is not None and index == self.mtp.index else None
        place = mtp.source if mtp is not None else index
        module = self.decoder.layers[place]
        try:
            reading = self._prefetched.pop(index) if index in self._prefetched else self._start(index)
            # transformers goes through all of the model's tensors for every conversion: here those of this layer.
            alone = (each if each is module else nn.Module() for each in self.decoder.layers)
            with layers_replaced(self.decoder, nn.ModuleList(alone)):
                self._load(reading, self._groups[index], index)
            if mtp is not None:
                self._load_entrance(mtp)
            self._materialize_buffers(module, f"{self.decoder.layers_path}.{place}")
            missing = [name for name, tensor in _tensors(module) if tensor.is_meta]
            if missing:
                raise CheckpointError(
                    f"Layer {index} lacks {len(missing)} of its tensors, first {missing[0]}. Complete the download."
                )
            yield module
        finally:
            module.to("meta")
            if mtp is not None:
                mtp.entrance.to("meta")

    @contextmanager
    def loaded(self, index: int) -> Iterator[nn.Module]:
        """`layer`, with hidden states offloaded if memory is short, and freed memory returned to the system."""
        with self.making_room(lambda: self.layer(index), f"the weights of layer {index}") as module:
            if not is_gpu(self.device):
                # What conversions have freed is too fragmented to be reused. (Without this, scoring layers of 99 MiB,
                # converted from bfloat16, had a peak of 960 to 1,060 instead of 890 to 950 MiB. A GPU's weights were
                # never here.)
                release_freed_memory()
            yield module
        # (Without this, the peak with --ram-gib was 908 instead of 799 MiB, with layers of 99 MiB in float32. Either of
        # the two takes some 5 to 20 ms, the more the more it returns.)
        release_freed_memory()
        if self.batches is not None:
            self.batches.watch.between_layers()

    @contextmanager
    def pruned_layer(self, index: int, layer: nn.Module, pruned: nn.Module, kept: KeptExperts) -> Iterator[nn.Module]:
        """The loaded layer `index` with what stays of its experts, in `pruned`: the pruned model's layer, on meta.

        Unsliced weights are shared with `layer`; the sliced ones take memory on top.
        """
        prefix = f"{self.decoder.layers_path}.{index}."
        channels = self.decoder.channels if isinstance(self.decoder, Skeleton) else {}
        try:
            for name, tensor in _tensors(layer):
                rows = self.decoder.expert_rows.get(prefix + name)
                if kept.channels is not None and prefix + name in channels:
                    tensor = _narrowed(tensor, channels[prefix + name], kept)
                elif rows is not None:
                    tensor = tensor.index_select(rows.axis, _rows_of_experts(rows, kept.experts, tensor))
                path, _, leaf = name.rpartition(".")
                owner = pruned.get_submodule(path)
                if leaf in owner._parameters:
                    owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
                else:
                    owner._buffers[leaf] = tensor
            yield pruned
        finally:
            pruned.to("meta")

    def load_non_layer_weights(self, head: bool = False) -> None:
        """Load the decoder's embeddings and norms, and with `head` the output head.

        Vision towers and other parts that text does not use stay without weights.
        """

        def load() -> AbstractContextManager[None]:
            self._load_non_layer_weights(head)
            return nullcontext()

        with self.making_room(load, "the embeddings"):
            return

    def rows(self, parameters: Sequence[str], begin: int, end: int) -> list[torch.Tensor]:
        """The rows from `begin` to `end` of parameters outside the layers: from memory, or read from the checkpoint.

        Peak memory: those rows, twice if the checkpoint has them in another dtype. A parameter that the checkpoint has
        in several tensors, or in another layout, is loaded completely and stays.
        """
        known = dict(_tensors(self.model))
        entries: dict[str, list[TensorEntry]] = {}
        for name in parameters:
            names = self._groups[None].get(name, [])
            if not known[name].is_meta:
                continue
            entry = self._checkpoint.tensors[names[0]] if len(names) == 1 else None
            if entry is not None and entry.shape == tuple(known[name].shape):
                entries[name] = [_rows_of(entry, begin, end)]
            else:
                self._load(self._start_groups({name: names}), {name: names}, None)
        reading = self._reader.start_entries(entries)
        reading.wait()
        self._reader.sync_with_compute()
        drop_files_from_cache(reading.cached)
        read = {name: next(iter(reading.take(name).values())).to(known[name].dtype) for name in entries}
        known = dict(_tensors(self.model))
        return [read[name] if name in read else known[name][begin:end] for name in parameters]

    @contextmanager
    def making_room(self, load: Callable[[], AbstractContextManager[T]], what: str) -> Iterator[T]:
        """The value of the context `load()`, with hidden states offloaded if its weights do not fit otherwise.

        Raises ResourceError, with advice, if even that does not help.
        """
        loaded: list[T] = []
        with ExitStack() as stack:
            while (problem := lack_of_memory(lambda: loaded.append(stack.enter_context(load())))) is not None:
                free_after_failure(self.device)
                batches = self.batches
                if batches is None or not batches.offload_states(f"out of memory while loading {what}"):
                    advice = f" Use {batches.advice()}.{batches.watch.holders()}" if batches is not None else ""
                    raise ResourceError(f"Out of memory on {self.device} while loading {what} ({problem}).{advice}")
            yield loaded[0]

    def _load_non_layer_weights(self, head: bool) -> None:
        decoder = self.decoder.layers_path.rpartition(".")[0] + "."
        inputs = {id(tensor) for _, tensor in _tensors(self.model.get_input_embeddings())}
        outputs = self.model.get_output_embeddings()
        head_ids = {id(tensor) for _, tensor in _tensors(outputs)} if outputs is not None else set()
        parameters = dict(_tensors(self.model))
        wanted = {}
        for parameter, names in self._groups[None].items():
            tensor_id = id(parameters.get(parameter))
            if tensor_id in head_ids and tensor_id not in inputs and not head:
                continue
            if parameter.startswith(decoder) or tensor_id in inputs | head_ids or decoder == ".":
                wanted[parameter] = names
        self._load(self._start_groups(wanted), wanted, None)
        # A checkpoint may have tied weights under either name; transformers ties to the one that exists.
        missing = {name for name, tensor in _tensors(self.model) if tensor.is_meta}
        self.model.tie_weights(missing_keys=missing, recompute_mapping=False)
        with layers_replaced(self.decoder, nn.ModuleList()):
            self._materialize_buffers(self.model, "")
        self.drop_cached_pages(None)

    def _start(self, index: int) -> Reading:
        return self._start_groups(self._groups[index])

    def _start_groups(self, groups: Mapping[str, list[str]]) -> Reading:
        return self._reader.start(self._reading_groups(groups), self._places)

    def _reading_groups(self, groups: Mapping[str, list[str]]) -> dict[str, list[str]]:
        """The groups that are read into separate memory: the small parameters together, those of experts one by one.

        A parameter that is converted from several tensors or to another dtype is in memory twice, so its source is
        freed before the next one is converted; what needs no conversion stays in the memory it was read to.
        """
        own = {
            name: names
            for name, names in groups.items()
            if len(names) > 1 or name in self.decoder.expert_rows or names[0] in self._places
        }
        singles = [names[0] for name, names in groups.items() if name not in own]
        return {_SINGLES: singles, **own} if singles else own

    def _load(self, reading: Reading, groups: Mapping[str, list[str]], index: int | None) -> None:
        try:
            reading.wait()
            self._reader.sync_with_compute()
            for group, names in self._reading_groups(groups).items():
                # One after the other, so that the memory of each is freed before the next is converted: no variable
                # may hold it.
                self._conversion.load(self._to_convert(reading, group, names, index))
        except BaseException:
            # If memory ran out, this has to be freed first.
            self._reader.discard(reading)
            raise
        self._read[index] = reading

    def _to_convert(
        self, reading: Reading, group: str, names: Sequence[str], index: int | None
    ) -> dict[str, torch.Tensor]:
        """What the conversion gets of a group that has been read, by the names that transformers knows."""
        # (All of a parameter's tensors have places, or none.)
        if names[0] in self._places:
            return {group: reading.take_joined(group, self.model.get_parameter(group).shape)}
        tensors = decode_tensors(reading.take(group), self._stored, self.dtype)
        if self.mtp is not None and index == self.mtp.index:
            return {self.mtp.renamed(name): tensor for name, tensor in tensors.items()}
        return tensors

    def _load_entrance(self, mtp: MtpLayer) -> None:
        reading = self._reader.start({_SINGLES: list(mtp.parameters)})
        try:
            reading.wait()
            self._reader.sync_with_compute()
            mtp.load_entrance(reading.take(_SINGLES))
        finally:
            self._reader.discard(reading)

    def _materialize_buffers(self, root: nn.Module, root_path: str) -> None:
        """Create the buffers that are in no checkpoint (rotary frequencies, masks) like from_pretrained."""
        for path, module in root.named_modules(prefix=root_path):
            names = [
                name
                for name, buffer in module._buffers.items()
                if buffer is not None and buffer.is_meta and name in module._non_persistent_buffers_set
            ]
            for name in names:
                module._buffers[name] = torch.empty_like(module._buffers[name], device=self.device)
            if not names:
                continue
            with initialization.guard_torch_init_functions(), torch.no_grad():
                self._owner(path)._init_weights(module)

    def _owner(self, path: str) -> PreTrainedModel:
        """The innermost PreTrainedModel around the module at `path`: its `_init_weights` applies."""
        while not isinstance(self.model.get_submodule(path), PreTrainedModel):
            path = path.rpartition(".")[0]
        return cast("PreTrainedModel", self.model.get_submodule(path))


def _rows_of(entry: TensorEntry, begin: int, end: int) -> TensorEntry:
    """A tensor's rows as a tensor of their own."""
    size = entry.nbytes // entry.shape[0]
    shape = (end - begin, *entry.shape[1:])
    return replace(entry, shape=shape, begin=entry.begin + begin * size, end=entry.begin + end * size)


def _narrowed(tensor: torch.Tensor, rows: ChannelRows, kept: KeptExperts) -> torch.Tensor:
    """A parameter (E, ...) of the experts that stay, each with the channels that it keeps."""
    assert kept.channels is not None
    indices = torch.from_numpy(kept.channels.indices).to(tensor.device)
    shape, width = tuple(tensor.shape[1:]), kept.channels.width
    narrow = rows.resized(shape, width, indices.shape[1])
    result = tensor.new_empty((len(kept.experts), *narrow))
    for place, expert in enumerate(kept.experts):
        # One expert at a time: an index for every value of all of them would take more memory than the values.
        channels = tensor[expert].reshape(-1, width, rows.step * math.prod(shape[rows.axis + 1 :]))
        result[place] = channels.index_select(1, indices[place]).view(narrow)
    return result


def _rows_of_experts(rows: ExpertRows, kept: Sequence[int], tensor: torch.Tensor) -> torch.Tensor:
    numbers = [expert * rows.stride + row for expert in kept for row in range(rows.stride)]
    size = tensor.shape[rows.axis]
    return torch.tensor([*numbers, *range(size - rows.tail, size)], device=tensor.device)


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)
