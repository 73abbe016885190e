//! The most likely tokens of a head whose logits are never whole.
//!
//! The vocabulary comes in chunks, the tokens too. Kept are the n largest logits of each token, and the sums of a
//! softmax over all so far.

use super::head::HOST_ROWS;
use crate::ops::{accum_kind, cross_entropy::Sums, linear::product};
use tch::{Device, Kind, Tensor};

/// The running state of one pass over the head.
pub struct TopPass {
    /// Hidden states `[tokens, hidden]`, compute dtype.
    x: Tensor,
    count: i64,
    chunk_tokens: i64,
    /// Without targets.
    sums: Sums,
    /// `[tokens, up to count]`, the largest first, and their ids i64.
    most: [Tensor; 2],
}

impl TopPass {
    /// Starts a pass for the `count` most likely tokens behind x `[tokens, hidden]`. Logits exist for at most
    /// `chunk_tokens` tokens at a time.
    pub fn new(x: &Tensor, count: usize, chunk_tokens: usize) -> Self {
        let (tokens, wide) = (x.size()[0], accum_kind(x.kind()));
        let sums = Sums::new(tokens, 1, x.kind(), x.device());
        let most = [wide, Kind::Int64].map(|kind| Tensor::zeros([tokens, 0], (kind, x.device())));
        let (count, chunk_tokens) = (count as i64, chunk_tokens.max(1) as i64);
        Self { x: x.shallow_clone(), count, chunk_tokens, sums, most }
    }

    /// Takes in head rows `first..` of `weight` `[rows, hidden]`. Every row of the head comes exactly once, in order.
    pub fn add_rows(&mut self, weight: &Tensor, first: usize) {
        let tokens = self.x.size()[0];
        if self.count == 0 || tokens == 0 {
            return;
        }
        let rows = weight.size()[0];
        let block = if weight.device() == Device::Cpu { HOST_ROWS } else { rows.max(1) };
        for start in (0..rows).step_by(block as usize) {
            let block = weight.narrow(0, start, block.min(rows - start));
            let parts = (0..tokens).step_by(self.chunk_tokens as usize).map(|at| {
                let part = |t: &Tensor| t.narrow(0, at, self.chunk_tokens.min(tokens - at));
                let logits = product(&part(&self.x), &block);
                let (largest, ids) =
                    logits.to_kind(self.most[0].kind()).topk(self.count.min(logits.size()[1]), 1, true, true);
                let n = logits.size()[0];
                let none = Tensor::full([n, 1], -1, (Kind::Int64, logits.device()));
                let _ = self.sums.narrow(at, n).exponentials(&logits, &none);
                let both = [(largest, 0), (ids + first as i64 + start, 1)];
                let [logits, ids] = both.map(|(new, i)| Tensor::cat(&[part(&self.most[i]), new], 1));
                let (logits, place) = logits.topk(self.count.min(logits.size()[1]), 1, true, true);
                [logits, ids.gather(1, &place, false)]
            });
            let parts: Vec<[Tensor; 2]> = parts.collect();
            self.most =
                [0, 1].map(|i| Tensor::cat(&parts.iter().map(|part| &part[i]).collect::<Vec<_>>(), 0));
        }
    }

    /// `[tokens, count]`: log p in fp32 and ids in i64 of the most likely tokens, the most likely first. Fewer columns
    /// where the head has fewer rows.
    pub fn most_likely(self) -> [Tensor; 2] {
        let [logits, ids] = self.most;
        [logits - self.sums.log_sums().unsqueeze(1), ids]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::distance;

    #[test]
    fn chunks_give_the_most_likely_of_all() {
        let of = |shape: [i64; 2]| Tensor::randn(shape, (Kind::Double, Device::Cpu));
        let (x, head) = (of([11, 6]), of([HOST_ROWS + 500, 6]));
        let exact = x.mm(&head.tr()).log_softmax(1, Kind::Double);
        for count in [1, 7, 128] {
            let mut pass = TopPass::new(&x, count, 4);
            for (first, rows) in [(0, 3), (3, HOST_ROWS + 400), (HOST_ROWS + 403, 97)] {
                pass.add_rows(&head.narrow(0, first, rows), first as usize);
            }
            let [log_probs, ids] = pass.most_likely();
            let (expected, _) = exact.topk(count as i64, 1, true, true);
            assert!(distance(&log_probs, &expected) < 1e-12, "{count}");
            assert!(distance(&exact.gather(1, &ids, false), &expected) < 1e-12, "{count}");
        }
        let mut few = TopPass::new(&x, 5, 4);
        few.add_rows(&head.narrow(0, 0, 2), 0);
        assert_eq!(few.most_likely()[0].size(), [11, 2]);
    }
}
