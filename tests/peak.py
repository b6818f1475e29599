"""What all tensors of a process take together, at most."""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class Peak(TorchDispatchMode):
    """Follows the memory of all tensors that are made within, as long as it lasts."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.nbytes = self._total = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        result = function(*arguments, **(named or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu":
                storage = leaf.untyped_storage()
                self._total += storage.nbytes() - self._live.get(storage._cdata, (None, 0))[1]
                self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()  # type: ignore[no-untyped-call]
        if self._total > self.nbytes:
            # Only now, since it takes a while: what is freed is left out.
            self._live = {key: each for key, each in self._live.items() if not each[0].expired()}  # type: ignore[no-untyped-call]
            self._total = sum(size for _, size in self._live.values())
            self.nbytes = max(self.nbytes, self._total)
        return result
