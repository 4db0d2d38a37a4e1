"""Whole runs, as tests do them."""

from fedray.federation.fit import fit as fit_session
from fedray.federation.fit import prepare
from fedray.federation.pool import LocalPool
from fedray.federation.round import Session, run_round
from fedray.record.provenance import environment
from fedray.record.run import Run


def fit(config, pool, out, resume=False, metrics=None, dataset=None):
    """Yield the rows of a run, as they come."""
    run = Run(out)
    plan = prepare(config, run, resume, dataset)
    yield from fit_session(Session(config, plan, pool, run, metrics=metrics or {}), environment(), resume)


def train(config, out, resume=False, rounds=None, pool=None):
    """Run in this process, or only the first `rounds` rounds; return the rows."""
    rows = []
    for row in fit(config, pool or LocalPool(config), out, resume=resume):
        rows.append(row)
        if len(rows) == rounds:
            break
    return rows


def whole_round(session, state):
    """Do a round; return the next state and the row."""
    training = run_round(session, state)
    while True:
        try:
            next(training)
        except StopIteration as done:
            return done.value


def sha(out):
    """Return the SHA-256 of a complete run's state: the model, and all that the server keeps beside it."""
    return Run.open(out).result["state_sha256"]
