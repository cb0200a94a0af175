"""A Bayesian linear layer, forward and backward with its KL, against that of bayesian-torch.

Theirs writes sigma as log(1 + exp(rho)), ours as exp(log_std); both draw one weight matrix for the batch.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from vdu_fast import ops
from vdu_fast.benchmarks.case import Case, Setting, question

FEATURES, BATCH = 2048, 64


@question("Bayesian linear layer, forward and backward", group="step", devices=("cpu",), needs=("bayesian_torch",))
def bayesian_layer(setting: Setting) -> Case:
    from bayesian_torch.layers import LinearReparameterization

    x = torch.randn(BATCH, FEATURES)
    theirs = LinearReparameterization(FEATURES, FEATURES, bias=False)
    mean, log_std = (torch.randn(FEATURES, FEATURES).mul_(0.01).requires_grad_() for _ in range(2))
    prior_mean, prior_std = torch.zeros_like(mean), torch.ones_like(mean)

    def bayesian_torch() -> None:
        theirs.zero_grad()
        out, kl = theirs(x)
        (out.square().mean() + 1e-6 * kl).backward()

    def ours() -> None:
        mean.grad = log_std.grad = None
        theta = ops.sample_weights(mean, log_std, 1, 2)
        kl = ops.gaussian_kl(mean, log_std, prior_mean, prior_std)
        (functional.linear(x, theta).square().mean() + 1e-6 * kl).backward()

    return Case({"bayesian-torch": bayesian_torch}, {"vdu_fast": ours}, mean.numel())
