"""torch's modes, as a new process has them: a run must not depend on what its caller has set, since no actor has it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

# But for the order of cuDNN's sums, which is to be the same every time: a client then gives the same bits.
FLAGS: tuple[tuple[Any, str, bool], ...] = (
    (torch.backends.mkldnn, "enabled", True),
    (torch.backends.mkldnn, "deterministic", False),
    (torch.backends.cudnn, "enabled", True),
    (torch.backends.cudnn, "benchmark", False),
    (torch.backends.cudnn, "deterministic", True),
    (torch.backends.cudnn, "allow_tf32", True),
    (torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", True),
    (torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", True),
)


@contextmanager
def plain() -> Iterator[None]:
    """Compute in torch's own modes: float32 on the CPU by default, no autocast, gradients on; restore the caller's."""
    with ExitStack() as stack:
        for where, name, value in FLAGS:
            before = getattr(where, name)
            if before != value:
                setattr(where, name, value)
                stack.callback(setattr, where, name, before)
        if torch.get_float32_matmul_precision() != "highest":
            stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
        if torch.get_default_dtype() != torch.float32:
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(torch.float32)
        if torch.are_deterministic_algorithms_enabled():
            warn = torch.is_deterministic_algorithms_warn_only_enabled()
            stack.callback(torch.use_deterministic_algorithms, True, warn_only=warn)
            torch.use_deterministic_algorithms(False)
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device() != torch.device("cpu"):
            stack.enter_context(torch.device("cpu"))
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if not torch.is_grad_enabled():
            stack.enter_context(torch.enable_grad())
        yield
