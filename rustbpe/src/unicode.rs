//! Character classes of the split pattern, looked up in tables that build.rs makes from regex-syntax.

include!(concat!(env!("OUT_DIR"), "/unicode_tables.rs"));

/// Neither letter, number nor white space: punctuation, symbols, marks, controls, unassigned.
pub const OTHER: u8 = 0;
/// `\p{L}`
pub const LETTER: u8 = 1;
/// `\p{N}`
pub const NUMBER: u8 = 2;
/// `\s` without the two newlines below
pub const SPACE: u8 = 3;
/// `[\r\n]`
pub const NEWLINE: u8 = 4;

/// Class of a code point.
#[inline(always)]
pub fn class_of(code_point: u32) -> u8 {
    let block = BLOCK_OF[(code_point >> 7) as usize];
    CLASSES[block as usize][(code_point & 127) as usize]
}

/// Classes of the ASCII bytes; bytes from 0x80 on belong to longer characters and get [`OTHER`].
pub static ASCII: [u8; 256] = ascii_classes();

const fn ascii_classes() -> [u8; 256] {
    let mut table = [OTHER; 256];
    let mut byte = 0;
    while byte < 128 {
        table[byte] = CLASSES[BLOCK_OF[0] as usize][byte];
        byte += 1;
    }
    table
}

/// Class and length in bytes of the character that starts at `at`; `text` is valid UTF-8 and `at` a boundary in it.
#[inline(always)]
pub fn class_at(text: &[u8], at: usize) -> (u8, usize) {
    let first = text[at];
    if first < 0x80 {
        return (ASCII[first as usize], 1);
    }
    wide_class_at(text, at, first)
}

#[inline]
fn wide_class_at(text: &[u8], at: usize, first: u8) -> (u8, usize) {
    let tail = |k: usize| (text[at + k] & 0x3F) as u32;
    if first < 0xE0 {
        (class_of((first as u32 & 0x1F) << 6 | tail(1)), 2)
    } else if first < 0xF0 {
        (class_of((first as u32 & 0x0F) << 12 | tail(1) << 6 | tail(2)), 3)
    } else {
        (class_of((first as u32 & 0x07) << 18 | tail(1) << 12 | tail(2) << 6 | tail(3)), 4)
    }
}
