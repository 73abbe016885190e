//! Text for people: counted nouns, short lists and values, whole lines on stderr, and a bar below them on a terminal.
//!
//! The bar is the last line of a rank's stderr. All other output to stderr goes through [`Lines`] or [`say`]: one write
//! erases the bar, adds the lines and draws the bar again. The bar is ASCII and narrower than the terminal.

use std::{
    io::{self, IsTerminal, Write},
    sync::{Mutex, PoisonError},
};

/// Columns of a terminal that does not say.
const WIDTH: usize = 80;

/// The bar as it stands; empty where there is none.
static BAR: Mutex<String> = Mutex::new(String::new());

/// `1 row`, `2 rows`.
pub fn count(number: usize, noun: &str) -> String {
    let plural = match noun.ends_with("ch") {
        _ if number == 1 => "",
        true => "es",
        false => "s",
    };
    format!("{number} {noun}{plural}")
}

/// Bytes in words: `35.2 MB`, where 1 MB is 1,000,000 bytes.
pub fn size(bytes: u64) -> String {
    match bytes {
        0..1000 => format!("{bytes} bytes"),
        1000..1_000_000 => format!("{:.1} kB", bytes as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{:.2} GB", bytes as f64 / 1e9),
    }
}

/// The first three of `names`, and the number of the others: `a, b, c and 2 more`.
pub fn first_of<T: AsRef<str>>(names: &[T]) -> String {
    const SHOWN: usize = 3;
    let shown: Vec<&str> = names.iter().take(SHOWN).map(AsRef::as_ref).collect();
    match names.len().saturating_sub(SHOWN) {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}

/// `value` as text of at most 60 characters, and an ellipsis if there are more.
pub fn shortened(value: &impl ToString) -> String {
    const MOST: usize = 60;
    let mut text = value.to_string();
    if let Some((end, _)) = text.char_indices().nth(MOST) {
        text.truncate(end);
        text.push('…');
    }
    text
}

/// Returns true if stderr is a terminal that can show a bar.
pub fn shows_bar() -> bool {
    io::stderr().is_terminal() && std::env::var_os("TERM").is_none_or(|kind| kind != "dumb")
}

/// Returns true if lines on stderr may have colours: on a terminal, and unless NO_COLOR is set.
pub fn has_colours() -> bool {
    shows_bar() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// Columns of stderr's terminal.
pub fn width() -> usize {
    let size = rustix::termios::tcgetwinsize(io::stderr()).ok();
    size.map(|size| usize::from(size.ws_col)).filter(|&columns| columns > 0).unwrap_or(WIDTH)
}

/// Writes `text`, one or more lines, to stderr.
pub fn say(text: &str) {
    // A closed stderr leaves no place to report its own error.
    let _ = Lines::default().write_all(format!("{text}\n").as_bytes());
}

/// Output to stdout was cut.
#[derive(Debug, thiserror::Error)]
#[error("stdout: {0}; not all was printed: free space there, or send it elsewhere")]
pub struct StdoutError(#[from] io::Error);

/// Writes `text` to stdout, at once. A reader that is gone, or has seen enough (`| head`), is no error.
///
/// # Errors
/// stdout takes no more: a file on a full disk.
pub fn tell(text: &str) -> Result<(), StdoutError> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

/// Writes `text` to stderr without a line break, to ask for a line.
pub fn ask(text: &str) {
    // As in `say`.
    let _ = io::stderr().write_all(text.as_bytes());
}

/// Draws `bar` in place of the one before.
pub fn draw(bar: String) {
    let mut shown = BAR.lock().unwrap_or_else(PoisonError::into_inner);
    let _ = io::stderr().write_all(redrawn(&shown, b"", &bar).as_slice());
    *shown = bar;
}

/// Leaves the bar as a line of its own and draws no more.
pub fn end_bar() {
    let mut shown = BAR.lock().unwrap_or_else(PoisonError::into_inner);
    if !shown.is_empty() {
        let _ = io::stderr().write_all(b"\n");
        shown.clear();
    }
}

/// Whole lines on stderr, each write with `prefix` before it.
#[derive(Clone, Default)]
pub struct Lines {
    pub prefix: String,
}

impl Write for Lines {
    fn write(&mut self, lines: &[u8]) -> io::Result<usize> {
        let shown = BAR.lock().unwrap_or_else(PoisonError::into_inner);
        let text = [self.prefix.as_bytes(), lines].concat();
        io::stderr().write_all(&redrawn(&shown, &text, &shown))?;
        Ok(lines.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Bytes that replace the bar `old` by `lines`, and `new` below them.
fn redrawn(old: &str, lines: &[u8], new: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    let columns = |bar: &str| bar.chars().count();
    if lines.is_empty() {
        let rest = columns(old).saturating_sub(columns(new));
        bytes.extend(format!("\r{new}{}", " ".repeat(rest)).bytes());
        return bytes;
    }
    if !old.is_empty() {
        bytes.extend(format!("\r{}\r", " ".repeat(columns(old))).bytes());
    }
    bytes.extend(lines);
    bytes.extend(new.bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_is_no_plural() {
        assert_eq!([0, 1, 2].map(|n| count(n, "row")), ["0 rows", "1 row", "2 rows"]);
        assert_eq!([1, 2].map(|n| count(n, "micro-batch")), ["1 micro-batch", "2 micro-batches"]);
    }

    #[test]
    fn long_lists_and_values_are_cut() {
        let lists: [&[&str]; 4] = [&[], &["a"], &["a", "b", "c"], &["a", "b", "c", "d", "e"]];
        assert_eq!(lists.map(first_of), ["", "a", "a, b, c", "a, b, c and 2 more"]);
        assert_eq!(shortened(&"é".repeat(60)), "é".repeat(60));
        assert_eq!(shortened(&"é".repeat(61)), "é".repeat(60) + "…");
    }

    #[test]
    fn a_line_stands_above_the_bar() {
        let text = |old: &str, lines: &str, new: &str| {
            String::from_utf8(redrawn(old, lines.as_bytes(), new)).unwrap()
        };
        assert_eq!(text("", "said\n", ""), "said\n");
        assert_eq!(text("#.", "said\n", "#."), "\r  \rsaid\n#.");
        assert_eq!(text("##..", "", "###"), "\r### ");
    }
}
