//! Progress of a run for people: a bar on a terminal, elsewhere lines.

use crate::{config::LogFormat, console};
use std::time::{Duration, Instant};

/// Time between two lines of a run without a terminal.
const BETWEEN_LINES: Duration = Duration::from_secs(10);

/// Columns of the bar itself, at least and at most.
const BAR: [usize; 2] = [6, 24];

/// The display of rank 0's steps.
pub(super) struct Progress {
    total: usize,
    /// Steps that were made before this process began.
    before: usize,
    begin: Instant,
    display: Display,
}

enum Display {
    Bar,
    /// A line for every step that is logged.
    Lines,
    /// The first and the last step, and one every [`BETWEEN_LINES`]; the last line came then.
    NowAndThen(Option<Instant>),
}

impl Progress {
    /// The progress of a run of `total` steps, of which `before` are made.
    pub fn new(total: usize, before: usize, format: LogFormat) -> Self {
        let display = match format {
            LogFormat::ProgressBar if console::shows_bar() => Display::Bar,
            LogFormat::ProgressBar => Display::NowAndThen(None),
            LogFormat::Structured => Display::Lines,
        };
        let progress = Self { total, before, begin: Instant::now(), display };
        if matches!(progress.display, Display::Bar) {
            console::draw(progress.bar(before, &[]));
        }
        progress
    }

    /// Shows step `done`, and `told` of it. `is_logged`: metrics.jsonl has a line for it.
    pub fn step(&mut self, done: usize, told: &[String], is_logged: bool) {
        match &mut self.display {
            Display::Bar => return console::draw(self.bar(done, told)),
            Display::Lines if !is_logged => return,
            Display::Lines => {}
            Display::NowAndThen(last) => {
                if last.is_some_and(|last| last.elapsed() < BETWEEN_LINES) && done < self.total {
                    return;
                }
                *last = Some(Instant::now());
            }
        }
        let left = self.left(done).map_or_else(|| "?".to_owned(), time);
        // A log on a full disk ends no training.
        let _ = console::tell(&format!("[STEP {done}/{}] {} eta={left}\n", self.total, told.join(" ")));
    }

    fn bar(&self, done: usize, told: &[String]) -> String {
        let elapsed = self.begin.elapsed();
        bar(console::width(), [done, self.total], elapsed, self.left(done), told)
    }

    /// Time that is left after step `done`, at the pace of this process.
    fn left(&self, done: usize) -> Option<Duration> {
        let made = done.checked_sub(self.before).filter(|&made| made > 0)?;
        let a_step = self.begin.elapsed().as_secs_f64() / made as f64;
        Some(Duration::from_secs_f64(a_step * self.total.saturating_sub(done) as f64))
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        console::end_bar();
    }
}

/// The bar in fewer columns than `width`, with as many of `told` as fit.
fn bar(
    width: usize,
    [done, total]: [usize; 2],
    elapsed: Duration,
    left: Option<Duration>,
    told: &[String],
) -> String {
    let room = width.saturating_sub(1);
    let left = left.map_or_else(|| "?".to_owned(), time);
    let count = format!("{done}/{total}");
    let mut text = format!("{count} [{}<{left}]", time(elapsed));
    if text.len() > room {
        text = count;
        text.truncate(room);
        return text;
    }
    // The first item, the loss, comes before a longer bar.
    let first = told.first().map_or(0, |item| item.len() + 1);
    let columns = room.saturating_sub(text.len() + first + 1).min(BAR[1]);
    if columns >= BAR[0] {
        let full = (columns * done.min(total)).checked_div(total).unwrap_or(columns);
        text = format!("{}{} {text}", "#".repeat(full), ".".repeat(columns - full));
    }
    for item in told {
        if text.len() + 1 + item.len() > room {
            break;
        }
        text = format!("{text} {item}");
    }
    text
}

/// `03:25`, or `1:03:25`.
fn time(time: Duration) -> String {
    let seconds = time.as_secs();
    let [hours, minutes, seconds] = [seconds / 3600, seconds / 60 % 60, seconds % 60];
    if hours > 0 {
        format!("{hours}:{minutes:02}:{seconds:02}")
    } else {
        format!("{minutes:02}:{seconds:02}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told() -> Vec<String> {
        ["loss=1.2345", "grad_norm=0.1234", "lr=5.000e-5", "tokens_per_sec=1234"].map(str::to_owned).to_vec()
    }

    #[test]
    fn a_bar_fits_any_width() {
        let (elapsed, left) = (Duration::from_secs(3725), Some(Duration::from_secs(59)));
        for width in 0..300 {
            let text = bar(width, [512, 1024], elapsed, left, &told());
            assert!(text.len() < width.max(1), "{width}: {text}");
            assert!(text.is_ascii() && !text.contains(char::is_control), "{text}");
        }
        let text = bar(80, [512, 1024], elapsed, left, &told());
        assert_eq!(text, "############............ 512/1024 [1:02:05<00:59] loss=1.2345 grad_norm=0.1234");
        assert_eq!(bar(40, [512, 1024], elapsed, left, &told()), "512/1024 [1:02:05<00:59] loss=1.2345");
        assert_eq!(bar(30, [512, 1024], elapsed, left, &told()), "512/1024 [1:02:05<00:59]");
        assert_eq!(bar(12, [512, 1024], elapsed, left, &told()), "512/1024");
        let start = bar(60, [0, 9], Duration::ZERO, None, &[]);
        assert_eq!(start, "........................ 0/9 [00:00<?]");
    }

    #[test]
    fn the_time_that_is_left_is_at_the_pace_of_this_process() {
        let begin = Instant::now() - Duration::from_secs(20);
        let progress = Progress { total: 300, before: 290, begin, display: Display::Lines };
        assert_eq!(progress.left(290), None);
        let left = progress.left(292).unwrap().as_secs_f64();
        assert!((left - 80.0).abs() < 1.0, "{left}: 8 steps of 10 s");
    }
}
