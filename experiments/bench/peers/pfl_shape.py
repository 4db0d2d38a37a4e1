"""pfl's side of shape.py, in one process or in several. Runs in an environment with pfl and torch.

    PYTHONPATH=experiments/bench python [-m torch.distributed.run --nproc-per-node 2] pfl_shape.py SHARDS.npz ROUNDS

The clients' images are tensors before the first round. Prints the seconds and the training loss of each round but the
first, as JSON: the first process's.
"""

import json
import os
import sys
import time
from typing import Any

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from published import BATCH, RATE, cnn, generated, loss_of

FILE, ROUNDS = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
torch.manual_seed(0)
np.random.seed(0)


class Network(torch.nn.Module):
    """The network, as pfl wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = cnn()
        self.losses: list[float] = []

    def loss(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss = loss_of(self.layers, images, labels)
        self.losses.append(loss.item())
        return loss

    def metrics(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
        with torch.no_grad():
            return {"loss": Weighted(loss_of(self.layers, images, labels).item() * len(labels), len(labels))}


class Ends(TrainingProcessCallback):
    """Notes when each round ends, and its loss."""

    def __init__(self, network: Network) -> None:
        self.network, self.rounds = network, list[tuple[float, float]]()

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        self.rounds.append((time.perf_counter(), float(np.mean(self.network.losses))))
        self.network.losses.clear()
        return False, Metrics()


images, labels = map(torch.from_numpy, generated())
with np.load(FILE) as loaded:
    shards, cohorts = loaded["shards"], loaded["cohorts"]
users = {client: Dataset((images[shard], labels[shard])) for client, shard in enumerate(shards)}
drawn = iter(cohorts.ravel().tolist())
network = Network()
ends = Ends(network)
model = PyTorchModel(network, torch.optim.SGD, torch.optim.SGD(network.parameters(), lr=1.0))
data = FederatedDataset(users.__getitem__, lambda: next(drawn))
FederatedAveraging().run(
    NNAlgorithmParams(
        central_num_iterations=ROUNDS, evaluation_frequency=ROUNDS + 1, train_cohort_size=cohorts.shape[1],
        val_cohort_size=None,
    ),
    SimulatedBackend(data, data),
    model,
    NNTrainHyperParams(
        local_batch_size=BATCH, local_num_epochs=1, local_learning_rate=RATE, local_max_grad_norm=None
    ),
    NNEvalHyperParams(local_batch_size=None),
    callbacks=[ends],
    send_metrics_to_platform=False,
)  # fmt: skip
if os.environ.get("RANK", "0") == "0":
    rounds = ends.rounds
    print(json.dumps([(end - start, loss) for (start, _), (end, loss) in zip(rounds, rounds[1:], strict=False)]))
