//! Splitting, counting, training and encoding, one thread each. `CORPUS=file cargo bench` reads a text file of yours.

use criterion::{criterion_group, criterion_main, Criterion, Throughput};
use nanochat_rustbpe::encoder::Specials;
use nanochat_rustbpe::{split, train, Encoding, Splitter, Vocabulary, WordCounts};
use std::ops::ControlFlow;

fn corpus() -> String {
    match std::env::var("CORPUS") {
        Ok(path) => std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("cannot read {path}: {error}")),
        // Something every checkout has, long enough to outgrow the first-level cache.
        Err(_) => [include_str!("../src/train.rs"), include_str!("../src/merge.rs"), include_str!("../README.md")]
            .concat()
            .repeat(20),
    }
}

fn pipeline(criterion: &mut Criterion) {
    let text = corpus();
    let splitter = Splitter::new(split::PATTERN_2).expect("our own pattern");
    let count = || {
        let mut words = WordCounts::new();
        words.add_text(&splitter, &text).expect("no regex, no failure");
        words
    };
    let words = count();
    let learn = || train::train(&words, 500, &mut |_| ControlFlow::Continue(())).expect("more merges than that");
    let vocabulary = Vocabulary::from_merges(&learn()).expect("merges make a vocabulary");
    let encoding = Encoding::new(vocabulary, splitter.clone(), vec![]).expect("a vocabulary makes an encoding");

    let mut group = criterion.benchmark_group("pipeline");
    group.throughput(Throughput::Bytes(text.len() as u64)).sample_size(20);
    group.bench_function("split", |bencher| {
        bencher.iter(|| {
            let mut pieces = 0usize;
            splitter.for_each(&text, |_, _| pieces += 1).map(|()| pieces)
        })
    });
    group.bench_function("count", |bencher| bencher.iter(count));
    group.bench_function("train", |bencher| bencher.iter(learn));
    group.bench_function("encode", |bencher| {
        bencher.iter(|| {
            let mut ids: Vec<u16> = Vec::new();
            encoding.encode_into(&text, Specials::Never, &mut ids).map(|()| ids)
        })
    });
    let letters = "a".repeat(1 << 20);
    group.throughput(Throughput::Bytes(letters.len() as u64));
    group.bench_function("encode a megabyte of one letter", |bencher| {
        bencher.iter(|| {
            let mut ids: Vec<u16> = Vec::new();
            encoding.encode_into(&letters, Specials::Never, &mut ids).map(|()| ids)
        })
    });
    group.finish();
}

criterion_group!(benches, pipeline);
criterion_main!(benches);
