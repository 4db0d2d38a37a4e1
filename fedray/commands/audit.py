"""fedray audit: what a run's model, its clients' uploads and its samples tell of the images that it was trained on."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro
from rich.console import Console
from rich.table import Table

from fedray.commands.sample import Draw, model_of
from fedray.commands.terminal import progress
from fedray.config import Config
from fedray.errors import UserError
from fedray.files import write
from fedray.forms import files_named
from fedray.record.run import Run
from fedray.storage import upload

if TYPE_CHECKING:
    from fedray.federation.copying import Copies
    from fedray.federation.plan import Plan
    from fedray.federation.pool import Pool
    from fedray.federation.uploads import Uploads
    from fedray.federation.worker import Shared
    from fedray.scores.canaries import Leak
    from fedray.scores.membership import Interval, Membership, Rate

Row = tuple[str, str, str, str]


@dataclass(frozen=True, kw_only=True)
class Audit(Draw):
    """Attack a run: are images that it was trained on told from images held out, by its model, by clients' uploads, or
    by copies among its samples? Canaries (--canaries of `fedray train`) also bound ε from below."""

    run: tyro.conf.Positional[Path]
    """Directory of the run, or its URL; it needs images that nobody trained on (--test-share)."""
    images: int = 1000
    """How many images of each kind to compare, at most; of a client, too."""
    clients: int = 10
    """How many clients' uploads to attack, at most: each trains for one more round; 0 for none."""
    samples: int = 256
    """How many images to sample, and to compare with those trained on; 0 for none."""


def main(arguments: list[str]) -> None:
    """Parse and run `fedray audit`."""
    options = tyro.cli(Audit, args=arguments, prog="fedray audit")
    for name, least in {"images": 2, "clients": 0, "samples": 0}.items():
        if getattr(options, name) < least:
            raise UserError(f"--{name} {getattr(options, name)}: it must be at least {least}.")
    run = Run.open(options.run)
    config = options.settings(run.config_with(files_named(arguments)))
    config.check()

    from fedray.cluster.pool import open_pool  # Ray and torch take seconds to import: mistakes are told before
    from fedray.federation.audit import audit, audit_canaries
    from fedray.federation.plan import make_plan
    from fedray.federation.uploads import audit_uploads, masked, ongoing

    plan, config = make_plan(config), ongoing(config)
    run.check_data({name: value for name, value in plan.data.items() if name != "features"})
    result: dict[str, Any] = {}
    with open_pool(config, plan.dataset) as pool, progress(config.rounds) as (_, show):
        model = model_of(run.directory, config)
        found, about = audit(pool, model, plan, run.rows, options.seed, options.images, show)
        rows, result = _of_model(found), found._asdict() | {"rates": by_text(found.rates)} | about
        hidden = masked(config)
        if options.clients and not hidden:
            limits = options.clients, options.images
            uploads = audit_uploads(pool, config, plan, run, limits, options.seed, show)
            rows, result = (
                rows + _of_uploads(uploads),
                result | {"uploads": uploads._asdict() | {"rates": by_text(uploads.rates)}},
            )
        canaries = audit_canaries(pool, model, plan, config.delta, options.seed, show)
        if canaries is not None:
            proved = spent(run, config, plan)
            rows += _of_canaries(canaries, proved)
            attack = canaries.attack._asdict() | {"rates": by_text(canaries.attack.rates)}
            result["canaries"] = canaries._asdict() | {"attack": attack, "count": config.canaries, "proved": proved}
        if options.samples:
            copied = _copies(options, run, config, plan, pool, model)
            rows += _of_copies(copied)
            named = ("share", "deviation", "expected", "p")
            result["copies"] = {where: {name: getattr(each, name) for name in named} for where, each in copied.items()}
    table = Table("attack", "value", "95 % interval", "without a leak", title_justify="left")
    kinds = f"{about['trained_on']:,} images trained on, {about['not_trained_on']:,} held out"
    table.title = f"{run}: {kinds}, each at {about['draws']} timesteps and noises"
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    if options.clients and hidden:
        print("uploads   masked: the server sees uniform numbers, and learns their sum")
    if len(found.rates) < 2:
        print("lower rates of false positives need more images that nobody trained on (1,000 for 0.1 %)")
    write(run.directory / "audit.json", json.dumps(result, indent=1) + "\n")
    for name in ("audit.json", *(f"audit-{where}.png" for where in result.get("copies", ()))):
        upload(run.directory / name)
        print(f"audit     {run}/{name}")


def by_text(rates: dict[float, Any]) -> dict[str, Any]:
    """Return rates by what JSON can have for names."""
    return {str(rate): share for rate, share in rates.items()}


def spent(run: Run, config: Config, plan: Plan) -> float | None:
    """Return the ε at δ that a run's noise proves of a canary; None without noise.

    With noise on sums a canary is a client, which `dpsgd` beside it does not hide; else it is an example.
    """
    if plan.release is not None:
        from fedray.record.spending import Spending

        return Spending(run.directory, plan.release, config.delta, None).spent()["epsilon"]
    if not config.method.hides_examples:
        return None
    from fedray.federation.budget import example_spending

    ledger = example_spending(config, plan.example_noise, plan.shards.sizes, run.directory)
    found: float | None = ledger.report(config.secure_noise)["epsilon"]
    return found


def _copies(options: Audit, run: Run, config: Config, plan: Plan, pool: Pool, model: Shared) -> dict[str, Copies]:
    """Look for copies, and save pictures of the samples nearest to images trained on."""
    from fedray.federation.copying import audit_copies
    from fedray.federation.evaluation import Scoring, open_reference, scored
    from fedray.federation.personal import by_clients
    from fedray.record.pictures import draw_audit

    scoring = Scoring.of(config)
    features = None if scoring is None else open_reference(scoring, plan.dataset, pool).features
    sampling = replace(scored(config, options.samples, plan.dataset), seed=options.seed)
    sampling = by_clients(sampling, config, run, run.complete_rounds)
    found = audit_copies(pool, model, plan, run.rows, sampling, features)
    for where, each in found.items():
        draw_audit(run.directory / f"audit-{where}.png", each.images, each.nearest)
    return found


def _of_model(found: Membership) -> list[Row]:
    first = ("model: area under the curve", f"{found.auc[0]:.3f}", _interval(found.auc), f"0.5 (p {found.p:.2g})")
    return [first, *_of_rates("model", found.rates)]


def _of_rates(of: str, rates: dict[float, Rate]) -> list[Row]:
    return [
        (
            f"{of}: true positives at {rate:.1%} false ones",
            f"{value:.2%}",
            f"{low:.2%} to {high:.2%}",
            f"{rate:.1%} (p {p:.2g})",
        )
        for rate, (value, low, high, p) in rates.items()
    ]


def _of_uploads(found: Uploads) -> list[Row]:
    value, likely = f"{found.auc[0]:.3f}", f"0.5 (p {found.p:.2g})"
    client, largest = max(found.clients.items(), key=lambda item: item[1])
    return [
        (f"uploads of {len(found.clients)} clients: mean area", value, _interval(found.auc), likely),
        (f"uploads: largest area (client {client})", f"{largest:.3f}", "", f"p {found.p_largest:.2g}"),
        *_of_rates("uploads", found.rates),
    ]


def _of_canaries(found: Leak, proved: float | None) -> list[Row]:
    auc, upper = found.attack.auc, "no noise proves one" if proved is None else f"at most {proved:.3g} is proved"
    ranks = 2**found.most
    guess = found.most - math.lgamma(ranks + 1) / math.log(2) / ranks  # the mean over all ranks
    return [
        ("canaries: area under the curve", f"{auc[0]:.3f}", _interval(auc), f"0.5 (p {found.attack.p:.2g})"),
        (
            f"canaries: exposure, of {found.most:.2f} bits at most",
            f"{found.exposure[0]:.2f}",
            _interval(found.exposure),
            f"{guess:.2f} (p {found.p:.2g})",
        ),
        ("canaries: ε is at least (99.9 %)", f"{found.epsilon:.3g}", "", f"0; {upper}"),
    ]


def _of_copies(found: dict[str, Copies]) -> list[Row]:
    rows = []
    for where, each in found.items():
        guess = f"{each.expected:.0%} of held-out images (p {each.p:.2g})"
        rows.append((f"copies, by {where}", f"{each.share:.1%}", f"± {1.96 * each.deviation:.1%}", guess))
    return rows


def _interval(of: Interval) -> str:
    return "" if of[1] is None else f"{of[1]:.3f} to {of[2]:.3f}"
