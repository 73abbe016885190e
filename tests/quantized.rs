//! Every topology trains on a quantised base what one rank trains on it, and receives its packed bytes.

use crate::common::{
    succeeded,
    tiny::TinyRun,
    topology::{Case, compare, quantised_spec, run_all},
};
use xorl_dist::{
    config::{
        CheckpointingMethod::RecomputeFullLayer,
        QuantFormat::{self, BlockFp8, Nf4, Nvfp4},
        ReduceGradients::MicroBatch,
    },
    mesh::{Mesh, MeshSizes},
    model::base_plan::BasePlan,
};

const FORMATS: [QuantFormat; 3] = [Nf4, BlockFp8, Nvfp4];

/// `dense` on 2 ranks that reduce each micro-batch, and on 3, each a host, with split GEMMs and full recompute.
fn on_two_and_three(dense: &Case) -> [Case; 2] {
    let two = Case { world: 2, micro_batch_rows: 1, reduce: MicroBatch, ..dense.clone() };
    let three = Case {
        world: 3,
        micro_batch_rows: 1,
        slots: 1,
        merge: false,
        checkpointing: RecomputeFullLayer,
        ranks_per_host: Some(1),
        ..dense.clone()
    };
    [two, three]
}

/// Rows and columns of the model are no multiples of a block, and shards end within matrices.
#[test]
fn mpi_ranks_equal_one_on_every_quantised_base() {
    let all = |case: &Case| FORMATS.map(|format| Case { quant: Some(format), ..case.clone() }).to_vec();
    let [dense, moe] = [false, true].map(|moe| Case { moe, ..Case::one() });
    let [dense_alone, moe_alone] = {
        let seen = run_all(&[all(&dense), all(&moe)].concat());
        let mut ranks = seen.into_iter().map(|mut ranks| ranks.remove(0));
        [(); 2].map(|()| ranks.by_ref().take(3).collect::<Vec<_>>())
    };
    // Formats round differently.
    assert!(
        dense_alone[0]["steps"] != dense_alone[1]["steps"]
            && dense_alone[1]["steps"] != dense_alone[2]["steps"]
    );
    let [two, three] = on_two_and_three(&dense);
    let four =
        Case { world: 4, micro_batch_rows: 1, experts_over: 2, replicas: 1, ranks_per_host: Some(2), ..moe };
    for (case, alone) in [(two, &dense_alone), (three, &dense_alone), (four, &moe_alone)] {
        let cases = all(&case);
        for ((case, ranks), one) in cases.iter().zip(run_all(&cases)).zip(alone) {
            compare(case, &ranks, one);
        }
    }
}

/// The plan of memory counts gate and up of an expert, or q, k and v; on a device those of all experts of the rank.
#[test]
fn decoded_matrices_are_of_one_expert_or_of_all() {
    let spec = quantised_spec(true, Some(Nf4));
    let mesh = Mesh::new(2, MeshSizes { replicate: 1, shard: -1, sequence: 1, expert: 2 }).unwrap();
    let base = BasePlan::new(&spec, &Case::one().options(), &mesh, 0).unwrap();
    let decoded = |layer: usize| [false, true].map(|at_once| base.layers[layer].decoded_elements(at_once));
    let (qkv, dense, expert) = ((4 + 2 + 2) * 16 * 40, 2 * 72 * 40, 2 * 28 * 40);
    assert_eq!(decoded(0), [dense; 2]);
    assert_eq!(decoded(1), [qkv, 6 * expert]);
}

/// Noise depends on the step, the matrix and the element, not on ranks, micro-batches or recomputation.
#[test]
fn mpi_quantisation_noise_is_the_same_on_any_ranks() {
    let of = |noise, moe| Case { quant: Some(Nvfp4), noise, moe, ..Case::one() };
    let with = |case: Case| Case { noise: Some(1.0), ..case };
    let [dense, moe] = [false, true].map(|moe| with(of(None, moe)));
    let alone = run_all(&[of(None, false), of(Some(0.0), false), dense.clone(), moe.clone()]);
    let steps = |at: usize| &alone[at][0]["steps"];
    assert!(steps(0) == steps(1) && steps(0) != steps(2), "noise of nothing is none, other noise counts");
    let [two, three] = on_two_and_three(&dense);
    let experts = Case { world: 2, micro_batch_rows: 2, checkpointing: RecomputeFullLayer, ..moe };
    for (case, one) in [(two, &alone[2]), (three, &alone[2]), (experts, &alone[3])] {
        compare(&case, &run_all(std::slice::from_ref(&case))[0], &one[0]);
    }
}

#[test]
fn a_run_with_noise_of_factor_0_is_bit_identical_to_one_without() {
    let run = TinyRun::new();
    let story = |out: &str, more: &str| {
        let fixed = "--lora.enable_qlora true --lora.quant_format nf4 --train.max_steps 3";
        succeeded(&run.run(1, out, &[fixed, more].join(" ").split_whitespace().collect::<Vec<_>>()));
        run.story(out)
    };
    let off = story("off", "");
    assert_eq!(story("zero", "--lora.enable_aqn true --lora.aqn_alpha 0"), off);
    let on = story("on", "--lora.enable_aqn true");
    assert!(on.iter().zip(&off).all(|(on, off)| on["loss"] != off["loss"]), "{on:?}");
}
