"""Plain advice from the figures of a profile: one function per rule, silent where its threshold is not reached."""

from __future__ import annotations

import math
from collections.abc import Callable

from vdu_fast.profiling.record import Profile, duration

# What each rule takes for much: shares of the whole run (bank, filter, checks) or of a step (update, data, network).
FEW_THREADS = 0.5  # of the cores
BFLOAT16_GAIN = LAYOUT_GAIN = 1.1  # times as fast
CHEAPER_SAMPLE = 0.85  # cost of a sample in twice the batch, against one in the batch
MUCH_BANK = 0.3
MUCH_FILTER = 0.25
MUCH_CHECKING, FAIR_CHECKING = 0.1, 0.05
MUCH_UPDATE = 0.1
MUCH_DATA = 0.15
MOSTLY_NETWORK = 0.8
UNSTEADY = 0.25  # distance of the quartiles, against the median


def advise(profile: Profile) -> list[str]:
    """What the figures suggest, one sentence or a few per rule; empty where they suggest nothing."""
    return [text for rule in RULES if (text := rule(profile)) is not None]


def unsteady(profile: Profile) -> str | None:
    """Other programs compete for the device, and every figure is worth less."""
    median = profile.seconds_of("forward") + profile.seconds_of("backward")
    width = sum(row.high - row.low for row in profile.phases if row.name in ("forward", "backward"))
    if width < UNSTEADY * median:
        return None
    return (
        f"The network's times vary: the middle half of the steps spreads over {width / median:.0%} of the median. "
        "Something else computes here; trust the figures of an idle machine, or take more --profile_steps."
    )


def reference_backend(profile: Profile) -> str | None:
    """The slow definition of the ops runs where native code could."""
    if profile.machine["backend"] != "reference":
        return None
    return (
        f"The torch reference serves the ops on {profile.machine['device']}, many times slower than native code. "
        "`vdu-fast doctor` says why."
    )


def few_threads(profile: Profile) -> str | None:
    """The CPU has cores that nobody uses."""
    threads, cores = profile.machine["threads"], profile.machine["cores"]
    if profile.machine["device"] != "cpu" or threads > FEW_THREADS * cores:
        return None
    return f"{threads} of {cores} cores compute. Give more with --threads {cores}, or raise OMP_NUM_THREADS."


def bfloat16(profile: Profile) -> str | None:
    """Half the precision for the network alone, where the device computes in it and it was measured to be faster."""
    if profile.settings["precision"] == "bfloat16" and not profile.machine["bfloat16"]:
        return (
            f"{profile.machine['device_name']} has no instructions for bfloat16 that are known here; compare with "
            "--precision float32."
        )
    return _faster(profile, "bfloat16", BFLOAT16_GAIN, "--precision bfloat16")


def channels_last(profile: Profile) -> str | None:
    """Another memory layout suits the convolutions better."""
    return _faster(profile, "channels_last", LAYOUT_GAIN, "--channels_last")


def _faster(profile: Profile, kind: str, gain: float, flag: str) -> str | None:
    if kind not in profile.probe or unsteady(profile):
        return None
    now, then = profile.probe["batch"], profile.probe[kind]
    if now < gain * then:
        return None
    return (
        f"Forward and backward take {duration(now)}, and {duration(then)} with {flag}, {now / then:.2f} times as fast."
    )


def small_batch(profile: Profile) -> str | None:
    """A sample costs less in a larger batch."""
    if "doubled" not in profile.probe or unsteady(profile):
        return None
    cost = profile.probe["doubled"] / (2 * profile.probe["batch"])
    if cost > CHEAPER_SAMPLE:
        return None
    flags = [f"--batch_size {2 * profile.settings['batch_size']}"]
    if profile.settings["replay_weight"] > 0:
        flags.append(f"--replay_batch_size {2 * profile.settings['replay_batch_size']}")
    return (
        f"Twice the batch takes {2 * cost:.2f} times as long: a sample then costs {cost:.0%} of what it does now. "
        f"{' '.join(flags)} uses the device better, and may need fewer --steps; that changes the result."
    )


def much_bank(profile: Profile) -> str | None:
    """The replay bank is most of the run, and can be kept."""
    bank = profile.part("bank")
    if bank is None or not bank.estimate or bank.seconds < MUCH_BANK * profile.total:
        return None
    return (
        f"Drawing the replay bank is {bank.seconds / profile.total:.0%} of the run (about {duration(bank.seconds)}). "
        "Keep it with --bank FILE, and the next request on this model draws none. Or draw fewer images "
        f"(--replay_samples, now {profile.settings['replay_samples']}) in fewer steps (--replay_sampler_steps, now "
        f"{profile.settings['replay_sampler_steps']}), which changes the result."
    )


def much_filter(profile: Profile) -> str | None:
    """The filter dominates."""
    part = profile.part("filter")
    if part is None or part.seconds < MUCH_FILTER * profile.total:
        return None
    return (
        f"The filter of the bank is {part.seconds / profile.total:.0%} of the run (about {duration(part.seconds)}). It "
        "looks at every image of the bank and at up to 1,000 forget images: fewer of either (--replay_samples) make it "
        "shorter."
    )


def much_checking(profile: Profile) -> str | None:
    """Measuring on the fixed batches takes a large part of the run."""
    checks = profile.part("checks")
    if checks is None or checks.seconds < MUCH_CHECKING * profile.total:
        return None
    fair = math.ceil(profile.check / (FAIR_CHECKING * profile.step))
    return (
        f"The checks are {checks.seconds / profile.total:.0%} of the run. --check_every {fair} (now "
        f"{profile.settings['check_every']}) makes them {FAIR_CHECKING:.0%} of the steps; --target_ratio and "
        f"--rollback then look as seldom. --check_size (now {profile.settings['check_size']}) makes each shorter."
    )


def much_update(profile: Profile) -> str | None:
    """The update costs by the weight and not by the sample, so a small batch makes it show."""
    row = next(row for row in profile.phases if row.name == "update")
    if row.share < MUCH_UPDATE:
        return None
    return (
        f"The update is {row.share:.0%} of a step: {profile.samples} samples are few for "
        f"{profile.trainable:,} weights. It takes the same time for any batch, so a larger --batch_size, --accumulate, "
        "or fewer --trainable weights make it matter less."
    )


def much_data(profile: Profile) -> str | None:
    """Choosing, moving and mixing the batch takes long."""
    row = next(row for row in profile.phases if row.name == "data")
    if row.share < MUCH_DATA:
        return None
    return (
        f"Making the batch is {row.share:.0%} of a step: the network is small for its pictures, or these have a slow "
        "way to the device."
    )


def mostly_network(profile: Profile) -> str | None:
    """What is left to gain is in the network."""
    share = sum(row.share for row in profile.phases if row.name in ("forward", "backward"))
    if share < MOSTLY_NETWORK:
        return None
    return (
        f"The network's forward and backward are {share:.0%} of a step: only a faster device, another precision or "
        "fewer samples make it much shorter."
    )


RULES: tuple[Callable[[Profile], str | None], ...] = (
    unsteady,
    reference_backend,
    few_threads,
    bfloat16,
    channels_last,
    small_batch,
    much_bank,
    much_filter,
    much_checking,
    much_update,
    much_data,
    mostly_network,
)
