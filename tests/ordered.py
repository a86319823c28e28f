"""A second look at repeatability: fails where numbers are added up in whatever order the threads arrive.

Two runs with two threads are then the same most of the time, on an idle machine with small tensors, so comparing two runs finds nothing.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

UNORDERED = {
    "aten::index_put",
    "aten::index_put_",
    "aten::_index_put_impl_",
    "aten::_unsafe_index_put",
}  # see torch.use_deterministic_algorithms


class Ordered(TorchDispatchMode):
    """Inside, AssertionError for an indexed sum with an index that comes twice: torch adds those up atomically on the CPU."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op._schema.name in UNORDERED and (args[3] if len(args) > 3 else (kwargs or {}).get("accumulate", False)):
            at = torch.stack(torch.broadcast_tensors(*[index.cpu() for index in args[1] if index is not None])).flatten(1)
            assert at.shape[1] == torch.unique(at, dim=1).shape[1], f"{op}: sums of {tuple(args[0].shape)} over {at.shape[1]} indices"
        return op(*args, **(kwargs or {}))
