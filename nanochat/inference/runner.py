"""Which runner computes the serving engine's steps: the one place where that is decided."""

from typing import Literal, get_args

import torch

from nanochat.errors import UsageError
from nanochat.inference.native_runner import NativeRunner
from nanochat.inference.step import Runner, TorchRunner
from nanochat.model.gpt import GPT
from nanochat_kernels import KernelPlan, native

WeightsName = Literal["auto", "fp32", "bf16", "int8", "int4"]
COMPUTED = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def make_runner(model: GPT, weights: WeightsName = "auto", plan: KernelPlan | None = None) -> Runner:
    """A runner for `model` with its weights held as asked for.

    auto: as the model computes with them, by the C++ kernels on a CPU that has them, else through torch's ops. What
    was asked for by name and cannot be had raises UsageError.
    """
    if weights not in get_args(WeightsName):
        raise UsageError(f"--weights {weights}: use {', '.join(get_args(WeightsName))}")
    computed = COMPUTED.get(model.dtype)
    wanted = computed if weights == "auto" else weights
    if wanted is not None and model.device.type == "cpu" and native.missing() is None:
        return NativeRunner(model, wanted)
    if wanted == computed:
        return TorchRunner(model, plan)
    return NativeRunner(model, weights)  # says why it cannot
