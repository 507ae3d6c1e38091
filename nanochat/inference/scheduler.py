"""Which tokens of which sequences the next step computes. Plain Python, no tensors: tested without a model.

    waiting, by (priority, arrival) ──admit──→ running ──last token──→ finished
                                     ←─preempt──

A step has room for `max_step_tokens`. Sequences that wait for one token (decode) get theirs first; what is left goes to
prompts, in chunks, the oldest first; then new sequences are admitted, in order and without overtaking.

When blocks run out, the youngest running sequence gives all of its back and waits for its turn again, keeping the
tokens it has: they are computed again, or found again. The oldest sequence is never the victim and every admitted
request fits in the pool alone (`limit`), so something always moves on: no deadlock, and no starvation within a
priority, for the order of arrival never changes. A sequence is admitted only if its text, and what the running ones
already owe, fit in the free blocks.
"""

import heapq
import itertools
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field

from nanochat.inference.blocks import Blocks, Holding
from nanochat.inference.paged_cache import FULL, WINDOW, blocks_per_sequence

CHUNK_MULTIPLE = 64  # chunks that do not finish a prompt end at its multiples: equal cuts, equal rounding


@dataclass(eq=False)
class Sequence:
    """A text that grows: prompt and answer. tokens[:computed] are in the cache."""

    tokens: list[int]
    priority: int
    arrival: int
    computed: int = 0
    drafts: list[int] = field(default_factory=list)
    """Guesses at the next tokens, to be checked in the next step."""
    held: Holding | None = None
    finished: bool = False
    adopted: int = 0
    """Tokens that were found in the cache instead of being computed."""

    @property
    def rank(self) -> tuple[int, int]:
        return self.priority, self.arrival

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.computed


@dataclass(frozen=True)
class Work:
    """A step's part of one sequence: positions start … start + count − 1, the last `drafts` of them guesses."""

    sequence: Sequence
    start: int
    count: int
    drafts: int

    @property
    def finishes(self) -> bool:
        """Does it compute all the tokens there are, so that another is to be drawn?"""
        return self.start + self.count - self.drafts == len(self.sequence.tokens)


class Scheduler:
    """Decides over `blocks`. A priority is served before all higher numbers."""

    def __init__(self, blocks: Blocks, max_batch: int, max_step_tokens: int) -> None:
        self.blocks, self.max_batch, self.max_step_tokens = blocks, max_batch, max_step_tokens
        self.window_limit = blocks_per_sequence(blocks.window, blocks.context, blocks.block_size, max_step_tokens)[
            WINDOW
        ]  # blocks of the windowed group that a sequence holds at most
        self.running: list[Sequence] = []  # in order of rank
        self._waiting: list[tuple[tuple[int, int], Sequence]] = []
        self._arrivals = itertools.count()
        self._gone = 0  # cancelled ones still in the heap
        self.preemptions = 0

    @property
    def waiting(self) -> int:
        return len(self._waiting) - self._gone

    def refusal(self, length: int) -> str | None:
        """Why a sequence of at most `length` tokens can never run, or None."""
        blocks = self.blocks
        if length > blocks.context:
            return f"{length} tokens do not fit in a context of {blocks.context}"
        need = blocks_per_sequence(blocks.window, length, blocks.block_size, self.max_step_tokens)
        for group, name in ((FULL, "full"), (WINDOW, "windowed")):
            if need[group] > blocks.sizes[group] and (group == FULL or blocks.windowed):
                return f"{length} tokens need {need[group]} blocks of the {name} cache, which has {blocks.sizes[group]}"
        return None

    def add(self, tokens: Tokens[int], priority: int = 0) -> Sequence:
        sequence = Sequence(list(tokens), priority, next(self._arrivals))
        heapq.heappush(self._waiting, (sequence.rank, sequence))
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, finished or cancelled, and gives its blocks back."""
        if sequence.finished:
            return
        sequence.finished = True
        if sequence.held is None:
            self._gone += 1
            return
        self.running.remove(sequence)
        self._give_back(sequence)

    def schedule(self) -> list[Work]:
        """The next step, empty when there is nothing to do. The caller computes all of it, then calls `done`."""
        decodes = [s for s in self.running if s.pending == 1]
        spare = self.max_step_tokens - len(decodes)
        works: dict[Sequence, Work] = {}
        for sequence in decodes:
            if sequence.held is None:  # preempted by an older one just now
                continue
            drafts = min(len(sequence.drafts), spare)
            if self._make_room(sequence, 1 + drafts, works):
                works[sequence] = Work(sequence, sequence.computed, 1 + drafts, drafts)
                spare -= drafts
        preempted = self.preemptions
        for sequence in [s for s in self.running if s.pending > 1]:
            if spare < 1 or sequence.held is None:
                continue
            count = self._chunk(sequence, spare)
            if count and self._make_room(sequence, count, works):
                works[sequence] = Work(sequence, sequence.computed, count, 0)
                spare -= count
        spare = max(0, spare) if preempted == self.preemptions else 0
        for work in works.values():
            self._name(work)
        while spare > 0 and len(self.running) < self.max_batch:
            admitted = self._admit(spare)
            if admitted is None:
                break
            works[admitted.sequence] = admitted
            spare -= admitted.count
        return list(works.values())

    def done(self, work: Work, accepted: int = 0) -> None:
        """A step has computed this; `accepted` of its drafts turned out right."""
        work.sequence.computed = work.start + work.count - work.drafts + accepted
        work.sequence.drafts = []

    def _chunk(self, sequence: Sequence, room: int) -> int:
        """How many tokens of a prompt to compute next, after adopting what others have named."""
        held = sequence.held
        if held is None:
            raise AssertionError("a sequence that holds nothing was scheduled")
        before = sequence.computed
        sequence.computed = self.blocks.adopt(held, sequence.tokens, before)
        sequence.adopted += sequence.computed - before
        if sequence.pending <= room:
            return sequence.pending
        end = (sequence.computed + room) // CHUNK_MULTIPLE * CHUNK_MULTIPLE
        return end - sequence.computed if end > sequence.computed else room

    def _make_room(self, sequence: Sequence, count: int, works: dict[Sequence, Work]) -> bool:
        """Gets the blocks for `count` more tokens, from younger sequences if need be. False: it is the youngest."""
        while sequence.held is not None:
            if self.blocks.grow(sequence.held, sequence.computed, sequence.computed + count):
                return True
            victim = self.running[-1]
            works.pop(victim, None)
            self._preempt(victim)
        return False

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._give_back(sequence)
        sequence.computed, sequence.drafts = 0, []
        heapq.heappush(self._waiting, (sequence.rank, sequence))
        self.preemptions += 1

    def _admit(self, room: int) -> Work | None:
        while self._waiting and self._waiting[0][1].finished:
            heapq.heappop(self._waiting)
            self._gone -= 1
        if not self._waiting:
            return None
        sequence = self._waiting[0][1]
        sequence.held = self.blocks.open()
        before = sequence.adopted
        count = self._chunk(sequence, room)
        # With company, everyone is also left a block to grow into: who is admitted should not be preempted at once.
        more = self.blocks.block_size if self.running else 1
        owed = [sum(debts) for debts in zip(*(self._debt(s, more) for s in (*self.running, sequence)), strict=True)]
        fits = all(debt <= len(pool.free) for debt, pool in zip(owed, self.blocks.pools, strict=True))
        if not (fits and self.blocks.grow(sequence.held, sequence.computed, sequence.computed + count)):
            self._give_back(sequence)
            sequence.computed, sequence.adopted = 0, before
            return None
        heapq.heappop(self._waiting)
        self.running.append(sequence)
        self.running.sort(key=lambda s: s.rank)
        work = Work(sequence, sequence.computed, count, 0)
        self._name(work)
        return work

    def _debt(self, sequence: Sequence, more: int) -> tuple[int, int]:
        """Blocks of each group that the tokens a sequence has, and so many more, still need."""
        held = sequence.held
        if held is None:
            return 0, 0
        missing = self.blocks.missing(held, len(sequence.tokens) + more)
        return missing, min(missing, self.window_limit - (held.blocks - held.hidden)) if self.blocks.windowed else 0

    def _name(self, work: Work) -> None:
        if work.sequence.held is not None:
            self.blocks.name(work.sequence.held, work.sequence.tokens, work.start + work.count - work.drafts)

    def _give_back(self, sequence: Sequence) -> None:
        if sequence.held is not None:
            self.blocks.close(sequence.held)
            sequence.held = None
