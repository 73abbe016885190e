//! The process groups of a rank, one communicator each, as the [`Mesh`] lays them out, and its device.

use crate::{
    comm::{CommError, Communicator, World, solo},
    device::RankDevice,
    mesh::Mesh,
};
use std::rc::Rc;

/// This rank, its device and its groups.
#[derive(Clone)]
pub struct ProcessGroups {
    pub mesh: Mesh,
    pub rank: usize,
    /// The device of this rank.
    pub device: RankDevice,
    /// All ranks.
    pub world: Rc<dyn Communicator>,
    /// The ranks of a block: dense regions are cut over them.
    pub shard: Rc<dyn Communicator>,
    /// The ranks of other blocks that hold the same pieces.
    pub replicate: Rc<dyn Communicator>,
    /// The ranks that own all experts between them and exchange tokens.
    pub expert: Rc<dyn Communicator>,
    /// The ranks of a block with the same experts: expert regions are cut over them.
    pub expert_shard: Rc<dyn Communicator>,
}

impl ProcessGroups {
    /// Collective over all ranks of `world`, of which `mesh` has as many.
    pub fn new(world: &World, mesh: Mesh) -> Self {
        let rank = world.rank();
        // The first rank of a group identifies it.
        let group = |name, members: fn(&Mesh, usize) -> Vec<usize>| {
            world.group(name, members(&mesh, rank).first().copied().unwrap_or_default())
        };
        Self {
            mesh,
            rank,
            device: world.device().clone(),
            world: world.group("world", 0),
            shard: group("shard", Mesh::shard_group),
            replicate: group("replicate", Mesh::replicate_group),
            expert: group("expert", Mesh::expert_group),
            expert_shard: group("expert_shard", Mesh::expert_shard_group),
        }
    }

    /// Creates the communicators' resources while there is memory for them, those of experts where there are any.
    /// Collective.
    pub fn open(&self, experts: bool) -> Result<(), CommError> {
        let of_experts = [&self.expert, &self.expert_shard].into_iter().filter(|_| experts);
        let moving = [&self.shard, &self.replicate].into_iter().chain(of_experts);
        moving.filter(|group| group.size() > 1).try_for_each(|group| group.open())
    }

    /// Groups of this process alone, whatever the world.
    pub fn alone() -> Self {
        let alone = || solo("alone");
        Self {
            mesh: Mesh::one_block(1),
            rank: 0,
            device: RankDevice::host(),
            world: alone(),
            shard: alone(),
            replicate: alone(),
            expert: alone(),
            expert_shard: alone(),
        }
    }

    /// One block of all ranks, each with all experts.
    pub fn one_block(world: &World) -> Self {
        Self::new(world, Mesh::one_block(world.size()))
    }
}
