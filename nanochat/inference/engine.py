"""The reference engine: prompts in, a stream of tokens out. Read it to learn how generation works.

    prefill   all prompts at once, padded on the right; one forward pass each, however many answers are wanted
    expand    every prompt's cache is copied once per answer
    decode    logits → penalties → draw → forced tokens of the tool → one position through the model, all rows at once

One copy of the batch's ids to the host per step is all that crosses the device boundary; forced tokens go the other
way, in steps that have some. Rows that are done are dropped from the batch when they are half of it: copying the cache
each time would cost more than carrying them along. A row's draw depends on its seed and position alone, so none of this
changes what is generated (but for rounding: a GPU may add up a matrix product of another shape in another order).

The trade-off against a serving engine: all rows start together, and a long row keeps its batch small but alive.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from nanochat.errors import UsageError
from nanochat.inference.kv_cache import KVCache
from nanochat.inference.row import Completion, Event, Row, Tool
from nanochat.inference.sampling import BatchSampler, SamplingParams, row_seed
from nanochat.inference.tools import calculate
from nanochat.model.gpt import GPT
from nanochat.tokenizer import Tokenizer

DEFAULT = SamplingParams()
HEADROOM = 64  # slots beyond the prompts that a new cache has; it doubles when they are used up


class Engine:
    """Generates with one model. `context` is the most tokens of prompt and answer together, by default the model's
    sequence length: beyond it, positions were never trained. `tool` maps an expression to its result or None.
    """

    def __init__(
        self, model: GPT, tokenizer: Tokenizer, tool: Tool | None = calculate, context: int | None = None
    ) -> None:
        self.model, self.tokenizer, self.tool = model, tokenizer, tool
        self.context = model.config.seq_len if context is None else context

    @torch.no_grad()
    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] = DEFAULT,
        samples: int = 1,
    ) -> Iterator[Event]:
        """Yields one Event per token and row, rows in order within a step. Answer j to prompt i is row i·samples + j.

        prompts: token ids, each of at least one token and below the context. params: one for all, or one per prompt.
        """
        for _, event in self._run(prompts, params, samples):
            yield event

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] = DEFAULT,
        samples: int = 1,
    ) -> list[list[Completion]]:
        """The same without streaming: for every prompt, its answers."""
        done: dict[int, Completion] = {}
        with torch.no_grad():
            for row, event in self._run(prompts, params, samples):
                if event.finish:
                    done[row.index] = row.completion()
        return [[done[i * samples + j] for j in range(samples)] for i in range(len(prompts))]

    def _run(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams], samples: int
    ) -> Iterator[tuple[Row, Event]]:
        if not prompts:
            return
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        self._check(prompts, each, samples)
        owners = [i for i in range(len(prompts)) for _ in range(samples)]
        cache, hidden = self.prefill(prompts)
        cache, logits = cache.expand(samples), self.model.logits(hidden).repeat_interleave(samples, 0)
        rows = [
            Row(index, len(prompts[i]), each[i], self.tokenizer, self.tool, self.context)
            for index, i in enumerate(owners)
        ]
        sampler = BatchSampler(
            [each[i] for i in owners],
            [row_seed(each[i].seed, index % samples) for index, i in enumerate(owners)],
            [prompts[i] for i in owners],
            self.model.config.vocab_size,
            self.model.device,
        )
        while True:
            ids = self._with_forced(sampler.draw(self.model.plan, logits, cache.lengths), rows)
            for row, token in zip(rows, ids.tolist(), strict=True):  # the step's one copy to the host
                if row.finish is None:
                    yield row, row.accept(token)
            alive = [i for i, row in enumerate(rows) if row.finish is None]
            if not alive:
                return
            sampler.record(ids)
            if 2 * len(alive) <= len(rows):
                index = torch.tensor(alive, device=ids.device)
                rows, ids, cache = [rows[i] for i in alive], ids[index], cache.select(index)
                sampler.select(index)
            cache.reserve(max(row.length for row in rows))
            logits = self.model.logits(self.model.hidden(ids[:, None], cache)[:, -1])
            moves = [row.finish is None for row in rows]  # the others are carried along, but stand still: some are full
            cache.advance(ids[:, None], None if all(moves) else torch.tensor(moves, device=ids.device).long())

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[KVCache, Tensor]:
        """A cache that holds the prompts, and the final hidden state (B,C) of each one's last token."""
        device = self.model.device
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        longest = max(map(len, prompts))
        ids = torch.tensor([[*p, *[0] * (longest - len(p))] for p in prompts], device=device)
        slots = min(longest + HEADROOM, self.context)
        cache = KVCache(self.model.config, len(prompts), slots, device, self.model.dtype, self.context)
        hidden = self.model.hidden(ids, cache)
        cache.advance(ids, lengths)
        return cache, hidden[torch.arange(len(prompts), device=device), lengths - 1]

    def _with_forced(self, ids: Tensor, rows: Sequence[Row]) -> Tensor:
        """The drawn ids (B,) with those replaced that the tool forces in."""
        forced = [row.forced() if row.finish is None else None for row in rows]
        if all(token is None for token in forced):
            return ids
        tokens = torch.tensor([-1 if token is None else token for token in forced], device=ids.device)
        return torch.where(tokens >= 0, tokens, ids)

    def _check(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams], samples: int) -> None:
        if len(params) != len(prompts):
            raise UsageError(f"{len(params)} sampling settings for {len(prompts)} prompts; give one, or one per prompt")
        if samples < 1:
            raise UsageError(f"{samples} samples were asked for; ask for at least 1")
        for prompt in prompts:
            if not prompt:
                raise UsageError("a prompt has no tokens; begin it with <|bos|>")
            if len(prompt) >= self.context:
                raise UsageError(
                    f"a prompt of {len(prompt)} tokens leaves no room in a context of {self.context}; shorten it"
                )
