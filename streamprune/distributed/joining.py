"""Connecting the processes of a run through torch.distributed and accelerate."""

from __future__ import annotations

import atexit
import os
import platform
import time
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
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
from streamprune.hardware.device import CPU, all_gpus

#: How long a process waits for the others to connect.
_JOIN_TIMEOUT = timedelta(minutes=30)
#: How long it waits for a reply: while rank 0 downloads or checks a model, the others have nothing to do.
#: (A process that ends is noticed at once, since its connections end with it.)
_REPLY_TIMEOUT = timedelta(days=1)
_FAILED, _STOP = "failed", "stop"
#: How often a process checks whether another one got a request to stop, in seconds.
_CHECK_EVERY = 0.2


class DistributedProcesses(Processes):
    """Processes that torch.distributed has connected."""

    def __init__(self, facts: Launched) -> None:
        self.rank, self.count = facts.rank, facts.count
        self.local_count, self.local_rank = facts.local_count, facts.local_rank
        self._stop_requested, self._checked_at = False, time.monotonic()
        # An own group: the default group may have another backend or timeout.
        group = dist.new_group(backend="gloo", timeout=_REPLY_TIMEOUT)
        assert group is not None
        self._group = group
        store = dist.distributed_c10d._get_default_store()
        #: For the flags _FAILED and _STOP, which a rank can set while others compute. Rank 0 or the launcher has it.
        self._store = dist.PrefixStore(group.group_name, store)  # type: ignore[attr-defined]

    def broadcast(self, value: T) -> T:
        box = [value if self.is_first else None]
        self._communicate(lambda: dist.broadcast_object_list(box, src=0, group=self._group, device=CPU))
        return box[0]  # type: ignore[return-value]

    def collect(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.count
        self._communicate(lambda: dist.all_gather_object(values, value, group=self._group))
        return values

    def add_up(self, values: torch.Tensor, maxima: Collection[int] = ()) -> None:
        own = values.to(CPU).contiguous()
        parts = [torch.empty_like(own) for _ in range(self.count)]
        self._communicate(lambda: dist.all_gather(parts, own, group=self._group))
        # Each rank adds them in the same order, so that all have the same sums.
        total = parts[0]
        for part in parts[1:]:
            largest = torch.maximum(total, part)
            total = total + part
            for row in maxima:
                total[row] = largest[row]
        values.copy_(total)

    def asked(self, stop: bool) -> bool:
        def ask() -> None:
            if stop:
                self._store.set(_STOP, "")
            self._stop_requested = stop or self._store.check([_STOP])

        if not self._stop_requested and (stop or time.monotonic() - self._checked_at >= _CHECK_EVERY):
            self._checked_at = time.monotonic()
            self._communicate(ask)
        return self._stop_requested

    def send(self, value: Any, process: int) -> None:
        # First the structure, with tensors of the same shapes on the meta device; then the tensors' values.
        described = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.detach().to("meta"), value)
        self._communicate(lambda: dist.send_object_list([described], dst=process, group=self._group, device=CPU))
        for leaf in pytree.tree_leaves(value):
            if isinstance(leaf, torch.Tensor) and leaf.numel():
                data = _bytes_of(leaf.detach().to(CPU).contiguous())
                self._communicate(partial(dist.send, data, dst=process, group=self._group))

    def receive(self, process: int) -> Any:
        box: list[Any] = [None]
        self._communicate(lambda: dist.recv_object_list(box, src=process, group=self._group, device=CPU))

        def fill(described: torch.Tensor) -> torch.Tensor:
            tensor = torch.empty(described.shape, dtype=described.dtype)
            if tensor.numel():
                self._communicate(lambda: dist.recv(_bytes_of(tensor), src=process, group=self._group))
            return tensor

        return pytree.tree_map_only(torch.Tensor, fill, box[0])

    def fail(self) -> None:
        try:
            self._store.set(_FAILED, "")
        except RuntimeError:
            # Rank 0 has the store, and has ended itself.
            return

    def leave(self) -> None:
        """Close the connections that `__init__` made."""
        dist.destroy_process_group(self._group)

    def _communicate(self, act: Callable[[], object]) -> None:
        try:
            act()
        except RuntimeError as error:
            # Rank 0 reports this, unless the store says that a rank reports its own error. The other ranks may not be
            # able to reach the store any more.
            if not self.is_first or self._store.check([_FAILED]):
                raise ReportedElsewhereError(1) from None
            raise ProcessesError(
                f"One of the other {self.count - 1} processes of this run ended without an error message, or is "
                f"unreachable ({_reason(error).rpartition('] ')[2]}). It may have run out of memory. Check its "
                "machine, then run the same command again: finished work is kept."
            ) from None


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


@contextmanager
def joined(device: str = "auto") -> Iterator[Processes]:
    """The processes that were launched together, connected within this context; ALONE if there is one.

    `device` is the value of --device. Raises ProcessesError if they cannot be reached. Only rank 0 reports errors: an
    error of all ranks becomes a ReportedElsewhereError in all but rank 0, and one of another rank alone an
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
        # All ranks agree on stops and lost processes, so rank 0 raises the same.
        if processes.is_first:
            raise
        raise ReportedElsewhereError(error.exit_code) from None
    except ReportedElsewhereError:
        raise
    except StreampruneError as error:
        if processes.is_first:
            raise
        processes.fail()
        name = f"process {processes.rank} of 0 to {processes.count - 1}, on {platform.node()}"
        raise OtherProcessError(f"{name}: {error}", error.exit_code) from error
    finally:
        processes.leave()


def _join(facts: Launched, device: str) -> DistributedProcesses:
    from accelerate import PartialState

    facts.export()
    # Nothing is sent from GPU to GPU; accelerate refuses some GPUs unless these are set.
    for name in ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE"):
        os.environ.setdefault(name, "1")
    on_cpu, joined_before = device == "cpu" or not all_gpus(), dist.is_initialized()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            PartialState(cpu=on_cpu, backend="gloo", timeout=_JOIN_TIMEOUT)
        if not joined_before:
            # Not earlier, since accelerate connects only once; and not later, since gloo's threads sometimes abort the
            # interpreter at its end.
            atexit.register(_disconnect)
        return DistributedProcesses(facts)
    except (RuntimeError, ValueError) as error:
        raise ProcessesError(
            f"The {facts.count} processes of this run could not connect ({_reason(error)}). Launch them "
            "with torchrun or `accelerate launch`; for several machines, check the address and port of the first one, "
            "MASTER_ADDR and MASTER_PORT."
        ) from error


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor as bytes, since not every dtype can be sent."""
    return tensor.reshape(-1).view(torch.uint8)


def _disconnect() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
