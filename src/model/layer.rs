//! What a decoder layer is made of: its base tensors, its projections, and where each lies in its region. Pure:
//! names and shapes; [`LayerPlan::bind`] then turns a gathered unit into a layer.

use super::{
    ffn::{
        gated::GatedMlp,
        moe::{Moe, SharedExpert},
    },
    spec::ModelSpec,
};
use crate::{
    dtype::DType,
    lora::{
        Adapter, MoeNames,
        targets::{Experts, Projection},
    },
    ops::{
        linear::{Base, Linear, Matrices},
        routing::TopK,
    },
    shard::{EntrySpec, ExpertDispatcher, ShardError, SlotPool, Span},
};
use std::ops::Range;
use tch::Tensor;

// Places in [`LayerPlan::projections`], and of their adapters.
const QKV: usize = 0;
const O: usize = 1;
/// Of the dense MLP, or of the routed experts.
const GATE_UP: usize = 2;
const DOWN: usize = 3;
const SHARED_GATE_UP: usize = 4;
const SHARED_DOWN: usize = 5;

/// Where a linear layer's frozen tensors lie: (weight entry, bias entry) of each GEMM.
type BaseEntries = Vec<(usize, Option<usize>)>;

/// Entries of one decoder layer's regions.
#[derive(Clone, Debug)]
pub struct LayerPlan {
    pub specs: Vec<EntrySpec>,
    /// Of the region of the experts that a rank has.
    pub expert_specs: Vec<EntrySpec>,
    pub projections: Vec<Projection>,
    qkv: BaseEntries,
    o: BaseEntries,
    mlp: MlpPlan,
    input_norm: usize,
    post_attention_norm: usize,
    /// q_norm, k_norm
    qk_norm: Option<[usize; 2]>,
}

#[derive(Clone, Debug)]
enum MlpPlan {
    Dense(GatedPlan),
    Moe {
        router: usize,
        choice: TopK,
        /// In the experts' region: `[experts, 2 · width, hidden]` and `[experts, hidden, width]`
        experts: [usize; 2],
        shared: Option<(GatedPlan, usize)>,
    },
}

#[derive(Clone, Debug)]
struct GatedPlan {
    gate_up: BaseEntries,
    down: BaseEntries,
}

/// The projections of layer `index`.
pub fn projections(spec: &ModelSpec, index: usize) -> Vec<Projection> {
    let (q, kv) = (spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim);
    let hidden = spec.hidden_size;
    let projection = |parent: &str, fused, leaves: &[(&'static str, usize)], input| Projection {
        parent: format!("model.layers.{index}.{parent}"),
        fused,
        leaves: leaves.to_vec(),
        input,
        experts: None,
    };
    let gated = |parent: &str, wide| {
        [
            projection(parent, Some("gate_up_proj"), &[("gate_proj", wide), ("up_proj", wide)], hidden),
            projection(parent, None, &[("down_proj", hidden)], wide),
        ]
    };
    let mut all = vec![
        projection("self_attn", Some("qkv_proj"), &[("q_proj", q), ("k_proj", kv), ("v_proj", kv)], hidden),
        projection("self_attn", None, &[("o_proj", hidden)], q),
    ];
    match spec.moe_of(index) {
        None => all.extend(gated("mlp", spec.intermediate_size)),
        Some(moe) => {
            let experts = Some(Experts { count: moe.experts, top_k: moe.top_k, names: moe.names });
            let routed = gated("mlp.experts", moe.width);
            all.extend(routed.map(|projection| Projection { experts, ..projection }));
            all.extend(moe.shared_width.into_iter().flat_map(|wide| gated("mlp.shared_expert", wide)));
        }
    }
    all
}

/// Collects the entries of a region.
struct Entries {
    specs: Vec<EntrySpec>,
    compute: DType,
    /// One GEMM for q, k, v and one for gate, up.
    merge: bool,
}

impl Entries {
    fn push(&mut self, entry: EntrySpec) -> usize {
        self.specs.push(entry);
        self.specs.len() - 1
    }

    /// A tensor of the model files, whole.
    fn whole(&mut self, name: &str, tensor: String, shape: &[usize], dtype: DType) -> usize {
        self.push(EntrySpec::whole(name, tensor, shape, dtype))
    }

    fn linear(&mut self, projection: &Projection, biased: bool) -> BaseEntries {
        let all = &projection.leaves[..];
        let gemms: Vec<_> = if self.merge { vec![all] } else { all.chunks(1).collect() };
        let mut gemm = |leaves| {
            let weight = self.push(stacked(projection, leaves, "weight", projection.input, self.compute));
            let bias = biased.then(|| self.push(stacked(projection, leaves, "bias", 1, self.compute)));
            (weight, bias)
        };
        gemms.into_iter().map(&mut gemm).collect()
    }

    fn gated(&mut self, projections: &[Projection], biased: bool) -> GatedPlan {
        GatedPlan {
            gate_up: self.linear(&projections[0], biased),
            down: self.linear(&projections[1], biased),
        }
    }

    /// `matrices` `[rows, columns]` of each of `experts`, those of an expert one below the other: one GEMM serves them.
    fn experts(
        &mut self,
        block: &str,
        experts: &Range<usize>,
        matrices: &[&str],
        [rows, columns]: [usize; 2],
    ) -> usize {
        let of_expert = |expert| matrices.iter().map(move |matrix| (expert, matrix));
        let names = experts.clone().flat_map(of_expert);
        let spans = names.map(|(expert, matrix)| Span {
            tensor: format!("{block}.experts.{expert}.{matrix}.weight"),
            start: 0,
            elements: rows * columns,
        });
        self.push(EntrySpec {
            name: format!("experts.{}", matrices.join("|")),
            shape: vec![experts.len(), matrices.len() * rows, columns],
            dtype: self.compute,
            spans: spans.collect(),
        })
    }
}

impl LayerPlan {
    /// The plan of layer `index` with `experts` of its routed ones: matrices in `compute` dtype, norm weights in fp32.
    /// `merge` fuses q, k, v and gate, up into one GEMM each.
    pub fn new(spec: &ModelSpec, index: usize, compute: DType, merge: bool, experts: Range<usize>) -> Self {
        let projections = projections(spec, index);
        let (hidden, layer) = (spec.hidden_size, format!("model.layers.{index}"));
        let mut entries = Entries { specs: Vec::new(), compute, merge };
        let mut routed = Entries { specs: Vec::new(), compute, merge };
        let qkv = entries.linear(&projections[QKV], spec.qkv_bias);
        let o = entries.linear(&projections[O], spec.o_bias);
        let mlp = match spec.moe_of(index) {
            None => MlpPlan::Dense(entries.gated(&projections[GATE_UP..], spec.mlp_bias)),
            Some(moe) => {
                let MoeNames { block, gate, up, down } = moe.names;
                let block = format!("{layer}.{block}");
                let router = format!("{block}.gate.weight");
                let router = entries.whole("router", router, &[moe.experts, hidden], compute);
                let gate_up = routed.experts(&block, &experts, &[gate, up], [moe.width, hidden]);
                let down = routed.experts(&block, &experts, &[down], [hidden, moe.width]);
                let shared = moe.shared_width.map(|_| {
                    let gate = format!("{block}.shared_expert_gate.weight");
                    let mlp = entries.gated(&projections[SHARED_GATE_UP..], false);
                    (mlp, entries.whole("shared gate", gate, &[1, hidden], compute))
                });
                let choice = TopK { k: moe.top_k as i64, normalise: moe.normalise };
                MlpPlan::Moe { router, choice, experts: [gate_up, down], shared }
            }
        };
        let mut norm =
            |name: &str, width| entries.whole(name, format!("{layer}.{name}.weight"), &[width], DType::F32);
        let input_norm = norm("input_layernorm", hidden);
        let post_attention_norm = norm("post_attention_layernorm", hidden);
        let qk_norm =
            spec.qk_norm_widths().map(|[q, k]| [norm("self_attn.q_norm", q), norm("self_attn.k_norm", k)]);
        let (specs, expert_specs) = (entries.specs, routed.specs);
        Self { specs, expert_specs, projections, qkv, o, mlp, input_norm, post_attention_norm, qk_norm }
    }

    /// A gathered unit with its gathered adapters, as views of its slots in `layers` and `experts`, the rings of the two
    /// regions. Rows go to the experts of other ranks by `dispatcher`.
    pub fn bind(
        &self,
        [layers, experts]: [&SlotPool; 2],
        unit: usize,
        adapters: &[&mut Adapter],
        dispatcher: Option<&ExpertDispatcher>,
    ) -> Result<Layer, ShardError> {
        let view = |entry| layers.view(unit, entry);
        // With the adapters of projection `place`.
        let adapted = |bases: Vec<Base>, place: usize| {
            let adapters =
                adapters.iter().map(|adapter| adapter.bind(unit, place)).collect::<Result<_, _>>()?;
            Ok::<_, ShardError>(Linear { bases, adapters })
        };
        let linear = |entries: &BaseEntries, place| {
            let base = |&(weight, bias): &(usize, Option<usize>)| {
                let weight = Matrices::Shared(view(weight)?);
                Ok::<_, ShardError>(Base { weight, bias: bias.map(view).transpose()? })
            };
            adapted(entries.iter().map(base).collect::<Result<_, _>>()?, place)
        };
        let gated = |plan: &GatedPlan, gate_up, down| {
            Ok::<_, ShardError>(GatedMlp {
                gate_up: linear(&plan.gate_up, gate_up)?,
                down: linear(&plan.down, down)?,
            })
        };
        let routed = |entry, place| {
            let weight = Matrices::Each(experts.view(unit, entry)?);
            adapted(vec![Base { weight, bias: None }], place)
        };
        let mlp = match &self.mlp {
            MlpPlan::Dense(plan) => Mlp::Dense(gated(plan, GATE_UP, DOWN)?),
            MlpPlan::Moe { router, choice, experts: [gate_up, down], shared } => Mlp::Moe(Moe {
                router: view(*router)?,
                choice: *choice,
                experts: GatedMlp { gate_up: routed(*gate_up, GATE_UP)?, down: routed(*down, DOWN)? },
                dispatcher: dispatcher.cloned(),
                shared: match shared {
                    Some((plan, gate)) => {
                        let mlp = gated(plan, SHARED_GATE_UP, SHARED_DOWN)?;
                        Some(Box::new(SharedExpert { mlp, gate: view(*gate)? }))
                    }
                    None => None,
                },
            }),
        };
        Ok(Layer {
            qkv: linear(&self.qkv, QKV)?,
            o: linear(&self.o, O)?,
            mlp,
            input_norm: view(self.input_norm)?,
            post_attention_norm: view(self.post_attention_norm)?,
            qk_norm: self.qk_norm.map(|[q, k]| Ok::<_, ShardError>([view(q)?, view(k)?])).transpose()?,
        })
    }
}

/// `leaves` of a projection, one below the other: `[Σ widths, input]`, or `[Σ widths]` for a bias.
fn stacked(
    projection: &Projection,
    leaves: &[(&'static str, usize)],
    kind: &str,
    input: usize,
    dtype: DType,
) -> EntrySpec {
    let rows = leaves.iter().map(|(_, width)| width).sum();
    let spans = leaves.iter().map(|(leaf, width)| Span {
        tensor: format!("{}.{leaf}.{kind}", projection.parent),
        start: 0,
        elements: width * input,
    });
    let names: Vec<&str> = leaves.iter().map(|(leaf, _)| *leaf).collect();
    let shape = if kind == "bias" { vec![rows] } else { vec![rows, input] };
    EntrySpec { name: format!("{}.{kind}", names.join("|")), shape, dtype, spans: spans.collect() }
}

/// A whole decoder layer: frozen tensors and adapters, with where the gradients of these go.
pub struct Layer {
    pub qkv: Linear,
    pub o: Linear,
    pub mlp: Mlp,
    /// `[hidden]` fp32
    pub input_norm: Tensor,
    /// `[hidden]` fp32
    pub post_attention_norm: Tensor,
    /// q and k: `[head_dim]` fp32, or all heads' widths
    pub qk_norm: Option<[Tensor; 2]>,
}

/// What follows the attention.
pub enum Mlp {
    Dense(GatedMlp),
    Moe(Moe),
}
