//! The vocabulary: what bytes each token stands for, and which pairs of tokens join into another.
//!
//! The rule of encoding (tiktoken's) knows no merge list: two neighbors may join whenever their joined bytes are a
//! token, and its rank is its id. So the pair table lists, for every token, *every* cut into two tokens, not just the
//! cut that training made.

use crate::merge::merge_piece;
use crate::{invalid, Error};
use std::collections::HashMap;

/// "These two do not join": above every rank.
pub const NO_RANK: u32 = u32::MAX;
/// Ids fit 21 bits, so that a whole pair-table entry (left, right, joined) fits one 64-bit word.
pub const MAX_ID: u32 = (1 << 21) - 2;
const ID_BITS: u32 = 21;
const EMPTY: u64 = u64::MAX;

/// A fast multiplicative hash for short keys; attackers do not choose our vocabulary.
#[derive(Default, Clone, Copy)]
pub struct FastHash(u64);

impl std::hash::Hasher for FastHash {
    #[inline]
    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.write_u64(u64::from_le_bytes(word));
        }
    }
    #[inline]
    fn write_u8(&mut self, value: u8) {
        self.write_u64(value as u64);
    }
    #[inline]
    fn write_u64(&mut self, value: u64) {
        self.0 = mix(self.0.rotate_left(5) ^ value);
    }
    #[inline]
    fn write_usize(&mut self, value: usize) {
        self.write_u64(value as u64);
    }
    #[inline]
    fn finish(&self) -> u64 {
        self.0
    }
}

/// Folds a 64×64-bit product: every input bit reaches high and low output bits.
#[inline(always)]
pub fn mix(value: u64) -> u64 {
    let product = value as u128 * 0x9E37_79B9_7F4A_7C15;
    (product >> 64) as u64 ^ product as u64
}

/// `HashMap` with [`FastHash`].
pub type FastMap<K, V> = HashMap<K, V, std::hash::BuildHasherDefault<FastHash>>;

/// Open-addressing table from (left, right) to the joined token; 8 bytes an entry, at most half full.
#[derive(Clone)]
struct PairTable {
    slots: Vec<u64>,
    shift: u32,
}

impl PairTable {
    fn new(pairs: &[(u32, u32, u32)]) -> Self {
        let size = (pairs.len() * 2).next_power_of_two().max(16);
        let mut table = Self { slots: vec![EMPTY; size], shift: 64 - size.trailing_zeros() };
        for &(left, right, joined) in pairs {
            let key = pair_key(left, right);
            let mut slot = table.home(key);
            while table.slots[slot] != EMPTY {
                slot = (slot + 1) & (size - 1);
            }
            table.slots[slot] = key << ID_BITS | joined as u64;
        }
        table
    }

    #[inline(always)]
    fn home(&self, key: u64) -> usize {
        (key.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> self.shift) as usize
    }

    #[inline(always)]
    fn get(&self, left: u32, right: u32) -> u32 {
        let key = pair_key(left, right);
        let mut slot = self.home(key);
        loop {
            let entry = self.slots[slot & (self.slots.len() - 1)];
            if entry >> ID_BITS == key {
                return (entry & ((1 << ID_BITS) - 1)) as u32;
            }
            if entry == EMPTY {
                return NO_RANK;
            }
            slot += 1;
        }
    }
}

#[inline(always)]
fn pair_key(left: u32, right: u32) -> u64 {
    (left as u64) << ID_BITS | right as u64
}

/// Ordinary tokens by id and by bytes.
#[derive(Clone)]
pub struct Vocabulary {
    /// Bytes of token `id` are `blob[starts[id]..starts[id + 1]]`; ids that no token has are empty.
    blob: Vec<u8>,
    starts: Vec<u32>,
    by_bytes: FastMap<Box<[u8]>, u32>,
    byte_ids: [u32; 256],
    pairs: PairTable,
    /// [`Vocabulary::join`] of any two bytes, without hashing: half of all look-ups.
    byte_pairs: Vec<u32>,
    joins_reach_all: bool,
}

impl Vocabulary {
    /// From (bytes, id) in any order. All 256 single bytes must be there; bytes and ids must be unique.
    pub fn new(ranks: impl IntoIterator<Item = (Vec<u8>, u32)>) -> Result<Self, Error> {
        let mut tokens: Vec<(Vec<u8>, u32)> = ranks.into_iter().collect();
        tokens.sort_unstable_by_key(|(_, id)| *id);
        let mut by_bytes = FastMap::with_capacity_and_hasher(tokens.len(), Default::default());
        let (mut blob, mut starts) = (Vec::new(), vec![0u32]);
        let mut previous = None;
        for (bytes, id) in &tokens {
            if bytes.is_empty() {
                return invalid(format!("token {id} is empty; every token needs at least one byte"));
            }
            if *id > MAX_ID {
                return invalid(format!("token id {id} is above the largest supported, {MAX_ID}"));
            }
            if previous == Some(*id) {
                return invalid(format!("two tokens have the id {id}"));
            }
            if let Some(other) = by_bytes.insert(bytes.clone().into_boxed_slice(), *id) {
                return invalid(format!("tokens {other} and {id} have the same bytes"));
            }
            starts.resize(*id as usize + 1, blob.len() as u32);
            blob.extend_from_slice(bytes);
            starts.push(blob.len() as u32);
            previous = Some(*id);
        }
        let mut byte_ids = [0; 256];
        for byte in 0..=255u8 {
            match by_bytes.get(&[byte][..]) {
                Some(id) => byte_ids[byte as usize] = *id,
                None => return invalid(format!("the byte 0x{byte:02X} is no token; all 256 single bytes must be")),
            }
        }
        let mut pairs = Vec::new();
        for (bytes, id) in &tokens {
            for cut in 1..bytes.len() {
                if let (Some(left), Some(right)) = (by_bytes.get(&bytes[..cut]), by_bytes.get(&bytes[cut..])) {
                    pairs.push((*left, *right, *id));
                }
            }
        }
        let pairs = PairTable::new(&pairs);
        let every_two = (0..1 << 16).map(|two: usize| pairs.get(byte_ids[two >> 8], byte_ids[two & 255]));
        let byte_pairs = every_two.collect();
        let mut made = Self { blob, starts, by_bytes, byte_ids, pairs, byte_pairs, joins_reach_all: false };
        let reached = made.tokens().filter(|(_, bytes)| bytes.len() <= 16).all(|(id, bytes)| {
            let mut whole = false;
            merge_piece(&made, bytes, NO_RANK, |part| whole = part == id);
            whole
        });
        made.joins_reach_all = reached;
        Ok(made)
    }

    /// From the merges of training: ids 0 to 255 are the bytes, merge `k` makes id 256 + k.
    pub fn from_merges(merges: &[(u32, u32)]) -> Result<Self, Error> {
        let mut tokens: Vec<Vec<u8>> = (0..=255u8).map(|byte| vec![byte]).collect();
        for &(left, right) in merges {
            let joined = [&tokens[left as usize][..], &tokens[right as usize][..]].concat();
            tokens.push(joined);
        }
        Self::new(tokens.into_iter().zip(0..))
    }

    /// Number of ordinary tokens.
    pub fn len(&self) -> usize {
        self.by_bytes.len()
    }

    /// Never: the 256 bytes are always there.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// One above the largest id.
    pub fn id_limit(&self) -> u32 {
        self.starts.len() as u32 - 1
    }

    /// Bytes of a token, `None` when no ordinary token has this id.
    #[inline]
    pub fn bytes(&self, id: u32) -> Option<&[u8]> {
        let (start, end) = (*self.starts.get(id as usize)?, *self.starts.get(id as usize + 1)?);
        (end > start).then(|| &self.blob[start as usize..end as usize])
    }

    /// The token with exactly these bytes.
    #[inline]
    pub fn id(&self, bytes: &[u8]) -> Option<u32> {
        self.by_bytes.get(bytes).copied()
    }

    /// The token of a single byte.
    #[inline(always)]
    pub fn byte_id(&self, byte: u8) -> u32 {
        self.byte_ids[byte as usize]
    }

    /// The token that two neighbors join into, or [`NO_RANK`].
    #[inline(always)]
    pub fn join(&self, left: u32, right: u32) -> u32 {
        self.pairs.get(left, right)
    }

    /// The token that two neighboring bytes join into, or [`NO_RANK`].
    #[inline(always)]
    pub fn join_bytes(&self, left: u8, right: u8) -> u32 {
        self.byte_pairs[(left as usize) << 8 | right as usize]
    }

    /// Whether joining the bytes of any token of at most 16 bytes gives that token: so it is after training.
    #[inline(always)]
    pub fn joins_reach_all(&self) -> bool {
        self.joins_reach_all
    }

    /// All tokens in order of id.
    pub fn tokens(&self) -> impl Iterator<Item = (u32, &[u8])> {
        (0..self.id_limit()).filter_map(|id| self.bytes(id).map(|bytes| (id, bytes)))
    }
}
