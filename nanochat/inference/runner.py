"""Which runner computes the serving engine's steps: the one place where that is decided.

CPU     NativeRunner (C++) where the extension is built, for any form of the weights; else TorchRunner
CUDA    CudaRunner where its kernels can run, its decode steps replayed as graphs; else TorchRunner
other   TorchRunner
"""

from typing import Literal, get_args

import torch

from nanochat.errors import UsageError
from nanochat.inference.cuda_graphs import GraphRunner
from nanochat.inference.cuda_runner import CudaRunner
from nanochat.inference.native_runner import NativeRunner
from nanochat.inference.step import Runner, TorchRunner
from nanochat.model.gpt import GPT
from nanochat_kernels import KernelPlan, native, native_cuda
from nanochat_kernels.registry import REFERENCE, Place

WeightsName = Literal["auto", "fp32", "bf16", "fp8", "int8", "int4"]
COMPUTED = {torch.float32: "fp32", torch.bfloat16: "bf16"}
HELD = {"cpu": ("fp32", "bf16", "int8", "int4"), "cuda": ("fp32", "bf16", "fp8", "int8")}


def make_runner(model: GPT, weights: WeightsName = "auto", plan: KernelPlan | None = None) -> Runner:
    """A runner for `model` with its weights held as asked for; auto holds them as the model computes with them.

    What was asked for by name and cannot be had raises UsageError. A plan of nothing but references is taken at its
    word: TorchRunner.
    """
    if weights not in get_args(WeightsName):
        raise UsageError(f"--weights {weights}: use {', '.join(get_args(WeightsName))}")
    device, plan = model.device, model.plan if plan is None else plan
    wanted = COMPUTED.get(model.dtype) if weights == "auto" else weights
    plain = weights == "auto" and all(choice.backend == REFERENCE for choice in plan.choices.values())
    missing = _missing(model)
    if wanted is not None and wanted in HELD.get(device.type, ()) and missing is None and not plain:
        if device.type == "cpu":
            return NativeRunner(model, wanted)
        return GraphRunner(CudaRunner(model, wanted), device)
    if wanted == COMPUTED.get(model.dtype):
        runner = TorchRunner(model, plan)
        return GraphRunner(runner, device) if runner.capturable else runner
    held = ", ".join(HELD.get(device.type, ())) or "none by name"
    reason = missing or f"it holds {held}"
    raise UsageError(f"--weights {weights} cannot be had on {device}: {reason}; use --weights auto")


def _missing(model: GPT) -> str | None:
    """Why this device has no runner in C++ or CUDA, or None."""
    if model.device.type == "cpu":
        return native.missing()
    if model.device.type == "cuda":
        return native_cuda.needs_cuda_ops(Place(model.device, model.dtype, "decode"))
    return "there are no kernels for it"
