//! Text to ids and back: splitter, word cache, joins and special tokens put together.

use aho_corasick::{AhoCorasick, MatchKind};
use std::sync::Mutex;

use crate::cache::{WordCache, MAX_IDS};
use crate::merge::encode_piece;
use crate::piece::{self, Piece, MAX_KEY, NO_KEY};
use crate::split::Splitter;
use crate::vocabulary::{FastMap, Vocabulary, MAX_ID};
use crate::{invalid, parallel, Error};

/// Least and most text per job of a batch: large enough to make a job's overhead vanish, small enough to stay in cache.
const JOB_BYTES: (usize, usize) = (1 << 15, 1 << 19);
/// Jobs per thread where the limits allow: the last one keeps the other threads waiting for at most this share.
const JOBS_PER_THREAD: usize = 8;

/// An element of an output array: u16 where every id fits, else u32.
pub trait Id: Copy + Send {
    fn from_id(id: u32) -> Self;
}

impl Id for u16 {
    #[inline(always)]
    fn from_id(id: u32) -> Self {
        id as u16
    }
}

impl Id for u32 {
    #[inline(always)]
    fn from_id(id: u32) -> Self {
        id
    }
}

/// Which special tokens the text itself may spell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Specials {
    /// None: `<|bos|>` in a text is ordinary characters. The only safe choice for a text that a user wrote.
    Never,
    /// All: each becomes its token; where several match, the leftmost, and of those the longest.
    Always,
}

/// A vocabulary, a split pattern and special tokens: everything that turns text into ids.
pub struct Encoding {
    pub vocabulary: Vocabulary,
    pub splitter: Splitter,
    specials: Vec<(String, u32)>,
    special_names: FastMap<u32, usize>,
    special_finder: AhoCorasick,
    /// Warm caches between calls; a call takes one per thread and gives it back.
    caches: Mutex<Vec<WordCache>>,
}

impl Encoding {
    /// `specials` are (name, id), with ids that no ordinary token has.
    pub fn new(vocabulary: Vocabulary, splitter: Splitter, specials: Vec<(String, u32)>) -> Result<Self, Error> {
        let mut special_names = FastMap::default();
        for (index, (name, id)) in specials.iter().enumerate() {
            if name.is_empty() {
                return invalid(format!("the special token with id {id} has an empty name"));
            }
            if *id > MAX_ID || vocabulary.bytes(*id).is_some() || special_names.insert(*id, index).is_some() {
                return invalid(format!("the id {id} of the special token {name} is taken or above {MAX_ID}"));
            }
            if specials[..index].iter().any(|(other, _)| other == name) {
                return invalid(format!("the special token {name} is there twice"));
            }
        }
        let special_finder = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(specials.iter().map(|(name, _)| name))
            .map_err(|error| Error::Invalid(format!("the special tokens cannot be searched for: {error}")))?;
        Ok(Self { vocabulary, splitter, specials, special_names, special_finder, caches: Mutex::new(Vec::new()) })
    }

    /// Special tokens in the order given.
    pub fn specials(&self) -> &[(String, u32)] {
        &self.specials
    }

    /// One above the largest id, special or not.
    pub fn id_limit(&self) -> u32 {
        let specials = self.specials.iter().map(|(_, id)| id + 1).max().unwrap_or(0);
        specials.max(self.vocabulary.id_limit())
    }

    // Never waits for the lock: in a child that was forked while another thread held it, it would never be released.
    fn take_cache(&self) -> WordCache {
        let kept = self.caches.try_lock().ok().and_then(|mut caches| caches.pop());
        kept.unwrap_or_default()
    }

    fn give_back(&self, cache: WordCache) {
        if let Ok(mut caches) = self.caches.try_lock() {
            if caches.len() < parallel::available_threads() {
                caches.push(cache);
            }
        }
    }

    /// Appends the ids of `text` to `out`.
    pub fn encode_into<T: Id>(&self, text: &str, specials: Specials, out: &mut Vec<T>) -> Result<(), Error> {
        let mut cache = self.take_cache();
        let result = self.encode_with(&mut cache, text, specials, out);
        self.give_back(cache);
        result
    }

    fn encode_with<T: Id>(
        &self,
        cache: &mut WordCache,
        text: &str,
        specials: Specials,
        out: &mut Vec<T>,
    ) -> Result<(), Error> {
        if specials == Specials::Never || self.specials.is_empty() {
            return self.encode_ordinary(cache, text, out);
        }
        let mut start = 0;
        for found in self.special_finder.find_iter(text) {
            self.encode_ordinary(cache, &text[start..found.start()], out)?;
            out.push(T::from_id(self.specials[found.pattern().as_usize()].1));
            start = found.end();
        }
        self.encode_ordinary(cache, &text[start..], out)
    }

    fn encode_ordinary<T: Id>(&self, cache: &mut WordCache, text: &str, out: &mut Vec<T>) -> Result<(), Error> {
        let bytes = text.as_bytes();
        piece::for_each_group(
            &self.splitter,
            text,
            cache,
            |cache, hash| cache.prefetch(hash),
            |cache, group| {
                out.reserve(group.len() * MAX_IDS);
                for piece in group {
                    match cache.get(piece.key, piece.hash) {
                        Some(entry) if piece.key != NO_KEY => {
                            // All three at once, then cut: no branch on the count.
                            let length = out.len() + entry.count as usize;
                            out.extend_from_slice(&entry.ids.map(T::from_id));
                            out.truncate(length);
                        }
                        _ => self.encode_new(cache, piece, &bytes[piece.start..piece.end], out),
                    }
                }
            },
        )
    }

    #[inline(never)]
    fn encode_new<T: Id>(&self, cache: &mut WordCache, piece: &Piece, bytes: &[u8], out: &mut Vec<T>) {
        if piece.key == NO_KEY {
            return encode_piece(&self.vocabulary, bytes, |id| out.push(T::from_id(id)));
        }
        let (mut ids, mut count) = ([0u32; MAX_KEY], 0);
        encode_piece(&self.vocabulary, bytes, |id| {
            ids[count] = id;
            count += 1;
        });
        cache.insert(piece.key, piece.hash, &ids[..count]);
        out.extend(ids[..count].iter().map(|id| T::from_id(*id)));
    }

    /// Ids of all `texts` in one array, `first` before each when given, and where each text starts: `offsets` has one
    /// element more than `texts`. The same for any number of threads.
    pub fn encode_batch<T: Id>(
        &self,
        texts: &[&str],
        first: Option<u32>,
        specials: Specials,
        threads: usize,
    ) -> Result<(Vec<T>, Vec<i64>), Error> {
        let jobs = group(texts, threads);
        let parts = parallel::map(
            jobs.len(),
            threads,
            || Borrowed { cache: Some(self.take_cache()), owner: self },
            |borrowed, job| {
                let cache = borrowed.cache.as_mut().expect("there until it is dropped");
                let (mut ids, mut ends) = (Vec::new(), Vec::new());
                for text in &texts[jobs[job].clone()] {
                    ids.extend(first.map(T::from_id));
                    self.encode_with(cache, text, specials, &mut ids)?;
                    ends.push(ids.len());
                }
                Ok((ids, ends))
            },
        )?;
        let mut ids = Vec::with_capacity(parts.iter().map(|(ids, _)| ids.len()).sum());
        let mut offsets = Vec::with_capacity(texts.len() + 1);
        offsets.push(0);
        for (part, ends) in parts {
            offsets.extend(ends.iter().map(|end| (ids.len() + end) as i64));
            ids.extend_from_slice(&part);
        }
        Ok((ids, offsets))
    }

    /// Appends the bytes of the tokens `ids` to `out`; a special token's bytes are its name.
    pub fn decode_into(&self, ids: impl Iterator<Item = u32>, out: &mut Vec<u8>) -> Result<(), Error> {
        for id in ids {
            match self.token_bytes(id) {
                Some(bytes) => out.extend_from_slice(bytes),
                None => return invalid(format!("{id} is no token id; the largest is {}", self.id_limit() - 1)),
            }
        }
        Ok(())
    }

    /// Bytes of a token, ordinary or special.
    pub fn token_bytes(&self, id: u32) -> Option<&[u8]> {
        self.vocabulary.bytes(id).or_else(|| {
            let index = *self.special_names.get(&id)?;
            Some(self.specials[index].0.as_bytes())
        })
    }
}

/// A cache on loan, given back also when a job fails.
struct Borrowed<'e> {
    cache: Option<WordCache>,
    owner: &'e Encoding,
}

impl Drop for Borrowed<'_> {
    fn drop(&mut self) {
        if let Some(cache) = self.cache.take() {
            self.owner.give_back(cache);
        }
    }
}

/// Ranges of neighboring texts, one for each job.
fn group(texts: &[&str], threads: usize) -> Vec<std::ops::Range<usize>> {
    let total: usize = texts.iter().map(|text| text.len()).sum();
    let job_bytes = (total / JOBS_PER_THREAD / threads.max(1)).clamp(JOB_BYTES.0, JOB_BYTES.1);
    let (mut jobs, mut start, mut size) = (Vec::new(), 0, 0);
    for (index, text) in texts.iter().enumerate() {
        size += text.len();
        if size >= job_bytes || index + 1 == texts.len() {
            jobs.push(start..index + 1);
            (start, size) = (index + 1, 0);
        }
    }
    jobs
}
