//! A mixture of experts: a router sends each token to some of the experts, whose outputs are summed by its weights;
//! beside them there may be one that every token goes to, times a sigmoid (Qwen2-MoE).
//!
//! y = Σ w_e · expert_e(x) over the chosen e,  + σ(x·gᵀ) · shared(x)
//!
//! Both weights go into the MLPs as the scale of their rows. Router and gate are frozen, yet x gets a gradient through them.

use super::{
    dispatch::Dispatch,
    gated::{GatedMlp, GatedSaved, Share},
};
use crate::{
    model::rows::RowAdapters,
    ops::{
        Buffer, accum_kind,
        routing::{self, Routing, TopK},
    },
    shard::{ExpertDispatcher, ShardError},
};
use tch::{Kind, Tensor};

/// The weights of a layer's mixture.
pub struct Moe {
    /// `[experts, hidden]`
    pub router: Tensor,
    pub choice: TopK,
    /// Those that this rank has.
    pub experts: GatedMlp,
    /// The way to those of other ranks.
    pub dispatcher: Option<ExpertDispatcher>,
    pub shared: Option<Box<SharedExpert>>,
}

/// The expert that every token goes to.
pub struct SharedExpert {
    pub mlp: GatedMlp,
    /// `[1, hidden]`
    pub gate: Tensor,
}

/// What backward needs.
pub struct MoeSaved {
    routing: Routing,
    dispatch: Dispatch,
    /// What came to this rank's experts from others, which would be dear to carry again.
    rows: Option<Buffer>,
    experts: GatedSaved,
    shared: Option<GatedSaved>,
}

impl MoeSaved {
    /// The experts of each token `[tokens, k]` i64.
    pub fn chosen(&self) -> &Tensor {
        &self.routing.experts
    }

    /// How often each expert was chosen by this rank's tokens, and the sum of its probabilities: `[2, experts]` fp64.
    pub fn load(&self) -> Tensor {
        let counts = self.dispatch.counts().to_kind(Kind::Double);
        Tensor::stack(&[counts, self.routing.probabilities.sum_dim_intlist(0, false, Kind::Double)], 0)
    }
}

impl Moe {
    /// Up to the experts' last matrices, of x `[tokens, hidden]`; [`output`](Self::output) or
    /// [`skip_output`](Self::skip_output) follows. `chosen` replays the choice of an earlier pass.
    pub fn forward(
        &self,
        x: &Tensor,
        chosen: Option<&Tensor>,
        adapters: &RowAdapters,
    ) -> Result<MoeSaved, ShardError> {
        let routing = routing::forward(x, &self.router, self.choice, chosen);
        let experts = self.router.size()[0] as usize;
        let dispatch = Dispatch::new(x, &routing.experts, experts, adapters, self.dispatcher.as_ref())?;
        let segments = dispatch.segments().share();
        let share = Share { segments, scale: Some(dispatch.by_row(&routing.weights)?) };
        let rows = dispatch.gather(x)?;
        let experts = self.experts.forward(&rows, share);
        let shared = self.shared.as_ref().map(|shared| {
            let scale = x.mm(&shared.gate.tr()).to_kind(accum_kind(x.kind())).sigmoid();
            shared.mlp.forward(x, Share { segments: adapters.dense().share(), scale: Some(scale) })
        });
        let rows = dispatch.is_remote().then_some(rows);
        Ok(MoeSaved { routing, dispatch, rows, experts, shared })
    }

    /// y `[tokens, hidden]`, plus `add`.
    pub fn output(&self, saved: &mut MoeSaved, add: &Tensor) -> Result<Buffer, ShardError> {
        let rows = self.experts.output(&mut saved.experts, None);
        let y = saved.dispatch.combine(&rows, Some(add))?;
        Ok(match self.shared.as_ref().zip(saved.shared.as_mut()) {
            Some((shared, saved)) => shared.mlp.output(saved, Some(&y)),
            None => y,
        })
    }

    /// What backward needs of the last matrices, where y is known already.
    pub fn skip_output(&self, saved: &mut MoeSaved) {
        self.experts.skip_output(&mut saved.experts);
        if let Some((shared, saved)) = self.shared.as_ref().zip(saved.shared.as_mut()) {
            shared.mlp.skip_output(saved);
        }
    }

    /// dx from dy `[tokens, hidden]` and x; adds the adapters' gradients.
    pub fn backward(&self, d_y: &Tensor, x: Buffer, saved: MoeSaved) -> Result<Buffer, ShardError> {
        let MoeSaved { routing, dispatch, rows, experts, shared } = saved;
        let d_rows = dispatch.gather(d_y)?;
        let again = || rows.map_or_else(|| dispatch.gather(&x), Ok);
        let (d_gathered, d_scale) = self.experts.backward(&d_rows, again, experts)?;
        drop(d_rows);
        let mut d_x = dispatch.combine(&d_gathered, None)?;
        drop(d_gathered);
        if let Some(d_scale) = d_scale {
            let d_weights = dispatch.by_choice(&d_scale)?;
            routing::backward(&d_weights, &routing, &self.router, self.choice, &d_x);
        }
        if let Some((shared, saved)) = self.shared.as_ref().zip(shared) {
            let scale = saved.scale().map(Tensor::shallow_clone);
            let (d_shared, d_scale) = shared.mlp.backward(d_y, || Ok(x), saved)?;
            let _ = d_x.g_add_(&d_shared);
            if let Some((scale, d_scale)) = scale.zip(d_scale) {
                let slope: Tensor = &scale * (1.0 - &scale);
                let d_logit: Tensor = d_scale * slope;
                let _ = d_x.addmm_(&d_logit.to_kind(shared.gate.kind()), &shared.gate);
            }
        }
        Ok(d_x)
    }
}
