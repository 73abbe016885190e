//! Axes of the ranks, and every divisibility rule between them. Pure: no MPI, no tensors.
//!
//! World = replicate R × shard S × sequence U, rank = ((r·S)+s)·U+u. One replica's S·U ranks are a *block*: base and
//! adapter are sharded over a block and copied across blocks. The expert axis lies inside a block: ep-rank = rank mod
//! ep, so the ranks that exchange tokens are neighbours. Ranks that share a sequence are neighbours too.

use crate::config::ComputeArgs;
use std::ops::Range;

/// Sizes of the axes as configured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MeshSizes {
    /// Copies of the base; -1: the ranks that are left (1 if `shard` is -1 too).
    pub replicate: i64,
    /// Data-parallel ranks of a copy; -1: the ranks that are left.
    pub shard: i64,
    /// Ranks that share a sequence.
    pub sequence: usize,
    /// Ranks that share the experts of a layer.
    pub expert: usize,
}

impl From<&ComputeArgs> for MeshSizes {
    fn from(args: &ComputeArgs) -> Self {
        Self {
            replicate: args.data_parallel_replicate_size,
            shard: args.data_parallel_shard_size,
            sequence: args.ulysses_parallel_size,
            expert: args.expert_parallel_size,
        }
    }
}

/// Sizes that do not fit the world.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MeshError {
    /// A size that is not positive.
    #[error("{axis} is {size}; expected a whole number of at least 1{}", if *.rest { ", or -1 for the ranks that are left" } else { "" })]
    Size { axis: &'static str, size: i64, rest: bool },
    /// The sequence axis does not divide the world.
    #[error(
        "{world} ranks cannot be divided into sequences of train.ulysses_parallel_size {sequence}; {}",
        fitting(*world)
    )]
    Sequence { world: usize, sequence: usize },
    /// One data-parallel size does not divide the ranks left for both.
    #[error("{ranks} data-parallel ranks cannot be divided by {axis} {size}; {}", fitting(*ranks))]
    Indivisible { ranks: usize, axis: &'static str, size: usize },
    /// Both data-parallel sizes are given and their product is not the world.
    #[error(
        "train.data_parallel_replicate_size {replicate} × train.data_parallel_shard_size {shard} × \
         train.ulysses_parallel_size {sequence} = {product} ranks, but {world} were started; \
         set one of the first two to -1"
    )]
    Product { replicate: usize, shard: usize, sequence: usize, product: usize, world: usize },
    /// The expert axis does not divide a block.
    #[error(
        "train.expert_parallel_size {expert} does not divide the {block} ranks that share one copy of the base; {}",
        fitting(*block)
    )]
    ExpertBlock { expert: usize, block: usize },
    /// The expert axis does not divide the experts.
    #[error(
        "train.expert_parallel_size {expert} does not divide the model's {experts} experts; {}",
        fitting(common_divisor(*experts, *block))
    )]
    Experts { expert: usize, experts: usize, block: usize },
}

/// The sizes that divide `number`, for a message.
fn fitting(number: usize) -> String {
    const SHOWN: usize = 12;
    let sizes: Vec<String> =
        (1..=number).filter(|size| number.is_multiple_of(*size)).map(|size| size.to_string()).collect();
    match sizes.as_slice() {
        [] | [_] => "1 fits".into(),
        [first @ .., last] if sizes.len() <= SHOWN => format!("{} and {last} fit", first.join(", ")),
        [..] => format!("{}, … and {number} fit", sizes[..SHOWN - 1].join(", ")),
    }
}

fn common_divisor(a: usize, b: usize) -> usize {
    if b == 0 { a } else { common_divisor(b, a % b) }
}

/// Indices of a rank on every axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Coordinates {
    pub replicate: usize,
    pub shard: usize,
    pub sequence: usize,
    /// ep-rank: index of the rank's slice of the experts.
    pub expert: usize,
}

/// The axes of a world whose sizes fit. Ranks are given as 0..world.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mesh {
    replicate: usize,
    shard: usize,
    sequence: usize,
    expert: usize,
}

const REPLICATE: &str = "train.data_parallel_replicate_size";
const SHARD: &str = "train.data_parallel_shard_size";

impl Mesh {
    /// The mesh of `world` ranks with `sizes`.
    ///
    /// # Errors
    /// The first size that is not positive or does not divide its ranks.
    pub fn new(world: usize, sizes: MeshSizes) -> Result<Self, MeshError> {
        let MeshSizes { sequence, expert, .. } = sizes;
        for (axis, size) in
            [("train.ulysses_parallel_size", sequence), ("train.expert_parallel_size", expert)]
        {
            if size == 0 {
                return Err(MeshError::Size { axis, size: 0, rest: false });
            }
        }
        if world == 0 || !world.is_multiple_of(sequence) {
            return Err(MeshError::Sequence { world, sequence });
        }
        let ranks = world / sequence;
        let rest = |axis, size: usize| match ranks.is_multiple_of(size) {
            true => Ok(ranks / size),
            false => Err(MeshError::Indivisible { ranks, axis, size }),
        };
        let (replicate, shard) = match (given(REPLICATE, sizes.replicate)?, given(SHARD, sizes.shard)?) {
            (None, None) => (1, ranks),
            (Some(replicate), None) => (replicate, rest(REPLICATE, replicate)?),
            (None, Some(shard)) => (rest(SHARD, shard)?, shard),
            (Some(replicate), Some(shard)) => (replicate, shard),
        };
        let product = replicate.saturating_mul(shard).saturating_mul(sequence);
        if product != world {
            return Err(MeshError::Product { replicate, shard, sequence, product, world });
        }
        let block = shard * sequence;
        if !block.is_multiple_of(expert) {
            return Err(MeshError::ExpertBlock { expert, block });
        }
        Ok(Self { replicate, shard, sequence, expert })
    }

    /// All of `ranks` in one block, each with all experts.
    pub fn one_block(ranks: usize) -> Self {
        Self { replicate: 1, shard: ranks.max(1), sequence: 1, expert: 1 }
    }

    /// Number of ranks.
    pub fn world(&self) -> usize {
        self.replicate * self.block()
    }

    /// R, the copies of the base.
    pub fn replicate(&self) -> usize {
        self.replicate
    }

    /// S, the data-parallel ranks of one copy.
    pub fn shard(&self) -> usize {
        self.shard
    }

    /// U, the ranks that share a sequence.
    pub fn sequence(&self) -> usize {
        self.sequence
    }

    /// ep, the ranks that share the experts of a layer.
    pub fn expert(&self) -> usize {
        self.expert
    }

    /// S·U, the ranks over which one copy of base and adapter is sharded.
    pub fn block(&self) -> usize {
        self.shard * self.sequence
    }

    /// R·S, the ranks that get rows of their own.
    pub fn data_parallel(&self) -> usize {
        self.replicate * self.shard
    }

    /// Index of `rank` among the data-parallel ranks: rows are dealt by it. Ranks that share a sequence have the same.
    pub fn data_rank(&self, rank: usize) -> usize {
        rank / self.sequence
    }

    /// The axes of `rank`.
    pub fn coordinates(&self, rank: usize) -> Coordinates {
        Coordinates {
            replicate: rank / self.block(),
            shard: rank / self.sequence % self.shard,
            sequence: rank % self.sequence,
            expert: rank % self.expert,
        }
    }

    /// The rank at `at`; `expert` follows from the others and is ignored.
    pub fn rank(&self, at: Coordinates) -> usize {
        (at.replicate * self.shard + at.shard) * self.sequence + at.sequence
    }

    /// All ranks: loss counts, the gradient norm, dense adapter gradients.
    pub fn world_group(&self) -> Vec<usize> {
        (0..self.world()).collect()
    }

    /// The block of `rank`: dense regions are sharded over it, in this order.
    pub fn shard_group(&self, rank: usize) -> Vec<usize> {
        let first = rank - rank % self.block();
        (first..first + self.block()).collect()
    }

    /// The ranks that hold the same shard as `rank`, one in each block.
    pub fn replicate_group(&self, rank: usize) -> Vec<usize> {
        (rank % self.block()..self.world()).step_by(self.block()).collect()
    }

    /// The neighbours that share the sequences of `rank`: context parallelism exchanges tokens for heads among them.
    pub fn sequence_group(&self, rank: usize) -> Vec<usize> {
        let first = rank - rank % self.sequence;
        (first..first + self.sequence).collect()
    }

    /// The neighbours that own all experts between them and exchange tokens.
    pub fn expert_group(&self, rank: usize) -> Vec<usize> {
        let first = rank - rank % self.expert;
        (first..first + self.expert).collect()
    }

    /// The ranks of the block with the same experts: expert regions are sharded over them, in this order.
    pub fn expert_shard_group(&self, rank: usize) -> Vec<usize> {
        let first = rank - rank % self.block() + rank % self.expert;
        (first..first + self.block()).step_by(self.expert).take(self.block() / self.expert).collect()
    }

    /// The experts of 0..`experts` that `rank` owns.
    ///
    /// # Errors
    /// [`MeshError::Experts`] if the expert axis does not divide them.
    pub fn experts_of(&self, rank: usize, experts: usize) -> Result<Range<usize>, MeshError> {
        if !experts.is_multiple_of(self.expert) {
            return Err(MeshError::Experts { expert: self.expert, experts, block: self.block() });
        }
        let each = experts / self.expert;
        let first = rank % self.expert * each;
        Ok(first..first + each)
    }

    /// The mesh as text: the axes, then a line a rank. The middle of a large world is left out.
    pub fn table(&self) -> String {
        const SHOWN: usize = 64;
        let world = self.world();
        let mut text = format!(
            "mesh: {world} ranks = replicate {} × shard {} × sequence {}; experts over {}\n\
             {:>5} {:>9} {:>5} {:>8} {:>6}  {:<13} {:<13} {}\n",
            self.replicate,
            self.shard,
            self.sequence,
            self.expert,
            "rank",
            "replicate",
            "shard",
            "sequence",
            "expert",
            "shard group",
            "replicas",
            "expert shard group",
        );
        for rank in 0..world {
            if world > SHOWN && (SHOWN / 2..world - SHOWN / 2).contains(&rank) {
                if rank == SHOWN / 2 {
                    text += &format!("{:>5} ({} more)\n", "…", world - SHOWN);
                }
                continue;
            }
            let at = self.coordinates(rank);
            text += &format!(
                "{rank:>5} {:>9} {:>5} {:>8} {:>6}  {:<13} {:<13} {}\n",
                at.replicate,
                at.shard,
                at.sequence,
                at.expert,
                ranks(&self.shard_group(rank)),
                ranks(&self.replicate_group(rank)),
                ranks(&self.expert_shard_group(rank)),
            );
        }
        text
    }
}

/// A data-parallel size, or `None` for the rest of the ranks.
fn given(axis: &'static str, size: i64) -> Result<Option<usize>, MeshError> {
    match usize::try_from(size) {
        Ok(size) if size >= 1 => Ok(Some(size)),
        Err(_) if size == -1 => Ok(None),
        _ => Err(MeshError::Size { axis, size, rest: true }),
    }
}

/// `3`, `0-7` or `0,4,…,28`.
fn ranks(group: &[usize]) -> String {
    match group {
        [] => String::new(),
        [one] => one.to_string(),
        [first, .., last] if last - first + 1 == group.len() => format!("{first}-{last}"),
        [first, second, _, _, .., last] => format!("{first},{second},…,{last}"),
        few => few.iter().map(usize::to_string).collect::<Vec<_>>().join(","),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sizes(replicate: i64, shard: i64, sequence: usize, expert: usize) -> MeshSizes {
        MeshSizes { replicate, shard, sequence, expert }
    }

    fn mesh(world: usize, sizes: MeshSizes) -> Mesh {
        Mesh::new(world, sizes).unwrap()
    }

    #[test]
    fn minus_one_takes_the_ranks_that_are_left() {
        for (world, asked, replicate, shard) in [
            (1, sizes(-1, -1, 1, 1), 1, 1),
            (3, sizes(-1, -1, 1, 1), 1, 3),
            (4, sizes(2, -1, 1, 1), 2, 2),
            (4, sizes(-1, 1, 1, 1), 4, 1),
            (8, sizes(2, 4, 1, 1), 2, 4),
            (8, sizes(-1, 2, 2, 1), 2, 2),
            (6, sizes(-1, -1, 2, 1), 1, 3),
        ] {
            let mesh = mesh(world, asked);
            assert_eq!((mesh.replicate(), mesh.shard()), (replicate, shard), "{world} {asked:?}");
            assert_eq!(mesh.world(), world);
        }
    }

    #[test]
    fn sizes_that_do_not_fit_are_named() {
        for (world, asked, error) in [
            (4, sizes(0, -1, 1, 1), MeshError::Size { axis: REPLICATE, size: 0, rest: true }),
            (4, sizes(-1, -2, 1, 1), MeshError::Size { axis: SHARD, size: -2, rest: true }),
            (
                4,
                sizes(-1, -1, 0, 1),
                MeshError::Size { axis: "train.ulysses_parallel_size", size: 0, rest: false },
            ),
            (3, sizes(-1, -1, 2, 1), MeshError::Sequence { world: 3, sequence: 2 }),
            (3, sizes(2, -1, 1, 1), MeshError::Indivisible { ranks: 3, axis: REPLICATE, size: 2 }),
            (6, sizes(-1, 4, 1, 1), MeshError::Indivisible { ranks: 6, axis: SHARD, size: 4 }),
            (
                8,
                sizes(2, 2, 1, 1),
                MeshError::Product { replicate: 2, shard: 2, sequence: 1, product: 4, world: 8 },
            ),
            (8, sizes(2, -1, 1, 3), MeshError::ExpertBlock { expert: 3, block: 4 }),
            (8, sizes(4, -1, 1, 4), MeshError::ExpertBlock { expert: 4, block: 2 }),
        ] {
            assert_eq!(Mesh::new(world, asked), Err(error), "{world} {asked:?}");
        }
        let told = |error: MeshError| error.to_string();
        let two = told(MeshError::ExpertBlock { expert: 3, block: 4 });
        assert!(two.ends_with("share one copy of the base; 1, 2 and 4 fit"), "{two}");
        let shared = told(MeshError::Experts { expert: 4, experts: 6, block: 4 });
        assert!(shared.ends_with("the model's 6 experts; 1 and 2 fit"), "{shared}");
        assert!(told(MeshError::Sequence { world: 1, sequence: 2 }).ends_with("; 1 fits"));
        let many = told(MeshError::Indivisible { ranks: 5040, axis: SHARD, size: 11 });
        assert!(many.ends_with("; 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, … and 5040 fit"), "{many}");
        let huge = MeshSizes { replicate: i64::MAX, shard: i64::MAX, sequence: 1, expert: 1 };
        assert!(Mesh::new(2, huge).is_err());
    }

    #[test]
    fn two_by_two_shards_within_a_block_and_copies_across() {
        let mesh = mesh(4, sizes(2, 2, 1, 1));
        let groups: Vec<_> = (0..4).map(|r| (mesh.shard_group(r), mesh.replicate_group(r))).collect();
        assert_eq!(groups[0], (vec![0, 1], vec![0, 2]));
        assert_eq!(groups[1], (vec![0, 1], vec![1, 3]));
        assert_eq!(groups[2], (vec![2, 3], vec![0, 2]));
        assert_eq!(groups[3], (vec![2, 3], vec![1, 3]));
        assert_eq!(mesh.data_parallel(), 4);
    }

    #[test]
    fn experts_overlay_a_block() {
        let mesh = mesh(8, sizes(2, 4, 1, 2));
        assert_eq!(mesh.expert_group(5), [4, 5]);
        assert_eq!(mesh.expert_shard_group(5), [5, 7]);
        assert_eq!(mesh.expert_shard_group(0), [0, 2]);
        assert_eq!(mesh.replicate_group(5), [1, 5]);
        assert_eq!(mesh.experts_of(5, 6), Ok(3..6));
        assert_eq!(mesh.experts_of(4, 6), Ok(0..3));
        assert_eq!(
            mesh.experts_of(0, 5),
            Err(MeshError::Experts { expert: 2, experts: 5, block: mesh.block() })
        );
    }

    #[test]
    fn ranks_of_a_sequence_are_neighbours_with_one_data_rank() {
        let mesh = mesh(8, sizes(2, 2, 2, 1));
        let groups: Vec<_> = (0..8).map(|rank| (mesh.sequence_group(rank), mesh.data_rank(rank))).collect();
        for (rank, group) in groups.iter().enumerate() {
            let expected = [(vec![0, 1], 0), (vec![2, 3], 1), (vec![4, 5], 2), (vec![6, 7], 3)];
            assert_eq!(group, &expected[rank / 2], "rank {rank}");
        }
        let alone = self::mesh(3, sizes(-1, -1, 1, 1));
        assert_eq!((alone.sequence_group(2), alone.data_rank(2)), (vec![2], 2));
    }

    /// Groups of one kind partition the ranks, and every member computes the same group.
    #[test]
    fn groups_partition_every_world() {
        for world in 1..=12 {
            for replicate in (1..=world).filter(|r| world % r == 0) {
                let block = world / replicate;
                for sequence in (1..=block).filter(|u| block % u == 0) {
                    for expert in (1..=block).filter(|e| block % e == 0) {
                        let mesh = mesh(world, sizes(replicate as i64, -1, sequence, expert));
                        for group in [
                            Mesh::shard_group,
                            Mesh::replicate_group,
                            Mesh::sequence_group,
                            Mesh::expert_group,
                            Mesh::expert_shard_group,
                        ] {
                            for rank in 0..world {
                                let members = group(&mesh, rank);
                                assert!(members.contains(&rank), "{mesh:?} {rank} {members:?}");
                                assert!(
                                    members.iter().all(|&m| group(&mesh, m) == members),
                                    "{mesh:?} {rank}"
                                );
                            }
                        }
                        for rank in 0..world {
                            assert_eq!(mesh.rank(mesh.coordinates(rank)), rank);
                            let meet: Vec<_> = mesh
                                .expert_group(rank)
                                .into_iter()
                                .filter(|other| mesh.expert_shard_group(rank).contains(other))
                                .collect();
                            assert_eq!(meet, [rank], "{mesh:?}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn the_table_has_a_line_a_rank_and_shortens_large_worlds() {
        let small = mesh(3, sizes(-1, -1, 1, 1)).table();
        assert!(small.starts_with("mesh: 3 ranks = replicate 1 × shard 3 × sequence 1; experts over 1\n"));
        assert_eq!(small.lines().count(), 5);
        assert!(small.lines().last().unwrap().contains("0-2"));
        let large = mesh(512, sizes(-1, 8, 1, 1)).table();
        assert_eq!(large.lines().count(), 2 + 64 + 1);
        assert!(large.contains("0,8,…,504"), "{large}");
    }
}
