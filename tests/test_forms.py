"""Short forms, in which users name parts of a run."""

from dataclasses import dataclass, replace

import pytest

from fedray.algorithms.ema import EMA
from fedray.algorithms.fedavg import FedAvg
from fedray.algorithms.lora import SVD
from fedray.data.partition import Dirichlet, Partition
from fedray.errors import UserError
from fedray.forms import fields_of
from fedray.menus import ALGORITHMS, FOLDS, LINKS, PARTITIONS, parse_wire, wire_form
from fedray.presets import PRESETS
from fedray.vector.optimizer import Optimizer
from fedray.wire.float16 import Float16


@pytest.mark.parametrize(
    ("text", "menu"),
    [
        ("iid", PARTITIONS),
        ("by-label", PARTITIONS),
        ("dirichlet:0.1", PARTITIONS),
        (f"dirichlet:{1 / 3}:Smiling", PARTITIONS),
        ("float16", LINKS),
        ("fedavg", ALGORITHMS),
        ("svd", ALGORITHMS),
        ("ema:0.5:svd", ALGORITHMS),
        ("mean", FOLDS),
    ],
)
def test_short_forms_are_read_as_they_are_written(text, menu):
    assert menu.form(menu.parse(text)) == text


@pytest.mark.parametrize(
    "method",
    [EMA(), EMA(0.5), EMA(algorithm=SVD()), EMA(0.5, SVD(), 2.0), EMA(0.5, SVD(), power=0.5), EMA(0.5, EMA(0.6))],
    ids=str,
)
def test_wrappers_are_read_as_they_are_written(method):
    assert ALGORITHMS.parse(ALGORITHMS.form(method)) == method


def test_values_are_given_in_order_or_by_name():
    assert PARTITIONS.parse("dirichlet:0.1:Smiling") == Dirichlet(0.1, "Smiling")
    assert PARTITIONS.parse("dirichlet:column=Smiling:alpha=0.1") == Dirichlet(0.1, "Smiling")
    assert PARTITIONS.parse("dirichlet:column=Smiling:0.1") == Dirichlet(0.1, "Smiling")


def test_the_menus_are_whole():
    assert set(PARTITIONS.classes) == {"iid", "quantity", "by-label", "by-attribute", "by-folder", "dirichlet"}
    assert {"fedavg", "ema", "ffa", "svd", "flora"} <= set(ALGORITHMS.classes)
    assert "float16" in LINKS.classes
    assert "mean" in FOLDS.classes
    assert "collect" not in FOLDS.classes  # abstract
    assert "wrapper" not in ALGORITHMS.classes


def test_what_a_method_offers_is_no_value_of_it():
    for name in ("fedavg", "ffa", "svd", "rolora", "fedex"):
        assert fields_of(ALGORITHMS.classes[name]) == []
        with pytest.raises(UserError, match=f"is not of the form '{name}'"):
            ALGORITHMS.parse(f"{name}:fixed coordinates")


def test_wrong_names_get_the_nearest():
    with pytest.raises(UserError, match="no partition 'by-lable'; did you mean 'by-label'"):
        PARTITIONS.parse("by-lable")
    with pytest.raises(UserError, match="at most a million"):
        PARTITIONS.parse("dirichlet:1e308")
    for text in (
        "dirichlet",
        "dirichlet:1:2:3",
        "dirichlet:x",
        "dirichlet:0",
        "dirichlet:nan",
        "iid:3",
    ):
        with pytest.raises(UserError, match=text):
            PARTITIONS.parse(text)


def test_wires_are_lists_of_links():
    assert parse_wire("float32") == ()
    assert parse_wire("float16") == (Float16(),)
    assert parse_wire("float16,float16") == (Float16(), Float16())
    for links in ((), (Float16(),), (Float16(), Float16())):
        assert parse_wire(wire_form(links)) == links
    with pytest.raises(UserError, match="no link 'float61'; did you mean 'float16'"):
        parse_wire("float16,float61")


def test_python_takes_the_same_words_as_the_command_line():
    config = replace(
        PRESETS["digits"], algorithm="svd", wire="float16", partition="dirichlet:0.5", optimizer="sgd:momentum=0.9"
    )
    assert config.algorithm == SVD()
    assert config.wire == (Float16(),)
    assert config.partition == Dirichlet(0.5)
    assert config.optimizer == Optimizer("sgd", (("momentum", 0.9),))
    with pytest.raises(UserError, match="did you mean 'svd'"):
        replace(config, algorithm="sdv")


OWN = """
from dataclasses import dataclass
from fedray.algorithms import Algorithm
from fedray.data.partition import Partition

print("this file runs")

@dataclass(frozen=True)
class Mine(Algorithm):
    strength: float
    name_of_it: str = "x"

class NoAlgorithm:
    pass
"""


def test_classes_of_ones_own_are_named_by_their_file(tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text(OWN)
    mine = ALGORITHMS.parse(f"{path}:Mine:0.5")
    assert (type(mine).__name__, mine.strength) == ("Mine", 0.5)
    assert ALGORITHMS.form(mine) == f"{path}:Mine:0.5"
    assert ALGORITHMS.parse(ALGORITHMS.form(EMA(0.5, mine))) == EMA(0.5, mine)
    assert capsys.readouterr().out == "this file runs\n"  # once
    for name in ("NoAlgorithm", "Absent"):
        with pytest.raises(UserError, match=f"mine.py has no class '{name}' that derives from fedray's Algorithm"):
            ALGORITHMS.parse(f"{path}:{name}")


def test_files_that_a_run_names_do_not_run_by_themselves(tmp_path, capsys):
    path = tmp_path / "theirs.py"
    path.write_text(OWN)
    theirs = ALGORITHMS.parse(f"{path}:Mine:0.5", allowed=())
    assert ALGORITHMS.form(theirs) == f"{path}:Mine:0.5"
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match=rf"code that the run names: .*--code {path}"):
        theirs.aggregate({}, None, None)
    assert ALGORITHMS.parse(f"{path}:Mine:0.5", allowed={path.resolve()}).strength == 0.5


def test_the_form_of_what_is_in_no_file_is_its_repr():
    @dataclass(frozen=True)
    class Halves(Partition):
        share: float = 0.5

    assert PARTITIONS.form(Halves()) == repr(Halves())
    assert ALGORITHMS.form(FedAvg()) == "fedavg"
