"""Partitions: which client holds which examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedray.data.dataset import Dataset
from fedray.errors import UserError
from fedray.lazy import torch


@dataclass(frozen=True, eq=False)
class Shards:
    """The examples of every client as two arrays, however many clients there are.

    indices: int64 [n], examples in the order of their owners;  offsets: int64 [clients + 1].
    """

    indices: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, parts: Sequence[np.ndarray]) -> Shards:
        """Make shards of each client's examples."""
        offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts])])
        return cls(np.concatenate(parts), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, client: int) -> np.ndarray:
        """Return one client's examples, as indices into the dataset."""
        return self.indices[self.offsets[client] : self.offsets[client + 1]]

    @property
    def sizes(self) -> np.ndarray:
        """Examples per client, int64 [clients]."""
        return np.diff(self.offsets)


def hold_out(shards: Shards, shares: tuple[float, ...], rng: torch.Generator) -> list[Shards]:
    """Hold out shares of each client's examples. Returns the `Shards` left for training, then one for each share.

    A share that is no whole number of a client's examples is rounded up or down by a draw, so that all clients together
    hold out that share (systematic sampling): of 4 examples a tenth is one at four clients of ten. Each client keeps at
    least one to train on.

    Raises:
        UserError: there are too few examples to hold out any.
    """
    if not any(shares):  # a million clients need no loop
        nobodys = Shards(shards.indices[:0], np.zeros_like(shards.offsets))
        return [shards, *[nobodys] * len(shares)]
    orders = [order[_permutation(len(order), rng)] for order in map(shards.__getitem__, range(len(shards)))]
    begins = torch.rand(len(shares), generator=rng, dtype=torch.float64).numpy()
    ends = [np.diff(np.floor(share * shards.offsets + begin)) for share, begin in zip(shares, begins, strict=True)]
    kept: list[list[np.ndarray]] = [[] for _ in range(1 + len(shares))]
    for client, order in enumerate(orders):
        counts = [int(end[client]) for end in reversed(ends)]
        while sum(counts) >= len(order):  # each share was rounded up
            counts[int(np.argmax(counts))] -= 1
        *apart, train = np.split(order, np.cumsum(counts))
        for part, examples in zip(kept, [train, *reversed(apart)], strict=True):
            part.append(examples)
    for share, parts in zip(shares, kept[1:], strict=True):
        if share and not any(map(len, parts)):
            raise UserError(
                f"a share of {share:g} of {len(shards.indices)} examples at {len(shards)} clients is to be held out, "
                f"and that is none; raise --held-out-share (or --test-share), or choose another --partition."
            )
    return [Shards.of(parts) for parts in kept]


class Partition:
    """A division of the examples among clients. Derive from it, as a frozen dataclass."""

    def split(self, dataset: Dataset, clients: int, rng: torch.Generator) -> Shards:
        """Deal all examples to `clients` clients, each at least one."""
        raise NotImplementedError


@dataclass(frozen=True)
class IID(Partition):
    """Examples shuffled and cut into equal parts."""

    def split(self, dataset: Dataset, clients: int, rng: torch.Generator) -> Shards:
        each, more = divmod(len(dataset), clients)
        sizes = each + (np.arange(clients) < more)
        return Shards(_permutation(len(dataset), rng), np.concatenate([[0], np.cumsum(sizes)]))


@dataclass(frozen=True)
class Quantity(Partition):
    """Examples shuffled and cut into parts of sizes drawn from Dir(α): the smaller α, the more skewed the sizes.

    Li et al. 2022 (arXiv:2102.02079), "quantity skew". A client that would get nothing takes one example.
    """

    alpha: float

    def __post_init__(self) -> None:
        _check_alpha("quantity", self.alpha)

    def split(self, dataset: Dataset, clients: int, rng: torch.Generator) -> Shards:
        shares = _dirichlet(self.alpha, clients, rng)[0]
        return Shards.of(_none_empty(np.split(_permutation(len(dataset), rng), _cuts(shares, len(dataset)))))


@dataclass(frozen=True)
class ByLabel(Partition):
    """Examples sorted by label and cut into equal parts: each client sees as few labels as possible.

    McMahan et al. 2017, section 3, with one part per client instead of two.
    """

    name = "by-label"

    def split(self, dataset: Dataset, clients: int, rng: torch.Generator) -> Shards:
        return ByAttribute("label").split(dataset, clients, rng)


@dataclass(frozen=True)
class ByAttribute(Partition):
    """The same as by-label, by any column: "Smiling" gives clients who smile and clients who do not."""

    name = "by-attribute"

    column: str

    def split(self, dataset: Dataset, clients: int, rng: torch.Generator) -> Shards:
        order = _permutation(len(dataset), rng)
        values, codes = np.unique(dataset.column(self.column), return_inverse=True)
        _check_values("by-label" if self.column == "label" else f"by-attribute:{self.column}", values, clients)
        return Shards.of(np.array_split(order[np.argsort(codes[order], kind="stable")], clients))


@dataclass(frozen=True)
class ByFolder(Partition):
    """A folder is a client: all examples of one folder (or identity, where there are any) have one owner.

    With fewer clients than folders, shuffled folders are dealt to the clients in turn.
    """

    name = "by-folder"

    def split(self, dataset: Dataset, clients: int, rng: torch.Generator) -> Shards:
        column = "identity" if "identity" in dataset.columns else "folder"
        folders, owned = np.unique(dataset.column(column), return_inverse=True)
        if clients > len(folders):
            raise UserError(f"--clients {clients}: partition by-folder has only {len(folders)} to deal, by {column}.")
        dealt = np.arange(len(folders)) % clients
        if clients < len(folders):
            dealt = dealt[_permutation(len(folders), rng)]
        return Shards.of(_by_owner(np.arange(len(dataset)), dealt[owned], clients))


@dataclass(frozen=True)
class Dirichlet(Partition):
    """Each label's examples are dealt in proportions drawn from Dir(α): the smaller α, the more skewed.

    Hsu, Qi and Brown 2019 (arXiv:1909.06335), with the draw per label (Yurochkin et al. 2019), so that every
    example has one owner. A client that would get nothing takes one example from the largest. `column` names any
    column in place of the label.
    """

    alpha: float
    column: str = "label"

    def __post_init__(self) -> None:
        _check_alpha("dirichlet", self.alpha)

    def split(self, dataset: Dataset, clients: int, rng: torch.Generator) -> Shards:
        labels, codes = np.unique(dataset.column(self.column), return_inverse=True)
        _check_values(f"dirichlet:{self.alpha:g}", labels, clients)
        sorted_by_label = np.split(np.argsort(codes, kind="stable"), np.cumsum(np.bincount(codes))[:-1])
        order, owners = [], []
        for members, shares in zip(sorted_by_label, _dirichlet(self.alpha, clients, rng, len(labels)), strict=True):
            order.append(members[_permutation(len(members), rng)])
            sizes = np.diff(_cuts(shares, len(members)), prepend=0, append=len(members))
            owners.append(np.repeat(np.arange(clients), sizes))
        return Shards.of(_none_empty(_by_owner(np.concatenate(order), np.concatenate(owners), clients)))


def _permutation(n: int, rng: torch.Generator) -> np.ndarray:
    return torch.randperm(n, generator=rng).numpy()


def _check_alpha(partition: str, alpha: float) -> None:
    if not 0 < alpha <= 1e6:
        raise UserError(f"partition {partition}:{alpha:g}: alpha must be above 0 and at most a million.")


def _check_values(partition: str, values: np.ndarray, clients: int) -> None:
    """Raise `UserError` where all examples are alike: such a partition would divide by nothing."""
    if len(values) == 1 and clients > 1:
        raise UserError(
            f"--partition {partition}: all examples have the same value ({values[0]}); put the images of each label "
            f"into a folder, list labels in metadata.csv, or say where file names have them (--label-pattern)."
        )


def _dirichlet(alpha: float, clients: int, rng: torch.Generator, draws: int = 1) -> np.ndarray:
    """Draw shares [draws, clients] by NumPy, seeded from our generator: torch's draw gives NaN for small α."""
    numpy_rng = np.random.default_rng(int(torch.randint(2**62, (), generator=rng)))
    return numpy_rng.dirichlet(np.full(clients, alpha), draws)


def _cuts(shares: np.ndarray, n: int) -> np.ndarray:
    """Return the positions that cut n examples into these shares."""
    return np.rint(np.cumsum(shares)[:-1] * n).astype(np.int64)


def _by_owner(examples: np.ndarray, owners: np.ndarray, clients: int) -> list[np.ndarray]:
    """Group examples by client, in the order given."""
    order = np.argsort(owners, kind="stable")
    return np.split(examples[order], np.cumsum(np.bincount(owners, minlength=clients))[:-1])


def _none_empty(parts: list[np.ndarray]) -> list[np.ndarray]:
    """Give each client without examples one of the largest client's."""
    for client, part in enumerate(parts):
        if len(part) == 0:
            largest = max(range(len(parts)), key=lambda other: len(parts[other]))
            parts[client], parts[largest] = parts[largest][:1], parts[largest][1:]
    return parts
