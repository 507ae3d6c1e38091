//! Pieces on their way to a table: packed into a key, hashed, and looked up in groups.
//!
//! A table of all words of a language does not fit a core's own caches, so a look-up waits for memory; and as word
//! lengths are random, the splitter's branches are often mispredicted, which throws away loads begun too early. So the
//! splitter runs ahead over a group of pieces, asking for each one's cache line as soon as its hash is known, and only
//! then are they looked up: by that time the lines have arrived, all waits overlapped.

use crate::split::Splitter;
use crate::vocabulary::mix;
use crate::Error;

/// Longest piece that packs into a key.
pub const MAX_KEY: usize = 15;
/// Pieces in a group: their lines and keys fit the first-level cache, and one wait is shared by all.
const GROUP: usize = 64;

/// A packed piece: its bytes, and its length in the top byte. No piece is empty, so a key of zero is free to mean "none".
pub type Key = [u64; 2];

/// A piece and, if it is short enough, its key and hash.
#[derive(Clone, Copy, Default)]
pub struct Piece {
    /// [`NO_KEY`] for a piece longer than [`MAX_KEY`].
    pub key: Key,
    pub hash: u64,
    pub start: usize,
    pub end: usize,
}

/// Stands for "no piece" and "a piece too long to pack".
pub const NO_KEY: Key = [0; 2];

/// Masks that keep the first `n` of 16 bytes.
static KEEP: [Key; 16] = {
    let mut masks = [[0; 2]; 16];
    let mut length = 0;
    while length < 16 {
        let mask = (1u128 << (8 * length)) - 1;
        masks[length] = [mask as u64, (mask >> 64) as u64];
        length += 1;
    }
    masks
};

/// Packs the piece `text[start..end]` of 1 to 15 bytes.
#[inline(always)]
pub fn pack(text: &[u8], start: usize, end: usize) -> Key {
    let length = end - start;
    debug_assert!(0 < length && length <= MAX_KEY);
    let bytes: [u8; 16] = match text.get(start..start + 16) {
        // Reads past the end of the piece, but inside the text; the mask then drops what is not ours.
        Some(bytes) => bytes.try_into().expect("16 bytes"),
        None => {
            let mut bytes = [0; 16];
            bytes[..length].copy_from_slice(&text[start..end]);
            bytes
        }
    };
    let word = u128::from_le_bytes(bytes);
    let keep = KEEP[length & 15];
    [word as u64 & keep[0], ((word >> 64) as u64 & keep[1]) | (length as u64) << 56]
}

/// The bytes of a key: the first [`length`] of these.
pub fn unpack(key: Key) -> [u8; 16] {
    (key[0] as u128 | (key[1] as u128) << 64).to_le_bytes()
}

/// Number of bytes in a key.
pub fn length(key: Key) -> usize {
    (key[1] >> 56) as usize
}

/// Hash of a key.
#[inline(always)]
pub fn hash(key: Key) -> u64 {
    mix(key[0] ^ key[1].wrapping_mul(0xF39C_C060_5CED_C835))
}

/// Asks for the cache line of `slice[index]`, if the processor can be asked.
#[inline(always)]
pub fn prefetch<T>(slice: &[T], index: usize) {
    #[cfg(target_arch = "x86_64")]
    if let Some(element) = slice.get(index) {
        use std::arch::x86_64::{_mm_prefetch, _MM_HINT_T0};
        // SAFETY: a prefetch has no effect on memory, and the address is that of a live reference; SSE is part of x86_64.
        unsafe { _mm_prefetch::<_MM_HINT_T0>((element as *const T).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (slice, index);
}

/// Splits `text` and hands its pieces on in groups. `state` is lent to `ask`, called with each hash as soon as it is
/// known (a chance to prefetch), and to `take`, called with each group.
#[inline(always)]
pub fn for_each_group<S>(
    splitter: &Splitter,
    text: &str,
    state: &mut S,
    ask: impl Fn(&S, u64),
    mut take: impl FnMut(&mut S, &[Piece]),
) -> Result<(), Error> {
    let bytes = text.as_bytes();
    let (mut group, mut count) = ([Piece::default(); GROUP], 0);
    splitter.for_each(text, |start, end| {
        let piece = &mut group[count];
        (piece.start, piece.end) = (start, end);
        if end - start <= MAX_KEY {
            piece.key = pack(bytes, start, end);
            piece.hash = hash(piece.key);
            ask(state, piece.hash);
        } else {
            piece.key = NO_KEY;
        }
        count += 1;
        if count == GROUP {
            take(state, &group);
            count = 0;
        }
    })?;
    take(state, &group[..count]);
    Ok(())
}
