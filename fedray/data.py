"""Datasets: images as one uint8 array, and what is known of each."""

import difflib
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from fedray.choices import UserError, reason
from fedray.images import Decoded, Form, cached, images_below, sha256

CELEBA_CROP = 178  # the central square of CelebA's 178×218


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images and what is known of them.

    images: uint8 [n, channels, height, width];  labels: int64 [n] or None;  columns: by name, [n] each: folder or
    identity, attributes, and whatever a metadata file has;  known_sha256: of the images, where it is known.
    """

    images: np.ndarray
    labels: np.ndarray | None = None
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    known_sha256: str | None = None

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def sha256(self) -> str:
        """Of the images in this form: what a run, or a score's reference, can be held to."""
        return self.known_sha256 or sha256(self.images)

    def column(self, name: str) -> np.ndarray:
        """A column by name; "label" are the labels. Raises `UserError` with the names that there are."""
        columns = dict(self.columns) if self.labels is None else {"label": self.labels, **self.columns}
        if name not in columns:
            near = difflib.get_close_matches(name, columns, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise UserError(
                f"the partition needs a column {name!r}{hint}, and of its images this dataset knows "
                f"{', '.join(columns) or 'nothing'}."
            )
        return columns[name]


def digits() -> Dataset:
    """The 1,797 handwritten digits, 8×8 grey, that scikit-learn ships (E. Alpaydin, C. Kaynak, UCI 1998).

    images: uint8 [1797, 1, 8, 8] (its 17 grey levels spread over 0…255);  labels: 0…9.
    """
    from sklearn.datasets import load_digits

    loaded = load_digits()
    images = np.rint(loaded.images * (255 / 16)).astype(np.uint8)
    return Dataset(images[:, None], loaded.target.astype(np.int64))


def image_folder(directory: Path, form: Form, skip_unreadable: bool = False) -> Dataset:
    """All images below a directory, in Hugging Face's `imagefolder` form.

    The column "folder" is where an image lies, relative to the directory; folders are the labels, unless
    metadata.csv or metadata.jsonl (with a column file_name) has a column "label". Its other columns are kept.

    Raises:
        UserError: there is no such directory, no image in it, an image cannot be read, or metadata does not fit.
    """
    paths = images_below(directory)
    names = [path.relative_to(directory).as_posix() for path in paths]
    columns = {"folder": np.array([path.parent.relative_to(directory).as_posix() for path in paths])}
    for name in ("metadata.csv", "metadata.jsonl"):
        if (directory / name).is_file():
            columns |= _metadata(directory / name, names)
    decoded = cached(str(directory), names, _stamp(paths, names), lambda index: paths[index], form, skip_unreadable)
    labels = columns.pop("label") if "label" in columns else columns["folder"]
    return _dataset(decoded, _codes(labels), columns)


def celeba(directory: Path, form: Form, skip_unreadable: bool = False) -> Dataset:
    """CelebA as it is distributed (Liu et al. 2015): img_align_celeba/ or its zip, and the three lists beside it.

    The labels are the identities. Columns: identity (identity_CelebA.txt), split (list_eval_partition.txt: train,
    valid or test), and the 40 attributes as booleans (list_attr_celeba.txt). A list that is not there gives no column.

    Raises:
        UserError: the images are not there or cannot be read, or a list lacks some of them.
    """
    folder, archive = directory / "img_align_celeba", directory / "img_align_celeba.zip"
    read: Callable[[int], Path | bytes]
    if folder.is_dir():
        paths = images_below(folder)
        names, stamp = [path.name for path in paths], _stamp(paths, [path.name for path in paths])
        read = paths.__getitem__
    elif archive.is_file():
        try:
            zipped = zipfile.ZipFile(archive)
        except zipfile.BadZipFile as error:
            raise UserError(f"{archive} is damaged: {error}.") from None
        members = sorted(item.filename for item in zipped.infolist() if item.filename.endswith(".jpg"))
        names, stamp = [Path(member).name for member in members], _stamp([archive], [archive.name])
        read = lambda index: zipped.read(members[index])  # noqa: E731
    else:
        raise UserError(
            f"{directory} has neither img_align_celeba/ nor img_align_celeba.zip; --train-data-dir must name the "
            f"folder that CelebA was unpacked into."
        )
    columns: dict[str, np.ndarray] = {}
    if (path := directory / "identity_CelebA.txt").is_file():
        columns["identity"] = _listed(path, names, ["identity"])["identity"].to_numpy()
    if (path := directory / "list_eval_partition.txt").is_file():
        splits = _listed(path, names, ["split"])["split"].map({0: "train", 1: "valid", 2: "test"})
        columns["split"] = splits.to_numpy(dtype=str)
    if (path := directory / "list_attr_celeba.txt").is_file():
        attributes = path.open().readlines()[1].split()
        table = _listed(path, names, attributes, skip=2)
        columns |= {name: table[name].to_numpy() > 0 for name in attributes}
    decoded = cached(str(directory), names, stamp, read, form, skip_unreadable)
    return _dataset(decoded, _codes(columns["identity"]) if "identity" in columns else None, columns)


def hugging_face(name: str, form: Form, skip_unreadable: bool = False) -> Dataset:
    """The train split of a dataset of the Hugging Face hub, or of a local Parquet file, with an image column.

    The column "label" are the labels; other columns of numbers, booleans or text are kept.

    Raises:
        UserError: it cannot be loaded, has no image column, or an image cannot be read.
    """
    import datasets

    datasets.disable_progress_bars()
    try:
        if name.endswith(".parquet"):
            loaded = datasets.load_dataset("parquet", data_files=name, split="train")
        else:
            loaded = datasets.load_dataset(name, split="train")
    except Exception as error:  # it has dozens, of which many are its dependencies'
        raise UserError(
            f"--dataset-name {name}: no such dataset could be loaded ({reason(error)}). It must be digits, celeba, "
            f"imagefolder, a .parquet file, or the name of a Hugging Face dataset."
        ) from None
    column = next((name for name, kind in loaded.features.items() if isinstance(kind, datasets.Image)), None)
    if column is None:
        raise UserError(f"--dataset-name {name}: it has no image column, only {', '.join(loaded.features)}.")
    images = loaded.select_columns(column).cast_column(column, datasets.Image(decode=False))

    def read(index: int) -> Path | bytes:
        value = images[index][column]
        return value["bytes"] or Path(value["path"])

    table = loaded.remove_columns(column).to_pandas()
    columns = {key: table[key].to_numpy() for key in table if np.ndim(table[key].iloc[0]) == 0}
    names = [f"row {index}" for index in range(len(loaded))]
    decoded = cached(name, names, loaded._fingerprint, read, form, skip_unreadable)
    return _dataset(decoded, _codes(columns.pop("label")) if "label" in columns else None, columns)


def _codes(labels: np.ndarray) -> np.ndarray:
    """Labels of any kind as int64, in their sorted order; integers stay as they are."""
    if np.issubdtype(labels.dtype, np.integer):
        return labels.astype(np.int64)
    return np.unique(labels.astype(str), return_inverse=True)[1]


def _dataset(decoded: Decoded, labels: np.ndarray | None, columns: Mapping[str, np.ndarray]) -> Dataset:
    """What is known of the images that could be read."""
    rows = decoded.positions
    return Dataset(
        decoded.images,
        None if labels is None else labels[rows],
        {name: column[rows] for name, column in columns.items()},
        decoded.sha256,
    )


def _stamp(paths: Sequence[Path], names: Sequence[str]) -> list[list[object]]:
    """Changes whenever a file does: names, sizes and times."""
    stats = [path.stat() for path in paths]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in zip(names, stats, strict=True)]


def _metadata(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The columns of a metadata file, in the order of `names`."""
    try:
        table = pd.read_csv(path) if path.suffix == ".csv" else pd.read_json(path, lines=True)
    except ValueError as error:
        raise UserError(f"{path} cannot be read: {reason(error)}.") from None
    if "file_name" not in table:
        raise UserError(f"{path} has no column file_name.")
    table = _aligned(table.set_index("file_name"), path, names)
    return {str(name): table[name].to_numpy() for name in table}


def _listed(path: Path, names: Sequence[str], columns: list[str], skip: int = 0) -> pd.DataFrame:
    """One of CelebA's lists: a file name and its values on each line."""
    try:
        table = pd.read_csv(path, sep=r"\s+", header=None, names=["file_name", *columns], skiprows=skip)
    except ValueError as error:
        raise UserError(f"{path} cannot be read: {reason(error)}.") from None
    return _aligned(table.set_index("file_name"), path, names)


def _aligned(table: pd.DataFrame, path: Path, names: Sequence[str]) -> pd.DataFrame:
    """The rows of `names`, in their order. Raises `UserError` if some are not there, or are there twice."""
    if table.index.has_duplicates:
        raise UserError(f"{path} has {table.index[table.index.duplicated()][0]} twice.")
    missing = [name for name in names if name not in table.index]
    if missing:
        raise UserError(f"{path} lacks {len(missing)} of {len(names)} images, the first of them {missing[0]}.")
    return table.loc[list(names)]
