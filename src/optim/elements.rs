//! Optimizers that update every element of a parameter by itself, whatever parameter it is of: they work on
//! neighbouring elements of a piece, all of them at once where one learning rate holds.

use super::{Number, State, Update, UpdateRule};
use crate::{
    dtype::DType,
    shard::{OwnedPiece, ShardError},
};
use tch::Tensor;

/// Neighbouring elements of a piece that are updated alike: flat tensors `[n]`, views of the piece's.
pub(super) struct Elements {
    /// fp32, reduced over all ranks.
    pub gradient: Tensor,
    /// fp32
    pub master: Tensor,
    /// The master in compute dtype.
    pub compute: Tensor,
    /// In the order of [`ElementRule::state_names`], in the dtype of the rule.
    pub state: Vec<Tensor>,
}

impl Elements {
    fn narrow(&self, at: usize, n: usize) -> Self {
        let part = |tensor: &Tensor| tensor.narrow(0, at as i64, n as i64);
        let Self { gradient, master, compute, state } = self;
        Self {
            gradient: part(gradient),
            master: part(master),
            compute: part(compute),
            state: state.iter().map(part).collect(),
        }
    }

    /// The same values, of which an update changes nothing else.
    fn copy(&self) -> Self {
        let Self { gradient, master, compute, state } = self;
        Self {
            gradient: gradient.shallow_clone(),
            master: master.copy(),
            compute: compute.copy(),
            state: state.iter().map(Tensor::copy).collect(),
        }
    }

    /// True if all that an update has changed is finite.
    fn is_finite(&self) -> bool {
        let changed = self.state.iter().chain([&self.master, &self.compute]);
        changed.into_iter().all(|tensor| tensor.isfinite().all().int64_value(&[]) != 0)
    }
}

/// The arithmetic of an optimizer that updates every element by itself; see [`UpdateRule`].
pub(super) trait ElementRule {
    fn state_names(&self) -> &'static [&'static str];

    fn state_dtype(&self) -> DType {
        DType::F32
    }

    fn numbers(&self) -> Vec<Number>;

    /// Updates `elements` at the learning rate of `update`, whatever parameters they are of.
    fn apply(&self, elements: &Elements, update: &Update);

    /// True if everything that [`apply`](Self::apply) changes would be finite after it. Changes nothing.
    fn stays_finite(&self, elements: &Elements, update: &Update) -> bool {
        let after = elements.copy();
        self.apply(&after, update);
        after.is_finite()
    }
}

impl<R: ElementRule> UpdateRule for R {
    fn state_names(&self) -> &'static [&'static str] {
        ElementRule::state_names(self)
    }

    fn state_dtype(&self) -> DType {
        ElementRule::state_dtype(self)
    }

    fn numbers(&self) -> Vec<Number> {
        ElementRule::numbers(self)
    }

    fn step(&self, pieces: &[OwnedPiece], state: &State, update: &Update) -> Result<(), ShardError> {
        for (elements, update) in pieces.iter().flat_map(|piece| cut(self, piece, state, update)) {
            self.apply(&elements, &update);
        }
        Ok(())
    }

    fn stays_finite(
        &self,
        pieces: &[OwnedPiece],
        state: &State,
        update: &Update,
    ) -> Result<bool, ShardError> {
        let mut all = pieces.iter().flat_map(|piece| cut(self, piece, state, update));
        Ok(all.all(|(elements, update)| ElementRule::stays_finite(self, &elements, &update)))
    }
}

/// The elements of `piece` with the update of each; none where the region is empty. Padding is zero and may be left
/// out.
fn cut(
    rule: &impl ElementRule,
    piece: &OwnedPiece,
    state: &State,
    update: &Update,
) -> Vec<(Elements, Update)> {
    let Some(compute) = piece.compute.as_ref() else { return Vec::new() };
    let own = &state[piece.region];
    let all = Elements {
        gradient: piece.gradient.shallow_clone(),
        master: piece.master.shallow_clone(),
        compute: compute.shallow_clone(),
        state: rule.state_names().iter().map(|name| own[name].shallow_clone()).collect(),
    };
    if update.lr_ratio_of_b == 1.0 {
        return vec![(all, *update)];
    }
    let part = |part: crate::shard::OwnedPart| {
        let lr = update.lr_of(part.parameter);
        (all.narrow(part.at, part.elements.len()), Update { lr, ..*update })
    };
    piece.parts().map(part).collect()
}
