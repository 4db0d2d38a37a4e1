"""Data that somebody else made, and that asks for more than its pixels: pipes, bombs, other files of this machine."""

import io
import os
import struct
import zipfile
import zlib

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from fedray.cli import main
from fedray.data import images, sources
from fedray.data.captions import captions_of
from fedray.data.dataset import Dataset
from fedray.data.images import Form
from fedray.errors import UserError

FORM = Form(8, 1)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDRAY_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos").mkdir()
    for index in range(4):
        Image.new("L", (8, 8), 50 * index).save(tmp_path / "photos" / f"{index}.png")
    return tmp_path / "photos"


def png(width, height):
    """Write a grey PNG of zeros that is a thousandth of its pixels in size, without holding them."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packer, rows = zlib.compressobj(9), bytes(width + 1)
    packed = b"".join(packer.compress(rows) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


# What is no regular file


def test_a_pipe_among_the_images_is_named_and_not_waited_for(photos, capsys):
    os.mkfifo(photos / "pipe.png")
    with pytest.raises(UserError, match=r"1 of 5 images cannot be read: pipe.png \(not a file\)"):
        sources.image_folder(photos, FORM)
    assert len(sources.image_folder(photos, FORM, skip_unreadable=True)) == 4
    reference = ["--dataset-name", "imagefolder", "--train-data-dir", str(photos), "--features", "digits"]
    assert main(["evaluate", str(photos), *reference]) == 2
    assert "pipe.png cannot be read: not a file" in capsys.readouterr().err


def test_an_images_link_to_a_device_is_not_read(photos):
    (photos / "zero.png").symlink_to("/dev/zero")
    with pytest.raises(UserError, match=r"zero.png \(not a file\)"):
        sources.image_folder(photos, FORM)


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
@pytest.mark.parametrize(("make", "kind"), [(os.mkfifo, "a named pipe"), (os.mkdir, "a directory")])
def test_metadata_that_is_no_file(photos, name, make, kind):
    make(photos / name)
    with pytest.raises(UserError, match=f"{name} is {kind}, where a file should be"):
        sources.image_folder(photos, FORM)


@pytest.mark.parametrize("name", ["identity_CelebA.txt", "list_eval_partition.txt", "list_attr_celeba.txt"])
@pytest.mark.parametrize(("make", "kind"), [(os.mkfifo, "a named pipe"), (os.mkdir, "a directory")])
def test_a_list_of_celeba_that_is_no_file(photos, name, make, kind):
    photos.rename(photos.parent / "img_align_celeba")
    make(photos.parent / name)
    with pytest.raises(UserError, match=f"{name} is {kind}, where a file should be"):
        sources.celeba(photos.parent, FORM)


@pytest.mark.parametrize("name", ["identity_CelebA.txt", "list_eval_partition.txt", "list_attr_celeba.txt"])
def test_a_list_of_celeba_in_another_encoding(photos, name):
    photos.rename(photos.parent / "img_align_celeba")
    (photos.parent / name).write_bytes("4\nSmiling Größe\n".encode("latin-1") + b"0.png 1 1\n")
    with pytest.raises(UserError, match=f"{name} (is no text in UTF-8|cannot be read)"):
        sources.celeba(photos.parent, FORM)


def test_a_table_that_is_a_pipe(tmp_path, capsys):
    os.mkfifo(tmp_path / "table.parquet")
    assert main(["train", "--dry-run", "--dataset-name", str(tmp_path / "table.parquet")]) == 2
    assert "table.parquet is a named pipe, where a file should be" in capsys.readouterr().err


# Names in other bytes than UTF-8


def test_a_name_in_latin_1_is_refused_in_a_sentence(photos, capsys):
    os.rename(photos / "0.png", os.fsencode(photos) + b"/gr\xfcn.png")
    command = ["train", "--dry-run", "--preset", "faces", "--resolution", "8", "--train-data-dir", str(photos)]
    assert main(command) == 2
    assert r"gr\xfcn.png is not in UTF-8; rename it" in capsys.readouterr().err


def test_a_folder_named_in_latin_1_is_refused_in_a_sentence(photos, capsys):
    folder = os.fsdecode(os.fsencode(photos.parent) + b"/b\xe4nke")
    os.rename(photos, folder)
    for flags in (["--train-data-dir", folder], ["--out", folder], [f"--resume={folder}"]):
        assert main(["train", "--preset", "faces", *flags]) == 2
        assert r"b\xe4nke is not in UTF-8" in capsys.readouterr().err


# Bombs


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_is_refused_by_its_decoded_size(photos, capsys):
    side = 13_300
    content = png(side, side)
    assert len(content) < 600_000
    (photos / "bomb.png").write_bytes(content)
    with pytest.raises(UserError, match=r"1 of 5 images cannot be read: bomb.png \(it has 176,890,000 pixels, more"):
        sources.image_folder(photos, FORM)
    reference = ["--dataset-name", "imagefolder", "--train-data-dir", str(photos), "--features", "digits"]
    (photos / "bomb.png").write_bytes(png(30_000, 30_000)[:100_000])  # Pillow refuses this one itself
    assert main(["evaluate", str(photos), *reference]) == 2
    assert "bomb.png cannot be read: it has more than the 67,108,864 pixels" in capsys.readouterr().err


def test_large_images_are_decoded_one_at_a_time(photos, monkeypatch):
    monkeypatch.setattr(images, "LARGE", 32)
    images._alone.acquire()
    try:
        with images.ThreadPoolExecutor(2) as threads:
            small = Image.new("L", (4, 4), 7)
            buffer = io.BytesIO()
            small.save(buffer, "PNG")
            large = threads.submit(images.decode, photos / "1.png", FORM)
            assert threads.submit(images.decode, buffer.getvalue(), FORM).result(timeout=10).mean() == 7
            assert not large.done()
            images._alone.release()
            assert large.result(timeout=10).mean() == 50
    finally:
        if images._alone.locked():
            images._alone.release()


def test_a_member_of_an_archive_is_refused_by_its_size(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "img_align_celeba.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("img_align_celeba/1.jpg", "w", force_zip64=True) as member:
            for _ in range(100):
                member.write(bytes(1_000_000))
        buffer = io.BytesIO()
        Image.new("L", (8, 8), 9).save(buffer, "JPEG")
        archive.writestr("img_align_celeba/2.jpg", buffer.getvalue())
    assert (tmp_path / "img_align_celeba.zip").stat().st_size < 200_000
    with pytest.raises(UserError, match=r"1.jpg \(it has 100,000,000 bytes, more than the 67,108,864"):
        sources.celeba(tmp_path, FORM)


# Other files of this machine


@pytest.fixture
def private(tmp_path):
    """A picture and a text outside the data's folder."""
    Image.new("L", (8, 8), 99).save(tmp_path / "private.png")
    (tmp_path / "private.txt").write_text("my password")
    return tmp_path / "private.png"


@pytest.mark.parametrize("form", ["absolute", "above", "link"])
def test_a_table_does_not_read_files_outside_its_folder(photos, private, form):
    (photos / "link.png").symlink_to(private)
    path = {"absolute": str(private), "above": "../private.png", "link": "link.png"}[form]
    contents = [{"bytes": None, "path": "1.png"}, {"bytes": None, "path": path}, {"bytes": None, "path": None}]
    table = pd.DataFrame({"image": [*contents, {"bytes": (photos / "2.png").read_bytes(), "path": "/etc/passwd"}]})
    table.to_parquet(photos / "table.parquet")
    with pytest.raises(UserError, match=r"2 of 4 images cannot be read: row 1 \(its path leads out of .*; row 2"):
        sources.hugging_face(str(photos / "table.parquet"), FORM)
    kept = sources.hugging_face(str(photos / "table.parquet"), FORM, skip_unreadable=True)
    assert kept.images.mean((1, 2, 3)).tolist() == [50, 100]  # below its folder, and in the table


@pytest.mark.parametrize("name", ["../private.png", "{folder}/private.png"])
def test_captions_are_not_read_from_outside_their_folder(photos, private, name):
    name = name.format(folder=private.parent)
    dataset = Dataset(np.zeros((1, 1, 8, 8), np.uint8), None, {"file_name": np.array([name], dtype=object)})
    with pytest.raises(UserError, match="private.png leads out of its folder"):
        captions_of(dataset, str(photos), "text", None)


def test_metadata_does_not_bring_in_files_outside_its_folder(photos, private):
    names = ["0.png", "1.png", "2.png", "3.png", "../private.png"]
    pd.DataFrame({"file_name": names, "text": "x"}).to_csv(photos / "metadata.csv", index=False)
    with pytest.raises(UserError, match="names 1 images that are not there, the first of them ../private.png"):
        sources.image_folder(photos, FORM)
