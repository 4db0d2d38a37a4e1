"""Optimizers by name: what is made of a short form is what torch makes of the same words."""

import pytest
import torch
from torch import nn

from fedray.errors import UserError
from fedray.vector.optimizer import Optimizer

ADAM = {"betas": (0.9, 0.99), "weight_decay": 0.01, "eps": 1e-6}


@pytest.mark.parametrize(
    ("text", "theirs"),
    [
        ("adamw", lambda p: torch.optim.AdamW(p, lr=0.1, **ADAM, fused=True)),
        ("adam", lambda p: torch.optim.Adam(p, lr=0.1, **ADAM, fused=True)),
        (
            "adamw:weight_decay=0.5",
            lambda p: torch.optim.AdamW(p, lr=0.1, **(ADAM | {"weight_decay": 0.5}), fused=True),
        ),
        ("sgd", lambda p: torch.optim.SGD(p, lr=0.1, fused=True)),
        (
            "sgd:momentum=0.9:nesterov=true",
            lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, fused=True),
        ),
        ("RMSprop:alpha=0.5", lambda p: torch.optim.RMSprop(p, lr=0.1, alpha=0.5)),
        ("Adagrad", lambda p: torch.optim.Adagrad(p, lr=0.1, fused=True)),
    ],
)
def test_a_short_form_makes_torchs_own_optimizer(text, theirs):
    torch.manual_seed(0)
    start = torch.randn(20)
    vectors = [nn.Parameter(start.clone()) for _ in range(2)]
    optimizers = [Optimizer.parse(text).make([vectors[0]], 0.1, ADAM), theirs([vectors[1]])]
    for step in range(3):
        for vector, optimizer in zip(vectors, optimizers, strict=True):
            vector.grad = torch.sin(vector.detach() * (step + 1))
            optimizer.step()
    assert type(optimizers[0]) is type(optimizers[1])
    assert torch.equal(*vectors)
    assert not torch.equal(vectors[0], start)


@pytest.mark.parametrize("text", ["adamw", "sgd:momentum=0.9:nesterov=true", "RMSprop:alpha=0.5:centered=false"])
def test_optimizers_are_read_as_they_are_written(text):
    assert str(Optimizer.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("adamww", "there is no optimizer 'adamww'; did you mean 'adamw'"),
        ("sgd:0.9", "say '0.9' by name"),
        ("sgd:momentun=0.9", "optimizer sgd:momentun=0.9: "),
        ("sgd:momentum=-1", "optimizer sgd:momentum=-1: Invalid momentum value"),
        ("LBFGS", "calls the loss many times a step"),
        ("SparseAdam", "is for sparse gradients"),
    ],
)
def test_wrong_optimizers_are_refused_in_a_sentence(text, message):
    with pytest.raises(UserError) as caught:
        Optimizer.parse(text)
    assert message in str(caught.value)


def test_only_plain_sgd_offers_plain_sgd():
    offers = {text: Optimizer.parse(text).offers for text in ("sgd", "SGD", "sgd:momentum=0.9", "adamw")}
    assert [text for text, offered in offers.items() if "plain sgd" in offered] == ["sgd", "SGD"]
    assert [text for text, offered in offers.items() if "sgd" in offered] == ["sgd", "SGD", "sgd:momentum=0.9"]
    assert not Optimizer.parse("sgd:momentum=0.9:nesterov=true").offers
