"""A part of the data, and which column has the images."""

import datasets
import numpy as np
import pytest
from PIL import Image

from fedray.data import images, sources
from fedray.data.images import Form
from fedray.data.partition import ByAttribute, ByLabel, Dirichlet
from fedray.data.sources import digits
from fedray.errors import UserError
from fedray.seeds import generator
from fedray.tasks.images import Images

FORM = Form(8, 1)


@pytest.fixture
def folder(tmp_path):
    """Twelve digits in two folders, and captions that say which."""
    for index, image in enumerate(digits().images[:12]):
        place = tmp_path / "photos" / "ab"[index % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0]).save(place / f"{index:02d}.png")
    return tmp_path / "photos"


def test_a_part_of_a_folder_is_drawn_and_only_it_is_decoded(folder, monkeypatch):
    whole = sources.image_folder(folder, FORM)
    names, decoded = whole.columns["file_name"].tolist(), []
    decode = images.decode
    monkeypatch.setattr(images, "decode", lambda source, form: decoded.append(source.name) or decode(source, form))
    part = sources.image_folder(folder, FORM, limit=5)
    rows = [names.index(name) for name in part.columns["file_name"]]
    assert len(set(rows)) == 5
    assert rows == sorted(rows) != list(range(5))  # at random
    assert np.array_equal(part.images, whole.images[rows])
    assert np.array_equal(part.labels, whole.labels[rows])
    assert sorted(decoded) == sorted(name.split("/")[1] for name in part.columns["file_name"])
    assert np.array_equal(sources.image_folder(folder, FORM, limit=5).images, part.images)
    assert np.array_equal(sources.image_folder(folder, FORM, limit=100).images, whole.images)


def test_an_image_that_cannot_be_read_leaves_the_others_in_their_rows(folder):
    part = sources.image_folder(folder, FORM, limit=5)
    name = part.columns["file_name"][2]
    (folder / name).write_bytes(b"none")
    with pytest.raises(UserError, match=f"1 of 5 images cannot be read: {name}"):
        sources.image_folder(folder, FORM, limit=5)
    left = sources.image_folder(folder, FORM, True, limit=5)
    assert left.columns["file_name"].tolist() == np.delete(part.columns["file_name"], 2).tolist()
    assert np.array_equal(left.images, np.delete(part.images, 2, axis=0))


def test_a_part_of_the_digits():
    whole, part = digits(), Images(max_train_samples=100).dataset()
    assert part.images.shape == (100, 1, 8, 8)
    rows = [int(np.flatnonzero((whole.images == image).all((1, 2, 3)))[0]) for image in part.images]
    assert rows == sorted(rows)
    assert np.array_equal(part.labels, whole.labels[rows])
    assert set(part.labels) == set(range(10))
    with pytest.raises(UserError, match="--max-train-samples 0: it must be above 0"):
        Images(max_train_samples=0).check("ddpm", 10)


def test_a_table_may_have_several_columns_of_images(tmp_path):
    """As diffusers' scripts, `--image_column` picks one; a limit takes the same rows of all columns."""
    first, second = (list(map(Image.fromarray, digits().images[start : start + 6, 0])) for start in (0, 6))
    table = {"image": first, "conditioning": second, "label": list(range(6))}
    features = datasets.Features(image=datasets.Image(), conditioning=datasets.Image(), label=datasets.Value("int64"))
    path = str(tmp_path / "two.parquet")
    datasets.Dataset.from_dict(table, features=features).to_parquet(path)
    for column, start in ((None, 0), ("image", 0), ("conditioning", 6)):
        task = Images(path, image_column=column, max_train_samples=4)
        found = task.dataset()
        assert len(found) == 4
        assert np.array_equal(found.images, digits().images[start:][found.labels])
    with pytest.raises(UserError, match="--image-column picture: .*two.parquet has images in image, conditioning"):
        Images(path, image_column="picture").dataset()
    with pytest.raises(UserError, match="--image-column is for Hugging Face datasets"):
        Images(image_column="image").check("ddpm", 10)


def test_configurations_of_a_dataset_are_told_apart(tmp_path):
    """A local repository whose README names two, as the hub's have them."""
    for name, start in (("upper", 0), ("lower", 6)):
        path = tmp_path / "data" / f"{name}.parquet"
        path.parent.mkdir(exist_ok=True)
        pictures = list(map(Image.fromarray, digits().images[start : start + 3, 0]))
        features = datasets.Features(image=datasets.Image())
        datasets.Dataset.from_dict({"image": pictures}, features=features).to_parquet(path)
    lines = [f"- config_name: {name}\n  data_files: {name}.parquet\n" for name in ("upper", "lower")]
    (tmp_path / "data" / "README.md").write_text(f"---\nconfigs:\n{''.join(lines)}---\n")
    for name, start in (("upper", 0), ("lower", 6)):
        found = Images(str(tmp_path / "data"), dataset_config_name=name).dataset()
        assert np.array_equal(found.images, digits().images[start : start + 3])


# Labels


@pytest.fixture
def flat(tmp_path):
    """Six digits in one folder, as COIL-20 names them: obj1__0.png …"""
    (tmp_path / "flat").mkdir()
    for index, image in enumerate(digits().images[:6]):
        Image.fromarray(image[0]).save(tmp_path / "flat" / f"obj{index // 2 + 9}__{index}.png")
    return tmp_path / "flat"


@pytest.mark.parametrize("partition", [ByLabel(), Dirichlet(0.5), ByAttribute("folder")], ids=str)
def test_a_partition_by_what_all_have_alike_is_refused(flat, partition):
    dataset = sources.image_folder(flat, FORM)
    with pytest.raises(UserError, match=r"--partition .*: all examples have the same value .*--label-pattern"):
        partition.split(dataset, 2, generator(0, "partition"))
    assert len(partition.split(dataset, 1, generator(0, "partition"))[0]) == 6


def test_labels_in_file_names(flat):
    for pattern, expected in ((r"obj(\d+)__", [10, 10, 11, 11, 9, 9]), (r"obj\d", [1, 1, 1, 1, 0, 0])):
        dataset = Images("imagefolder", str(flat), label_pattern=pattern).dataset()
        assert dataset.labels.tolist() == (expected if "(" in pattern else [0, 0, 0, 0, 1, 1])
    shards = ByLabel().split(
        Images("imagefolder", str(flat), label_pattern=r"obj(\d+)__").dataset(), 3, generator(0, "p")
    )
    assert sorted(sorted(np.array([10, 10, 11, 11, 9, 9])[shards[client]].tolist()) for client in range(3)) == [
        [9, 9], [10, 10], [11, 11],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("(", "is no regular expression"), ("cat(.)", "finds nothing in 6 names, the first obj10__2")],
)
def test_patterns_that_find_nothing(flat, pattern, message):
    with pytest.raises(UserError, match=message):
        Images("imagefolder", str(flat), label_pattern=pattern).dataset()
    with pytest.raises(UserError, match="--label-pattern is for folders of images"):
        Images(label_pattern="a").check("ddpm", 10)
