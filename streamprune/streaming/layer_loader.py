"""A block's weights on the device, and freed again: the only place that turns checkpoint tensors into parameters.

A model's weights while it is streamed: what is there at a time, and what makes way where memory runs out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel, initialization
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from streamprune.checkpoint.index import Checkpoint
from streamprune.checkpoint.reader import Reading, ShardReader
from streamprune.checkpoint.safetensors_file import TensorEntry
from streamprune.errors import CheckpointError, ResourceError
from streamprune.files.page_cache import drop_files_from_cache
from streamprune.hardware.device import free_after_failure, is_out_of_memory
from streamprune.hardware.memory import release_freed_memory, says_out_of_memory
from streamprune.models.decoder import Decoder
from streamprune.models.open import OpenedModel
from streamprune.models.skeleton import Target
from streamprune.models.tensor_slices import ExpertRows
from streamprune.progress import Busy
from streamprune.streaming.batches import MicroBatches
from streamprune.streaming.forward import LayerForward

#: The group in which the tensors are read that are each a parameter of their own, and not of the experts.
_SINGLES = ""


class LayerLoader:
    """Loads blocks of a checkpoint into the model's own modules, through transformers' weight conversion.

    Peak memory of a load: the block's weights, as the checkpoint has them or as they are computed with, plus those of
    its largest converted parameter: twice while its tensors are joined (one per expert into one for all), once while it
    becomes another dtype. A block that is read ahead takes its weights' memory meanwhile. Close it to end the threads
    that read.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        decoder: Decoder,
        targets: Mapping[str, Target | None],
        dtype: torch.dtype,
        device: torch.device,
        busy: Busy | None = None,
    ) -> None:
        self._checkpoint = checkpoint
        self.decoder = decoder
        self._reader = ShardReader(checkpoint, device, busy or Busy())
        self._ahead: dict[int, Reading] = {}
        self._read: dict[int | None, Reading] = {}
        self.model = decoder.model
        self.device = device
        self._config = LoadStateDictConfig(
            weight_mapping=get_model_conversion_mapping(self.model),
            dtype=dtype,
            # Some parameters (router biases) must stay in float32 whatever the dtype.
            dtype_plan=self.model._get_dtype_plan(dtype),
            device_map={"": device},
        )
        # Checkpoint tensors by block and by the parameter they feed, so that each parameter is converted on its own.
        self._groups: dict[int | None, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        for name, target in targets.items():
            if target is not None:
                self._groups[decoder.layer_of(target.name)][target.name].append(name)

    def close(self) -> None:
        """End the threads that read, and free what they have read."""
        self.drop_ahead()
        for index in list(self._read):
            self.drop_cached_pages(index)
        self._reader.close()

    def read_ahead(self, index: int) -> bool:
        """Begin to read block `index`, whose weights lie beside those of the present one from now on.

        False if there is no memory for that; `block` reads it then when it is asked for.
        """
        if index in self._ahead:
            return True
        try:
            self._ahead[index] = self._start(index)
            return True
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        free_after_failure(self.device)
        return False

    def drop_ahead(self) -> bool:
        """Free what was read ahead; False if there was nothing."""
        readings = list(self._ahead.values())
        self._ahead.clear()
        for reading in readings:
            self._reader.give_up(reading)
        return bool(readings)

    def drop_cached_pages(self, index: int | None) -> None:
        """Put out of the system's cache what reading a block (None: the surroundings) has brought into it."""
        reading = self._read.pop(index, None)
        if reading is not None:
            drop_files_from_cache(reading.cached)

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Block `index` with its weights on the device; they are freed on exit."""
        module = self.decoder.blocks[index]
        try:
            reading = self._ahead.pop(index) if index in self._ahead else self._start(index)
            self._load(reading, self._groups[index], index)
            self._materialize_buffers(module, f"{self.decoder.layers_path}.{index}")
            missing = [name for name, tensor in _tensors(module) if tensor.is_meta]
            if missing:
                raise CheckpointError(
                    f"Block {index} lacks {len(missing)} of its tensors, first {missing[0]}. Complete the download."
                )
            yield module
        finally:
            module.to("meta")

    @contextmanager
    def pruned_layer(self, index: int, block: nn.Module, twin: nn.Module, kept: Sequence[int]) -> Iterator[nn.Module]:
        """The loaded block `index` with only the experts `kept`, as `twin`: that block of the pruned model on meta.

        Unsliced weights are shared with `block`; the sliced ones take keep/count of the experts' memory on top.
        """
        prefix = f"{self.decoder.layers_path}.{index}."
        try:
            for name, tensor in _tensors(block):
                rows = self.decoder.expert_rows.get(prefix + name)
                if rows is not None:
                    tensor = tensor.index_select(
                        rows.axis, _row_numbers(rows, kept, tensor.shape[rows.axis], tensor.device)
                    )
                owner = twin.get_submodule(name.rpartition(".")[0])
                leaf = name.rpartition(".")[2]
                if leaf in owner._parameters:
                    owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
                else:
                    owner._buffers[leaf] = tensor
            yield twin
        finally:
            twin.to("meta")

    def load_surroundings(self, head: bool) -> None:
        """Load what lies around the blocks: embeddings and norms of the decoder, and the output head if asked for.

        Vision towers and other parts that text alone does not reach stay without weights.
        """
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
        self._load(self._reader.start(self._reading_groups(wanted)), wanted, None)
        # A checkpoint may hold tied weights under either name; transformers ties to the one that is there.
        missing = {name for name, tensor in _tensors(self.model) if tensor.is_meta}
        self.model.tie_weights(missing_keys=missing, recompute_mapping=False)
        with _without_blocks(self.decoder):
            self._materialize_buffers(self.model, "")

    def rows(self, parameters: Sequence[str], begin: int, end: int) -> list[torch.Tensor]:
        """The rows from `begin` to `end` of parameters outside the blocks: of those in memory, or read for the moment.

        Peak memory: those rows, twice where the checkpoint has them in another dtype. One that the checkpoint holds in
        several pieces, or in another layout, is loaded whole and stays.
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
                self._load(self._reader.start(self._reading_groups({name: names})), {name: names}, None)
        reading = self._reader.start_entries(entries)
        reading.wait()
        self._reader.arrived()
        drop_files_from_cache(reading.cached)
        read = {name: next(iter(reading.take(name).values())).to(known[name].dtype) for name in entries}
        known = dict(_tensors(self.model))
        return [read[name] if name in read else known[name][begin:end] for name in parameters]

    def _start(self, index: int) -> Reading:
        return self._reader.start(self._reading_groups(self._groups[index]))

    def _reading_groups(self, groups: Mapping[str, list[str]]) -> dict[str, list[str]]:
        """What is read into memory of its own: the small parameters together, then those of the experts, one by one.

        What is joined from several tensors or converted to another dtype is there twice, so that it had better be freed
        before the next one's turn; where a tensor can be taken as it was read, it stays in that memory.
        """
        own = {name: names for name, names in groups.items() if len(names) > 1 or name in self.decoder.expert_rows}
        singles = [names[0] for name, names in groups.items() if name not in own]
        return {_SINGLES: singles, **own} if singles else own

    def _load(self, reading: Reading, groups: Mapping[str, list[str]], index: int | None) -> None:
        try:
            reading.wait()
            self._reader.arrived()
            for group in self._reading_groups(groups):
                # One after the other, so that what was read of each is freed before the next is converted.
                self._convert(reading.take(group))
        except BaseException:
            # Where memory ran out, this is the first that has to go.
            self._reader.give_up(reading)
            raise
        self._read[index] = reading

    def _convert(self, tensors: dict[str, torch.Tensor]) -> None:
        info, _ = convert_and_load_state_dict_in_model(self.model, tensors, self._config)
        problems = [*info.conversion_errors.values(), *info.mismatched_keys, *info.error_msgs]
        # transformers catches whatever goes wrong while it converts, and keeps the text.
        for line in "\n".join(map(str, problems)).splitlines():
            if says_out_of_memory(line):
                raise MemoryError(line)
        if problems:
            raise CheckpointError(
                f"{self._checkpoint.folder}: {len(problems)} tensors do not fit the model that config.json describes, "
                f"first: {problems[0]}"
            )

    def _materialize_buffers(self, root: nn.Module, root_path: str) -> None:
        """Make the buffers that are in no checkpoint (rotary frequencies, masks) the way from_pretrained makes them."""
        for path, module in root.named_modules(prefix=root_path):
            names = [
                name
                for name, buffer in module._buffers.items()
                if buffer is not None and buffer.is_meta and name in module._non_persistent_buffers_set
            ]
            if not names:
                continue
            for name in names:
                module._buffers[name] = torch.empty_like(module._buffers[name], device=self.device)
            with initialization.guard_torch_init_functions(), torch.no_grad():
                self._owner(path)._init_weights(module)

    def _owner(self, path: str) -> PreTrainedModel:
        """The innermost PreTrainedModel around the module at `path`: its `_init_weights` is the one that counts."""
        owner = self.model
        for length in range(1, path.count(".") + 2):
            module = self.model.get_submodule(".".join(path.split(".")[:length]))
            if isinstance(module, PreTrainedModel):
                owner = module
        return owner


def _rows_of(entry: TensorEntry, begin: int, end: int) -> TensorEntry:
    """A tensor's rows as a tensor of their own."""
    size = entry.nbytes // entry.shape[0]
    shape = (end - begin, *entry.shape[1:])
    return replace(entry, shape=shape, begin=entry.begin + begin * size, end=entry.begin + end * size)


def _row_numbers(rows: ExpertRows, kept: Sequence[int], size: int, device: torch.device) -> torch.Tensor:
    numbers = [expert * rows.stride + row for expert in kept for row in range(rows.stride)]
    return torch.tensor([*numbers, *range(size - rows.tail, size)], device=device)


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


@contextmanager
def _without_blocks(decoder: Decoder) -> Iterator[None]:
    owner_path, _, attribute = decoder.layers_path.rpartition(".")
    owner, blocks = decoder.model.get_submodule(owner_path), decoder.blocks
    setattr(owner, attribute, nn.ModuleList())
    try:
        yield
    finally:
        setattr(owner, attribute, blocks)


T = TypeVar("T")


class Weights:
    """The blocks of an opened model, one at a time, on `device`; with `ahead` the next one is read meanwhile.

    `batches`, once they are there, have hidden states that may make way for weights. Peak memory: see `LayerLoader`.
    """

    batches: MicroBatches

    def __init__(self, opened: OpenedModel, device: torch.device, busy: Busy, ahead: bool) -> None:
        self._device, self._ahead = device, ahead
        self.loader = LayerLoader(opened.checkpoint, opened.skeleton, opened.targets, opened.dtype, device, busy)
        self.stream = LayerForward(opened.skeleton)

    def close(self) -> None:
        """Free what was read, and end the threads that read."""
        self.loader.close()

    def load_surroundings(self) -> None:
        """Load what lies around the blocks, but no output head of its own."""
        with ExitStack() as stack:
            self.enter(stack, self._surroundings, "the embeddings")

    def spare(self) -> bool:
        """Free what was read ahead, and read ahead no more; False if there was nothing."""
        self._ahead = False
        return self.loader.drop_ahead()

    @contextmanager
    def block(self, index: int, following: int | None) -> Iterator[tuple[ExitStack, nn.Module]]:
        """Block `index`, and a stack for what is entered beside it; `following` is the one to be read meanwhile."""
        with ExitStack() as stack:
            block = self.enter(stack, lambda: self.loader.block(index), f"the weights of block {index}")
            # What was read and joined on the way is free now, and too scattered to be of use for what comes.
            release_freed_memory()
            if following is not None:
                self.read_ahead(following)
            yield stack, block
        release_freed_memory()
        self.batches.watch.between_blocks()

    def read_ahead(self, index: int) -> None:
        """Begin to read a block, where there was room for that so far."""
        self._ahead = self._ahead and self.loader.read_ahead(index)

    def enter(self, stack: ExitStack, load: Callable[[], AbstractContextManager[T]], what: str) -> T:
        """Load weights for as long as `stack` lasts, also where hidden states must first make room for them."""
        while True:
            try:
                return stack.enter_context(load())
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                problem = (str(error).strip() or type(error).__name__).splitlines()[0]
            free_after_failure(self._device)
            if not self.batches.retreat(f"out of memory while loading {what}"):
                raise ResourceError(
                    f"Out of memory on {self._device} while loading {what} ({problem}). Use {self.batches.advice()}."
                    f"{self.batches.watch.holders()}"
                )

    def _surroundings(self) -> AbstractContextManager[None]:
        self.loader.load_surroundings(head=False)
        self.loader.drop_cached_pages(None)
        return nullcontext()
