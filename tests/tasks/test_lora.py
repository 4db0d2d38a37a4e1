"""Adapters: counts, aggregation against float64, what is saved, and what users get wrong."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import made
import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from lora_payload import SD15
from peft import LoraConfig
from PIL import Image
from runs import fit
from safetensors.torch import load_file, save_file
from torch import nn

import fedray
from fedray.algorithms import Upload
from fedray.algorithms.fedavg import FedAvg
from fedray.algorithms.folds import Mean
from fedray.algorithms.lora import FFA, SVD, FedEx, Flora, RoLoRA
from fedray.cli import main
from fedray.errors import UserError
from fedray.federation.local import TrainJob, client_update
from fedray.federation.plan import make_plan
from fedray.federation.pool import LocalPool
from fedray.federation.steps import batch_of
from fedray.federation.worker import Shared, Worker, build
from fedray.presets import PRESETS
from fedray.record.run import Run
from fedray.seeds import generator
from fedray.tasks.embedded import prompt
from fedray.tasks.lora import PIPELINE, LoRA
from fedray.tasks.lora.learner import LoRALearner
from fedray.vector import FlatParameters
from fedray.vector.adapters import WeightedSum, adapters, product_norm
from fedray.wire.float16 import Float16

MEAN = Mean()


@pytest.fixture
def config(photos):
    """Two rounds of two steps in this process."""
    task = replace(PRESETS["digits-lora"].task, train_data_dir=str(photos), proportion_empty_prompts=0.0)
    return replace(
        PRESETS["digits-lora"], task=task, rounds=2, local_steps=2, train_batch_size=2, learning_rate=1e-3,
        lr_scheduler="constant", keep_optimizer=False, evaluate_samples=0, features=None, sampling_steps=2, actors=0,
    )  # fmt: skip


def train(config, out, **options):
    return fedray.run(config, out, **options)


# Counts


def test_the_papers_adapter_has_its_size():
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD15)
        whole = sum(parameter.numel() for parameter in unet.parameters())
        unet.requires_grad_(False)
        targets = list(LoRA.target_modules)
        unet.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=targets))
    trainable = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    assert whole == 859_520_964
    assert len(trainable) == 256
    assert sum(parameter.numel() for parameter in trainable) == 1_594_368


@pytest.mark.slow
@pytest.mark.parametrize("method", [FedAvg(), FFA(), SVD(), Flora()])
def test_bytes_are_those_of_what_travels(config, tmp_path, method):
    config = replace(config, algorithm=method, wire=(Float16(),))
    rows = train(config, tmp_path / "run").rows
    both = sum(load.numel() for load in load_file(adapter(config, tmp_path / "size")).values())
    sent = [int(row["bytes_up"] / 4) for row in rows]
    stacked = 0 if not isinstance(method, Flora) else config.clients * config.task.rank
    base = 4 * make_plan(config).adapters.base_length(stacked)
    if method == FFA():  # A and B differ in size where a layer is not square
        assert 0.4 * 2 * both < sent[0] < 0.6 * 2 * both
    else:
        assert sent == [2 * both, 2 * both]
    assert [row["bytes_down"] / 4 for row in rows] == [sent[0], sent[0] + base]


def adapter(config, out):
    plain = replace(config, algorithm=FedAvg(), rounds=1, wire=())
    return train(plain, out).directory / "model/pytorch_lora_weights.safetensors"


# Aggregation


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.tall = nn.Linear(24, 6), nn.Linear(6, 20)


def adapted(seed, rank=3, scale=2.0, frozen_a=False):
    from peft import inject_adapter_in_model

    torch.manual_seed(seed)
    module = Two().requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank * scale, target_modules=["wide", "tall"]), module)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(".lora_B." in name or (".lora_A." in name and not frozen_a))
    flat = FlatParameters(module)
    return module, flat, adapters(module, flat.layout, scale)


def clients(flat, count, seed=0):
    """Uploads of unequal example counts, float32."""
    rng = torch.Generator().manual_seed(seed)
    return [upload(k, torch.randn(flat.layout.size, generator=rng), 1 + 3 * k) for k in range(count)]


def upload(client, vector, examples):
    return Upload(client, {"model": vector}, {"model": examples})


def truth(uploads, what):
    """Σ w_i s B_i A_i per layer, in float64, from the definition."""
    total = sum(each.weights["model"] for each in uploads)
    sums = [torch.zeros(shape, dtype=torch.float64) for shape in what.shapes.values()]
    for each in uploads:
        for layer, (b, a) in enumerate(what.factors(each.tensors["model"])):
            sums[layer] += each.weights["model"] / total * what.scale * (b.double() @ a.double())
    return sums


def changes(server, what):
    """ΔW per layer of an aggregated state."""
    found = [what.scale * (b.double() @ a.double()) for b, a in what.factors(server["model"])]
    if "base" in server:
        found = [one + change.double() for one, change in zip(found, what.changes(server["base"]), strict=True)]
    return found


def fold(uploads, what):
    """The round of these uploads, and what the mean makes of them, folded in the order given."""
    round = made.round_of({each.client: each.weights["model"] for each in uploads}, what.layout, adapters=what)
    partial = MEAN.start(round)
    for each in uploads:
        partial = MEAN.add(partial, each, round)
    return MEAN.result(partial, round), round


def step(method, uploads, what, server=None):
    folded, round = fold(uploads, what)
    return method.aggregate(server or {"model": torch.zeros(what.layout.size)}, folded, round)


def relative(found, expected):
    return max(
        (torch.linalg.norm(a - b) / torch.linalg.norm(b)).item() for a, b in zip(found, expected, strict=True)
    )  # fmt: skip


@pytest.mark.parametrize(("method", "frozen"), [(FFA(), True), (Flora(), False)])
@pytest.mark.parametrize("count", [1, 4, 12])
def test_exact_methods_are_exact(method, frozen, count):
    _, flat, what = adapted(0, frozen_a=frozen)
    uploads = clients(flat, count)
    assert relative(changes(step(method, uploads, what), what), truth(uploads, what)) < 1e-6


def test_averages_of_a_and_b_apart_are_wrong_by_their_covariance():
    _, flat, what = adapted(0)
    uploads = clients(flat, 5)
    after, expected = step(FedAvg(), uploads, what), truth(uploads, what)
    total = sum(each.weights["model"] for each in uploads)
    for layer, (b_mean, a_mean) in enumerate(what.factors(after["model"])):
        lost = torch.zeros_like(expected[layer])
        for each in uploads:
            b, a = list(what.factors(each.tensors["model"]))[layer]
            lost += each.weights["model"] / total * what.scale * ((b - b_mean).double() @ (a - a_mean).double())
        found = what.scale * b_mean.double() @ a_mean.double()
        torch.testing.assert_close(expected[layer] - found, lost, rtol=1e-4, atol=1e-4)
    assert relative(changes(after, what), expected) > 0.1
    alone = clients(flat, 1)
    assert relative(changes(step(FedAvg(), alone, what), what), truth(alone, what)) < 1e-6


def test_svd_loses_the_tail_of_the_singular_values():
    _, flat, what = adapted(0, rank=3)
    uploads = clients(flat, 5)
    found, expected = changes(step(SVD(), uploads, what), what), truth(uploads, what)
    for one, other in zip(found, expected, strict=True):
        tail = torch.linalg.svdvals(other)[3:]
        assert torch.linalg.norm(one - other) == pytest.approx(tail.square().sum().sqrt().item(), rel=1e-4)
    alone = clients(flat, 1)
    assert relative(changes(step(SVD(), alone, what), what), truth(alone, what)) < 1e-5


@pytest.mark.parametrize("method", [FedAvg(), SVD(), Flora()])
def test_weights_are_examples_and_scales_are_kept(method):
    _, flat, what = adapted(0, scale=0.25)
    uploads = clients(flat, 3)
    twice = [upload(each.client, each.tensors["model"], 2 * each.weights["model"]) for each in uploads]
    first = changes(step(method, uploads, what), what)
    assert relative(changes(step(method, twice, what), what), first) < 1e-5
    equal = [upload(each.client, each.tensors["model"], 1) for each in uploads]
    assert relative(changes(step(method, equal, what), what), first) > 0.01
    absent = [*uploads, upload(9, torch.full((flat.layout.size,), 1e6), 0)]
    assert relative(changes(step(method, absent, what), what), first) < 1e-5
    turned = changes(step(method, uploads[::-1], what), what)
    assert relative(turned, first) < 1e-5


def test_flora_adds_to_the_base_and_starts_new_adapters():
    module, flat, what = adapted(0)
    first = step(Flora(), clients(flat, 3), what)
    second = step(Flora(), clients(flat, 3, seed=1), what, first)
    expected = [
        a + b for a, b in zip(truth(clients(flat, 3), what), truth(clients(flat, 3, seed=1), what), strict=True)
    ]  # fmt: skip
    assert relative(list(what.changes(second["base"].double())), expected) < 1e-6
    assert all(not b.any() and a.any() for b, a in what.factors(second["model"]))
    before = [module.wide.base_layer.weight.clone(), module.tall.base_layer.weight.clone()]
    for _ in range(2):  # set, not added
        what.change_base(module, second["base"])
    for layer, old, change in zip((module.wide, module.tall), before, what.changes(second["base"]), strict=True):
        torch.testing.assert_close(layer.base_layer.weight, (old + change).float())


@pytest.mark.parametrize("method", [FedAvg(), FFA(), SVD(), Flora()])
def test_the_error_in_the_row_is_the_error(method):
    _, flat, what = adapted(0, frozen_a=isinstance(method, FFA))
    uploads = clients(flat, 12)  # more directions than either layer has
    before = {"model": torch.zeros(flat.layout.size)}
    folded, round = fold(uploads, what)
    after = method.aggregate(before, folded, round)
    total = WeightedSum(what)
    for each in uploads:
        total.add(each.tensors["model"], each.weights["model"])
    for (left, right), expected in zip(total.factors(), truth(uploads, what), strict=True):
        torch.testing.assert_close(left @ right, expected)
        assert len(right) <= right.shape[1]
    errors = total.errors(before.get("base"), after["model"], after.get("base"))
    expected = [
        (torch.linalg.norm(a - b) / torch.linalg.norm(b)).item()
        for a, b in zip(changes(after, what), truth(uploads, what), strict=True)
    ]
    assert errors.tolist() == pytest.approx(expected, rel=1e-3, abs=1e-7)
    told = {"error_max": max(expected), "error_mean": np.mean(expected)}
    assert method.diagnose(before, after, folded, round) == pytest.approx(told, rel=1e-3, abs=1e-7)


def test_product_norm():
    left, right = torch.randn(30, 4, dtype=torch.float64), torch.randn(4, 50, dtype=torch.float64)
    assert product_norm(left, right) == pytest.approx(torch.linalg.norm(left @ right).item())


# Training


@pytest.mark.slow
def test_rows_tell_what_aggregation_loses(config, tmp_path):
    found = {}
    for method in (FedAvg(), FFA(), RoLoRA(), SVD(), FedEx(), Flora()):
        config = replace(config, algorithm=method, learning_rate=1e-2)
        found[type(method)] = train(config, tmp_path / type(method).__name__).rows[-1]["aggregation"]
    assert found[FedAvg]["error_max"] > 0.01
    assert 0 < found[SVD]["error_mean"] < found[FedAvg]["error_mean"]
    for exact in (FFA, RoLoRA, FedEx, Flora):
        assert found[exact]["error_max"] < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [FedAvg(), FFA(), SVD(), Flora()],
)
def test_stopped_and_resumed_and_on_actors_it_is_the_same_run(ray, config, tmp_path, method):
    config = replace(config, algorithm=method, rounds=3)
    whole = train(config, tmp_path / "whole").result["state_sha256"]
    rounds = fit(config, LocalPool(config), tmp_path / "run")
    next(rounds)
    rounds.close()
    moved = replace(config, actors=2 if method == FedAvg() else 0)
    assert train(moved, tmp_path / "run", resume=True).result["state_sha256"] == whole


@pytest.mark.slow
def test_floras_change_of_the_base_is_sent_once_a_round(ray, config, tmp_path, monkeypatch):
    """To training, validation, prompts and samples alike, of a run that goes on from its first round on actors."""
    from fedray.cluster import pool as ray_pool

    config = replace(config, algorithm=Flora(), rounds=3, held_out_share=0.25, evaluate_samples=4)
    whole = train(config, tmp_path / "whole").result["state_sha256"]
    rounds = fit(config, LocalPool(config), tmp_path / "run")
    next(rounds)
    rounds.close()
    config = replace(config, actors=2)
    what, put, sent = make_plan(config).adapters, ray.put, []
    sizes = [what.base_length(rounds * config.clients * config.task.rank) for rounds in (1, 2, 3)]
    monkeypatch.setattr(ray_pool.ray, "put", lambda value: [sent.append(value), put(value)][1])
    pool = ray_pool.RayPool.start(config)
    try:
        list(fit(config, pool, tmp_path / "run", resume=True))
    finally:
        pool.close()
    run = Run.open(tmp_path / "run")
    assert run.result["state_sha256"] == whole
    down = [row["bytes_down"] for row in run.rows]
    assert [each - down[0] for each in down[1:]] == [4 * 4 * size for size in sizes[:2]]
    bases = [value.size for value in sent if isinstance(value, np.ndarray) and value.size in sizes]
    assert bases == sizes  # after each of the three rounds
    assert all(getattr(value, "base", None) is None for value in sent if not isinstance(value, np.ndarray))
    assert len(sent) > 6


def test_a_client_alone_is_plain_peft_training(config, tmp_path):
    """One client, one round, against a loop written with diffusers and peft alone."""
    config = replace(config, clients=1, partition=fedray.IID(), rounds=1, local_steps=3)
    run = train(config, tmp_path / "run")
    plan = make_plan(config)
    learner = build(config, torch.device("cpu"))
    pipeline = StableDiffusionPipeline.from_pretrained(PIPELINE)
    scheduler = learner.scheduler
    rng = generator(0, "train", 0, 0)
    trainable = [parameter for parameter in learner.unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trainable, lr=config.learning_rate, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8, fused=True
    )
    order = torch.randperm(len(plan.dataset), generator=rng).split(2)
    for step in range(3):
        indices = plan.shards[0][order[step].numpy()]
        images = torch.from_numpy(plan.dataset.images[indices]).float() / 127.5 - 1
        with torch.no_grad():
            # One at a time: a batch's other members change the last bits, which AdamW makes much of where gradients
            # are next to nothing.
            found = [pipeline.vae.encode(image[None]).latent_dist for image in images]
            mean, std = (torch.cat([getattr(each, name) for each in found]) for name in ("mean", "std"))
            captions = plan.dataset.columns["caption"][indices].tolist()
            tokens = [
                pipeline.tokenizer([caption], padding="max_length", return_tensors="pt").input_ids
                for caption in captions
            ]
            embeddings = torch.cat([pipeline.text_encoder(each)[0] for each in tokens])
        latents = (mean + std * torch.randn(mean.shape, generator=rng)) * pipeline.vae.config.scaling_factor
        noise = torch.randn(latents.shape, generator=rng)
        timesteps = torch.randint(1000, (2,), generator=rng)
        predicted = learner.unet(scheduler.add_noise(latents, noise, timesteps), timesteps, embeddings).sample
        torch.nn.functional.mse_loss(predicted, noise).backward()
        torch.nn.utils.clip_grad_norm_([learner.flat.vector], config.max_grad_norm)
        optimizer.step()
        learner.flat.gradient.zero_()
    assert torch.equal(run.state(plan.layout).tensors["model"], learner.flat.vector.detach())


def test_images_and_captions_are_encoded_once_and_the_encoders_leave(config, monkeypatch, tmp_path):
    monkeypatch.setenv("FEDRAY_CACHE", str(tmp_path / "cache"))
    config = replace(config, random_flip=True)
    plan = make_plan(config)
    worker = Worker(config, torch.device("cpu"), "test")
    encoded = []
    encode = LoRALearner._encode_with

    def spy(learner):
        vae, text_encoder, tokenizer = encode(learner)
        plain = vae.encode
        monkeypatch.setattr(vae, "encode", lambda pixels: encoded.append(len(pixels)) or plain(pixels))
        return vae, text_encoder, tokenizer

    monkeypatch.setattr(LoRALearner, "_encode_with", spy)
    job = TrainJob(0, 0, plan.shards[0], np.zeros(0, int))
    down = Shared({"model": plan.initial.numpy()}, plan.round(config, 0))
    for _ in range(3):
        client_update(worker, down, job)
    assert encoded == [1] * (2 * len(plan.shards[0]))  # both sides, each once
    assert worker.learner._encoders is None


def test_class_images_add_their_loss(config, photos, tmp_path):
    shutil.copytree(photos / prompt(6), tmp_path / "class")
    dataset = config.task.dataset()
    losses = {}
    for weight in (0.0, 1.0, 2.0):
        extra = dict(class_data_dir=str(tmp_path / "class"), class_prompt="the digit", prior_loss_weight=weight)
        learner = build(replace(config, task=replace(config.task, **extra)), torch.device("cpu"))
        learner.prepare(dataset, np.arange(3), False)
        batch = batch_of(dataset, np.arange(3))
        losses[weight] = learner.loss(batch, torch.Generator().manual_seed(0)).item()
    assert losses[2.0] - losses[0.0] == pytest.approx(2 * (losses[1.0] - losses[0.0]), rel=1e-4)
    assert losses[1.0] > losses[0.0] > 0


def learner_of(config, folder=PIPELINE, **task):
    """A learner that has encoded the first six examples, both sides of them."""
    config = replace(config, task=replace(config.task, pretrained_model_name_or_path=str(folder), **task))
    dataset = config.task.dataset()
    learner = build(config, torch.device("cpu"))
    learner.prepare(dataset, np.arange(6), True)
    return learner, dataset


@pytest.mark.parametrize(("kind", "gamma", "offset"), [("v_prediction", 5.0, 0.1), ("epsilon", 5.0, 0.0)])
def test_the_loss_by_hand(config, tmp_path, kind, gamma, offset):
    """v-prediction, min-SNR weights and noise offset, by their formulas, in the order of diffusers' script."""
    shutil.copytree(PIPELINE, tmp_path / "pipeline")
    path = tmp_path / "pipeline/scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": kind}))
    learner, dataset = learner_of(config, tmp_path / "pipeline", snr_gamma=gamma, noise_offset=offset)
    batch = batch_of(dataset, np.arange(3))
    with torch.no_grad():
        found = learner.loss(batch, torch.Generator().manual_seed(3)).item()
    rng = torch.Generator().manual_seed(3)
    mean, deviation = torch.from_numpy(np.stack(learner.latents([(index, False) for index in range(3)]), 1))
    latents = (mean + deviation * torch.randn(mean.shape, generator=rng)) * learner.scaling_factor
    noise = torch.randn(latents.shape, generator=rng)
    if offset:
        noise = noise + offset * torch.randn((3, 4, 1, 1), generator=rng)
    timesteps = torch.randint(1000, (3,), generator=rng)
    alpha = learner.scheduler.alphas_cumprod[timesteps].double()
    a, s = alpha.sqrt()[:, None, None, None], (1 - alpha).sqrt()[:, None, None, None]
    embeddings = learner.embeddings(batch["prompts"])
    with torch.no_grad():
        predicted = learner.unet((a * latents + s * noise).float(), timesteps, embeddings).sample
    target = a * noise - s * latents if kind == "v_prediction" else noise
    snr = alpha / (1 - alpha)
    weight = snr.clamp(max=gamma) / (snr + 1 if kind == "v_prediction" else snr)
    expected = (weight * (predicted - target).square().mean((1, 2, 3))).mean()
    assert found == pytest.approx(expected.item(), rel=1e-4)


def test_a_prediction_type_is_as_if_the_scheduler_said_so(config, tmp_path):
    """In the loss, in samples, in a merged pipeline and in `Run.model`; adapters alone do not carry it."""
    shutil.copytree(PIPELINE, tmp_path / "pipeline")
    path = tmp_path / "pipeline/scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "v_prediction"}))
    shutil.copytree(PIPELINE, tmp_path / "silent")  # as Stable Diffusion 1.5's, which leaves it to the default
    path = tmp_path / "silent/scheduler/scheduler_config.json"
    said = json.loads(path.read_text())
    del said["prediction_type"]
    path.write_text(json.dumps(said))
    found, flag = [], {"prediction_type": "v_prediction"}
    for folder, extra in ((tmp_path / "pipeline", {}), (PIPELINE, flag), (PIPELINE, {}), (tmp_path / "silent", flag)):
        learner, dataset = learner_of(config, folder, **extra)
        with torch.no_grad():
            loss = learner.loss(batch_of(dataset, np.arange(3)), torch.Generator().manual_seed(3)).item()
        drawn = learner.sample(1, torch.Generator().manual_seed(3), "ddim", 2, ["the digit six"])
        found.append((loss, drawn.tolist()))
    assert found[0] == found[1] == found[3]
    assert found[0][0] != found[2][0]
    assert found[0][1] != found[2][1]
    task = replace(config.task, prediction_type="v_prediction")
    for method in (FedAvg(), Flora()):
        run = train(replace(config, task=task, algorithm=method, rounds=1), tmp_path / str(method))
        assert run.model().scheduler.config.prediction_type == "v_prediction"
    with pytest.raises(UserError, match="did you mean 'v_prediction'"):
        replace(task, prediction_type="v_predicton").check("ddim", 2)


def test_mirror_images_dropout_and_empty_prompts_change_the_loss(config):
    learner, dataset = learner_of(config)
    plain, turned = learner.latents([(0, False), (0, True)])
    assert not np.allclose(plain[0], turned[0], atol=0.1)
    batch = batch_of(dataset, np.arange(4))

    def loss(learner, batch, grad=True):
        torch.manual_seed(0)
        with torch.set_grad_enabled(grad):
            return learner.loss(batch, torch.Generator().manual_seed(1)).item()

    usual = loss(learner, batch)
    mirrored = batch_of(dataset, np.arange(4), torch.ones(4, dtype=torch.bool))
    assert loss(learner, mirrored) != pytest.approx(usual, rel=1e-3)
    dropping, _ = learner_of(config, lora_dropout=0.5)
    empty, _ = learner_of(config, proportion_empty_prompts=1.0)
    for other in (dropping, learner):  # an untrained B is 0, and drops nothing
        for b, _ in other.adapters.factors(other.flat.vector.detach()):
            b.fill_(0.05)
    usual = loss(learner, batch)
    assert loss(dropping, batch) != pytest.approx(usual, rel=1e-3)
    assert loss(dropping, batch, grad=False) == pytest.approx(usual, rel=1e-5)  # held-out losses drop nothing
    nothing = batch_of(dataset, np.arange(4)) | {"prompts": [""] * 4}
    assert loss(empty, batch) == loss(empty, nothing)
    assert loss(empty, batch, grad=False) != loss(empty, nothing, grad=False)


@pytest.mark.slow
def test_held_out_losses_are_without_class_images(config, photos, tmp_path):
    shutil.copytree(photos / prompt(6), tmp_path / "class")
    extra = dict(class_data_dir=str(tmp_path / "class"), class_prompt="the digit", prior_loss_weight=10.0)
    found = []
    for changes in ({}, extra):
        some = replace(config, task=replace(config.task, **changes), held_out_share=0.25, rounds=1, learning_rate=1e-9)
        found.append(train(some, tmp_path / f"run-{len(found)}").rows[0]["held_out"]["global"])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize("change", ["captions", "class images", "base"])
def test_a_run_is_held_to_its_captions_class_images_and_base(config, photos, tmp_path, change):
    for name, source in (("photos", photos), ("class", photos / prompt(6)), ("pipeline", PIPELINE)):
        shutil.copytree(source, tmp_path / name)
    task = replace(
        config.task, train_data_dir=str(tmp_path / "photos"), class_data_dir=str(tmp_path / "class"),
        class_prompt="the digit", pretrained_model_name_or_path=str(tmp_path / "pipeline"),
    )  # fmt: skip
    config = replace(config, task=task)
    rounds = fit(config, LocalPool(config), tmp_path / "run")
    next(rounds)
    rounds.close()
    if change == "captions":
        for path in (tmp_path / "photos").rglob("*.png"):
            path.with_suffix(".txt").write_text("another")
    elif change == "class images":
        (tmp_path / "class/0.png").unlink()
    else:
        path = tmp_path / "pipeline/unet/diffusion_pytorch_model.safetensors"
        save_file({name: tensor + 0.01 for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    with pytest.raises(fedray.UserError, match="have changed since it began"):
        train(config, tmp_path / "run", resume=True)


def test_a_folder_of_the_fp16_variant_alone(config, tmp_path):
    pipeline = tmp_path / "pipeline"
    shutil.copytree(PIPELINE, pipeline)
    for part in ("unet", "vae", "text_encoder"):
        (path,) = (pipeline / part).glob("*.safetensors")
        save_file(
            {k: v.half() for k, v in load_file(path).items()}, path.with_suffix(".fp16.safetensors"), {"format": "pt"}
        )
        path.unlink()
    task = replace(config.task, pretrained_model_name_or_path=str(pipeline), base_dtype="float16")
    row = train(replace(config, task=task, rounds=1), tmp_path / "run").rows[0]
    assert np.isfinite(row["loss"])


# What is saved


LOADED = """
import sys, numpy as np, torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
base, adapter, out = sys.argv[1:]
if adapter != "none":
    pipeline = StableDiffusionPipeline.from_pretrained(base)
    pipeline.load_lora_weights(adapter)
else:
    pipeline = StableDiffusionPipeline.from_pretrained(base)
pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
pipeline.set_progress_bar_config(disable=True)
torch.set_num_threads(1)
rng = torch.Generator().manual_seed(5)
images = pipeline(["the digit six", "the digit nine"], num_inference_steps=4, guidance_scale=3.0, generator=rng,
                  height=16, width=16, output_type="np").images
np.save(out, (images * 255).round().astype(np.uint8).transpose(0, 3, 1, 2))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "alpha"),
    [
        (FedAvg(), None),
        (FFA(), 4.0),
        (Flora(), None),
    ],
)
def test_what_is_saved_diffusers_loads_alone_and_draws_the_same(config, tmp_path, method, alpha):
    config = replace(config, algorithm=method, learning_rate=3e-2, task=replace(config.task, lora_alpha=alpha))
    run = train(config, tmp_path / "run")
    merged = isinstance(method, Flora)
    where = [str(run.directory / "model"), "none"] if merged else [str(PIPELINE), str(run.directory / "model")]
    command = [sys.executable, "-c", LOADED, *where, str(tmp_path / "images.npy")]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    learner = build(config, torch.device("cpu"))
    server = run.state(learner.flat.layout).tensors
    learner.flat.vector.detach().copy_(server["model"])
    if "base" in server:
        learner.set_base(server["base"])
    prompts = ("the digit six", "the digit nine")
    ours = learner.sample(2, torch.Generator().manual_seed(5), "dpmsolver++", 4, prompts).numpy().astype(int)
    theirs = np.load(tmp_path / "images.npy").astype(int)
    assert np.abs(ours - theirs).max() <= 1
    learner.flat.vector.detach().zero_()
    if merged:
        learner.set_base(torch.zeros_like(server["base"]))
    untrained = learner.sample(2, torch.Generator().manual_seed(5), "dpmsolver++", 4, prompts).numpy().astype(int)
    assert np.abs(ours - untrained).max() > 3  # not the adapter from before training
    card = (run.directory / "model/README.md").read_text()
    assert "| base | digits_pipeline |" in card
    assert "base_model" not in card  # of a folder of this machine the hub knows nothing
    assert "pipeline_tag: text-to-image" in card
    assert run.result["vector_sha256"] in card


@pytest.mark.slow
def test_sampling_prompts_at_any_strength(config, tmp_path, capsys):
    out = train(replace(config, learning_rate=3e-2), tmp_path / "run").directory
    pictures = {}
    for strength in ("0", "0.5", "1"):
        path = tmp_path / f"{strength}.png"
        flags = ["--prompt", "the digit six", "--num-images", "2", "--strength", strength, "--out", str(path)]
        assert main(["sample", str(out), *flags]) == 0
        pictures[strength] = np.asarray(Image.open(path)).astype(int)
    assert len({picture.tobytes() for picture in pictures.values()}) == 3
    base, half, full = pictures.values()
    assert np.abs(half - base).mean() < np.abs(full - base).mean()


@pytest.mark.slow
def test_scores_of_a_run_of_adapters(config, tmp_path, capsys):
    """Images are drawn for the prompts in turn, whatever the batches; `fedray evaluate` gives the run's own scores."""
    for method in (FedAvg(), Flora()):
        config = replace(
            config, algorithm=method, features="digits", evaluate_samples=12, eval_batch_size=5, held_out_share=0.25
        )  # fmt: skip
        run = train(config, tmp_path / type(method).__name__)
        scores = run.result["scores"]
        assert {"fd[digits]", "accuracy[digits]", "copies"} <= set(scores)
        assert len(run.result["held_out"]["clients"]) == 4
        assert main(["evaluate", str(run.directory)]) == 0
        printed = capsys.readouterr().out
        assert f"{scores['fd[digits]']['value']:.4g}" in printed
        assert main(["sample", str(run.directory), "--num-images", "2", "--strength", "0.5"]) == 0


@pytest.mark.slow
def test_prompts_are_drawn_from_round_to_round(config, tmp_path):
    run = train(replace(config, rounds=4, validation_rounds=2, learning_rate=3e-2), tmp_path / "run")
    names = [path.name for path in sorted((run.directory / "validation").iterdir())]
    assert names == ["round-000000.png", "round-000002.png", "round-000004.png"]
    strips = [np.asarray(Image.open(run.directory / "validation" / name)) for name in names]
    assert not np.array_equal(strips[0], strips[2])
    assert Image.open(run.directory / "validation.png").width > 500


# Captions and mistakes


def captions(task):
    return task.dataset().columns["caption"].tolist()


def test_captions_come_from_where_people_put_them(photos, tmp_path):
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    task = LoRA(train_data_dir=str(folder), resolution=16, pretrained_model_name_or_path=str(PIPELINE))
    folders = [path.parent.name for path in sorted(folder.rglob("*.png"))]
    assert captions(task) == folders
    for path in folder.rglob("*.png"):
        path.with_suffix(".txt").write_text(f"{path.stem} of {path.parent.name}\n")
    assert captions(task)[:2] == ["0 of the digit eight", "1 of the digit eight"]
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    pd.DataFrame({"file_name": names, "text": [f"photo {k}" for k in range(16)]}).to_json(
        folder / "metadata.jsonl", orient="records", lines=True
    )
    assert captions(task) == [f"photo {k}" for k in range(16)]
    assert captions(replace(task, instance_prompt="a dog")) == ["a dog"] * 16


def pipeline_without(part, folder):
    shutil.copytree(PIPELINE, folder)
    shutil.rmtree(folder / part)


def truncated(part, folder):
    shutil.copytree(PIPELINE, folder)
    (path,) = (folder / part).glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:1000])


def weightless(part, folder):
    shutil.copytree(PIPELINE, folder)
    (path,) = (folder / part).glob("*.safetensors")
    path.unlink()


def listed(root, column, value):
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.png"))
    return "\n".join([f"file_name,{column}", *(f"{name},{value}" for name in names)])


def pipeline_of(kind, folder):
    shutil.copytree(PIPELINE, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": kind}))


@pytest.mark.parametrize(
    ("spoil", "flags", "message"),
    [
        (None, "--pretrained-model-name-or-path {tmp}/absent/x", "no such folder, and the hub has none"),
        (None, "--pretrained-model-name-or-path {photos}", "is no pipeline: it has no model_index.json"),
        (lambda folder: pipeline_without("unet", folder), "", "the pipeline has no unet"),
        (lambda folder: pipeline_of("StableDiffusionXLPipeline", folder), "", "XLPipeline, which is not supported yet"),
        (lambda folder: pipeline_of("FluxPipeline", folder), "", "FluxPipeline, which is not supported yet"),
        (lambda folder: pipeline_of("StableDiffusion3Pipeline", folder), "", "is not supported yet"),
        (None, "--target-modules to_q to_z", "--target-modules to_z: no linear layer"),
        (None, "--rank 0", "--rank 0: it must be at least 1"),
        (None, "--clients 5", "by-folder has only 4 to deal"),
        (None, "--resolution 18", "--resolution 18: it must be a multiple of 4"),
        (None, "--base-dtype float8", "there is no dtype of the base 'float8'"),
        (None, "--rule flora --keep-optimizer", "--algorithm flora makes new factors every round, to which an opt"),
        (
            None,
            "--rule svd --no-keep-optimizer --use-ema",
            "--algorithm svd makes new factors every round, to which an av",
        ),
        (None, "--rule flora --no-keep-optimizer --base-dtype bfloat16", "--algorithm flora needs a float32 base"),
        (None, "--snr-gamma -5", "--snr-gamma -5.0: it must be above 0"),
        (None, "--noise-offset nan", "--noise-offset nan: it must not be negative"),
        (None, "--class-data-dir {tmp}/none --class-prompt x", "--class-data-dir {tmp}/none does not exist"),
        (None, "--caption-column words", "has no column 'words' of captions, but nothing"),
        (lambda folder: truncated("unet", folder), "", "is damaged, or not all of it was fetched"),
        (lambda folder: truncated("vae", folder), "", "is damaged, or not all of it was fetched"),
        (lambda folder: weightless("unet", folder), "", "unet has no weights"),
        (None, "--class-prompt x", "--class-data-dir and --class-prompt go together"),
        (None, "--preset digits", "there is no preset 'digits'; did you mean 'digits-lora'?"),
        (None, "--sampling-steps 2000", "between 1 and the 1000 steps of training"),
    ],
)
def test_mistakes_get_one_clear_message(photos, tmp_path, capsys, spoil, flags, message):
    chosen = f"--pretrained-model-name-or-path {tmp_path}/pipeline" if spoil else ""
    if spoil:
        spoil(tmp_path / "pipeline")
    preset = "" if "--preset" in flags else "--preset digits-lora"
    command = f"finetune {preset} --train-data-dir {photos} --actors 0 --out {tmp_path}/run {chosen} {flags}"
    assert main(command.format(tmp=tmp_path, photos=photos).split()) == 2
    printed = capsys.readouterr().err.strip()
    assert message.format(tmp=tmp_path) in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / "metadata.csv").write_text(listed(root, "caption", "a")), "has no column 'text' of capt"),
        (
            lambda root: (root / "metadata.csv").write_text(listed(root, "text", "")),
            "16 images have no caption",
        ),
        (
            lambda root: [path.with_suffix(".txt").write_bytes(b"\xe9t\xe9") for path in root.rglob("*.png")],
            "is no text in UTF-8",
        ),
        (lambda root: (root / "the digit six/0.txt").write_text("six"), "0.txt is absent: where some images"),
        (
            lambda root: (root / "metadata.csv").write_text("file_name,text\nthe digit six/0.png,a\n"),
            "metadata.csv lacks 15 of 16 images",
        ),
        (
            lambda root: (root / "metadata.csv").write_text("file_name,text\ngone.png,a\n"),
            "metadata.csv names 1 images that are not there, the first of them gone.png",
        ),
    ],
)
def test_caption_files_that_do_not_fit(photos, tmp_path, capsys, spoil, message):
    shutil.copytree(photos, tmp_path / "photos")
    spoil(tmp_path / "photos")
    command = f"finetune --preset digits-lora --train-data-dir {tmp_path}/photos --actors 0 --out {tmp_path}/run"
    assert main(command.split()) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--algorithm", "--rule"])
@pytest.mark.parametrize("name", ["ffa", "svd", "flora"])
def test_algorithms_for_adapters_are_not_for_whole_models(tmp_path, capsys, flag, name):
    assert main(["train", flag, name, "--actors", "0", "--out", str(tmp_path / "run")]) == 2
    assert f"--algorithm {name} is for adapters (fedray finetune)" in capsys.readouterr().err


def test_a_run_is_resumed_by_the_command_that_began_it(config, tmp_path, capsys):
    out = train(config, tmp_path / "run").directory
    assert main(["train", "--resume", str(out)]) == 2
    assert "is a run of `fedray finetune`" in capsys.readouterr().err
    assert main(["finetune", "--resume", str(out)]) == 0


# CLIP


def test_clip_scores(config, photos, tmp_path):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    torch.manual_seed(0)
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    tokenizer = CLIPTokenizer.from_pretrained(PIPELINE / "tokenizer")
    text = small | dict(vocab_size=len(tokenizer), max_position_embeddings=16, eos_token_id=tokenizer.eos_token_id)
    clip = CLIPModel(
        CLIPConfig(text_config=text, vision_config=small | dict(image_size=32, patch_size=8), projection_dim=8)
    ).eval()
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    for part in (clip, processor, tokenizer):
        part.save_pretrained(tmp_path / "clip")
    config = replace(config, features=f"clip:{tmp_path}/clip", evaluate_samples=8, keep_samples=True)
    run = train(config, tmp_path / "run")
    scores = run.result["scores"]
    assert {"fd[clip]", "clip-text", "clip-image", "cmmd"} <= set(scores)
    kept = [Image.open(path) for path in sorted((run.directory / "samples/round-000002").iterdir())]
    prompts = config.task.prompts(config.task.dataset())
    with torch.no_grad():
        images = clip.get_image_features(**processor(images=kept, return_tensors="pt"))
        texts = clip.get_text_features(**tokenizer(list(prompts), padding=True, return_tensors="pt"))
    images, texts = (getattr(one, "pooler_output", one) for one in (images, texts))
    expected = nn.functional.cosine_similarity(images, texts[[k % len(prompts) for k in range(8)]])
    assert scores["clip-text"]["value"] == pytest.approx(expected.mean().item(), abs=1e-4)
    real = [Image.fromarray(image.transpose(1, 2, 0)) for image in config.task.dataset().images]
    with torch.no_grad():
        real = clip.get_image_features(**processor(images=real, return_tensors="pt"))
    a, b = (nn.functional.normalize(getattr(one, "pooler_output", one).double()) for one in (images, real))
    kernel = lambda x, y: torch.exp(-(torch.cdist(x, y) ** 2) / 200).mean()  # noqa: E731
    cmmd = 1000 * (kernel(a, a) + kernel(b, b) - 2 * kernel(a, b))
    assert scores["cmmd"]["value"] == pytest.approx(cmmd.item(), rel=1e-3)
    with pytest.raises(fedray.UserError, match="no CLIP model could be loaded"):
        make_plan(replace(config, features=f"clip:{photos}"))


# Memory and size


# Two processes use the base at once, of each precision and pipeline; forked, so that what they need is imported once.
BASE_MEMORY = """
import json, multiprocessing, sys
from fedray.presets import PRESETS
from fedray.federation.worker import build
from dataclasses import replace
import torch
import fedray.tasks.lora.learner
fork = multiprocessing.get_context("fork")

def use(folder, dtype, both, found):
    task = replace(PRESETS["digits-lora"].task, pretrained_model_name_or_path=folder, base_dtype=dtype)
    learner = build(replace(PRESETS["digits-lora"], task=task), torch.device("cpu"))
    total = sum(p.sum().item() for p in learner.unet.parameters())  # touch every page
    both.wait(120)
    rollup = dict(line.split(":", 1) for line in open("/proc/self/smaps_rollup").read().splitlines()[1:])
    found.put([int(rollup[name].split()[0]) for name in ("Pss", "Private_Dirty")])
    both.wait(120)

for dtype in ("float32", "bfloat16"):
    for folder in sys.argv[1:]:
        both, found = fork.Barrier(2), fork.SimpleQueue()
        running = [fork.Process(target=use, args=(folder, dtype, both, found)) for _ in range(2)]
        for process in running:
            process.start()
        print(json.dumps([found.get(), found.get()]))
        for process in running:
            process.join()
"""


@pytest.mark.slow
def test_two_processes_share_one_base(tmp_path, monkeypatch):
    """A U-Net of some 60 million parameters, mapped by two processes: neither has it to itself."""
    monkeypatch.setenv("FEDRAY_CACHE", str(tmp_path / "cache"))
    shutil.copytree(PIPELINE, tmp_path / "pipeline")
    shutil.rmtree(tmp_path / "pipeline/unet")
    shape = json.loads((PIPELINE / "unet/config.json").read_text()) | {"block_out_channels": [256, 512]}
    unet = UNet2DConditionModel.from_config(shape)
    count = sum(p.numel() for p in unet.parameters())
    unet.save_pretrained(tmp_path / "pipeline/unet")
    del unet
    command = [sys.executable, "-c", BASE_MEMORY, str(PIPELINE), str(tmp_path / "pipeline")]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    found = [json.loads(line) for line in ran.stdout.splitlines()]
    for size, small, large in ((4 * count, *found[:2]), (2 * count, *found[2:])):
        assert size > 50e6
        # In both processes together the base is once, not twice.
        assert 1024 * (sum(pss for pss, _ in large) - sum(pss for pss, _ in small)) < 1.6 * size
        assert 1024 * (max(dirty for _, dirty in large) - max(dirty for _, dirty in small)) < 0.5 * size


@pytest.mark.slow
def test_a_round_at_the_size_of_stable_diffusion_1_5(photos, tmp_path):
    """Random weights in SD-1.5's full shape, bfloat16, one client, one step at 8×8 latents: 3,188,736 bytes."""
    pipeline = tmp_path / "pipeline"
    shutil.copytree(PIPELINE, pipeline)
    shutil.rmtree(pipeline / "unet")
    width = json.loads((PIPELINE / "unet/config.json").read_text())["cross_attention_dim"]
    assert width != 768  # so its text encoder is made anew
    from fedray.tasks import embedded

    tokens = embedded.tokenizer()
    text_config = embedded.text_encoder(tokens).config
    text_config.hidden_size, text_config.num_attention_heads = 768, 12
    type(embedded.text_encoder(tokens))(text_config).save_pretrained(pipeline / "text_encoder")
    torch.set_default_dtype(torch.bfloat16)
    try:
        UNet2DConditionModel(**SD15).save_pretrained(pipeline / "unet")
    finally:
        torch.set_default_dtype(torch.float32)
    task = LoRA(
        pretrained_model_name_or_path=str(pipeline),
        train_data_dir=str(photos),
        resolution=16,
        base_dtype="bfloat16",
        validation_prompt=("a digit",),  # drawn before and after, which takes minutes on CPUs without bfloat16
    )
    config = replace(
        PRESETS["sd"], task=task, clients=1, partition=fedray.IID(), rounds=1, local_epochs=None, local_steps=1,
        evaluate_samples=0, sampling_steps=1, sampler="ddim", actors=0, validation_rounds=10,
    )  # fmt: skip
    row = train(config, tmp_path / "run").rows[0]
    assert row["bytes_up"] == row["bytes_down"] == 3_188_736
    assert np.isfinite(row["loss"])
    assert Run(tmp_path / "run").result["rounds"] == 1


# With noise


@pytest.mark.slow
def test_adapters_under_noise_move_by_the_clip_and_the_noise_alone(config, tmp_path):
    """Clip and noise act on the vector of A and B; methods that need each client's factors are refused."""
    noisy = replace(config, rounds=1, wire="clip:0.01,noise:0.5", use_ema=False)
    run = train(noisy, tmp_path / "run")
    plan = make_plan(noisy)
    round = plan.round(noisy, 0)
    moved = run.state(plan.layout).tensors["model"].double() - plan.initial.double()
    transcript = json.loads((run.directory / "privacy.jsonl").read_text())["transcript"]
    noise = replace(round, transcript=transcript).noise(len(moved), "noise") * 0.5 * 0.01
    clients = len(round.cohort)
    assert float((clients * moved - noise).norm()) <= clients * 0.01 * (1 + 1e-3)
    assert float((clients * moved - noise).norm()) > 0.005
    assert run.rows[0]["aggregation"] == {}
    for method in ("svd", "flora"):
        with pytest.raises(fedray.UserError, match="each client's own factors"):
            replace(noisy, algorithm=method).check()
