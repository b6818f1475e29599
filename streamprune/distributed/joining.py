"""Connecting the processes of a run through torch.distributed and accelerate."""

from __future__ import annotations

import atexit
import os
import platform
import time
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.utils import _pytree as pytree

from streamprune.distributed.processes import ALONE, Launched, Processes, T, launched
from streamprune.errors import (
    InterruptedRunError,
    OtherProcessError,
    ProcessesError,
    ReportedElsewhereError,
    StreampruneError,
    TooMuchLostError,
)
from streamprune.hardware.device import all_gpus

#: How long a process waits for the others to be there.
_MEET = timedelta(minutes=30)
#: How long it waits for an answer: while rank 0 downloads or checks a model, the others have nothing to do.
#: (A process that ends is noticed at once, since its connections end with it.)
_ANSWER = timedelta(days=1)
_HOST = torch.device("cpu")
_FAILED, _STOP = "failed", "stop"
#: How often a process asks whether another one was asked to stop, in seconds.
_ASK_EVERY = 0.2


@dataclass(frozen=True)
class _Sent:
    """Stands for a tensor in what is sent; the tensor follows."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class DistributedProcesses(Processes):
    """Processes that torch.distributed has connected."""

    def __init__(self, facts: Launched) -> None:
        self.rank, self.count = facts.rank, facts.count
        self.local_count, self.local_rank = facts.local_count, facts.local_rank
        self._asked, self._asked_at = False, time.monotonic()
        # A group of our own, whatever backend and timeout the processes were joined with.
        group = dist.new_group(backend="gloo", timeout=_ANSWER)
        assert group is not None
        self._group = group
        store = dist.distributed_c10d._get_default_store()
        #: For flags that are set while the others compute. Rank 0 or the launcher holds the store.
        self._store = dist.PrefixStore(group.group_name, store)  # type: ignore[attr-defined]

    def broadcast(self, value: T) -> T:
        box = [value if self.is_first else None]
        self._communicate(lambda: dist.broadcast_object_list(box, src=0, group=self._group, device=_HOST))
        return box[0]  # type: ignore[return-value]

    def collect(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.count
        self._communicate(lambda: dist.all_gather_object(values, value, group=self._group))
        return values

    def add_up(self, values: torch.Tensor, maxima: Collection[int] = ()) -> None:
        own = values.to(_HOST).contiguous()
        parts = [torch.empty_like(own) for _ in range(self.count)]
        self._communicate(lambda: dist.all_gather(parts, own, group=self._group))
        # Each adds all of them in the same order, so that all have the same sums whatever the network does.
        total = parts[0]
        for part in parts[1:]:
            largest = torch.maximum(total, part)
            total = total + part
            for row in maxima:
                total[row] = largest[row]
        values.copy_(total)

    def asked(self, stop: bool) -> bool:
        if self._asked or (not stop and time.monotonic() - self._asked_at < _ASK_EVERY):
            return self._asked
        self._asked_at = time.monotonic()
        self._communicate(lambda: self._ask(stop))
        return self._asked

    def _ask(self, stop: bool) -> None:
        if stop:
            self._store.set(_STOP, "")
        self._asked = stop or self._store.check([_STOP])

    def send(self, value: Any, process: int) -> None:
        tensors: list[torch.Tensor] = []

        def place_of(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            tensors.append(leaf.detach().to(_HOST).contiguous())
            return _Sent(tuple(leaf.shape), leaf.dtype)

        box = [pytree.tree_map(place_of, value)]
        self._communicate(lambda: dist.send_object_list(box, dst=process, group=self._group, device=_HOST))
        for tensor in tensors:
            if tensor.numel():
                # As bytes: not every dtype can be sent as what it is.
                data = tensor.reshape(-1).view(torch.uint8)
                self._communicate(lambda data=data: dist.send(data, dst=process, group=self._group))  # type: ignore[misc]

    def receive(self, process: int) -> Any:
        box: list[Any] = [None]
        self._communicate(lambda: dist.recv_object_list(box, src=process, group=self._group, device=_HOST))

        def fill(leaf: Any) -> Any:
            if not isinstance(leaf, _Sent):
                return leaf
            tensor = torch.empty(leaf.shape, dtype=leaf.dtype)
            if tensor.numel():
                data = tensor.reshape(-1).view(torch.uint8)
                self._communicate(lambda: dist.recv(data, src=process, group=self._group))
            return tensor

        return pytree.tree_map(fill, box[0])

    def fail(self) -> None:
        try:
            self._store.set(_FAILED, "")
        except RuntimeError:
            # Rank 0 holds the store, and is gone itself.
            return

    def leave(self) -> None:
        """Close the connections that `__init__` made."""
        dist.destroy_process_group(self._group)

    def _communicate(self, act: Callable[[], object]) -> None:
        try:
            act()
        except RuntimeError as error:
            raise self._lost(error) from None

    def _lost(self, error: RuntimeError) -> Exception:
        # Only rank 0 speaks, and only it is certain to reach the store.
        if not self.is_first or self._store.check([_FAILED]):
            return ReportedElsewhereError(1)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return ProcessesError(
            f"One of the other {self.count - 1} processes of this run ended without a word, or cannot be reached any "
            f"more ({reason.rpartition('] ')[2]}). Was it killed, for want of memory perhaps? Look at its machine, "
            "then give the same command again: what is finished is kept."
        )


@contextmanager
def joined(device: str = "auto") -> Iterator[Processes]:
    """The processes that were launched together, connected for as long as this lasts; ALONE if there is one.

    `device` is what --device says. Raises ProcessesError when they cannot be reached. One process speaks for all: what
    ends every rank becomes a ReportedElsewhereError in all but rank 0, and what ends another rank alone an
    OtherProcessError.
    """
    facts = launched()
    if facts.count == 1:
        yield ALONE
        return
    processes = _join(facts, device)
    try:
        yield processes
    except (InterruptedRunError, TooMuchLostError) as error:
        # Stops and losses are decided together, so that rank 0 raises the same.
        if processes.is_first:
            raise
        raise ReportedElsewhereError(error.exit_code) from None
    except ReportedElsewhereError:
        raise
    except StreampruneError as error:
        if processes.is_first:
            raise
        processes.fail()
        raise OtherProcessError(f"{name_of(processes)}: {error}", error.exit_code) from error
    finally:
        processes.leave()


def _join(facts: Launched, device: str) -> DistributedProcesses:
    from accelerate import PartialState

    facts.export()
    # Nothing goes from GPU to GPU; accelerate refuses some GPUs unless these are set.
    for name in ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE"):
        os.environ.setdefault(name, "1")
    on_cpu, joined_before = device == "cpu" or not all_gpus(), dist.is_initialized()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            PartialState(cpu=on_cpu, backend="gloo", timeout=_MEET)
        if not joined_before:
            # Not sooner: accelerate joins once. Left to the interpreter's end, gloo's threads abort it now and then.
            atexit.register(_disconnect)
        return DistributedProcesses(facts)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ProcessesError(
            f"The {facts.count} processes of this run did not find one another ({reason}). Launch them with torchrun "
            "or `accelerate launch`; for several machines, check the address and port of the first one, MASTER_ADDR "
            "and MASTER_PORT."
        ) from error


def _disconnect() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def name_of(processes: Processes) -> str:
    """How messages name a process."""
    return f"process {processes.rank} of 0 to {processes.count - 1}, on {platform.node()}"
