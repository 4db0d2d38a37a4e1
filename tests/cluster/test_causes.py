"""What Ray's errors mean for the work of an actor; they are made as Ray makes them."""

import pytest
from ray.core.generated.common_pb2 import ActorDiedErrorContext, NodeDeathInfo
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    ObjectLostError,
    OutOfMemoryError,
    OwnerDiedError,
    RayTaskError,
)

from fedray.cluster import ends
from fedray.federation.causes import Cause


def died(said, **death):
    return ActorDiedError(
        ActorDiedErrorContext(error_message=said, actor_id=bytes(16), node_death_info=NodeDeathInfo(**death))
    )


TAKEN = NodeDeathInfo.AUTOSCALER_DRAIN_PREEMPTED
GONE = "The actor is dead because its node has died. Node Id: 1234"
LOST = ("00" * 28, None, "")  # of an object, its owner, where it was made


@pytest.mark.parametrize(
    ("error", "node", "cause", "said"),
    [
        (died("The actor died unexpectedly"), "here", Cause.ACTOR, ends.ENDED),
        (ActorUnavailableError("no answer", None), "here", Cause.ACTOR, "is unavailable: no answer"),
        (OutOfMemoryError("1 worker(s) were killed"), "here", Cause.MEMORY, "Ray ended its process, since the memory"),
        (died(GONE, reason=NodeDeathInfo.UNEXPECTED_TERMINATION), "there", Cause.NODE, "its node there died"),
        (died("gone", reason=TAKEN), "there", Cause.PREEMPTION, "its node there was taken away"),
        (ObjectLostError(*LOST), "there", Cause.NODE, "its node there died"),
        (OwnerDiedError(*LOST), "there", Cause.NODE, "its node there died"),
        (ObjectLostError(*LOST), "here", Cause.ACTOR, ""),
        (ActorDiedError(RayTaskError("__init__", "no GPU", ValueError())), "", Cause.START, "no GPU"),
    ],
)
def test_each_error_has_its_cause(monkeypatch, error, node, cause, said):
    monkeypatch.setattr(ends, "alive", lambda: {"here": {}})
    lost = ends.explain(error, node)
    assert lost.cause == cause
    assert said in str(lost)
