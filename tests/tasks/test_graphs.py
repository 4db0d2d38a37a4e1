"""CUDA graphs: where they are not made, and that their memory is given up. What they compute is in test_gpu.py."""

from types import SimpleNamespace

import pytest
import torch

from fedray.federation.worker import Worker, do
from fedray.tasks import graphs
from fedray.tasks.graphs import Graphed, alike


def test_what_a_network_predicts_is_returned_and_on_a_cpu_nothing_is_captured(monkeypatch):
    monkeypatch.setattr(graphs, "_captured", lambda *given: pytest.fail("a graph was made"))
    graphed = Graphed(lambda x, t: SimpleNamespace(sample=x * t))
    with alike(True):
        assert graphed(torch.tensor(2.0), torch.tensor(3.0)) == 6
    assert not graphs.release()


@pytest.mark.parametrize("live", [True, False])
def test_a_job_that_is_out_of_memory_is_done_again_without_graphs_if_there_were_any(toy_config, monkeypatch, live):
    released, drawn = [live], []
    monkeypatch.setattr(graphs, "release", lambda: released.pop() if released else False)

    def work(worker, shared, job):
        drawn.append(torch.rand(()).item())
        if len(drawn) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return {"graphs": worker.graphs}, None

    worker = Worker(toy_config(), torch.device("cpu"), "this process")
    assert not worker.graphs  # on a CPU
    worker.graphs = True
    row, _ = do(worker, work, None, SimpleNamespace(key=("train", 0, 0)))
    if live:
        assert row["graphs"] is False
        assert drawn[0] == drawn[1]  # the same job, with the same random numbers
    else:
        assert row["cause"] == "out of memory"
        assert worker.graphs
