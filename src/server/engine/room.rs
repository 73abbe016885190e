//! The memory that a rank has left for adapters and for keys and values, beside the base and a pass.

use super::{EngineOptions, models::Models, residence::Need};
use crate::{
    Result,
    comm::FreeMemory,
    config::CheckpointingMethod::RecomputeFullLayer,
    infer::{cache::page_bytes, step::PAGE},
    lora::AdapterPlan,
    model::{
        base_plan::{BasePlan, Options},
        recompute::Recompute,
    },
    plan::{Memory, MicroBatch},
};

/// The share of what is left that adapters may take; the rest is for allocators, which keep and split blocks.
const SHARE: f64 = 0.9;

/// The share of what adapters and sampling have with full recompute that less recompute leaves them.
const KEPT: f64 = 0.75;

/// The share of what is left that keys and values take.
const SHARE_OF_CACHE: f64 = 0.25;

/// Tokens whose keys and values take memory at most, where no number is given: 256 sequences of 2048.
const MOST_TOKENS: u64 = 256 * 2048;

/// The memory of a rank for adapters, and for keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Bytes for adapters; `None`: not known.
    pub bytes: Option<u64>,
    /// The need of the server's default adapter.
    pub default: Need,
    /// Pages of keys and values, and the bytes of each.
    pub pages: u32,
    page: u64,
}

impl Room {
    /// The room that `options` say, or that there is: of the memory that is free now, what a pass leaves on the
    /// tightest rank. Collective, after all have loaded the base.
    ///
    /// Recompute is chosen here if the configuration leaves it open.
    pub fn new(models: &mut Models, options: &EngineOptions) -> Result<Self> {
        let (spec, tokens) = (options.defaults.spec(), options.max_tokens_per_pass);
        let free = FreeMemory::of_ranks(&*models.groups().world, &models.groups().device)?;
        let plan = models.plan(&spec)?;
        let pass = of_pass(models, &plan, tokens, free.on_device)?;
        let recompute = if options.fits_recompute {
            let ways = Recompute::ways(models.model().spec().layers.len());
            let ways: Vec<_> = ways.map(|way| (way, pass(way))).collect();
            let asked = [options.adapter_memory, options.sampling_memory].into_iter().flatten().sum();
            least_recompute(free.bytes, asked, &ways)
        } else {
            models.model().options().checkpointing
        };
        let left = free.bytes.map(|free| beside(free, pass(recompute)));
        drop(pass);
        models.set_recompute(recompute);
        let model = models.model();
        let page = (page_bytes(model.spec(), model.options().compute.size()) as u64).max(1);
        let of_longest = options.max_positions.map(|tokens| tokens.div_ceil(PAGE) as u64 * page);
        let beside = left.map(|left| left.saturating_sub(options.adapter_memory.unwrap_or(0)));
        let most = MOST_TOKENS.div_ceil(PAGE as u64) * page;
        let sampling = options.sampling_memory.unwrap_or_else(|| for_sampling(beside, of_longest, most));
        // Keys and values have their room before adapters have theirs.
        let bytes = options.adapter_memory.or_else(|| left.map(|left| left.saturating_sub(sampling)));
        Ok(Self {
            bytes,
            default: models.need(&spec)?,
            pages: u32::try_from(sampling / page).unwrap_or(u32::MAX),
            page,
        })
    }

    /// Tokens whose keys and values a rank holds.
    pub fn tokens(&self) -> usize {
        (self.pages as usize).saturating_mul(PAGE)
    }

    /// The room for keys and values, for people.
    pub fn told_of_sampling(&self) -> String {
        format!(
            "sampling: {:.2} GB of a rank's memory, for keys and values of {} tokens of prompts and continuations",
            (u64::from(self.pages) * self.page) as f64 / 1e9,
            self.tokens()
        )
    }

    /// Adapters of the default shape that fit together.
    pub fn fits(&self) -> Option<u64> {
        let Need { held, at_work } = self.default;
        self.bytes.map(|bytes| bytes.saturating_sub(at_work) / held.max(1))
    }

    /// The room for people; `rank`: of the default adapter.
    pub fn told(&self, rank: usize, tokens: usize) -> String {
        let gb = |bytes: u64| bytes as f64 / 1e9;
        let each = format!("{:.3} GB each", gb(self.default.held));
        match (self.bytes, self.fits()) {
            (Some(bytes), Some(fits)) => format!(
                "adapters: {:.2} GB of a rank's memory beside the base and a pass of {tokens} tokens; {fits} of rank \
                 {rank} fit ({each}), others wait on disk",
                gb(bytes)
            ),
            _ => {
                format!("adapters: this host does not tell its free memory; one of rank {rank} takes {each}")
            }
        }
    }
}

/// Bytes of a rank for keys and values, of the `left` bytes: a share of them, or what one sequence of the longest needs
/// if they have it, at most `most`.
fn for_sampling(left: Option<u64>, of_longest: Option<u64>, most: u64) -> u64 {
    let Some(left) = left else { return most };
    let share = (SHARE_OF_CACHE * left as f64) as u64;
    share.max(of_longest.unwrap_or(0).min(left)).min(most.max(of_longest.unwrap_or(0)))
}

/// Bytes of a pass of `tokens` tokens with an adapter of `plan`, by what backward recomputes; the same on every rank.
fn of_pass<'a>(
    models: &'a Models,
    plan: &'a AdapterPlan,
    tokens: usize,
    on_device: bool,
) -> Result<impl Fn(Recompute) -> u64 + use<'a>> {
    let (groups, spec) = (models.groups(), models.model().spec());
    let options = *models.model().options();
    let base = BasePlan::new(spec, &options, &groups.mesh, groups.rank)?;
    let batch = MicroBatch { tokens, longest: tokens };
    Ok(move |checkpointing| {
        let options = Options { checkpointing, ..options };
        let memory = Memory::new(spec, &base, plan, &options, &models.defaults().optimizer, batch);
        (if on_device { memory.pass_on_device() } else { memory.pass() }) as u64
    })
}

/// Bytes that a pass of `pass` bytes leaves of the `free` bytes of a rank.
fn beside(free: u64, pass: u64) -> u64 {
    (SHARE * free.saturating_sub(pass) as f64) as u64
}

/// The least recompute with which adapters and sampling keep [`KEPT`] of what they have with full recompute, beside the
/// bytes that are `asked` for them. `ways`: the bytes of a pass, the least recompute first.
fn least_recompute(free: Option<u64>, asked: u64, ways: &[(Recompute, u64)]) -> Recompute {
    let full = (RecomputeFullLayer.into(), 0);
    let last = ways.last().unwrap_or(&full);
    let left = |pass| free.map_or(0, |free| beside(free, pass).saturating_sub(asked));
    let least = (KEPT * left(last.1) as f64) as u64;
    let roomy = ways.iter().find(|(_, pass)| least > 0 && left(*pass) >= least);
    roomy.unwrap_or(last).0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::CheckpointingMethod::{NoRecompute, Selective};

    #[test]
    fn keys_and_values_take_a_share_or_one_sequence_and_no_more_than_is_of_use() {
        for (left, of_longest, most, expected) in [
            (Some(400), None, 1000, 100),
            (Some(400), Some(90), 1000, 100),
            (Some(400), Some(300), 1000, 300),
            (Some(400), Some(500), 1000, 400),
            (Some(9000), Some(300), 1000, 1000),
            (Some(9000), Some(2000), 1000, 2000),
            (Some(0), Some(300), 1000, 0),
            (None, Some(300), 1000, 1000),
        ] {
            assert_eq!(for_sampling(left, of_longest, most), expected, "{left:?} {of_longest:?} {most}");
        }
    }

    #[test]
    fn less_recompute_takes_at_most_a_quarter_of_the_room() {
        let selective = Recompute::first(1, Selective);
        let ways = [(NoRecompute.into(), 600), (selective, 300), (RecomputeFullLayer.into(), 100)];
        for (free, asked, expected) in [
            (None, 0, ways[2].0),
            (Some(50), 0, ways[2].0),
            (Some(890), 0, ways[2].0),
            // Full recompute leaves 9 tenths of 800; of these 720 selective takes 180.
            (Some(900), 0, ways[1].0),
            (Some(900), 10, ways[2].0),
            (Some(2090), 0, ways[1].0),
            (Some(2101), 0, ways[0].0),
            (Some(2101), 10, ways[1].0),
            (Some(2101), 9999, ways[2].0),
        ] {
            assert_eq!(least_recompute(free, asked, &ways), expected, "{free:?} {asked}");
        }
    }
}
