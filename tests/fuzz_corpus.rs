//! Inputs of the fuzz targets, kept ones and those that were findings once: each is read or refused, without a panic
//! and within bounds of time and memory. `ci/long.sh fuzz` makes new ones.

#[path = "fuzz/targets/mod.rs"]
pub mod targets;

use std::{
    collections::BTreeSet,
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};
use targets::{TARGETS, Target};

/// Time for an input in a debug build on a busy machine.
const LONGEST: Duration = Duration::from_secs(10);

/// Bytes of all inputs.
const MOST_BYTES: u64 = 300_000;

fn sorted(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths
}

fn corpus() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus")
}

#[test]
fn every_input_is_read_or_refused() {
    let corpus = corpus();
    let named: BTreeSet<PathBuf> = TARGETS.iter().map(|target| corpus.join(target.name)).collect();
    assert_eq!(sorted(&corpus), Vec::from_iter(named), "a folder for each target");
    let mut bytes = 0;
    for target in TARGETS {
        let paths = sorted(&corpus.join(target.name));
        assert!(!paths.is_empty(), "{} has no input", target.name);
        for path in paths {
            // Shown where the process ends.
            println!("{}", path.display());
            let input = fs::read(&path).unwrap();
            bytes += input.len() as u64;
            let begin = Instant::now();
            target.run(&input);
            let took = begin.elapsed();
            assert!(took < LONGEST, "{}: {took:?}", path.display());
        }
    }
    assert!(bytes <= MOST_BYTES, "{bytes} bytes of inputs, at most {MOST_BYTES} are kept");
}

/// Changes of inputs without a look at what they reach. Of a seed, so that a finding comes again.
struct Mutator {
    state: u64,
}

impl Mutator {
    /// A number below `n`, by xorshift64*.
    fn below(&mut self, n: usize) -> usize {
        self.state ^= self.state >> 12;
        self.state ^= self.state << 25;
        self.state ^= self.state >> 27;
        (self.state.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) as usize % n.max(1)
    }

    fn change(&mut self, input: &mut Vec<u8>, other: &[u8]) {
        const WORDS: [&[u8]; 16] = [
            b"\xff\xff\xff\xff\xff\xff\xff\x7f",
            b"\xff\xff\xff\x7f",
            b"\0\0\0\0\0\0\0\0",
            b"\x80",
            b"null",
            b"-1",
            b"1e308",
            b"18446744073709551615",
            b"{",
            b"}",
            b"[",
            b"]",
            b"\"",
            b"0",
            b"[[[[",
            b"\xf0\x9f\x98\x80",
        ];
        let at = self.below(input.len() + 1);
        let end = (at + self.below(9)).min(input.len());
        match self.below(8) {
            0 if at < input.len() => input[at] ^= 1 << self.below(8),
            1 if at < input.len() => input[at] = self.below(256) as u8,
            2 => drop(input.drain(at..end)),
            3 => drop(input.splice(at..end, WORDS[self.below(WORDS.len())].iter().copied())),
            4 => drop(input.splice(at..at, WORDS[self.below(WORDS.len())].iter().copied())),
            5 => {
                let from = self.below(other.len() + 1);
                let to = (from + self.below(64)).min(other.len());
                drop(input.splice(at..end, other[from..to].iter().copied()));
            }
            6 => {
                let copied = input[at..end].repeat(1 + self.below(4));
                drop(input.splice(at..at, copied));
            }
            _ if self.below(8) == 0 => input.truncate(at),
            _ => {}
        }
    }
}

/// Reads changed inputs of `target` until `goes_on` says no; returns how many, and those at which it panicked.
fn mutate(target: &Target, seed: u64, mut goes_on: impl FnMut(usize) -> bool) -> (usize, Vec<Vec<u8>>) {
    let seeds: Vec<Vec<u8>> =
        sorted(&corpus().join(target.name)).iter().map(|path| fs::read(path).unwrap()).collect();
    let (mut mutator, mut count, mut found) = (Mutator { state: seed | 1 }, 0, Vec::new());
    let last = std::env::var_os("XORL_FUZZ_LAST").map(PathBuf::from);
    while goes_on(count) {
        let [own, other] = [0; 2].map(|_| mutator.below(seeds.len()));
        let mut input = seeds[own].clone();
        for _ in 0..1 + mutator.below(6) {
            mutator.change(&mut input, &seeds[other]);
        }
        // What ends the process is there afterwards.
        last.iter().for_each(|path| fs::write(path, &input).unwrap());
        count += 1;
        let begin = Instant::now();
        let is_read = catch_unwind(AssertUnwindSafe(|| target.run(&input))).is_ok();
        if !is_read || begin.elapsed() > LONGEST {
            found.push(input);
        }
    }
    (count, found)
}

#[test]
fn changed_inputs_are_read_or_refused() {
    for target in TARGETS {
        let (_, found) = mutate(target, 1, |count| count < 40);
        assert!(found.is_empty(), "{}: {found:02x?}", target.name);
    }
}

/// `XORL_FUZZ_TARGET`, `XORL_FUZZ_SECONDS` and `XORL_FUZZ_SEED` say what, for how long and how; findings go to the
/// folder `XORL_FUZZ_FOUND`.
#[test]
#[ignore = "as long as it is told: where no time is for the build of ci/long.sh fuzz"]
fn many_changed_inputs_are_read_or_refused() {
    let told = |name: &str| std::env::var(name).unwrap();
    let target = TARGETS.iter().find(|target| target.name == told("XORL_FUZZ_TARGET")).unwrap();
    let (seconds, seed) =
        (told("XORL_FUZZ_SECONDS").parse().unwrap(), told("XORL_FUZZ_SEED").parse().unwrap());
    let begin = Instant::now();
    let (count, found) = mutate(target, seed, |_| begin.elapsed() < Duration::from_secs(seconds));
    println!("{}: {count} inputs in {:?}, {} findings", target.name, begin.elapsed(), found.len());
    for (index, input) in found.iter().enumerate().take(20) {
        fs::write(Path::new(&told("XORL_FUZZ_FOUND")).join(format!("{}-{seed}-{index}", target.name)), input)
            .unwrap();
    }
    assert!(found.is_empty());
}
