//! Experts over ranks train what one rank with all experts trains, in every topology; and a rank that does its part
//! wrong is noticed.

use crate::common::topology::{Case, Data, Fault, difference, equals, equals_one_rank, fused, names, run};
use serde_json::Value;
use std::collections::HashMap;
use xorl_dist::config::{
    CheckpointingMethod::{NoRecompute, RecomputeFullLayer, Selective},
    ReduceGradients::{MicroBatch, Step},
};

/// Every mesh of up to four ranks: world, replicas, ranks that the experts are divided over.
const MESHES: [[usize; 3]; 13] = [
    [1, 1, 1],
    [2, 1, 1],
    [2, 1, 2],
    [2, 2, 1],
    [3, 1, 1],
    [3, 1, 3],
    [3, 3, 1],
    [4, 1, 1],
    [4, 1, 2],
    [4, 1, 4],
    [4, 2, 1],
    [4, 2, 2],
    [4, 4, 1],
];

fn experts() -> Case {
    Case { moe: true, ..Case::one() }
}

/// Every mesh in those of `ways` to compute that belong to its number.
fn table(ways: impl Fn(usize) -> Vec<Case>) {
    let mut on_one_rank: HashMap<String, Value> = HashMap::new();
    let mut cases = 0;
    for (i, [world, replicas, experts_over]) in MESHES.into_iter().enumerate() {
        for way in ways(i) {
            let case = Case { world, replicas, experts_over, ..way };
            let alone = case.on_one_rank();
            let one = on_one_rank.entry(format!("{alone:?}")).or_insert_with(|| run(&alone).remove(0));
            equals(&case, one);
            cases += 1;
        }
    }
    println!("{{\"topologies\": {cases}}}");
}

/// All ways to cut a step and to keep or compute again what backward needs, with and without shared factors in turn.
fn all_ways() -> Vec<Case> {
    let mut ways = Vec::new();
    for checkpointing in [NoRecompute, Selective, RecomputeFullLayer] {
        for micro_batch_rows in [1, 2, 6] {
            for (reduce, slots) in [(Step, 2), (MicroBatch, 1)] {
                for hybrid in [false, true] {
                    ways.push(Case { checkpointing, micro_batch_rows, reduce, slots, hybrid, ..experts() });
                }
            }
        }
    }
    ways
}

#[test]
fn mpi_experts_over_ranks_equal_one_rank() {
    // Each mesh in one of the ways, in turn: ci/long.sh topologies takes all.
    let ways = all_ways();
    table(|mesh| vec![ways[mesh * 11 % ways.len()].clone()]);
}

#[test]
#[ignore = "minutes: ci/long.sh topologies"]
fn mpi_experts_in_every_topology_and_way_equal_one_rank() {
    table(|_| all_ways());
}

#[test]
fn mpi_fused_targets_and_split_gemms_over_ranks_equal_one_rank() {
    for hybrid in [false, true] {
        let way =
            Case { merge: false, checkpointing: RecomputeFullLayer, targets: fused(), hybrid, ..experts() };
        equals_one_rank(Case { world: 4, replicas: 2, experts_over: 2, micro_batch_rows: 1, ..way });
    }
}

#[test]
fn mpi_experts_that_never_get_a_token_change_nothing() {
    for (world, experts_over) in [(2, 2), (4, 4), (4, 2)] {
        // Equal values make attention's weights meaningless: q and k would get noise for a gradient.
        let targets = names(&["v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]);
        let way = Case { data: Data::OneToken, checkpointing: Selective, targets, ..experts() };
        equals_one_rank(Case { world, experts_over, micro_batch_rows: 1, ..way });
    }
}

#[test]
fn mpi_a_rank_without_a_valid_token_equals_one_rank() {
    let way = Case { data: Data::OddRowsSilent, ..experts() };
    equals_one_rank(Case { world: 2, experts_over: 2, micro_batch_rows: 3, ..way });
}

/// NVIDIA-NeMo/Automodel issue 3816: the gradients of two ranks' experts have norms ten times apart, and each rank
/// clipped by its own.
#[test]
fn mpi_norms_that_are_ten_times_apart_clip_as_one() {
    let case = Case {
        world: 2,
        experts_over: 2,
        micro_batch_rows: 3,
        data: Data::UnevenExperts,
        targets: names(&["experts.gate_proj", "experts.up_proj"]),
        ..experts()
    };
    let one = run(&case.on_one_rank()).remove(0);
    let norms = run(&case).iter().map(|seen| seen["norms"][0].as_f64().unwrap()).collect::<Vec<_>>();
    assert!(norms[0] > 10.0 * norms[1], "{norms:?}");
    equals(&case, &one);
    let broken = Case { fault: Some(Fault::ClipsByOwnNorm), ..case };
    is_noticed(&broken, &one, "grad norm of step 0");
}

/// Whether `case`, with its fault, parts from what `one` rank saw in `what`.
fn is_noticed(case: &Case, one: &Value, what: &str) {
    let found: Vec<String> = run(case).iter().filter_map(|seen| difference(seen, one)).collect();
    assert!(found.iter().any(|difference| difference.contains(what)), "{:?}: {found:?}", case.fault);
}

#[test]
fn mpi_what_is_done_wrong_is_noticed() {
    let case = Case { world: 4, experts_over: 2, micro_batch_rows: 1, hybrid: true, ..experts() };
    // Of experts alone: what they share is all that is dense.
    let case = Case { targets: names(&["experts.gate_proj", "experts.down_proj"]), ..case };
    let one = run(&case.on_one_rank()).remove(0);
    equals(&case, &one);
    for (fault, what) in [
        (Fault::SkipsDenseSum, "grad norm of step 0"),
        (Fault::CountsExpertsTwice, "grad norm of step 0"),
        (Fault::LosesOneRow, "loss of step 0"),
    ] {
        is_noticed(&Case { fault: Some(fault), ..case.clone() }, &one, what);
    }
}
