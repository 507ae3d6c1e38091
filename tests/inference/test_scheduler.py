"""The scheduler and the block pool without a model: random traffic against what must always hold.

A dictionary stands for the cache's memory: each slot remembers the whole text up to the token written there. So after
every step it can be checked that each query would have read exactly its own text, whoever computed it.
"""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.inference.blocks import Blocks
from nanochat.inference.paged_cache import FULL, WINDOW, blocks_per_sequence
from nanochat.inference.scheduler import Scheduler, Sequence, Work

CONTEXT = 40


class World:
    """Runs a scheduler on texts over a small alphabet, which often share beginnings."""

    def __init__(self, block_size=4, window=9, full=14, windowed=12, max_batch=4, step=8, sharing=True, seed=0) -> None:
        self.blocks = Blocks((full, windowed), block_size, window, CONTEXT, sharing)
        self.scheduler = Scheduler(self.blocks, max_batch, step)
        self.random = random.Random(seed)
        self.memory: list[dict[int, tuple[int, ...]]] = [{}, {}]
        self.limits: dict[Sequence, int] = {}
        self.finished: list[Sequence] = []
        self.step_size = step

    def add(self, length: int, more: int, priority: int = 0) -> Sequence | None:
        length, more = min(length, CONTEXT - 1), max(1, min(more, CONTEXT - length))
        if self.scheduler.refusal(length + more):
            return None
        sequence = self.scheduler.add([self.random.randrange(2) * (i % 3) for i in range(length)], priority)
        self.limits[sequence] = length + more
        return sequence

    def cancel(self, number: int) -> None:
        alive = [s for s in self.limits if not s.finished]
        if alive:
            self.scheduler.remove(alive[number % len(alive)])
            self.check_owners()

    def step(self) -> list[Work]:
        for sequence in self.scheduler.running:
            room = self.limits[sequence] - len(sequence.tokens) - 1
            if sequence.pending == 1 and self.random.random() < 0.3:
                sequence.drafts = [self.random.randrange(2) for _ in range(min(room, 3))]
        works = self.scheduler.schedule()
        assert sum(work.count for work in works) <= self.step_size
        assert len({id(work.sequence) for work in works}) == len(works) <= self.scheduler.max_batch
        for work in works:  # all writes of a step come before its reads
            self.write(work)
        for work in works:
            self.read(work)
        for work in works:
            self.advance(work)
        self.check_owners()
        return works

    def write(self, work: Work) -> None:
        text = [*work.sequence.tokens, *work.sequence.drafts]
        size = self.blocks.block_size
        for p in range(work.start, work.start + work.count):
            for group in (FULL, WINDOW) if self.blocks.windowed else (FULL,):
                block = work.sequence.held.tables[group][p // size]
                assert block >= 0
                self.memory[group][block * size + p % size] = tuple(text[: p + 1])

    def read(self, work: Work) -> None:
        text = [*work.sequence.tokens, *work.sequence.drafts]
        size = self.blocks.block_size
        for group, window in ((FULL, CONTEXT), (WINDOW, self.blocks.window)):
            if group == FULL or self.blocks.windowed:
                for p in range(max(0, work.start - window), work.start + work.count):
                    block = work.sequence.held.tables[group][p // size]
                    assert block >= 0 and self.memory[group][block * size + p % size] == tuple(text[: p + 1])

    def advance(self, work: Work) -> None:
        sequence, accepted = work.sequence, 0
        if work.finishes:
            drafts = sequence.drafts[: work.drafts]
            accepted = self.random.randint(0, work.drafts)
            sequence.tokens += [*drafts[:accepted], self.random.randrange(2)]
            room = self.limits[sequence] - len(sequence.tokens)
            if room > 2 and self.random.random() < 0.1:
                sequence.tokens += [0, 1]  # what a tool forces in
        self.scheduler.done(work, accepted)
        if len(sequence.tokens) >= self.limits[sequence]:
            self.scheduler.remove(sequence)
            self.finished.append(sequence)

    def check_owners(self) -> None:
        for group, pool in enumerate(self.blocks.pools):
            owned = Counter(b for s in self.scheduler.running for b in s.held.tables[group] if b >= 0)
            assert [owned[b] for b in range(len(pool.owners))] == pool.owners
            assert set(pool.free) == {b for b, owners in enumerate(pool.owners) if owners == 0}
        for entry in self.blocks.found.values():
            for group, block in enumerate(entry.blocks):
                assert block is None or self.blocks.pools[group].entries[block] is entry
        assert self.scheduler.running == sorted(self.scheduler.running, key=lambda s: s.rank)
        assert all(s.held is None for _, s in self.scheduler._waiting)

    def drain(self, limit: int = 5000) -> None:
        for _ in range(limit):
            if not self.scheduler.running and not self.scheduler.waiting:
                return
            assert self.step(), "sequences wait, but nothing moves"
        raise AssertionError("the work does not end")


events = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 39), st.integers(1, 39), st.integers(0, 1)),
        st.tuples(st.just("cancel"), st.integers(0, 20)),
        st.just(("step",)),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(
    events=events, block_size=st.sampled_from([1, 3, 4]), window=st.sampled_from([0, 5, 9]), full=st.integers(3, 24),
    windowed=st.integers(0, 20), max_batch=st.integers(1, 5), step=st.integers(5, 90), sharing=st.booleans(),
    seed=st.integers(0, 9),
)  # fmt: skip
def test_any_traffic_reads_only_its_own_text_and_gives_every_block_back(
    events, block_size, window, full, windowed, max_batch, step, sharing, seed
):
    world = World(block_size, window, full, windowed, max_batch, step, sharing, seed)
    for name, *arguments in events:
        getattr(world, name)(*arguments)
    world.drain()
    assert all(pool.used == 0 for pool in world.blocks.pools)
    assert all(s.finished for s in world.limits)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1000), full=st.integers(10, 20), count=st.integers(2, 12))
def test_equal_requests_of_one_priority_start_and_finish_in_order(seed, full, count):
    world = World(full=full, windowed=full, seed=seed, step=8)
    sequences = [world.add(12, 20, priority=0) for _ in range(count)]
    started: list[Sequence] = []
    while world.scheduler.running or world.scheduler.waiting:
        for sequence in world.scheduler.running:
            sequence.drafts = []
        started += [w.sequence for w in world.step() if w.sequence not in started]
    assert started == sequences, "nobody overtakes at the start"
    order = [sequences.index(s) for s in world.finished]
    assert all(at - first < world.scheduler.max_batch for first, at in enumerate(order)), "none finishes far ahead"


def test_a_constant_stream_of_newcomers_starves_nobody():
    world = World(full=10, windowed=10, max_batch=3)
    first = world.add(20, 19)
    for _ in range(400):
        world.add(20, 19)
        world.step()
        if first.finished:
            return
    raise AssertionError("the first request never ended")


def test_a_lower_number_is_served_first():
    world = World(max_batch=1)
    later, sooner = world.add(4, 2, priority=1), world.add(4, 2, priority=0)
    world.drain()
    assert world.finished == [sooner, later]


def test_preemption_keeps_the_tokens_and_the_oldest_is_never_its_victim():
    world = World(full=10, windowed=10, max_batch=4, sharing=False)
    sequences = [world.add(8, 30) for _ in range(4)]
    while not sequences[0].finished:
        held = sequences[0].computed
        world.step()
        assert sequences[0].computed >= held or sequences[0].finished
    world.drain()
    assert world.scheduler.preemptions > 0
    assert [len(s.tokens) for s in sequences] == [38] * 4


def test_samples_of_one_prompt_compute_it_once_even_in_one_step():
    world = World(full=40, windowed=40, step=64, window=9)
    prompt = [i % 3 for i in range(21)]
    sequences = [world.scheduler.add(prompt) for _ in range(4)]
    world.limits = dict.fromkeys(sequences, 30)
    works = world.step()
    assert [work.count for work in works] == [21, 1, 1, 1]
    assert [s.adopted for s in sequences] == [0, 20, 20, 20]


def test_a_second_turn_finds_the_first_although_windows_have_moved():
    world = World(full=12, windowed=12, step=64, max_batch=1)
    first = world.add(20, 10)
    world.drain()
    again = world.scheduler.add([*first.tokens, 1, 1, 1])
    world.limits[again] = 36
    work = world.step()[0]
    assert again.adopted == 28 and work.start == 28 and work.count == 5


def test_other_texts_are_not_taken_for_ours_and_names_end_with_their_blocks():
    world = World(full=6, windowed=6, step=64, max_batch=1, window=5)
    world.add(15, 2)
    world.drain()
    world.random.seed(77)
    other = world.add(19, 4)  # takes all blocks, so the first text's are used anew
    world.drain()
    assert other.adopted in (0, 4, 8) and len(world.blocks.found) <= 6


@pytest.mark.parametrize("length, told", [(41, "context of 40"), (40, "10 blocks of the full cache, which has 9")])
def test_what_can_never_run_is_refused_with_numbers(length, told):
    assert told in World(full=9, windowed=30).scheduler.refusal(length)


def test_a_windowed_group_needs_its_window_and_a_chunk():
    assert blocks_per_sequence(window=9, context=40, block_size=4, chunk=8) == (10, 6)
    assert "windowed" in World(windowed=5).scheduler.refusal(40)
    assert World(windowed=6, full=10).scheduler.refusal(40) is None


def test_giving_back_what_one_does_not_own_is_an_error():
    world = World()
    with pytest.raises(AssertionError, match="did not own"):
        world.blocks.pools[0].release(0)
