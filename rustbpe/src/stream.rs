//! Decoding a stream of tokens without ever showing half a character.
//!
//! A token may end in the middle of a character, so bytes wait here until it is complete. Bytes that can no longer
//! become valid UTF-8 turn into U+FFFD at once, one for each maximal broken sequence, as Python's `errors="replace"`
//! and `String::from_utf8_lossy` do it: the concatenation of all outputs is the lossy decoding of all bytes.

/// Bytes that may still become a character: at most three.
#[derive(Clone, Default)]
pub struct Utf8Stream {
    waiting: Vec<u8>,
}

impl Utf8Stream {
    /// The text that is certain after these bytes.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        self.waiting.extend_from_slice(bytes);
        let mut text = String::new();
        let mut rest = &self.waiting[..];
        loop {
            match std::str::from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    rest = &[];
                    break;
                }
                Err(error) => {
                    let (valid, broken) = rest.split_at(error.valid_up_to());
                    text.push_str(std::str::from_utf8(valid).expect("checked just now"));
                    match error.error_len() {
                        Some(length) => {
                            text.push('\u{FFFD}');
                            rest = &broken[length..];
                        }
                        None => {
                            rest = broken;
                            break;
                        }
                    }
                }
            }
        }
        self.waiting = rest.to_vec();
        text
    }

    /// What is left at the end: one U+FFFD if a character was never completed.
    pub fn flush(&mut self) -> String {
        let text = String::from_utf8_lossy(&self.waiting).into_owned();
        self.waiting.clear();
        text
    }
}
