"""Subtracted importance sampled scores: keep and delete from one noised image, drawn from a mixture of both origins.

Alberti, Hasanaliyev, Shah, Ermon, "Data Unlearning in Diffusion Models" (ICLR 2025). For x from all n training images,
a from the k images to delete, and m ~ q = (1 - w) q(m | x) + w q(m | a), the densities of the forward process at t:

    minimise  E [ n / (n - k)  q(m | x) / q(m)  || eps(m, x) - eps_theta(m, t) ||^2        keep
                - (1 + s) k / (n - k)  q(m | a) / q(m)  || eps(m, a) - eps_theta(m, t) ||^2 ]    delete

with eps(m, x) = (m - signal x) / noise. At s = 0 that is, in expectation, the loss on the retained images alone. The
superfactor s is not fixed: as in the paper's experiments the gradient of the second term is rescaled to a given share
of the norm of the first's. Errors are means over batch and elements, in the network's own prediction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vdu_fast.baselines.method import Method, MethodRun
from vdu_fast.baselines.training import TrainingSettings, descend, flat, noised_batch, trained_parameters, uniform
from vdu_fast.schedule import NoiseSchedule


@dataclass(frozen=True)
class SissSettings(TrainingSettings):
    """Settings of SISS.

    Attributes:
        mixture: w, the share of the noised images that come from the images to delete, in (0, 1).
        delete_share: norm of the delete term's gradient, in units of that of the keep term's.
    """

    batch_size: int = 128
    mixture: float = 0.5
    delete_share: float = 0.5


def importance_weights(
    schedule: NoiseSchedule, m: Tensor, timesteps: Tensor, x: Tensor, a: Tensor, mixture: float
) -> tuple[Tensor, Tensor]:
    """q(m | x) / q(m) and q(m | a) / q(m), each [B], from images [B, C, H, W]; (1 - w) and w times them sum to 1."""
    signal, noise = schedule.coefficients(timesteps, m)

    def log_density(origin: Tensor) -> Tensor:
        return -((m - signal * origin) / noise).double().square().flatten(1).sum(dim=1) / 2

    of_x, of_a = log_density(x), log_density(a)
    prior = torch.tensor([1 - mixture, mixture], dtype=torch.float64, device=m.device).log()
    log_mixture = torch.logaddexp(prior[0] + of_x, prior[1] + of_a)
    return (of_x - log_mixture).exp().to(m.dtype), (of_a - log_mixture).exp().to(m.dtype)


def _train(run: MethodRun) -> dict[str, Any]:
    settings, denoiser, size = run.settings, run.denoiser, run.settings.batch_size
    schedule, deleted = denoiser.schedule, run.inputs.forget_images()
    everything = torch.cat([run.inputs.retained_images(), deleted])
    n, k = len(everything), len(deleted)
    parameters = trained_parameters(denoiser)

    def term(prediction: Tensor, m: Tensor, timesteps: Tensor, origin: Tensor, weight: Tensor) -> Tensor:
        signal, noise = schedule.coefficients(timesteps, m)
        target = schedule.target(origin, (m - signal * origin) / noise, timesteps)
        return (weight * (prediction - target).square().flatten(1).mean(dim=1)).mean()

    def gradient(step: int) -> dict[str, float]:
        batch = noised_batch(denoiser, [deleted, everything], size, step, run.seed)
        a, x = batch.x0[:size], batch.x0[size:]
        eps, timesteps = batch.eps[:size], batch.timesteps[:size]
        from_a = uniform(timesteps.shape, run.seed, step, low=0.0, high=1.0).to(x) < settings.mixture
        m = schedule.add_noise(torch.where(from_a[:, None, None, None], a, x), eps, timesteps)
        keep_weight, delete_weight = importance_weights(schedule, m, timesteps, x, a, settings.mixture)
        prediction = denoiser.predict(m, timesteps)
        keep = n / (n - k) * term(prediction, m, timesteps, x, keep_weight)
        delete = k / (n - k) * term(prediction, m, timesteps, a, delete_weight)
        grad_keep = torch.autograd.grad(keep, parameters, retain_graph=True)
        grad_delete = torch.autograd.grad(delete, parameters)
        run.counter.add_backward(size)
        keep_norm, delete_norm = (float(flat(g).norm()) for g in (grad_keep, grad_delete))
        scale = settings.delete_share * keep_norm / max(delete_norm, 1e-30)
        for parameter, g_keep, g_delete in zip(parameters, grad_keep, grad_delete, strict=True):
            parameter.grad = g_keep - scale * g_delete
        return {"keep_loss": float(keep.detach()), "delete_loss": float(delete.detach()), "superfactor": scale - 1}

    return descend(run, gradient, cost=(3 + 2) * size)


SISS = Method(
    name="siss",
    title="SISS",
    paper="Alberti, Hasanaliyev, Shah, Ermon, Data Unlearning in Diffusion Models, ICLR 2025",
    sees="forget + retained data",
    settings=SissSettings,
    train=_train,
)
