"""The split exchange: of the clients of a round some send the encoder, the others what follows it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fedray.algorithms import Algorithm, Folded, Local, Round, Rows, Tensors
from fedray.errors import UserError
from fedray.lazy import torch
from fedray.vector import Layout
from fedray.vector.part import Part

ENCODER, REST = "model.encoder", "model.rest"


@dataclass(frozen=True)
class Split(Algorithm):
    """Every client trains the whole U-Net, and sends its encoder, or its bottleneck and decoder, each in ½ of rounds.

    FedDiffuse's USPLIT (de Goede et al. 2024, arXiv:2406.12575). Each part is averaged over those that sent it; one
    that nobody sent stays as it is. So about half of the bytes go up.

    encoder: regular expression (re.search) of the names of its parameters.
    """

    encoder: str = "^(conv_in|time_embedding|class_embedding|down_blocks)"

    def __post_init__(self) -> None:
        try:
            re.compile(self.encoder)
        except re.error as error:
            raise ValueError(f"{self.encoder!r} is no regular expression: {error}") from None

    @property
    def needs(self) -> dict[str, str]:
        return {
            "parts of uploads": "averages each part over the clients that sent it: use fold mean, median, trimmed or "
            "normbound, without clips and noise",
            "equal ranks": "sends parts of adapters of one rank: give one --rank",
        }

    @property
    def offers(self) -> frozenset[str]:
        return frozenset({"fixed coordinates"})  # but which part a client sends changes

    def init(self, model: torch.Tensor, layout: Layout) -> Tensors:
        encoder = self._encoder(layout)
        if not encoder.wanted or not encoder.rest.wanted:
            which = "no parameter" if not encoder.wanted else "every parameter"
            raise UserError(
                f"--algorithm split: its encoder ({self.encoder}) would be {which}; names are, for instance, "
                f"{layout.names[0]}."
            )
        return {"model": model}

    def broadcast(self, server: Tensors, round: Round) -> Tensors:
        encoder = self._encoder(round.layout)
        return {ENCODER: encoder.take(server["model"]), REST: encoder.rest.take(server["model"])}

    def receive(self, down: Tensors, round: Round) -> Tensors:
        return down | {"model": self._encoder(round.layout).join(down[ENCODER], down[REST])}

    def sent(self, client: int, round: Round) -> str:
        """Return which part a client sends."""
        return ENCODER if torch.rand((), generator=round.rng("split", client)).item() < 0.5 else REST

    def upload(self, local: Local, down: Tensors, memory: Tensors) -> tuple[Tensors, Rows, Tensors]:
        name, encoder = self.sent(local.client, local.round), self._encoder(local.round.layout)
        part = encoder if name == ENCODER else encoder.rest
        return {name: part.take(local.weights)}, {}, {}

    def aggregate(self, server: Tensors, folded: Folded, round: Round) -> Tensors:
        values = self.broadcast(server, round) | {name: folded.mean(name) for name in folded.sums}
        return server | {"model": self._encoder(round.layout).join(values[ENCODER], values[REST])}

    def diagnose(self, before: Tensors, after: Tensors, folded: Folded, round: Round) -> Rows:
        """Return nothing: what clients send are no whole adapters."""
        return {}

    def _encoder(self, layout: Layout) -> Part:
        return Part.of(layout, self.encodes)

    def encodes(self, name: str) -> bool:
        """Tell whether a parameter of that name is the encoder's."""
        return re.search(self.encoder, name) is not None
