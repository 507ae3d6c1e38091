"""FP8 training: which products run in it, the scales they use, and where those come from.

The four products of every block that are at least 128 wide and high, in multiples of 16: q, k and v together, o, fc and
proj. The head, gates and embeddings stay in the compute dtype, and so does everything without a gradient: evaluation
and sampling see the bf16 model. The maths and the kernels are in nanochat_kernels/fp8_*.py; a block of FP8 is three ops
around attention.

Scales. A normed input has a static one, weights are cast with their own amax after every update, and the six other
tensors of a layer go by delayed scaling: an amax history of the last 16 updates, its largest entry decides.

    attended             input of o        e4m3        gradient of q, k, v (one for all)   e5m2
    relu(h)²             input of proj     e4m3        gradients of o, of proj, of h       e5m2

A history is what a run's results depend on, so it is saved with the optimizer's state and restored bit for bit. Amaxes
arrive as the "gradient" of the scales (see fp8_linear.py), the largest of a step's micro-batches counts, and ranks
agree on the largest of theirs by one small message a step. Where nothing is known yet, a scale is 0: current scaling.

What it saves: bytes moved per token, layer and channel, beside what any product reads and writes. Predictions, counted
from the cost models of the ops; nothing of this is measured.

                                      here    as separate steps (karpathy/nanochat's operations one by one)
    normed rows, written                 4      4
    cast of inputs                       4     45   q, k, v, o, fc: 5 each (amax, cast), proj: 20
    transposes of inputs backward        0     18
    casts of gradients, both orders     20     63   7 each: q, k, v, o, proj, and 28 for fc
    relu² and its derivative             4     40
    sum                                 32    170
    65,536 tokens, d12: GB              19    103   and 0.9 for weights (here once a step, there in every micro-batch)
                   d24: GB              77    411   and 7

At 3.35 TB/s that is 23 against 123 ms at d24, where the products take some 200 in bf16. A compiler joins some of the
separate steps, which is why the difference seen will be smaller.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

from nanochat.errors import NanochatError, UsageError
from nanochat_kernels.fp8_linear import Fp8Weight, cast_weights, has_fp8_products
from nanochat_kernels.fp8_quantize import E4M3, E5M2, scale_for

if TYPE_CHECKING:
    from nanochat.model.gpt import GPT, Block

HISTORY = 16  # updates that a delayed scale looks back on
SLOTS = {"qkv gradient": E5M2, "attended": E4M3, "o gradient": E5M2, "hidden": E4M3, "mlp gradient": E5M2,
         "hidden gradient": E5M2}  # fmt: skip
USES = (1, 2, 3)  # of these, in order: by the products of qkv, of o, and of the MLP
LEAST, UNIT = 128, 16  # what the tensor cores want of a product's dimensions
STATE = "fp8.amax_history"


class Fp8Layer(NamedTuple):
    """What a block needs to compute in FP8."""

    scales: Tensor  # (6,) float32, a leaf whose gradient are the amaxes; 0 where nothing is known
    qkv: Fp8Weight
    o: Fp8Weight
    fc: Fp8Weight
    proj: Fp8Weight


class Fp8:
    """The state of a model's FP8 training. `layers` go into its blocks.

    After each backward pass `observe`, after each update `advance`. Made when the optimizer has taken over the
    parameters' memory.
    """

    def __init__(self, model: GPT) -> None:
        """Raises UsageError where the device or the model cannot train in FP8."""
        _check_device(model.device, model.dtype)
        _check_shapes(model)
        self.blocks = [cast("Block", block) for block in model.blocks]
        self.triton = model.plan.choices["fp8_quantize"].backend == "triton"
        shape = (len(self.blocks), len(SLOTS))
        self.history = torch.zeros(HISTORY, *shape, device=model.device)
        self.seen = torch.zeros(shape, device=model.device)  # this step's amaxes so far
        self.scales = [torch.zeros(shape[1], device=model.device, requires_grad=True) for _ in self.blocks]
        self.layers: list[Fp8Layer] = []
        self.refresh()

    @property
    def emulated(self) -> bool:
        """Are products those of the FP8 numbers in float32, for want of tensor cores that multiply FP8?"""
        return not has_fp8_products(self.seen.device)

    @torch.no_grad()
    def refresh(self) -> None:
        """Renews scales from the history and casts from the weights."""
        largest = self.history.amax(dim=0)
        columns = [scale_for(largest[:, i], dtype) for i, dtype in enumerate(SLOTS.values())]
        known = torch.where(largest > 0, torch.stack(columns, dim=1), 0.0)
        torch._foreach_copy_(self.scales, list(known.unbind()))
        self.layers = [
            Fp8Layer(
                scales,
                cast_weights([block.attn.q.weight, block.attn.k.weight, block.attn.v.weight], self.triton),
                cast_weights([block.attn.o.weight], self.triton),
                cast_weights([block.mlp.fc.weight], self.triton),
                cast_weights([block.mlp.proj.weight], self.triton),
            )
            for block, scales in zip(self.blocks, self.scales, strict=True)
        ]

    @torch.no_grad()
    def observe(self) -> None:
        """Takes the amaxes that a backward pass has left."""
        amaxes = [s.grad if s.grad is not None else torch.zeros_like(s) for s in self.scales]
        torch.maximum(self.seen, torch.stack(amaxes), out=self.seen)
        self.forget()

    def forget(self) -> None:
        """Drops the amaxes of a backward pass that does not count."""
        for scales in self.scales:
            scales.grad = None

    @torch.no_grad()
    def advance(self) -> None:
        """A step is over: its amaxes, over all ranks, join the history, and the weights have changed."""
        if dist.is_initialized():
            dist.all_reduce(self.seen, op=dist.ReduceOp.MAX)
        self.history = torch.cat([self.seen[None], self.history[:-1]])
        self.seen.zero_()
        self.refresh()

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint keeps: the amax history (16, layers, 6), newest first."""
        return {STATE: self.history.cpu()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes what `state_dict` returned. Raises NanochatError where it is missing or another model's."""
        saved = state.get(STATE)
        if saved is None or saved.shape != self.history.shape:
            found = "none" if saved is None else f"one of shape {tuple(saved.shape)}"
            raise NanochatError(
                f"the checkpoint holds no FP8 amax history of shape {tuple(self.history.shape)} ({found}); it belongs "
                "to another model or was not trained with --fp8"
            )
        self.history.copy_(saved)
        self.refresh()


def _check_device(device: torch.device, dtype: torch.dtype) -> None:
    if dtype == torch.float16:
        raise UsageError("--fp8 does not go with float16, whose loss scale hides amaxes; use --dtype bfloat16")
    if device.type == "cuda" and not has_fp8_products(device):
        major, minor = torch.cuda.get_device_capability(device)
        raise UsageError(
            f"--fp8 needs a GPU of compute capability 8.9 or later (Ada, Hopper, Blackwell); this "
            f"{torch.cuda.get_device_name(device)} has {major}.{minor}. Train without --fp8"
        )
    if device.type not in ("cuda", "cpu"):
        raise UsageError(f"--fp8 runs on CUDA, and emulated on the CPU, not on {device.type}; train without --fp8")


def _check_shapes(model: GPT) -> None:
    config, block = model.config, cast("Block", model.blocks[0])
    attn, mlp = block.attn, block.mlp
    joined = sum(linear.weight.size(0) for linear in (attn.q, attn.k, attn.v))
    products = {"q, k, v": torch.Size((joined, config.width))}
    products |= {name: part.weight.shape for name, part in (("o", attn.o), ("fc", mlp.fc), ("proj", mlp.proj))}
    bad = [f"{name} {a}×{b}" for name, (a, b) in products.items() if min(a, b) < LEAST or a % UNIT or b % UNIT]
    if bad:
        raise UsageError(
            f"--fp8 needs products of at least {LEAST}×{LEAST} in multiples of {UNIT}; this model has "
            f"{', '.join(bad)}. Use a greater --depth, another --head-dim, or train without --fp8"
        )
    if model.device.type == "cuda" and config.seq_len % UNIT:
        raise UsageError(f"--fp8 needs a --seq-len in multiples of {UNIT}, not {config.seq_len}")


def fp8_block(
    block: Block,
    layer: Fp8Layer,
    x: Tensor,
    delta: Tensor | None,
    x0: Tensor | None,
    scales: tuple[Tensor | None, Tensor | None],
    rope: tuple[Tensor, Tensor],
    ve: Tensor | None,
    window: int,
) -> tuple[Tensor, Tensor]:
    """A block's forward pass in FP8; arguments and results as Block.forward's."""
    attn, mlp, plan = block.attn, block.mlp, block.plan
    of_qkv, of_o, of_mlp = layer.scales.split(USES)
    weights = attn.q.weight, attn.k.weight, attn.v.weight
    q, k, v, head, x = plan.fp8_norm_qkv(x, *weights, delta, scales[0], x0, scales[1], of_qkv, layer.qkv)
    q, k, v = attn.rotated(q, k, v, head, *rope, ve)
    attended = plan.fp8_linear(plan.attention(q, k, v, window).flatten(-2), attn.o.weight, of_o, layer.o)
    y, x = plan.fp8_norm_mlp(x, mlp.fc.weight, mlp.proj.weight, attended, of_mlp, (layer.fc, layer.proj))
    return x, y
