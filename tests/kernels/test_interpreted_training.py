"""Training with every kernel on, in Triton's interpreter: the loss follows the reference's, step by step."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]

TRAIN = """
import json, sys, torch
from nanochat.model.config import GPTConfig
from nanochat.model.gpt import GPT
from nanochat.runtime import Runtime
from nanochat.training.optimizer import MuonAdamW, parameter_groups
from nanochat.training.schedules import StepRates
from nanochat_kernels import OPS, KernelPlan

steps = int(sys.argv[1])
config = GPTConfig(vocab_size=96, seq_len=16, layers=2, width=64, heads=2, kv_heads=1, head_dim=32)
cpu, kernels = torch.device("cpu"), [name for name, op in OPS.items() if "triton" in op.backends]
# resolve() proves each backend on a case of its own; test_triton.py has all cases, here the plan is made by name
from nanochat_kernels.registry import Choice
def chosen(name):
    return Choice("triton" if name in kernels else "torch", False, "every kernel on")
plans = {"torch": KernelPlan.reference(), "fused": KernelPlan({name: chosen(name) for name in OPS})}
curves = {}
for name, plan in plans.items():
    torch.manual_seed(0)
    model = GPT(config, plan)
    model.init_weights(torch.Generator().manual_seed(1))
    parameters = dict(model.named_parameters())
    noise = torch.Generator().manual_seed(3)
    with torch.no_grad():
        # At the first step many gradients are zero in truth, and AdamW would take the sign of their rounding.
        for p in parameters.values():
            p.add_(0.05 * torch.randn(p.shape, generator=noise))
    groups = parameter_groups(parameters, config.width, 1.0, 0.2)
    optimizer = MuonAdamW(parameters, groups, plan, Runtime(cpu, torch.float32))
    data = torch.Generator().manual_seed(2)
    curve = []
    for step in range(steps):
        tokens = torch.randint(0, 96, (1, 17), generator=data)
        tokens[:, 8:] = tokens[:, :9].clone()  # something to learn
        loss = model(tokens[:, :-1], tokens[:, 1:].contiguous())
        loss.backward()
        optimizer.step(StepRates(lr=1.0, momentum=0.85, decay=1.0))
        curve.append(loss.item())
    curves[name] = curve
    # With two layers the middle is the end, and a norm follows: backout's gradient is nothing but rounding.
    curves[name + " weights"] = [p.double().norm().item() for n, p in parameters.items() if n != "backout_scale"]
print(json.dumps({"kernels": kernels, **curves}))
"""


@pytest.mark.parametrize("steps", [2, pytest.param(5, marks=pytest.mark.long)])
def test_every_kernel_on_matches_the_reference_curve(steps):
    environment = os.environ | {"PYTHONPATH": str(ROOT / "kernels"), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, str(steps)], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    used = {"rms_norm", "rope_qk_norm", "attention", "relu2_mlp", "linear_softcap_cross_entropy"}
    assert used | {"muon_update", "adamw_update"} <= set(result["kernels"])
    assert result["fused"] == pytest.approx(result["torch"], rel=2e-5)
    assert result["fused weights"] == pytest.approx(result["torch weights"], rel=1e-4)
    assert result["fused"][0] != result["fused"][-1]
