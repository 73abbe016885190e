//! A decoder-only transformer whose base is sharded: one micro-batch through all units, forward and backward, with the
//! adapters that it is handed. It takes its tensors from slot pools and is independent of files and of the number of
//! ranks.

mod predict;

use super::{
    ModelSpec,
    attend::{Attend, WithinDocuments},
    base_plan::{BasePlan, Options},
    context::{BatchContext, Extent, RotaryTables},
    declare::ProjectionId,
    gathered::GatheredLayer,
    layer::{LayerPlan, LayerState},
    quantized::StepNoise,
    recompute::Recompute,
    router_load::RouterLoad,
    rows::RowAdapters,
    sublayer::BackwardContext,
};
use crate::{
    clock::Clock,
    device::{RankDevice, Staging},
    lora::{Adapter, AdapterPlan, Factor, LoraShapes, Site},
    loss::{HeadPass, LossValues, Targets, TokenLoss},
    mesh::MeshError,
    ops::{Buffer, attention::Documents, batch_invariant, cpu::values, linear::row_norms, norm},
    shard::{Change, ExpertDispatcher, Piece, ProcessGroups, ShardError, SlotPool},
    trace::{self, Category},
    weights::WeightSource,
};
pub use predict::{Predicted, Reading};
use std::{
    collections::{BTreeMap, HashMap},
    ops::Range,
    rc::Rc,
};
use tch::{Device, Kind, Tensor};

/// One flat micro-batch: documents one after another, no padding between them.
pub struct Batch {
    /// `[tokens]` i64
    pub ids: Tensor,
    /// Up to K targets of each token.
    targets: Targets,
    /// `[tokens]` i64, from 0 in each document.
    positions: Tensor,
    extents: Rc<[Extent]>,
    documents: Rc<Documents>,
    adapters: Rc<RowAdapters>,
    padding: usize,
}

impl Batch {
    /// Batch of aligned `ids` and `labels` (not shifted) of documents of the given lengths. The shift is done here and
    /// never crosses a document: its last token has no target.
    pub fn new(ids: &[i64], labels: &[i64], document_lengths: &[usize], device: Device) -> Self {
        debug_assert_eq!(ids.len(), labels.len());
        let mut targets = Vec::with_capacity(ids.len());
        let mut start = 0;
        for &length in document_lengths.iter().filter(|&&length| length > 0) {
            targets.extend_from_slice(&labels[start + 1..start + length]);
            targets.push(crate::data::IGNORE_INDEX);
            start += length;
        }
        Self::with_targets(ids, &targets, 1, document_lengths, device)
    }

    /// Batch of `ids` `[tokens]` with `targets` `[tokens × k]`, token by token: what each token should predict, already
    /// shifted, negative where a target is absent. Each document is a sequence of the loss.
    pub fn with_targets(
        ids: &[i64],
        targets: &[i64],
        k: usize,
        document_lengths: &[usize],
        device: Device,
    ) -> Self {
        let whole: Vec<Range<usize>> = document_lengths.iter().map(|&length| 0..length).collect();
        let targets = Targets::new(targets, k, document_lengths, device);
        Self::with(ids, &whole, targets, device)
    }

    /// Batch of parts of documents, one after another: neighbouring tokens at the given positions, as generation has.
    pub fn of_parts(ids: &[i64], parts: &[Range<usize>], device: Device) -> Self {
        Self::with(ids, parts, Targets::none(ids.len(), device), device)
    }

    fn with(ids: &[i64], parts: &[Range<usize>], targets: Targets, device: Device) -> Self {
        let positions: Vec<i64> = parts.iter().cloned().flatten().map(|position| position as i64).collect();
        debug_assert_eq!(ids.len(), positions.len());
        let tensor = |values: &[i64]| Tensor::from_slice(values).to_device(device);
        let lengths: Vec<usize> = parts.iter().map(Range::len).collect();
        Self {
            ids: tensor(ids),
            targets,
            positions: tensor(&positions),
            extents: parts.iter().map(|part| Extent { tokens: part.len(), length: part.end }).collect(),
            documents: Rc::new(Documents::new(&lengths, device)),
            adapters: Rc::new(RowAdapters::one(ids.len())),
            padding: 0,
        }
    }

    /// The batch with rows of several adapters: neighbouring rows `(rows, adapter)`, `adapter` an index into the
    /// `adapters` adapters of the pass, `None` for rows without one. All ranks of a pass make their batches so, or
    /// none.
    pub fn with_adapters(mut self, segments: &[(usize, Option<usize>)], adapters: usize) -> Self {
        debug_assert_eq!(segments.iter().map(|(rows, _)| rows).sum::<usize>(), self.tokens());
        self.adapters = Rc::new(RowAdapters::mixed(segments, adapters, self.ids.device()));
        self
    }

    /// The batch with keys `[tokens]` of its tokens, so that the dropout of its one adapter acts: for training alone.
    pub fn with_token_keys(mut self, keys: &[u64]) -> Self {
        debug_assert_eq!(keys.len(), self.tokens());
        self.adapters = Rc::new(RowAdapters::one(keys.len()).with_keys(keys));
        self
    }

    /// The batch with the number of its tokens that are padding: they are computed like any other.
    pub fn with_padding(mut self, tokens: usize) -> Self {
        self.padding = tokens;
        self
    }

    /// Tokens that were said to be padding.
    pub fn padding(&self) -> usize {
        self.padding
    }

    /// All tokens.
    pub fn tokens(&self) -> usize {
        self.ids.numel()
    }

    /// Targets of its tokens.
    pub fn targets(&self) -> &Targets {
        &self.targets
    }

    /// Tokens that have a target.
    pub fn valid_tokens(&self) -> usize {
        self.targets.valid_in(0..self.tokens())
    }
}

/// Loss of one micro-batch of this rank.
#[derive(Debug)]
pub struct MicroBatchLoss {
    /// Σ of the loss values, not divided.
    pub sum: f64,
    /// Tokens that have a target.
    pub tokens: usize,
    /// `[tokens]` fp32: the loss values. [`Targets::sum`] adds up those of some rows as it does for `sum`.
    pub values: Tensor,
    /// `[tokens, K]` fp32: log p of each target, 0 where absent.
    pub log_probs: Tensor,
}

/// The sharded base.
pub struct Transformer {
    spec: ModelSpec,
    options: Options,
    plans: Vec<LayerPlan>,
    layers: SlotPool,
    /// The experts of each layer that this rank computes.
    experts: SlotPool,
    dispatcher: Option<ExpertDispatcher>,
    /// Embedding chunks, then head chunks unless the two are tied.
    vocab: SlotPool,
    final_norm: SlotPool,
    rotary: Rc<RotaryTables>,
    router_load: RouterLoad,
    groups: ProcessGroups,
    /// Noise that the next passes add to packed weights; `None` outside of training.
    pub noise: Option<StepNoise>,
    /// Seconds of forward, loss, backward and gather.
    pub clock: Clock,
}

impl Transformer {
    /// A base of zeros; fill it with [`load`](Self::load).
    ///
    /// # Errors
    /// The mesh does not divide the experts of `spec`.
    pub fn new(spec: ModelSpec, options: Options, groups: &ProcessGroups) -> Result<Self, MeshError> {
        let device = groups.device.tensors();
        let BasePlan { layers, regions } = BasePlan::new(&spec, &options, &groups.mesh, groups.rank)?;
        let pool = |name, layouts, slots| SlotPool::new(name, layouts, slots, groups.shard.clone(), device);
        let experts = groups.expert_shard.clone();
        Ok(Self {
            layers: pool("layers", regions.layers, options.slots),
            experts: SlotPool::new("experts", regions.experts, options.slots, experts, device),
            dispatcher: ExpertDispatcher::over(&groups.expert),
            vocab: pool("vocabulary", regions.vocab, 1),
            final_norm: pool("final norm", vec![regions.final_norm], 1),
            spec,
            options,
            plans: layers,
            rotary: Rc::new(RotaryTables::new(device)),
            router_load: RouterLoad::default(),
            groups: groups.clone(),
            noise: None,
            clock: Clock::default(),
        })
    }

    /// An adapter of zeros of `shapes` on `sites` of this model.
    pub fn new_adapter(&self, sites: &[Site], shapes: impl Into<LoraShapes>) -> Adapter {
        self.adapter_of(Rc::new(self.adapter_plan(sites, shapes)))
    }

    /// An adapter of zeros of `plan`.
    pub fn adapter_of(&self, plan: Rc<AdapterPlan>) -> Adapter {
        Adapter::new(plan, self.options.slots, self.options.reduce, &self.groups)
    }

    /// An adapter of zeros of `plan` that is not trained: see [`Adapter::frozen`].
    pub fn frozen_adapter(&self, plan: Rc<AdapterPlan>) -> Adapter {
        Adapter::frozen(plan, self.options.slots, &self.groups)
    }

    /// The plan of an adapter of `shapes` on `sites`; takes no memory for its tensors.
    pub fn adapter_plan(&self, sites: &[Site], shapes: impl Into<LoraShapes>) -> AdapterPlan {
        let projections = self.plans.iter().map(|layer| &layer.projections[..]);
        AdapterPlan::new(projections, sites, &shapes.into(), self.options.compute, &self.groups.mesh)
    }

    /// The device that it computes on.
    pub fn device(&self) -> &RankDevice {
        &self.groups.device
    }

    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    pub fn options(&self) -> &Options {
        &self.options
    }

    /// Has backward recompute `recompute` from the next pass on; no result depends on it.
    pub fn set_recompute(&mut self, recompute: Recompute) {
        self.options.checkpointing = recompute;
    }

    /// Changes [`Options::deterministic_sampling`] for what comes.
    pub fn set_deterministic_sampling(&mut self, is_on: bool) {
        self.options.deterministic_sampling = is_on;
    }

    /// Reads this rank's pieces of the base, and nothing else. Collective.
    pub fn load(&mut self, source: &dyn WeightSource) -> Result<(), ShardError> {
        let mut staging = Staging::new(&self.groups.device)?;
        for pool in [&mut self.layers, &mut self.experts, &mut self.vocab, &mut self.final_norm] {
            // Debugging overwrites weights after use, so they must not be shared.
            if !self.options.debug {
                pool.share()?;
            }
            pool.load(source, &mut staging)?;
        }
        Ok(())
    }

    /// Changes the frozen tensors in place, as a merge does: `change` gets each range of a tensor that this rank owns.
    /// The next gathers of all ranks show it. Collective.
    pub fn update(&mut self, mut change: impl Change) -> Result<(), ShardError> {
        for pool in [&mut self.layers, &mut self.experts, &mut self.vocab, &mut self.final_norm] {
            for unit in 0..pool.len() {
                pool.update(unit, &mut change)?;
            }
        }
        Ok(())
    }

    /// The same for the tensors of layer `unit` alone. Collective.
    pub fn update_layer(&mut self, unit: usize, change: &mut impl Change) -> Result<(), ShardError> {
        self.layers.update(unit, change)?;
        self.experts.update(unit, change)
    }

    /// The scales beside the tiles of the packed matrices of the layers that this rank has a part in, by name; none in
    /// formats without such. Collective.
    ///
    /// # Errors
    /// That of a collective.
    pub fn scales(&self) -> Result<BTreeMap<String, f32>, ShardError> {
        let mut all = BTreeMap::new();
        for pool in [&self.layers, &self.experts] {
            for unit in 0..pool.len() {
                all.append(&mut pool.scales(unit)?);
            }
        }
        Ok(all)
    }

    /// Calls `each` with each range of the layers' tensors that this rank owns, and its values, a view as
    /// [`Change`] has it.
    ///
    /// # Errors
    /// Those of `each`.
    pub fn visit_layers<E: From<ShardError>>(
        &self,
        mut each: impl FnMut(&Piece, &Tensor) -> Result<(), E>,
    ) -> Result<(), E> {
        for pool in [&self.layers, &self.experts] {
            (0..pool.len()).try_for_each(|unit| pool.visit(unit, &mut each))?;
        }
        Ok(())
    }

    /// ‖W + s·B·A‖ of each row that a site of `adapter` adds to, by name of the site's magnitudes: what they start
    /// with. Collective.
    pub fn row_norms(&mut self, adapter: &mut Adapter) -> Result<HashMap<String, Vec<f32>>, ShardError> {
        let _guard = tch::no_grad_guard();
        let (plan, mut norms) = (adapter.plan().clone(), HashMap::new());
        for (unit, layer) in plan.layers.iter().enumerate() {
            let adapters = &mut [&mut *adapter];
            self.gather(adapters, unit, None)?;
            let gathered = self.layer(adapters, unit);
            for (place, module) in layer.modules.iter().enumerate() {
                let Some(module) = module else { continue };
                let linear = gathered.linear(ProjectionId::at(place))?;
                let of_parts = linear.adapters.iter().flatten().flat_map(|bound| row_norms(&linear, bound));
                for (site, norm) in module.stack().sites.iter().zip(of_parts) {
                    let name = format!("{}.{}", site.path(), Factor::Magnitude.suffix());
                    norms.insert(name, values::<f32>(&norm.to_device(Device::Cpu)));
                }
            }
        }
        self.forget_gathered()?;
        Ok(norms)
    }

    /// True if the ranks of a host share the memory of their pieces.
    pub fn shares_memory(&self) -> bool {
        [&self.layers, &self.experts, &self.vocab, &self.final_norm].iter().all(|pool| pool.is_shared())
    }

    /// Invalidates the slots, so that the next step gathers as much as the first one of a new process.
    pub fn forget_gathered(&mut self) -> Result<(), ShardError> {
        for pool in [&mut self.layers, &mut self.experts, &mut self.vocab, &mut self.final_norm] {
            pool.invalidate()?;
        }
        Ok(())
    }

    /// Router statistics since the last call.
    pub fn take_router_load(&mut self) -> RouterLoad {
        std::mem::take(&mut self.router_load)
    }

    fn context<'a>(&self, batch: &Batch, attend: &'a dyn Attend) -> BatchContext<'a> {
        let rotary = self.rotary.at(&batch.positions, &batch.extents);
        BatchContext { adapters: batch.adapters.clone(), attend, rotary }
    }

    /// Number of chunks of the embedding; the head has as many, the same ones when tied.
    fn vocab_chunks(&self) -> usize {
        self.spec.vocab_size.div_ceil(self.options.chunk_rows(self.spec.vocab_size))
    }

    /// Gathers chunk `chunk` of the embedding or the head; returns it with its first row.
    fn vocab_chunk(&mut self, chunk: usize, head: bool) -> Result<(Tensor, usize), ShardError> {
        let _gathering = self.clock.phase("gather");
        let offset = if head && !self.spec.tie_word_embeddings { self.vocab_chunks() } else { 0 };
        self.vocab.gather(offset + chunk)?;
        let first = chunk * self.options.chunk_rows(self.spec.vocab_size);
        Ok((self.vocab.view(offset + chunk, 0)?, first))
    }

    /// x `[tokens, hidden]` of ids `[tokens]`.
    fn embed(&mut self, ids: &Tensor) -> Result<Tensor, ShardError> {
        let shape = [ids.size()[0], self.spec.hidden_size as i64];
        let mut x = Tensor::zeros(shape, (self.options.compute.kind(), ids.device()));
        for chunk in 0..self.vocab_chunks() {
            let (weight, first) = self.vocab_chunk(chunk, false)?;
            let local = ids - first as i64;
            let here = local.ge(0).logical_and(&local.lt(weight.size()[0])).nonzero().view([-1]);
            let rows = weight.index_select(0, &local.index_select(0, &here));
            let _ = x.index_copy_(0, &here, &rows);
        }
        Ok(x)
    }

    /// Gathers layer `unit` and starts to gather `next`.
    fn gather(
        &mut self,
        adapters: &mut [&mut Adapter],
        unit: usize,
        next: Option<usize>,
    ) -> Result<(), ShardError> {
        let _gathering = self.clock.phase("gather");
        self.layers.gather(unit)?;
        self.experts.gather(unit)?;
        adapters.iter_mut().try_for_each(|adapter| adapter.regions_mut().gather(unit))?;
        if let Some(next) = next {
            self.layers.prefetch_beside(next, unit)?;
            self.experts.prefetch_beside(next, unit)?;
            let prefetch = |adapter: &mut &mut Adapter| adapter.regions_mut().prefetch_beside(next, unit);
            adapters.iter_mut().try_for_each(prefetch)?;
        }
        Ok(())
    }

    /// Layer `unit`, whose tensors are gathered.
    fn layer<'a>(&'a self, adapters: &'a [&'a mut Adapter], unit: usize) -> GatheredLayer<'a> {
        GatheredLayer {
            plan: &self.plans[unit],
            unit,
            compute: self.options.compute,
            noise: self.noise,
            dense: &self.layers,
            experts: &self.experts,
            adapters,
            dispatcher: self.dispatcher.as_ref(),
        }
    }

    /// Hidden states after the last layer. `keep` gets each layer's input and its state for backward.
    fn forward_layers(
        &mut self,
        adapters: &mut [&mut Adapter],
        ids: &Tensor,
        context: &BatchContext,
        mut keep: impl FnMut(Buffer, LayerState),
    ) -> Result<Buffer, ShardError> {
        let _forward = self.clock.phase("forward");
        let mut x = Buffer::from(self.embed(ids)?);
        let layers = self.layers.len();
        for unit in 0..layers {
            let _layer = trace::span(Category::Phase, "layer.forward").with("unit", unit);
            self.gather(adapters, unit, Some(unit + 1).filter(|&next| next < layers))?;
            let (y, state) = self.layer(adapters, unit).forward(&x, context)?;
            self.examine(adapters, unit, "forward", &y)?;
            keep(std::mem::replace(&mut x, y), state);
        }
        Ok(x)
    }

    /// Debugging: logs the output of layer `unit`, refuses values that are not finite, overwrites the layer's weights
    /// with NaN.
    fn examine(
        &mut self,
        adapters: &mut [&mut Adapter],
        unit: usize,
        pass: &'static str,
        made: &Tensor,
    ) -> Result<(), ShardError> {
        if !self.options.debug {
            return Ok(());
        }
        self.layers.poison(unit);
        self.experts.poison(unit);
        adapters.iter_mut().for_each(|adapter| adapter.regions_mut().poison(unit));
        let finite = made.isfinite();
        let (of, found) = (made.numel(), finite.sum(Kind::Int64).int64_value(&[]) as usize);
        let largest = if of == 0 { 0.0 } else { made.abs().max().double_value(&[]) };
        tracing::debug!("layer {unit}, {pass}: {:?} {:?}, largest {largest}", made.size(), made.kind());
        if found < of {
            return Err(ShardError::NotFinite { layer: unit, pass, count: of - found, of });
        }
        Ok(())
    }

    /// Pass over the head: the loss, and the gradient of the hidden states if wanted.
    fn head_loss(
        &mut self,
        x: &Tensor,
        batch: &Batch,
        loss: &dyn TokenLoss,
        wants_gradient: bool,
    ) -> Result<(MicroBatchLoss, Option<Buffer>), ShardError> {
        let _loss = self.clock.phase("loss");
        self.final_norm.gather(0)?;
        let weight = self.final_norm.view(0, 0)?;
        let (normed, r) = norm::forward(x, &weight, self.spec.rms_norm_eps);
        let mut pass = HeadPass::new(&normed, &batch.targets, self.options.loss_chunk_tokens, wants_gradient);
        for chunk in 0..self.vocab_chunks() {
            let (weight, first) = self.vocab_chunk(chunk, true)?;
            pass.add_rows(&weight, first);
        }
        let log_probs = pass.log_probs();
        let LossValues { values, coefficients } = loss.evaluate(&log_probs);
        let d_x = pass.backward(&coefficients).map(|d| norm::backward(d, x, &weight, &r, None));
        let sum = batch.targets.sum(&values, 0..batch.tokens());
        let tokens = batch.valid_tokens();
        Ok((MicroBatchLoss { sum, tokens, values, log_probs: log_probs.values }, d_x))
    }

    /// One micro-batch: adds the gradient of `loss` to the gradients of the adapters of its rows. Every rank passes the
    /// same adapters in the same order; ranks without tokens pass an empty batch. Collective.
    pub fn forward_backward(
        &mut self,
        batch: &Batch,
        adapters: &mut [&mut Adapter],
        loss: &dyn TokenLoss,
    ) -> Result<MicroBatchLoss, ShardError> {
        let _guard = tch::no_grad_guard();
        // Other losses have nothing to compare, and large GEMMs are faster.
        let is_compared = self.options.deterministic_sampling && loss.is_policy();
        let _invariant = batch_invariant::Guard::new(is_compared);
        let attend = WithinDocuments(&batch.documents);
        let context = self.context(batch, &attend);
        let checkpointing = self.options.checkpointing;
        let mut kept = Vec::with_capacity(self.layers.len());
        let mut loads = Vec::new();
        let x = self.forward_layers(adapters, &batch.ids, &context, |x, mut state| {
            loads.extend(state.router_loads());
            state.release(checkpointing.of(kept.len()));
            kept.push((x, state));
        })?;
        self.router_load.add(&loads);
        let (loss, d_x) = self.head_loss(&x, batch, loss, true)?;
        drop(x);
        let _backward = self.clock.phase("backward");
        let Some(mut d_x) = d_x else { return Ok(loss) };
        let context = BackwardContext { batch: &context, attend: &attend };
        while let Some((x, state)) = kept.pop() {
            let unit = kept.len();
            let _layer = trace::span(Category::Phase, "layer.backward").with("unit", unit);
            self.gather(adapters, unit, unit.checked_sub(1))?;
            d_x = state.backward(d_x, &x, &self.layer(adapters, unit), &context)?;
            self.examine(adapters, unit, "backward", &d_x)?;
            let _reducing = self.clock.phase("reduce");
            let done = |adapter: &mut &mut Adapter| adapter.regions_mut().micro_batch_done(unit);
            adapters.iter_mut().try_for_each(done)?;
        }
        Ok(loss)
    }

    /// Loss and log-probabilities of a batch without any gradient.
    pub fn evaluate(
        &mut self,
        batch: &Batch,
        adapters: &mut [&mut Adapter],
        loss: &dyn TokenLoss,
    ) -> Result<MicroBatchLoss, ShardError> {
        let _guard = tch::no_grad_guard();
        let _invariant = batch_invariant::Guard::new(self.options.deterministic_sampling);
        let attend = WithinDocuments(&batch.documents);
        let context = self.context(batch, &attend);
        let x = self.forward_layers(adapters, &batch.ids, &context, |_, _| ())?;
        Ok(self.head_loss(&x, batch, loss, false)?.0)
    }
}
