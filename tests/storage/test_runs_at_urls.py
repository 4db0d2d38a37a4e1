"""Runs at URLs: what counts is what the storage has, whichever node wrote it, and whenever it was killed."""

import json
import threading
from unittest import mock

import pytest
from memory import memory_config
from runs import CHAOS, fit, sha, train

from fedray.errors import RunError, UserError
from fedray.federation.pool import LocalPool
from fedray.record import copies, publishing
from fedray.record.copies import Copy, local
from fedray.record.example_spending import ExampleSpending
from fedray.record.manifests import Manifest, now
from fedray.record.publishing import take_over
from fedray.record.run import Run
from fedray.record.spending import Spending
from fedray.storage import Store, located, url_of

REMEMBERING = dict(labels=5, fraction=0.6, evaluate_samples=0, optimizer="sgd", learning_rate=0.05,
                   algorithm="ema:0.9:scaffold", wire="feedback:topk:0.5")  # fmt: skip


class Killed(BaseException):
    """The process was killed: nothing is done after it."""


def killing(monkeypatch, point):
    """Let the request of that number, and all after it, not be made; return what counts them."""
    made = []

    def counted(right):
        def count(*arguments, **named):
            if len(made) >= point:
                raise Killed
            made.append(right.__name__)
            return right(*arguments, **named)

        return count

    for name in ("list", "read", "download", "write", "create", "exists", "remove"):
        monkeypatch.setattr(Store, name, counted(getattr(Store, name)))
    return made


def test_a_url_and_the_path_of_its_copy_tell_each_other(node, tmp_path):
    for url in ("s3://bucket/runs/a", "gs://bucket", "s3://bucket/an-odd name/ü:"):
        assert url_of(located(url)) == url_of(located(url.replace("//", "/"))) == url  # as `Path` writes it
        assert located(url).is_relative_to(tmp_path)
        assert url_of(located(url) / "client-0000") == url + "/client-0000"
    assert located("file:///tmp/a") == located("/tmp/a")
    assert url_of(located("runs/a")) is None
    for bad in ("s3://bucket/../other", "s3://bucket//a", "s3://./a"):
        with pytest.raises(UserError, match="is no URL of a storage"):
            located(bad)


def test_a_run_at_a_url_has_the_bits_and_files_of_one_at_a_path(toy_config, tmp_path, place, node):
    config = toy_config(**REMEMBERING)
    rows = train(config, tmp_path / "here")
    there = train(config, f"{place}/a")
    assert [row["loss"] for row in there] == [row["loss"] for row in rows]
    node("another")
    run = Run.open(f"{place}/a")
    assert sha(run.directory) == sha(tmp_path / "here")

    def names(directory):
        found = (path.relative_to(directory).as_posix() for path in directory.rglob("*"))
        return {name for name in found if not name.startswith("tensorboard/")}

    assert names(run.directory) - {".lock"} == names(tmp_path / "here") - {".lock"}
    assert [row["loss"] for row in run.rows] == [row["loss"] for row in rows]


def test_large_files_are_objects_of_their_own(toy_config, tmp_path, place, node, monkeypatch):
    """As they would be with a model of millions of parameters: here all of some hundred bytes are."""
    config = toy_config(**REMEMBERING)
    rows = train(config, tmp_path / "here")
    for module in (publishing, copies):
        monkeypatch.setattr(module, "LARGE", 500)
    monkeypatch.setattr(publishing, "PACK", 2000)
    train(config, f"{place}/a", rounds=2)
    listed, manifest = now(Store(f"{place}/a"))
    checkpoint = manifest.files["checkpoints/round-000002.safetensors"]
    assert (checkpoint.offset, checkpoint.size) == (0, listed[checkpoint.object]["size"])
    assert [file.object for file in manifest.files.values()].count(checkpoint.object) == 1
    assert len(manifest.objects) < len(manifest.files)
    node("another")
    local(f"{place}/a", whole=True)
    assert train(config, f"{place}/a", resume=True)[-1]["loss"] == rows[-1]["loss"]
    assert sha(located(f"{place}/a")) == sha(tmp_path / "here")


def test_objects_do_not_grow_in_number(toy_config, place, node):
    """A pack of memories, and what else is small, for each manifest; what no manifest names is removed."""
    config = toy_config(**REMEMBERING | {"rounds": 12})
    counts = []
    run = Run(f"{place}/a")
    for row in fit(config, LocalPool(config), f"{place}/a"):
        if row["round"] > 3:
            listed, manifest = now(Store(f"{place}/a"))
            live = {name for name in listed if name.startswith("objects/")}
            assert manifest.objects <= live
            counts.append(len(live))
            sizes = [file.size for file in manifest.files.values()]
            stored = sum(listed[name]["size"] for name in manifest.objects)
            assert stored <= 2.5 * sum(sizes)  # half empty ones are written anew
    assert max(counts) < 20
    assert run.directory.is_dir()


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.timeout(900)
@pytest.mark.parametrize("elsewhere", [False, True])
def test_killed_before_any_request_and_resumed(toy_config, tmp_path, monkeypatch, node, elsewhere):
    """Killed before any request to the storage, and resumed: on this node, or on another, after taking the run over."""
    config = toy_config(**REMEMBERING | {"rounds": 2})
    train(config, tmp_path / "whole")
    point = 0
    while True:
        out = f"memory://killed-{elsewhere}/{point}"
        node(f"{point}")
        with monkeypatch.context() as patched:
            made = killing(patched, point)
            try:
                train(config, out)
                break
            except Killed:
                assert len(made) == point
        if elsewhere:
            node(f"{point} elsewhere")
            if now(Store(out))[1].writer is not None:
                with pytest.raises(UserError, match="is being written by"), Run(out).locked():
                    pass
                take_over(out)
        begun = (local(out) / "config.json").exists()
        train(config, out, resume=begun)
        assert sha(located(out)) == sha(tmp_path / "whole"), point
        losses = [row["loss"] for row in Run.open(out).rows]
        assert losses == [row["loss"] for row in Run.open(tmp_path / "whole").rows], point
        listed, manifest = now(Store(out))
        assert manifest.writer is None
        assert {name for name in listed if name.startswith("objects/")} >= manifest.objects
        point += 1 if CHAOS else 3
    assert point > 30


def test_a_row_is_shown_when_the_storage_has_it(toy_config, place, node):
    config = toy_config(**REMEMBERING)
    for number, row in enumerate(fit(config, LocalPool(config), f"{place}/a"), 1):
        node("another")
        run = Run.open(f"{place}/a")
        assert row["round"] == number == len(run.rows) == run.complete_rounds
        node("first node")


def test_the_ledger_is_in_the_storage_before_noise_is_drawn(toy_config, place, node, monkeypatch):
    config = toy_config(labels=6, wire="clip:0.3,noise:2", cohort="poisson:0.5", rounds=2, evaluate_samples=0)
    release, there = Spending.release, []

    def released(spending, round):
        spent = release(spending, round)
        node("another")
        there.append((local(f"{place}/a") / "privacy.jsonl").read_text().splitlines())
        node("first node")
        return spent

    monkeypatch.setattr(Spending, "release", released)
    train(config, f"{place}/a")
    assert [[json.loads(line)["round"] for line in lines] for lines in there] == [[1], [1, 2]]


def test_so_is_that_of_clients_before_they_begin(place, node, monkeypatch):
    begin, there = ExampleSpending.begin, []

    def begun(spending, round, clients):
        begin(spending, round, clients)
        node("another")
        there.append((local(f"{place}/a") / "example-privacy.jsonl").read_text().splitlines())
        node("first node")

    monkeypatch.setattr(ExampleSpending, "begin", begun)
    train(memory_config(algorithm="dpsgd:1:1"), f"{place}/a")
    assert [[json.loads(line)["round"] for line in lines] for lines in there] == [[1], [1, 2]]


def test_of_two_writers_one_is_refused(toy_config, place, node):
    config = toy_config(rounds=4, evaluate_samples=0)
    first = fit(config, LocalPool(config), f"{place}/a")
    next(first)
    with pytest.raises(UserError, match="another process"), mock.patch("fedray.record.run.PATIENCE", 0.2):
        train(config, f"{place}/a", resume=True)
    node("another")
    local(f"{place}/a", whole=True)
    with pytest.raises(UserError, match=r"is being written by .+ \(process \d+, .+\); if that process has ended, say"):
        train(config, f"{place}/a", resume=True)
    take_over(f"{place}/a")
    with pytest.raises(RunError, match="was taken over from this process"):
        list(first)
    second = fit(config, LocalPool(config), f"{place}/a", resume=True)
    row = next(second)
    node("first node")
    with pytest.raises(UserError, match="is being written by"):
        train(config, f"{place}/a", resume=True)
    assert [each["round"] for each in [row, *second]] == list(range(row["round"], 5))
    assert Run.open(f"{place}/a").complete_after(4)


def test_who_was_taken_over_writes_nothing_any_more(place, node, monkeypatch):
    """Also where it had uploaded its objects, and would create its manifest just now."""
    run = Run(f"{place}/a")

    def late(writer, *arguments, create=publishing.Writer._create):
        node("another")
        take_over(f"{place}/a")
        patched.undo()
        second = publishing.Writer(located(f"{place}/a"), Store(f"{place}/a"))
        second.begin()
        node("first node")
        return create(writer, *arguments)

    def write():
        with run.locked():
            (run.directory / "rounds.jsonl").write_text("first\n")
            patched.setattr(publishing.Writer, "_create", late)
            run.publish()

    with monkeypatch.context() as patched, pytest.raises(RunError, match="was taken over by"):
        write()
    manifest = now(Store(f"{place}/a"))[1]
    if not place.startswith("plain"):  # which writes what it is told to
        assert "rounds.jsonl" not in manifest.files
        assert manifest.writer["copy"] != Copy.of(run.directory).id


def test_of_many_that_begin_at_once_one_does(bucket, tmp_path):
    stores = [Store(f"{bucket}/a") for _ in range(8)]
    together, won = threading.Barrier(8), []

    def begin(index):
        together.wait()
        won.append(stores[index].create("manifest-000001.json", Manifest(1).to_bytes()))

    threads = [threading.Thread(target=begin, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == [False] * 7 + [True]


def test_what_is_missing_or_damaged_is_named(toy_config, place, node):
    train(toy_config(), f"{place}/a")
    store = Store(f"{place}/a")
    _, manifest = now(store)
    object = manifest.files["rounds.jsonl"].object
    contents = store.read(object)
    node("another")
    store.write(object, contents[:-1] + b"?")
    with pytest.raises(UserError, match=f"{object} is damaged: its bytes are not those of .+ in the manifest"):
        local(f"{place}/a")
    store.remove([object])
    number = f"manifest-{manifest.number:06d}.json"
    with pytest.raises(UserError, match=rf"a/{number} names {object} \(.+\), which is not there: the run is damaged"):
        local(f"{place}/a")
    with pytest.raises(UserError, match=rf"json names {object}"), Run(f"{place}/a").locked():
        pass
    assert now(store)[1].writer is None  # nobody holds it
    store.write(f"manifest-{manifest.number + 9:06d}.json", b'{"format": 1, "files": 3}')
    with pytest.raises(UserError, match="json is damaged, or of another version"):
        local(f"{place}/a")


@pytest.mark.parametrize("name", ["../../evil", "/evil", "a//b", ".lock", "clients/../../evil", "a/.lock"])
def test_a_manifest_cannot_lead_out_of_its_copy(place, name):
    values = json.loads(Manifest(1).to_bytes())
    values["files"] = {
        "config.json": ["objects/" + "0" * 32, 0, 2, "0" * 64, 0],
        name: ["objects/" + "0" * 32, 0, 2, "", 0],
    }
    Store(f"{place}/a").write("manifest-000001.json", json.dumps(values).encode())
    with pytest.raises(UserError, match="is damaged"):
        local(f"{place}/a")


def test_objects_beside_a_run_cannot_lead_out_of_its_copy(bucket, tmp_path, toy_config, node):
    train(toy_config(rounds=1), f"{bucket}/a")
    store = Store(f"{bucket}/a")
    for name in ("../../../../../evil.png", "clients/../../../evil.png", ".lock", "../b/manifest-000001.json"):
        store.fs.pipe_file(f"{store.root}/{name}", b"1")
    store.write("config.json", b"{}")  # the run's own is that of the manifest
    node("another")
    run = Run.open(f"{bucket}/a")
    assert run.result is not None
    with run.locked():
        assert run.saved["config"]["rounds"] == 1
    assert not list(tmp_path.rglob("evil.png"))
    assert not (run.directory / ".lock").read_bytes()


def test_what_is_no_part_of_a_run_keeps_one_from_beginning(toy_config, place):
    Store(f"{place}/a").write("photo.png", b"1")
    with pytest.raises(UserError, match="a exists and is not an empty directory"):
        train(toy_config(), f"{place}/a")


@pytest.mark.parametrize("kind", ["503", "slow", "reset", "lost", "cut"])
def test_faults_of_a_storage_change_nothing(toy_config, tmp_path, proxy, bucket, node, kind):
    """A sixth of the requests meets one: those are made again."""
    config = toy_config(**REMEMBERING | {"rounds": 2})
    train(config, tmp_path / "here")
    proxy.fault = lambda method, path: kind if len(proxy.seen) % 6 == 2 else None
    train(config, f"{bucket}/a")
    node("another")
    assert sha(Run.open(f"{bucket}/a").directory) == sha(tmp_path / "here")
    assert sum(fault == kind for _, _, fault in proxy.seen) > 10


def test_a_storage_that_is_away_for_long_is_waited_for(toy_config, tmp_path, bucket, node, monkeypatch):
    """Also where it created a manifest and could not tell."""
    config = toy_config(**REMEMBERING)
    train(config, tmp_path / "here")
    monkeypatch.setattr(publishing, "EVERY", 0.0)
    create, tried = Store.create, []

    def away(store, name, contents):
        tried.append(name)
        if len(tried) % 5 == 4:
            raise publishing.Unreachable("it cannot be reached.")
        done = create(store, name, contents)
        if len(tried) % 5 == 1 and len(tried) > 5:
            raise publishing.Unreachable("it cannot be reached.")
        return done

    with monkeypatch.context() as patched:
        patched.setattr(Store, "create", away)
        train(config, f"{bucket}/a")
    assert len(tried) > 10
    node("another")
    assert sha(Run.open(f"{bucket}/a").directory) == sha(tmp_path / "here")


def test_a_storage_that_stays_away_ends_the_run_which_can_be_resumed(toy_config, tmp_path, place, node, monkeypatch):
    config = toy_config(**REMEMBERING)
    train(config, tmp_path / "here")
    monkeypatch.setattr(publishing, "PATIENCE", 0.0)
    with monkeypatch.context() as patched:
        rows = fit(config, LocalPool(config), f"{place}/a")
        next(rows)

        def away(store, name, contents):
            raise publishing.Unreachable(f"{store.url} cannot be reached: it is away.")

        patched.setattr(Store, "write", away)
        with pytest.raises(RunError, match="cannot be reached: it is away; the run's complete rounds are kept"):
            list(rows)
    train(config, f"{place}/a", resume=True)  # on the node that was writing it
    assert sha(located(f"{place}/a")) == sha(tmp_path / "here")
