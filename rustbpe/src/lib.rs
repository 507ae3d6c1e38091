//! Byte-level byte-pair encoding: train a vocabulary, encode text with it, decode ids back to bytes.
//!
//! Text takes two steps to become token ids, and each has a module that teaches it:
//!
//! 1. [`split`] cuts text into pieces (words with their leading space, numbers, runs of punctuation or white space).
//!    No token ever spans two pieces. One pass, O(bytes).
//! 2. [`merge`] joins the bytes of one piece, always the adjacent pair whose joined token has the lowest rank, until no
//!    adjacent pair is a token. O(n²) with a tiny constant for short pieces, O(n log n) for long ones.
//!
//! Training ([`words`], [`train`]) is the same in reverse: count the distinct pieces of a corpus once, then repeat
//! "find the most frequent adjacent pair, make it a token, join it everywhere". With an index from each pair to the
//! places where it stands, the whole run costs O(joins · log pairs), not O(merges · corpus).
//!
//! Training a model wants rows of one length: [`column`] reads texts where Arrow keeps them, [`packer`] fits the encoded
//! documents into rows.
//!
//! Everything here is plain Rust without Python; the `python` feature adds the one file that binds it.

pub mod cache;
pub mod column;
pub mod encoder;
pub mod merge;
pub mod packer;
pub mod parallel;
pub mod piece;
#[cfg(feature = "python")]
mod python;
pub mod split;
pub mod stream;
pub mod train;
pub mod unicode;
pub mod vocabulary;
pub mod words;

pub use encoder::Encoding;
pub use split::Splitter;
pub use vocabulary::Vocabulary;
pub use words::WordCounts;

/// What can go wrong, as a sentence for whoever called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Error {
    /// An argument that cannot work, naming the value, the limit and the remedy.
    Invalid(String),
    /// The callback asked to stop (in Python: Ctrl-C, or an exception in a progress function).
    Interrupted,
}

impl std::fmt::Display for Error {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Error::Invalid(message) => formatter.write_str(message),
            Error::Interrupted => formatter.write_str("interrupted"),
        }
    }
}

impl std::error::Error for Error {}

/// Shorthand for a failed check.
pub(crate) fn invalid<T>(message: impl Into<String>) -> Result<T, Error> {
    Err(Error::Invalid(message.into()))
}
