"""How fast does fedray train on one GPU, beside a plain diffusers loop and beside what the GPU can do?

    python experiments/bench/gpu.py --out gpu.json
    python experiments/bench/gpu.py --small --device cpu        # tries the script, on a machine without a GPU

The paper's U-Net (preset celeba, 113,673,219 parameters) on generated images of 64×64: training images per second of a
plain loop as in diffusers' train_unconditional.py, of fedray's own client job, and of other ways to write the loop.
Each measurement is printed as a line of a Markdown table, and is in the JSON file, as soon as it is made; what no
longer fits into --budget seconds is named and left out. Rounds of several actors are gpu_rounds.py's.
"""

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from device import WARM, Bench, Options
from torch.utils.flop_counter import FlopCounterMode

from fedray.federation import modes
from fedray.federation.local import TrainJob, client_update
from fedray.federation.plan import Plan, make_plan
from fedray.federation.worker import Shared, Worker, do
from fedray.tasks import graphs
from fedray.vector import FlatParameters, sha256

PRECISION = {"float32": None, "tf32": None, "bf16": torch.bfloat16}


def tf32(allowed: bool) -> None:
    """Let convolutions multiply in TF32, as torch does by default, or not; matrix products never do."""
    torch.backends.cudnn.allow_tf32 = allowed
    torch.backends.cuda.matmul.allow_tf32 = False
    have_jobs_set("allow_tf32", allowed)


def have_jobs_set(name: str, value: bool) -> None:
    """Have fedray's jobs set one of torch's flags to another value than they do."""
    modes.FLAGS = tuple((where, each, value if each == name else was) for where, each, was in modes.FLAGS)


# What the GPU can do


def ceilings(bench: Bench) -> None:
    """Measure the largest rates: of a matrix product, and of a copy."""
    n = 256 if bench.options.small else 8192
    a, b = (torch.randn(n, n, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    rates = [2 * n**3 / seconds for seconds in bench.windows(lambda: a @ b, seconds=0.3)]
    bench.ceiling = statistics.median(rates)
    bench.add(f"bf16 matrix product, {n}³", "TFLOP/s", [rate / 1e12 for rate in rates])
    source = torch.randn(n * n * 4, device=bench.device)
    target = torch.empty_like(source)
    times = bench.windows(lambda: target.copy_(source), seconds=0.2)
    bench.add("copy, bytes read and written", "TB/s", [2 * source.nbytes / seconds / 1e12 for seconds in times])
    unet = network(bench)
    x = torch.randn(1, bench.task.channels, bench.task.resolution, bench.task.resolution, device=bench.device)
    with FlopCounterMode(display=False) as forward:
        out = unet(x, 7).sample
    with FlopCounterMode(display=False) as backward:
        out.square().mean().backward()
    counts = [count.get_total_flops() / 1e9 for count in (forward, backward)]
    bench.operations = sum(counts) * 1e9
    size = sum(parameter.numel() for parameter in unet.parameters())
    bench.add(f"U-Net of {size:,} parameters, forward and backward", "GFLOP/image", [sum(counts)], parts=counts)


def network(bench: Bench) -> Any:
    """Build the paper's U-Net on the device."""
    with bench.device:
        return bench.task.unet()


# Training steps


@dataclass(frozen=True)
class Variant:
    """A plain training loop."""

    what: str
    flat: bool = False
    """Parameters as views of one vector, one fused AdamW over it, as fedray has them."""
    compiler: dict[str, bool] | None = None
    """Options of torch.compile; None does not compile."""
    last: bool = False
    """Images channels-last, and so what is made of them."""


def plain_step(bench: Bench, variant: Variant, precision: str, batch: int) -> Callable[[], None]:
    """Make the step of a loop as in diffusers' train_unconditional.py, with images in the CPU's memory."""
    task, config, device = bench.task, bench.config, bench.device
    unet = network(bench)
    flat = FlatParameters(unet) if variant.flat else None
    parameters = list(unet.parameters()) if flat is None else [flat.vector]
    options: dict[str, Any] = ({} if flat is None else {"fused": True}) | config.adam
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, **options)
    scheduler, dtype = task.scheduler(), PRECISION[precision]
    images = task.dataset().images
    order, at = torch.randperm(len(images)), 0
    if variant.compiler is not None:
        unet.compile(dynamic=False, options=variant.compiler)

    def step() -> None:
        nonlocal at
        chosen = order[at : at + batch].numpy()
        at = (at + batch) % len(images)
        clean = torch.from_numpy(images[chosen]).to(device).float() / 127.5 - 1
        timesteps = torch.randint(1000, (batch,), device=device)
        noise = torch.randn(clean.shape, device=device)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        if variant.last:
            noisy = noisy.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            predicted = unet(noisy, timesteps).sample
        F.mse_loss(predicted.float(), noise).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if flat is None:
            optimizer.zero_grad()
        else:
            flat.gradient.zero_()

    return step


def measure_plain(bench: Bench, variant: Variant, precision: str, batch: int) -> None:
    tf32(precision == "tf32")
    with bench.fresh() as peak:
        times = bench.windows(plain_step(bench, variant, precision, batch))
        rates = [batch / seconds for seconds in times]
        bench.rates.setdefault((batch, precision), statistics.median(rates))
        what = f"{variant.what}, {precision}, batch {batch}"
        bench.add(what, "images/s", rates, batch=batch, precision=precision, peak_bytes=peak())


class Ours:
    """fedray's own client job, in this process, on the paper's U-Net."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.plan: Plan = make_plan(bench.config)
        self.worker = Worker(bench.config, bench.device, "bench")
        self.worker.dataset = self.plan.dataset

    def train(self, precision: str, batch: int, steps: int, stepped: Callable[[int], None]) -> tuple[Any, Any]:
        """Do a job of so many steps; `stepped` is called after each. Return the client's row and its reply."""
        plan, worker = self.plan, self.worker
        mixed = "no" if PRECISION[precision] is None else precision
        worker.config = replace(self.bench.config, mixed_precision=mixed, train_batch_size=batch, local_steps=steps)
        count = itertools.count(1)
        worker.on_step = lambda _: stepped(next(count))
        job = TrainJob(0, 0, plan.shards[0], plan.held_out[0])
        shared = Shared({"model": plan.initial.numpy()}, plan.round(worker.config, 0))
        row, reply = do(worker, client_update, shared, job)
        if "error" in row:
            raise RuntimeError(row["trace"])
        return row, reply

    def measure(self, precision: str, batch: int) -> None:
        """Time the steps inside of a job, and what the job takes beside them."""
        bench, marks = self.bench, list[float]()
        tf32(precision == "tf32")
        wanted = bench.options.seconds * bench.rates[batch, "float32" if precision == "tf32" else precision] / batch
        count = max(2 if bench.options.small else 10, round(wanted))
        steps = WARM + count * bench.options.repeats

        def stepped(done: int) -> None:
            if done >= WARM and (done - WARM) % count == 0:
                bench.sync()
                marks.append(time.perf_counter())

        with bench.fresh() as peak:
            row, _ = self.train(precision, batch, steps, stepped)
            rates = [batch * count / (after - before) for before, after in zip(marks, marks[1:], strict=False)]
            about: dict[str, Any] = {"batch": batch, "precision": precision, "peak_bytes": peak()}
        beside = row["seconds"] - steps * batch / statistics.median(rates)
        name = {"tf32": "float32 with torch's TF32 convolutions"}.get(precision, precision)
        name += "" if self.worker.graphs else ", kernel by kernel"
        bench.add(f"**fedray's client**, {name}, batch {batch}", "images/s", rates, job_seconds=beside, **about)

    def repeat(self, precision: str, batch: int) -> None:
        """Count the models of four equal jobs: two of single kernels, two of a graph."""
        tf32(True)
        made = []
        for self.worker.graphs in (False, True, False, True):
            payload = self.train(precision, batch, 4, lambda done: None)[1].payload
            made.append(sha256(torch.from_numpy(payload["model"])))
        what = f"different models of 4 equal jobs, {precision}, batch {batch}"
        self.bench.add(what, "models", [float(len(set(made)))], sha256=made)


# All of it

COMPILED = Variant("flat vector, torch.compile", flat=True, compiler={})
VARIANTS = (
    COMPILED,
    replace(COMPILED, what="flat vector, torch.compile, channels-last images", last=True),
    replace(COMPILED, what="flat vector, torch.compile, CUDA graph", compiler={"triton.cudagraphs": True}),
)


def training(bench: Bench) -> None:
    """Measure steps: plain loops, fedray's client, variants."""
    script = Variant("plain diffusers loop")
    for batch in bench.batches:
        for precision in ("float32", "bf16"):
            measure_plain(bench, script, precision, batch)
    ours = Ours(bench)
    for batch in bench.batches:
        for precision in ("tf32", "bf16"):
            for ours.worker.graphs in (False, True):
                ours.measure(precision, batch)
    ours.repeat("bf16", bench.batches[0])
    graphs.release()
    del ours
    for batch in reversed(bench.batches):
        for variant in VARIANTS:
            if bench.left(45, f"{variant.what}, bf16, batch {batch}"):
                torch.compiler.reset()
                measure_plain(bench, variant, "bf16", batch)


def main(options: Options) -> None:
    """Measure."""
    bench = Bench.start(options)
    print("\n| what | median | range | unit | of the bf16 ceiling | GiB |\n|---|---|---|---|---|---|")
    ceilings(bench)
    training(bench)
    bench.end()


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
