"""Whole runs, as tests do them."""

import os
from pathlib import Path

import made
import numpy as np
import pytest
import torch

from fedray.federation.added import Added
from fedray.federation.blocks import Pace
from fedray.federation.fit import fit as fit_session
from fedray.federation.fit import prepare
from fedray.federation.local import Trained, TrainJob, client_update
from fedray.federation.pool import LocalPool
from fedray.federation.round import Session, run_round
from fedray.federation.worker import Shared, Worker
from fedray.record.checkpoint import State
from fedray.record.provenance import environment
from fedray.record.run import Run
from fedray.vector import sha256_of

CHAOS = bool(os.environ.get("FEDRAY_CHAOS"))  # of `make chaos`: more seeds


def fit(config, pool, out, resume=False, dataset=None, **own):
    """Yield the rows of a run, as they come."""
    run = Run(out)
    plan = prepare(config, run, resume, dataset)
    yield from fit_session(Session(config, plan, pool, run, added=Added.of(own)), environment(), resume)


def train(config, out, resume=False, rounds=None, pool=None, **own):
    """Run in this process, or only the first `rounds` rounds; return the rows."""
    rows = []
    for row in fit(config, pool or LocalPool(config), out, resume=resume, **own):
        rows.append(row)
        if len(rows) == rounds:
            break
    return rows


def renew(pool, config):
    """Make a pool's actors those of another run: they keep their imports, which take seconds."""
    import ray

    from fedray.cluster.connection import send_own_code

    send_own_code()
    pool.config = config
    started = [actor.start(60) for actor in pool.actors]
    ray.get([actor.handle.renew.remote(config, None, None) for actor in started], timeout=60)


def whole_round(session, state):
    """Do a round; return the next state and the row."""
    training = run_round(session, state)
    while True:
        try:
            next(training)
        except StopIteration as done:
            return done.value


class Memories:
    """What a run directory keeps of clients, in memory."""

    def __init__(self):
        self.kept = {}

    def generation(self, client, rounds):
        return max((g for c, g in self.kept if c == client and g <= rounds), default=None)

    def recall(self, client, generation):
        return {} if generation is None else self.kept[client, generation]

    def remember(self, client, generation, memory):
        # Twice only of a client whose partial was lost after its memory had come.
        assert sha256_of(self.kept.get((client, generation), memory)) == sha256_of(memory)
        self.kept[client, generation] = {name: tensor.clone() for name, tensor in memory.items()}


class AnySize(Pace):
    """Blocks of any size."""

    def __init__(self, rng):
        super().__init__()
        self.rng = rng

    def take(self, todo, steps, workers):
        return [todo.popleft() for _ in range(self.rng.randint(1, len(todo)))]


def initial(config, plan):
    return State(0, config.method.init(plan.initial, plan.layout))


def trained(config, plan, pool, pace, rounds=3):
    """The state, the memories and the rows after some rounds."""
    state, run, rows = initial(config, plan), Memories(), []
    session = Session(config, plan, pool, run, pace=pace)
    for _ in range(rounds):
        state, row = whole_round(session, state)
        rows.append(row)
    memories = {f"{c}/{g}/{name}": t for (c, g), kept in run.kept.items() for name, t in kept.items()}
    told = [[(c["client"], c["outcome"], c.get("loss"), c["bytes_down"]) for c in row["clients"]] for row in rows]
    return sha256_of(state.tensors), sha256_of(memories), told, [row["loss"] for row in rows]


def curves(out):
    """Return what TensorBoard shows of a run, as {(name, step): [values]}, and check it as TensorBoard does."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in sorted((Path(out) / "tensorboard").iterdir()):
        assert "tfevents" in path.name
        contents = path.read_bytes()
        while contents:  # TFRecord: length, its checksum, data, its checksum
            length = int.from_bytes(contents[:8], "little")
            data, rest = contents[12 : 12 + length], contents[12 + length :]
            sums = [int.from_bytes(four, "little") for four in (contents[8:12], rest[:4])]
            assert sums == [masked(crc32c(contents[:8])), masked(crc32c(data))]
            event, contents = Event.FromString(data), rest[4:]
            for value in event.summary.value:
                if value.WhichOneof("value") != "simple_value":  # a picture or a table
                    continue
                found.setdefault((value.tag, event.step), []).append(value.simple_value)
    return found


def crc32c(data):
    """Return the checksum of RFC 3720, byte by byte."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ CRCS[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def of_byte(byte):
    """Divide a byte by the polynomial, bit by bit."""
    for _ in range(8):
        byte = byte >> 1 ^ 0x82F63B78 * (byte & 1)
    return byte


CRCS = [of_byte(byte) for byte in range(256)]


def masked(crc):
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32


def assert_curves_equal_rows(out):
    """Assert that TensorBoard shows each row's numbers, once."""
    found, rows = curves(out), Run.open(out).rows
    for name, of in {
        "loss": lambda row: row["loss"],
        "bytes": lambda row: row["bytes_down"] + row["bytes_up"],
        "seconds": lambda row: row["seconds"]["round"],
    }.items():
        assert {step for tag, step in found if tag == name} == {row["round"] for row in rows}
        for row in rows:
            assert found[name, row["round"]] == [np.float32(of(row))]
    scores = {(name, row["round"]): row["scores"][name]["value"] for row in rows for name in row["scores"]}
    assert {key: found[key] for key in scores} == {key: [np.float32(value)] for key, value in scores.items()}


def sha(out):
    """Return the SHA-256 of a complete run's state: the model, and all that the server keeps beside it."""
    return Run.open(out).result["state_sha256"]


def trained_client(config, tensors=None, memory=None):
    """Train client 0, in a round of its own, on all examples: its row, and what it sends and keeps.

    tensors: what goes down, beside the initial model or in its place;  memory: what it kept.
    """
    worker = Worker(config, torch.device("cpu"), "test")
    examples = len(config.task.dataset().images)
    flat = worker.learner.flat
    down = {"model": flat.vector.detach().clone()} | (tensors or {})
    shared = Shared({name: tensor.numpy() for name, tensor in down.items()}, made.round_of({0: examples}, flat.layout))
    kept = {f"algorithm/{name}": tensor.numpy() for name, tensor in (memory or {}).items()}
    row, trained = client_update(worker, shared, TrainJob(0, 0, np.arange(examples), np.array([], int), kept))
    payload, rows, kept = trained  # what is sent lies in the memory that the next client is trained in
    return row, Trained({name: array.copy() for name, array in payload.items()}, rows, kept)


def killed_before_checkpoint(config, out, monkeypatch, number):
    """Train until the noise of a round is drawn and its models are there, and its checkpoint is not."""
    right = Run.complete

    def complete(run, state, *rest):
        if state.round == number:
            raise KeyboardInterrupt
        right(run, state, *rest)

    with monkeypatch.context() as context:
        context.setattr(Run, "complete", complete)
        with pytest.raises(KeyboardInterrupt):
            train(config, out)
