"""Images of all kinds from folders of all forms, decoded once."""

import json
import multiprocessing
import os
import shutil
import signal
import time
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from fedray.cli import main
from fedray.data import images, sources
from fedray.data.dataset import Dataset
from fedray.data.images import Form
from fedray.data.partition import ByAttribute, ByFolder, Dirichlet, Quantity, hold_out
from fedray.errors import UserError
from fedray.record.run import Run
from fedray.seeds import generator
from fedray.tasks.ddpm import DDPM

SHARED = Path(__file__).parents[3] / "shared/data"
TINY = "--block-out-channels 8 16 --attention False False --no-mid-block-attention --resolution 16 --rounds 2"
SHORT = f"{TINY} --local-epochs 1 --evaluate-samples 2 --sampling-steps 2 --actors 0 --lr-warmup-steps 0"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDRAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def gradient(width=48, height=32):
    """RGB, red rising to the right and green downwards; blue is 0."""
    red = np.broadcast_to(np.linspace(0, 255, width), (height, width))
    green = np.broadcast_to(np.linspace(0, 255, height)[:, None], (height, width))
    return Image.fromarray(np.stack([red, green, 0 * red], -1).astype(np.uint8))


@pytest.fixture
def odd(tmp_path):
    """A folder of everything that people have: each is the same picture, where the format allows it."""
    folder = tmp_path / "odd"
    folder.mkdir()
    picture = gradient()
    picture.save(folder / "a.png")
    picture.save(folder / "b.bmp")
    picture.save(folder / "c.tiff")
    picture.save(folder / "d.webp", lossless=True)
    picture.save(folder / "e.ppm")
    picture.convert("CMYK").save(folder / "f-cmyk.jpg", quality=98)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90° clockwise when shown
    picture.transpose(Image.Transpose.ROTATE_90).save(folder / "g-rotated.jpg", exif=exif, quality=98)
    picture.save(folder / "h-first.webp", save_all=True, append_images=[Image.new("RGB", picture.size)], lossless=True)
    picture.convert("RGBA").save(folder / "i-rgba.png")
    return folder


def test_all_kinds_of_images_are_the_same_picture(odd):
    dataset = sources.image_folder(odd, Form(32, 3))
    expected = np.asarray(gradient().crop((8, 0, 40, 32))).transpose(2, 0, 1).astype(int)  # the central square
    assert dataset.images.shape == (9, 3, 32, 32)
    for name, image in zip(sorted(path.name for path in odd.iterdir()), dataset.images, strict=True):
        assert np.abs(image - expected).mean() < 4, name
        assert np.abs(image - expected).max() < 40, name
    assert np.array_equal(dataset.images[0], expected)


def test_16_bits_palettes_and_single_pixels(tmp_path):
    ramp = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "a-16bit.png")
    gradient(32, 32).convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "b-palette.png", transparency=0)
    Image.new("RGB", (1, 1), (10, 200, 30)).save(tmp_path / "c-single.png")
    grey = sources.image_folder(tmp_path, Form(32, 1)).images
    assert np.array_equal(grey[0, 0], ramp // 257)
    colour = sources.image_folder(tmp_path, Form(32, 3)).images
    assert np.abs(colour[1].astype(int) - np.asarray(gradient(32, 32)).transpose(2, 0, 1)).mean() < 12
    assert (colour[2] == np.array([10, 200, 30])[:, None, None]).all()


def test_resizing_is_antialiased(tmp_path):
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    small = sources.image_folder(tmp_path, Form(16, 1)).images
    assert np.abs(small[..., 2:-2].astype(int) - 127).max() < 8  # nearest neighbour would give 0 or 255


def test_images_that_cannot_be_read_are_named(odd, cache, capsys, tmp_path):
    (odd / "note.png").write_text("this is no picture")
    damaged = (odd / "g-rotated.jpg").read_bytes()
    (odd / "half.jpg").write_bytes(damaged[: len(damaged) // 2])
    with pytest.raises(UserError) as caught:
        sources.image_folder(odd, Form(16, 3))
    assert "2 of 11 images cannot be read: half.jpg (" in str(caught.value)
    assert "note.png (not an image)" in str(caught.value)
    assert "--skip-unreadable" in str(caught.value)
    dataset = sources.image_folder(odd, Form(16, 3), skip_unreadable=True)
    assert len(dataset) == len(dataset.labels) == len(dataset.column("folder")) == 9
    alone = tmp_path / "alone"
    alone.mkdir()
    for path in odd.iterdir():
        if path.name not in ("note.png", "half.jpg"):
            shutil.copy2(path, alone)
    assert np.array_equal(dataset.images, sources.image_folder(alone, Form(16, 3)).images)
    flags = (
        f"--preset faces --train-data-dir {odd} --partition iid --clients 2 --held-out-share 0 --test-share 0 {SHORT}"
    )
    assert main(["train", *flags.split(), "--out", str(tmp_path / "run")]) == 2
    assert "2 of 11 images cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main(["train", *flags.split(), "--out", str(tmp_path / "run"), "--skip-unreadable"]) == 0


def test_decoded_once(odd, cache, monkeypatch):
    first = sources.image_folder(odd, Form(16, 3)).images
    with monkeypatch.context() as context:
        context.setattr(images, "decode", None)
        again = sources.image_folder(odd, Form(16, 3)).images
    assert isinstance(again, np.memmap)
    assert np.array_equal(first, again)
    gradient().transpose(Image.Transpose.ROTATE_180).save(odd / "a.png")
    assert not np.array_equal(first[0], sources.image_folder(odd, Form(16, 3)).images[0])
    sources.image_folder(odd, Form(16, 1))
    assert len(list(cache.glob("*/images.npy"))) == 3


def _decode(folder, start):
    start.wait()
    sources.image_folder(folder, Form(64, 3))


def test_two_writers_and_a_killed_one(tmp_path, cache):
    folder = tmp_path / "many"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(60):
        Image.fromarray(rng.integers(0, 256, (400, 400, 3), np.uint8)).save(folder / f"{index:03d}.png")
    spawn = multiprocessing.get_context("fork")
    start = spawn.Event()
    start.set()
    killed = spawn.Process(target=_decode, args=(folder, start))
    killed.start()
    deadline = time.monotonic() + 30
    while not list(cache.glob("*.aside/images.npy")) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    assert list(cache.glob("*.aside"))  # it was killed in the middle
    start.clear()
    writers = [spawn.Process(target=_decode, args=(folder, start)) for _ in range(2)]
    for writer in writers:
        writer.start()
    start.set()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    assert not list(cache.glob("*.aside"))
    (whole,) = cache.glob("*/images.npy")
    expected = [images.decode(path, Form(64, 3)) for path in sorted(folder.iterdir())]
    assert np.array_equal(np.load(whole), np.stack(expected))


def test_metadata_files(tmp_path):
    for name in ("x/1.png", "y/2.png", "y/3.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        gradient().save(tmp_path / name)
    assert sources.image_folder(tmp_path, Form(8, 1)).labels.tolist() == [0, 1, 1]
    table = pd.DataFrame({"file_name": ["y/3.png", "x/1.png", "y/2.png"], "label": ["b", "a", "a"], "age": [3, 1, 2]})
    table.to_csv(tmp_path / "metadata.csv", index=False)
    dataset = sources.image_folder(tmp_path, Form(8, 1))
    assert dataset.labels.tolist() == [0, 0, 1]
    assert dataset.column("age").tolist() == [1, 2, 3]
    assert dataset.column("folder").tolist() == ["x", "y", "y"]
    (tmp_path / "metadata.csv").unlink()
    table[:2].to_json(tmp_path / "metadata.jsonl", orient="records", lines=True)
    with pytest.raises(UserError, match=r"metadata.jsonl lacks 1 of 3 images, the first of them y/2.png"):
        sources.image_folder(tmp_path, Form(8, 1))
    table.drop(columns="file_name").to_json(tmp_path / "metadata.jsonl", orient="records", lines=True)
    with pytest.raises(UserError, match="has no column file_name"):
        sources.image_folder(tmp_path, Form(8, 1))


def test_parquet_and_hugging_face_datasets(odd, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    paths = sorted(str(path) for path in odd.iterdir())
    table = datasets.Dataset.from_dict({"picture": paths, "label": list(range(9)), "age": [float(n) for n in range(9)]})
    table.cast_column("picture", datasets.Image()).to_parquet(str(tmp_path / "odd.parquet"))
    dataset = sources.hugging_face(str(tmp_path / "odd.parquet"), Form(16, 3))
    assert np.array_equal(dataset.images, sources.image_folder(odd, Form(16, 3)).images)
    assert dataset.labels.tolist() == list(range(9))
    assert dataset.column("age").tolist() == list(range(9))
    monkeypatch.chdir(tmp_path)
    named = DDPM(dataset_name="odd.parquet", resolution=16, channels=3)
    monkeypatch.chdir("/")  # where an actor may be
    assert np.array_equal(named.dataset().images, dataset.images)
    with pytest.raises(UserError, match="no such dataset could be loaded"):
        sources.hugging_face(str(tmp_path / "absent.parquet"), Form(16, 3))


# CelebA


@pytest.fixture
def celeba(tmp_path):
    """CelebA's form, of 40 real faces: 178×218 JPEGs, the three lists, attributes that follow from the numbers."""
    if not SHARED.is_dir():
        pytest.skip("needs the images in ../shared/data")
    root = tmp_path / "celeba"
    (root / "img_align_celeba").mkdir(parents=True)
    names = [f"{index + 1:06d}.jpg" for index in range(40)]
    for index, name in enumerate(names):
        face = Image.open(SHARED / f"faces/s{index // 5 + 1:02d}/{index % 5 + 1:02d}.png").convert("RGB")
        face.resize((178, 218)).save(root / "img_align_celeba" / name)
    smiling, male = [1 if n % 3 == 0 else -1 for n in range(40)], [1 if n < 25 else -1 for n in range(40)]
    rows = [f"{name}  {s:2d} {m:2d}" for name, s, m in zip(names, smiling, male, strict=True)]
    (root / "list_attr_celeba.txt").write_text("\n".join(["40", "Smiling Male", *rows]) + "\n")
    lines = [f"{name} {n // 5 + 100}" for n, name in enumerate(names)]
    (root / "identity_CelebA.txt").write_text("\n".join(lines) + "\n")
    lines = [f"{name} {n // 15}" for n, name in enumerate(names)]
    (root / "list_eval_partition.txt").write_text("\n".join(lines) + "\n")
    return root


def test_celeba_is_read_from_its_folder_or_its_zip(celeba):
    dataset = sources.celeba(celeba, Form(64, 3, crop=178))
    assert dataset.images.shape == (40, 3, 64, 64)
    photo = Image.open(celeba / "img_align_celeba/000007.jpg").crop((0, 20, 178, 198))
    expected = np.asarray(photo.resize((64, 64), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.array_equal(dataset.images[6], expected)
    assert dataset.labels.tolist() == dataset.column("identity").tolist()
    assert dataset.column("identity").tolist() == [n // 5 + 100 for n in range(40)]
    assert dataset.column("split").tolist() == ["train"] * 15 + ["valid"] * 15 + ["test"] * 10
    assert dataset.column("Smiling").sum() == 14
    with zipfile.ZipFile(celeba / "img_align_celeba.zip", "w") as archive:
        for path in (celeba / "img_align_celeba").iterdir():
            archive.write(path, f"img_align_celeba/{path.name}")
    shutil.rmtree(celeba / "img_align_celeba")
    assert np.array_equal(sources.celeba(celeba, Form(64, 3, crop=178)).images, dataset.images)


@pytest.mark.parametrize(
    ("partition", "clients"),
    [
        ("iid", 4), ("quantity:0.5", 4), ("by-attribute:Smiling", 4), ("by-folder", 8), ("by-folder", 3),
        ("by-label", 4), ("dirichlet:0.5", 4), ("dirichlet:0.5:Male", 4),
    ],
)  # fmt: skip
def test_celeba_trains_with_each_partition_and_the_report_is_right(celeba, tmp_path, partition, clients):
    out = tmp_path / "run"
    flags = (
        f"--preset celeba --train-data-dir {celeba} --partition {partition} --clients {clients} {SHORT} "
        f"--norm-num-groups 8 --layers-per-block 1 --held-out-share 0.1 --train-batch-size 4"
    )
    assert main(["train", *flags.split(), "--out", str(out)]) == 0
    report = pd.read_csv(out / "partition.csv").set_index("client")
    assert Image.open(out / "partition.png").width > 500
    # Counted again from the files themselves.
    lists = pd.read_csv(celeba / "list_attr_celeba.txt", sep=r"\s+", skiprows=1)
    lists["identity"] = pd.read_csv(celeba / "identity_CelebA.txt", sep=" ", header=None, index_col=0)[1].to_numpy()
    config = Run.open(out).config
    dataset = config.task.dataset()
    shards = config.partition.split(dataset, clients, generator(config.seed, "partition"))
    owner = np.concatenate([np.full(size, client) for client, size in enumerate(shards.sizes)])
    lists = lists.iloc[shards.indices].assign(client=owner)
    counted = lists.groupby("client")
    assert report["examples"].tolist() == counted.size().tolist()
    assert report["examples"].sum() == 40
    assert (report["train"] + report["held out"] + report["test"] == report["examples"]).all()
    assert np.abs(report["held out"] - 0.1 * counted.size().to_numpy()).max() < 1
    assert abs(report["held out"].sum() - 0.1 * report["examples"].sum()) <= 1  # a client with one example keeps it
    for name in ("Smiling", "Male"):
        assert report[name].to_numpy() == pytest.approx(
            counted[name].agg(lambda values: (values > 0).mean()).to_numpy()
        )
    for identity, part in lists.groupby("identity"):
        share = (part.groupby("client").size() / counted.size()).reindex(range(clients)).fillna(0)
        assert report[f"identity {identity}"].to_numpy() == pytest.approx(share.to_numpy())
        if partition == "by-folder":
            assert part["client"].nunique() == 1
    if partition == "by-attribute:Smiling":
        assert set(report["Smiling"]) >= {0.0, 1.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: shutil.rmtree(root / "img_align_celeba"), "has neither img_align_celeba/ nor"),
        (
            lambda root: (root / "identity_CelebA.txt").write_text("000001.jpg 5\n"),
            "identity_CelebA.txt lacks 39 of 40",
        ),
        (lambda root: (root / "list_attr_celeba.txt").unlink(), "needs a column 'Smiling'"),
    ],
)
def test_celeba_that_is_not_whole(celeba, tmp_path, capsys, change, message):
    change(celeba)
    flags = f"--preset celeba --train-data-dir {celeba} --partition by-attribute:Smiling --clients 2 {SHORT}"
    assert main(["train", *flags.split(), "--norm-num-groups", "8", "--out", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--train-data-dir {tmp}/absent", "--train-data-dir {tmp}/absent does not exist"),
        ("--train-data-dir {tmp}/file", "{tmp}/file is a file, not a directory"),
        ("--train-data-dir {tmp}/empty", "has no images"),
        ("", "--dataset-name imagefolder needs --train-data-dir"),
        ("--train-data-dir {tmp}/one --partition by-attribute:Smilling", "needs a column 'Smilling'"),
        ("--train-data-dir {tmp}/one --clients 3", "by-folder has only 1 to deal, by folder"),
        (
            "--train-data-dir {tmp}/one --clients 1 --held-out-share 0.8",
            "a share of 0.8 of 1 examples at 1 clients is to be held out, and that is none",
        ),
        ("--train-data-dir {tmp}/one --dataset-name digits", "--train-data-dir is given with --dataset-name digits"),
        ("--dataset-name celebA --train-data-dir {tmp}/one", "say --dataset-name imagefolder or celeba"),
    ],
)
def test_bad_sources_get_one_clear_message(tmp_path, capsys, flags, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "one").mkdir()
    for name in "123" if "--clients 3" in flags else "1":
        gradient().save(tmp_path / f"one/{name}.png")
    command = f"train --preset faces --clients 1 {SHORT} {flags} --out {tmp_path}/run"
    assert main(command.format(tmp=tmp_path).split()) == 2
    printed = capsys.readouterr().err.strip()
    assert message.format(tmp=tmp_path) in printed
    assert len(printed.splitlines()) == 1
    assert not (tmp_path / "run").exists()


# Partitions of columns


def test_partitions_by_column():
    rng = generator(0, "partition")
    identity = np.repeat(np.arange(12), [3, 9, 1, 7, 2, 2, 5, 6, 4, 8, 10, 3])
    smiling = np.arange(60) % 3 == 0
    dataset = Dataset(np.zeros((60, 1, 2, 2), np.uint8), None, {"identity": identity, "Smiling": smiling})
    alone = ByFolder().split(dataset, 12, rng)
    assert [set(identity[alone[client]].tolist()) for client in range(12)] == [{client} for client in range(12)]
    dealt = ByFolder().split(dataset, 5, rng)
    assert sorted(len(set(identity[dealt[client]].tolist())) for client in range(5)) == [2, 2, 2, 3, 3]
    assert sum(len(set(identity[dealt[client]].tolist())) for client in range(5)) == 12
    shares = [
        smiling[shard].mean() for shard in map(ByAttribute("Smiling").split(dataset, 3, rng).__getitem__, range(3))
    ]
    assert shares == [0, 0, 1]
    assert Dirichlet(0.5, "Smiling").split(dataset, 4, rng).sizes.sum() == 60
    sizes = [Quantity(0.3).split(sources.digits(), 8, generator(seed)).sizes / 1797 for seed in range(300)]
    assert np.var(sizes) == pytest.approx(7 / 64 / (8 * 0.3 + 1), rel=0.15)


def test_held_out_shares_are_taken_per_client():
    shards = Quantity(0.5).split(sources.digits(), 6, generator(3))
    train, held_out, test = hold_out(shards, (0.2, 0.1), generator(4))
    for client in range(6):
        parts = [set(part[client].tolist()) for part in (train, held_out, test)]
        assert set.union(*parts) == set(shards[client].tolist())
        assert sum(map(len, parts)) == len(shards[client])
        for part, share in zip(parts[1:], (0.2, 0.1), strict=True):
            assert abs(len(part) - share * len(shards[client])) < 1
    assert np.array_equal(hold_out(shards, (0.0, 0.0), generator(4))[0].indices, shards.indices)


def test_report_of_rounds_tells_local_from_global_loss(celeba, tmp_path):
    flags = f"--preset celeba --train-data-dir {celeba} --clients 4 --held-out-share 0.3 --norm-num-groups 8 {SHORT}"
    assert main(["train", *flags.split(), "--out", str(tmp_path / "run")]) == 0
    for line in (tmp_path / "run/rounds.jsonl").read_text().splitlines():
        held_out = json.loads(line)["held_out"]
        losses = list(held_out["clients"].values())
        assert len(losses) == 4
        assert held_out["global"] == pytest.approx(np.mean(losses))  # 3 images each
        assert held_out["spread"] == pytest.approx(np.std(losses))
        assert held_out["local"] > 0
        assert held_out["local"] != held_out["global"]


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
def test_forty_people_are_forty_clients(tmp_path):
    """The preset but for four rounds at half the size: the loss on photos that were held out falls by at least 30 %."""
    flags = f"--preset faces --train-data-dir {SHARED}/faces --partition by-folder --rounds 4 --evaluate-samples 0"
    flags += " --resolution 16"
    assert main(["train", *flags.split(), "--out", str(tmp_path / "run")]) == 0
    rows = Run.open(tmp_path / "run").rows
    assert len(rows[0]["cohort"]) == 40
    assert [client["examples"] for client in rows[0]["clients"]] == [7] * 40  # of 10: 2 are held out, 1 is for tests
    assert rows[3]["held_out"]["global"] < 0.7 * rows[0]["held_out"]["global"]
