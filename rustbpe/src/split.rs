//! Cutting text into pieces.
//!
//! The pattern is GPT-4's with at most two digits per number (or three, as GPT-4 has it):
//!
//! ```text
//! '(?i:[sdmt]|ll|ve|re)          an English contraction
//! [^\r\n\p{L}\p{N}]?+\p{L}+      letters, with at most one character before them that is neither letter nor number
//! \p{N}{1,2}                     digits, two at a time
//!  ?[^\s\p{L}\p{N}]++[\r\n]*     punctuation, with a leading space and trailing newlines
//! \s*[\r\n]                      white space up to its last newline
//! \s+(?!\S)                      white space, but leave one character for the word that follows
//! \s+                            that one character, when no word can take it
//! ```
//!
//! A regex engine tries the alternatives in turn and backtracks. Seen by hand, the class of one character and of the
//! next decides which alternative applies, so every piece costs one look at each of its bytes (white space, at most
//! three). Two facts carry the proof: possessive `?+` and `++` change what is retried, never what matches, because the
//! character classes around them are disjoint; and `\s*[\r\n]` must end on the last newline of its run, because `\s*`
//! takes the others first.
//!
//! Only these two exact strings get the hand-written splitter. Any other pattern runs on the regex engine, which is
//! also the oracle in the tests. Text that a pattern leaves unmatched is kept as pieces of its own, never dropped.

use crate::unicode::{class_at, LETTER, NEWLINE, NUMBER, OTHER, SPACE};
use crate::{invalid, Error};

/// The pattern with at most two digits per number.
pub const PATTERN_2: &str =
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";
/// The pattern with at most three digits per number.
pub const PATTERN_3: &str =
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";

/// How text is cut: by hand for the two known patterns, by the regex engine for any other.
#[derive(Clone)]
pub struct Splitter {
    pattern: String,
    engine: Engine,
}

#[derive(Clone)]
enum Engine {
    Digits2,
    Digits3,
    Regex(Box<fancy_regex::Regex>),
}

impl Splitter {
    /// A splitter for `pattern`; the hand-written one when the string is exactly a known pattern.
    pub fn new(pattern: &str) -> Result<Self, Error> {
        match pattern {
            PATTERN_2 => Ok(Self { pattern: pattern.into(), engine: Engine::Digits2 }),
            PATTERN_3 => Ok(Self { pattern: pattern.into(), engine: Engine::Digits3 }),
            _ => Self::regex(pattern),
        }
    }

    /// A splitter that always runs the regex engine: for custom patterns, and as the oracle of the tests.
    pub fn regex(pattern: &str) -> Result<Self, Error> {
        let built = fancy_regex::RegexBuilder::new(pattern).backtrack_limit(usize::MAX).build();
        match built {
            Ok(regex) => Ok(Self { pattern: pattern.into(), engine: Engine::Regex(Box::new(regex)) }),
            Err(error) => invalid(format!("the split pattern {pattern:?} is not a valid regex: {error}")),
        }
    }

    /// The pattern as a regex.
    pub fn pattern(&self) -> &str {
        &self.pattern
    }

    /// Calls `visit(start, end)` for every piece of `text`, in order; the pieces are not empty and cover it exactly.
    #[inline]
    pub fn for_each(&self, text: &str, mut visit: impl FnMut(usize, usize)) -> Result<(), Error> {
        let bytes = text.as_bytes();
        let mut start = 0;
        match &self.engine {
            Engine::Digits2 => {
                while start < bytes.len() {
                    let end = piece_end::<2>(bytes, start);
                    visit(start, end);
                    start = end;
                }
            }
            Engine::Digits3 => {
                while start < bytes.len() {
                    let end = piece_end::<3>(bytes, start);
                    visit(start, end);
                    start = end;
                }
            }
            Engine::Regex(regex) => {
                for found in regex.find_iter(text) {
                    let Ok(found) = found.map_err(|error| error.to_string()) else {
                        return invalid(format!("the split pattern {:?} gave up at byte {start}", self.pattern));
                    };
                    if found.start() > start {
                        visit(start, found.start());
                    }
                    if found.end() > found.start() {
                        visit(found.start(), found.end());
                    }
                    start = found.end().max(start);
                }
                if start < bytes.len() {
                    visit(start, bytes.len());
                }
            }
        }
        Ok(())
    }

    /// The pieces of `text` as a list.
    pub fn pieces<'t>(&self, text: &'t str) -> Result<Vec<&'t str>, Error> {
        let mut pieces = Vec::new();
        self.for_each(text, |start, end| pieces.push(&text[start..end]))?;
        Ok(pieces)
    }
}

/// End of the piece that starts at `start`, with at most `DIGITS` numbers in a row.
#[inline(always)]
fn piece_end<const DIGITS: usize>(text: &[u8], start: usize) -> usize {
    let (class, length) = class_at(text, start);
    let next = start + length;
    match class {
        LETTER => letters(text, next),
        NUMBER => {
            let mut end = next;
            for _ in 1..DIGITS {
                match peek(text, end) {
                    Some((NUMBER, length)) => end += length,
                    _ => break,
                }
            }
            end
        }
        NEWLINE => white_space(text, start),
        _ => after_lead(text, start, next, class),
    }
}

/// The piece begins with a space or a mark, which may lead a word.
#[inline(always)]
fn after_lead(text: &[u8], start: usize, next: usize, class: u8) -> usize {
    let Some((next_class, next_length)) = peek(text, next) else {
        return next;
    };
    if next_class == LETTER {
        if text[start] == b'\'' {
            if let Some(end) = contraction(text, next) {
                return end;
            }
        }
        return letters(text, next + next_length);
    }
    if class == OTHER {
        return newlines(text, run_of(text, next, OTHER));
    }
    match next_class {
        OTHER if text[start] == b' ' => newlines(text, run_of(text, next + next_length, OTHER)),
        SPACE | NEWLINE => white_space(text, start),
        _ => next,
    }
}

#[inline(always)]
fn peek(text: &[u8], at: usize) -> Option<(u8, usize)> {
    (at < text.len()).then(|| class_at(text, at))
}

/// End of the run of letters that goes on at `at`.
///
/// Eight ASCII bytes at a time: the length of a word comes from counting zeros, not from a loop whose end the processor
/// would have to guess.
#[inline(always)]
fn letters(text: &[u8], mut at: usize) -> usize {
    while let Some(bytes) = text.get(at..at + 8) {
        let found = not_ascii_letters(u64::from_le_bytes(bytes.try_into().expect("8 bytes")));
        if found == 0 {
            at += 8;
            continue;
        }
        at += (found.trailing_zeros() / 8) as usize;
        if text[at] < 0x80 {
            return at;
        }
        match class_at(text, at) {
            (LETTER, length) => at += length,
            _ => return at,
        }
    }
    run_of(text, at, LETTER)
}

/// The top bit of each byte that is no ASCII letter.
#[inline(always)]
fn not_ascii_letters(bytes: u64) -> u64 {
    const EACH: u64 = 0x0101_0101_0101_0101;
    // Lower case; then seven bits, so that no sum below carries into the next byte.
    let lower = (bytes | (0x20 * EACH)) & (0x7F * EACH);
    let from_a = lower + (0x80 - b'a' as u64) * EACH;
    let beyond_z = lower + (0x7F - b'z' as u64) * EACH;
    (bytes | beyond_z | !from_a) & (0x80 * EACH)
}

/// End of the run of `class` that goes on at `at`.
#[inline(always)]
fn run_of(text: &[u8], mut at: usize, class: u8) -> usize {
    while let Some((found, length)) = peek(text, at) {
        if found != class {
            break;
        }
        at += length;
    }
    at
}

#[inline(always)]
fn newlines(text: &[u8], mut at: usize) -> usize {
    while at < text.len() && (text[at] == b'\n' || text[at] == b'\r') {
        at += 1;
    }
    at
}

/// `(?i:[sdmt]|ll|ve|re)` after the apostrophe. Case folding also makes U+017F, the long s, an s.
#[inline]
fn contraction(text: &[u8], at: usize) -> Option<usize> {
    let lower = |k: usize| text.get(at + k).map(|byte| byte | 0x20);
    match (lower(0)?, lower(1)) {
        (b's' | b'd' | b'm' | b't', _) => Some(at + 1),
        (b'l', Some(b'l')) | (b'v' | b'r', Some(b'e')) => Some(at + 2),
        _ if text[at..].starts_with("\u{17F}".as_bytes()) => Some(at + 2),
        _ => None,
    }
}

/// A piece of white space: up to the last newline of the run; else all of it at the end of the text; else all but the
/// last character, unless that is the only one.
fn white_space(text: &[u8], start: usize) -> usize {
    let (mut end, mut last, mut after_newline) = (start, start, start);
    while let Some((class, length)) = peek(text, end) {
        match class {
            NEWLINE => after_newline = end + length,
            SPACE => {}
            _ => break,
        }
        last = end;
        end += length;
    }
    if after_newline > start {
        after_newline
    } else if end == text.len() || last == start {
        end
    } else {
        last
    }
}
