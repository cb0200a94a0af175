"""The parameters that questions are about: shapes of real networks, and the state that unlearning keeps of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def cifar_unet() -> nn.Module:
    """The google/ddpm-cifar10-32 shape: 35.7 million parameters in about 300 tensors."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=(128, 256, 256, 256),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
        act_fn="silu",
        attention_head_dim=None,
        norm_num_groups=32,
    )


def digits_unet() -> nn.Module:
    """The network of the digits that comes with the package: 651 thousand parameters."""
    from vdu_fast.demo import shipped_model
    from vdu_fast.pipelines import load_pipeline

    return load_pipeline(shipped_model()).unet


def stable_diffusion_shapes() -> list[torch.Size]:
    """The parameters of the Stable Diffusion 1.5 U-Net, 860 million in 686 tensors; none of them is made."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return [p.shape for p in UNet2DConditionModel(cross_attention_dim=768).parameters()]


def shapes_of(network: nn.Module) -> list[torch.Size]:
    return [p.shape for p in network.parameters()]


class State:
    """mu, rho, mu*, sigma*, gradients and moments, each made when it is first asked for.

    `state.mean` is flat, `state.lists("mean")` the same memory as one tensor per parameter.

    Args:
        shapes: of the parameters.
        device: of the state.
        dtype: of theta and its gradient; the rest is float32.
    """

    NAMES = ("mean", "log_std", "center", "prior_std", "grad", "theta", "z", "first", "second")

    def __init__(
        self, shapes: Sequence[torch.Size], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        self.shapes, self.device, self.dtype = list(shapes), torch.device(device), dtype
        self.numels = [shape.numel() for shape in shapes]
        self.numel = sum(self.numels)

    def __getattr__(self, name: str) -> Tensor:
        if name not in self.NAMES:
            raise AttributeError(name)
        generator = torch.Generator(self.device).manual_seed(self.NAMES.index(name))
        dtype = self.dtype if name in ("grad", "theta") else torch.float32
        made = torch.randn(self.numel, generator=generator, device=self.device, dtype=dtype).mul_(0.01)
        if name == "log_std":
            made.sub_(5.0)
        elif name == "prior_std":
            made.abs_().add_(1e-3)
        elif name == "second":
            made.square_()
        setattr(self, name, made)
        return made

    def lists(self, name: str) -> list[Tensor]:
        """The tensor of that name, one part per parameter."""
        parts = getattr(self, name).split(self.numels)
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]
