"""Guided replay: what the old model would have predicted had it never drawn what must go.

At high noise a state x_t may still become anything, the unwanted included, and the old prediction leads there as often
as the old model drew it. A model that is held to that prediction, and pushed away only where the unwanted has taken
shape, turns it into whatever looks most like it. So the old predictions are moved to those of a model that never saw
the unwanted (`vdu_fast.unseen`), where the images of the bank can tell them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vdu_fast.replay import ReplayBank
from vdu_fast.schedule import NoiseSchedule
from vdu_fast.unseen import Unseen

# Both means are taken over so many images at least, in effect: fewer say what these images are like, not what the model
# draws.
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
    unseen = Unseen(bank.images, unwanted, schedule)
    for slot in range(predictions.shape[1]):
        for rows in torch.arange(len(trajectories)).split(CHUNK):
            own = trajectories[rows]
            change, over = unseen.change(bank.x_t[own, slot], bank.timesteps[own, slot], own=own)
            told = over >= FEWEST_IMAGES
            guided[rows, slot] = told
            predictions[rows[told], slot] += (strength * change[told]).to(predictions.dtype)
    return guided


def _states_to_use(guided: Tensor, keep: Tensor) -> Tensor:
    """Which state each slot of a trajectory holds, int64 [N, S]: its own; of what is dropped, the guided by turns."""
    own = torch.arange(guided.shape[1]).expand_as(guided)
    first = (~guided).int().argsort(dim=1, stable=True)
    turns = first.gather(1, own % guided.sum(dim=1, keepdim=True).clamp_min(1))
    return torch.where(guided | keep[:, None], own, turns)
