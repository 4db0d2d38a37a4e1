"""Optimizers of the flat vector: one kernel a step."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedray.errors import UserError, check_name, reason
from fedray.lazy import torch

LR_SCHEDULERS = (
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
)  # fmt: skip
SHORT = {"adamw": "AdamW", "adam": "Adam", "sgd": "SGD"}
REFUSED = {"LBFGS": "calls the loss many times a step", "SparseAdam": "is for sparse gradients"}


@dataclass(frozen=True)
class Optimizer:
    """A class of `torch.optim` by name, and options by name, as its constructor takes them."""

    name: str = "adamw"
    options: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Optimizer:
        """Make an optimizer from a short form, as `sgd:momentum=0.9:nesterov=true`. Raises `UserError`."""
        name, *words = text.split(":")
        options = []
        for word in words:
            key, equals, value = word.partition("=")
            if not equals:
                raise UserError(f"optimizer {text!r}: say {word!r} by name (the form is {name}:OPTION=VALUE).")
            options.append((key, _value(value)))
        optimizer = cls(name, tuple(options))
        optimizer.make([torch.nn.Parameter(torch.zeros(1))], 0.1, {})
        return optimizer

    def __str__(self) -> str:
        return ":".join([self.name, *(f"{key}={str(value).lower()}" for key, value in self.options)])

    @property
    def cls(self) -> type[torch.optim.Optimizer]:
        """The class of `torch.optim`. Raises `UserError` where there is none, or it does not fit."""
        name = SHORT.get(self.name, self.name)
        known = {each for each, kind in vars(torch.optim).items() if _is_optimizer(kind)}
        check_name("optimizer", name, [*SHORT, *sorted(known - set(SHORT.values()))] if name not in known else [name])
        if name in REFUSED:
            raise UserError(f"optimizer {name} {REFUSED[name]}, which local training does not do; choose another.")
        return getattr(torch.optim, name)

    @property
    def offers(self) -> frozenset[str]:
        """Properties that an algorithm may require: "plain sgd" where a step is w − η g; "sgd" also with momentum."""
        if self.name not in ("sgd", "SGD") or not {key for key, _ in self.options} <= {"momentum"}:
            return frozenset()
        return frozenset({"sgd"} if self.options else {"sgd", "plain sgd"})

    def make(
        self, vectors: list[torch.nn.Parameter], learning_rate: float, adam: Mapping[str, Any]
    ) -> torch.optim.Optimizer:
        """Make the optimizer of these vectors.

        Args:
            adam: options of adamw and adam, where ours do not say otherwise.

        Raises:
            UserError: the class does not take these options.
        """
        cls = self.cls
        options = (dict(adam) if cls in (torch.optim.AdamW, torch.optim.Adam) else {}) | dict(self.options)
        if "fused" in inspect.signature(cls).parameters:
            options = {"fused": True} | options
        try:
            return cls(vectors, lr=learning_rate, **options)  # type: ignore[call-arg]
        except (TypeError, ValueError) as error:
            raise UserError(f"optimizer {self}: {reason(error)}.") from None


def _is_optimizer(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer


def _value(text: str) -> Any:
    """Convert a word to the value that it spells: a number, true or false, or text."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
