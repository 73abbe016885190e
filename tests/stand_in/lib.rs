//! Stands in for CUDA's driver and NCCL where there is no GPU: their C interfaces, as far as xorl-dist calls them, over
//! memory of the host. For tests alone.
//!
//! A stream is a thread that does what it is given one after another ([`driver`]); the legacy default stream is whoever
//! calls, since libtorch computes on the host at once. So a missing event is a race here too. Ranks exchange data
//! through files ([`exchange`]); NCCL's calls become work on streams ([`nccl`]), and each says of itself what all have
//! to agree on. Everything that is called is written down ([`journal`]).
//!
//! - `XORL_STAND_IN`: the folder of files and journals
//! - `XORL_STAND_IN_JITTER_US`: before each piece of work a stream sleeps for up to so long
//! - `XORL_STAND_IN_FAULT`: what goes wrong on purpose, see [`Fault`]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may panic")]
#![allow(non_snake_case, reason = "names of C")]
#![allow(unsafe_op_in_unsafe_fn, clippy::missing_safety_doc, reason = "whole functions are C interfaces")]

mod driver;
mod exchange;
mod journal;
mod nccl;

use std::{path::PathBuf, sync::OnceLock};

/// What goes wrong on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    None,
    /// Streams do not wait for events.
    IgnoresWaits,
    /// The collectives of one rank fail behind its back from its n-th on.
    Fails {
        rank: usize,
        from: u64,
    },
    /// The device of one rank stands still from its n-th collective on.
    Hangs {
        rank: usize,
        from: u64,
    },
}

impl Fault {
    /// `ignores_waits`, `fails:RANK:N` or `hangs:RANK:N`.
    fn asked() -> Self {
        static ASKED: OnceLock<Fault> = OnceLock::new();
        *ASKED.get_or_init(|| {
            let text = std::env::var("XORL_STAND_IN_FAULT").unwrap_or_default();
            let mut words = text.split(':');
            let word = words.next().unwrap_or_default();
            let mut number = || words.next().and_then(|word| word.parse::<u64>().ok()).unwrap_or(0);
            match word {
                "ignores_waits" => Fault::IgnoresWaits,
                "fails" => Fault::Fails { rank: number() as usize, from: number() },
                "hangs" => Fault::Hangs { rank: number() as usize, from: number() },
                _ => Fault::None,
            }
        })
    }
}

/// The folder of files and journals.
fn folder() -> PathBuf {
    std::env::var_os("XORL_STAND_IN").map_or_else(std::env::temp_dir, PathBuf::from)
}

/// This process's rank, as its launcher says.
fn world_rank() -> usize {
    let names = ["OMPI_COMM_WORLD_RANK", "PMI_RANK"];
    names.iter().find_map(|name| std::env::var(name).ok()?.parse().ok()).unwrap_or(0)
}
