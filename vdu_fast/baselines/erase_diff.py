"""EraseDiff: keep the retained data, subject to the forget data being denoised wrongly.

Wu, Le, Hayat, Harandi, "Erasing Undesirable Influence in Diffusion Models" (CVPR 2025, arXiv 2401.05779):

    minimise L(D_r)  subject to  G(theta) - min_phi G(phi) <= 0,
    G = mean || eps_theta(x_t, t) - eps_f ||^2  over D_f,    eps_f ~ U(0, 1) in the place of the noise that was mixed in

The inner minimum is approximated by a few gradient steps on G from theta, and is a constant to the outer step, which is
of first order (the value-function method that the paper builds on, Liu et al., "BOME!", NeurIPS 2022):

    g = G(theta) - G(phi_K),    gradient = grad L + m grad G,    m = max(0, (b g - <grad L, grad G>) / ||grad G||^2)

so that the constraint pulls while the inner steps still find something to gain, and never works against L twice. L and
G are means over batch and elements; both gradients, and both values of G, are of one batch. The reading of the
multiplier, with b g as the speed at which the constraint is met, is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vdu_fast.baselines.method import Method, MethodRun
from vdu_fast.baselines.training import (
    Noised,
    TrainingSettings,
    denoising_loss,
    descend,
    flat,
    noised_batch,
    trained_parameters,
    uniform,
)


@dataclass(frozen=True)
class EraseDiffSettings(TrainingSettings):
    """Settings of EraseDiff.

    Attributes:
        inner_steps: K, gradient steps on G per outer step.
        inner_learning_rate: of these, plain gradient descent.
        barrier: b.
    """

    learning_rate: float = 1e-3
    inner_steps: int = 2
    inner_learning_rate: float = 1e-2
    barrier: float = 0.03


def multiplier(gap: float, barrier: float, retained: Tensor, wrong: Tensor) -> float:
    """m for the gap g, from grad L and grad G, both [P]."""
    squared = float(wrong.double().square().sum())
    if squared == 0:
        return 0.0
    return max(0.0, (barrier * gap - float(retained.double() @ wrong.double())) / squared)


def _train(run: MethodRun) -> dict[str, Any]:
    settings, denoiser, size = run.settings, run.denoiser, run.settings.batch_size
    sets = [run.inputs.forget_images(), run.inputs.retained_images()]
    parameters = trained_parameters(denoiser)

    def wrong_loss(batch: Noised, eps: Tensor) -> Tensor:
        target = denoiser.schedule.target(batch.x0, eps, batch.timesteps)
        return (denoiser.predict(batch.x_t, batch.timesteps) - target).square().mean()

    def gap_to_inner(batch: Noised, eps: Tensor, value: float, first: list[Tensor]) -> float:
        """G(theta) - G(phi_K); the weights are put back."""
        before = [p.detach().clone() for p in parameters]
        gradients = first
        with torch.no_grad():
            for number in range(settings.inner_steps):
                if number:
                    with torch.enable_grad():
                        gradients = list(torch.autograd.grad(wrong_loss(batch, eps), parameters))
                torch._foreach_add_(parameters, gradients, alpha=-settings.inner_learning_rate)
            inner = float(wrong_loss(batch, eps))
            torch._foreach_copy_(parameters, before)
        return value - inner

    def gradient(step: int) -> dict[str, float]:
        batch = noised_batch(denoiser, sets, size, step, run.seed)
        forget, kept = batch[:size], batch[size:]
        eps = uniform(forget.eps.shape, run.seed, step, low=0.0, high=1.0).to(forget.eps)
        retained = denoising_loss(denoiser, denoiser.predict(kept.x_t, kept.timesteps), kept)
        grad_retained = torch.autograd.grad(retained, parameters)
        wrong = wrong_loss(forget, eps)
        grad_wrong = list(torch.autograd.grad(wrong, parameters))
        gap = gap_to_inner(forget, eps, float(wrong.detach()), grad_wrong)
        m = multiplier(gap, settings.barrier, flat(grad_retained), flat(grad_wrong))
        for parameter, g_retained, g_wrong in zip(parameters, grad_retained, grad_wrong, strict=True):
            parameter.grad = g_retained + m * g_wrong
        return {
            "retained_loss": float(retained.detach()),
            "wrong_loss": float(wrong.detach()),
            "gap": gap,
            "multiplier": m,
        }

    # Two gradients, those of the inner steps after the first, and the value at their end.
    return descend(run, gradient, cost=size * (2 * 3 + (settings.inner_steps - 1) * 3 + 1))


ERASE_DIFF = Method(
    name="erase_diff",
    title="EraseDiff",
    paper="Wu, Le, Hayat, Harandi, Erasing Undesirable Influence in Diffusion Models, CVPR 2025",
    sees="forget + retained data",
    settings=EraseDiffSettings,
    train=_train,
)
