//! A word cache of fixed size: text repeats its words, so most pieces need no joining at all.
//!
//! Pieces up to 15 bytes pack into one 128-bit key (the bytes, and the length on top); their tokens, if at most three,
//! sit beside it, so an entry is 32 bytes, two of them fill a cache line, and a look-up touches one line. The two are
//! the places where a word may stand; a new word takes the first and moves its holder to the second. Nothing ever
//! grows: an unlimited cache once filled a terabyte of memory.

use crate::vocabulary::mix;

/// Longest piece that packs into a key.
pub const MAX_KEY: usize = 15;
/// Most tokens that an entry holds.
pub const MAX_IDS: usize = 3;
/// Entries, a power of two: 4 MiB a thread.
const SIZE: usize = 1 << 17;

/// Tokens of one piece; the key 0 is free, as no piece is empty.
#[derive(Clone, Copy, Default)]
#[repr(align(32))]
pub struct Entry {
    key: [u64; 2],
    pub ids: [u32; MAX_IDS],
    pub count: u32,
}

/// One thread's cache.
pub struct WordCache {
    entries: Vec<Entry>,
}

/// Packs the piece `text[start..end]` of 1 to 15 bytes into a key.
#[inline(always)]
pub fn pack(text: &[u8], start: usize, end: usize) -> [u64; 2] {
    let length = end - start;
    debug_assert!(0 < length && length <= MAX_KEY);
    let word = match text.get(start..start + 16) {
        // One load past the end of the piece, but inside the text; then drop what is not ours.
        Some(bytes) => {
            let word = u128::from_le_bytes(bytes.try_into().expect("16 bytes"));
            word & ((1u128 << (8 * length)) - 1)
        }
        None => {
            let mut bytes = [0; 16];
            bytes[..length].copy_from_slice(&text[start..end]);
            u128::from_le_bytes(bytes)
        }
    };
    let word = word | (length as u128) << 120;
    [word as u64, (word >> 64) as u64]
}

/// Hash of a packed key.
#[inline(always)]
pub fn hash(key: [u64; 2]) -> u64 {
    mix(key[0] ^ key[1].wrapping_mul(0xF39C_C060_5CED_C835))
}

impl WordCache {
    pub fn new() -> Self {
        Self { entries: vec![Entry::default(); SIZE] }
    }

    #[inline(always)]
    fn slot(key: [u64; 2]) -> usize {
        hash(key) as usize & (SIZE - 1)
    }

    /// The tokens of the piece with this key, if it was seen lately.
    #[inline(always)]
    pub fn get(&self, key: [u64; 2]) -> Option<&Entry> {
        let slot = Self::slot(key);
        let first = &self.entries[slot];
        if first.key == key {
            return Some(first);
        }
        let second = &self.entries[slot ^ 1];
        (second.key == key).then_some(second)
    }

    /// Remembers the tokens of a piece, unless they are too many.
    pub fn insert(&mut self, key: [u64; 2], tokens: &[u32]) {
        if tokens.len() > MAX_IDS {
            return;
        }
        let slot = Self::slot(key);
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
