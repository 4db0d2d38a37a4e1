"""Sources of datasets: scikit-learn's digits, folders of images, CelebA, Hugging Face."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedray import cache
from fedray.data.dataset import Dataset, keep
from fedray.data.images import LARGEST_FILE, Decoded, Form, cached, images_below, sha256, some
from fedray.errors import UserError, reason
from fedray.files import read_text, regular
from fedray.storage import shown

if TYPE_CHECKING:
    import pandas as pd

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CELEBA_CROP = 178  # the central square of CelebA's 178×218


def digits(limit: int | None = None) -> Dataset:
    """Load the 1,797 handwritten digits, 8×8 grey, that scikit-learn ships (E. Alpaydin, C. Kaynak, UCI 1998).

    images: uint8 [1797, 1, 8, 8] (its 17 grey levels spread over 0…255);  labels: 0…9;  limit: take so many.
    """

    def make(aside: Path) -> None:
        from sklearn.datasets import load_digits  # takes a second to import

        loaded = load_digits()
        taken = some(len(loaded.images), limit)
        np.save(aside / "images.npy", np.rint(loaded.images[taken] * (255 / 16)).astype(np.uint8)[:, None])
        np.save(aside / "labels.npy", loaded.target[taken].astype(np.int64))

    key = ["digits", 1, *([] if limit is None else [limit])]
    place = cache.kept("unpacking scikit-learn's digits", key, make)
    images, labels = (np.load(place / f"{name}.npy") for name in ("images", "labels"))
    return keep(place / "images.npy", sha256(images), labels, {})


def image_folder(
    directory: Path,
    form: Form,
    skip_unreadable: bool = False,
    limit: int | None = None,
    label_pattern: str | None = None,
    flag: str = "--train-data-dir ",
) -> Dataset:
    """Load all images below a directory, in Hugging Face's `imagefolder` form.

    The column "folder" is where an image lies, relative to the directory; folders are the labels, unless
    metadata.csv or metadata.jsonl (with a column file_name, relative to where it lies) has a column "label", or a
    pattern finds them in file names, by its first group. Other columns are kept. With a limit, as many images are
    decoded. `flag` is what named the directory, for messages.

    Raises:
        UserError: there is no such directory, no image in it, an image cannot be read, or metadata does not fit.
    """
    paths = images_below(directory, flag)
    names = [path.relative_to(directory).as_posix() for path in paths]
    folders = [path.parent.relative_to(directory).as_posix() for path in paths]
    columns = {"folder": np.array(folders, dtype=object), "file_name": np.array(names, dtype=object)}
    columns |= _metadata(directory, names)
    if label_pattern is not None:
        columns["label"] = _in_names(names, label_pattern)
    labels = _codes(columns.pop("label") if "label" in columns else columns["folder"])
    stamp = [str(directory.resolve()), *_stamp(paths)]
    decoded = cached(shown(directory), names, stamp, lambda index: paths[index], form, skip_unreadable, limit)
    return _dataset(decoded, labels, columns)


def celeba(directory: Path, form: Form, skip_unreadable: bool = False, limit: int | None = None) -> Dataset:
    """Load CelebA as distributed (Liu et al. 2015): img_align_celeba/ or its zip, and the three lists beside it.

    The labels are the identities. Columns: identity (identity_CelebA.txt), split (list_eval_partition.txt: train,
    valid or test), and the 40 attributes as booleans (list_attr_celeba.txt). A list that is not there gives no column.

    Raises:
        UserError: the images are not there or cannot be read, or a list lacks some of them.
    """
    folder, archive = directory / "img_align_celeba", directory / "img_align_celeba.zip"
    read: Callable[[int], Path | bytes]
    if folder.is_dir():
        paths = images_below(folder)
        names, stamp = [path.name for path in paths], [str(folder.resolve()), *_stamp(paths)]
        read = paths.__getitem__
    elif regular(archive).is_file():
        try:
            zipped = zipfile.ZipFile(archive)
        except Exception as error:  # zipfile raises what it likes for a damaged one
            raise UserError(f"{shown(archive)} is damaged: {reason(error)}.") from None
        members = sorted(name for name in zipped.namelist() if name.endswith(".jpg") and "/._" not in name)
        if not members:
            raise UserError(f"{shown(archive)} has no .jpg in it.")
        names, stamp = [Path(member).name for member in members], [str(archive.resolve()), *_stamp([archive])]

        def read(index: int) -> bytes:
            return _member(zipped, members[index])

    else:
        raise UserError(
            f"{shown(directory)} has neither img_align_celeba/ nor img_align_celeba.zip; --train-data-dir must name "
            f"the folder that CelebA was unpacked into."
        )
    columns: dict[str, np.ndarray] = {}
    if regular(path := directory / "identity_CelebA.txt").is_file():
        columns["identity"] = _listed(path, names, ["identity"])["identity"].to_numpy()
    if regular(path := directory / "list_eval_partition.txt").is_file():
        splits = _listed(path, names, ["split"])["split"].map({0: "train", 1: "valid", 2: "test"})
        if splits.isna().any():
            raise UserError(f"{shown(path)}: the split of {splits.index[splits.isna()][0]} is none of 0, 1 and 2.")
        columns["split"] = splits.to_numpy(dtype=object)
    if regular(path := directory / "list_attr_celeba.txt").is_file():
        header = read_text(path).splitlines()[:2]
        attributes = header[1].split() if len(header) == 2 else []
        if not attributes:
            raise UserError(f"{shown(path)} has no names of attributes in its second line.")
        table = _listed(path, names, attributes, skip=2)
        columns |= {name: table[name].to_numpy() > 0 for name in attributes}
    decoded = cached(shown(directory), names, stamp, read, form, skip_unreadable, limit)
    return _dataset(decoded, _codes(columns["identity"]) if "identity" in columns else None, columns)


def hugging_face(
    name: str,
    form: Form,
    skip_unreadable: bool = False,
    limit: int | None = None,
    config_name: str | None = None,
    image_column: str | None = None,
) -> Dataset:
    """Load the train split of a Hugging Face dataset, or a local Parquet file, with an image column.

    Args:
        limit: how many images to decode.
        config_name: of the dataset, where it has several configurations.
        image_column: by default the first that holds images.

    The column "label" are the labels; other columns of numbers, booleans or text are kept. Images are in the table, or
    in files below its folder (or in what was fetched from the hub): a table may come from anyone, and a path in it must
    not bring another file of this machine into the data.

    Raises:
        UserError: it cannot be loaded, has no image column, or an image cannot be read.
    """
    import datasets
    from huggingface_hub.constants import HF_HUB_CACHE

    datasets.disable_progress_bars()
    try:
        if name.endswith(".parquet"):
            loaded = datasets.load_dataset("parquet", data_files=str(regular(Path(name))), split="train")
        else:
            loaded = datasets.load_dataset(name, config_name, split="train")
    except UserError:
        raise
    except Exception as error:  # it has dozens, of which many are its dependencies'
        raise UserError(
            f"--dataset-name {name}: no such dataset could be loaded ({reason(error)}). It must be digits, celeba, "
            f"imagefolder, a .parquet file, or the name of a Hugging Face dataset."
        ) from None
    found = [name for name, kind in loaded.features.items() if _holds_images(kind)]
    if not found:
        raise UserError(f"--dataset-name {name}: it has no image column, only {', '.join(loaded.features)}.")
    if image_column not in (None, *found):
        raise UserError(f"--image-column {image_column}: {name} has images in {', '.join(found)}.")
    column = image_column or found[0]
    images = loaded.select_columns(column).cast_column(column, datasets.Image(decode=False))
    if Path(name).exists():
        folders = [Path(name) if Path(name).is_dir() else Path(name).parent]
    else:
        fetched = datasets.config
        folders = [Path(place) for place in (fetched.HF_DATASETS_CACHE, fetched.DOWNLOADED_DATASETS_PATH, HF_HUB_CACHE)]

    def read(index: int) -> Path | bytes:
        value = images[index][column]
        return value["bytes"] or _below(folders, value["path"])

    names = [f"row {index}" for index in range(len(loaded))]
    columns = _columns(loaded.remove_columns(column).to_pandas(), f"--dataset-name {name}", names)
    labels = _codes(columns.pop("label")) if "label" in columns else None
    return _dataset(
        cached(name, names, [loaded._fingerprint, column], read, form, skip_unreadable, limit), labels, columns
    )


def _below(folders: Sequence[Path], path: str | None) -> Path:
    """Return the file of that path, if it is below one of the folders, of which the first is for a relative path."""
    if path is None:
        raise ValueError("the table has neither its contents nor its path")
    found = (folders[0] / path).resolve()
    if not any(found.is_relative_to(folder.resolve()) for folder in folders):
        raise ValueError("its path leads out of the table's folder, and its contents are not in the table")
    return found


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    """Read a file in an archive: no more of it than its directory says, which must not be too much."""
    size = archive.getinfo(name).file_size
    if size > LARGEST_FILE:
        raise ValueError(f"it has {size:,} bytes, more than the {LARGEST_FILE:,} that are read")
    return archive.read(name)


def _holds_images(kind: Any) -> bool:
    """Recognise an image column, marked by `datasets` or written by pandas and others as encoded bytes and a path."""
    import datasets

    return isinstance(kind, datasets.Image) or (isinstance(kind, dict) and "bytes" in kind)


def _codes(labels: np.ndarray) -> np.ndarray:
    """Encode labels of any kind as int64, in their sorted order; integers stay as they are."""
    if np.issubdtype(labels.dtype, np.integer):
        return labels.astype(np.int64)
    return np.unique(labels.astype(str), return_inverse=True)[1]


def _in_names(names: Sequence[str], pattern: str) -> np.ndarray:
    """Find a label in each file name: a number where all are, else text. Raises `UserError` where one has none."""
    try:
        found = [re.search(pattern, name) for name in names]
    except re.error as error:
        raise UserError(f"--label-pattern {pattern!r} is no regular expression: {error}.") from None
    missing = [
        name for name, match in zip(names, found, strict=True) if match is None or match[match.re.groups] is None
    ]
    if missing:
        raise UserError(f"--label-pattern {pattern!r} finds nothing in {len(missing)} names, the first {missing[0]}.")
    labels = [match[min(1, match.re.groups)] for match in found if match is not None]
    return np.array(labels, dtype=np.int64 if all(map(str.isdecimal, labels)) else object)


def _columns(table: pd.DataFrame, source: object, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Convert a table's columns to booleans, numbers (NaN where missing) or text ("" where missing); omit lists.

    Raises:
        UserError: a label is missing.
    """
    import pandas as pd

    columns = {}
    for name in table:
        values, missing = table[name], table[name].isna()
        if name == "label" and missing.any():
            first = names[int(missing.argmax())]
            raise UserError(f"{source}: {missing.sum()} labels are missing, the first that of {first}.")
        if values.map(lambda value: isinstance(value, (list, dict, bytes, np.ndarray))).any():
            continue
        if pd.api.types.is_bool_dtype(values) or pd.api.types.is_numeric_dtype(values):
            columns[str(name)] = values.to_numpy()
        else:
            columns[str(name)] = values.map(str).mask(missing, "").to_numpy(dtype=object)
    return columns


def _dataset(decoded: Decoded, labels: np.ndarray | None, columns: Mapping[str, np.ndarray]) -> Dataset:
    """Make the dataset of the images that could be read, cached for other processes of the node."""
    rows = decoded.positions
    kept = {name: column[rows] for name, column in columns.items()}
    return keep(decoded.path, decoded.sha256, None if labels is None else labels[rows], kept)


def _stamp(paths: Sequence[Path]) -> list[list[object]]:
    """Return a value that changes whenever a file does: names, sizes and times (of contents, and of permissions)."""
    stamp: list[list[object]] = []
    for path in paths:
        stat = path.stat() if path.exists() else path.lstat()  # a link may be broken: then it is named later
        stamp.append([str(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns])
    return stamp


def _metadata(directory: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Read the columns of the metadata files below a directory, in the order of `names`; {} without such files."""
    import pandas as pd

    paths = sorted(path for kind in ("csv", "jsonl") for path in directory.rglob(f"metadata.{kind}"))
    tables = []
    for path in paths:
        try:
            regular(path)
            table = pd.read_csv(path) if path.suffix == ".csv" else pd.read_json(path, lines=True)
        except (ValueError, OSError, OverflowError) as error:
            raise UserError(f"{shown(path)} cannot be read: {reason(error)}.") from None
        if "file_name" not in table:
            raise UserError(f"{shown(path)} has no column file_name.")
        below = path.parent.relative_to(directory)
        tables.append(table.assign(file_name=[(below / str(name)).as_posix() for name in table["file_name"]]))
    if not tables:
        return {}
    source = shown(paths[0]) if len(paths) == 1 else f"{shown(directory)}: its metadata"
    return _columns(_aligned(pd.concat(tables).set_index("file_name"), source, names), source, names)


def _listed(path: Path, names: Sequence[str], columns: list[str], skip: int = 0) -> pd.DataFrame:
    """Read one of CelebA's lists: a file name and its values on each line."""
    import pandas as pd

    try:
        table = pd.read_csv(path, sep=r"\s+", header=None, names=["file_name", *columns], skiprows=skip)
    except (ValueError, OSError, OverflowError) as error:
        raise UserError(f"{shown(path)} cannot be read: {reason(error)}.") from None
    numbers = _aligned(table.set_index("file_name"), shown(path), names, listed=True)[columns].apply(
        pd.to_numeric, errors="coerce"
    )
    if (cut := numbers.isna().any(axis=1)).any():
        raise UserError(f"{shown(path)}: the line of {numbers.index[cut][0]} does not have {len(columns)} numbers.")
    return numbers.astype(np.int64)


def _aligned(table: pd.DataFrame, path: object, names: Sequence[str], listed: bool = False) -> pd.DataFrame:
    """Select the rows of `names`, in their order. Raises `UserError` if some are missing, or there are duplicates.

    Args:
        listed: the table may name images that are not there, as CelebA's lists do for a part of it.
    """
    if table.index.has_duplicates:
        raise UserError(f"{path} has {table.index[table.index.duplicated()][0]} twice.")
    known, absent = set(table.index), set(table.index) - set(names)
    if absent and not listed:
        raise UserError(f"{path} names {len(absent)} images that are not there, the first of them {min(absent)}.")
    missing = [name for name in names if name not in known]
    if missing:
        raise UserError(f"{path} lacks {len(missing)} of {len(names)} images, the first of them {missing[0]}.")
    return table.loc[list(names)]
