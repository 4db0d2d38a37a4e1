"""Bytes of a whole run, worked out beforehand."""

from fedray.config import Config
from fedray.federation.plan import Plan, PlannedBytes, first_message
from fedray.wire import counted


def bytes_down_in_all(config: Config, plan: Plan, planned: PlannedBytes, cohorts: list[int]) -> int:
    """Return the bytes down of a whole run, from the sizes of its rounds' cohorts."""
    about, method = plan.round(config, 0), config.method
    fixed = planned.down - method.growth(about, max(1, config.rounds - 1))
    later = sum(size * (fixed + method.growth(about, number)) for number, size in enumerate(cohorts) if number)
    return planned.first * cohorts[0] + later


def bytes_up_in_all(config: Config, plan: Plan, planned: PlannedBytes, messages: int) -> int:
    """Return the bytes up of a whole run of so many messages.

    Where they are of different tensors, by the mean of those of eight clients in each of the first two rounds.
    """
    ranks = () if plan.adapters is None else plan.adapters.ranks
    if "same upload" in config.method.offers and len(ranks) < 2:
        return planned.up * messages
    asked = [(number, client) for number in (0, 1) for client in plan.round(config, number).cohort[:8]]
    sent = [counted(first_message(config, plan, *each).sent, config.method.uncounted) for each in asked]
    _, more = config.fold.exchanged(plan.round(config, 0))
    return round(messages * (sum(sent) / max(1, len(sent)) + more))
