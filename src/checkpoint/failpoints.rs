//! Instants of saving and loading at which tests kill a rank (`tests/crash`): before and after what reaches the disk.
//! `fail_point!` marks them in the code. Only in builds of tests it is code at all: the dev-dependency on `fail` turns
//! its feature on.

use crate::console;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The variable that names the instant: `name:nth:rank`. The process of that rank is killed when it is there for the
/// nth time.
pub const VARIABLE: &str = "XORL_FAILPOINT";

/// Instants that the ranks of the first copy reach; others only rank 0 does.
pub const OF_EVERY_RANK: &[&str] = &[
    "load.state",
    "load.pieces",
    "pieces.begun",
    "pieces.written",
    "pieces.synced",
    "model.written",
    "model.synced",
];

/// The instants of a run with steps that are pruned and merges, in the order of a save.
pub const OF_RUNS: &[&str] = &[
    "folder.created",
    "recover.begun",
    "recover.removed",
    "load.verified",
    "load.state",
    "load.pieces",
    "publish.begun",
    "base.linked",
    "model.created",
    "adapter.config_written",
    "adapter.values_written",
    "pieces.begun",
    "pieces.written",
    "pieces.synced",
    "model.written",
    "model.synced",
    "state.written",
    "publish.file_synced",
    "publish.listed",
    "publish.manifest_written",
    "publish.manifest_synced",
    "publish.hidden_synced",
    "publish.renamed",
    "publish.parent_synced",
    "name.written",
    "name.synced",
    "name.renamed",
    "name.run_synced",
    "withdraw.begun",
    "withdraw.renamed",
    "withdraw.synced",
    "withdraw.removed",
];

/// The instants of a server's saves that runs do not have.
pub const OF_SAVES: &[&str] = &[
    "recover.renamed",
    "publish.replaced_away",
    "publish.replaced_removed",
    "metadata.written",
    "link.linked",
    "rename.renamed",
    "rename.synced",
];

/// Has this process, of rank `rank`, end as by SIGKILL where [`VARIABLE`] says so. In other builds than those of tests
/// it does nothing.
pub fn arm(rank: usize) {
    if !fail::has_failpoints() {
        return;
    }
    let Ok(wish) = std::env::var(VARIABLE) else { return };
    let mut parts = wish.split(':');
    let name = parts.next().unwrap_or_default();
    let mut number = || parts.next().and_then(|part| part.parse::<usize>().ok());
    let (nth, of) = (number().unwrap_or(1), number().unwrap_or(0));
    if of != rank {
        return;
    }
    let passed = AtomicUsize::new(0);
    let said = format!("killed at {name} by {VARIABLE}");
    let kill = move || {
        if passed.fetch_add(1, Ordering::Relaxed) + 1 == nth {
            console::say(&said);
            // SAFETY: raise(2) takes any number; SIGKILL ends the process, which no handler sees.
            unsafe { libc::raise(libc::SIGKILL) };
        }
    };
    if let Err(error) = fail::cfg_callback(name, kill) {
        tracing::warn!("{VARIABLE}: {error}");
    }
}
