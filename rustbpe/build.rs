//! Generates the two-stage table of character classes that the splitter reads.
//!
//! The ranges come from the very release of regex-syntax that the regex engine uses (both pinned in Cargo.toml), so the
//! hand-written splitter and the regex can never disagree about what a letter is. Stage one maps the upper bits of a
//! code point to a block; equal blocks are stored once, which shrinks 1.1 million classes to some tens of kilobytes.

use regex_syntax::hir::{Class, HirKind};
use std::{env, fmt::Write, fs, path::Path};

/// Code points per block. 128 keeps stage one in 8.5 KiB and lets one block serve most of a script.
const BLOCK: usize = 128;
/// Of regex-syntax 0.8.11's tables; change it together with that pin.
const UNICODE_VERSION: &str = "16.0.0";

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let mut class_of = vec![0u8; 0x11_0000];
    // Later entries override earlier ones: newlines are white space too.
    for (class, pattern) in [(1u8, r"\p{L}"), (2, r"\p{N}"), (3, r"\s"), (4, r"[\r\n]")] {
        let hir = regex_syntax::parse(pattern).expect("a class that regex-syntax knows");
        let HirKind::Class(Class::Unicode(ranges)) = hir.kind() else {
            panic!("{pattern} is not a Unicode class");
        };
        for range in ranges.ranges() {
            class_of[range.start() as usize..=range.end() as usize].fill(class);
        }
    }

    let mut blocks: Vec<&[u8]> = Vec::new();
    let mut index = Vec::new();
    for block in class_of.chunks(BLOCK) {
        let found = blocks.iter().position(|known| *known == block);
        index.push(found.unwrap_or(blocks.len()));
        if found.is_none() {
            blocks.push(block);
        }
    }
    assert!(blocks.len() <= 256, "stage one holds bytes");

    let mut source = String::new();
    writeln!(source, "/// Version of the Unicode tables behind the classes.").unwrap();
    writeln!(source, "pub const UNICODE_VERSION: &str = {UNICODE_VERSION:?};").unwrap();
    writeln!(source, "static BLOCK_OF: [u8; {}] = {index:?};", index.len()).unwrap();
    writeln!(source, "static CLASSES: [[u8; {BLOCK}]; {}] = {blocks:?};", blocks.len()).unwrap();
    let folder = env::var("OUT_DIR").expect("cargo sets OUT_DIR");
    fs::write(Path::new(&folder).join("unicode_tables.rs"), source).expect("OUT_DIR is writable");
}
