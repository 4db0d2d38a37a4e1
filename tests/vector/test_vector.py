import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fedray import vector
from fedray.tasks.ddpm import DDPM
from fedray.vector import FlatParameters, Layout


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return DDPM().unet()


def backward(unet, seed=0):
    rng = torch.Generator().manual_seed(seed)
    images = torch.randn(4, 1, 8, 8, generator=rng)
    unet(images, torch.tensor([1, 100, 500, 999])).sample.square().mean().backward()


def test_parameters_and_gradients_are_views(unet):
    plain = copy.deepcopy(unet)
    flat = FlatParameters(unet)
    assert flat.layout.size == 159_697
    assert torch.equal(flat.vector, nn.utils.parameters_to_vector(plain.parameters()))
    backward(unet)
    backward(plain)
    assert torch.equal(flat.gradient, nn.utils.parameters_to_vector([p.grad for p in plain.parameters()]))
    flat.vector.detach().fill_(2)
    assert all((p == 2).all() for p in unet.parameters())
    flat.check()


def test_fused_adamw_on_the_vector_equals_adamw_on_the_parameters(unet):
    plain = copy.deepcopy(unet)
    flat = FlatParameters(unet)
    on_vector = torch.optim.AdamW([flat.vector], lr=1e-2, fused=True)
    on_parameters = torch.optim.AdamW(plain.parameters(), lr=1e-2, fused=True)
    for step in range(3):
        flat.gradient.zero_()
        backward(unet, step)
        on_vector.step()
        on_parameters.zero_grad()
        backward(plain, step)
        on_parameters.step()
    assert torch.equal(flat.vector, nn.utils.parameters_to_vector(plain.parameters()))


def test_only_what_is_trainable_is_in_the_vector(unet):
    unet.requires_grad_(False)
    unet.conv_in.requires_grad_(True)
    assert FlatParameters(unet).layout.names == ("conv_in.weight", "conv_in.bias")


@pytest.mark.parametrize(
    "break_it",
    [
        lambda unet, flat: unet.zero_grad(),
        lambda unet, flat: unet.to(memory_format=torch.channels_last),
        lambda unet, flat: unet.half(),
        lambda unet, flat: torch.optim.AdamW([flat.vector]).zero_grad(),
    ],
    ids=["zero_grad", "channels_last", "half", "optimizer.zero_grad"],
)
def test_check_finds_what_detaches_parameters(unet, break_it):
    flat = FlatParameters(unet)
    flat.check()
    break_it(unet, flat)
    with pytest.raises(RuntimeError, match="no longer lies|was replaced"):
        flat.check()


def test_trained_buffers_are_refused():
    network = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    flat = FlatParameters(network)
    flat.check()
    network(torch.randn(5, 3))
    with pytest.raises(RuntimeError, match="running_mean changes in training"):
        flat.check()


def test_refuses_other_precisions_and_nothing_to_train(unet):
    with pytest.raises(ValueError, match="float16"):
        FlatParameters(unet.half())
    with pytest.raises(ValueError, match="no trainable parameter"):
        FlatParameters(unet.requires_grad_(False))


def test_safetensors_have_the_names_of_the_layout(unet, tmp_path):
    flat = FlatParameters(unet)
    vector.save(tmp_path / "model.safetensors", flat.layout.views(flat.vector.detach()))
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    stored = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(stored[name], p) for name, p in unet.named_parameters())
    assert torch.equal(vector.load(tmp_path / "model.safetensors", flat.layout), flat.vector)


def test_a_file_of_another_model_is_named(tmp_path):
    vector.save(tmp_path / "model.safetensors", {"a": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match="no tensor 'b'"):
        vector.load(tmp_path / "model.safetensors", Layout(("b",), ((2, 3),)))
    with pytest.raises(ValueError, match=r"shape \[2, 3\], not \[3, 2\]"):
        vector.load(tmp_path / "model.safetensors", Layout(("a",), ((3, 2),)))


def test_a_failed_save_leaves_the_file_before(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    vector.save(path, {"a": torch.zeros(2)})

    def full(tensors, filename, metadata):
        filename.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="no space"):
        vector.save(path, {"a": torch.ones(2)})
    assert list(tmp_path.iterdir()) == [path]
    assert torch.equal(load_file(path)["a"], torch.zeros(2))


def test_sha256_is_of_the_bytes():
    # printf '\x00\x00\x80\x3f\x00\x00\x00\xc0' | sha256sum
    known = "ee4ac73c2bd27756ab82780f27c73a7bc4d3f0bb6acb37e008bc27eccd7e588b"
    assert vector.sha256(torch.tensor([1.0, -2.0])) == known
    assert vector.sha256(torch.tensor([1.0]), torch.tensor([-2.0])) == known


def test_sha256_of_named_tensors_is_of_names_and_bytes():
    # printf 'a\x00\x00\x80\x3fb\x00\x00\x00\xc0' | sha256sum
    expected = "caad4aa4f3a94b2b6fc39ce5fd5597f08581e4fbf2e4236746dbae247d40cf7d"
    tensors = {"b": torch.tensor([-2.0]), "a": torch.tensor([1.0])}
    assert vector.sha256_of(tensors) == vector.sha256_of(dict(reversed(tensors.items()))) == expected
    assert vector.sha256_of({"a": tensors["b"], "b": tensors["a"]}) != expected


def test_two_names_of_one_tensor_are_saved_as_two(tmp_path):
    model = torch.arange(3.0)
    vector.save(tmp_path / "state.safetensors", {"model": model, "ema/model": model, "steps": torch.tensor([7])})
    stored = load_file(tmp_path / "state.safetensors")
    assert torch.equal(stored["model"], model)
    assert torch.equal(stored["ema/model"], model)
    assert stored["steps"].dtype == torch.int64
