"""Who owns which block of the paged cache: counts of owners, shared prefixes, and what may be given back. Plain Python.

A full block has a name, (name of the block before it, its tokens). Names are keys of a dictionary, so the tokens are
compared themselves, never only their hash. A sequence that begins like an earlier one holds the same blocks and
computes the rest.

Blocks without owners wait in a queue in the order in which they were given back. New blocks come from its front: those
whose content has no name first, then what was used longest ago. Owners give back from the end of a text to its
beginning, so a name's block leaves after those that continue it.

Naming happens when a block's tokens are scheduled, before they are computed: a step writes all new keys and values of
a layer before it reads any, so sequences that begin together in one step already share.
"""

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from nanochat.inference.paged_cache import FULL, WINDOW

ROOT = 0  # the name of nothing: what stands before the first block


@dataclass(eq=False)
class Entry:
    """A named block: its key, its own name, and its block in each group, None where that holds something else now."""

    key: tuple[int, tuple[int, ...]]
    name: int
    blocks: list[int | None]


class Pool:
    """The blocks of one group. A block is owned (owners[b] ≥ 1) or in `free`; `entries` knows what it holds."""

    def __init__(self, blocks: int) -> None:
        self.owners = [0] * blocks
        self.free: OrderedDict[int, None] = OrderedDict.fromkeys(range(blocks))
        self.entries: dict[int, Entry] = {}

    @property
    def used(self) -> int:
        return len(self.owners) - len(self.free)

    def take(self) -> tuple[int, Entry | None]:
        """A free block, now owned once, and the entry it held until now."""
        block, _ = self.free.popitem(last=False)
        self.owners[block] = 1
        return block, self.entries.pop(block, None)

    def retain(self, block: int) -> None:
        if not self.owners[block]:
            del self.free[block]
        self.owners[block] += 1

    def release(self, block: int) -> None:
        if self.owners[block] < 1:
            raise AssertionError(f"block {block} was given back by someone who did not own it")
        self.owners[block] -= 1
        if not self.owners[block]:
            self.free[block] = None
            if block not in self.entries:
                self.free.move_to_end(block, last=False)


@dataclass(eq=False)
class Holding:
    """The blocks of one sequence, −1 where there is none."""

    tables: tuple[array, array]
    blocks: int = 0
    """Entries of the tables that are in use, from the front; those of the windowed group before `hidden` are −1."""
    hidden: int = 0
    named: int = 0
    """How many of the blocks have been given a name."""
    name: int = ROOT
    """The name of the last of them."""


@dataclass
class Blocks:
    """Both groups. sizes: blocks of (full, window); a windowed group of 0 blocks means that no layer is windowed.

    context: most tokens of a sequence. window: what a windowed layer sees before a query's own position.
    """

    sizes: tuple[int, int]
    block_size: int
    window: int
    context: int
    sharing: bool = True
    pools: tuple[Pool, Pool] = field(init=False)
    found: dict[tuple[int, tuple[int, ...]], Entry] = field(init=False, default_factory=dict)
    _names: int = ROOT

    def __post_init__(self) -> None:
        self.pools = Pool(self.sizes[FULL]), Pool(self.sizes[WINDOW])

    @property
    def windowed(self) -> bool:
        return self.sizes[WINDOW] > 0

    def open(self) -> Holding:
        """A new sequence, which holds nothing yet."""
        width = -(-self.context // self.block_size)
        return Holding((array("i", [-1]) * width, array("i", [-1]) * width))

    def adopt(self, held: Holding, tokens: Sequence[int], computed: int) -> int:
        """Takes over the blocks that others have named for the text of `held`; returns how many tokens are there now.

        All `computed` tokens of `held` must fill whole blocks, or nothing is done. At least the last token is left.
        """
        size = self.block_size
        if not self.sharing or computed % size or not held.named == held.blocks == computed // size:
            return computed
        first, name = held.named, held.name
        entries: list[Entry] = []
        run, good = first - held.hidden, 0  # run: blocks of the windowed group without a gap up to here
        while (first + len(entries) + 1) * size < len(tokens):
            at = (first + len(entries)) * size
            entry = self.found.get((name, tuple(tokens[at : at + size])))
            if entry is None:
                break
            entries.append(entry)
            name, blocks = entry.name, first + len(entries)
            run = run + 1 if entry.blocks[WINDOW] is not None else 0
            if not self.windowed or run >= blocks - self.first_visible(blocks * size):
                good = len(entries)
        if not good:
            return computed
        blocks = first + good
        visible = self.first_visible(blocks * size)
        for j, entry in enumerate(entries[:good], first):
            self._put(held, FULL, j, entry.blocks[FULL])
            if self.windowed and j >= visible:
                self._put(held, WINDOW, j, entry.blocks[WINDOW])
        held.blocks = held.named = blocks
        held.name = entries[good - 1].name
        self._hide(held, visible)
        return blocks * size

    def first_visible(self, computed: int) -> int:
        """The first block of the windowed group that a query at position `computed` or later can see."""
        return max(0, computed - self.window) // self.block_size

    def missing(self, held: Holding, length: int) -> int:
        """Blocks of each group that are needed for `held` to grow to `length` tokens (give-backs not counted)."""
        return max(0, -(-length // self.block_size) - held.blocks)

    def grow(self, held: Holding, computed: int, length: int) -> bool:
        """Gives back what no query from `computed` on sees and takes blocks for `length` tokens; False if too few are
        free, and then takes none."""
        if self.windowed:
            self._hide(held, min(self.first_visible(computed), held.blocks))
        missing = self.missing(held, length)
        if missing > len(self.pools[FULL].free) or (self.windowed and missing > len(self.pools[WINDOW].free)):
            return False
        for j in range(held.blocks, held.blocks + missing):
            held.tables[FULL][j] = self._take(FULL)
            if self.windowed:
                held.tables[WINDOW][j] = self._take(WINDOW)
        held.blocks += missing
        return True

    def name(self, held: Holding, tokens: Sequence[int], length: int) -> None:
        """Names the blocks that are full of the first `length` tokens. The caller computes them within this step."""
        if not self.sharing:
            return
        size = self.block_size
        for j in range(held.named, length // size):
            key = (held.name, tuple(tokens[j * size : (j + 1) * size]))
            entry = self.found.get(key)
            if entry is None:
                self._names += 1
                entry = self.found[key] = Entry(key, self._names, [held.tables[FULL][j], None])
                self.pools[FULL].entries[held.tables[FULL][j]] = entry
            if entry.blocks[WINDOW] is None and held.tables[WINDOW][j] >= 0:
                entry.blocks[WINDOW] = held.tables[WINDOW][j]
                self.pools[WINDOW].entries[held.tables[WINDOW][j]] = entry
            held.named, held.name = j + 1, entry.name

    def close(self, held: Holding) -> None:
        """Gives everything back; what is named can still be found until its block is taken."""
        for group, table in enumerate(held.tables):
            for j in range(held.blocks - 1, -1, -1):
                if table[j] >= 0:
                    self.pools[group].release(table[j])
                    table[j] = -1
        held.blocks = held.hidden = held.named = 0
        held.name = ROOT

    def forget(self) -> None:
        """Drops all names: for when the weights have changed, or a step failed after naming what it did not compute."""
        self.found.clear()
        for pool in self.pools:
            pool.entries.clear()

    def _put(self, held: Holding, group: int, j: int, block: int | None) -> None:
        if block is None:
            raise AssertionError("a block was adopted that nobody holds")
        self.pools[group].retain(block)
        held.tables[group][j] = block

    def _take(self, group: int) -> int:
        block, entry = self.pools[group].take()
        if entry is not None:
            entry.blocks[group] = None
            if group == FULL:  # without it, the text cannot be continued: nobody finds it any more
                del self.found[entry.key]
                other = entry.blocks[WINDOW]
                if other is not None:
                    del self.pools[WINDOW].entries[other]
        return block

    def _hide(self, held: Holding, visible: int) -> None:
        """Gives back the windowed group's blocks before `visible`."""
        for j in range(min(visible, held.blocks) - 1, held.hidden - 1, -1):
            if held.tables[WINDOW][j] >= 0:
                self.pools[WINDOW].release(held.tables[WINDOW][j])
                held.tables[WINDOW][j] = -1
        held.hidden = max(held.hidden, visible)
