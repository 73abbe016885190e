//! What a decoder layer is made of: its base tensors, its projections, and where each lies in its region. Pure:
//! names and shapes; [`LayerPlan::bind`] then turns a gathered unit into weights.

use super::spec::ModelSpec;
use crate::{
    dtype::DType,
    lora::{LoraLinear, targets::Projection},
    ops::linear::{Adapter, AdapterGradient, Base},
    shard::{AdapterShards, EntrySpec, Ring, ShardError, Span},
};
use tch::Tensor;

/// The linear layers of a decoder layer, in the order of [`LayerPlan::projections`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Linear {
    Qkv,
    O,
    GateUp,
    Down,
}

const LINEARS: [Linear; 4] = [Linear::Qkv, Linear::O, Linear::GateUp, Linear::Down];

/// Where a linear layer's frozen tensors lie: (weight entry, bias entry) of each GEMM.
type BaseEntries = Vec<(usize, Option<usize>)>;

/// Entries of one decoder layer's region.
#[derive(Clone, Debug)]
pub struct LayerPlan {
    pub specs: Vec<EntrySpec>,
    pub projections: Vec<Projection>,
    linears: [BaseEntries; 4],
    input_norm: usize,
    post_attention_norm: usize,
    /// q_norm, k_norm
    qk_norm: Option<[usize; 2]>,
}

/// The projections of layer `index`.
pub fn projections(spec: &ModelSpec, index: usize) -> Vec<Projection> {
    let (q, kv) = (spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim);
    let (hidden, wide) = (spec.hidden_size, spec.intermediate_size);
    let projection = |parent: &str, fused, leaves: &[(&'static str, usize)], input| Projection {
        parent: format!("model.layers.{index}.{parent}"),
        fused,
        leaves: leaves.to_vec(),
        input,
    };
    vec![
        projection("self_attn", Some("qkv_proj"), &[("q_proj", q), ("k_proj", kv), ("v_proj", kv)], hidden),
        projection("self_attn", None, &[("o_proj", hidden)], q),
        projection("mlp", Some("gate_up_proj"), &[("gate_proj", wide), ("up_proj", wide)], hidden),
        projection("mlp", None, &[("down_proj", hidden)], wide),
    ]
}

impl LayerPlan {
    /// The plan of layer `index`: matrices in `compute` dtype, norm weights in fp32. `merge` fuses q, k, v and
    /// gate, up into one GEMM each.
    pub fn new(spec: &ModelSpec, index: usize, compute: DType, merge: bool) -> Self {
        let projections = projections(spec, index);
        let biased = |linear| match linear {
            Linear::Qkv => spec.qkv_bias,
            Linear::O => spec.o_bias,
            Linear::GateUp | Linear::Down => spec.mlp_bias,
        };
        let mut specs = Vec::new();
        let mut push = |entry: EntrySpec| {
            specs.push(entry);
            specs.len() - 1
        };
        let linears = std::array::from_fn(|i| {
            let projection = &projections[i];
            let leaves: Vec<&[(&'static str, usize)]> =
                if merge { vec![&projection.leaves[..]] } else { projection.leaves.chunks(1).collect() };
            let gemm = |leaves: &[(&'static str, usize)]| {
                let weight = push(stacked(projection, leaves, "weight", projection.input, compute));
                let bias = biased(LINEARS[i]).then(|| push(stacked(projection, leaves, "bias", 1, compute)));
                (weight, bias)
            };
            leaves.into_iter().map(gemm).collect()
        });
        let mut norm = |name: &str, width| {
            let tensor = format!("model.layers.{index}.{name}.weight");
            push(EntrySpec::whole(name, tensor, &[width], DType::F32))
        };
        let input_norm = norm("input_layernorm", spec.hidden_size);
        let post_attention_norm = norm("post_attention_layernorm", spec.hidden_size);
        let qk_norm = spec
            .qk_norm
            .then(|| ["q_norm", "k_norm"].map(|n| norm(&format!("self_attn.{n}"), spec.head_dim)));
        Self { specs, projections, linears, input_norm, post_attention_norm, qk_norm }
    }

    /// The weights of a gathered unit, as views of its slot.
    pub fn bind(&self, ring: &Ring, unit: usize) -> Result<LayerWeights, ShardError> {
        let view = |entry| ring.view(unit, entry);
        let base = |&(weight, bias): &(usize, Option<usize>)| {
            Ok::<_, ShardError>(Base { weight: view(weight)?, bias: bias.map(view).transpose()? })
        };
        let bases = |i: usize| self.linears[i].iter().map(base).collect::<Result<Vec<_>, _>>();
        Ok(LayerWeights {
            bases: [bases(0)?, bases(1)?, bases(2)?, bases(3)?],
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

/// A whole decoder layer's frozen tensors.
pub struct LayerWeights {
    bases: [Vec<Base>; 4],
    /// `[hidden]` fp32
    pub input_norm: Tensor,
    /// `[hidden]` fp32
    pub post_attention_norm: Tensor,
    /// q and k: `[head_dim]` fp32
    pub qk_norm: Option<[Tensor; 2]>,
}

impl LayerWeights {
    pub fn bases(&self, linear: Linear) -> &[Base] {
        &self.bases[linear as usize]
    }
}

/// The adapters of one decoder layer, by linear layer.
#[derive(Clone, Debug, Default)]
pub struct LayerAdapterPlan {
    pub modules: [Option<LoraLinear>; 4],
}

impl LayerAdapterPlan {
    /// The gathered adapters of `unit`, and where their gradients go.
    pub fn bind(&self, shards: &AdapterShards, unit: usize) -> Result<LayerAdapters, ShardError> {
        let bind = |module: &LoraLinear| {
            Ok::<_, ShardError>((module.bind(shards, unit)?, module.gradient(shards, unit)))
        };
        let [a, b, c, d] = self.modules.each_ref().map(|module| module.as_ref().map(bind).transpose());
        Ok(LayerAdapters { adapters: [a?, b?, c?, d?] })
    }
}

/// Whole adapters of a decoder layer with their gradients.
pub struct LayerAdapters {
    adapters: [Option<(Adapter, AdapterGradient)>; 4],
}

impl LayerAdapters {
    pub fn adapter(&self, linear: Linear) -> Option<&Adapter> {
        self.adapters[linear as usize].as_ref().map(|(adapter, _)| adapter)
    }

    pub fn with_gradient(&self, linear: Linear) -> Option<(&Adapter, &AdapterGradient)> {
        self.adapters[linear as usize].as_ref().map(|(adapter, gradient)| (adapter, gradient))
    }
}
