"""Networks as they are under what PyTorch wraps around them."""

from __future__ import annotations

from torch import nn

# What the wrappers put before the name of every parameter.
PREFIXES = ("module.", "_orig_mod.")


def unwrapped(module: nn.Module) -> nn.Module:
    """The network inside DataParallel, DistributedDataParallel and torch.compile, or the module itself.

    It shares its parameters with the wrapper, under the names that checkpoints and posteriors know them by.
    """
    while True:
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            module = module.module
        elif isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
            module = inner
        else:
            return module
