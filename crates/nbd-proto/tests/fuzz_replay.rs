//! The fuzzers' corpus and some ten thousand mutations of it, on the stable toolchain.
//!
//! `UPDATE_CORPUS=1 cargo test -p nbd-proto --test fuzz_replay seeds` writes the corpus anew.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails where it stands")]

mod seeds;

use std::path::PathBuf;

use nbd_proto::fuzzing;

/// Mutations of each target's corpus. The lot takes less than a second.
const MUTATIONS: usize = 20_000;
/// Longest mutated input: what a mutation may grow a seed to.
const INPUT_BYTES_MAX: usize = 8192;
/// A fuzz target's name and its entry.
type Target = (&'static str, fn(&[u8]));
const TARGETS: [Target; 3] = [
    ("server_handshake", fuzzing::handshake),
    ("transmission", fuzzing::transmission),
    ("client", fuzzing::client),
];

fn corpus_dir(target: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(target)
}

/// Every file of a target's corpus, in the order of its names: also those a fuzzer added.
fn corpus(target: &str) -> Vec<(String, Vec<u8>)> {
    let entries = std::fs::read_dir(corpus_dir(target)).unwrap();
    let mut files: Vec<_> = entries
        .map(|entry| {
            let entry = entry.unwrap();
            let bytes = std::fs::read(entry.path()).unwrap();
            (entry.file_name().into_string().unwrap(), bytes)
        })
        .collect();
    files.sort();
    files
}

#[test]
fn committed_seeds_are_what_the_encoders_make() {
    // Goal: the corpus stays alive: a change of the encoders shows here, and its names stay true.
    let update = std::env::var_os("UPDATE_CORPUS").is_some();
    let seeds = seeds::all();
    if update {
        for (target, _) in TARGETS {
            std::fs::create_dir_all(corpus_dir(target)).unwrap();
        }
        for seed in &seeds {
            std::fs::write(corpus_dir(seed.target).join(seed.name), &seed.bytes).unwrap();
        }
    }
    for seed in &seeds {
        let path = corpus_dir(seed.target).join(seed.name);
        let committed = std::fs::read(&path).unwrap_or_default();
        assert!(committed == seed.bytes, "{} is not up to date", path.display());
    }
    for (target, _) in TARGETS {
        assert!(seeds.iter().filter(|seed| seed.target == target).count() >= 20, "{target}");
    }
}

#[test]
fn the_corpus_holds() {
    for (target, entry) in TARGETS {
        for (name, bytes) in corpus(target) {
            println!("{target}/{name}");
            entry(&bytes);
            // Cut anywhere, too.
            for cut in 0..bytes.len().min(300) {
                entry(&bytes[..cut]);
            }
        }
    }
}

#[test]
fn mutations_of_the_corpus_hold() {
    // Goal: what the fuzzers look for, a little of it on every run.
    // Method: a fixed sequence of mutations; a failure prints the input it came from.
    for (target, entry) in TARGETS {
        let corpus = corpus(target);
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        for round in 0..MUTATIONS {
            let (name, bytes) = &corpus[random.below(corpus.len())];
            let mut input = bytes.clone();
            for _ in 0..=random.below(4) {
                mutate(&mut input, &corpus, &mut random);
            }
            input.truncate(INPUT_BYTES_MAX);
            let result = std::panic::catch_unwind(|| entry(&input));
            assert!(result.is_ok(), "{target}/{name}, mutation {round}: {input:02x?}");
        }
    }
}

/// xorshift64: the same mutations on every machine and in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        let bound = u64::try_from(bound).unwrap();
        usize::try_from((self.0 >> 11) % bound).unwrap()
    }
}

fn mutate(input: &mut Vec<u8>, corpus: &[(String, Vec<u8>)], random: &mut Random) {
    let interesting: [&[u8]; 8] = [
        &[0xff; 4],
        &[0; 4],
        &[0x7f, 0xff, 0xff, 0xff],
        &[0x80, 0, 0, 0],
        &[0xff; 8],
        &[0, 0, 0, 0, 0x80, 0, 0, 0],
        b"IHAVEOPT",
        &[0x25, 0x60, 0x95, 0x13],
    ];
    if input.is_empty() {
        input.push(0);
    }
    let at = random.below(input.len());
    match random.below(6) {
        0 => input[at] ^= 1 << random.below(8),
        1 => input[at] = u8::try_from(random.below(256)).unwrap(),
        2 => input.truncate(at),
        3 => {
            let end = (at + 1 + random.below(40)).min(input.len());
            input.extend_from_within(at..end);
        }
        4 => {
            let bytes = interesting[random.below(interesting.len())];
            let end = (at + bytes.len()).min(input.len());
            input.splice(at..end, bytes.iter().copied());
        }
        _ => {
            let (_, other) = &corpus[random.below(corpus.len())];
            let start = random.below(other.len().max(1)).min(other.len());
            input.truncate(at);
            input.extend_from_slice(&other[start..]);
        }
    }
}
