"""Flower's side of shape.py, on two actors. Runs in an environment with flwr[simulation] and torch.

    PYTHONPATH=experiments/bench python flower_shape.py SHARDS.npz ROUNDS

Of the shards' 1,000 clients Flower draws as many each round as the file has in a cohort, by itself. A process makes
network and images once. Prints the seconds and the training loss of each round but the first, as JSON.
"""

import json
import sys
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

FILE, ROUNDS = sys.argv[1], int(sys.argv[2])
with np.load(FILE) as loaded:
    SHARDS, COHORT = loaded["shards"], loaded["cohorts"].shape[1]
client, server = ClientApp(), ServerApp()
ends: list[tuple[float, float]] = []


@client.train()
def train(message: Message, context: Context) -> Message:
    import published

    network = published.kept()
    network.load_state_dict(message.content["arrays"].to_torch_state_dict())
    losses = published.train(network, SHARDS[context.node_config["partition-id"]])
    metrics = MetricRecord({"num-examples": len(losses), "loss": float(np.mean(losses))})
    arrays = ArrayRecord(network.state_dict())
    return Message(content=RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


class Timed(FedAvg):
    """FedAvg that notes when each round has been aggregated, and its loss; all clients must be in it."""

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        replies = list(replies)
        assert len(replies) == COHORT
        assert not any(reply.has_error() for reply in replies)
        loss = float(np.mean([reply.content["metrics"]["loss"] for reply in replies]))
        result = super().aggregate_train(server_round, replies)
        ends.append((time.perf_counter(), loss))
        return result


@server.main()
def main(grid: Grid, context: Context) -> None:
    import published

    clients = len(SHARDS)
    strategy = Timed(
        fraction_train=COHORT / clients, fraction_evaluate=0.0, min_train_nodes=COHORT, min_available_nodes=clients
    )
    initial = ArrayRecord(published.kept().state_dict())
    strategy.start(grid=grid, initial_arrays=initial, num_rounds=ROUNDS, timeout=3600)


resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0}, "init_args": {"num_cpus": 2, "log_to_driver": False}}
run_simulation(server_app=server, client_app=client, num_supernodes=len(SHARDS), backend_config=resources)
print(json.dumps([(end - start, loss) for (start, _), (end, loss) in zip(ends, ends[1:], strict=False)]))
