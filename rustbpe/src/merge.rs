//! Joining the bytes of one piece into tokens.
//!
//! The rule: of all adjacent pairs whose joined bytes are a token, join the one of lowest rank, the leftmost on a tie;
//! repeat until no pair joins. A piece that is itself a token is that token, whether or not joins would lead there.
//!
//! Short pieces (nearly all: an English word has five bytes) keep for each part the rank of joining it with its
//! successor, and find the lowest by looking at all of them, a few vector instructions: O(n²) in principle, but n is
//! small. Long pieces would suffer from that (a megabyte of one letter is one piece). They sort candidates into one list
//! for each rank and work through a whole list at a time, in the order of the text; only the ranks sit in a heap. Every
//! join adds at most two candidates, so this is O(n) steps and O(r log r) for the r ranks that occur.

use crate::vocabulary::{FastMap, Vocabulary, NO_RANK};
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Pieces up to this many bytes take the scanning method: their parts fit one 64-bit mask.
const SHORT: usize = 64;

/// Calls `emit` with the ids of `piece` in order.
#[inline]
pub fn encode_piece(vocabulary: &Vocabulary, piece: &[u8], mut emit: impl FnMut(u32)) {
    // When joins lead to every token, looking the piece up first only pays for long ones.
    if piece.len() > 16 || !vocabulary.joins_reach_all() {
        if let Some(id) = vocabulary.id(piece) {
            return emit(id);
        }
    }
    merge_piece(vocabulary, piece, NO_RANK, emit);
}

/// Joins pairs of rank below `limit` only, without asking first whether the whole piece is a token.
pub fn merge_piece(vocabulary: &Vocabulary, piece: &[u8], limit: u32, emit: impl FnMut(u32)) {
    match piece.len() {
        0..=16 => merge_by_scan::<16>(vocabulary, piece, limit, emit),
        17..=SHORT => merge_by_scan::<SHORT>(vocabulary, piece, limit, emit),
        _ => {
            let parts =
                merge_by_rank(vocabulary, piece, limit).unwrap_or_else(|| merge_by_heap(vocabulary, piece, limit));
            parts.iter().map(|part| part.id).filter(|id| *id != GONE).for_each(emit);
        }
    }
}

/// For a piece of at most `N` bytes. A part stays where its first byte was; a bit in `live` marks it.
fn merge_by_scan<const N: usize>(vocabulary: &Vocabulary, piece: &[u8], limit: u32, mut emit: impl FnMut(u32)) {
    const POSITION_BITS: u32 = 6;
    const NONE: u32 = u32::MAX;
    let candidate = |rank: u32, at: usize| {
        if rank == NO_RANK {
            NONE
        } else {
            rank << POSITION_BITS | at as u32
        }
    };
    let count = piece.len().min(N);
    let mut live = u64::MAX >> (64 - count);
    let mut ids = [0u32; N];
    // (rank of joining the part at i with the next, i): the smallest is the one to join.
    let mut candidates = [NONE; N];
    for i in 0..count {
        ids[i] = vocabulary.byte_id(piece[i]);
    }
    for i in 1..count {
        candidates[i - 1] = candidate(vocabulary.join_bytes(piece[i - 1], piece[i]), i - 1);
    }
    loop {
        let best = candidates.iter().copied().fold(NONE, u32::min);
        let (rank, at) = (best >> POSITION_BITS, best as usize % SHORT % N);
        if best == NONE || rank >= limit {
            break;
        }
        let after = live & (u64::MAX - 1) << at;
        let right = after.trailing_zeros() as usize % N;
        let beyond = after & (after - 1);
        ids[at] = rank;
        live &= !(1 << right);
        candidates[right] = NONE;
        candidates[at] = match beyond {
            0 => NONE,
            _ => candidate(vocabulary.join(rank, ids[beyond.trailing_zeros() as usize % N]), at),
        };
        let before = live & ((1 << at) - 1);
        if before != 0 {
            let left = (63 - before.leading_zeros()) as usize % N;
            candidates[left] = candidate(vocabulary.join(ids[left], rank), left);
        }
    }
    while live != 0 {
        emit(ids[live.trailing_zeros() as usize % N]);
        live &= live - 1;
    }
}

/// A part of a long piece: its token and its neighbors, as positions of their first bytes.
#[derive(Clone, Copy)]
struct Part {
    id: u32,
    previous: u32,
    next: u32,
}

/// Marks a part that has been swallowed, and the end of the list.
const GONE: u32 = u32::MAX;

/// The bytes of a piece as parts, none joined yet.
fn separate(vocabulary: &Vocabulary, piece: &[u8]) -> Vec<Part> {
    let count = u32::try_from(piece.len()).expect("a piece is shorter than 4 GiB");
    let part = |i: u32| Part { id: vocabulary.byte_id(piece[i as usize]), previous: i.wrapping_sub(1), next: i + 1 };
    let mut parts: Vec<Part> = (0..count).map(part).collect();
    parts[count as usize - 1].next = GONE;
    parts
}

/// Joins the part at `at` with the next if that has this `rank`, and calls `found(rank, position)` for each of the two
/// pairs that this creates. False for a candidate that is stale: one of its sides has changed since it was made.
#[inline(always)]
fn join(vocabulary: &Vocabulary, parts: &mut [Part], at: u32, rank: u32, mut found: impl FnMut(u32, u32)) -> bool {
    let left = parts[at as usize];
    if left.id == GONE || left.next == GONE {
        return false;
    }
    let right = parts[left.next as usize];
    if vocabulary.join(left.id, right.id) != rank {
        return false;
    }
    parts[left.next as usize].id = GONE;
    parts[at as usize] = Part { id: rank, previous: left.previous, next: right.next };
    if left.previous != GONE {
        found(vocabulary.join(parts[left.previous as usize].id, rank), left.previous);
    }
    if right.next != GONE {
        parts[right.next as usize].previous = at;
        found(vocabulary.join(rank, parts[right.next as usize].id), at);
    }
    true
}

/// A list of positions for each rank, and a heap of the ranks that have one.
///
/// A join may create a pair of lower rank than the one being worked through. Then the rest of the list goes back, as
/// that pair comes first. Training never makes such ranks, but anybody may; `None` when it happens too often.
fn merge_by_rank(vocabulary: &Vocabulary, piece: &[u8], limit: u32) -> Option<Vec<Part>> {
    let mut parts = separate(vocabulary, piece);
    let mut lists = RankLists { limit, lists: FastMap::default(), ranks: BinaryHeap::new() };
    for at in 1..piece.len() {
        lists.add(vocabulary.join_bytes(piece[at - 1], piece[at]), at as u32 - 1);
    }
    let mut patience = 8 * piece.len();
    let mut taken = Vec::new();
    while let Some(rank) = lists.take_lowest(&mut taken) {
        if !taken.is_sorted() {
            taken.sort_unstable();
        }
        for index in 0..taken.len() {
            let mut lower = false;
            join(vocabulary, &mut parts, taken[index], rank, |found, at| {
                lower |= found < rank;
                lists.add(found, at);
            });
            if lower {
                let rest = taken.len() - index;
                patience = patience.checked_sub(rest)?;
                taken[index + 1..].iter().for_each(|at| lists.add(rank, *at));
                break;
            }
        }
    }
    Some(parts)
}

/// Positions by rank, and which ranks have any.
struct RankLists {
    limit: u32,
    lists: FastMap<u32, Vec<u32>>,
    ranks: BinaryHeap<Reverse<u32>>,
}

impl RankLists {
    #[inline(always)]
    fn add(&mut self, rank: u32, at: u32) {
        if rank < self.limit {
            let positions = self.lists.entry(rank).or_default();
            if positions.is_empty() {
                self.ranks.push(Reverse(rank));
            }
            positions.push(at);
        }
    }

    /// Moves the positions of the lowest rank into `taken` and returns the rank.
    fn take_lowest(&mut self, taken: &mut Vec<u32>) -> Option<u32> {
        let Reverse(rank) = self.ranks.pop()?;
        taken.clear();
        std::mem::swap(taken, self.lists.get_mut(&rank)?);
        Some(rank)
    }
}

/// All candidates in one heap: slower, but O(n log n) for any ranks.
fn merge_by_heap(vocabulary: &Vocabulary, piece: &[u8], limit: u32) -> Vec<Part> {
    let mut parts = separate(vocabulary, piece);
    // Rank in the upper half, position in the lower: the smallest is the lowest rank, leftmost.
    let candidate = |rank: u32, at: u32| Reverse((rank as u64) << 32 | at as u64);
    let pairs = piece.windows(2).zip(0..).map(|(pair, at)| (vocabulary.join_bytes(pair[0], pair[1]), at));
    let mut heap: BinaryHeap<Reverse<u64>> =
        pairs.filter(|(rank, _)| *rank < limit).map(|(rank, at)| candidate(rank, at)).collect();
    while let Some(Reverse(key)) = heap.pop() {
        join(vocabulary, &mut parts, key as u32, (key >> 32) as u32, |rank, at| {
            if rank < limit {
                heap.push(candidate(rank, at));
            }
        });
    }
    parts
}
