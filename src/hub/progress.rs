//! A download for people: the bar on a terminal, elsewhere a line now and then.

use crate::console::{self, size};
use std::time::{Duration, Instant};

/// Time between two draws of the bar, and between two lines.
const BETWEEN: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(10)];
/// Columns of the bar itself.
const BAR: usize = 24;

/// The progress of a download of `total` bytes, silent unless `is_shown`.
pub(super) struct Progress {
    name: String,
    total: u64,
    begin: Instant,
    /// Bytes that were here at the beginning.
    before: u64,
    last: Instant,
    is_shown: bool,
}

impl Progress {
    pub fn new(name: String, before: u64, total: u64, is_shown: bool) -> Self {
        if is_shown {
            let found = if before > 0 { format!(", {} are here", size(before)) } else { String::new() };
            tracing::info!("downloading {name}: {}{found}", size(total));
        }
        let now = Instant::now();
        Self { name, total, begin: now, before, last: now, is_shown }
    }

    /// Shows that `done` bytes are here.
    pub fn at(&mut self, done: u64) {
        let is_bar = console::shows_bar();
        let between = if is_bar { BETWEEN[0] } else { BETWEEN[1] };
        if !self.is_shown || self.last.elapsed() < between {
            return;
        }
        self.last = Instant::now();
        let pace = done.saturating_sub(self.before) as f64 / self.begin.elapsed().as_secs_f64().max(1e-3);
        match is_bar {
            true => console::draw(bar(console::width(), &self.name, [done, self.total], pace)),
            false => tracing::info!("{}", words(&self.name, [done, self.total], pace)),
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.is_shown {
            console::end_bar();
        }
    }
}

/// `Qwen/Qwen3-8B: 512.0 MB of 988.1 MB, 35.2 MB/s`
fn words(name: &str, [done, total]: [u64; 2], pace: f64) -> String {
    format!("{name}: {} of {}, {}/s", size(done), size(total), size(pace as u64))
}

/// The same behind a bar, in fewer columns than `width`.
fn bar(width: usize, name: &str, [done, total]: [u64; 2], pace: f64) -> String {
    let room = width.saturating_sub(1);
    let mut text = words(name, [done, total], pace);
    if text.len() + 1 + BAR <= room {
        let full = (BAR as f64 * done.min(total) as f64 / total.max(1) as f64) as usize;
        text = format!("{}{} {text}", "#".repeat(full), ".".repeat(BAR - full));
    }
    text.truncate(room);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_fits_any_width() {
        let done = [512_000_000, 1_024_000_000];
        for width in 0..120 {
            let text = bar(width, "Qwen/Qwen2.5-0.5B", done, 35.2e6);
            assert!(text.len() < width.max(1) && text.is_ascii(), "{width}: {text}");
        }
        assert_eq!(
            bar(100, "Qwen/Qwen2.5-0.5B", done, 35.2e6),
            "############............ Qwen/Qwen2.5-0.5B: 512.0 MB of 1.02 GB, 35.2 MB/s"
        );
        assert_eq!([0, 999, 1_500].map(size), ["0 bytes", "999 bytes", "1.5 kB"]);
    }
}
