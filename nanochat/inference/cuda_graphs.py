"""Decode steps as CUDA graphs: a step's hundred launches become one, so that the host no longer sets the pace.

    batch sizes 1, 2, 4, 8, 16, 32, … → one graph each, captured when first needed; a batch takes the next larger one

A graph repeats the same kernels on the same addresses. So a step's inputs are copied into fixed buffers, and what is
left of them is padding: sequences of length 0, whose token stands at position −1, is written to the scratch block and
gives zeros. Only steps of one token per sequence are captured: a prompt's are long enough to hide their launches.

What a graph has seen must stay where it is: the graph keeps the cache, and every tensor that the runner held when it
was captured. New weights (`refresh`) or another cache mean new graphs.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nanochat.inference.paged_cache import PagedCache
from nanochat.inference.step import Runner, StepBatch

LARGEST = 256  # sequences of a graph; larger batches run without
WARM_UPS = 2  # runs before a capture: libraries allocate their workspaces in the first
Replay = Callable[[], Tensor]
Capture = Callable[[Callable[[], Tensor]], Replay]


class Capturer:
    """Captures on a CUDA device. All graphs share one memory pool: only one of them runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], Tensor]) -> Replay:
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                step()
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            result = step()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


class DecodeGraph:
    """One batch size: its buffers, and the step over them."""

    def __init__(self, runner: Runner, cache: PagedCache, rows: int, capture: Capture) -> None:
        device = cache.k[0].device
        width = -(-cache.context // cache.block_size)

        def filled(value: int, dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.full(shape, value, dtype=dtype, device=device)

        self.inputs = StepBatch(
            tokens=filled(0, torch.int64, rows),
            previous=filled(-1, torch.int64, rows),
            positions=filled(-1, torch.int64, rows),
            starts=torch.arange(rows + 1, dtype=torch.int32, device=device),
            lengths=filled(0, torch.int32, rows),
            tables=(filled(-1, torch.int32, rows, width), filled(-1, torch.int32, rows, width)),
            outputs=torch.arange(rows, dtype=torch.int64, device=device),
        )
        self.replay = capture(lambda: runner(self.inputs, cache))
        self.kept: Any = (dict(vars(runner)), cache)

    def __call__(self, batch: StepBatch) -> Tensor:
        """(rows of the batch, vocab_size) float32, valid until the next call."""
        inputs, rows = self.inputs, batch.lengths.size(0)
        for name, padding in (("tokens", 0), ("previous", -1), ("positions", -1), ("lengths", 0)):
            buffer = getattr(inputs, name)
            buffer[rows:] = padding
            buffer[:rows] = getattr(batch, name)
        for buffer, table in zip(inputs.tables, batch.tables, strict=True):
            buffer.fill_(-1)
            buffer[:rows, : table.size(1)] = table
        return self.replay()[:rows]


class GraphRunner:
    """A runner whose decode steps are replayed. `runner` must be capturable: it may not wait for the device."""

    def __init__(self, runner: Runner, device: torch.device, largest: int = LARGEST, capture: Capture | None = None):
        self.runner, self.largest, self.cache_dtype = runner, largest, runner.cache_dtype
        self.capture = Capturer(device) if capture is None else capture
        self.graphs: dict[int, DecodeGraph] = {}
        self.cache: PagedCache | None = None

    def refresh(self) -> None:
        self.graphs = {}
        self.runner.refresh()

    @torch.no_grad()
    def __call__(self, batch: StepBatch, cache: PagedCache) -> Tensor:
        """(M, vocab_size) float32 logits; those of a replayed step are valid until the next."""
        rows = batch.lengths.size(0)
        decodes = rows == batch.tokens.size(0) == batch.outputs.size(0)
        if not decodes or rows > self.largest:
            return self.runner(batch, cache)
        if self.cache is not cache:
            self.graphs, self.cache = {}, cache
        size = 1 << (rows - 1).bit_length()
        if size not in self.graphs:
            self.graphs[size] = DecodeGraph(self.runner, cache, size, self.capture)
        return self.graphs[size](batch)
