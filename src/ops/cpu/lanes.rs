//! Reductions of a row in [`LANES`] partial results, held in vectors of any instruction set.

use super::{Element, Real};

/// Partial results of a reduction: a vector of AVX-512 in fp32.
pub const LANES: usize = 16;

/// Σ `term`(elements of `rows`, element of `weight`) over the columns.
#[inline(always)]
pub fn sum<E: Element, const N: usize>(
    rows: [&[E]; N],
    weight: &[E::Accum],
    term: impl Fn([E::Accum; N], E::Accum) -> E::Accum,
) -> E::Accum {
    let mut lanes = [E::Accum::ZERO; LANES];
    let (weights, weight_tail) = weight.as_chunks::<LANES>();
    let chunks = rows.map(|row| &row[..weight.len()].as_chunks::<LANES>().0[..weights.len()]);
    for (c, w) in weights.iter().enumerate() {
        let chunk = chunks.map(|row| &row[c]);
        for i in 0..LANES {
            lanes[i] += term(chunk.map(|x| x[i].to_accum()), w[i]);
        }
    }
    let tails = rows.map(|row| &row[weights.len() * LANES..weight.len()]);
    for (i, &w) in weight_tail.iter().enumerate() {
        lanes[i] += term(tails.map(|x| x[i].to_accum()), w);
    }
    total(lanes)
}

/// The largest element; −∞ of no element. Skips NaN.
#[inline(always)]
pub fn maximum<E: Element>(row: &[E]) -> E::Accum {
    // Four independent vectors of lanes hide the latency of each maximum.
    let mut lanes = [[E::Accum::NEG_INFINITY; LANES]; 4];
    let (vectors, tail) = row.as_chunks::<LANES>();
    let (groups, rest) = vectors.as_chunks::<4>();
    for group in groups {
        for (lanes, vector) in lanes.iter_mut().zip(group) {
            enlarge(lanes, vector);
        }
    }
    for vector in rest {
        enlarge(&mut lanes[0], vector);
    }
    let [mut most, others @ ..] = lanes;
    for vector in &others {
        enlarge(&mut most, vector);
    }
    let most = halved(
        most,
        #[inline(always)]
        |a, b| b.max(a),
    );
    tail.iter().fold(most, |most, x| x.to_accum().max(most))
}

#[inline(always)]
fn enlarge<E: Element>(lanes: &mut [E::Accum; LANES], vector: &[E; LANES]) {
    // Writing the chosen value in all cases keeps the lanes in a register; a conditional store would not.
    *lanes = std::array::from_fn(
        #[inline(always)]
        |i| vector[i].to_accum().max(lanes[i]),
    );
}

/// The sum of partial sums.
#[inline(always)]
pub fn total<W: Real>(lanes: [W; LANES]) -> W {
    halved(
        lanes,
        #[inline(always)]
        |a, b| a + b,
    )
}

/// Combines all lanes by halves, so that each step is one of vectors.
#[inline(always)]
fn halved<W: Real>(mut lanes: [W; LANES], both: impl Fn(W, W) -> W) -> W {
    let mut n = LANES / 2;
    while n > 0 {
        for i in 0..n {
            lanes[i] = both(lanes[i], lanes[i + n]);
        }
        n /= 2;
    }
    lanes[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reductions_take_in_every_column() {
        for n in [0usize, 1, 15, 16, 63, 64, 65, 200] {
            let row: Vec<f64> = (0..n).map(|i| ((i * 37) % 101) as f64 - 150.0).collect();
            let weight: Vec<f64> = (0..n).map(|i| i as f64).collect();
            let expected: f64 = row.iter().zip(&weight).map(|(x, w)| x * x * w).sum();
            assert_eq!(sum([&row, &row], &weight, |[a, b], w| a * b * w), expected, "{n}");
            assert_eq!(maximum(&row), row.iter().copied().fold(f64::NEG_INFINITY, f64::max), "{n}");
        }
    }
}
