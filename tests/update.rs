//! Frozen weights that ranks change in place, as a merge does, are what every rank gathers next.

use crate::common::{
    run_workers,
    topology::{Data, batch, spec},
};
use serde::{Deserialize, Serialize};
use std::ops::Range;
use tch::{Kind, Tensor};
use xorl_dist::{
    comm::World,
    dtype::DType,
    mesh::{Mesh, MeshSizes},
    model::{base_plan::Options, transformer::Transformer},
    shard::{Piece, ProcessGroups, ShardError},
    weights::{RandomSource, SourceError, TensorMeta, WeightSource},
};

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Case {
    world: usize,
    experts_over: usize,
    /// Pieces lie in memory that the ranks share, or are sent.
    shared: bool,
}

/// Change of element `index` of tensor `name`.
fn delta(name: &str, index: usize) -> f32 {
    let seed = name.bytes().fold(7u32, |seed, byte| seed.wrapping_mul(31).wrapping_add(u32::from(byte)));
    (seed.wrapping_add(index as u32).wrapping_mul(2_654_435_761) >> 8) as f32 / (1u32 << 24) as f32 * 0.02
        - 0.01
}

/// Random weights plus [`delta`].
struct Changed(RandomSource);

impl WeightSource for Changed {
    fn names(&self) -> Vec<String> {
        self.0.names()
    }

    fn meta(&self, name: &str) -> Option<TensorMeta> {
        self.0.meta(name)
    }

    fn read(&self, name: &str, range: Range<usize>, dtype: DType, out: &mut [u8]) -> Result<(), SourceError> {
        self.0.read(name, range.clone(), dtype, out)?;
        assert_eq!(dtype, DType::F32);
        let numbers = bytemuck::cast_slice_mut::<u8, f32>(out);
        numbers.iter_mut().zip(range).for_each(|(number, index)| *number += delta(name, index));
        Ok(())
    }

    fn bytes_read(&self) -> u64 {
        self.0.bytes_read()
    }
}

/// One rank of a case. Does nothing unless a case started it.
#[test]
fn mpi_worker() {
    let Ok(case) = std::env::var("XORL_TEST_CASE") else { return };
    let case: Case = serde_json::from_str(&case).unwrap();
    let world = World::start().unwrap();
    let sizes = MeshSizes { replicate: 1, shard: -1, sequence: 1, expert: case.experts_over };
    let groups = ProcessGroups::new(&world, Mesh::new(world.size(), sizes).unwrap());
    let options = Options {
        vocab_chunk_rows: 300,
        loss_chunk_tokens: 7,
        // Debugging keeps pieces apart.
        debug: !case.shared,
        ..Options::default()
    };
    let spec = spec(true);
    let source = || RandomSource::new(spec.tensors(), spec.initializer_range, 1);
    let new = |source: &dyn WeightSource| {
        let mut model = Transformer::new(spec.clone(), options, &groups).unwrap();
        model.load(source).unwrap();
        model
    };
    let rows = batch(0, &[world.rank(), world.rank() + 1], Data::Random);
    let mut model = new(&source());
    assert_eq!(model.shares_memory(), case.shared || world.size() == 1);
    // The slots hold units as they were.
    let before = model.logits(&rows, &mut []).unwrap();
    let mut changed = 0;
    model
        .update(|piece: &Piece, values: &Tensor| {
            let deltas: Vec<f32> = piece.range.clone().map(|index| delta(&piece.tensor, index)).collect();
            changed += deltas.len();
            let _ = values.shallow_clone().g_add_(&Tensor::from_slice(&deltas));
            Ok(())
        })
        .unwrap();
    assert!(changed > 0);
    let after = model.logits(&rows, &mut []).unwrap();
    let expected = new(&Changed(source())).logits(&rows, &mut []).unwrap();
    assert_eq!(after, expected, "{case:?}");
    assert!(
        (after - before).abs().max().to_kind(Kind::Double).double_value(&[]) > 0.01,
        "the change is seen"
    );
    // A rank that cannot change its piece ends the update of all ranks.
    let fails = world.rank() + 1 == world.size();
    let refused = model.update(|piece: &Piece, _: &Tensor| {
        if fails { Err(ShardError::Counts { from: 0, actual: piece.at, expected: 0 }) } else { Ok(()) }
    });
    match refused.unwrap_err() {
        ShardError::Counts { .. } => assert!(fails),
        ShardError::UpdateElsewhere { .. } => assert!(!fails),
        other => panic!("{other}"),
    }
}

fn run(case: Case) {
    let folder = tempfile::tempdir().unwrap();
    run_workers("update::mpi_worker", case.world, &case, folder.path(), |_| ());
}

#[test]
fn mpi_updated_weights_are_gathered_by_every_rank() {
    for shared in [true, false] {
        for world in 1..=3 {
            run(Case { world, experts_over: 1, shared });
        }
        run(Case { world: 2, experts_over: 2, shared });
    }
}
