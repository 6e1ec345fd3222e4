"""A mode in which a step that waits for the device fails."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "is_nonzero")


class NoReading(TorchDispatchMode):
    """Fails on operations whose result the host must wait for, wherever they come from."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__.strip("_")
        assert name not in {r.strip("_") for r in READS}, f"the step reads a value: {func}"
        indices = args[1] if name.startswith("index") and len(args) > 1 else ()
        for index in indices if isinstance(indices, (list, tuple)) else ():
            assert index is None or index.dtype != torch.bool, "the step indexes with a mask"
        return func(*args, **(kwargs or {}))
