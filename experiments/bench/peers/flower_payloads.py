"""Flower's side of payloads.py: clients that add one to every array. Runs in an environment with flwr[simulation].

    python flower_payloads.py CLIENTS SIZE LAYERS ROUNDS

Prints the seconds of each round but the first, from aggregation to aggregation, as JSON.
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

CLIENTS, SIZE, LAYERS, ROUNDS = map(int, sys.argv[1:5])
client, server = ClientApp(), ServerApp()
ends: list[float] = []


@client.train()
def train(message: Message, context: Context) -> Message:
    arrays = [array + 1 for array in message.content["arrays"].to_numpy_ndarrays()]
    content = RecordDict({"arrays": ArrayRecord(arrays), "metrics": MetricRecord({"num-examples": 1})})
    return Message(content=content, reply_to=message)


class Timed(FedAvg):
    """FedAvg that notes when each round has been aggregated, and that all clients were in it."""

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        replies = list(replies)
        assert len(replies) == CLIENTS
        assert not any(reply.has_error() for reply in replies)
        result = super().aggregate_train(server_round, replies)
        ends.append(time.perf_counter())
        return result


@server.main()
def main(grid: Grid, context: Context) -> None:
    strategy = Timed(fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=CLIENTS, min_available_nodes=CLIENTS)
    initial = ArrayRecord([np.zeros(SIZE // LAYERS, np.float32) for _ in range(LAYERS)])
    result = strategy.start(grid=grid, initial_arrays=initial, num_rounds=ROUNDS, timeout=3600)
    assert all(np.allclose(array, ROUNDS) for array in result.arrays.to_numpy_ndarrays())


resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0}, "init_args": {"num_cpus": 2, "log_to_driver": False}}
run_simulation(server_app=server, client_app=client, num_supernodes=CLIENTS, backend_config=resources)
print(json.dumps([after - before for before, after in zip(ends, ends[1:], strict=False)]))
