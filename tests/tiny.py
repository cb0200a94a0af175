"""Models small enough that a whole unlearning run takes a second."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vdu_fast.posterior import GaussianPosterior


class TinyDenoiser(nn.Module):
    """A denoiser that is no U-Net: one hidden layer over the flattened image, scaled by the timestep."""

    def __init__(self, shape: tuple[int, int, int] = (1, 8, 8), hidden: int = 16, timesteps: int = 50) -> None:
        super().__init__()
        numel = shape[0] * shape[1] * shape[2]
        self.shape, self.timesteps = shape, timesteps
        self.encode = nn.Linear(numel, hidden)
        self.time = nn.Linear(1, hidden)
        self.decode = nn.Linear(hidden, numel)

    def forward(self, x_t: Tensor, timesteps: Tensor) -> Tensor:
        time = (timesteps.to(x_t.dtype) / self.timesteps)[:, None]
        hidden = torch.tanh(self.encode(x_t.flatten(1)) + self.time(time))
        return self.decode(hidden).reshape(-1, *self.shape)


def build_pipeline(prediction_type: str = "epsilon", timesteps: int = 50, **unet_options):
    """A DDPMPipeline with a UNet2DModel of 8 x 8 grey images and a few thousand parameters."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=(8,),
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            norm_num_groups=4,
            add_attention=False,
            **unet_options,
        )
    unet.eval()
    return DDPMPipeline(
        unet=unet, scheduler=DDPMScheduler(num_train_timesteps=timesteps, prediction_type=prediction_type)
    )


def build_tiny(timesteps: int = 50, **options) -> TinyDenoiser:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return TinyDenoiser(timesteps=timesteps, **options)


def random_posterior(module: nn.Module, seed: int = 5, scale: float = 0.02) -> GaussianPosterior:
    """Standard deviations between scale / 2 and scale, unlike for every weight; the mean is the module's own."""
    generator = torch.Generator().manual_seed(seed)
    std = {n: scale * (0.5 + 0.5 * torch.rand(p.shape, generator=generator)) for n, p in module.named_parameters()}
    return GaussianPosterior(std, {n: p.detach().float().clone() for n, p in module.named_parameters()})
