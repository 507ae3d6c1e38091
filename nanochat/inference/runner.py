"""Which runner computes the serving engine's steps: the one place where that is decided."""

from typing import Literal, get_args

import torch

from nanochat.errors import UsageError
from nanochat.inference.step import Runner, TorchRunner
from nanochat.model.gpt import GPT
from nanochat_kernels import KernelPlan

WeightsName = Literal["auto", "fp32", "bf16", "int8", "int4"]
COMPUTED = {"fp32": torch.float32, "bf16": torch.bfloat16}


def make_runner(model: GPT, weights: WeightsName = "auto", plan: KernelPlan | None = None) -> Runner:
    """A runner for `model` with its weights held as asked for; auto takes them as the model computes with them."""
    if weights not in get_args(WeightsName):
        raise UsageError(f"--weights {weights}: use {', '.join(get_args(WeightsName))}")
    if weights == "auto" or COMPUTED.get(weights) == model.dtype:
        return TorchRunner(model, plan)
    dtype = str(model.dtype).removeprefix("torch.")
    raise UsageError(
        f"--weights {weights} is not available here: the model computes in {dtype} and there is no native runner; "
        "use --weights auto, and --dtype to compute in another precision"
    )
