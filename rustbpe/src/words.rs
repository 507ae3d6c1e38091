//! Counting the distinct pieces of a corpus: all that training needs to know about the text.
//!
//! Memory follows the number of *distinct* pieces, not the length of the text. Pieces up to 15 bytes, nearly all, are
//! 24-byte entries of an open-addressing table; the rest go to an ordinary map. Counts are 64-bit. Threads count into
//! tables of their own, merged at the end: a sum does not depend on who added first, so neither do the merges.

use crate::piece::{self, hash, pack, prefetch, Key, MAX_KEY, NO_KEY};
use crate::split::Splitter;
use crate::vocabulary::FastMap;
use crate::Error;

#[derive(Clone, Copy, Default)]
struct Slot {
    /// Packed piece; all zero when free.
    key: Key,
    count: u64,
}

/// How often each piece occurs.
#[derive(Clone)]
pub struct WordCounts {
    slots: Vec<Slot>,
    used: usize,
    long: FastMap<Box<[u8]>, u64>,
}

impl Default for WordCounts {
    fn default() -> Self {
        Self::new()
    }
}

impl WordCounts {
    pub fn new() -> Self {
        Self { slots: vec![Slot::default(); 1 << 12], used: 0, long: FastMap::default() }
    }

    /// Number of distinct pieces.
    pub fn len(&self) -> usize {
        self.used + self.long.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number of pieces.
    pub fn total(&self) -> u64 {
        self.slots.iter().map(|slot| slot.count).sum::<u64>() + self.long.values().sum::<u64>()
    }

    /// Counts the pieces of one text.
    pub fn add_text(&mut self, splitter: &Splitter, text: &str) -> Result<(), Error> {
        let bytes = text.as_bytes();
        piece::for_each_group(
            splitter,
            text,
            self,
            |counts, hash| prefetch(&counts.slots, hash as usize & (counts.slots.len() - 1)),
            |counts, group| {
                for piece in group {
                    match piece.key {
                        NO_KEY => counts.add_long(&bytes[piece.start..piece.end], 1),
                        key => counts.add_key(key, piece.hash, 1),
                    }
                }
            },
        )
    }

    /// Adds `count` occurrences of `piece`.
    pub fn add(&mut self, piece: &[u8], count: u64) {
        match piece.len() {
            _ if count == 0 => {}
            0 => {}
            1..=MAX_KEY => {
                let key = pack(piece, 0, piece.len());
                self.add_key(key, hash(key), count);
            }
            _ => self.add_long(piece, count),
        }
    }

    #[inline(always)]
    fn add_key(&mut self, key: Key, hash: u64, count: u64) {
        let mask = self.slots.len() - 1;
        let mut at = hash as usize & mask;
        loop {
            let slot = &mut self.slots[at & mask];
            if slot.key == key {
                slot.count += count;
                return;
            }
            if slot.key == NO_KEY {
                *slot = Slot { key, count };
                break;
            }
            at += 1;
        }
        self.used += 1;
        if self.used * 4 > self.slots.len() * 3 {
            self.grow();
        }
    }

    #[cold]
    fn grow(&mut self) {
        let size = self.slots.len() * 2;
        let old = std::mem::replace(&mut self.slots, vec![Slot::default(); size]);
        for slot in old.into_iter().filter(|slot| slot.key != NO_KEY) {
            let mut at = hash(slot.key) as usize & (size - 1);
            while self.slots[at].key != NO_KEY {
                at = (at + 1) & (size - 1);
            }
            self.slots[at] = slot;
        }
    }

    fn add_long(&mut self, piece: &[u8], count: u64) {
        match self.long.get_mut(piece) {
            Some(sum) => *sum += count,
            None => {
                self.long.insert(piece.into(), count);
            }
        }
    }

    /// Adds everything that `other` counted.
    pub fn merge(&mut self, other: Self) {
        if other.len() > self.len() {
            let smaller = std::mem::replace(self, other);
            return self.merge(smaller);
        }
        for slot in other.slots.into_iter().filter(|slot| slot.key != NO_KEY) {
            self.add_key(slot.key, hash(slot.key), slot.count);
        }
        for (piece, count) in other.long {
            self.add_long(&piece, count);
        }
    }

    /// Calls `visit(piece, count)` for every distinct piece, in no particular order.
    pub fn for_each(&self, mut visit: impl FnMut(&[u8], u64)) {
        for slot in self.slots.iter().filter(|slot| slot.key != NO_KEY) {
            visit(&piece::unpack(slot.key)[..piece::length(slot.key)], slot.count);
        }
        for (piece, count) in &self.long {
            visit(piece, *count);
        }
    }
}
