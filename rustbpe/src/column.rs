//! Texts end to end, as an Arrow string column keeps them: the bytes of all, and where each begins.

use std::borrow::Cow;

use crate::{invalid, Error};

/// Text i is `data[offsets[i]..offsets[i + 1]]`; `offsets` need not begin at 0 (a slice of a column does not). Offsets
/// that leave `data` are an error. So is a text that is not UTF-8, unless `replace` is set: then U+FFFD stands for what
/// is broken in it.
pub fn texts<'d, O: Copy + TryInto<usize>>(
    data: &'d [u8],
    offsets: &[O],
    replace: bool,
) -> Result<Vec<Cow<'d, str>>, Error> {
    let at = |offset: O| offset.try_into().unwrap_or(usize::MAX);
    let cut = |(index, bounds): (usize, &[O])| {
        let Some(bytes) = data.get(at(bounds[0])..at(bounds[1])) else {
            return invalid(format!("the offsets of text {index} do not lie within the {} bytes of data", data.len()));
        };
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(Cow::Borrowed(text)),
            Err(_) if replace => Ok(String::from_utf8_lossy(bytes)),
            Err(error) => invalid(format!("text {index} is not valid UTF-8: {error}")),
        }
    };
    offsets.windows(2).enumerate().map(cut).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_empty_texts_and_columns() {
        let data = "äbcd".as_bytes();
        assert_eq!(texts(data, &[2i32, 3, 3, 5], false).unwrap(), ["b", "", "cd"]);
        assert!(texts(data, &[2i64], false).unwrap().is_empty() && texts::<i64>(data, &[], false).unwrap().is_empty());
    }

    #[test]
    fn what_is_no_text_is_refused_or_replaced() {
        let data = b"ab\xFFcd";
        for wrong in [[0, 9], [-1, 2], [3, 2]] {
            assert!(texts(data, &wrong, true).is_err());
        }
        assert!(texts(data, &[0i32, 2, 5], false).unwrap_err().to_string().starts_with("text 1 is not valid UTF-8"));
        assert_eq!(texts(data, &[0i32, 2, 5], true).unwrap(), ["ab", "\u{FFFD}cd"]);
        assert!(texts("ä".as_bytes(), &[0i32, 1, 2], false).is_err());
    }
}
