"""A run's rows as counters and gauges of Ray's, which its agents offer to Prometheus; tagged with the run."""

from ray.util.metrics import Counter, Gauge

from fedray.record.run import Row, Run
from fedray.record.trackers import Entry, Tracked

COUNTERS = {  # Ray writes ray_NAME_total
    "fedray_rounds": "Complete rounds",
    "fedray_clients": "Clients whose updates were folded",
    "fedray_images": "Images trained on",
    "fedray_down_bytes": "Bytes that clients received",
    "fedray_up_bytes": "Bytes that clients sent",
    "fedray_failed_clients": "Clients that were left out of a round",
    "fedray_retried_clients": "Clients that were trained again in a round",
    "fedray_lost_actors": "Client actors that were lost",
    "fedray_lost_nodes": "Nodes that were lost",
    "fedray_lost_seconds": "Seconds of actors whose work was lost",
}
BY_NODE = {
    "fedray_busy_seconds": "Seconds that a node's actors have trained",
    "fedray_waiting_seconds": "Seconds that a node's actors have waited in rounds",
}
GAUGES = {  # ray_NAME
    "fedray_loss": "Training loss of the last round",
    "fedray_round_seconds": "Seconds of the last round",
    "fedray_clients_per_second": "Clients folded per second of the last round",
    "fedray_actors": "Client actors that trained in the last round",
    "fedray_nodes": "Nodes that trained in the last round",
}


class Metrics:
    """A tracker: rounds are counted as they complete, once each; those before a run was resumed are not."""

    def __init__(self, run: str) -> None:
        tags = {"run": run}
        self._counters = {
            name: Counter(name, about, ("run",)).set_default_tags(tags) for name, about in COUNTERS.items()
        }
        self._by_node = {
            name: Counter(name, about, ("run", "node")).set_default_tags(tags) for name, about in BY_NODE.items()
        }
        self._gauges = {name: Gauge(name, about, ("run",)).set_default_tags(tags) for name, about in GAUGES.items()}
        self._shown: int | None = None  # rounds

    def start(self, run: Tracked) -> int:
        """Begin after the rounds that are complete; after a failure, after those that were counted."""
        if self._shown is None:
            self._shown = len(Run(run.directory).rows)
        return self._shown

    def log(self, entry: Entry) -> None:
        self._shown, row = entry.round, entry.row
        for name, value in counted(row).items():
            if value > 0:  # Ray takes no zeros
                self._counters[name].inc(value)
        for node, values in at_nodes(row).items():
            for name, value in values.items():
                if value > 0:
                    self._by_node[name].inc(value, {"node": node})
        for name, level in measured(row).items():
            if level is not None:
                self._gauges[name].set(level)

    def finish(self) -> None:
        pass


def counted(row: Row) -> dict[str, float]:
    """Return what a row adds to each of `COUNTERS`."""
    ledger = row["ledger"]
    return {
        "fedray_rounds": 1,
        "fedray_clients": ledger["folded"],
        "fedray_images": row["images"],
        "fedray_down_bytes": row["bytes_down"],
        "fedray_up_bytes": row["bytes_up"],
        "fedray_failed_clients": ledger["failed"],
        "fedray_retried_clients": ledger["retried"],
        "fedray_lost_actors": ledger["actors_lost"],
        "fedray_lost_nodes": ledger["nodes_lost"],
        "fedray_lost_seconds": ledger["seconds_lost"],
    }


def at_nodes(row: Row) -> dict[str, dict[str, float]]:
    """Return what a row adds to each of `BY_NODE`, by node."""
    seconds = row["seconds"]["round"]
    return {
        node: {
            "fedray_busy_seconds": there["seconds"],
            "fedray_waiting_seconds": max(0.0, there["actors"] * seconds - there["seconds"]),
        }
        for node, there in row["nodes"].items()
    }


def measured(row: Row) -> dict[str, float | None]:
    """Return the levels of `GAUGES` after a row."""
    seconds = row["seconds"]["round"]
    return {
        "fedray_loss": row["loss"],
        "fedray_round_seconds": seconds,
        "fedray_clients_per_second": row["ledger"]["folded"] / seconds,
        "fedray_actors": sum(there["actors"] for there in row["nodes"].values()),
        "fedray_nodes": len(row["nodes"]),
    }
