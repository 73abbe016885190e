//! Choosing the next token by its logits, with a random number that is given: pure.
//!
//! Logits are one number a token, `[vocabulary]` fp32 without NaN; a token of −∞ has probability 0. Sums that choose
//! are in fp64.

use super::request::{Choice, TokenLogProb};
use crate::{
    ops::cpu::{Isa, LANES, Real, lanes},
    rng::Stream,
};
use std::cmp::Ordering;

/// Tokens that are sorted at first in search of those that make up `top_p`; four times as many each time.
const FIRST_SORTED: usize = 64;

/// Exponentials that are summed in fp32.
const SUMMED: usize = 64 * LANES;

/// The random number in [0, 1) of token `index` of a continuation, with 53 random bits.
pub fn uniform(seed: u64, continuation: usize, index: usize) -> f64 {
    let bits = Stream::new(seed, &format!("continuation.{continuation}")).bits(index as u64);
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

/// The token that `uniform` in [0, 1) points at: the first, by id, of those that may be chosen, at which the sum of
/// probabilities exceeds it.
pub fn choose(logits: &[f32], choice: Choice, uniform: f64) -> usize {
    let likeliest = likeliest(logits);
    let highest = logits.get(likeliest).copied().map_or(f64::NEG_INFINITY, f64::from);
    if choice.temperature == 0.0 || choice.top_k == Some(1) || !highest.is_finite() {
        return likeliest;
    }
    let weight = |&id: &u32| ((f64::from(logits[id as usize]) - highest) / choice.temperature).exp();
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    if let Some(k) = choice.top_k.filter(|k| (1..ids.len()).contains(k)) {
        ids.select_nth_unstable_by(k - 1, by_likelihood(logits));
        ids.truncate(k);
    }
    if choice.top_p < 1.0 {
        keep_top_p(&mut ids, choice.top_p, by_likelihood(logits), weight);
    }
    ids.sort_unstable();
    let weights: Vec<f64> = ids.iter().map(weight).collect();
    let target = uniform * weights.iter().sum::<f64>();
    let mut sum = 0.0;
    let chosen = weights.iter().position(|weight| {
        sum += weight;
        sum > target
    });
    chosen.map_or(likeliest, |at| ids[at] as usize)
}

/// Keeps the fewest most likely of `ids` whose weights reach `top_p` of the sum of all, at least one.
fn keep_top_p(
    ids: &mut Vec<u32>,
    top_p: f64,
    order: impl Fn(&u32, &u32) -> Ordering,
    weight: impl Fn(&u32) -> f64,
) {
    let target = top_p * ids.iter().map(&weight).sum::<f64>();
    let (mut sum, mut sorted, mut block) = (0.0, 0, FIRST_SORTED);
    while sorted < ids.len() {
        let rest = &mut ids[sorted..];
        let next = block.min(rest.len());
        sort_first(rest, next, &order);
        let reaches = rest[..next].iter().position(|id| {
            sum += weight(id);
            sum >= target
        });
        if let Some(at) = reaches {
            ids.truncate(sorted + at + 1);
            return;
        }
        sorted += next;
        block *= 4;
    }
}

/// ln Σ exp(logit); `None` where a logit is not finite. The exponentials are fp32, summed in blocks.
pub fn log_sum_exp(logits: &[f32]) -> Option<f64> {
    let level = Isa::current();
    let highest = level.run(
        #[inline(always)]
        || lanes::maximum(logits),
    );
    let (mut sum, mut finite) = (0.0, highest.is_finite());
    for block in logits.chunks(SUMMED) {
        let (own, lowest) = level.run(
            #[inline(always)]
            || exponentials(block, highest),
        );
        finite &= own.is_finite() && lowest.is_finite();
        sum += f64::from(own);
    }
    finite.then(|| f64::from(highest) + sum.ln())
}

/// Σ exp(logit − highest), and the lowest logit.
#[inline(always)]
fn exponentials(logits: &[f32], highest: f32) -> (f32, f32) {
    let (mut sums, mut lowest) = ([0.0; LANES], [f32::INFINITY; LANES]);
    let mut take = |lane: usize, logit: f32| {
        sums[lane] += Real::exp(logit - highest);
        lowest[lane] = if logit < lowest[lane] { logit } else { lowest[lane] };
    };
    let (vectors, tail) = logits.as_chunks::<LANES>();
    for vector in vectors {
        for (lane, &logit) in vector.iter().enumerate() {
            take(lane, logit);
        }
    }
    for (lane, &logit) in tail.iter().enumerate() {
        take(lane, logit);
    }
    (lanes::total(sums), lowest.into_iter().fold(f32::INFINITY, f32::min))
}

/// The `n` most likely tokens, the most likely first, of equals that with the smaller id first.
pub fn top(logits: &[f32], log_sum_exp: f64, n: usize) -> Vec<TokenLogProb> {
    let n = n.min(logits.len());
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    sort_first(&mut ids, n, by_likelihood(logits));
    let log_prob = |id: u32| (f64::from(logits[id as usize]) - log_sum_exp) as f32;
    ids[..n].iter().map(|&id| (i64::from(id), log_prob(id))).collect()
}

/// The most likely token, the first of equals.
fn likeliest(logits: &[f32]) -> usize {
    let highest = Isa::current().run(
        #[inline(always)]
        || lanes::maximum(logits),
    );
    logits.iter().position(|&logit| logit == highest).unwrap_or(0)
}

/// Orders ids by logit, the highest first, then by id. Adding 0 makes −0 equal to 0.
fn by_likelihood(logits: &[f32]) -> impl Fn(&u32, &u32) -> Ordering {
    let logit = |&id: &u32| logits[id as usize] + 0.0;
    move |a, b| logit(b).total_cmp(&logit(a)).then(a.cmp(b))
}

/// Brings the first `n` of `order` to the front, sorted.
fn sort_first(ids: &mut [u32], n: usize, order: impl Fn(&u32, &u32) -> Ordering) {
    if (1..ids.len()).contains(&n) {
        ids.select_nth_unstable_by(n - 1, &order);
    }
    ids[..n].sort_unstable_by(&order);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ALL: Choice = Choice { temperature: 1.0, top_p: 1.0, top_k: None };

    /// Probabilities by the definition: sort all, cut, softmax, cut.
    fn probabilities(logits: &[f32], choice: Choice) -> Vec<f64> {
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|&a, &b| logits[b].partial_cmp(&logits[a]).unwrap().then(a.cmp(&b)));
        order.truncate(choice.top_k.unwrap_or(logits.len()));
        let highest = f64::from(logits[order[0]]);
        let weights: Vec<f64> =
            order.iter().map(|&id| ((f64::from(logits[id]) - highest) / choice.temperature).exp()).collect();
        let total: f64 = weights.iter().sum();
        let (mut all, mut sum) = (vec![0.0; logits.len()], 0.0);
        for (&id, weight) in order.iter().zip(&weights) {
            all[id] = weight / total;
            sum += weight / total;
            if choice.top_p < 1.0 && sum >= choice.top_p {
                break;
            }
        }
        let kept: f64 = all.iter().sum();
        all.iter().map(|p| p / kept).collect()
    }

    fn noise(n: usize, scale: f32) -> Vec<f32> {
        let stream = Stream::new(11, "logits");
        (0..n as u64).map(|i| scale * stream.normal(i)).collect()
    }

    #[test]
    fn the_frequency_of_a_token_is_its_probability() {
        let logits = noise(300, 1.5);
        let choices = [
            ALL,
            Choice { temperature: 0.6, ..ALL },
            Choice { temperature: 1.7, top_p: 0.9, top_k: None },
            Choice { top_k: Some(20), ..ALL },
            Choice { temperature: 1.3, top_p: 0.8, top_k: Some(100) },
        ];
        for (seed, choice) in choices.into_iter().enumerate() {
            let draws = 60_000;
            let mut counts = vec![0.0; logits.len()];
            for i in 0..draws {
                counts[choose(&logits, choice, uniform(seed as u64, 0, i))] += 1.0;
            }
            let expected = probabilities(&logits, choice);
            let (mut square, mut cells, mut rest) = (0.0, 0.0, [0.0, 0.0]);
            for (&count, p) in counts.iter().zip(&expected) {
                let mean = p * draws as f64;
                assert!(mean > 0.0 || count == 0.0, "{choice:?} chose a token that it excludes");
                // Rare tokens are counted together, for the test needs five of each.
                if mean < 5.0 {
                    rest = [rest[0] + count, rest[1] + mean];
                } else {
                    square += (count - mean) * (count - mean) / mean;
                    cells += 1.0;
                }
            }
            if rest[1] > 0.0 {
                square += (rest[0] - rest[1]) * (rest[0] - rest[1]) / rest[1];
            }
            let limit = cells + 4.0 * f64::sqrt(2.0 * cells);
            assert!(square < limit, "{choice:?}: χ² {square:.1} of {cells} cells, limit {limit:.1}");
        }
    }

    #[test]
    fn temperature_zero_takes_the_first_of_the_most_likely() {
        let greedy = Choice { temperature: 0.0, top_p: 0.1, top_k: Some(3) };
        assert_eq!(choose(&[1.0, 3.0, 2.0, 3.0], greedy, 0.99), 1);
        assert_eq!(choose(&[-0.0, 0.0], greedy, 0.99), 0);
        assert_eq!(choose(&[f32::NEG_INFINITY, f32::NEG_INFINITY, -9.0], greedy, 0.0), 2);
        let one = Choice { top_k: Some(1), ..ALL };
        assert_eq!(choose(&[1.0, 3.0, 2.0, 3.0], one, 0.99), 1);
    }

    #[test]
    fn extreme_temperatures_are_the_limits_of_the_formula() {
        let logits = [2.0, 5.0, f32::NEG_INFINITY, 4.999];
        let cold = Choice { temperature: 1e-6, ..ALL };
        let hot = Choice { temperature: 1e6, ..ALL };
        for i in 0..1000 {
            let u = f64::from(i) / 1000.0;
            assert_eq!(choose(&logits, cold, u), 1);
            assert_eq!(choose(&logits, hot, u), [0, 1, 3][(u * 3.0) as usize], "at {u}");
            assert_eq!(choose(&[f32::MAX, f32::MIN], cold, u), 0);
        }
        assert_eq!(choose(&[1.0; 4], Choice { temperature: 5e-324, ..ALL }, 0.6), 2);
    }

    #[test]
    fn a_token_that_may_be_chosen_is_never_lost() {
        // One token of 1 − 1e-12 beside a rare one: the last number below 1 points at the rare one.
        let last = 1.0 - f64::EPSILON / 2.0;
        assert_eq!(choose(&[0.0, -27.0], ALL, last), 1);
        assert_eq!(choose(&[0.0, -27.0, f32::NEG_INFINITY], ALL, last), 1);
        assert_eq!(choose(&[-27.0, 0.0], ALL, 0.0), 0);
        assert_eq!(choose(&[0.0, -27.0], Choice { top_p: 0.999, ..ALL }, last), 0);
        assert_eq!(choose(&[0.0, 0.0, 0.0], Choice { top_p: 1e-300, ..ALL }, last), 0);
    }

    #[test]
    fn numbers_are_a_function_of_seed_continuation_and_index() {
        let numbers: Vec<f64> = (0..20_000).map(|i| uniform(3, 1, i)).collect();
        let mean = numbers.iter().sum::<f64>() / 20_000.0;
        assert!((mean - 0.5).abs() < 0.01, "mean {mean}");
        assert!(numbers.iter().all(|u| (0.0..1.0).contains(u)));
        assert_eq!(numbers[7], uniform(3, 1, 7));
        assert_ne!(uniform(3, 1, 7), uniform(3, 2, 7));
        assert_ne!(uniform(3, 1, 7), uniform(4, 1, 7));
        // 53 bits: some number has digits beyond the 24 of fp32.
        assert!(numbers.iter().any(|&u| f64::from(u as f32) != u));
    }

    #[test]
    fn log_sum_exp_equals_its_formula_and_does_not_overflow() {
        let logits = noise(1000, 2.0);
        let plain = logits.iter().map(|&logit| f64::from(logit).exp()).sum::<f64>().ln();
        let ours = log_sum_exp(&logits).unwrap();
        assert!((ours - plain).abs() < 2e-7 * plain.abs(), "{ours} {plain}");
        // As many as a large vocabulary has.
        let many = noise(150_001, 4.0);
        let plain = many.iter().map(|&logit| f64::from(logit).exp()).sum::<f64>().ln();
        let ours = log_sum_exp(&many).unwrap();
        assert!((ours - plain).abs() < 2e-7 * plain.abs(), "{ours} {plain}");
        assert_eq!(log_sum_exp(&[1e4, 1e4]), Some(1e4 + f64::ln(2.0)));
        assert_eq!(log_sum_exp(&[-1e4, 0.0]), Some(0.0));
        for broken in [f32::NEG_INFINITY, f32::INFINITY, f32::NAN] {
            for at in [0, 70, 2000] {
                let mut logits = vec![0.5; 2001];
                logits[at] = broken;
                assert_eq!(log_sum_exp(&logits), None, "{broken} {at}");
            }
        }
    }

    proptest! {
        #[test]
        fn a_choice_inverts_the_sum_of_the_formula(
            steps in proptest::collection::vec(-8i8..8, 1..400),
            temperature in prop_oneof![Just(1e-6), Just(1e6), 0.05f64..3.0],
            top_p in prop_oneof![Just(1.0), 0.01f64..1.0],
            top_k in proptest::option::of(1usize..500),
            u in 0.0f64..1.0,
        ) {
            // Whole numbers of halves: many equals.
            let logits: Vec<f32> = steps.iter().map(|&step| f32::from(step) / 2.0).collect();
            let choice = Choice { temperature, top_p, top_k };
            let chosen = choose(&logits, choice, u);
            let all = probabilities(&logits, choice);
            let before: f64 = all[..chosen].iter().sum();
            prop_assert!(before <= u + 1e-9 && u < before + all[chosen] + 1e-9,
                "{chosen}: {u} is not in {before} + {}", all[chosen]);
        }

        #[test]
        fn the_most_likely_equal_a_full_sort(
            steps in proptest::collection::vec(-20i8..20, 1..300), n in 0usize..400,
        ) {
            let logits: Vec<f32> = steps.iter().map(|&step| f32::from(step) / 4.0).collect();
            let lse = log_sum_exp(&logits).unwrap();
            let mut all: Vec<TokenLogProb> =
                logits.iter().enumerate().map(|(id, &l)| (id as i64, (f64::from(l) - lse) as f32)).collect();
            all.sort_by(|a, b| b.1.partial_cmp(&a.1).unwrap().then(a.0.cmp(&b.0)));
            all.truncate(n);
            prop_assert_eq!(top(&logits, lse, n), all);
        }
    }
}
