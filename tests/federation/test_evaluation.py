"""Evaluation as jobs of a pool: references, rows, a user's own features and metrics, and `fedray evaluate`."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from runs import fit, train

import fedray
from fedray import cache
from fedray.cli import main
from fedray.cluster.pool import RayPool
from fedray.commands.sample import model_of as model_of_run
from fedray.data.sources import digits
from fedray.errors import RunError, UserError
from fedray.federation import evaluation
from fedray.federation.evaluation import Comparison, Scoring, evaluate, look_for_copies, open_reference, sample
from fedray.federation.plan import make_plan
from fedray.federation.pool import LocalPool
from fedray.federation.sampling import Sampling, dataset_features
from fedray.federation.worker import model as model_of
from fedray.record.run import Run
from fedray.scores import networks
from fedray.scores.frechet import frechet_distance, gaussian

FACES = Path(__file__).parents[3] / "shared/data/faces"
SHORT = "--rounds 2 --local-steps 2 --sampling-steps 2 --actors 0 --kid-subset-size 8"


@pytest.fixture
def short(monkeypatch, tmp_path):
    """The digits preset made short, with a cache of its own."""
    monkeypatch.setenv("FEDRAY_CACHE", str(tmp_path / "cache"))
    settings = dict(rounds=2, local_epochs=None, local_steps=2, sampling_steps=2, evaluate_samples=70, actors=0)
    return replace(fedray.PRESETS["digits"], **settings)


def work_of(pool):
    """What kinds of job a pool is given."""
    seen, plain = [], pool.map

    def spy(work, *rest):
        seen.append(work)
        return plain(work, *rest)

    pool.map = spy
    return seen


# References


def test_a_reference_is_made_once_and_is_of_every_image(short):
    pool, dataset = LocalPool(short), digits()
    seen = work_of(pool)
    first, again = open_reference(Scoring.of(short), dataset, pool), open_reference(Scoring.of(short), dataset, pool)
    assert seen == [dataset_features]
    expected = networks.load("digits", None, torch.device("cpu"))(torch.from_numpy(dataset.images)).numpy()
    np.testing.assert_allclose(again.features, expected, rtol=1e-4, atol=1e-4)
    assert isinstance(again.features, np.memmap)
    assert torch.equal(first.gaussian.factor, again.gaussian.factor)
    whole = frechet_distance(gaussian(expected), again.gaussian)
    assert whole == pytest.approx(0, abs=1e-6)


def test_a_reference_is_of_its_images_form_and_network(short, tmp_path):
    def key(**changes):
        config = replace(short, **changes)
        return open_reference(Scoring.of(config), config.task.dataset(), LocalPool(config)).key

    assert key() == key(seed=3, clients=2)
    (tmp_path / "mine.py").write_text("def half(images): return images.flatten(1)[:, :8] / 2\n")
    mine = f"{tmp_path}/mine.py:half"
    assert key(features=mine) != key()
    before = key(features=mine)
    (tmp_path / "mine.py").write_text("def half(images): return images.flatten(1)[:, :8] / 3\n")
    assert key(features=mine) != before
    weight = f"float(open('{tmp_path}/w').read())"
    (tmp_path / "mine.py").write_text(f"def half(images): return images.flatten(1)[:, :8] / {weight}\n")
    keys = []
    for weight in ("2", "3"):  # what it loads counts too
        (tmp_path / "w").write_text(weight)
        keys.append(key(features=mine)["features"])
    assert keys[0] != keys[1]


@pytest.mark.parametrize("file", ["features.npy", "statistics.npz"])
def test_a_reference_that_is_damaged_is_made_again(short, file, capsys):
    whole = open_reference(Scoring.of(short), digits(), LocalPool(short))
    kept = whole.features.copy(), whole.gaussian.mean.clone()
    (place,) = (path.parent for path in cache.home().glob("*/features.npy"))
    contents = bytearray((place / file).read_bytes())
    contents[len(contents) // 2] ^= 1
    (place / file).write_bytes(contents)
    capsys.readouterr()
    again = open_reference(Scoring.of(short), digits(), LocalPool(short))
    assert np.array_equal(again.features, kept[0])
    assert torch.equal(again.gaussian.mean, kept[1])
    said = f"reference features (digits): {file} in the cache is damaged; it is made again"
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_make_a_reference_once(short, tmp_path):
    code = (
        "from fedray.presets import PRESETS; from fedray.data.sources import digits;"
        "from fedray.federation.pool import LocalPool;"
        "from fedray.federation.evaluation import Scoring, open_reference;"
        "config = PRESETS['digits'];"
        "print('made', end='') if open_reference(Scoring.of(config), digits(), LocalPool(config),"
        " lambda phase, done, total: done or print('making ', end='')) else 0"
    )
    running = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = sorted(process.communicate(timeout=120)[0] for process in running)
    assert printed == ["made", "making made"]


def test_too_few_images_to_score_against(short):
    one = fedray.Dataset(digits().images[:1])
    with pytest.raises(UserError, match="the 1 images of this dataset cannot be scored against: .* at least two"):
        open_reference(Scoring.of(short), one, LocalPool(short, one))


def test_a_reference_differs_with_the_images(short):
    first, other = fedray.Dataset(digits().images[:100]), fedray.Dataset(digits().images[100:200])
    turned = fedray.Dataset(digits().images[:100].transpose(0, 1, 3, 2))
    keys = [
        open_reference(Scoring.of(short), one, LocalPool(short, one)).key["images"]
        for one in (first, other, turned, first)
    ]
    assert len(set(keys)) == 3
    assert keys[0] == keys[3]


# Runs


@pytest.mark.slow
def test_scores_do_not_depend_on_the_pool(ray, short):
    plan, config, found = make_plan(short), replace(short, actors=2, eval_batch_size=16), []
    two = RayPool.start(config, plan.dataset)
    try:
        for pool in (LocalPool(config), two, two.apart()[0]):
            scoring = Scoring.of(config)
            comparison = Comparison(plan.dataset, scoring, open_reference(scoring, plan.dataset, pool))
            found.append(evaluate(pool, model_of({"model": plan.initial}), Sampling.of(config, 70), comparison))
    finally:
        two.close()
    assert found[0].scores == found[1].scores == found[2].scores
    assert found[0].images.shape == (64, 1, 8, 8)  # the others were not kept
    assert all(np.array_equal(found[0].images, other.images) for other in found)


METRICS = {"brightness": lambda samples, reference: float(samples.mean())}


def test_a_model_is_scored_on_several_draws(short, tmp_path):
    """Each set's scores are those of its images alone; the run's are their means, ± their spread."""
    several = replace(short, evaluate_repeats=3, evaluate_every=1)
    whole = fedray.run(several, tmp_path / "whole", metrics=METRICS)
    scores, about = whole.result["scores"], whole.result["evaluation"]
    assert "draws" not in whole.rows[0]["scores"]["fd[digits]"]  # only after the last round
    pool, model = LocalPool(short), model_of_run(tmp_path / "whole", several)
    _, images = sample(pool, model, replace(Sampling.of(short, 70), repeats=3))
    features, real = (
        networks.load("digits", None, torch.device("cpu"))(torch.from_numpy(some)).numpy()
        for some in (images, digits().images)
    )
    alone = [frechet_distance(gaussian(part), gaussian(real)) for part in np.split(features, 3)]
    found = scores["fd[digits]"]
    assert found["draws"] == pytest.approx(alone, rel=1e-5)
    assert found["value"] == pytest.approx(np.mean(alone), rel=1e-5)
    assert found["std"] == pytest.approx(np.std(alone, ddof=1), rel=1e-3)
    assert (found["over"], found["n"], about["draws"]) == ("3 draws", 70, 3)
    assert "draws" not in scores["fd[digits]/real"]
    assert scores["brightness"]["draws"] == [part.mean() for part in np.split(images, 3)]
    once = fedray.run(short, tmp_path / "once", metrics=METRICS).result["scores"]
    assert once["fd[digits]"]["value"] == found["draws"][0]


def test_sampling_has_a_seed_of_its_own(short):
    """Runs of two training seeds start their samples from the same noise, and another evaluation seed from other."""
    first, second = (Sampling.of(replace(short, seed=seed), 8) for seed in (0, 1))
    assert first == second
    model, pool = model_of({"model": make_plan(short).initial}), LocalPool(short)
    images = [sample(pool, model, Sampling.of(replace(short, evaluate_seed=seed), 8))[1] for seed in (0, 0, 1)]
    assert np.array_equal(images[0], images[1])
    assert not np.array_equal(images[0], images[2])


def test_large_features_are_in_a_file(short, monkeypatch):
    model, pool = model_of({"model": make_plan(short).initial}), LocalPool(short)
    small, _ = sample(pool, model, Sampling.of(short, 70), features=True)
    monkeypatch.setattr(evaluation, "LARGE", 70 * 64 * 4)
    large, _ = sample(pool, model, Sampling.of(short, 70), features=True)
    assert isinstance(large, np.memmap)
    assert not isinstance(small, np.memmap)
    assert np.array_equal(large, small)


def test_rows_are_scored_every_so_many_rounds(short, tmp_path):
    config = replace(short, rounds=5, evaluate_every=2, keep_samples=True)
    rows = list(fit(config, LocalPool(config), tmp_path / "run"))
    assert [bool(row["scores"]) for row in rows] == [False, True, False, True, True]
    assert "std" not in rows[1]["scores"]["fd[digits]"]
    assert rows[4]["scores"]["fd[digits]"]["over"] == "10 resamples"
    assert rows[4]["scores"]["fd[digits]"]["n"] == 70
    about = rows[4]["evaluation"]
    assert (about["sampler"], about["seed"]) == ("ddpm", 0)
    assert about["features"].startswith("digits ")
    assert about["reference"] == digits().sha256
    assert about["reference_images"] == 1797
    assert "256 images and there are 70" in about["refused"]["kid[digits]"]
    kept = sorted((tmp_path / "run/samples").rglob("*.png"))
    assert len(kept) == 3 + 3 * 70
    scores = Run.open(tmp_path / "run").result["scores"]
    assert scores == rows[4]["scores"]
    # The last round's images, scored from their files.
    images = np.stack(
        [np.asarray(Image.open(path))[None] for path in sorted(kept) if path.parent.name == "round-000005"]
    )
    features = networks.load("digits", None, torch.device("cpu"))(torch.from_numpy(images)).numpy()
    real = networks.load("digits", None, torch.device("cpu"))(torch.from_numpy(digits().images)).numpy()
    again = frechet_distance(gaussian(features), gaussian(real))
    assert again == pytest.approx(scores["fd[digits]"]["value"], rel=1e-5)


@pytest.mark.parametrize("actors", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_metric_of_ones_own_is_in_the_rows(ray, short, tmp_path, actors):
    def brightness(samples, reference):
        assert samples.shape == (70, 1, 8, 8)
        return samples.mean() / reference.mean()

    run = fedray.run(replace(short, actors=actors), tmp_path / "run", metrics={"brightness": brightness})
    assert run.result["scores"]["brightness"]["n"] == 70
    assert run.result["scores"]["brightness"]["value"] > 0
    with pytest.raises(RunError, match="the metric 'broken' failed: ZeroDivisionError"):
        fedray.run(short, tmp_path / "broken", metrics={"broken": lambda samples, reference: 1 / 0})
    for name, wrong, message in (
        ("endless", lambda samples, reference: float("nan"), "'endless' gave nan, which is no finite number"),
        ("fd[digits]", lambda samples, reference: 1.0, "has the name of a score that fedray measures"),
    ):
        with pytest.raises(RunError, match=message):
            fedray.run(short, tmp_path / "broken", resume=True, metrics={name: wrong})
    whole = fedray.run(short, tmp_path / "broken", resume=True, metrics={"fine": lambda samples, reference: 1.0})
    assert whole.result["scores"]["fine"] == {"value": 1.0, "n": 70}


def test_features_of_ones_own(short, tmp_path):
    class Halves(torch.nn.Module):
        def forward(self, images):
            return images.float().flatten(1)[:, ::2] / 255

    example = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    torch.jit.trace(Halves(), example).save(tmp_path / "halves.pt")
    (tmp_path / "mine.py").write_text("def halves(images): return images.float().flatten(1)[:, ::2] / 255\n")
    results = []
    for features in (f"{tmp_path}/halves.pt", f"{tmp_path}/mine.py:halves"):
        config = replace(short, features=features)
        results.append(fedray.run(config, tmp_path / Path(features).suffix).result["scores"])
    assert results[0] == results[1]
    assert "fd[halves]" in results[0]
    config = replace(short, features="inspect:getsource")
    with pytest.raises(UserError, match="--features inspect:getsource cannot take images of 1×8×8"):
        make_plan(config)


def test_a_client_alone_copies_only_what_it_has(short):
    plan = make_plan(replace(short, held_out_share=0.1, test_share=0.1, only_client=1))
    trained, unseen = plan.images_of([1])
    assert np.array_equal(trained, plan.shards[1])
    assert np.array_equal(unseen, np.concatenate([plan.held_out[1], plan.test[1]]))
    trained, unseen = plan.images_of(range(plan.shards.sizes.size))
    assert sorted([*trained, *unseen]) == list(range(1797))
    assert [len(each) for each in plan.images_of([])] == [0, 0]


@pytest.mark.slow
def test_copies_are_of_images_of_clients_that_took_part(short, tmp_path, monkeypatch):
    """Two of twelve in each of two rounds; of a run that is resumed, and evaluated later."""
    from fedray.commands import scoring
    from fedray.federation import fit as engine

    seen, right = [], engine.look_for_copies

    def look(pool, images, trained, unseen, show):
        seen.append((trained.tolist(), unseen.tolist()))
        return right(pool, images, trained, unseen, show)

    monkeypatch.setattr(engine, "look_for_copies", look)
    monkeypatch.setattr(scoring, "look_for_copies", look)
    config = replace(short, clients=12, fraction=0.17, rounds=2, test_share=0.3, canaries=8)
    assert config.cohort_size == 2
    train(config, tmp_path / "run", rounds=1)
    rows = train(config, tmp_path / "run", resume=True)
    assert main(["evaluate", str(tmp_path / "run"), "--samples", "8"]) == 0
    took = sorted({client for row in Run.open(tmp_path / "run").rows for client in row["cohort"]})
    assert len(rows) == 1
    assert 3 <= len(took) <= 4
    plan = make_plan(config)
    trained = np.concatenate([plan.shards[client] for client in took])
    unseen = np.concatenate([plan.test[client] for client in took])
    assert (trained >= 1797).any()  # canaries, which are no images of the dataset
    assert seen == [(trained[trained < 1797].tolist(), unseen.tolist())] * 2


@pytest.mark.slow
def test_copies_are_looked_for_where_images_were_held_out(short, tmp_path):
    config = replace(short, held_out_share=0.1, test_share=0.1)
    run = fedray.run(config, tmp_path / "run")
    found = run.result["scores"]["copies"]
    assert found["n"] == 70
    assert 0 <= found["value"] <= 1
    assert found["over"] == "70 samples and 256 images not trained on"
    assert "where 5.0% are expected of new images" in found["note"]
    assert Image.open(tmp_path / "run/nearest.png").size == (8 * 52 + 4, 8 * 52 + 4)


def test_few_copies_among_noise_are_no_praise(short):
    """Of noise it is said that it is far from all images; of real images that were not trained on it is not."""
    pool, data = LocalPool(short), digits()
    noise = np.random.default_rng(0).integers(0, 256, (64, 1, 8, 8)).astype(np.uint8)
    for images, far in ((noise, True), (data.images[1500:1564], False)):
        score, _, _ = look_for_copies(pool, images, np.arange(1500), np.arange(1564, 1797))
        assert ("farther from all images" in score.note) == far
    assert look_for_copies(pool, noise, np.arange(1500), np.arange(1564, 1797))[0].value == 0


# Inception


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """Random weights in the form of pytorch-fid's, where torch's hub would have put them."""
    from pytorch_fid import inception
    from torchvision.models import inception_v3

    home = tmp_path_factory.mktemp("torch")
    path = home / "hub/checkpoints" / Path(inception.FID_WEIGHTS_URL).name
    path.parent.mkdir(parents=True)
    torch.manual_seed(0)
    model = inception_v3(num_classes=1008, aux_logits=False, weights=None, init_weights=False)
    for mixed, block in {
        "Mixed_5b": inception.FIDInceptionA(192, pool_features=32),
        "Mixed_5c": inception.FIDInceptionA(256, pool_features=64),
        "Mixed_5d": inception.FIDInceptionA(288, pool_features=64),
        "Mixed_6b": inception.FIDInceptionC(768, channels_7x7=128),
        "Mixed_6c": inception.FIDInceptionC(768, channels_7x7=160),
        "Mixed_6d": inception.FIDInceptionC(768, channels_7x7=160),
        "Mixed_6e": inception.FIDInceptionC(768, channels_7x7=192),
        "Mixed_7b": inception.FIDInceptionE_1(1280),
        "Mixed_7c": inception.FIDInceptionE_2(2048),
    }.items():
        setattr(model, mixed, block)
    torch.save(model.state_dict(), path)
    return path


# SciPy 1.18 took away an argument that pytorch-fid 0.3 uses.
PYTORCH_FID = """
import inspect, runpy, scipy.linalg
if "disp" not in inspect.signature(scipy.linalg.sqrtm).parameters:
    root = scipy.linalg.sqrtm
    scipy.linalg.sqrtm = lambda matrix, disp=True: root(matrix) if disp else (root(matrix), 0.0)
runpy.run_module("pytorch_fid", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(not FACES.is_dir(), reason="needs ../shared/data/faces")
def test_fid_equals_pytorch_fid(weights, tmp_path, monkeypatch, capsys):
    """`fedray evaluate FOLDER` against pytorch-fid's own command in a process of its own.

    At the fewest and the most dimensions; `test_inceptions_features_are_pytorch_fids` has all four.
    """
    monkeypatch.setenv("FEDRAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(weights.parents[2]))
    photos = sorted(FACES.rglob("*.p*"))
    for name, chosen in (("one", photos[:200:8]), ("other", photos[200::8])):
        (tmp_path / name).mkdir()
        for photo in chosen:
            Image.open(photo).save(tmp_path / name / f"{photo.parent.name}-{photo.stem}.png")
    for dimensions, features in ((64, "inception-64"), (2048, "inception")):
        command = [sys.executable, "-c", PYTORCH_FID, "one", "other", "--dims", str(dimensions), "--device", "cpu"]
        ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500, check=True)
        theirs = float(re.search(r"FID:\s+([\d.]+)", ran.stdout).group(1))
        flags = f"--dataset-name imagefolder --train-data-dir {tmp_path}/other --features {features}"
        assert main(["evaluate", str(tmp_path / "one"), *flags.split()]) == 0
        printed = capsys.readouterr().out
        name = "fid" if dimensions == 2048 else f"fid[{dimensions}]"
        ours = float(re.search(rf"{re.escape(name)} +│ +([\d.]+)", printed).group(1))
        assert ours == pytest.approx(theirs, rel=1e-3)
        assert f"biased: n is below the {dimensions} dimensions" in printed


@pytest.mark.parametrize("d", [64, 192, 768, 2048])
def test_inceptions_features_are_pytorch_fids(weights, d):
    """Built from its blocks without its download, bit for bit what its own class makes of the same weights."""
    from unittest import mock

    from pytorch_fid import inception

    state = torch.load(weights, weights_only=True)
    with mock.patch.object(inception, "load_state_dict_from_url", return_value=state):
        theirs = inception.InceptionV3([inception.InceptionV3.BLOCK_INDEX_BY_DIM[d]]).eval()
    images = torch.from_numpy(digits().images[:3])
    with torch.no_grad():
        expected = theirs(images.expand(-1, 3, -1, -1).float() / 255)[0]
    expected = torch.nn.functional.adaptive_avg_pool2d(expected, 1).flatten(1)
    name = "inception" if d == 2048 else f"inception-{d}"
    ours = networks.load(name, str(weights), torch.device("cpu"))(images)
    assert ours.shape == (3, d)
    assert torch.equal(ours, expected)


def test_absent_and_corrupt_weights_are_named_before_training(short, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    flags = f"--preset digits --features inception --evaluate-samples 4 {SHORT} --out {tmp_path}/run"
    assert main(["train", *flags.split()]) == 2
    printed = capsys.readouterr().err
    assert "fetch https://" in printed
    assert f"put it at {tmp_path}/torch/hub/checkpoints/pt_inception" in printed
    (tmp_path / "weights.pth").write_bytes(b"no weights")
    assert main(["train", *flags.split(), "--inception-weights", f"{tmp_path}/weights.pth"]) == 2
    assert "weights.pth does not hold the weights of pytorch-fid's Inception" in capsys.readouterr().err
    torch.save({"fc.bias": torch.zeros(3)}, tmp_path / "weights.pth")
    assert main(["train", *flags.split(), "--inception-weights", f"{tmp_path}/weights.pth"]) == 2
    assert "Inception (Error(s) in loading state_dict" in capsys.readouterr().err
    assert main(["train", *flags.split(), "--inception-weights", f"{tmp_path}/absent.pth"]) == 2
    assert "absent.pth: there is no such file" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# fedray evaluate


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluate") / "run"
    assert (
        main(["train", *SHORT.split(), "--evaluate-samples", "70", "--held-out-share", "0.1", "--out", str(out)]) == 0
    )
    return out


def value(printed, name):
    return re.search(rf"{re.escape(name)} +│ +(\S+)", printed).group(1)


def test_evaluate_repeats_a_runs_own_scores(run, capsys):
    assert main(["evaluate", str(run)]) == 0
    printed = capsys.readouterr().out
    for name, score in Run.open(run).result["scores"].items():
        assert value(printed, name) == f"{score['value']:.4g}"
    assert main(["evaluate", str(run), "--samples", "6", "--actors", "0"]) == 0
    assert "refused: its subsets have 8 images and there are 6" in capsys.readouterr().out


def test_evaluate_a_pipeline_that_fedray_did_not_train(run, tmp_path, capsys):
    assert main(["evaluate", str(run / "model"), "--dataset-name", "digits", "--features", "digits", "--samples", "70",
                 "--sampling-steps", "2", "--kid-subset-size", "8"]) == 0  # fmt: skip
    printed = capsys.readouterr().out
    for name, score in Run.open(run).result["scores"].items():
        if name != "copies":  # the same model and noise as the run's own evaluation
            assert value(printed, name) == f"{score['value']:.4g}"
    unet = UNet2DModel(
        sample_size=16, in_channels=3, out_channels=3, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    DDIMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "wide")
    flags = ["--dataset-name", "digits", "--features", "digits", "--samples", "4"]
    assert main(["evaluate", str(tmp_path / "wide"), *flags]) == 2
    assert "the digits are 8×8 and grey, not 16×16 in 3 channels" in capsys.readouterr().err
    (tmp_path / "none").mkdir()
    (tmp_path / "none/model_index.json").write_text("{}")
    assert main(["evaluate", str(tmp_path / "none"), *flags]) == 2
    assert "is no pipeline that diffusers can load" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: Image.new("L", (9, 8)).save(folder / "x.png"), "x.png is 9×8: only square images"),
        (lambda folder: Image.new("L", (9, 9)).save(folder / "x.png"), "must have one size and mode"),
        (lambda folder: Image.new("RGB", (8, 8)).save(folder / "x.png"), "8×8 in 3 channels"),
        (lambda folder: (folder / "x.png").write_text("text"), "x.png cannot be read"),
        (lambda folder: [path.unlink() for path in folder.iterdir()], "has no images"),
    ],
)
def test_evaluate_a_folder_of_images(tmp_path, capsys, spoil, message):
    folder = tmp_path / "drawn"
    folder.mkdir()
    for index, image in enumerate(digits().images[:40]):
        Image.fromarray(image[0]).save(folder / f"{index:02d}.png")
    flags = ["--dataset-name", "digits", "--features", "digits", "--kid-subset-size", "30"]
    assert main(["evaluate", str(folder), *flags]) == 0
    printed = capsys.readouterr().out
    assert value(printed, "precision[digits]") == "1"
    assert "40 images" in printed
    assert main(["evaluate", str(folder), *flags, "--samples", "41"]) == 2
    assert "--samples 41: " in capsys.readouterr().err
    spoil(folder)
    assert main(["evaluate", str(folder), *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("{tmp}/absent", "the directory does not exist"),
        ("{run} --samples 0", "--samples 0: a score needs at least 2"),
        ("{run} --dataset-name digits", "which is scored against its own data"),
        ("{run} --features digit", "there is no feature network 'digit'; did you mean 'digits'?"),
        ("{run} --features mine.py:absent", "--features {cwd}/mine.py:absent: "),
        ("{run} --features {run}/nothing.pt", "no TorchScript module could be loaded"),
        ("{run} --inception-weights x", "--inception-weights is given, but the features are digits"),
        ("{run} --kid-subset-size 1", "--kid-subset-size 1: it must be at least 2"),
        ("{run} --features {tmp}/broken.py:f", "{tmp}/broken.py, line 1: NameError: name 'nothing' is not defined"),
        ("{run} --features :f", "--features :f: "),
        ("{run} --resolution 8", "which is scored against its own data"),
        ("{run}/model --features digits", "say what to score against, with --dataset-name"),
        ("{run}/model --dataset-name digits", "say what to measure on"),
    ],
)
def test_mistakes_get_one_clear_message(run, tmp_path, capsys, flags, message):
    (tmp_path / "broken.py").write_text("nothing()\n")
    assert main(["evaluate", *flags.format(run=run, tmp=tmp_path).split()]) == 2
    printed = capsys.readouterr().err.strip()
    assert message.format(cwd=Path.cwd(), tmp=tmp_path) in printed
    assert len(printed.splitlines()) == 1


def test_a_folder_is_scored_in_no_order_of_its_sub_folders(tmp_path, capsys):
    data = digits()
    for label in range(10):
        (tmp_path / "real" / str(label)).mkdir(parents=True)
        for index, image in enumerate(data.images[data.labels == label][:30]):
            Image.fromarray(image[0]).save(tmp_path / "real" / str(label) / f"{index}.png")
    flags = ["--dataset-name", "digits", "--features", "digits", "--kid-subset-size", "30"]
    assert main(["evaluate", str(tmp_path / "real"), *flags]) == 0
    printed = capsys.readouterr().out
    assert float(value(printed, "fd[digits]@64")) < 60  # of one or two classes it would be hundreds
    assert main(["evaluate", str(tmp_path / "real"), *flags, "--samples", "64"]) == 0
    assert float(value(capsys.readouterr().out, "fd[digits]")) < 60


def test_a_reference_of_another_size_or_mode_is_resized_only_when_asked(tmp_path, capsys):
    for name, mode, size in (("drawn", "L", 8), ("large", "L", 16), ("colour", "RGB", 8)):
        (tmp_path / name).mkdir()
        for index, image in enumerate(digits().images[:8]):
            Image.fromarray(image[0]).resize((size, size)).convert(mode).save(tmp_path / name / f"{index}.png")
    for name, message in (("large", "16×16 in 1"), ("colour", "8×8 in 3")):
        flags = f"--features digits --kid-subset-size 4 --dataset-name imagefolder --train-data-dir {tmp_path}/{name}"
        command = ["evaluate", str(tmp_path / "drawn"), *flags.split()]
        assert main(command) == 2
        assert f"{message}; to resize (or convert) it, say --resolution 8" in capsys.readouterr().err
        assert main([*command, "--resolution", "16"]) == 2
        assert "--resolution 16: " in capsys.readouterr().err
        assert main([*command, "--resolution", "8"]) == 0


def test_pipelines_that_cannot_be_scored_are_named(run, tmp_path, capsys):
    for index, (change, message) in enumerate([
        ({"num_class_embeds": 10}, "draws given classes"),
        ({"sample_size": None}, "draws images of size None"),
        ({"sample_size": [8, 16]}, "draws images of size"),
    ]):  # fmt: skip
        shutil.copytree(run / "model", tmp_path / str(index))
        path = tmp_path / str(index) / "unet/config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        flags = ["--dataset-name", "digits", "--features", "digits", "--samples", "4"]
        assert main(["evaluate", str(tmp_path / str(index)), *flags]) == 2
        assert message in capsys.readouterr().err or "num_class_embeds" in change


def test_changed_images_are_not_scored_as_if_they_were_the_runs(tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    for index, image in enumerate(digits().images[:40]):
        Image.fromarray(image[0]).save(photos / f"{index:02d}.png")
    flags = f"--preset faces --train-data-dir {photos} --clients 2 --partition iid --resolution 8 {SHORT}"
    small = "--block-out-channels 8 --attention False --no-mid-block-attention --evaluate-samples 4 --test-share 0"
    train = ["train", *flags.split(), *small.split(), "--lr-scheduler", "constant"]
    assert main([*train, "--out", str(photos / "runs/one")]) == 2
    assert "lies below --train-data-dir" in capsys.readouterr().err
    assert main([*train, "--out", str(tmp_path / "run")]) == 0
    shutil.rmtree(tmp_path / "run/checkpoints")
    os.remove(tmp_path / "run/result.json")
    Image.fromarray(digits().images[50][0]).save(photos / "40.png")
    capsys.readouterr()
    for command in (["train", "--resume"], ["evaluate", "--features", "digits"]):
        assert main([*command, str(tmp_path / "run")]) == 2
        said = capsys.readouterr().err
        assert "have changed since it began" in said or "judges digits only" in said


@pytest.mark.slow
def test_intervals_are_over_seeds_where_there_are_several(short, tmp_path):
    for seed, clients in ((0, 4), (1, 4), (2, 4), (0, 2)):
        fedray.run(replace(short, seed=seed, clients=clients), tmp_path / f"run-{clients}-{seed}")
    table = fedray.score_table(sorted(tmp_path.glob("run-*"))).set_index(["run", "score"])
    several, alone = (table.loc[(str(tmp_path / name), "fd[digits]")] for name in ("run-4-0", "run-2-0"))
    values = [Run.open(tmp_path / f"run-4-{seed}").result["scores"]["fd[digits]"]["value"] for seed in range(3)]
    assert several["value"] == pytest.approx(np.mean(values))
    assert several["std"] == pytest.approx(np.std(values, ddof=1))
    assert several["over"] == "3 seeds"
    within = [Run.open(tmp_path / f"run-4-{seed}").result["scores"]["fd[digits]"]["std"] for seed in range(3)]
    assert several["within"] == pytest.approx(np.sqrt(np.mean(np.square(within))))
    assert alone["over"] == "10 resamples"
    assert alone["std"] > 0
    assert table["n"].isin([64, 70]).all()
