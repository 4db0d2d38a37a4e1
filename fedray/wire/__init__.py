"""Messages between the server and clients pass through a chain of links; their bytes are counted at the end.

A message is a dictionary of named arrays of any dtype; its bytes are their sum. Without a lossy link, clients send
their tensors as they are. With one, in either direction, links see the difference from what the client received, the
fold adds these up, and the server adds their mean to its own exact model, once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedray.algorithms import Folded, Round, Tensors
from fedray.lazy import torch
from fedray.vector import as_tensor

Payload = dict[str, np.ndarray]
VALUES = "values"  # of what a link makes, what the next one sees


class Link:
    """One transform of messages, both halves of it. Derive from it, as a frozen dataclass.

    A link acts on the model, and on the other tensors that `tensors` names. What it makes of a vector is a vector of
    any dtype, or a dictionary of them: then the next link sees its "values", and the rest travels beside.
    """

    abstract = False  # not to be named by users
    lossy = False  # what arrives is not what was sent
    uniform = False  # clients must count alike, whatever the number of their examples
    coded = False  # what it makes are codes, not numbers: no link may follow
    sparse = False  # what it makes stands for other coordinates every time
    remembers = False  # its memory is about coordinates: no sparse link may come before
    diverges = False  # what arrives may be longer than what was sent: not to be corrected by feedback
    tensors: tuple[str, ...] = ("model",)

    @property
    def needs(self) -> Mapping[str, str]:
        """Requirements on the rest of a run: by name, the message for users where it is not met."""
        return {}

    @property
    def offers(self) -> frozenset[str]:
        """Properties that others may require."""
        return frozenset()

    def send(self, x: torch.Tensor, round: Round) -> torch.Tensor | Tensors:
        """Return the payload that goes down for a tensor [d] of the server's."""
        return x

    def arrive(self, payload: torch.Tensor | Tensors, round: Round) -> torch.Tensor:
        """Return the tensor [d] that a client restores from a payload."""
        assert isinstance(payload, torch.Tensor)
        return payload

    def encode(
        self, x: torch.Tensor, memory: Tensors, round: Round, client: int
    ) -> tuple[torch.Tensor | Tensors, Tensors]:
        """Return the payload that goes up for a client's tensor [d], and the client's next memory of this link."""
        return x, {}

    def decode(self, payload: torch.Tensor | Tensors, round: Round) -> torch.Tensor:
        """Return the tensor [d] to be folded, from a payload that came up."""
        assert isinstance(payload, torch.Tensor)
        return payload

    def finish(
        self, total: torch.Tensor, weight: float, round: Round, survivors: list[int]
    ) -> tuple[torch.Tensor, float]:
        """Complete the sum [d] of a round's tensors, float64, and its weight; return both."""
        return total, weight


@dataclass(frozen=True)
class Wire:
    """A chain of links, of which the first acts first; and another for the way down, where it is not the same.

    differences: clients send differences, whatever the links.
    """

    links: tuple[Link, ...] = ()
    down: tuple[Link, ...] | None = None
    differences: bool = False

    @property
    def lossy(self) -> bool:
        """True where clients send differences."""
        return self.differences or any(link.lossy for link in (*self.links, *(self.down or ())))

    @property
    def _down(self) -> tuple[Link, ...]:
        return self.links if self.down is None else self.down

    def send(self, down: Tensors, round: Round) -> Payload:
        """Return the message that goes down to every client."""
        message: Tensors = {}
        for name, x in down.items():
            for index, link in _of(self._down, name):
                x = _pack(message, f"{name}/{index}.", link.send(x, round))
            message[name] = x
        return _arrays(message)

    def arrive(self, payload: Payload, round: Round) -> Tensors:
        """Return what a client receives. It must not be written to."""
        return _unpack(self._down, payload, round, "arrive")

    def encode(self, tensors: Tensors, memory: Tensors, round: Round, client: int) -> tuple[Payload, Tensors]:
        """Return the message that a client sends, and what its links keep.

        Raises:
            FloatingPointError: a link would hide that values are not finite.
        """
        message: Tensors = {}
        kept: Tensors = {}
        for name, x in tensors.items():
            links = _of(self.links, name)
            if links and x.numel() and not all(map(math.isfinite, torch.aminmax(x))):
                raise FloatingPointError(f"the {name} that it sends is not finite (lower the learning rate?)")
            for index, link in links:
                prefix = f"link{index}.{type(link).__name__.lower()}/" + ("" if name == "model" else f"{name}/")
                own = {key.removeprefix(prefix): value for key, value in memory.items() if key.startswith(prefix)}
                made, after = link.encode(x, own, round, client)
                kept |= {prefix + key: value for key, value in after.items()}
                x = _pack(message, f"{name}/{index}.", made)
            message[name] = x
        return _arrays(message), kept

    def decode(self, payload: Payload, round: Round) -> Tensors:
        """Return the tensors to be folded, from a client's message."""
        return _unpack(self.links, payload, round, "decode")

    def finish(self, folded: Folded, sent: Tensors, round: Round) -> Folded:
        """Complete the sums; replace sums of differences from what was sent down by the model that they lead to."""
        for name in folded.sums:
            for _, link in reversed(_of(self.links, name)):
                done = link.finish(folded.sums[name], folded.weights[name], round, folded.survivors)
                folded.sums[name], folded.weights[name] = done
        if self.lossy:
            mean = folded.sums["model"] / folded.weights["model"]
            folded.sums["model"], folded.weights["model"] = sent["model"].double() + mean, 1
            for upload in folded.uploads:
                upload.tensors["model"] = sent["model"] + upload.tensors["model"]
        return folded


def counted(payload: Payload, uncounted: frozenset[str]) -> int:
    """Return the bytes of a message, without tensors that a deployment would not send."""
    return sum(array.nbytes for name, array in payload.items() if name not in uncounted)


def _of(links: tuple[Link, ...], name: str) -> list[tuple[int, Link]]:
    """Return the links that act on the tensor of that name, with their positions."""
    return [(index, link) for index, link in enumerate(links) if name in link.tensors]


def _unpack(links: tuple[Link, ...], payload: Payload, round: Round, verb: str) -> Tensors:
    message = {name: as_tensor(array) for name, array in payload.items()}
    tensors = {}
    for name in [name for name in message if not _beside(name, message)]:
        x = message[name]
        for index, link in reversed(_of(links, name)):
            prefix = f"{name}/{index}."
            beside = {key.removeprefix(prefix): each for key, each in message.items() if key.startswith(prefix)}
            x = getattr(link, verb)({VALUES: x, **beside} if beside else x, round)
        tensors[name] = x
    return tensors


def _pack(message: Tensors, prefix: str, made: torch.Tensor | Tensors) -> torch.Tensor:
    """Put what a link made beside the values into the message, and return the values."""
    if isinstance(made, torch.Tensor):
        return made
    message |= {prefix + key: value for key, value in made.items() if key != VALUES}
    return made[VALUES]


def _beside(name: str, message: Tensors) -> bool:
    """Tell whether an entry of a message stands beside a tensor's values, put there by a link: NAME/INDEX.KEY."""
    owner, _, rest = name.rpartition("/")
    return owner in message and rest.partition(".")[0].isdigit()


def _arrays(message: Tensors) -> Payload:
    return {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in message.items()}
