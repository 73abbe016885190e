//! Tensors of an adapter file that hold one factor of one leaf: linear layers in every format, routed experts in the
//! formats that keep them apart or stack them. Pure: keys, shapes and places of values.
//!
//! - linear layers: `….{leaf}.lora_A.weight` `[rank, in]`, `….lora_B.weight` `[out, rank]`, with DoRA
//!   `….lora_magnitude_vector` `[out]`
//! - `per_expert`: the same below `experts.{e}`, a shared factor for every expert
//! - `sglang_shared_outer`: `experts.w1|w3|w2` (gate, up, down), with a leading dimension of the experts, 1 where
//!   shared
//!
//! Experts are named as in the model's own files, as serving stacks name them (Mixtral:
//! `block_sparse_moe.experts.{e}.w1`). Names of transformers 5's modules (`mlp.experts.{e}.gate_proj`) are read too.
//!
//! The A of a fused target is written for each leaf, and its B is cut.

use super::LogicalAdapter;
use crate::{
    config::ExportFormat,
    lora::{Factor, MoeNames},
};
use std::{borrow::Cow, ops::Range};

/// One tensor of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Stored {
    pub key: String,
    pub shape: Vec<usize>,
    factor: Factor,
    /// Rows of each expert's factor, or of the one factor.
    rows: Range<usize>,
    /// The experts whose rows it has, one expert after another.
    experts: Range<usize>,
    /// The tensor repeats that of another leaf.
    pub repeats: bool,
}

/// The layout of routed experts in a file. xorl's own layout writes shared factors once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    pub format: ExportFormat,
    pub shared_once: bool,
    /// Experts have the paths of transformers' modules instead of those of the model's files.
    pub as_modules: bool,
}

impl From<ExportFormat> for Layout {
    fn from(format: ExportFormat) -> Self {
        Self { format, shared_once: false, as_modules: false }
    }
}

impl Layout {
    /// The layout of a file with these keys.
    pub fn of<'a>(keys: impl IntoIterator<Item = &'a str>) -> Self {
        let mut layout = Self::from(ExportFormat::Peft);
        for key in keys {
            let Some((parent, rest)) = key.split_once(".experts.") else { continue };
            layout.as_modules = parent.ends_with(".mlp");
            match rest.split('.').next().unwrap_or_default() {
                "w1" | "w2" | "w3" => layout.format = ExportFormat::SglangSharedOuter,
                "shared" => {
                    layout.format = ExportFormat::PerExpert;
                    layout.shared_once = true;
                }
                number if number.parse::<usize>().is_ok() => layout.format = ExportFormat::PerExpert,
                _ => {}
            }
        }
        layout
    }

    /// The tensors of `adapter`; none for experts in PEFT's format, which `experts` lays out.
    pub fn tensors(self, adapter: &LogicalAdapter) -> Vec<Stored> {
        let mut tensors = Vec::new();
        let mut first = 0;
        let mut names = if self.as_modules { MoeNames::MLP } else { adapter.names };
        if self.format == ExportFormat::SglangSharedOuter {
            names = MoeNames { gate: "w1", up: "w3", down: "w2", ..names };
        }
        let parent = match adapter.parent.strip_suffix("mlp.experts") {
            Some(layer) => format!("{layer}{}.experts", names.block),
            None => adapter.parent.clone(),
        };
        for (place, (leaf, width)) in adapter.leaves.iter().enumerate() {
            let rows_of_b = first..first + width;
            first += width;
            for &factor in Factor::all(adapter.shape.use_dora) {
                let (rows, columns) = match factor {
                    Factor::A => (0..adapter.shape.rank, adapter.input),
                    Factor::B => (rows_of_b.clone(), adapter.shape.rank),
                    Factor::Magnitude => (rows_of_b.clone(), 1),
                };
                let (weight, suffix) =
                    (if factor == Factor::Magnitude { "" } else { ".weight" }, factor.suffix());
                let mut push = |name: &str, experts: Range<usize>, leading: bool| {
                    // Magnitudes are a vector.
                    let dimensions =
                        [rows.len(), columns].into_iter().take(if weight.is_empty() { 1 } else { 2 });
                    tensors.push(Stored {
                        key: format!("base_model.model.{parent}.{name}.{suffix}{weight}"),
                        shape: leading.then_some(experts.len()).into_iter().chain(dimensions).collect(),
                        factor,
                        rows: rows.clone(),
                        experts,
                        repeats: factor == Factor::A && place > 0,
                    });
                };
                let shared = adapter.shared == Some(factor);
                match (adapter.experts, self.format) {
                    (None, _) => push(leaf, 0..1, false),
                    (Some(_), ExportFormat::Peft) => {}
                    (Some(_), ExportFormat::PerExpert) if shared && self.shared_once => {
                        push(&format!("shared.{}", names.leaf(leaf)), 0..1, false);
                    }
                    (Some(count), ExportFormat::PerExpert) => {
                        let leaf = names.leaf(leaf);
                        (0..count).for_each(|e| push(&format!("{e}.{leaf}"), e..e + 1, false));
                    }
                    (Some(count), ExportFormat::SglangSharedOuter) => {
                        push(names.leaf(leaf), if shared { 0..1 } else { 0..count }, true);
                    }
                }
            }
        }
        tensors
    }
}

impl Stored {
    /// The dotted path of the module that has the factor.
    pub fn module(&self) -> &str {
        let path = self.key.trim_start_matches("base_model.model.");
        [".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"]
            .iter()
            .fold(path, |path, end| path.trim_end_matches(end))
    }

    /// Elements of `expert`'s rows in the factor of `adapter`.
    fn elements(&self, adapter: &LogicalAdapter, expert: usize) -> Range<usize> {
        let (all, columns) = match self.factor {
            Factor::A => (adapter.shape.rank, adapter.input),
            Factor::B => (adapter.output(), adapter.shape.rank),
            Factor::Magnitude => (adapter.output(), 1),
        };
        let first = (expert * all + self.rows.start) * columns;
        first..first + self.rows.len() * columns
    }

    /// The values out of `adapter`; fewer than the shape says if `adapter` has too few.
    pub fn values<'a>(&self, adapter: &'a LogicalAdapter) -> Cow<'a, [f32]> {
        let factor = match self.factor {
            Factor::A => &adapter.a,
            Factor::B => &adapter.b,
            Factor::Magnitude => &adapter.magnitude,
        };
        let of = |expert| factor.get(self.elements(adapter, expert)).unwrap_or_default();
        match self.experts.len() {
            1 => of(self.experts.start).into(),
            _ => self.experts.clone().flat_map(|expert| of(expert).iter().copied()).collect(),
        }
    }

    /// Puts `values`, as many as the shape says, into `adapter`, whose A and B have their full length.
    pub fn fill(&self, values: &[f32], adapter: &mut LogicalAdapter) {
        // A factor that all experts share belongs to each.
        let is_shared = adapter.shared == Some(self.factor) && self.experts == (0..1);
        let experts = if is_shared { 0..adapter.experts.unwrap_or(1) } else { self.experts.clone() };
        let each = values.len() / self.experts.len().max(1);
        for expert in experts {
            let place = if is_shared { 0 } else { expert - self.experts.start };
            let at = self.elements(adapter, expert);
            let factor = match self.factor {
                Factor::A => &mut adapter.a,
                Factor::B => &mut adapter.b,
                Factor::Magnitude => &mut adapter.magnitude,
            };
            factor[at].copy_from_slice(&values[place * each..(place + 1) * each]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lora::LoraShape;

    /// gate and up as one target on three experts, rank 2, in 3, widths 1 and 2.
    fn fused(shared: Option<Factor>) -> LogicalAdapter {
        let values = |n: usize, from: usize| (0..n).map(|i| (from + i) as f32).collect::<Vec<_>>();
        let repeated = |factor, each: Vec<f32>, all: Vec<f32>| {
            if shared == Some(factor) { each.repeat(3) } else { all }
        };
        LogicalAdapter {
            parent: "model.layers.1.mlp.experts".into(),
            leaves: vec![("gate_proj".into(), 1), ("up_proj".into(), 2)],
            shape: LoraShape::new(2, 4.0),
            input: 3,
            experts: Some(3),
            names: MoeNames::MLP,
            shared,
            a: repeated(Factor::A, values(6, 0), values(18, 0)),
            b: repeated(Factor::B, values(6, 100), values(18, 100)),
            magnitude: Vec::new(),
        }
    }

    #[test]
    fn keys_shapes_and_values_of_each_format() {
        let adapter = fused(Some(Factor::A));
        assert!(Layout::from(ExportFormat::Peft).tensors(&adapter).is_empty());
        let found = |layout: Layout| -> Vec<(String, Vec<usize>, Vec<f32>)> {
            let tensors = layout.tensors(&adapter);
            let of = |stored: &Stored| {
                let key = stored.key.strip_prefix("base_model.model.model.layers.1.mlp.experts.").unwrap();
                (key.to_owned(), stored.shape.clone(), stored.values(&adapter).into_owned())
            };
            tensors.iter().map(of).collect()
        };
        let apart = found(ExportFormat::PerExpert.into());
        assert_eq!(apart.len(), 3 * 4);
        let a = vec![0.0, 1.0, 2.0, 3.0, 4.0, 5.0];
        assert_eq!(apart[2], ("2.gate_proj.lora_A.weight".into(), vec![2, 3], a.clone()));
        assert_eq!(
            apart[10],
            ("1.up_proj.lora_B.weight".into(), vec![2, 2], vec![108.0, 109.0, 110.0, 111.0])
        );
        let outer = found(ExportFormat::SglangSharedOuter.into());
        let names: Vec<_> = outer.iter().map(|(key, shape, _)| (key.as_str(), shape.as_slice())).collect();
        let expected: [(&str, &[usize]); 4] = [
            ("w1.lora_A.weight", &[1, 2, 3]),
            ("w1.lora_B.weight", &[3, 1, 2]),
            ("w3.lora_A.weight", &[1, 2, 3]),
            ("w3.lora_B.weight", &[3, 2, 2]),
        ];
        assert_eq!(names, expected);
        assert_eq!((&outer[0].2, &outer[2].2), (&a, &a));
        assert_eq!(outer[1].2, [100.0, 101.0, 106.0, 107.0, 112.0, 113.0]);
    }

    const MIXTRAL: MoeNames = MoeNames { block: "block_sparse_moe", gate: "w1", up: "w3", down: "w2" };

    #[test]
    fn experts_are_called_what_the_models_files_call_them() {
        let adapter = LogicalAdapter { names: MIXTRAL, ..fused(None) };
        let first = |layout: Layout| layout.tensors(&adapter)[0].key.clone();
        let block = "base_model.model.model.layers.1.block_sparse_moe.experts";
        assert_eq!(first(ExportFormat::PerExpert.into()), format!("{block}.0.w1.lora_A.weight"));
        assert_eq!(first(ExportFormat::SglangSharedOuter.into()), format!("{block}.w1.lora_A.weight"));
        let keys = ["base_model.model.model.layers.1.mlp.experts.0.gate_proj.lora_A.weight"];
        assert_eq!(first(Layout::of(keys)), keys[0]);
        let written = first(ExportFormat::PerExpert.into());
        assert_eq!(Layout::of([written.as_str()]), ExportFormat::PerExpert.into());
    }

    #[test]
    fn what_is_written_is_read() {
        for shared in [None, Some(Factor::A), Some(Factor::B)] {
            for format in [ExportFormat::PerExpert, ExportFormat::SglangSharedOuter] {
                for (shared_once, as_modules) in [(false, false), (true, false), (true, true)] {
                    let adapter = LogicalAdapter { names: MIXTRAL, ..fused(shared) };
                    let layout = Layout { format, shared_once, as_modules };
                    let room = |values: &[f32]| vec![f32::NAN; values.len()];
                    let mut back =
                        LogicalAdapter { a: room(&adapter.a), b: room(&adapter.b), ..adapter.clone() };
                    for stored in layout.tensors(&adapter) {
                        let values = stored.values(&adapter).into_owned();
                        assert_eq!(values.len(), stored.shape.iter().product::<usize>());
                        stored.fill(&values, &mut back);
                    }
                    assert_eq!(back, adapter, "{layout:?}");
                }
            }
        }
    }

    #[test]
    fn a_layout_is_told_by_its_keys() {
        let of =
            |key: &str| Layout::of(["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", key]);
        let key = |rest: &str| format!("base_model.model.model.layers.0.mlp.experts.{rest}.weight");
        assert_eq!(of(&key("base_layer.lora_A")).format, ExportFormat::Peft);
        assert_eq!(of(&key("11.up_proj.lora_B")).format, ExportFormat::PerExpert);
        assert_eq!(of(&key("w3.lora_B")).format, ExportFormat::SglangSharedOuter);
        assert!(of(&key("shared.up_proj.lora_A")).shared_once);
    }
}
