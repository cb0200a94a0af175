"""Guided replay: what the old model would have predicted had it never drawn what must go.

At high noise a state x_t may still become anything, the unwanted included, and the old prediction leads there as often
as the old model drew it. A model that is held to that prediction, and pushed away only where the unwanted has taken
shape, turns it into whatever looks most like it. With the unwanted taken out of what the old model draws, Bayes' rule
gives another prediction instead: with w_j the density of x_t around each drawn image x_j, and u_j the probability that
the image is unwanted,

    E[x_0 | x_t]  =  sum_j w_j x_j / sum_j w_j            the old model's own
    E'[x_0 | x_t] =  sum_j w_j (1 - u_j) x_j / sum_j w_j (1 - u_j)

and the target is the old prediction moved by `strength` times the difference. The difference is small where x_t shows
what it will be, and there the images of a bank lie too far apart to tell it: it is left out. The larger the pictures,
the more noise that takes; with the schedule and the latents of Stable Diffusion no noise is enough.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vdu_fast.replay import ReplayBank
from vdu_fast.schedule import NoiseSchedule

# Both means are taken over so many images at least, in effect (1 / sum of squared weights): fewer say what these images
# are like, not what the model draws.
FEWEST_IMAGES = 20.0
# States at a time: a matrix of so many by the images of the bank is what it takes in memory.
CHUNK = 500


@dataclass(frozen=True)
class GuidedBank:
    """A bank to replay from, and how much of it has a target without the unwanted.

    Attributes:
        bank: what was to be kept, and of the rest the trajectories with guided states.
        states: guided states.
        added: trajectories of the rest.
    """

    bank: ReplayBank
    states: int
    added: int

    def describe(self) -> str:
        """One line for people."""
        return f"guidance: {self.states} replayed states without the unwanted, also of {self.added} images dropped"


def guide(bank: ReplayBank, keep: Tensor, unwanted: Tensor, schedule: NoiseSchedule, *, strength: float) -> GuidedBank:
    """The bank with the predictions of a model that does not draw the unwanted.

    A trajectory that is not kept stays with its guided states alone, in the place of the others, too: they say where
    its noise should lead instead. A state is not looked up by the image that it became, which would always win.

    Args:
        bank: N trajectories of the old model.
        keep: bool [N], what is replayed in any case.
        unwanted: float [N] in [0, 1], the probability that the finished image is unwanted.
        schedule: the model's.
        strength: of the difference between both means; 1 is Bayes' rule.
    """
    predictions = bank.predictions.clone()
    guided = _lead_elsewhere(predictions, bank, torch.arange(len(bank)), unwanted, schedule, strength)
    use = keep | guided.any(dim=1)
    rows, slots = use.nonzero(), _states_to_use(guided, keep)[use]
    used = replace(
        bank,
        images=bank.images[use],
        x_t=bank.x_t[rows, slots],
        timesteps=bank.timesteps[rows, slots],
        predictions=predictions[rows, slots],
        # The focus is on what is near the unwanted and stays, not on the unwanted itself.
        likeness=None if bank.likeness is None else bank.likeness.masked_fill(~keep, -torch.inf)[use],
    )
    return GuidedBank(used, int(guided.sum()), int((use & ~keep).sum()))


def passed_on(bank: ReplayBank, keep: Tensor, unwanted: Tensor, schedule: NoiseSchedule) -> tuple[ReplayBank, int]:
    """What a request leaves for the next one: what is kept, with predictions that lead to the unwanted no more.

    The next request pushes nothing away of what this one did: left as they were, the predictions would bring it back.
    Where noise does not leave open what a state becomes, they stay; so do all of them where the images lie too far
    apart.

    Args:
        bank, keep, unwanted, schedule: as for `guide`.

    Returns:
        The bank, and how many of its states are led elsewhere.
    """
    rest = replace(bank.keep(keep), likeness=None)
    guided = _lead_elsewhere(rest.predictions, bank, keep.nonzero().squeeze(1), unwanted, schedule, strength=1.0)
    return rest, int(guided.sum())


def _lead_elsewhere(
    predictions: Tensor,
    bank: ReplayBank,
    trajectories: Tensor,
    unwanted: Tensor,
    schedule: NoiseSchedule,
    strength: float,
) -> Tensor:
    """Move predictions to those of a model that does not draw the unwanted, where the bank can tell them.

    Args:
        predictions: [n, S, C, H, W], changed in place.
        trajectories: int64 [n], whose predictions these are.

    Returns:
        bool [n, S], which were moved.
    """
    guided = torch.zeros(predictions.shape[:2], dtype=torch.bool)
    images, wanted = bank.images.flatten(1).double(), (1 - unwanted.double()).log()
    for slot in range(predictions.shape[1]):
        for rows in torch.arange(len(trajectories)).split(CHUNK):
            own = trajectories[rows]
            timesteps, x_t = bank.timesteps[own, slot], bank.x_t[own, slot]
            nearness = _log_density(x_t.flatten(1).double(), images, timesteps, schedule)
            nearness[torch.arange(len(rows)), own] = -torch.inf
            old, new = nearness.softmax(dim=1), (nearness + wanted).softmax(dim=1)
            told = torch.maximum(old.square().sum(dim=1), new.square().sum(dim=1)) <= 1 / FEWEST_IMAGES
            x0 = strength * ((new - old) @ images).reshape(x_t.shape)
            # x_t stays where it is, so what x_0 gains the noise loses.
            signal, noise = schedule.coefficients(timesteps, x0)
            moved = schedule.target(x0, -signal / noise * x0, timesteps).to(predictions.dtype)
            guided[rows, slot] = told
            predictions[rows[told], slot] += moved[told]
    return guided


def _log_density(x_t: Tensor, images: Tensor, timesteps: Tensor, schedule: NoiseSchedule) -> Tensor:
    """log p(x_t | x_0 = each image), [N, M], up to a constant of each state; float64 [N, D], [M, D], int64 [N]."""
    signal, noise = schedule.coefficients(timesteps, x_t)
    # ||x_t - signal x_0||^2 without ||x_t||^2, which is the same for all images.
    distance = signal**2 * images.square().sum(dim=1) - 2 * signal * (x_t @ images.T)
    return -distance / (2 * noise**2)


def _states_to_use(guided: Tensor, keep: Tensor) -> Tensor:
    """Which state each slot of a trajectory holds, int64 [N, S]: its own; of what is dropped, the guided by turns."""
    own = torch.arange(guided.shape[1]).expand_as(guided)
    first = (~guided).int().argsort(dim=1, stable=True)
    turns = first.gather(1, own % guided.sum(dim=1, keepdim=True).clamp_min(1))
    return torch.where(guided | keep[:, None], own, turns)
