"""The baseline without a federation: every client trains alone, on its part of the partition."""

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Unpack

from fedray.cluster.driver import check_outside_images
from fedray.cluster.pool import open_pool
from fedray.config import Config
from fedray.data.dataset import Dataset
from fedray.errors import UserError
from fedray.federation.added import Added, Own
from fedray.federation.evaluation import Show, silent
from fedray.federation.fit import fit, prepare
from fedray.federation.modes import plain
from fedray.federation.plan import make_plan
from fedray.federation.pool import Pool
from fedray.federation.round import Session
from fedray.record.copies import local
from fedray.record.provenance import environment
from fedray.record.resume import check_resumable
from fedray.record.run import Row
from fedray.reports.run import Run
from fedray.storage import shown


@plain()
def run_local_only(
    config: Config,
    out: str | Path,
    *,
    on_row: Callable[[Row], None] = lambda row: None,
    show: Show = silent,
    dataset: Dataset | None = None,
    **own: Unpack[Own],
) -> list[Run]:
    """Train each client alone, to measure its gain from the federation; in parallel, one client per actor.

    Each client has a run, in `out`/client-0000 and so on: incomplete ones are continued, complete ones kept. `own` is
    as for `run`; each run has copies of callbacks and trackers, which group them by the name of `out`. Raises as `run`
    does.
    """
    out = local(out).absolute()
    added = Added.of(own, out.name)
    config.check()
    check_outside_images(out, config)
    if config.only_client is not None:
        raise UserError("--only-client and --local-only are both given; give one of them.")
    if (out / "config.json").exists():
        raise UserError(f"{shown(out)} holds another run; choose another --out for one run per client.")
    dataset = config.task.dataset() if dataset is None else dataset
    provenance = environment()
    runs = [Run(out / f"client-{client:04d}") for client in range(config.clients)]
    data = make_plan(config, dataset).data
    for client, run in enumerate(runs):
        if (run.directory / "config.json").exists():
            check_resumable(run, replace(config, only_client=client, min_clients=1))
            run.check_data(data)
    left = [run.result is None or not (run.complete_after(config.rounds) or "stopped" in run.result) for run in runs]
    waiting = iter([client for client in range(config.clients) if left[client]])
    done = dict.fromkeys(range(config.clients), 0.0)
    taking, stopped = threading.Lock(), threading.Event()

    def stop(phase: str, done: float, total: float) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt

    def train(pool: Pool) -> None:
        while not stopped.is_set():
            with taking:
                client = next(waiting, None)
            if client is None:
                return
            alone, directory = replace(config, only_client=client, min_clients=1), runs[client].directory
            begun = (directory / "config.json").exists()
            try:
                plan, run = prepare(alone, Run(directory), begun, dataset), Run(directory)
                session = Session(alone, plan, pool, run, stop, copy.deepcopy(added))
                for row in fit(session, provenance, begun):
                    on_row(row)
                    done[client] = row["round"] / config.rounds
                    show("clients alone", sum(done.values()), config.clients)
            except BaseException:
                stopped.set()
                raise

    show("clients alone", 0, config.clients)
    # All at once in a "cohort", so that there is an actor for each that fits.
    with open_pool(replace(config, fraction=1.0, cohort=None), dataset, str(out)) as pool:
        pools = pool.apart()
        with ThreadPoolExecutor(len(pools)) as threads:
            try:
                list(threads.map(train, pools))
            finally:
                stopped.set()
    return [
        Run.open(run.directory, replace(config, only_client=client, min_clients=1)) for client, run in enumerate(runs)
    ]
