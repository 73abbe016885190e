//! Predictions of chosen rows of a batch, without any gradient: logits, log-probabilities of targets, the most likely
//! tokens. One pass over the head serves all of them.

use super::{Batch, Transformer};
use crate::{
    lora::Adapter,
    loss::{HeadPass, Targets, TopPass},
    model::attend::{Attend, WithinDocuments},
    ops::{batch_invariant, linear, norm},
    shard::ShardError,
};
use tch::{Kind, Tensor};

/// The rows of a batch whose predictions are wanted.
pub struct Reading<'a> {
    /// `[logits]` i64: rows whose logits are told.
    pub logits: &'a Tensor,
    /// `[scored]` i64: rows of which log-probabilities are told.
    pub scored: &'a Tensor,
    /// Targets of the scored rows.
    pub targets: &'a Targets,
    /// The most likely tokens of each scored row that are told.
    pub top: usize,
}

/// Predictions of the rows of a [`Reading`].
pub struct Predicted {
    /// `[logits, vocab]` fp32
    pub logits: Tensor,
    /// `[scored, K]` fp32: log p of each target, 0 where absent.
    pub log_probs: Tensor,
    /// `[scored, top]`: log p in fp32 and ids in i64 of the most likely tokens, the most likely first.
    pub top: [Tensor; 2],
}

impl Transformer {
    /// Predictions of the rows `reading` of a batch. `attend` is the attention of each layer. Every rank passes the
    /// same adapters in the same order; ranks without tokens pass an empty batch. Collective.
    pub fn predict(
        &mut self,
        batch: &Batch,
        adapters: &mut [&mut Adapter],
        attend: &dyn Attend,
        reading: &Reading,
    ) -> Result<Predicted, ShardError> {
        let _guard = tch::no_grad_guard();
        let _invariant = batch_invariant::Guard::new(self.options.deterministic_sampling);
        let context = self.context(batch, attend);
        let x = self.forward_layers(adapters, &batch.ids, &context, |_, _| ())?;
        let _loss = self.clock.phase("loss");
        self.final_norm.gather(0)?;
        let weight = self.final_norm.view(0, 0)?;
        let normed = |rows| norm::forward(&x.index_select(0, rows), &weight, self.spec.rms_norm_eps).0;
        let (told, scored) = (normed(reading.logits), normed(reading.scored));
        let chunk_tokens = self.options.loss_chunk_tokens;
        let mut pass = HeadPass::new(&scored, reading.targets, chunk_tokens, false);
        let mut top = TopPass::new(&scored, reading.top, chunk_tokens);
        let mut columns = Vec::new();
        for chunk in 0..self.vocab_chunks() {
            let (weight, first) = self.vocab_chunk(chunk, true)?;
            columns.push(linear::product(&told, &weight).to_kind(Kind::Float));
            pass.add_rows(&weight, first);
            top.add_rows(&weight, first);
        }
        let logits = Tensor::cat(&columns, 1);
        Ok(Predicted { logits, log_probs: pass.log_probs().values, top: top.most_likely() })
    }

    /// Logits `[tokens, vocab]` fp32 of every token of a batch.
    pub fn logits(&mut self, batch: &Batch, adapters: &mut [&mut Adapter]) -> Result<Tensor, ShardError> {
        let device = batch.ids.device();
        let all = Tensor::arange(batch.tokens() as i64, (Kind::Int64, device));
        let none = Tensor::zeros([0], (Kind::Int64, device));
        let targets = Targets::none(0, device);
        let reading = Reading { logits: &all, scored: &none, targets: &targets, top: 0 };
        let attend = WithinDocuments(&batch.documents);
        Ok(self.predict(batch, adapters, &attend, &reading)?.logits)
    }
}
