"""The trainable parameters of a module as views into one flat buffer, and their gradients into another.

Five hundred parameter tensors cost a millisecond per pass in call overhead alone; one flat tensor costs a call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from vdu_fast.errors import InputError


def select_parameters(module: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Parameter]:
    """The parameters that may change, by name, each once even when it is tied.

    Args:
        module: the network.
        patterns: shell patterns over parameter names ("*", "mid_block.*", "*.attentions.*"); a parameter that any of
            them matches is selected, unless its requires_grad is False.

    Raises:
        InputError: nothing is left to select.
    """
    everything = dict(module.named_parameters())
    matching = {n: p for n, p in everything.items() if any(fnmatchcase(n, pattern) for pattern in patterns)}
    if not matching:
        shown = ", ".join(list(everything)[:5])
        raise InputError(f"trainable: no parameter name matches {list(patterns)}; the names begin with {shown}, ...")
    selected = {n: p for n, p in matching.items() if p.requires_grad}
    if not selected:
        raise InputError(
            f"trainable: all {len(matching)} parameters that match {list(patterns)} are frozen; call "
            "requires_grad_(True) on those that may change."
        )
    return selected


class Arena:
    """Owns the storage of the selected parameters until `release`.

    Args:
        module: its parameters must share one device and one dtype.
        patterns: see `select_parameters`; all other parameters are left as they are and get no gradient.

    Attributes:
        names: selected parameter names, in the module's order; a tied parameter appears once.
        theta: flat [d] buffer that the parameters are views of.
        grad: flat [d] buffer that their `.grad` are views of.
        state_dtype: of everything computed about the weights: float32, or float64 for a float64 module.
    """

    def __init__(self, module: nn.Module, patterns: Sequence[str] = ("*",)) -> None:
        everything = dict(module.named_parameters())
        selected = select_parameters(module, patterns)
        kinds = {(p.device, p.dtype) for p in selected.values()}
        if len(kinds) > 1:
            raise InputError(
                f"the trainable parameters must share one device and dtype, got {sorted(map(str, kinds))}."
            )
        self.names = list(selected)
        self._parameters = list(selected.values())
        self._required_grad = {p: p.requires_grad for p in everything.values()}
        with torch.no_grad():
            self.theta = torch.cat([p.detach().reshape(-1) for p in self._parameters])
        self.grad = torch.zeros_like(self.theta)
        self.state_dtype = torch.promote_types(self.theta.dtype, torch.float32)
        for parameter in everything.values():
            parameter.requires_grad_(False)
        for parameter, weights, grads in zip(
            self._parameters, self._split(self.theta), self._split(self.grad), strict=True
        ):
            parameter.requires_grad_(True)
            parameter.data = weights
            parameter.grad = grads

    @property
    def numel(self) -> int:
        return self.theta.numel()

    def _split(self, flat: Tensor) -> list[Tensor]:
        pieces = flat.split([p.numel() for p in self._parameters])
        return [piece.view(p.shape) for piece, p in zip(pieces, self._parameters, strict=True)]

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The selected ones of the named tensors as one flat [d] tensor of `state_dtype`, on the arena's device."""
        return torch.cat([tensors[name].reshape(-1) for name in self.names]).to(self.theta.device, self.state_dtype)

    def zero_grad(self) -> None:
        self.grad.zero_()

    def release(self) -> None:
        """Give every parameter storage of its own again, and its old requires_grad."""
        for parameter in self._parameters:
            parameter.data = parameter.data.clone()
            parameter.grad = None
        for parameter, required in self._required_grad.items():
            parameter.requires_grad_(required)
