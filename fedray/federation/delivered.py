"""The model that a run delivers, to be sampled from: its average, where there is one."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch

from fedray.config import Config
from fedray.errors import UserError
from fedray.federation.evaluation import prompts_of
from fedray.federation.personal import by_clients
from fedray.federation.sampling import Sampling
from fedray.federation.worker import Shared, build, model, sampled, shared_part
from fedray.record.run import Run
from fedray.tasks import AdapterLearner


def model_of(run: Run, config: Config, strength: float = 1.0) -> Shared:
    """Load the model that a run's samples come from, as of its last complete round.

    Args:
        strength: of adapters, how much of them to use.

    Raises:
        UserError: no round is complete, or the checkpoint is damaged.
    """
    learner = build(config, torch.device("cpu"))
    shared = shared_part(config, learner)
    if shared is not None and strength != 1:
        raise UserError(f"--strength {strength:g}: the clients of {run} share a part of their adapters only.")
    state = run.state(learner.flat.layout if shared is None else shared.layout)
    if state is None:
        raise UserError(f"the run at {run} has no complete round yet.")
    delivered = sampled(state.tensors)
    if strength == 1:
        return model(delivered)
    adapters = cast(AdapterLearner, learner).adapters
    weakened = {"model": adapters.weakened(delivered["model"], strength)}
    if "base" in delivered:
        weakened["base"] = adapters.weakened_base(delivered["base"], strength)
    return model(weakened)


def sampling_of(
    run: Run, config: Config, n: int, seed: int, prompts: Sequence[str] = (), labels: Sequence[int] = ()
) -> Sampling:
    """Say how to draw n images from a run's model; without prompts, for those that the run drew.

    Args:
        labels: of class-conditional models, the classes to draw in turn; by default all.

    Raises:
        UserError: the model knows no such class.
    """
    prompts = prompts or getattr(config.task, "validation_prompt", ()) or prompts_of(config)
    sampling = Sampling.of(config, n, tuple(prompts))
    wanted, classes = tuple(map(int, labels)), getattr(config.task, "num_class_embeds", math.inf)
    if wanted and not sampling.labels:
        raise UserError(f"--label is for class-conditional models; that of {run} is not one.")
    for label in wanted:
        if not 0 <= label < classes:
            raise UserError(f"--label {label}: the model of {run} knows classes 0 to {classes - 1}.")
    sampling = replace(sampling, seed=seed, labels=wanted or sampling.labels)
    return by_clients(sampling, config, run, run.complete_rounds)
