//! Every topology trains what one rank trains: same losses, norms and adapters; and receives exactly the
//! bytes that the plan says.

use crate::common::topology::{Case, equals, equals_one_rank, fused, run, run_all};
use xorl_dist::config::{
    CheckpointingMethod::{NoRecompute, RecomputeFullLayer, Selective},
    Optimizer::Muon,
    ReduceGradients::MicroBatch,
};

#[test]
fn mpi_two_ranks_equal_one() {
    equals_one_rank(Case { world: 2, micro_batch_rows: 2, ..Case::one() });
}

/// Borders between ranks cut matrices of all ranks and of experts, which the ledger of the gathers shows. The one rank
/// has the same micro-batches, or their sums would part.
#[test]
fn mpi_muon_over_ranks_equals_one_rank() {
    let muon = Case { optimizer: Muon, moe: true, micro_batch_rows: 1, ..Case::one() };
    let one = run(&muon).remove(0);
    equals(&Case { world: 4, experts_over: 2, ..muon }, &one);
}

#[test]
fn mpi_three_ranks_that_divide_nothing_equal_one() {
    equals_one_rank(Case {
        world: 3,
        micro_batch_rows: 1,
        slots: 1,
        checkpointing: RecomputeFullLayer,
        vocab_chunk_rows: 100,
        ..Case::one()
    });
}

#[test]
fn mpi_four_ranks_of_which_some_are_idle_equal_one() {
    equals_one_rank(Case {
        world: 4,
        micro_batch_rows: 1,
        slots: 3,
        checkpointing: Selective,
        reduce: MicroBatch,
        ..Case::one()
    });
}

/// Each method, and those between them that differ by layer; what is received is as the formula says in each. The ranks
/// see unlike memory, and agree on the least.
#[test]
fn mpi_recompute_changes_no_bit_and_ranks_agree_on_free_memory() {
    for experts_over in [1, 2] {
        let ways = [
            (NoRecompute, 3),
            (Selective, 2),
            (Selective, 3),
            (RecomputeFullLayer, 1),
            (RecomputeFullLayer, 3),
        ];
        let ways = ways.map(|(checkpointing, recomputed_layers)| Case {
            world: 2,
            moe: experts_over > 1,
            experts_over,
            micro_batch_rows: 2,
            checkpointing,
            recomputed_layers,
            ..Case::one()
        });
        let seen = run_all(&ways);
        for (way, ranks) in ways.iter().zip(&seen) {
            for (rank, none) in ranks.iter().zip(&seen[0]) {
                for what in ["steps", "norms", "adapter"] {
                    assert_eq!(rank[what], none[what], "{what} of {way:?}");
                }
                assert_eq!(rank["free"], 999);
            }
        }
    }
}

#[test]
fn mpi_two_replicas_of_two_shards_equal_one() {
    equals_one_rank(Case {
        world: 4,
        replicas: 2,
        micro_batch_rows: 1,
        checkpointing: RecomputeFullLayer,
        ..Case::one()
    });
}

#[test]
fn mpi_fused_targets_and_split_gemms_equal_one() {
    equals_one_rank(Case {
        world: 2,
        merge: false,
        reduce: MicroBatch,
        targets: fused(),
        vocab_chunk_rows: 334,
        ..Case::one()
    });
}

#[test]
fn mpi_micro_batches_on_one_rank_equal_one_batch() {
    equals_one_rank(Case {
        micro_batch_rows: 1,
        checkpointing: RecomputeFullLayer,
        merge: false,
        vocab_chunk_rows: 17,
        ..Case::one()
    });
}

/// Ranks of one host see the base in memory; others are sent it: each on its own host, two of two, and one of three
/// beside one of one.
#[test]
fn mpi_ranks_of_several_hosts_equal_one() {
    let hosts = |ranks| Case { world: 4, micro_batch_rows: 1, ranks_per_host: Some(ranks), ..Case::one() };
    for (case, shares) in [(hosts(4), true), (hosts(1), false), (Case { replicas: 2, ..hosts(2) }, true)] {
        for seen in equals_one_rank(case) {
            assert_eq!(seen["shares_memory"], shares);
        }
    }
    equals_one_rank(Case { slots: 3, reduce: MicroBatch, ..hosts(2) });
    equals_one_rank(Case { slots: 1, checkpointing: RecomputeFullLayer, vocab_chunk_rows: 100, ..hosts(3) });
}
