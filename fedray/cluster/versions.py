"""The same versions on all nodes: whatever differs is told before anything starts."""

from collections.abc import Mapping

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fedray.cluster.ends import last_line
from fedray.cluster.nodes import SHORT, alive
from fedray.errors import UserError
from fedray.record.provenance import versions

ANSWER = 60.0  # seconds for nodes to say what they have; of one that does not, its actors will


def check_versions(label: str | None = None) -> None:
    """Ask all nodes of the cluster but this one, or those with a label, for their versions.

    Raises:
        UserError: a node has other versions than this process, or lacks fedray.
    """
    asked = {}
    for node in alive(label).keys() - {ray.get_runtime_context().get_node_id()}:
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        asked[ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(versions).remote()] = node
    for ref in ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER)[0] if asked else ():
        node = asked[ref]
        try:
            found = ray.get(ref, timeout=ANSWER)
        except RayError as error:
            if node not in alive():
                continue
            raise UserError(
                f"node {node[:SHORT]} cannot run fedray: {last_line(error)}; install the same versions on all nodes."
            ) from None
        if differs := difference(found):
            raise UserError(f"node {node[:SHORT]} has {differs}; install the same versions on all nodes.")


def difference(there: Mapping[str, str]) -> str:
    """Say which versions of another process differ from those of this one, "" if none does."""
    here = versions()
    differing = [name for name in here if there.get(name) != here[name]]
    return ", ".join(f"{name} {there.get(name)} where the driver has {here[name]}" for name in differing)
