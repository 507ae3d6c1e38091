"""How much memory training takes, known before anything is allocated.

    parameters   float32, the embedding tables in the compute dtype
    gradients    the same again, alive from the first micro-batch to the update
    optimizer    Muon: one moment per matrix element. AdamW: two per parameter. Divided by the ranks
    passes       activations kept for the backward pass, and what comes and goes on the way
    update       the summed gradients' second copy and the largest matrices in several forms, at the end of a step

The first three are arithmetic. The passes are not counted by a formula, which every new kernel would make wrong: the
model itself runs, on tensors that have shapes but no memory, and a ledger notes when each storage comes and goes. It
sees what autograd keeps with the backends of the plan, but not the scratch inside one operation (the loss's, which is
large, is added), nor what a compiler fuses away: for compiled blocks the estimate lies above the truth.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanochat.model.config import GPTConfig
from nanochat.model.costs import parameter_counts
from nanochat.model.gpt import GPT
from nanochat_kernels import KernelPlan
from nanochat_kernels.linear_softcap_cross_entropy_chunked import PANEL, TILE
from nanochat_kernels.numerics import product_dtype

# What trains where no plan is given: attention without a table of scores, a loss without a table of logits.
LEAN_PLAN = "torch,attention=sdpa,linear_softcap_cross_entropy=chunked"
UPDATE_FORMS = 4  # copies of a stack of matrices that one Muon update holds at a time, beside its gradient


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device."""

    parameters: int
    gradients: int
    optimizer: int
    passes: int
    update: int

    @property
    def peak(self) -> int:
        """The passes and the update do not happen at the same time."""
        return self.parameters + self.gradients + self.optimizer + max(self.passes, self.update)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {getattr(self, name) / 1e9:.2f}" for name in self.__dataclass_fields__)
        return f"{self.peak / 1e9:.2f} GB ({parts})"


class Ledger(TorchDispatchMode):
    """Counts the bytes of all storages that come into being under it; `peak` is the most that lived at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):  # what is met here first was there before: views of it cost nothing
            if isinstance(leaf, Tensor):
                self._enter(leaf, new=False)
        if func is torch.ops.nanochat.head_loss.default:
            self.peak = max(self.peak, self.now + _loss_scratch(*args[:2]))
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._enter(leaf, new=True)
        return out

    def _enter(self, tensor: Tensor, new: bool) -> None:
        """Follows the tensor's storage from now until nothing refers to it; a new one counts."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes() if new else 0
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._leave, key, size).atexit = False

    def _leave(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _loss_scratch(x: Tensor, weight: Tensor) -> int:
    """Bytes inside the chunked loss, which is one operation here: logits of a panel, gradients in float32, copies."""
    (rows, width), words = x.shape, weight.size(0)
    size = product_dtype(x.dtype, x.device).itemsize
    panel = min(rows, max(1, PANEL // words))
    tile = min(panel, max(1, TILE // words)) if x.device.type == "cpu" else panel
    copies = sum(words * width * to for to, was in ((x.itemsize, weight.itemsize), (size, x.itemsize)) if to != was)
    copies += rows * width * size if size != x.itemsize else 0
    return panel * (words + width) * size + 2 * tile * words * 4 + copies + 4 * width * (rows + words)


@contextmanager
def shapes_only() -> Iterator[None]:
    """Tensors made in here have shapes, dtypes and storages of the right size, but no memory."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def passes_bytes(
    config: GPTConfig,
    rows: int,
    seq_len: int,
    dtype: torch.dtype,
    plan: KernelPlan | None = None,
    checkpoint_activations: bool = False,
) -> int:
    """Peak bytes of a forward and backward pass over rows × seq_len tokens, above parameters and gradients."""
    if plan is None:
        plan = KernelPlan.resolve(LEAN_PLAN, device=torch.device("cpu"), dtype=dtype, mode="train-eager")
    ledger = Ledger()
    with shapes_only():
        model = GPT(config, plan, dtype)
        model.checkpoint_activations = checkpoint_activations
        model.rope(seq_len, torch.device("cpu"))
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)  # as in every micro-batch but the first
        with ledger:
            idx = torch.empty(rows, seq_len, dtype=torch.int64)
            model(idx, torch.empty_like(idx)).backward()
    return ledger.peak


def estimate(
    config: GPTConfig,
    rows: int,
    seq_len: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    ranks: int = 1,
    plan: KernelPlan | None = None,
    checkpoint_activations: bool = False,
) -> MemoryEstimate:
    """Memory of training on each of `ranks` devices, with micro-batches of rows × seq_len tokens.

    seq_len: all of the context by default. plan: eager training without tables of scores or logits by default; the
    head of this file says what that means for compiled training.
    """
    seq_len = config.seq_len if seq_len is None else seq_len
    counts = parameter_counts(config)
    table_size = 4 if dtype == torch.float16 else dtype.itemsize
    tables = counts["wte"] + counts["value_embeds"]
    parameters = 4 * (counts["total"] - tables) + table_size * tables
    muon = 4 * counts["matrices"]
    optimizer = (muon + 2 * (parameters - muon)) // ranks
    largest = 4 * 4 * config.width**2 * config.layers  # bytes of all matrices of the MLP's shape, stacked
    mine = 4 * 4 * config.width**2 * -(-config.layers // ranks)
    product = 2 if dtype == torch.bfloat16 else 4  # bytes per element where Muon multiplies
    update = max(largest, mine + UPDATE_FORMS * mine * product // 4)
    if ranks > 1:
        update += parameters + parameters // ranks  # what is sent lives until it has arrived, beside what is received
    passes = passes_bytes(config, rows, seq_len, dtype, plan, checkpoint_activations)
    return MemoryEstimate(parameters, parameters, optimizer, passes, update)
