//! The memory that a rank has left for adapters and for keys and values, beside the base and a pass.

use super::{EngineError, EngineOptions, models::Models, residence::Need};
use crate::{
    Result,
    infer::{cache::page_bytes, step::PAGE},
    lora::AdapterPlan,
    model::base_plan::BasePlan,
    plan::{Memory, MicroBatch},
};
use std::{collections::BTreeMap, fs, path::Path};
use tch::Device;

/// The share of what is left that adapters may take; the rest is for allocators, which keep and split blocks.
const SHARE: f64 = 0.9;

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
    pub fn new(models: &Models, options: &EngineOptions) -> Result<Self> {
        let spec = options.defaults.spec();
        let left = measure(models, &models.plan(&spec)?, options.max_tokens_per_pass)?;
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

/// Bytes that a rank has left beside a pass of `tokens` tokens with an adapter of `plan`. `None`: a rank cannot tell.
/// Collective.
fn measure(models: &Models, plan: &AdapterPlan, tokens: usize) -> Result<Option<u64>> {
    let (groups, spec, options) = (models.groups(), models.model().spec(), models.model().options());
    let base = BasePlan::new(spec, options, &groups.mesh, groups.rank)?;
    let batch = MicroBatch { tokens, longest: tokens };
    let memory = Memory::new(spec, &base, plan, options, &models.defaults().optimizer, batch);
    // A stand-in for a device has its tensors in host memory.
    let device = if groups.device.tensors() == Device::Cpu { None } else { groups.device.memory()? };
    let (place, free, pass) = match device {
        Some(device) => (groups.rank.to_string(), Some(device.free as u64), memory.pass_on_device()),
        None => (host(), free_on_host(), memory.pass()),
    };
    let own = postcard::to_stdvec(&(place, free)).map_err(EngineError::from)?;
    let mut all: Vec<(String, Option<u64>)> = Vec::new();
    for bytes in groups.world.all_gather_host(&own)? {
        all.push(postcard::from_bytes(&bytes).map_err(EngineError::from)?);
    }
    Ok(of_tightest(&all).map(|free| (SHARE * free.saturating_sub(pass as u64) as f64) as u64))
}

/// The bytes that are free for a rank, where each has told the place of its memory and the bytes that are free there.
fn of_tightest(ranks: &[(String, Option<u64>)]) -> Option<u64> {
    let mut sharing: BTreeMap<&str, u64> = BTreeMap::new();
    for (place, _) in ranks {
        *sharing.entry(place).or_default() += 1;
    }
    let each: Option<Vec<u64>> =
        ranks.iter().map(|(place, free)| Some((*free)? / sharing[&**place])).collect();
    each?.into_iter().min()
}

/// A name of this host that its containers share.
fn host() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default()
}

/// Bytes that processes of this host may still take: what the kernel has, and what control groups allow.
fn free_on_host() -> Option<u64> {
    let kernel = available(&fs::read_to_string("/proc/meminfo").ok()?)?;
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let allowed = groups_of(&groups).into_iter().filter_map(|(folder, names)| {
        let read = |name: &str| fs::read_to_string(Path::new(&folder).join(name)).ok();
        left(&read(names.limit)?, &read(names.usage)?, &read("memory.stat")?)
    });
    allowed.chain([kernel]).min()
}

/// MemAvailable of /proc/meminfo.
fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? * 1024)
}

/// The files of a control group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Names {
    limit: &'static str,
    usage: &'static str,
}

/// The folders of the memory control groups that bound a process whose /proc/self/cgroup is `text`: its own, those
/// above, and in a container, which does not see these, the root.
fn groups_of(text: &str) -> Vec<(String, Names)> {
    let mut found = Vec::new();
    for line in text.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
        let (root, names) = match controllers {
            "" => ("/sys/fs/cgroup", Names { limit: "memory.max", usage: "memory.current" }),
            _ if controllers.split(',').any(|name| name == "memory") => {
                let (limit, usage) = ("memory.limit_in_bytes", "memory.usage_in_bytes");
                ("/sys/fs/cgroup/memory", Names { limit, usage })
            }
            _ => continue,
        };
        let above = Path::new(path.trim_start_matches('/')).ancestors();
        found.extend(above.map(|path| (Path::new(root).join(path).display().to_string(), names)));
    }
    found
}

/// Bytes that a control group leaves: its limit less what it uses and cannot drop. `None`: no limit.
fn left(limit: &str, usage: &str, stat: &str) -> Option<u64> {
    let number = |text: &str| text.trim().parse::<u64>().ok();
    let cache = stat.lines().find_map(|line| number(line.strip_prefix("inactive_file ")?)).unwrap_or(0);
    Some(number(limit)?.saturating_sub(number(usage)?.saturating_sub(cache)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tightest_rank_counts_and_ranks_of_a_host_share() {
        let of = |ranks: &[(&str, Option<u64>)]| {
            let ranks: Vec<_> = ranks.iter().map(|&(place, free)| (place.to_owned(), free)).collect();
            of_tightest(&ranks)
        };
        assert_eq!(of(&[("a", Some(90)), ("a", Some(100)), ("b", Some(48))]), Some(45));
        assert_eq!(of(&[("a", Some(90)), ("a", Some(100)), ("b", Some(40))]), Some(40));
        assert_eq!(of(&[("a", Some(90)), ("b", None)]), None);
    }

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
    fn files_of_the_kernel_are_read() {
        let meminfo = "MemTotal:       16314340 kB\nMemFree: 1 kB\nMemAvailable:   10240 kB\n";
        assert_eq!(available(meminfo), Some(10 << 20));
        assert_eq!(available("MemTotal: 1 kB\n"), None);
        let stat = "anon 5\ninactive_file 30\nactive_file 7\n";
        assert_eq!(left("100\n", "90\n", stat), Some(40));
        assert_eq!(left("100", "200", stat), Some(0));
        assert_eq!(left("max\n", "90\n", stat), None);
        let folders = |text| groups_of(text).into_iter().map(|(folder, _)| folder).collect::<Vec<_>>();
        assert_eq!(folders("0::/a/b\n"), ["/sys/fs/cgroup/a/b", "/sys/fs/cgroup/a", "/sys/fs/cgroup/"]);
        let first = "5:cpu,memory:/c\n3:cpuset:/d\n";
        assert_eq!(folders(first), ["/sys/fs/cgroup/memory/c", "/sys/fs/cgroup/memory/"]);
        assert!(free_on_host().is_some_and(|free| free > 1 << 20));
    }
}
