//! PiSSA (Meng et al., 2024): A and B start from the first r singular vectors of the base's matrix W, and the base
//! keeps the rest. With W = U·diag(σ)·Vᵀ and scale s: A₀ = √(σ/s)·Vᵀ, B₀ = U·√(σ/s) of the r largest σ, so s·B₀·A₀ is
//! the best W of rank r, and training has W − s·B₀·A₀ as its base. Pure.
//!
//! Beside the base as it was, the trained adapter is s·(B·A − B₀·A₀): one of rank 2r with A of [A; A₀] and B of
//! [B, −B₀], as PEFT converts it ([`with_subtracted`]).

use super::{
    LoraShape, LoraShapes,
    module::Parameter,
    targets::{Factor, Site, file_tensor},
};
use std::collections::HashMap;
use tch::{TchError, Tensor};

/// A and B by logical parameter name.
pub type Values = HashMap<String, Vec<f32>>;

/// The tensors of a model's files that the matrix of a dense `site` consists of, one below the other, with their rows.
pub fn tensors(site: &Site) -> impl Iterator<Item = (String, usize)> {
    site.leaves.iter().map(|(leaf, rows)| (file_tensor(&site.parent, None, 0, leaf), *rows))
}

/// Names of the A and the B of a dense `site`.
pub fn names(site: &Site) -> [String; 2] {
    [Factor::A, Factor::B].map(|factor| format!("{}.{}", site.path_of(factor, 0), factor.suffix()))
}

/// A₀ `[rank, in]` and B₀ `[out, rank]` of `w` `[out, in]` fp32, row-major.
///
/// # Errors
/// libtorch's, of a matrix that is not finite.
pub fn factors(w: &Tensor, shape: LoraShape) -> Result<[Vec<f32>; 2], TchError> {
    let rank = shape.rank as i64;
    let (u, sigma, v) = w.f_svd(true, true)?;
    let root = (sigma.f_narrow(0, 0, rank)? / shape.scaling()).f_sqrt()?;
    let a = root.f_unsqueeze(1)?.f_mul(&v.f_narrow(1, 0, rank)?.f_tr()?)?;
    let b = u.f_narrow(1, 0, rank)?.f_mul(&root)?;
    let values = |tensor: Tensor| Vec::<f32>::try_from(tensor.f_reshape(-1)?);
    Ok([values(a)?, values(b)?])
}

/// `values` with every B negated: what takes s·B₀·A₀ from the base when it is merged.
pub fn negated(values: &Values) -> Values {
    let sign = |name: &str| if name.ends_with(".lora_B") { -1.0 } else { 1.0 };
    values
        .iter()
        .map(|(name, values)| (name.clone(), values.iter().map(|value| sign(name) * value).collect()))
        .collect()
}

/// Shapes of twice the rank at the same scale.
pub fn of_twice_the_rank(shapes: &LoraShapes) -> LoraShapes {
    let twice = |shape: LoraShape| shape.of_rank(2 * shape.rank);
    let by_site = shapes.by_site.iter().map(|(path, shape)| (path.clone(), twice(*shape))).collect();
    LoraShapes { common: twice(shapes.common), by_site }
}

/// `trained` as the adapter of twice the rank beside the base as it was: A is [A; A₀], B is [B, −B₀], with `first` A₀
/// and B₀.
pub fn with_subtracted(trained: Vec<(Parameter, Vec<f32>)>, first: &Values) -> Vec<(Parameter, Vec<f32>)> {
    let both = |(mut parameter, mut values): (Parameter, Vec<f32>)| {
        let Some(first) = first.get(&parameter.name) else { return (parameter, values) };
        match parameter.factor {
            Factor::A => {
                values.extend_from_slice(first);
                parameter.shape[0] *= 2;
            }
            Factor::B => {
                let rank = parameter.shape[1];
                let rows = values.chunks_exact(rank).zip(first.chunks_exact(rank));
                values = rows
                    .flat_map(|(row, first)| row.iter().copied().chain(first.iter().map(|x| -x)))
                    .collect();
                parameter.shape[1] *= 2;
            }
            Factor::Magnitude => {}
        }
        (parameter, values)
    };
    trained.into_iter().map(both).collect()
}

/// A₀ and B₀ of `values`, an adapter of [`with_subtracted`] on `sites`. `shapes`: those of training.
pub fn subtracted(mut values: Values, sites: &[Site], shapes: &LoraShapes) -> Values {
    let mut first = Values::new();
    for site in sites {
        let rank = shapes.of(site).rank;
        let [name_a, name_b] = names(site);
        let [mut a, b] = [&name_a, &name_b].map(|name| values.remove(name).unwrap_or_default());
        first.insert(name_a, a.split_off(a.len() / 2));
        let rows = b.chunks_exact(2 * rank);
        first.insert(name_b, rows.flat_map(|row| row[rank..].iter().map(|x| -x)).collect());
    }
    first
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{lora::targets::Projection, shard::Region};
    use tch::{Device, Kind};

    #[test]
    fn the_first_singular_vectors_are_taken_and_come_back_from_an_export() {
        let w = Tensor::randn([6, 4], (Kind::Float, Device::Cpu));
        let shape = LoraShape { use_rslora: true, ..LoraShape::new(3, 5.0) };
        let [a, b] = factors(&w, shape).unwrap();
        let of = |values: &[f32], columns: i64| Tensor::from_slice(values).view([-1, columns]);
        let rest = &w - of(&b, 3).matmul(&of(&a, 4)) * shape.scaling();
        let ((_, all, _), (_, left, _)) = (w.svd(true, true), rest.svd(true, true));
        assert!((left.double_value(&[0]) - all.double_value(&[3])).abs() < 1e-5, "{left} of {all}");
        assert!(left.double_value(&[1]).abs() < 1e-5);

        let leaves = vec![("q_proj", 6)];
        let projection = Projection { parent: "l".into(), fused: None, leaves, input: 4, experts: None };
        let sites = projection.leaf_sites();
        let parameter = |name: &str, factor, shape| Parameter {
            name: name.into(),
            factor,
            shape,
            region: Region::Dense,
            group: 0,
            entry: 0,
            first: 0,
        };
        let trained = vec![
            (parameter("l.q_proj.lora_A", Factor::A, [3, 4]), vec![1.0; 12]),
            (parameter("l.q_proj.lora_B", Factor::B, [6, 3]), vec![2.0; 18]),
        ];
        let first: Values = names(&sites[0]).into_iter().zip([a, b]).collect();
        let both = with_subtracted(trained, &first);
        assert_eq!([both[0].0.shape, both[1].0.shape], [[6, 4], [6, 6]]);
        assert_eq!(both[1].1[..3], [2.0; 3]);
        let shapes = LoraShapes::from(shape);
        let values: Values = both.into_iter().map(|(parameter, values)| (parameter.name, values)).collect();
        assert_eq!(subtracted(values, &sites, &shapes), first);
        let twice = of_twice_the_rank(&shapes).common;
        assert!(twice.rank == 6 && (twice.scaling() - shape.scaling()).abs() < 1e-12);
    }
}
