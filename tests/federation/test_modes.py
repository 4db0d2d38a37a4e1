"""What a caller has set in its own process changes no bit of a run, and is as it was afterwards."""

from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch

import fedray
from fedray.errors import UserError


@contextmanager
def setting(get, put, value):
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


def flag(where, name, value):
    return lambda: setting(lambda: getattr(where, name), lambda new: setattr(where, name, new), value)


MODES = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "without oneDNN": flag(torch.backends.mkldnn, "enabled", False),
    "reproducible oneDNN": flag(torch.backends.mkldnn, "deterministic", True),
    "float64": lambda: setting(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "bfloat16": lambda: setting(torch.get_default_dtype, torch.set_default_dtype, torch.bfloat16),
    "device": lambda: torch.device("meta"),
    "default device": lambda: setting(torch.get_default_device, torch.set_default_device, "meta"),
    "inference": torch.inference_mode,
    "no gradients": torch.no_grad,
    "low precision": lambda: setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"),
    "deterministic": lambda: setting(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
    ),
    "cuDNN": flag(torch.backends.cudnn, "benchmark", True),
}


def modes():
    backends = torch.backends
    return (
        torch.is_autocast_enabled("cpu"), backends.mkldnn.enabled, backends.mkldnn.deterministic,
        torch.get_default_dtype(), torch.get_default_device(), torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(), torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled(),
        backends.cudnn.benchmark, backends.cudnn.deterministic, torch.empty(1).dtype, torch.empty(1).device,
    )  # fmt: skip


def trained(out, modes_of_the_caller=nullcontext):
    task = fedray.DDPM(block_out_channels=(8,), attention=(False,), mid_block_attention=False)
    config = replace(
        fedray.PRESETS["digits"], task=task, clients=2, rounds=1, local_epochs=None, local_steps=2, train_batch_size=8,
        evaluate_samples=4, sampling_steps=2, use_ema=True,
    )  # fmt: skip
    seen = []
    with modes_of_the_caller():
        before = modes()
        result = fedray.run(replace(config, actors=0), out, on_row=lambda row: seen.append(torch.ones(1).dtype)).result
        assert modes() == before
    assert seen == [torch.float32]
    return result["state_sha256"], result["scores"]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("modes") / "run")


@pytest.mark.parametrize("mode", MODES)
def test_modes_of_the_caller_change_no_bit(mode, expected, tmp_path):
    assert trained(tmp_path / "run", MODES[mode]) == expected


@pytest.mark.parametrize(("name", "value"), [("OMP_THREAD_LIMIT", "1"), ("OMP_DYNAMIC", "TRUE")])
def test_an_environment_in_which_torch_hangs_is_refused_by_name(name, value, toy_config, monkeypatch):
    monkeypatch.setenv(name, value)
    toy_config().check()  # one thread does not hang
    with pytest.raises(UserError, match=f"the environment has {name}={value}, with which torch hangs on 2 threads"):
        toy_config(cpus_per_actor=2.0).check()
    monkeypatch.setenv(name, "2" if name == "OMP_THREAD_LIMIT" else "FALSE")
    toy_config(cpus_per_actor=2.0).check()
