//! Best-fit packing: documents of any length into rows of one length, the same rows as `nanochat/data/packing.py`.
//!
//! A row is filled from a buffer of waiting documents. The largest that fits in what is left of the row goes in, the
//! oldest among equals; when none fits, the shortest is cropped to fill the row. So no position is padding and every
//! row starts where a document starts. Two ordered sets, by length and by age, make each choice O(log buffer).
//!
//! Which document goes where depends on lengths alone. A rank of several therefore packs all rows but writes only its
//! own, and the tokens of the others are never copied.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::{invalid, Error};

/// What a caller calls a document; it means nothing here.
pub type Key = [i64; 4];

struct Document {
    key: Key,
    /// Of the whole document, which decides where it goes.
    length: usize,
    /// As many tokens as a row can take.
    head: Box<[i32]>,
}

/// Packs documents into rows of `capacity` tokens.
pub struct Packer {
    capacity: usize,
    buffer_size: usize,
    waiting: VecDeque<Document>,
    /// The buffer, as (length, serial number) and by serial number, of which the lowest is the oldest document's.
    by_length: BTreeSet<(usize, u64)>,
    by_age: BTreeMap<u64, Document>,
    serial: u64,
    newest: Option<Key>,
    finished: bool,
    row: usize,
    column: usize,
}

impl Packer {
    pub fn new(capacity: usize, buffer_size: usize) -> Result<Self, Error> {
        if capacity < 1 || buffer_size < 1 {
            return invalid(format!("capacity {capacity} and buffer_size {buffer_size} must be at least 1"));
        }
        Ok(Self {
            capacity,
            buffer_size,
            waiting: VecDeque::new(),
            by_length: BTreeSet::new(),
            by_age: BTreeMap::new(),
            serial: 0,
            newest: None,
            finished: false,
            row: 0,
            column: 0,
        })
    }

    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Appends documents: number i is `ids[offsets[i]..offsets[i + 1]]` and has `keys[i]`. All of them or, with an
    /// error, none. Empty documents are an error: they could not begin a row.
    pub fn add<T: Copy + Into<u32>>(&mut self, ids: &[T], offsets: &[i64], keys: &[Key]) -> Result<(), Error> {
        if offsets.len() != keys.len() + 1 {
            return invalid(format!("{} keys need {} offsets, got {}", keys.len(), keys.len() + 1, offsets.len()));
        }
        let mut documents = Vec::with_capacity(keys.len());
        for (bounds, key) in offsets.windows(2).zip(keys) {
            let range = usize::try_from(bounds[0]).unwrap_or(usize::MAX)..usize::try_from(bounds[1]).unwrap_or(0);
            let Some(tokens) = ids.get(range).filter(|tokens| !tokens.is_empty()) else {
                return invalid(format!(
                    "document {key:?}, tokens {} to {} of {}, has no tokens; every document begins with <|bos|>",
                    bounds[0],
                    bounds[1],
                    ids.len()
                ));
            };
            let head = tokens.iter().take(self.capacity).map(|&id| id.into() as i32).collect();
            documents.push(Document { key: *key, length: tokens.len(), head });
        }
        self.waiting.extend(documents);
        Ok(())
    }

    /// Says that no document follows: from now on the buffer is emptied instead of topped up.
    pub fn finish(&mut self) {
        self.finished = true;
    }

    pub fn finished(&self) -> bool {
        self.finished
    }

    /// Key of the last document that entered the buffer.
    pub fn newest(&self) -> Option<Key> {
        self.newest
    }

    /// Keys of the documents in the buffer, oldest first.
    pub fn buffered(&self) -> impl ExactSizeIterator<Item = Key> + '_ {
        self.by_age.values().map(|document| document.key)
    }

    /// Packs as many rows as `rows` holds times `step`, and writes those numbered `first`, `first + step`, … into
    /// `rows`. How many are complete, written or not: fewer means that documents ran out; `add` more (or `finish`) and
    /// call again with the same arguments. `rows.len()` is a multiple of the capacity, and `first` below `step`.
    pub fn pack(&mut self, rows: &mut [i32], first: usize, step: usize) -> usize {
        let count = rows.len() / self.capacity * step;
        while self.row < count {
            let start = self.row / step * self.capacity;
            let own = (self.row % step == first).then(|| &mut rows[start..start + self.capacity]);
            if !self.fill(own) {
                return self.row;
            }
            self.row += 1;
            self.column = 0;
        }
        std::mem::take(&mut self.row)
    }

    /// Continues one row; false when it is incomplete because documents ran out.
    fn fill(&mut self, mut row: Option<&mut [i32]>) -> bool {
        while self.column < self.capacity {
            if !self.top_up() {
                return false;
            }
            let left = self.capacity - self.column;
            let document = self.take(left);
            let length = document.length.min(left);
            if let Some(row) = &mut row {
                row[self.column..self.column + length].copy_from_slice(&document.head[..length]);
            }
            self.column += length;
        }
        true
    }

    /// Removes the largest document of at most `limit` tokens, else the shortest; the oldest among equals.
    fn take(&mut self, limit: usize) -> Document {
        let fitting = self.by_length.range(..(limit + 1, 0)).next_back();
        let entry = match fitting {
            Some(&(length, _)) => self.by_length.range((length, 0)..).next(),
            None => self.by_length.first(),
        };
        let entry = *entry.expect("the buffer was topped up");
        self.by_length.remove(&entry);
        self.by_age.remove(&entry.1).expect("both hold the same documents")
    }

    /// Moves waiting documents into the buffer; false when a choice must wait for more documents.
    fn top_up(&mut self) -> bool {
        while self.by_age.len() < self.buffer_size {
            let Some(document) = self.waiting.pop_front() else { break };
            self.newest = Some(document.key);
            self.by_length.insert((document.length, self.serial));
            self.by_age.insert(self.serial, document);
            self.serial += 1;
        }
        self.by_age.len() == self.buffer_size || (self.finished && !self.by_age.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packer(lengths: &[usize], capacity: usize, buffer_size: usize) -> Packer {
        let mut packer = Packer::new(capacity, buffer_size).unwrap();
        let offsets: Vec<i64> = (0..=lengths.len()).map(|i| lengths[..i].iter().sum::<usize>() as i64).collect();
        let ids: Vec<u32> = lengths.iter().enumerate().flat_map(|(i, &n)| vec![i as u32; n]).collect();
        let keys: Vec<Key> = (0..lengths.len() as i64).map(|i| [i; 4]).collect();
        packer.add(&ids, &offsets, &keys).unwrap();
        packer.finish();
        packer
    }

    #[test]
    fn largest_that_fits_oldest_of_equals_else_the_shortest_cropped() {
        let mut rows = [-1; 24];
        assert_eq!(packer(&[2, 3, 2, 9, 4, 7], 8, 6).pack(&mut rows, 0, 1), 3);
        assert_eq!(rows[..8], [5, 5, 5, 5, 5, 5, 5, 0]); // nothing fits one token: the shortest, 0 and 2, is cropped
        assert_eq!(rows[8..16], [4, 4, 4, 4, 1, 1, 1, 2]);
        assert_eq!(rows[16..], [3; 8]); // longer than a row
    }

    #[test]
    fn a_rank_writes_its_rows_and_no_others() {
        let lengths: Vec<usize> = (0..200).map(|i| i * 7 % 23 + 1).collect();
        let mut all = vec![-1; 60 * 10];
        assert_eq!(packer(&lengths, 10, 20).pack(&mut all, 0, 1), 60);
        for first in 0..3 {
            let mut own = vec![-1; 20 * 10];
            assert_eq!(packer(&lengths, 10, 20).pack(&mut own, first, 3), 60);
            let expected: Vec<i32> = all.chunks(10).skip(first).step_by(3).flatten().copied().collect();
            assert_eq!(own, expected);
        }
    }

    #[test]
    fn bad_documents_are_refused_whole() {
        let mut packer = Packer::new(8, 4).unwrap();
        for offsets in [[0, 2, 2], [0, 2, 9], [-1, 2, 3], [2, 0, 3]] {
            assert!(packer.add(&[0u16; 3], &offsets, &[[0; 4], [1; 4]]).is_err());
        }
        assert!(packer.add(&[0u16; 3], &[0, 3], &[]).is_err());
        assert!(packer.waiting.is_empty());
        assert!(Packer::new(0, 1).is_err() && Packer::new(1, 0).is_err());
    }
}
