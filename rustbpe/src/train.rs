//! Learning merges from word counts.
//!
//! The rule: the adjacent pair with the highest count becomes the next token; of equal counts, the smallest (left,
//! right) by id. A run of equal tokens is joined from the left. Doing this literally costs a pass over all words per
//! merge. Three observations make it cheap:
//!
//! - A merge changes only the places where its pair stands, and the counts of the pairs beside them. So keep, for each
//!   pair, its positions. All text lies in one array with a slot per byte; a token's id stands in its first and its last
//!   slot, so both neighbors of a position are found without links, and a join writes at most four slots.
//! - A pair (a, b) comes into being only in the merge that creates the younger of a and b, complete; from then on it can
//!   only lose places. So its positions are listed once, in order, and a position that no longer holds the pair is
//!   recognized when it is visited. The same holds for counts: the queue's top is an upper bound, so an entry that has
//!   become smaller is put back with its present count.
//! - A pair whose count is below that of the last merge is never joined. So pairs below a bound are not listed at all.
//!   Should the queue ever reach the bound, it is lowered and the index built again: exact, and most of the time and
//!   memory of a naive index is never spent.
//!
//! Every join makes the text one token shorter, so joins are bounded by its bytes: O(bytes · log pairs) in all.

use std::collections::BinaryHeap;
use std::ops::ControlFlow;

use crate::vocabulary::FastMap;
use crate::words::WordCounts;
use crate::{invalid, Error};

type Pair = (u32, u32);

/// Marks the slot before a word; the other bits number the word.
const WORD: u32 = 1 << 31;
/// A slot inside a token.
const INSIDE: u32 = WORD - 1;
/// `offsets` holds distances up to this; longer words are looked up.
const FAR: u8 = u8::MAX;

/// Finds `count` merges. `progress(done)` is called now and then and may stop the run.
///
/// Fails when the words hold fewer merges than asked for, and says how many there are.
pub fn train(
    words: &WordCounts,
    count: usize,
    progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
) -> Result<Vec<Pair>, Error> {
    let bound = first_bound(words, count);
    train_with_bound(words, count, bound, progress)
}

/// A guess at a count that the last merge will not fall below. Only the time depends on it, never the result.
fn first_bound(words: &WordCounts, merges: usize) -> u64 {
    words.total() / (16 * merges as u64 + 1)
}

/// As [`train`], with the first bound given.
pub fn train_with_bound(
    words: &WordCounts,
    count: usize,
    mut bound: u64,
    progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
) -> Result<Vec<Pair>, Error> {
    let mut text = Text::new(words)?;
    let mut merges = Vec::with_capacity(count);
    let mut index = Index::build(&text, bound);
    while merges.len() < count {
        let Some(((left, right), positions)) = index.pop() else {
            if bound <= 1 {
                let found = merges.len();
                return invalid(format!(
                    "the text holds only {found} merges, but {count} were asked for; \
                     lower the vocabulary size by at least {} or train on more text",
                    count - found
                ));
            }
            bound /= 8;
            index = Index::build(&text, bound);
            continue;
        };
        let token = 256 + merges.len() as u32;
        merges.push((left, right));
        index.join(&mut text, left, right, token, &positions);
        if merges.len() % 64 == 0 && progress(merges.len()).is_break() {
            return Err(Error::Interrupted);
        }
    }
    Ok(merges)
}

/// All distinct words, one slot per byte, each after a slot that marks it.
struct Text {
    slots: Vec<u32>,
    /// Distance of each slot from its word's mark, up to [`FAR`].
    offsets: Vec<u8>,
    counts: Vec<u64>,
    /// (first slot, word) of the words longer than [`FAR`].
    far_words: Vec<(u32, u32)>,
    /// Length in bytes of each token.
    lengths: Vec<u32>,
}

impl Text {
    fn new(words: &WordCounts) -> Result<Self, Error> {
        let mut size = 1;
        words.for_each(|word, _| size += word.len() + 1);
        if size >= WORD as usize {
            return invalid(format!(
                "the distinct words hold {size} bytes, above the limit of {WORD}; train on less text, \
                 or cap the characters taken from each document"
            ));
        }
        let mut text = Self {
            slots: Vec::with_capacity(size),
            offsets: Vec::with_capacity(size),
            counts: Vec::with_capacity(words.len()),
            far_words: Vec::new(),
            lengths: vec![1; 256],
        };
        words.for_each(|word, count| {
            let number = text.counts.len() as u32;
            if word.len() >= FAR as usize {
                text.far_words.push((text.slots.len() as u32, number));
            }
            text.slots.push(WORD | number);
            text.slots.extend(word.iter().map(|byte| *byte as u32));
            text.offsets.extend((0..=word.len()).map(|offset| offset.min(FAR as usize) as u8));
            text.counts.push(count);
        });
        text.slots.push(WORD);
        text.offsets.push(0);
        Ok(text)
    }

    /// How often the word around this position occurs.
    #[inline(always)]
    fn count_at(&self, at: usize) -> u64 {
        let offset = self.offsets[at];
        let word = if offset < FAR {
            self.slots[at - offset as usize] & !WORD
        } else {
            let after = self.far_words.partition_point(|(start, _)| *start as usize <= at);
            self.far_words[after - 1].1
        };
        self.counts[word as usize]
    }

    #[inline(always)]
    fn length(&self, token: u32) -> usize {
        self.lengths[token as usize] as usize
    }

    /// Calls `visit(position, left, right)` for every adjacent pair of tokens.
    fn for_each_pair(&self, mut visit: impl FnMut(usize, u32, u32)) {
        let mut at = 0;
        while at + 1 < self.slots.len() {
            let token = self.slots[at];
            if token & WORD != 0 {
                at += 1;
                continue;
            }
            let next = at + self.length(token);
            if self.slots[next] & WORD == 0 {
                visit(at, token, self.slots[next]);
            }
            at = next;
        }
    }
}

/// A pair that may be merged one day.
#[derive(Default)]
struct Candidate {
    count: u64,
    /// Where it stood when it was listed, ascending.
    positions: Vec<u32>,
}

/// Queue order: highest count first, then the smallest pair.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Queued {
    count: u64,
    pair: std::cmp::Reverse<Pair>,
}

/// Every pair with a count of at least `bound`: how often it occurs, and where.
struct Index {
    bound: u64,
    candidates: FastMap<u64, Candidate>,
    queue: BinaryHeap<Queued>,
    before: Tally,
    after: Tally,
}

/// Sums by token id: a dense array, and which of its elements are in use.
#[derive(Default)]
struct Tally {
    sums: Vec<u64>,
    touched: Vec<u32>,
}

impl Tally {
    #[inline(always)]
    fn add(&mut self, token: u32, count: u64) {
        let sum = &mut self.sums[token as usize];
        if *sum == 0 {
            self.touched.push(token);
        }
        *sum += count;
    }

    fn clear(&mut self) {
        for token in self.touched.drain(..) {
            self.sums[token as usize] = 0;
        }
    }
}

#[inline(always)]
fn key(left: u32, right: u32) -> u64 {
    (left as u64) << 32 | right as u64
}

impl Index {
    fn build(text: &Text, bound: u64) -> Self {
        let mut counts: FastMap<u64, u64> = FastMap::default();
        text.for_each_pair(|at, left, right| *counts.entry(key(left, right)).or_default() += text.count_at(at));
        counts.retain(|_, count| *count >= bound);
        let mut index = Self {
            bound,
            candidates: FastMap::default(),
            queue: BinaryHeap::new(),
            before: Tally::default(),
            after: Tally::default(),
        };
        for (pair, count) in counts {
            index.list((pair >> 32) as u32, pair as u32, count);
        }
        text.for_each_pair(|at, left, right| {
            if let Some(candidate) = index.candidates.get_mut(&key(left, right)) {
                candidate.positions.push(at as u32);
            }
        });
        index
    }

    fn list(&mut self, left: u32, right: u32, count: u64) {
        self.candidates.insert(key(left, right), Candidate { count, positions: Vec::new() });
        self.queue.push(Queued { count, pair: std::cmp::Reverse((left, right)) });
    }

    /// Removes and returns the pair to merge next, if one has a count of at least the bound.
    fn pop(&mut self) -> Option<(Pair, Vec<u32>)> {
        while let Some(Queued { count, pair: std::cmp::Reverse(pair) }) = self.queue.pop() {
            let Some(candidate) = self.candidates.get(&key(pair.0, pair.1)) else {
                continue;
            };
            if candidate.count == count {
                let candidate = self.candidates.remove(&key(pair.0, pair.1)).expect("found just now");
                return Some((pair, candidate.positions));
            }
            self.queue.push(Queued { count: candidate.count, pair: std::cmp::Reverse(pair) });
        }
        None
    }

    /// Joins `left` and `right` into `token` at those of `positions` that still hold them, and updates the index.
    fn join(&mut self, text: &mut Text, left: u32, right: u32, token: u32, positions: &[u32]) {
        let (left_length, right_length) = (text.length(left), text.length(right));
        text.lengths.push((left_length + right_length) as u32);
        for tally in [&mut self.before, &mut self.after] {
            tally.sums.resize(text.lengths.len(), 0);
        }
        let mut joined = Vec::with_capacity(positions.len());
        for &position in positions {
            let at = position as usize;
            let second = at + left_length;
            if text.slots[at] != left || text.slots[second] != right {
                continue;
            }
            let end = second + right_length;
            let (previous, next, count) = (text.slots[at - 1], text.slots[end], text.count_at(at));
            // A previous `token` was made in this loop; what stood there before has been subtracted as its `next`.
            if previous & WORD == 0 && previous != token {
                self.before.add(previous, count);
            }
            if next & WORD == 0 {
                self.after.add(next, count);
            }
            text.slots[second - 1] = INSIDE;
            text.slots[second] = INSIDE;
            text.slots[at] = token;
            text.slots[end - 1] = token;
            joined.push(position);
        }
        self.subtract(|other| key(other, left), |other| key(right, other));
        self.add(text, token, &joined);
    }

    /// Takes what the tallies hold from the pairs that the join has broken up, and forgets pairs below the bound.
    fn subtract(&mut self, before: impl Fn(u32) -> u64, after: impl Fn(u32) -> u64) {
        let (bound, candidates) = (self.bound, &mut self.candidates);
        let mut take = |pair: u64, count: u64| {
            if let Some(candidate) = candidates.get_mut(&pair) {
                candidate.count -= count;
                if candidate.count < bound.max(1) {
                    candidates.remove(&pair);
                }
            }
        };
        for &other in &self.before.touched {
            take(before(other), self.before.sums[other as usize]);
        }
        for &other in &self.after.touched {
            take(after(other), self.after.sums[other as usize]);
        }
        self.before.clear();
        self.after.clear();
    }

    /// Counts and lists the pairs that the new `token` forms with its neighbors.
    fn add(&mut self, text: &Text, token: u32, joined: &[u32]) {
        let length = text.length(token);
        for &position in joined {
            let (at, count) = (position as usize, text.count_at(position as usize));
            let (previous, next) = (text.slots[at - 1], text.slots[at + length]);
            // Two new tokens side by side are counted once, from the left.
            if previous & WORD == 0 && previous != token {
                self.before.add(previous, count);
            }
            if next & WORD == 0 {
                self.after.add(next, count);
            }
        }
        let (mut before, mut after) = (std::mem::take(&mut self.before), std::mem::take(&mut self.after));
        let bound = self.bound.max(1);
        for &other in before.touched.iter().filter(|other| before.sums[**other as usize] >= bound) {
            self.list(other, token, before.sums[other as usize]);
        }
        for &other in after.touched.iter().filter(|other| after.sums[**other as usize] >= bound) {
            self.list(token, other, after.sums[other as usize]);
        }
        for &position in joined {
            let at = position as usize;
            let (previous, next) = (text.slots[at - 1], text.slots[at + length]);
            if previous & WORD == 0 && previous != token && before.sums[previous as usize] >= bound {
                let start = at - text.length(previous);
                let candidate = self.candidates.get_mut(&key(previous, token)).expect("listed above");
                candidate.positions.push(start as u32);
            }
            if next & WORD == 0 && after.sums[next as usize] >= bound {
                let candidate = self.candidates.get_mut(&key(token, next)).expect("listed above");
                candidate.positions.push(position);
            }
        }
        before.clear();
        after.clear();
        (self.before, self.after) = (before, after);
    }
}
