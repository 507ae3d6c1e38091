//! A word cache of fixed size: text repeats its words, so most pieces need no joining at all.
//!
//! A piece that packs into a 128-bit key (up to 15 bytes) and has at most three tokens is an entry of 32 bytes; two fill
//! a cache line, and a look-up touches one line. The two are the places where a word may stand; a new word takes the
//! first and moves its holder to the second. Nothing ever grows: an unlimited cache once filled a terabyte of memory.

use crate::piece::{prefetch, Key};

/// Most tokens that an entry holds.
pub const MAX_IDS: usize = 3;
/// Entries, a power of two: 8 MiB a thread.
const SIZE: usize = 1 << 18;

/// Tokens of one piece.
#[derive(Clone, Copy, Default)]
#[repr(align(32))]
pub struct Entry {
    key: Key,
    pub ids: [u32; MAX_IDS],
    pub count: u32,
}

/// One thread's cache.
pub struct WordCache {
    entries: Box<[Entry; SIZE]>,
}

impl WordCache {
    pub fn new() -> Self {
        let entries = vec![Entry::default(); SIZE].into_boxed_slice();
        Self { entries: entries.try_into().unwrap_or_else(|_| unreachable!("made with this size")) }
    }

    #[inline(always)]
    fn slot(hash: u64) -> usize {
        hash as usize % SIZE
    }

    /// Begins to load what [`WordCache::get`] will look at.
    #[inline(always)]
    pub fn prefetch(&self, hash: u64) {
        prefetch(&self.entries[..], Self::slot(hash));
    }

    /// The tokens of the piece with this key, if it was seen lately.
    #[inline(always)]
    pub fn get(&self, key: Key, hash: u64) -> Option<&Entry> {
        let slot = Self::slot(hash);
        let first = &self.entries[slot];
        if first.key == key {
            return Some(first);
        }
        let second = &self.entries[slot ^ 1];
        (second.key == key).then_some(second)
    }

    /// Remembers the tokens of a piece, unless they are too many.
    pub fn insert(&mut self, key: Key, hash: u64, tokens: &[u32]) {
        if tokens.len() > MAX_IDS {
            return;
        }
        let slot = Self::slot(hash);
        self.entries[slot ^ 1] = self.entries[slot];
        let mut ids = [0; MAX_IDS];
        ids[..tokens.len()].copy_from_slice(tokens);
        self.entries[slot] = Entry { key, ids, count: tokens.len() as u32 };
    }
}

impl Default for WordCache {
    fn default() -> Self {
        Self::new()
    }
}
