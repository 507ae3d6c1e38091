//! Properties on random input, against the plainest implementations. More of it: `PROPTEST_CASES=1000000 cargo test`.

use nanochat_rustbpe::encoder::Specials;
use nanochat_rustbpe::merge::{encode_piece, merge_piece};
use nanochat_rustbpe::split::{PATTERN_2, PATTERN_3};
use nanochat_rustbpe::stream::Utf8Stream;
use nanochat_rustbpe::vocabulary::NO_RANK;
use nanochat_rustbpe::{train, Encoding, Splitter, Vocabulary, WordCounts};
use proptest::prelude::*;
use std::collections::HashMap;
use std::ops::ControlFlow;
use std::sync::OnceLock;

/// Characters that the pattern tells apart, from all parts of Unicode.
fn character() -> impl Strategy<Value = char> {
    let edges: Vec<char> = "aZéſKǅ中'’0٣½Ⅷ \t\n\r\x0b\x0c\x1c\x1f\u{85}\u{a0}\u{1680}\u{2028}\u{3000}\u{200b}.,!_$´\u{301}😀\u{20000}\u{1D400}lLvVeErRsSdDmMtT"
        .chars()
        .collect();
    prop_oneof![4 => proptest::sample::select(edges), 2 => proptest::char::range('\0', '\x7f'), 1 => any::<char>()]
}

fn text(longest: usize) -> impl Strategy<Value = String> {
    proptest::collection::vec(character(), 0..longest).prop_map(String::from_iter)
}

fn regexes() -> &'static [(Splitter, Splitter); 2] {
    static BOTH: OnceLock<[(Splitter, Splitter); 2]> = OnceLock::new();
    BOTH.get_or_init(|| {
        [PATTERN_2, PATTERN_3].map(|pattern| (Splitter::new(pattern).unwrap(), Splitter::regex(pattern).unwrap()))
    })
}

/// The rule of encoding, word by word.
fn join_plainly(ranks: &HashMap<Vec<u8>, u32>, piece: &[u8]) -> Vec<u32> {
    if let Some(id) = ranks.get(piece) {
        return vec![*id];
    }
    let mut parts: Vec<Vec<u8>> = piece.iter().map(|byte| vec![*byte]).collect();
    loop {
        let joins = (1..parts.len()).filter_map(|i| Some((*ranks.get(&parts[i - 1..=i].concat())?, i)));
        let Some((_, at)) = joins.min() else {
            return parts.iter().map(|part| ranks[part]).collect();
        };
        let right = parts.remove(at);
        parts[at - 1].extend(right);
    }
}

fn bytes_and(tokens: Vec<Vec<u8>>) -> HashMap<Vec<u8>, u32> {
    let mut ranks: HashMap<Vec<u8>, u32> = (0..=255u8).map(|byte| (vec![byte], byte as u32)).collect();
    for token in tokens {
        let next = ranks.len() as u32;
        ranks.entry(token).or_insert(next);
    }
    ranks
}

fn trained(texts: &[&str], count: usize) -> Vec<(u32, u32)> {
    let mut words = WordCounts::new();
    for text in texts {
        words.add_text(&regexes()[0].0, text).unwrap();
    }
    train::train(&words, count, &mut |_| ControlFlow::Continue(())).unwrap()
}

proptest! {
    #[test]
    fn split_by_hand_equals_the_regex(text in text(60)) {
        for (by_hand, by_regex) in regexes() {
            let pieces = by_hand.pieces(&text).unwrap();
            prop_assert_eq!(&pieces, &by_regex.pieces(&text).unwrap());
            prop_assert_eq!(pieces.concat(), text.as_str());
        }
    }

    #[test]
    fn joins_follow_the_rule_for_any_ranks(
        tokens in proptest::collection::vec(proptest::collection::vec(b'a'..=b'c', 2..7), 0..40),
        piece in proptest::collection::vec(b'a'..=b'd', 1..200),
    ) {
        let ranks = bytes_and(tokens);
        let vocabulary = Vocabulary::new(ranks.clone()).unwrap();
        for length in [piece.len(), piece.len().min(16), piece.len().min(17), piece.len().min(64), piece.len().min(65)] {
            let mut ids = Vec::new();
            encode_piece(&vocabulary, &piece[..length], |id| ids.push(id));
            prop_assert_eq!(ids, join_plainly(&ranks, &piece[..length]));
        }
    }

    #[test]
    fn text_comes_back(texts in proptest::collection::vec(text(80), 0..8), threads in 1usize..4) {
        let vocabulary = Vocabulary::from_merges(&[(b'a' as u32, b'a' as u32), (256, 256), (b' ' as u32, 257)]).unwrap();
        let encoding = Encoding::new(vocabulary, regexes()[0].0.clone(), vec![("<|bos|>".into(), 300)]).unwrap();
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        let (ids, offsets) = encoding.encode_batch::<u16>(&texts, Some(300), Specials::Never, threads).unwrap();
        for (text, range) in texts.iter().zip(offsets.windows(2)) {
            let own = &ids[range[0] as usize..range[1] as usize];
            let mut bytes = Vec::new();
            encoding.decode_into(own[1..].iter().map(|id| *id as u32), &mut bytes).unwrap();
            prop_assert_eq!(own[0], 300);
            prop_assert_eq!(bytes, text.as_bytes());
        }
    }

    #[test]
    fn a_stream_shows_what_lossy_decoding_shows(bytes in proptest::collection::vec(any::<u8>(), 0..60), step in 1usize..5) {
        let mut stream = Utf8Stream::default();
        let mut shown: String = bytes.chunks(step).map(|chunk| stream.push(chunk)).collect();
        shown += &stream.flush();
        prop_assert_eq!(shown, String::from_utf8_lossy(&bytes));
    }

    #[test]
    fn the_bound_does_not_change_the_merges(words in proptest::collection::vec(("[ab]{1,6}", 1u64..50), 1..20), bound in 0u64..200) {
        let mut counts = WordCounts::new();
        for (word, count) in &words {
            counts.add(word.as_bytes(), *count);
        }
        let mut proceed = |_| ControlFlow::Continue(());
        for merges in [1, 3, 6] {
            let plain = train::train_with_bound(&counts, merges, 0, &mut proceed);
            prop_assert_eq!(train::train_with_bound(&counts, merges, bound, &mut proceed), plain);
        }
    }

    #[test]
    fn trained_tokens_are_reached_by_joins(text in "[abc ]{20,200}") {
        let vocabulary = Vocabulary::from_merges(&trained(&[&text, "ab bc ca"], 2)).unwrap();
        prop_assert!(vocabulary.joins_reach_all());
        for (id, bytes) in vocabulary.tokens() {
            let mut ids = Vec::new();
            merge_piece(&vocabulary, bytes, NO_RANK, |part| ids.push(part));
            prop_assert_eq!(ids, vec![id]);
        }
    }
}
