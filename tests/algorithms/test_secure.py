"""Secure sums: the masks against published vectors and plain sums, for every set of survivors."""

import itertools
from dataclasses import dataclass, replace

import made
import numpy as np
import pytest
import torch
from runs import sha, train
from scipy import stats

from fedray.algorithms import folds, secure
from fedray.algorithms.masks import FIELD, KEY, SHARE, Client, recover, share, x25519
from fedray.algorithms.secure import MESSAGES, Secure, quantised, signed
from fedray.errors import RunError, UserError
from fedray.wire import Wire

SIZE = 40


def round_of(cohort, number=0):
    return made.round_of(dict.fromkeys(cohort, 1), number=number, clients=max(cohort) + 1)


def values_of(cohort, seed=0):
    rng = np.random.default_rng(seed)
    return {client: rng.normal(size=SIZE).astype(np.float32).clip(-7, 7) for client in cohort}


def folded(fold, round, values, groups=2):
    """Seal, add in two partials, and unmask."""
    partials = [fold.start(round) for _ in range(groups)]
    for index, (client, x) in enumerate(values.items()):
        upload = arrived(fold.seal({"model": x}, round, client), client)
        partials[index % groups] = fold.add(partials[index % groups], upload, round)
    whole = fold.start(round)
    for partial in partials:
        whole = fold.merge(whole, partial, round)
    return fold.result(whole, round)


def arrived(sealed, client):
    tensors = {name: torch.from_numpy(array.copy()) for name, array in sealed.items()}
    return folds.Upload(client, tensors, dict.fromkeys(tensors, 1), {})


def plain(values, bits=16):
    """The same sum of whole numbers, without masks."""
    return sum(np.rint(x.astype(np.float64) * 2**bits).astype(np.int64) for x in values.values()) * 2.0**-bits


# The arithmetic, against published numbers


def test_keys_agree_as_published():
    """RFC 7748, section 5.2 and 6.1."""
    scalar = bytes.fromhex("a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4")
    point = bytes.fromhex("e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c")
    expected = "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552"
    assert x25519(scalar, point).hex() == expected
    alice = bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c6d63a0f2ff2f8cd0b9c1d1ad3e6b"[:64])
    bob = bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
    assert x25519(alice, x25519(bob)) == x25519(bob, x25519(alice))
    k = u = (9).to_bytes(32, "little")
    assert x25519(k, u).hex() == "422c8e7a6227d7bca1350b3e2bb7279f7897b87bb6854b783c60e80311ae3079"


def test_any_threshold_of_shares_is_the_secret_and_fewer_say_nothing():
    secret = bytes(range(KEY))
    shares = share(secret, 6, 3, b"salt")
    assert all(0 <= each < FIELD < 256**SHARE for each in shares)
    for places in itertools.combinations(range(6), 3):
        assert recover({place + 1: shares[place] for place in places}) == secret
    for places in itertools.combinations(range(6), 2):
        assert recover({place + 1: shares[place] for place in places}) != secret


def test_range_of_what_is_added_up():
    values = np.array([-8, -1e-9, 0, 2.0**-17, 3 * 2.0**-17, 7.99999], np.float32)
    assert np.array_equal(signed(quantised(values, 16), 16), np.rint(values.astype(np.float64) * 65536) / 65536)
    top = np.full(3, 2**31 - 1, np.int64)
    assert signed(top.astype(np.uint32), 0).tolist() == [2**31 - 1] * 3
    assert signed((-top - 1).astype(np.uint32), 0).tolist() == [-(2**31)] * 3


# The protocol


def test_every_set_of_survivors_of_eight():
    """Dropped before they send: the same sum as without masks, or below the threshold an error that says so."""
    cohort = tuple(range(3, 11))
    fold, round, values = Secure(0.5), round_of(cohort), values_of(cohort)
    for count in range(9):
        for survivors in itertools.combinations(cohort, count):
            there = {client: values[client] for client in survivors}
            if count < 4:
                with pytest.raises(RunError, match=f"{count} of 8 clients took part, and no fewer than 4"):
                    folded(fold, round, there)
                continue
            found = folded(fold, round, there)
            assert np.array_equal(found.sums["model"].numpy(), plain(there))
            assert found.weights == {"model": count}
            assert found.survivors == list(survivors)


@pytest.mark.slow
def test_two_hundred_patterns_of_twenty():
    cohort, rng = tuple(range(20)), np.random.default_rng(0)
    fold = Secure(0.6)
    for pattern in range(200):
        round, values = round_of(cohort, number=pattern % 3), values_of(cohort, pattern)
        there = {client: values[client] for client in sorted(rng.permutation(20)[: rng.integers(12, 21)].tolist())}
        assert np.array_equal(folded(fold, round, there, 3).sums["model"].numpy(), plain(there))


@pytest.mark.slow
def test_two_hundred_patterns_of_a_hundred():
    """From no drop-outs to as many as the threshold allows; with one more, a named error."""
    cohort, rng, fold = tuple(range(100)), np.random.default_rng(0), Secure(0.6)
    round, values = round_of(cohort), values_of(cohort)
    sealed = {client: fold.seal({"model": x}, round, client) for client, x in values.items()}
    for pattern in range(200):
        count = {0: 100, 1: 60}.get(pattern, int(rng.integers(60, 101)))
        there = sorted(rng.permutation(100)[:count].tolist())
        partial = fold.start(round)
        for client in there:
            partial = fold.add(partial, arrived(sealed[client], client), round)
        assert np.array_equal(
            fold.result(partial, round).sums["model"].numpy(), plain({client: values[client] for client in there})
        )
    partial = fold.start(round)
    for client in range(59):
        partial = fold.add(partial, arrived(sealed[client], client), round)
    with pytest.raises(RunError, match="59 of 100 clients took part, and no fewer than 60"):
        fold.result(partial, round)


def test_one_upload_alone_is_uniform_noise_and_another_in_every_round():
    fold, x = Secure(0.5), np.zeros(100_000, np.float32)
    sent = [fold.seal({"model": x}, round_of(range(5), number), 2)["model"] for number in range(2)]
    for masked in sent:
        assert masked.dtype == np.uint32
        for shift in (0, 8, 16, 24):
            counts = np.bincount(masked >> shift & 255, minlength=256)
            assert stats.chisquare(counts).pvalue > 1e-6
    both = np.bincount((sent[0] - sent[1]) >> 24, minlength=256)
    assert stats.chisquare(both).pvalue > 1e-6
    alone = fold.seal({"model": x}, round_of([2]), 2)["model"]  # a mask of its own, without any other client
    assert stats.chisquare(np.bincount(alone >> 24, minlength=256)).pvalue > 1e-6


def test_two_tensors_have_masks_of_their_own():
    sealed = Secure(0.5).seal({"model": np.zeros(9, np.float32), "c": np.zeros(9, np.float32)}, round_of(range(3)), 0)
    assert not np.array_equal(sealed["model"], sealed["c"])


def test_bytes_are_those_of_the_protocol():
    """Four a value; a key; for each other client two shares, encrypted, and a tag; one share of each to unmask.

    Received and sent together, Bonawitz et al. 2017 (section 7.1) have 2 n a_K + (5 n − 4) a_S beside the values, for
    keys of a_K and shares of a_S bytes. Here one key serves both purposes, and tags are added.
    """
    for n in (2, 5, 9):
        round, fold = round_of(range(n)), Secure(0.5)
        sealed = fold.seal({"model": np.zeros(SIZE, np.float32)}, round, 0)
        down, up = fold.exchanged(round)
        assert sealed["model"].nbytes == 4 * SIZE
        assert sealed[MESSAGES].nbytes == 32 + (n - 1) * (2 * SHARE + 16)
        assert down == (n - 1) * 32 + (n - 1) * (2 * SHARE + 16)  # what the others send it, by the server
        assert up == n * SHARE
        every = down + up + sealed[MESSAGES].nbytes
        assert every == n * KEY + (5 * n - 4) * SHARE + 2 * (n - 1) * 16


def test_what_unmasks_is_as_many_shares_as_are_counted(monkeypatch):
    """Each holder that is asked gives one share for each client of the cohort."""
    right, given = secure.recover, []

    def recover(shares):
        given.extend(shares)
        return right(shares)

    monkeypatch.setattr(secure, "recover", recover)
    cohort, fold = tuple(range(6)), Secure(0.5)
    values = values_of(cohort)
    folded(fold, round_of(cohort), {client: values[client] for client in (0, 2, 3, 5)})
    assert set(np.bincount(given)[[1, 3, 4]] * SHARE) == {fold.exchanged(round_of(cohort))[1]}
    assert set(given) == {1, 3, 4}  # the three that are needed of the four, by place


def test_shares_travel_encrypted_for_one_client_each():
    cohort = (0, 1, 2)
    parties = [Client.of((0, 0), client, cohort, 2) for client in cohort]
    sent = parties[0].messages([party.public for party in parties])
    first, second = parties[0].shares
    assert sent.startswith(parties[0].public)
    for secret in (*first, *second):
        assert secret.to_bytes(SHARE, "little") not in sent
    for secret in (parties[0].secret, parties[0].own):
        assert secret not in sent


@pytest.mark.parametrize("value", [8.0, -8.0, np.inf, np.nan])
def test_what_cannot_be_added_up_is_that_clients_failure(value):
    x = np.zeros(SIZE, np.float32)
    x[3] = value
    with pytest.raises(FloatingPointError, match="not below 8"):
        Secure(0.5).seal({"model": x}, round_of(range(3)), 0)


# In runs


@dataclass(frozen=True)
class Unmasked(folds.Fold):
    """The same sum of whole numbers, of uploads that everybody sees."""

    bits: int = 16
    uniform = True
    offers = frozenset({"sums"})

    def start(self, round):
        return {"total": 0, "rows": []}

    def add(self, partial, upload, round):
        whole = np.rint(upload.tensors["model"].double().numpy() * 2.0**self.bits).astype(np.int64)
        return {"total": partial["total"] + whole, "rows": [*partial["rows"], (upload.client, upload.rows)]}

    def merge(self, first, second, round):
        return {"total": first["total"] + second["total"], "rows": first["rows"] + second["rows"]}

    def result(self, partial, round):
        rows = sorted(partial["rows"], key=lambda row: row[0])
        total = torch.from_numpy(partial["total"] * 2.0**-self.bits)
        return folds.Folded({"model": total}, {"model": float(len(rows))}, rows)


@pytest.mark.parametrize("failing", [(), (2,), (0, 4)])
def test_a_run_gives_the_same_hash_as_plain_sums(toy_config, tmp_path, failing):
    config = toy_config(labels=6, failing=failing, fold="secure:0.5", evaluate_samples=0)
    rows = train(config, tmp_path / "secure")
    train(replace(config, fold=Unmasked()), tmp_path / "plain")
    assert sha(tmp_path / "secure") == sha(tmp_path / "plain")
    assert rows[0]["bytes_up"] == (6 - len(failing)) * (4 * 16 + 32 + 5 * (2 * SHARE + 16) + 6 * SHARE)
    assert rows[0]["bytes_down"] == (6 - 0) * (4 * 16 + 5 * (32 + 2 * SHARE + 16))


def test_too_few_survivors_stop_a_run(toy_config, tmp_path):
    config = toy_config(labels=6, failing=(1, 2, 3, 4), fold="secure:0.5", evaluate_samples=0)
    with pytest.raises(RunError, match="round 1: 2 of 6 clients took part, and no fewer than 3 can unmask their sum"):
        train(config, tmp_path / "run")


def test_of_a_client_that_is_lost_in_one_try_and_there_in_the_next_both_secrets_are_of_no_use(toy_config, tmp_path):
    """Whoever recovers one secret of a try, and the other of another, could unmask an upload if they were the same."""
    config, tries = toy_config(labels=6, fold="secure:0.5", evaluate_samples=0), []
    for name, failing in (("first", (1,)), ("second", ())):
        with pytest.MonkeyPatch.context() as context:
            seen = []
            context.setattr(secure, "recover", lambda shares, seen=seen: seen.append(recover(shares)) or seen[-1])
            train(replace(config, task=replace(config.task, failing=failing)), tmp_path / name, rounds=1)
        tries.append(seen[-6:])  # before the run there is a round of nobody's updates
    assert not set(tries[0]) & set(tries[1])


@pytest.mark.parametrize("wire", ["float32", "clip:0.3,noise:2"])
def test_a_sum_of_one_client_is_never_unmasked(toy_config, tmp_path, wire):
    """Of a Poisson cohort, where one client is drawn, or one is left; where nobody is, nothing is told."""
    config = toy_config(labels=6, fold="secure:0.3", cohort="poisson:0.6", wire=wire, seed=7, evaluate_samples=0)
    with pytest.raises(RunError, match="round 2: only 1 clients were drawn, fewer than the 2 that --fold secure:0.3"):
        train(config, tmp_path / "drawn")
    config = replace(config, task=replace(config.task, failing=(4,)))
    with pytest.raises(RunError, match="round 1: 1 of 2 clients returned a model, fewer than the 2 that --fold secure"):
        train(config, tmp_path / "left")
    empty = toy_config(labels=6, fold="secure:0.6", cohort="poisson:0.4", wire=wire, seed=15, evaluate_samples=0)
    assert train(empty, tmp_path / "empty", rounds=1)[0]["cohort"] == []
    with pytest.raises(RunError, match="1 of 3 clients took part, and no fewer than 2 can unmask"):
        folded(Secure(0.3), round_of(range(3)), {1: values_of(range(3))[1]})


class Closed:
    """An upload that nobody may read, in any way, but who has its key."""

    def __init__(self, array, key):
        object.__setattr__(self, "hidden", (array, key))

    def __getattribute__(self, name):
        raise PermissionError("an unmasked upload was read")

    __len__ = __iter__ = __getitem__ = __array__ = __bool__ = __eq__ = lambda self, *_: self.anything


def test_the_server_never_reads_an_unmasked_upload(toy_config, tmp_path, monkeypatch):
    """The message is closed when the client's links have made it, and open only while the client seals it."""
    encode, seal, key, opened = Wire.encode, Secure.seal, object(), []

    def closed(*arguments):
        payload, kept = encode(*arguments)
        return {name: Closed(array, key) for name, array in payload.items()}, kept

    def open_and_seal(fold, payload, round, client):
        hidden = {name: object.__getattribute__(each, "hidden") for name, each in payload.items()}
        assert all(with_key is key for _, with_key in hidden.values())
        opened.append(client)
        return seal(fold, {name: array for name, (array, _) in hidden.items()}, round, client)

    config = toy_config(labels=6, failing=(2,), fold="secure:0.5", evaluate_samples=0)
    train(config, tmp_path / "whole")
    monkeypatch.setattr(Wire, "encode", closed)
    with pytest.raises(RunError, match="an unmasked upload was read"):  # the test can fail: a plain sum reads it
        train(replace(config, fold="mean"), tmp_path / "plain")
    monkeypatch.setattr(Secure, "seal", open_and_seal)
    train(config, tmp_path / "closed")
    assert len(opened) >= 15
    assert sha(tmp_path / "closed") == sha(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fold": "secure:0"}, "the threshold must be above 0"),
        (
            {"fold": "secure:0.2"},
            "a sum of one of 4 clients is its upload; raise the threshold above 0.25",
        ),
        ({"fold": "secure:0.5", "cohort": "poisson:0.3"}, "needs 2 clients in a round, and 1 take part"),
        ({"fold": "secure:0.5", "only_client": 0}, "needs 2 clients in a round, and 1 take part"),
        ({"fold": "secure:0.5:bits=31"}, "must be 0 to 30"),
        ({"fold": "secure:0.5:bits=27:limit=4"}, "can combine 3 clients, and 4 may take part"),
        ({"fold": "secure:0.5:bits=27:limit=4", "cohort": "poisson:0.1"}, "can combine 3 clients, and 4 may take part"),
    ],
)
def test_sums_that_could_overflow_or_hide_nothing_are_refused(toy_config, changes, message):
    with pytest.raises(UserError, match=message):
        toy_config(**changes).check()
    toy_config(fold="secure:0.5:bits=26:limit=4").check()


def test_the_longest_sum_that_is_allowed_does_not_overflow():
    fold = Secure(0.5, bits=26, limit=4.0)
    assert fold.most == 7
    values = {client: np.full(SIZE, np.nextafter(np.float32(4), np.float32(0))) for client in range(7)}
    found = folded(fold, round_of(range(7)), values)
    assert np.array_equal(found.sums["model"].numpy(), plain(values, 26))


def test_rounding_of_noisy_secure_sums_is_noised_too(toy_config, tmp_path):
    """A client moves a sum of rounded values by up to the clip and half a unit in each coordinate."""
    from fedray.federation.fit import prepare
    from fedray.record.run import Run

    config = toy_config(fold="secure:0.5:bits=4:limit=1", wire="clip:0.3,noise:2")
    round = prepare(config, Run(tmp_path / "x")).round(config, 0)
    assert round.deviation == pytest.approx(2 * (0.3 + 0.5 * 2**-4 * 16**0.5))
    update = np.full(16, 2**-5 * 1.01, np.float32)  # every coordinate is rounded up to 2^−4
    moved = np.linalg.norm(signed(quantised(update, 4), 4))
    assert np.linalg.norm(update) * 1.9 < moved <= np.linalg.norm(update) + 0.5 * 2**-4 * 4
