//! A mixture of experts: a router sends each token to some of the experts and sums their outputs by its weights. Some
//! models add a shared expert that every token goes to, times a sigmoid (Qwen2-MoE).
//!
//! y = Σ w_e · expert_e(x) over the chosen e,  + σ(x·gᵀ) · shared(x)
//!
//! Both weights are scales of rows in the MLPs. Router and gate are frozen, but x gets a gradient through them.

use super::{
    dispatch::Dispatch,
    gated::{DOWN, GATE, GATE_UP, GatedIntermediate, GatedMlp, GatedPlan, GatedSaved, Rows, UP},
};
use crate::{
    lora::{Experts, MoeNames},
    model::{
        context::BatchContext,
        declare::{Declarations, TensorId},
        gathered::GatheredLayer,
        sublayer::{BackwardContext, CostSizes, MicroBatch, SubLayer},
    },
    ops::{
        Buffer,
        routing::{self, Routing, TopK},
    },
    shard::{ExpertDispatcher, ShardError},
};
use tch::{Kind, Tensor};

/// Sizes and switches.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MoeSpec {
    pub experts: usize,
    /// Experts of a token.
    pub top_k: usize,
    /// Divide the weights of a token's experts by their sum.
    pub normalise: bool,
    /// Width of an expert.
    pub width: usize,
    /// Width of the shared expert, if there is one.
    pub shared_width: Option<usize>,
    pub names: MoeNames,
}

/// The sublayer.
#[derive(Debug)]
pub struct Moe {
    spec: MoeSpec,
    hidden_size: usize,
    router: TensorId,
    experts: GatedPlan,
    shared: Option<SharedPlan>,
}

#[derive(Debug)]
struct SharedPlan {
    mlp: GatedPlan,
    width: usize,
    gate: TensorId,
}

/// Gathered weights.
pub struct Weights {
    /// `[experts, hidden]`
    router: Tensor,
    /// This rank's experts.
    experts: GatedMlp,
    dispatcher: Option<ExpertDispatcher>,
    shared: Option<SharedExpert>,
}

struct SharedExpert {
    mlp: GatedMlp,
    /// `[1, hidden]`
    gate: Tensor,
}

/// State before the last matrices (M is [`GatedIntermediate`]), or kept for backward (M is [`GatedSaved`]).
pub struct Routed<M> {
    routing: Routing,
    dispatch: Dispatch,
    /// Rows that this rank's experts got from other ranks, kept because another all-to-all would be expensive.
    rows: Option<Buffer>,
    experts: M,
    shared: Option<M>,
}

impl Moe {
    fn choice(&self) -> TopK {
        TopK { k: self.spec.top_k as i64, normalise: self.spec.normalise }
    }
}

impl SubLayer for Moe {
    type Spec = MoeSpec;
    type Weights = Weights;
    type Intermediate = Routed<GatedIntermediate>;
    type Saved = Routed<GatedSaved>;
    /// The experts of each token `[tokens, k]` i64.
    type Replay = Tensor;

    fn declare(spec: &MoeSpec, declare: &mut Declarations) -> Self {
        let MoeSpec { experts: count, top_k, width, names, .. } = *spec;
        let (block, hidden) = (names.block, declare.hidden_size);
        let router = declare.matrix(&format!("{block}.gate"), [count, hidden]);
        let experts = Experts { count, top_k, names };
        let gate_up = [(GATE, width), (UP, width)];
        let experts = GatedPlan {
            gate_up: declare.expert_projection(experts, Some(GATE_UP), &gate_up, hidden),
            down: declare.expert_projection(experts, None, &[(DOWN, hidden)], width),
        };
        let shared = spec.shared_width.map(|width| SharedPlan {
            mlp: GatedPlan::declare(&format!("{block}.shared_expert"), width, false, declare),
            width,
            gate: declare.matrix(&format!("{block}.shared_expert_gate"), [1, hidden]),
        });
        Self { spec: *spec, hidden_size: hidden, router, experts, shared }
    }

    /// A row of each chosen expert with its scale, its token and choice; the router's results. Rows that pad the
    /// segment of an expert are not known before and not counted. Ranks exchange as many rows as they have if the
    /// routers choose evenly.
    fn kept_bytes(&self, sizes: &CostSizes) -> usize {
        let MoeSpec { experts, top_k, width, .. } = self.spec;
        let row = self.experts.kept_bytes(width, sizes) + 4 + 3 * 8;
        let exchanged = if sizes.experts_elsewhere { self.hidden_size * sizes.element } else { 0 };
        let router = top_k * (8 + 4) + 4 * experts;
        let shared = self.shared.as_ref().map_or(0, |shared| 4 + shared.mlp.kept_bytes(shared.width, sizes));
        top_k * (row + exchanged) + router + shared
    }

    fn replay_bytes(&self) -> usize {
        8 * self.spec.top_k
    }

    /// SwiGLU's output of all rows with the gradients of y and x, then these with x; or the shared expert's.
    fn scratch_bytes(&self, element: usize, batch: MicroBatch) -> usize {
        let MoeSpec { top_k, width, shared_width, .. } = self.spec;
        let rows = top_k * (width.max(self.hidden_size) + 2 * self.hidden_size);
        rows.max(shared_width.unwrap_or(0)) * element * batch.tokens
    }

    fn flops(&self, _length: usize) -> f64 {
        let MoeSpec { experts, top_k, width, shared_width, .. } = self.spec;
        let shared = shared_width.map_or(0, |width| 3 * width + 1);
        4.0 * (self.hidden_size * (experts + 3 * top_k * width + shared)) as f64
    }

    fn bind(&self, layer: &GatheredLayer) -> Result<Weights, ShardError> {
        let shared = self.shared.as_ref().map(|SharedPlan { mlp, gate, .. }| {
            Ok::<_, ShardError>(SharedExpert { mlp: mlp.bind(layer)?, gate: layer.tensor(*gate)? })
        });
        Ok(Weights {
            router: layer.tensor(self.router)?,
            experts: self.experts.bind(layer)?,
            dispatcher: layer.dispatcher.cloned(),
            shared: shared.transpose()?,
        })
    }

    fn intermediate(
        &self,
        weights: &Weights,
        x: Buffer,
        chosen: Option<&Tensor>,
        batch: &BatchContext,
    ) -> Result<Self::Intermediate, ShardError> {
        let Weights { router, experts, dispatcher, shared } = weights;
        let routing = routing::forward(&x, router, self.choice(), chosen);
        let (count, adapters) = (self.spec.experts, &batch.adapters);
        let dispatch = Dispatch::new(&x, &routing.experts, count, adapters, dispatcher.as_ref())?;
        let segments = dispatch.segments().share();
        let scaled = Rows { segments, scale: Some(dispatch.by_row(&routing.weights)?) };
        let rows = dispatch.gather(&x)?;
        let experts = experts.intermediate(&rows, scaled);
        let shared = shared.as_ref().map(|shared| {
            let scale = routing::gate(&x, &shared.gate);
            shared.mlp.intermediate(&x, Rows { segments: adapters.dense().share(), scale: Some(scale) })
        });
        let rows = dispatch.is_remote().then_some(rows);
        Ok(Routed { routing, dispatch, rows, experts, shared })
    }

    fn output(
        &self,
        weights: &Weights,
        intermediate: Self::Intermediate,
        add: &Tensor,
        _batch: &BatchContext,
    ) -> Result<(Buffer, Self::Saved), ShardError> {
        let Routed { routing, dispatch, rows, experts, shared } = intermediate;
        let (by_row, experts) = weights.experts.output(experts, None);
        let mut y = dispatch.combine(&by_row, Some(add))?;
        drop(by_row);
        let shared = weights.shared.as_ref().zip(shared).map(|(expert, shared)| {
            let (sum, saved) = expert.mlp.output(shared, Some(&y));
            y = sum;
            saved
        });
        Ok((y, Routed { routing, dispatch, rows, experts, shared }))
    }

    fn skip_output(
        &self,
        weights: &Weights,
        intermediate: Self::Intermediate,
        _batch: &BatchContext,
    ) -> Self::Saved {
        let Routed { routing, dispatch, rows, experts, shared } = intermediate;
        let experts = weights.experts.skip_output(experts);
        let shared =
            weights.shared.as_ref().zip(shared).map(|(expert, shared)| expert.mlp.skip_output(shared));
        Routed { routing, dispatch, rows, experts, shared }
    }

    fn replay(saved: &Self::Saved) -> Tensor {
        saved.routing.experts.shallow_clone()
    }

    fn backward(
        &self,
        weights: &Weights,
        d_y: &Tensor,
        x: impl FnOnce() -> Buffer,
        saved: Self::Saved,
        _context: &BackwardContext,
    ) -> Result<Buffer, ShardError> {
        let (x, Routed { routing, dispatch, rows, experts, shared }) = (x(), saved);
        let d_rows = dispatch.gather(d_y)?;
        let again = || rows.map_or_else(|| dispatch.gather(&x), Ok);
        let (d_gathered, d_scale) = weights.experts.backward(&d_rows, again, experts)?;
        drop(d_rows);
        let mut d_x = dispatch.combine(&d_gathered, None)?;
        drop(d_gathered);
        if let Some(d_scale) = d_scale {
            let d_weights = dispatch.by_choice(&d_scale)?;
            routing::backward(&d_weights, &routing, &weights.router, self.choice(), &d_x);
        }
        if let Some((shared, saved)) = weights.shared.as_ref().zip(shared) {
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

    fn router_load(saved: &Self::Saved) -> Option<Tensor> {
        let counts = saved.dispatch.counts().to_kind(Kind::Double);
        let sums = saved.routing.probabilities.sum_dim_intlist(0, false, Kind::Double);
        Some(Tensor::stack(&[counts, sums], 0))
    }
}
