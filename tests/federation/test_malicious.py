"""Runs with malicious clients, folds that withstand them, and clients that fail: on the product's own path."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from runs import train

from fedray import Attack, Dataset, LoRA
from fedray.algorithms.attacks import LabelFlip, Noise, SignFlip
from fedray.commands.dry_run import print_plan
from fedray.config import Config
from fedray.data.partition import IID
from fedray.errors import RunError, UserError
from fedray.federation import blocks, plan
from fedray.federation.fit import prepare
from fedray.menus import parse_malicious
from fedray.presets import PRESETS
from fedray.record.run import Run
from fedray.reports.results import load
from fedray.seeds import generator


@dataclass(frozen=True)
class Twice(Attack):
    """An attack of a user's own."""

    def change(self, model, received, rng):
        return 2 * model - received


def final(config, out):
    """The model that a run ends with, and its initial one."""
    train(config, out)
    made = prepare(config, Run(out.with_name(f"{out.name}-planned")))
    return Run.open(out).state(made.layout).tensors["model"], made


def of_each(config, out):
    """The model that each client alone trains in one round."""
    single = replace(config, malicious=None, fold="mean", rounds=1)
    return [final(replace(single, only_client=k), out / str(k))[0] for k in range(config.clients)]


def test_attackers_are_a_share_of_the_clients_drawn_from_the_seed():
    chosen = parse_malicious("0.3:signflip")
    drawn = {seed: chosen.draw(seed, 50) for seed in range(20)}
    assert all(len(clients) == 15 and clients <= set(range(50)) for clients in drawn.values())
    assert len(set(drawn.values())) == 20
    assert drawn[3] == chosen.draw(3, 50)
    counts = np.bincount([client for clients in drawn.values() for client in clients], minlength=50)
    assert counts.max() <= 14  # of 20, each with probability 0.3


@pytest.mark.parametrize("attack", ["signflip", "signflip:2.5", "noise:3"])
@pytest.mark.parametrize("wire", ["float32", "bfloat16"])
def test_a_model_is_changed_before_the_wire(toy_config, tmp_path, attack, wire):
    """The mean of the round is that of honest models and of those that the attack makes of the others'."""
    config = toy_config(rounds=1, wire=wire, malicious=f"0.5:{attack}")
    found, made = final(config, tmp_path / "run")
    sent, received = [], made.initial if wire == "float32" else made.initial.bfloat16().float()
    for client, trained in enumerate(of_each(replace(config, wire="float32"), tmp_path)):
        if client in made.malicious:
            kind, _, scale = attack.partition(":")
            noise = torch.randn(16, generator=generator(0, "attack", client, 0))
            change = -float(scale or 1) * (trained - made.initial) if kind == "signflip" else float(scale) * noise
        else:
            change = trained - made.initial
        sent.append(received + change)
    # With bfloat16, clients start from rounded weights, and send rounded changes.
    torch.testing.assert_close(found, torch.stack(sent).mean(0), rtol=0, atol=1e-6 if wire == "float32" else 2e-2)
    (row,) = Run.open(tmp_path / "run").rows
    assert row["aggregation"] == {"malicious": 2}
    assert load(tmp_path / "run").rounds["aggregation.malicious"].tolist() == [2]
    assert load(tmp_path / "run").rounds["malicious"].tolist() == [f"0.5:{attack}"]


def test_labels_are_flipped_for_malicious_clients_alone(toy_config, tmp_path):
    """A client of label l pulls towards l; one that flips it pulls towards 3 − l."""
    config = toy_config(rounds=12, local_epochs=8, malicious="0.25:labelflip")
    (client,) = prepare(config, Run(tmp_path / "x")).malicious
    honest = final(replace(config, malicious=None), tmp_path / "honest")[0].mean().item()
    found = final(config, tmp_path / "flipped")[0].mean().item()
    assert honest == pytest.approx(1.5, abs=0.1)
    assert found == pytest.approx(1.5 + (3 - 2 * client) / 4, abs=0.1)


def test_captions_are_flipped_with_labels():
    images = np.zeros((4, 1, 2, 2), np.uint8)
    dataset = Dataset(images, np.array([0, 1, 2, 0]), {"caption": np.array(["b", "c", "a", "b"], dtype=object)})
    flipped = LabelFlip().poison(dataset)
    assert flipped.labels.tolist() == [2, 1, 0, 2]
    assert flipped.columns["caption"].tolist() == ["b", "a", "c", "b"]
    assert flipped.images is images
    assert dataset.labels.tolist() == [0, 1, 2, 0]
    with pytest.raises(UserError, match="all examples have the same label"):
        LabelFlip().poison(replace(dataset, columns={"caption": np.array(["a"] * 4, dtype=object)}))
    with pytest.raises(UserError, match="all examples have the same label"):
        LabelFlip().poison(Dataset(images))


def test_robust_folds_withstand_what_the_mean_does_not(toy_config, tmp_path):
    """Three of ten clients that all pull towards the same send the opposite, five times as long."""
    config = toy_config(labels=10, partition=IID(), rounds=6, local_epochs=4, malicious="0.3:signflip:5")
    right = final(replace(config, malicious=None), tmp_path / "honest")[0]
    off = {}
    for fold in ("mean", "median", "trimmed:0.3", "krum:3", "multikrum:3", "normbound:4"):
        off[fold] = (final(replace(config, fold=fold), tmp_path / fold.replace(":", "-"))[0] - right).abs().max().item()
    assert off["mean"] > 3
    assert all(distance < off["mean"] / 3 for fold, distance in off.items() if fold != "mean"), off


def test_an_attack_of_ones_own(toy_config, tmp_path):
    config = toy_config(rounds=1, malicious=f"0.5:{__file__}:Twice")
    assert Config.from_json(config.to_json() | {"task": Config().to_json()["task"]}).malicious.attack.kind == "attack"
    found, made = final(config, tmp_path / "run")
    models = of_each(config, tmp_path)
    sent = [2 * m - made.initial if k in made.malicious else m for k, m in enumerate(models)]
    torch.testing.assert_close(found, torch.stack(sent).mean(0))


@pytest.mark.parametrize(
    ("malicious", "changes", "sentence"),
    [
        ("0.1:signflip", {}, "the share must make some of the 4 clients malicious"),
        ("0.9:signflip", {}, "the share must make some of the 4 clients malicious, and not all"),
        ("0.5:signflop", {}, "there is no attack 'signflop'; did you mean 'signflip'"),
        ("half:signflip", {}, "not of the form SHARE:ATTACK, as in 0.2:signflip"),
        ("0.5:noise", {}, "not of the form 'noise:scale'"),
        ("0.5:signflip", {"only_client": 1}, "a client that trains alone attacks nobody"),
        ("0.5:labelflip", {"task": Config().task}, "flips labels, and this task learns from none"),
    ],
)
def test_attackers_that_cannot_be_are_refused(toy_config, malicious, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        replace(toy_config(), malicious=malicious, **changes).check()


def test_forms_of_attackers():
    assert Config(local_epochs=1).to_json()["malicious"] is None
    for text, attack in {"0.2:signflip": SignFlip(), "0.25:noise:10": Noise(10), "0.5:labelflip": LabelFlip()}.items():
        config = Config(task=LoRA(pretrained_model_name_or_path="x"), local_epochs=1, malicious=text)
        assert config.malicious.attack == attack
        assert config.to_json()["malicious"] == text
        assert Config.from_json(config.to_json()) == config


# Too few clients, too much memory


def test_a_fold_that_needs_more_clients_than_take_part_is_refused(toy_config):
    for changes, sentence in {
        ("krum:1", 1.0): "--fold krum:1 needs 5 clients in a round, and 4 take part",
        ("krum:0", 0.5): "--fold krum:0 needs 3 clients in a round, and 2 take part",
        ("trimmed:0.1", 1.0): "--fold trimmed:0.1 needs 10 clients in a round, and 4 take part",
    }.items():
        fold, fraction = changes
        with pytest.raises(UserError, match=sentence):
            toy_config(fold=fold, fraction=fraction).check()


def test_a_round_of_too_few_ends_the_run(toy_config, tmp_path):
    config = toy_config(labels=5, failing=(2,), fold="krum:1")
    with pytest.raises(RunError, match="4 of 5 clients .*, fewer than the 5 that --fold krum:1 needs. Client 2: Value"):
        train(config, tmp_path / "run")


def test_uploads_that_do_not_fit_the_machine_are_refused_with_their_size(toy_config, tmp_path, monkeypatch, capsys):
    config = toy_config(fold="median", size=1000)
    print_plan(config, tmp_path / "run", False)
    said = capsys.readouterr().out
    assert "uploads kept" in said
    assert "0.0 MB at the driver" in said  # 4 clients x 1000 x 4 bytes
    monkeypatch.setattr(plan, "machine_memory", lambda: 4 * 1000 * 4)
    prepare(config, Run(tmp_path / "fits"))
    monkeypatch.setattr(plan, "machine_memory", lambda: 4 * 1000 * 4 - 1)
    with pytest.raises(UserError, match="--fold median keeps all uploads of a round: 0.0 GB for 4 clients, and this"):
        prepare(config, Run(tmp_path / "run"))
    prepare(replace(config, fold="normbound:1"), Run(tmp_path / "streams"))


def test_adapters_keep_their_uploads_and_rules_that_need_them_refuse_other_folds(tmp_path):
    task = replace(PRESETS["digits-lora"].task, train_data_dir=str(tmp_path))
    lora = replace(PRESETS["digits-lora"], task=task, clients=5, keep_optimizer=False)
    for fold in ("median", "trimmed:0.2", "krum:1", "multikrum:1"):
        for algorithm in ("svd", "flora"):
            with pytest.raises(UserError, match="needs each client's own factors, which this fold does not keep"):
                replace(lora, algorithm=algorithm, fold=fold).check()
        replace(lora, fold=fold).check()
    replace(lora, algorithm="svd", fold="normbound:1").check()
    with pytest.raises(UserError, match="feedback:int8 remembers factors that this algorithm replaces every round"):
        replace(lora, algorithm="flora", wire="feedback:int8").check()
    replace(lora, algorithm="flora", wire="int8").check()


# Error feedback and failures


def test_a_client_that_is_left_out_after_it_encoded_keeps_its_former_memory(toy_config, tmp_path, monkeypatch):
    """What it had not sent before is still to be sent; what it would have sent then is trained anew."""
    config, out = toy_config(wire="feedback:topk:0.25", rounds=3), tmp_path / "run"
    right, state = blocks.check_values, {"round": 0, "client": None}
    encode = blocks.client_update

    def update(worker, shared, job):
        state.update(round=job.round, client=job.client)
        return encode(worker, shared, job)

    def check(tensors, bound):
        if (state["round"], state["client"]) == (1, 2):
            raise FloatingPointError("it failed")
        right(tensors, bound)

    monkeypatch.setattr(blocks, "client_update", update)
    monkeypatch.setattr(blocks, "check_values", check)
    name, memories = "link0.feedback/residual", {}
    for _ in train(config, out, rounds=1):
        run = Run.open(out)
        memories[1] = run.recall(2, run.generation(2, 1))[name]
    for row in train(config, out, rounds=1, resume=True):
        assert [client["outcome"] == "ok" for client in row["clients"]] == [True, True, False, True]
        assert run.generation(2, 2) == 1
        assert torch.equal(run.recall(2, run.generation(2, 2))[name], memories[1])
        assert run.generation(1, 2) == 2
    (row,) = train(config, out, resume=True)
    assert all(client["outcome"] == "ok" for client in row["clients"])
    assert run.generation(2, 3) == 3
    assert not torch.equal(run.recall(2, 3)[name], memories[1])


def test_infinite_weights_are_their_clients_failure_also_on_a_lossy_wire(toy_config, tmp_path):
    for wire in ("feedback:topk:0.1", "randk:0.1", "int8", "bfloat16"):
        config = toy_config(infinite=(1,), rounds=1, wire=wire)
        (row,) = train(config, tmp_path / wire.replace(":", "-"))
        outcomes = [client["outcome"] for client in row["clients"]]
        assert outcomes[1] == "FloatingPointError: the model that it sends is not finite (lower the learning rate?)"
        assert outcomes.count("ok") == 3


def test_bytes_in_the_record_are_those_of_the_payloads(toy_config, tmp_path):
    for (wire, down), (up, sent) in {
        ("topk:0.01", None): (10 * 8 + 4, 4000),
        ("feedback:topk:0.01,float16", "int8"): (10 * 6 + 4, 1016),
        ("randk:0.01", "bfloat16"): (10 * 4 + 16, 2000),
        ("int8", None): (1016, 1016),
        ("int8", "float32"): (1016, 4000),
    }.items():
        config = toy_config(size=1000, rounds=1, wire=wire, wire_down=down)
        planned = plan.bytes_planned(config, plan.make_plan(config))
        (row,) = train(config, tmp_path / f"{wire}-{down}".replace(":", "-"))
        assert (planned.up, planned.down, planned.first) == (up, sent, sent)
        assert (row["bytes_up"], row["bytes_down"]) == (4 * up, 4 * sent)
