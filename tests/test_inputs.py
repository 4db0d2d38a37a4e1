"""Anything a user may type or have on the disk: it works, or it is exit code 2 and a sentence, and nothing is left.

Never a traceback, a hang or a part of a directory. FEDRAY_CHAOS=1 tries ten times as many, from new seeds.
"""

import contextlib
import io
import json
import os
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from fedray.cli import main
from fedray.config import Config
from fedray.errors import UserError
from fedray.presets import PRESETS

CHAOS = bool(os.environ.get("FEDRAY_CHAOS"))
SMALL = [
    "train", "--dry-run", "--preset", "faces", "--resolution", "8", "--block-out-channels", "8", "--attention", "False",
    "--no-mid-block-attention", "--partition", "iid", "--clients", "1", "--features", "None", "--held-out-share", "0",
    "--test-share", "0",
]  # fmt: skip

pytestmark = [pytest.mark.slow, pytest.mark.chaos, pytest.mark.timeout(3600 if CHAOS else 600)]


def tried(times):
    return settings(
        max_examples=times * (10 if CHAOS else 1), deadline=None, database=None, derandomize=not CHAOS,
        print_blob=True, suppress_health_check=list(HealthCheck),
    )  # fmt: skip


def check(arguments, directory):
    """Run a command; it works, or tells in a sentence why not. Returns its exit code."""
    before = sorted(os.listdir(directory))
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.chdir(directory):
        try:
            code = main(arguments)
        except SystemExit as exit:  # of the parser of flags
            code = exit.code
    said = out.getvalue() + err.getvalue()
    assert code in (0, 2), said
    assert "Traceback" not in said
    if code == 2:
        assert said.strip(), "no word why"
    assert sorted(os.listdir(directory)) == before
    event(f"exit code {code}")
    return code


# What is typed

WHOLE = st.sampled_from([-(10**30), -1, 0, 1, 2, 3, 7, 64, 1797, 1798, 2**31, 2**63, 10**30]).map(str)
REAL = st.sampled_from(["-1", "0", "-0.0", "1e-8", "0.1", "0.5", "1", "1.5", "1e308", "nan", "inf", "-inf"])
TEXT = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=12)
FORM = st.lists(
    st.one_of(
        st.sampled_from([
            "iid", "by-label", "dirichlet", "quantity", "by-attribute", "shards", "fedavg", "ema", "mean", "float16",
            "sgd", "adamw", "RMSprop", "lr=0.1", "momentum=0.9", "0.1", "nan", "-1", "2", "label", "", "x.py", "None",
        ]), TEXT,
    ), min_size=1, max_size=4,
).map(":".join)  # fmt: skip
OF_KIND = {
    "whole": (
        "clients validation-rounds only-client rounds local-epochs local-steps train-batch-size lr-warmup-steps seed "
        "gradient-accumulation-steps sampling-steps evaluate-samples evaluate-every eval-batch-size actors crop "
        "checkpoints-total-limit kid-subset-size client-retries min-clients resolution channels norm-num-groups "
        "ddpm-num-steps"
    ),
    "real": (
        "fraction held-out-share test-share ema-max-decay ema-inv-gamma ema-power learning-rate adam-beta1 "
        "adam-weight-decay adam-epsilon max-grad-norm cpus-per-actor gpus-per-actor client-timeout snr-gamma"
    ),
    "form": (
        "partition algorithm fold wire optimizer lr-scheduler mixed-precision sampler features dataset-name preset "
        "ddpm-beta-schedule prediction-type train-data-dir inception-weights out resume task code address"
    ),
    "switch": "use-ema no-use-ema random-flip keep-optimizer keep-samples local-only skip-unreadable bogus help",
}
FLAGS = st.one_of(
    st.tuples(st.sampled_from(OF_KIND["whole"].split()), st.one_of(WHOLE, REAL, TEXT)),
    st.tuples(st.sampled_from(OF_KIND["real"].split()), st.one_of(REAL, WHOLE, TEXT)),
    st.tuples(st.sampled_from(OF_KIND["form"].split()), st.one_of(FORM, TEXT)),
    st.tuples(st.sampled_from(OF_KIND["switch"].split())),
)


@tried(50)
@given(st.lists(FLAGS, max_size=5))
@example([("rounds", str(10**30))])
@example([("ddpm-num-steps", str(10**30))])
def test_any_words_on_the_command_line(flags):
    words = [word for name, *values in flags for word in (f"--{name}", *values)]
    with tempfile.TemporaryDirectory() as directory:
        check(["train", "--dry-run", *words], directory)


ANYTHING = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT, FORM),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)), max_leaves=5,
)  # fmt: skip


@tried(50)
@given(st.dictionaries(st.one_of(st.sampled_from([*PRESETS["digits"].to_json(), "task"]), TEXT), ANYTHING, max_size=3))
def test_any_values_in_the_configuration_of_a_run(changes):
    with tempfile.TemporaryDirectory() as directory:
        run = Path(directory, "run")
        run.mkdir()
        (run / "config.json").write_text(json.dumps({"format": 2, "config": PRESETS["digits"].to_json() | changes}))
        for command in (["sample"], ["train", "--dry-run", "--resume"]):
            assert check([*command, "run"], directory) == 2 or "--dry-run" in command


@tried(50)
@given(st.dictionaries(st.sampled_from(sorted(Config.__dataclass_fields__)), ANYTHING, max_size=3))
def test_any_values_in_python(changes):
    with contextlib.suppress(UserError):
        Config(**({"local_epochs": 1} | changes)).check()


# What is on the disk


def encoded(form, rng, **options):
    pixels = rng.integers(0, 256, (9, 11, 3), np.uint8)
    mode = {"GIF": "P", "PPM": "RGB"}.get(form, rng.choice(["RGB", "L"]))
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, form, **options)
    return buffer.getvalue()


IMAGES = {"PNG": ".png", "JPEG": ".jpg", "GIF": ".png", "BMP": ".bmp", "TIFF": ".tif", "WEBP": ".webp", "PPM": ".ppm"}
DAMAGE = st.lists(
    st.tuples(st.sampled_from(["flip", "cut", "zero", "put", "repeat"]), st.floats(0, 1), st.binary(max_size=8)),
    min_size=1, max_size=4,
)  # fmt: skip


def damaged(content, damage):
    content = bytearray(content)
    for kind, where, values in damage:
        at = int(where * max(0, len(content) - 1))
        if kind == "flip" and content:
            content[at] ^= (values or b"\1")[0] or 1
        elif kind == "cut":
            del content[at:]
        elif kind == "zero":
            content[at : at + 64] = bytes(len(content[at : at + 64]))
        elif kind == "put":
            content[at:at] = values
        elif kind == "repeat":
            content[at:at] = content[at : at + 32]
    return bytes(content)


@contextlib.contextmanager
def folder(names=6):
    """A folder in a directory of its own, with images 0.png and so on; the cache is there too."""
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDRAY_CACHE", f"{directory}/cache")
        place = Path(directory, "data")
        place.mkdir()
        for index in range(names):
            Image.new("L", (8, 8), 20 * index).save(place / f"{index}.png")
        yield place


def looked_at(place, *flags):
    os.makedirs(place.parent / "here", exist_ok=True)
    return check([*SMALL, "--train-data-dir", str(place), *flags], place.parent / "here")


@tried(30)
@given(st.sampled_from(sorted(IMAGES)), st.integers(0, 2**32 - 1), DAMAGE)
def test_any_damage_to_an_image(form, seed, damage):
    with folder() as place:
        content = encoded(form, np.random.default_rng(seed))
        (place / f"odd{IMAGES[form]}").write_bytes(damaged(content, damage))
        looked_at(place)
        assert looked_at(place, "--skip-unreadable") == 0


TABLES = {
    "metadata.csv": lambda frame: frame.to_csv(index=False).encode(),
    "metadata.jsonl": lambda frame: frame.to_json(orient="records", lines=True).encode(),
}


@tried(30)
@given(st.sampled_from(sorted(TABLES)), DAMAGE)
def test_any_damage_to_a_table_of_a_folder(name, damage):
    frame = pd.DataFrame({
        "file_name": [f"{index}.png" for index in range(6)], "label": range(6), "text": "größer", "age": [1, None] * 3,
    })  # fmt: skip
    with folder() as place:
        (place / name).write_bytes(damaged(TABLES[name](frame), damage))
        looked_at(place)


@tried(15)
@given(DAMAGE)
def test_any_damage_to_a_parquet_file(damage):
    with folder() as place:
        images = [{"bytes": (place / f"{index}.png").read_bytes(), "path": None} for index in range(6)]
        table = place.parent / "table.parquet"
        pd.DataFrame({"image": images, "label": range(6)}).to_parquet(table)
        table.write_bytes(damaged(table.read_bytes(), damage))
        os.makedirs(place.parent / "here", exist_ok=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("datasets.config.HF_DATASETS_CACHE", place.parent / "datasets")
            check([*SMALL, "--dataset-name", str(table)], place.parent / "here")


LISTS = {
    "list_attr_celeba.txt": "6\nSmiling Male\n" + "".join(f"{index}.jpg 1 -1\n" for index in range(6)),
    "identity_CelebA.txt": "".join(f"{index}.jpg {index % 2}\n" for index in range(6)),
    "list_eval_partition.txt": "".join(f"{index}.jpg {index % 3}\n" for index in range(6)),
}


@tried(30)
@given(st.sampled_from(["img_align_celeba.zip", *sorted(LISTS)]), DAMAGE)
def test_any_damage_to_celeba(name, damage):
    with folder(names=0) as place:
        with zipfile.ZipFile(place / "img_align_celeba.zip", "w") as archive:
            for index in range(6):
                archive.writestr(f"img_align_celeba/{index}.jpg", encoded("JPEG", np.random.default_rng(index)))
        for each, text in LISTS.items():
            (place / each).write_text(text)
        assert looked_at(place, "--dataset-name", "celeba") == 0
        (place / name).write_bytes(damaged((place / name).read_bytes(), damage))
        looked_at(place, "--dataset-name", "celeba")
