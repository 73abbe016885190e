//! Merging of an adapter into the base: ΔW = s·B·A on tensors of the model's files, and W′ = round(W + ΔW), rounded
//! once. Pure: values in, values out; the files and the shards are the callers' business. Packed matrices are decoded,
//! summed and packed anew by `requantise`.

use super::{
    requantise::Sum,
    shape::LoraShapes,
    targets::{Factor, Site, file_tensor},
};
use crate::{
    dtype::DType,
    quant::{Format, Grid},
    shard::{Change, Piece, Scales, ShardError, Storage},
};
use std::{
    collections::{BTreeMap, HashMap},
    ops::{AddAssign, Range},
};
use tch::{Device, Kind, TchError, Tensor};

/// Lost part of a delta from which on a warning says so.
pub const MUCH_LOST: f64 = 0.5;
/// Elements merged at a time.
pub const PART: usize = 1 << 20;

/// The tensors of a model's files that an adapter changes, by name.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MergePlan {
    terms: BTreeMap<String, Term>,
}

/// ΔW of one tensor: the product of an A and rows of a B, times a factor.
#[derive(Clone, Debug, PartialEq)]
struct Term {
    /// Names of the logical parameters.
    a: String,
    b: String,
    /// Rows of B: a fused target has one B for several tensors.
    first_row: usize,
    /// Rows of the tensor.
    rows: usize,
    rank: usize,
    input: usize,
    scaling: f64,
}

impl MergePlan {
    /// The tensors that adapters of `shapes` on `sites` change: each leaf of a site is one, or one of each expert.
    pub fn new(sites: &[Site], shapes: &LoraShapes) -> Self {
        let mut terms = BTreeMap::new();
        for site in sites {
            let shape = shapes.of(site);
            for copy in 0..site.experts.map_or(1, |experts| experts.count) {
                let mut first_row = 0;
                for (leaf, width) in &site.leaves {
                    let term = Term {
                        a: format!("{}.lora_A", site.path_of(Factor::A, copy)),
                        b: format!("{}.lora_B", site.path_of(Factor::B, copy)),
                        first_row,
                        rows: *width,
                        rank: shape.rank,
                        input: site.input,
                        scaling: shape.scaling(),
                    };
                    terms.insert(file_tensor(&site.parent, site.experts, copy, leaf), term);
                    first_row += width;
                }
            }
        }
        Self { terms }
    }

    /// Columns of the matrix `tensor`; `None` for a tensor that stays as it is.
    pub fn columns(&self, tensor: &str) -> Option<usize> {
        self.terms.get(tensor).map(|term| term.input)
    }

    /// The matrix `tensor` in `format`; `None` for a tensor that stays as it is.
    pub fn grid(&self, tensor: &str, format: Format) -> Option<Grid> {
        let Term { rows, input, .. } = *self.terms.get(tensor)?;
        Some(Grid { format, rows, columns: input })
    }

    /// True if ΔW of `tensor` is zero: it has no adapter, or one of which A or its rows of B are zero.
    pub fn is_zero(&self, tensor: &str, values: &HashMap<String, Vec<f32>>) -> bool {
        let Some(Term { a, b, first_row, rows, rank, .. }) = self.terms.get(tensor) else { return true };
        let zero = |values: &[f32]| values.iter().all(|&value| value == 0.0);
        zero(&values[a]) || zero(&values[b][first_row * rank..(first_row + rows) * rank])
    }

    /// Elements `range`, row by row, of ΔW of `tensor` `[rows, columns]`: `[elements]` fp32; `None` for a tensor that
    /// stays as it is. `values`: A and B by logical parameter name.
    pub fn delta(
        &self,
        tensor: &str,
        range: Range<usize>,
        values: &HashMap<String, Vec<f32>>,
    ) -> Result<Option<Tensor>, TchError> {
        self.delta_in(Kind::Float, tensor, range, values)
    }

    /// The same in `kind`.
    fn delta_in(
        &self,
        kind: Kind,
        tensor: &str,
        range: Range<usize>,
        values: &HashMap<String, Vec<f32>>,
    ) -> Result<Option<Tensor>, TchError> {
        let Some(Term { a, b, first_row, rank, input, scaling, .. }) = self.terms.get(tensor) else {
            return Ok(None);
        };
        let rows = range.start / input..range.end.div_ceil(*input);
        let of_b = (first_row + rows.start) * rank..(first_row + rows.end) * rank;
        let [rank, input] = [*rank, *input].map(|size| size as i64);
        let a = Tensor::f_from_slice(&values[a])?.f_to_kind(kind)?.f_view([rank, input])?;
        let b = Tensor::f_from_slice(&values[b][of_b])?.f_to_kind(kind)?.f_view([-1, rank])?;
        let delta = b.f_matmul(&a)?.f_mul_scalar(*scaling)?.f_view([-1])?;
        let before = range.start as i64 - rows.start as i64 * input;
        Ok(Some(delta.f_narrow(0, before, range.len() as i64)?))
    }
}

impl MergePlan {
    /// W + ΔW of the elements that `tiles` hold, a run of the tiles of the matrix `tensor`, which have the bytes
    /// `packed` and the scale `global`. ΔW is computed in fp64, so that it does not depend on the run; `values`: A and
    /// B by logical parameter name.
    ///
    /// # Errors
    /// A tensor that no adapter changes, or a wrong length (bugs); those of libtorch.
    pub fn sum(
        &self,
        tensor: &str,
        format: Format,
        tiles: Range<usize>,
        packed: &[u8],
        global: f32,
        values: &HashMap<String, Vec<f32>>,
    ) -> Result<Sum, ShardError> {
        let grid = self.grid(tensor, format).unwrap_or(Grid { format, rows: 0, columns: 0 });
        let delta = self.delta_in(Kind::Double, tensor, grid.elements(tiles.clone()), values)?;
        let delta = delta.map(Vec::<f64>::try_from).transpose()?.unwrap_or_default();
        let sum = Sum::new(grid, tiles, packed, global, delta);
        sum.map_err(|error| ShardError::Packed { tensor: tensor.to_owned(), error })
    }
}

/// A merge of an adapter into the tensors that a rank owns.
pub struct MergeInto<'a> {
    pub plan: &'a MergePlan,
    /// A and B by logical parameter name.
    pub values: &'a HashMap<String, Vec<f32>>,
    /// The fate of the deltas so far.
    pub kept: Survival,
}

impl MergeInto<'_> {
    /// Adds ΔW to the plain elements of `piece`, of which `stored` `[elements]` is a view.
    fn plain(&mut self, piece: &Piece, stored: &Tensor, dtype: DType) -> Result<(), ShardError> {
        let Range { start, end } = piece.range;
        for first in (start..end).step_by(PART) {
            let range = first..end.min(first + PART);
            let mut part = stored.f_narrow(0, (first - start) as i64, range.len() as i64)?;
            let Some(delta) = self.plan.delta(&piece.tensor, range, self.values)? else { continue };
            let delta = delta.f_to_device(part.device())?;
            let (new, kept) = merged(&part, &delta, dtype)?;
            part.f_copy_(&new)?;
            self.kept += kept;
        }
        Ok(())
    }

    /// Calls `each` with a view of each run of the tiles `stored` `[tiles, bytes]` and with the sum of its elements.
    /// Nothing where there is no delta: a merge of nothing changes no tile.
    fn runs(
        &self,
        piece: &Piece,
        stored: &Tensor,
        global: f32,
        mut each: impl FnMut(Tensor, Vec<u8>, Sum) -> Result<(), ShardError>,
    ) -> Result<(), ShardError> {
        let Storage::Packed(format) = piece.storage else { return Ok(()) };
        let Some(grid) = self.plan.grid(&piece.tensor, format) else { return Ok(()) };
        if self.plan.is_zero(&piece.tensor, self.values) {
            return Ok(());
        }
        let elements = format.tile().elements;
        let tiles = piece.range.start / elements..piece.range.end.div_ceil(elements);
        for run in grid.runs(tiles.clone()) {
            let part = stored.f_narrow(0, (run.start - tiles.start) as i64, run.len() as i64)?;
            let bytes = Vec::<u8>::try_from(part.f_to_device(Device::Cpu)?.f_contiguous()?.f_view([-1])?)?;
            let sum = self.plan.sum(&piece.tensor, format, run, &bytes, global, self.values)?;
            each(part, bytes, sum)?;
        }
        Ok(())
    }
}

impl Change for MergeInto<'_> {
    fn amax(&mut self, piece: &Piece, stored: &Tensor, before: f32) -> Result<Option<f32>, ShardError> {
        let mut most = None;
        self.runs(piece, stored, before, |_, _, sum| {
            most = Some(sum.amax().max(most.unwrap_or(0.0)));
            Ok(())
        })?;
        Ok(most)
    }

    fn apply(&mut self, piece: &Piece, stored: &Tensor, scales: Scales) -> Result<(), ShardError> {
        if self.plan.columns(&piece.tensor).is_none() {
            return Ok(());
        }
        if let Storage::Plain(dtype) = piece.storage {
            return self.plain(piece, stored, dtype);
        }
        let mut kept = Survival::default();
        self.runs(piece, stored, scales.before, |mut part, mut bytes, sum| {
            kept += sum.pack(scales.after, &mut bytes);
            part.f_copy_(&Tensor::f_from_slice(&bytes)?.f_view_as(&part)?)?;
            Ok(())
        })?;
        self.kept += kept;
        Ok(())
    }
}

/// The part of a delta that rounding lost: Σ over elements, so that parts of a tensor add up.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Survival {
    /// Σ ΔW²
    pub delta: f64,
    /// Σ (W′ − (W + ΔW))²
    pub lost: f64,
}

impl Survival {
    /// ‖W′ − (W + ΔW)‖ / ‖ΔW‖: 0 keeps all of the delta, 1 loses as much as there is; 0 without a delta.
    pub fn lost_share(&self) -> f64 {
        if self.delta > 0.0 { (self.lost / self.delta).sqrt() } else { 0.0 }
    }
}

impl AddAssign for Survival {
    fn add_assign(&mut self, other: Self) {
        self.delta += other.delta;
        self.lost += other.lost;
    }
}

/// W′ = round(W + ΔW) of `base` `[elements]` of any float dtype and `delta` `[elements]` fp32, both on one device. W′
/// is in `dtype`, rounded to nearest even. Every merge rounds here alone.
///
/// # Errors
/// Those of libtorch.
pub fn merged(base: &Tensor, delta: &Tensor, dtype: DType) -> Result<(Tensor, Survival), ShardError> {
    // Exact in fp64, so that what rounding to fp32 loses counts too.
    let (exact, delta) = (base.f_to_kind(Kind::Double)?, delta.f_to_kind(Kind::Double)?);
    let exact = exact.f_add(&delta)?;
    let stored = exact.f_to_kind(Kind::Float)?.f_to_kind(dtype.kind())?;
    let lost = stored.f_to_kind(Kind::Double)?.f_sub(&exact)?;
    let sum_of_squares = |values: &Tensor| values.f_square()?.f_sum(Kind::Double)?.f_double_value(&[]);
    Ok((stored, Survival { delta: sum_of_squares(&delta)?, lost: sum_of_squares(&lost)? }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lora::{Experts, LoraShape, MoeNames, targets::Projection};

    const MIXTRAL: MoeNames = MoeNames { block: "block_sparse_moe", gate: "w1", up: "w3", down: "w2" };

    fn projection(parent: &str, experts: Option<Experts>) -> Projection {
        Projection {
            parent: parent.into(),
            fused: Some("gate_up_proj"),
            leaves: vec![("gate_proj", 3), ("up_proj", 3)],
            input: 4,
            experts,
        }
    }

    fn values(plan: &MergePlan, rows_of_b: usize) -> HashMap<String, Vec<f32>> {
        let number = |name: &str, i: usize| ((name.len() * 7 + i * 13) % 11) as f32 - 5.0;
        let filled = |name: &String, n: usize| (name.clone(), (0..n).map(|i| number(name, i)).collect());
        let both = |term: &Term| [filled(&term.a, 2 * 4), filled(&term.b, rows_of_b * 2)];
        plan.terms.values().flat_map(both).collect()
    }

    /// s · Σ_r B[row, r] · A[r, column], written out.
    fn formula(a: &[f32], b: &[f32], at: usize, scaling: f32) -> f32 {
        let (row, column) = (at / 4, at % 4);
        (0..2).map(|r| b[row * 2 + r] * a[r * 4 + column]).sum::<f32>() * scaling
    }

    #[test]
    fn any_run_of_elements_is_that_of_the_product() {
        let site = projection("model.layers.0.mlp", None).fused_site().unwrap();
        let plan = MergePlan::new(&[site], &LoraShape::new(2, 3.0).into());
        let values = values(&plan, 6);
        let (a, b) = (
            &values["model.layers.0.mlp.gate_up_proj.lora_A"],
            &values["model.layers.0.mlp.gate_up_proj.lora_B"],
        );
        for (tensor, first) in [("gate_proj", 0), ("up_proj", 12)] {
            let name = format!("model.layers.0.mlp.{tensor}.weight");
            assert_eq!(plan.columns(&name), Some(4));
            for range in [0..12, 0..1, 3..9, 5..7, 11..12, 4..8] {
                let found = plan.delta(&name, range.clone(), &values).unwrap().unwrap();
                let expected: Vec<f32> = range.map(|at| formula(a, b, first + at, 1.5)).collect();
                assert_eq!(Vec::<f32>::try_from(found).unwrap(), expected);
            }
        }
        assert!(plan.delta("model.layers.0.mlp.down_proj.weight", 0..1, &values).unwrap().is_none());
    }

    #[test]
    fn experts_are_changed_under_the_names_of_the_files() {
        let experts = Some(Experts { count: 2, top_k: 1, names: MIXTRAL });
        let sites: Vec<Site> = projection("model.layers.5.mlp.experts", experts).leaf_sites();
        let of = |sites: &[Site]| MergePlan::new(sites, &LoraShape::new(2, 2.0).into());
        let plan = of(&sites);
        let block = "model.layers.5.block_sparse_moe.experts";
        let names: Vec<&String> = plan.terms.keys().collect();
        assert_eq!(
            names,
            ["0.w1", "0.w3", "1.w1", "1.w3"].map(|name| format!("{block}.{name}.weight")).each_ref()
        );
        let term = &plan.terms[&format!("{block}.1.w3.weight")];
        assert_eq!(term.b, "model.layers.5.mlp.experts.1.up_proj.lora_B");
        let shared = of(&sites.into_iter().map(Site::hybrid).collect::<Vec<_>>());
        let term = &shared.terms[&format!("{block}.1.w3.weight")];
        assert_eq!(term.a, "model.layers.5.mlp.experts.shared.up_proj.lora_A");
        assert_eq!(term.b, "model.layers.5.mlp.experts.1.up_proj.lora_B");
    }

    #[test]
    fn rounding_is_done_once_and_its_loss_is_measured() {
        let base = Tensor::from_slice(&[1.0f32, 2.0, -3.0]);
        let delta = Tensor::from_slice(&[2f32.powi(-8) + 2f32.powi(-20), 0.5, 2f32.powi(-12)]);
        let bf16 = base.to_kind(Kind::BFloat16);
        let (found, survival) = merged(&bf16, &delta, DType::Bf16).unwrap();
        // Above half a unit of the last place: up; far below it: nothing.
        assert_eq!(
            Vec::<f32>::try_from(found.to_kind(Kind::Float)).unwrap(),
            [1.0 + 2f32.powi(-7), 2.5, -3.0]
        );
        let lost = (2f64.powi(-7) - 2f64.powi(-8) - 2f64.powi(-20)).powi(2) + 2f64.powi(-24);
        assert!((survival.lost - lost).abs() < 1e-12 && survival.lost_share() < 0.01, "{survival:?}");
        let (_, exact) = merged(&base, &delta, DType::F32).unwrap();
        assert!(exact.lost_share() < 1e-7);

        let tiny = Tensor::from_slice(&[1e-5f32; 3]);
        let (found, erased) = merged(&bf16, &tiny, DType::Bf16).unwrap();
        assert_eq!(found, bf16);
        assert!((erased.lost_share() - 1.0).abs() < 1e-6);
    }
}
