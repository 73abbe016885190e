//! Times of operations by criterion, each with its share of what the machine reaches at something simple.

use criterion::{Criterion, Throughput};
use std::hint::black_box;
use std::time::{Duration, Instant};
use tch::{Device::Cpu, Kind, Tensor};
use xorl_dist::ops::cpu::Isa;

/// What an operation has to do at least, by what it is held against.
#[derive(Clone, Copy)]
pub enum Work {
    /// FLOP of matrix products.
    Products(i64),
    /// Bytes that it reads and writes elsewhere.
    Copied(i64),
    /// Bytes that it reads and writes, most of them in place: what is written need not come into the cache first.
    InPlace(i64),
}

impl Work {
    fn throughput(self) -> Throughput {
        match self {
            Self::Products(n) => Throughput::Elements(n as u64),
            Self::Copied(n) | Self::InPlace(n) => Throughput::BytesDecimal(n as u64),
        }
    }
}

/// Criterion, and the table.
pub struct Benches {
    criterion: Criterion,
    all_levels: bool,
    /// FLOP/s of the fastest product.
    product: f64,
    lines: Vec<String>,
}

impl Benches {
    pub fn new() -> Self {
        let second = Duration::from_secs(1);
        let short = Criterion::default().sample_size(10).warm_up_time(second).measurement_time(2 * second);
        let criterion = short.configure_from_args();
        let all_levels = std::env::var("XORL_BENCH_LEVELS").is_ok_and(|levels| levels == "all");
        // One core is at its best with what stays in its cache, many with a large one.
        let product = multiplied(512).max(multiplied(2048));
        Self { criterion, all_levels, product, lines: Vec::new() }
    }

    /// Measures `operation`.
    pub fn run<O>(&mut self, name: &str, work: Work, mut operation: impl FnMut() -> O) {
        self.run_on(|| (), name, work, |()| operation());
    }

    /// Measures `operation` on what `input` gives, which is not timed.
    pub fn run_on<I, O>(
        &mut self,
        mut input: impl FnMut() -> I,
        name: &str,
        work: Work,
        mut operation: impl FnMut(I) -> O,
    ) {
        let (group, function) = name.split_once('/').unwrap_or((name, "all"));
        let every = self.all_levels && ["norm", "attention"].contains(&group);
        for level in Isa::available().filter(|&level| every || level == Isa::current()) {
            let function = if every { format!("{function} {level:?}") } else { function.to_owned() };
            let mut times = Vec::new();
            let mut criterion = self.criterion.benchmark_group(group);
            criterion.throughput(work.throughput()).bench_function(&function, |bencher| {
                bencher.iter_custom(|count| {
                    let first = times.len();
                    level.forced(|| times.extend((0..count).map(|_| timed(&mut operation, input()))));
                    Duration::from_secs_f64(times[first..].iter().sum())
                });
            });
            criterion.finish();
            times.sort_by(f64::total_cmp);
            // There is none where criterion's filter leaves it out.
            if let Some(&median) = times.get(times.len() / 2) {
                self.add_line(&format!("{group}/{function}"), work, median);
            }
        }
    }

    /// Measures `operations`, by their names, in turns, so that what else runs slows all alike. Each has the share of
    /// the first one's speed that it keeps, the median over the turns.
    pub fn run_in_turns(&mut self, name: &str, work: Work, operations: &mut [(&str, &mut dyn FnMut())]) {
        let (group, function) = name.split_once('/').unwrap_or((name, "all"));
        let mut times: Vec<Vec<f64>> = operations.iter().map(|_| Vec::new()).collect();
        let mut criterion = self.criterion.benchmark_group(group);
        criterion.throughput(work.throughput()).bench_function(function, |bencher| {
            bencher.iter_custom(|count| {
                let first = times[0].len();
                for _ in 0..count {
                    for ((_, operation), times) in operations.iter_mut().zip(&mut times) {
                        times.push(timed(|()| operation(), ()));
                    }
                }
                Duration::from_secs_f64(times.iter().flat_map(|times| &times[first..]).sum())
            });
        });
        criterion.finish();
        let median = |mut times: Vec<f64>| {
            times.sort_by(f64::total_cmp);
            times.get(times.len() / 2).copied()
        };
        for ((label, _), own) in operations.iter().zip(&times) {
            let kept = times[0].iter().zip(own).map(|(first, own)| first / own).collect();
            // There is none where criterion's filter leaves it out.
            if let Some((seconds, kept)) = median(own.clone()).zip(median(kept)) {
                self.add_line(&format!("{group}/{function}, {label}, keeps {kept:.3}"), work, seconds);
            }
        }
    }

    fn add_line(&mut self, name: &str, work: Work, seconds: f64) {
        let (amount, unit, peak, of) = match work {
            Work::Products(n) => (n, "GFLOP/s", self.product, "bf16 mm"),
            Work::Copied(n) => (n, "GB/s", copied(n), "copy"),
            Work::InPlace(n) => (n, "GB/s", in_place(n), "in place"),
        };
        let (ms, rate, peak) = (seconds * 1e3, amount as f64 / seconds / 1e9, peak / 1e9);
        let (name, share) = (format!("{name}:"), 100.0 * rate / peak);
        self.lines.push(format!(
            "{name:<50}{ms:>9.3} ms{rate:>7.1} {unit:<7}{share:>5.0} % of {peak:.0} {unit} ({of})"
        ));
    }

    pub fn finish(self) {
        self.criterion.final_summary();
        if self.lines.is_empty() {
            return;
        }
        let [product, copy, place] =
            [self.product, copied(1 << 29), in_place(1 << 29)].map(|rate| rate / 1e9);
        println!("{} threads, {:?}: bf16 mm {product:.0} GFLOP/s", tch::get_num_threads(), Isa::current());
        println!("memory: copy {copy:.0} GB/s, in place {place:.0} GB/s");
        self.lines.iter().for_each(|line| println!("{line}"));
    }
}

/// Standard normal, bf16.
pub fn random(shape: &[i64]) -> Tensor {
    Tensor::randn(shape, (Kind::BFloat16, Cpu))
}

/// FLOP/s of a product of bf16 matrices [n, n].
fn multiplied(n: i64) -> f64 {
    let (a, b) = (random(&[n, n]), random(&[n, n]));
    (2 * n.pow(3)) as f64 / best(|| a.mm(&b))
}

/// Bytes read and written in a second by a copy that moves `bytes` in all.
fn copied(bytes: i64) -> f64 {
    let from = Tensor::ones([bytes / 8], (Kind::Float, Cpu));
    let mut to = from.copy();
    bytes as f64 / best(|| to.copy_(&from))
}

/// The same of numbers that change their sign.
fn in_place(bytes: i64) -> f64 {
    let mut numbers = Tensor::ones([bytes / 8], (Kind::Float, Cpu));
    bytes as f64 / best(|| numbers.neg_())
}

/// Seconds of `operation` at best.
fn best<O>(mut operation: impl FnMut() -> O) -> f64 {
    (0..10).map(|_| timed(|()| operation(), ())).fold(f64::INFINITY, f64::min)
}

/// Seconds that `operation` takes; the end of its result is not timed.
fn timed<I, O>(operation: impl FnOnce(I) -> O, input: I) -> f64 {
    let input = black_box(input);
    let start = Instant::now();
    let output = black_box(operation(input));
    let seconds = start.elapsed().as_secs_f64();
    drop(output);
    seconds
}
