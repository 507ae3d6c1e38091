//! Joining the bytes of one piece into tokens.
//!
//! The rule: of all adjacent pairs whose joined bytes are a token, join the one of lowest rank, the leftmost on a tie;
//! repeat until no pair joins. A piece that is itself a token is that token, whether or not joins would lead there.
//!
//! Short pieces (nearly all: an English word has five bytes) keep their parts in two small arrays and look for the
//! minimum by scanning: O(n²) in principle, but n is small and the scan is a few vector instructions. Long pieces would
//! suffer from that (a megabyte of one letter is one piece), so they keep a heap of candidate pairs over a linked
//! list: every join adds at most two candidates, hence O(n log n).

use crate::vocabulary::{Vocabulary, NO_RANK};
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Pieces up to this many bytes take the scanning method.
const SHORT: usize = 64;

/// Calls `emit` with the ids of `piece` in order.
#[inline]
pub fn encode_piece(vocabulary: &Vocabulary, piece: &[u8], emit: impl FnMut(u32)) {
    let mut emit = emit;
    match vocabulary.id(piece) {
        Some(id) => emit(id),
        None => merge_piece(vocabulary, piece, NO_RANK, emit),
    }
}

/// Joins pairs of rank below `limit` only, without asking first whether the whole piece is a token.
pub fn merge_piece(vocabulary: &Vocabulary, piece: &[u8], limit: u32, emit: impl FnMut(u32)) {
    if piece.len() <= SHORT {
        merge_by_scan(vocabulary, piece, limit, emit);
    } else {
        merge_by_heap(vocabulary, piece, limit, emit);
    }
}

fn merge_by_scan(vocabulary: &Vocabulary, piece: &[u8], limit: u32, emit: impl FnMut(u32)) {
    let mut count = piece.len();
    let mut ids = [0u32; SHORT];
    // ranks[i] is the rank of joining parts i and i + 1.
    let mut ranks = [NO_RANK; SHORT];
    for (id, &byte) in ids.iter_mut().zip(piece) {
        *id = vocabulary.byte_id(byte);
    }
    for i in 1..count {
        ranks[i - 1] = vocabulary.join(ids[i - 1], ids[i]);
    }
    while count > 1 {
        let (mut at, mut lowest) = (0, NO_RANK);
        for (i, &rank) in ranks[..count - 1].iter().enumerate() {
            if rank < lowest {
                (at, lowest) = (i, rank);
            }
        }
        if lowest >= limit {
            break;
        }
        ids[at] = lowest;
        ids.copy_within(at + 2..count, at + 1);
        ranks.copy_within(at + 1..count, at);
        count -= 1;
        ranks[count - 1] = NO_RANK;
        if at > 0 {
            ranks[at - 1] = vocabulary.join(ids[at - 1], ids[at]);
        }
        if at + 1 < count {
            ranks[at] = vocabulary.join(ids[at], ids[at + 1]);
        }
    }
    ids[..count].iter().copied().for_each(emit);
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

fn merge_by_heap(vocabulary: &Vocabulary, piece: &[u8], limit: u32, emit: impl FnMut(u32)) {
    let count = u32::try_from(piece.len()).expect("a piece is shorter than 4 GiB");
    let mut parts: Vec<Part> = (0..count)
        .map(|i| Part { id: vocabulary.byte_id(piece[i as usize]), previous: i.wrapping_sub(1), next: i + 1 })
        .collect();
    parts[count as usize - 1].next = GONE;
    // Rank in the upper half, position in the lower: the smallest key is the lowest rank, leftmost.
    let candidate = |rank: u32, at: u32| Reverse((rank as u64) << 32 | at as u64);
    let initial = (0..count - 1).filter_map(|at| {
        let rank = vocabulary.join(parts[at as usize].id, parts[at as usize + 1].id);
        (rank < limit).then(|| candidate(rank, at))
    });
    let mut heap: BinaryHeap<Reverse<u64>> = initial.collect::<Vec<_>>().into();
    while let Some(Reverse(key)) = heap.pop() {
        let (rank, at) = ((key >> 32) as u32, key as u32);
        let left = parts[at as usize];
        // Stale when either side has changed since the candidate was made.
        if left.id == GONE || left.next == GONE {
            continue;
        }
        let right = parts[left.next as usize];
        if vocabulary.join(left.id, right.id) != rank {
            continue;
        }
        parts[left.next as usize].id = GONE;
        parts[at as usize] = Part { id: rank, previous: left.previous, next: right.next };
        if right.next != GONE {
            parts[right.next as usize].previous = at;
            let joined = vocabulary.join(rank, parts[right.next as usize].id);
            if joined < limit {
                heap.push(candidate(joined, at));
            }
        }
        if left.previous != GONE {
            let joined = vocabulary.join(parts[left.previous as usize].id, rank);
            if joined < limit {
                heap.push(candidate(joined, left.previous));
            }
        }
    }
    parts.iter().map(|part| part.id).filter(|id| *id != GONE).for_each(emit);
}
