//! Time of a step: nested spans of this thread, as Chrome trace events (chrome://tracing, Perfetto) and
//! as a table. Any room may open a span. Off until [`start`]; off, a span is one look at a thread-local flag.
//!
//! Own code, because `tracing-chrome` (0.7) writes every process as pid 1, counts time from its own start instead of a
//! zero that ranks share, streams from program start on instead of the steps asked for, and panics where it cannot
//! write.

use serde::Serialize;
use serde_json::{Value, json};
use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    fmt::Write as _,
    fs::{self, File},
    io::{BufWriter, Write as _},
    marker::PhantomData,
    path::{Path, PathBuf},
    rc::Rc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

/// Why a trace could not be written.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The file system refuses a file or its folder.
    #[error("{}: cannot write the trace: {error}", path.display())]
    Io { path: PathBuf, error: std::io::Error },
}

/// Category of a span; the `cat` of its event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Category {
    Step,
    Phase,
    Operation,
    Collective,
}

impl Category {
    const fn name(self) -> &'static str {
        match self {
            Self::Step => "step",
            Self::Phase => "phase",
            Self::Operation => "operation",
            Self::Collective => "collective",
        }
    }
}

/// Recording of this thread.
#[derive(Debug, Default)]
struct Recording {
    spans: Vec<Event>,
    transfers: Vec<Event>,
    /// Time spent in the spans inside each one that is open, the innermost last.
    inside: Vec<Duration>,
}

#[derive(Debug)]
struct Event {
    category: Category,
    name: &'static str,
    begin: Instant,
    duration: Duration,
    /// Without the spans inside it.
    own: Duration,
    arguments: Arguments,
}

type Arguments = Vec<(&'static str, Value)>;

thread_local! {
    /// When the recording began, if there is one.
    static ON: Cell<Option<(Instant, SystemTime)>> = const { Cell::new(None) };
    static RECORDING: RefCell<Recording> = RefCell::default();
}

/// A span that ends when this is dropped, the last begun first.
#[must_use = "the span ends when this is dropped"]
#[derive(Debug)]
pub struct Span {
    open: Option<Open>,
    /// It ends on the thread that it began on.
    _here: PhantomData<Rc<()>>,
}

#[derive(Debug)]
struct Open {
    category: Category,
    name: &'static str,
    begin: Instant,
    arguments: Arguments,
}

/// Begins a span.
pub fn span(category: Category, name: &'static str) -> Span {
    let open = is_on().then(|| {
        RECORDING.with_borrow_mut(|recording| recording.inside.push(Duration::ZERO));
        Open { category, name, begin: Instant::now(), arguments: Vec::new() }
    });
    Span { open, _here: PhantomData }
}

/// Begins the span of an operation: the one line at the top of its function.
pub fn operation(name: &'static str) -> Span {
    span(Category::Operation, name)
}

impl Span {
    /// With an argument that viewers show: `bytes`, `group`, `unit`, `step`.
    pub fn with(mut self, name: &'static str, value: impl Into<Value>) -> Self {
        if let Some(open) = &mut self.open {
            open.arguments.push((name, value.into()));
        }
        self
    }
}

impl Drop for Span {
    fn drop(&mut self) {
        let Some(Open { category, name, begin, arguments }) = self.open.take() else { return };
        // What began before the recording, or ends after it, is in no trace.
        if ON.get().is_none_or(|(since, _)| begin < since) {
            return;
        }
        let duration = begin.elapsed();
        RECORDING.with_borrow_mut(|recording| {
            let inner = recording.inside.pop().unwrap_or_default();
            if let Some(outer) = recording.inside.last_mut() {
                *outer += duration;
            }
            let own = duration.saturating_sub(inner);
            recording.spans.push(Event { category, name, begin, duration, own, arguments });
        });
    }
}

/// A transfer that goes on beside the spans and ends when this is dropped.
#[must_use = "the transfer ends when this is dropped"]
#[derive(Debug)]
pub struct Transfer {
    /// Its place among the transfers of the recording that began then.
    index: usize,
    since: Instant,
    _here: PhantomData<Rc<()>>,
}

/// Begins a transfer; `None` when nothing is recorded.
pub fn transfer(name: &'static str, group: &str, bytes: usize) -> Option<Transfer> {
    let (since, _) = ON.get()?;
    let arguments = vec![("bytes", bytes.into()), ("group", group.into())];
    let index = RECORDING.with_borrow_mut(|recording| {
        let (begin, none) = (Instant::now(), Duration::ZERO);
        let category = Category::Collective;
        recording.transfers.push(Event { category, name, begin, duration: none, own: none, arguments });
        recording.transfers.len() - 1
    });
    Some(Transfer { index, since, _here: PhantomData })
}

impl Drop for Transfer {
    fn drop(&mut self) {
        if ON.get().is_some_and(|(since, _)| since == self.since) {
            RECORDING.with_borrow_mut(|recording| {
                let event = &mut recording.transfers[self.index];
                event.duration = event.begin.elapsed();
            });
        }
    }
}

/// True if this thread records.
pub fn is_on() -> bool {
    ON.get().is_some()
}

/// Records the spans of this thread from now on.
pub fn start() {
    RECORDING.take();
    ON.set(Some((Instant::now(), SystemTime::now())));
}

/// Ends the recording and returns it; `None` when there was none.
pub fn finish() -> Option<Trace> {
    let (begin, wall) = ON.take()?;
    let Recording { spans, mut transfers, .. } = RECORDING.take();
    // Those that are still under way.
    for transfer in transfers.iter_mut().filter(|transfer| transfer.duration.is_zero()) {
        transfer.duration = transfer.begin.elapsed();
    }
    Some(Trace { begin, wall, length: begin.elapsed(), spans, transfers })
}

/// A recording.
#[derive(Debug)]
pub struct Trace {
    begin: Instant,
    /// The wall clock at `begin`: ranks share it.
    wall: SystemTime,
    length: Duration,
    spans: Vec<Event>,
    transfers: Vec<Event>,
}

/// Microseconds since 1970: the time 0 of all ranks' events.
pub type Zero = u64;

/// Now, for ranks to agree on.
pub fn zero() -> Zero {
    since_1970(SystemTime::now()).as_micros() as Zero
}

fn since_1970(time: SystemTime) -> Duration {
    time.duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// One entry of `traceEvents`. Times are in microseconds.
#[derive(Serialize)]
struct Line<'a> {
    name: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    cat: Option<Category>,
    ph: &'static str,
    pid: usize,
    tid: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    ts: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    dur: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    args: BTreeMap<&'a str, &'a Value>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Document<'a> {
    trace_events: Vec<Line<'a>>,
    display_time_unit: &'static str,
}

impl Trace {
    /// The trace as JSON, one process for the rank, with times counted from `zero`.
    pub fn to_json(&self, rank: usize, zero: Zero) -> String {
        let start = since_1970(self.wall).as_nanos() as i128 - i128::from(zero) * 1000;
        let at = |time: Instant| (start + (time - self.begin).as_nanos() as i128) as f64 / 1e3;
        let line = |event: &Event, ph| Line {
            name: event.name,
            cat: Some(event.category),
            ph,
            pid: rank,
            tid: rank,
            ts: Some(at(event.begin)),
            dur: None,
            id: None,
            args: BTreeMap::new(),
        };
        fn arguments(event: &Event) -> BTreeMap<&str, &Value> {
            event.arguments.iter().map(|(name, value)| (*name, value)).collect()
        }
        let (process, thread, order) = (json!(format!("rank {rank}")), json!("compute"), json!(rank));
        let names = [
            ("process_name", "name", &process),
            ("process_sort_index", "sort_index", &order),
            ("thread_name", "name", &thread),
        ];
        let mut lines: Vec<Line> = names
            .into_iter()
            .map(|(name, key, value)| Line {
                name,
                cat: None,
                ph: "M",
                pid: rank,
                tid: rank,
                ts: None,
                dur: None,
                id: None,
                args: BTreeMap::from([(key, value)]),
            })
            .collect();
        for event in &self.spans {
            let dur = Some(event.duration.as_nanos() as f64 / 1e3);
            lines.push(Line { dur, args: arguments(event), ..line(event, "X") });
        }
        // A transfer is a pair of asynchronous events. Their ids differ between ranks, so that files can be joined.
        for (index, event) in self.transfers.iter().enumerate() {
            let id = Some(format!("{rank}.{index}"));
            lines.push(Line { id: id.clone(), args: arguments(event), ..line(event, "b") });
            lines.push(Line { id, ts: Some(at(event.begin + event.duration)), ..line(event, "e") });
        }
        let document = Document { trace_events: lines, display_time_unit: "ms" };
        // Numbers, text and maps with text for keys: nothing that JSON cannot say.
        serde_json::to_string(&document).unwrap_or_default()
    }

    /// Time by name, the largest first: calls, total time, and own time without the spans inside, of which the
    /// share is taken. Own times add up to the traced time, but for what was in no span.
    pub fn table(&self) -> String {
        let mut rows: BTreeMap<(Category, &str), (usize, Duration, Duration)> = BTreeMap::new();
        for Event { category, name, duration, own, .. } in &self.spans {
            let row = rows.entry((*category, name)).or_default();
            *row = (row.0 + 1, row.1 + *duration, row.2 + *own);
        }
        let mut rows: Vec<_> = rows.into_iter().collect();
        rows.sort_by_key(|(_, (_, _, own))| std::cmp::Reverse(*own));
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        let mut text = format!("traced: {:.3} ms\n", ms(self.length));
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "{:10}  {:28} {:>7} {:>12} {:>12} {:>7}",
            "category", "name", "calls", "total ms", "own ms", "share"
        );
        for ((category, name), (calls, total, own)) in rows {
            let share = 100.0 * own.as_secs_f64() / self.length.as_secs_f64();
            let (category, total, own) = (category.name(), ms(total), ms(own));
            let _ = writeln!(
                text,
                "{category:10}  {name:28} {calls:>7} {total:>12.3} {own:>12.3} {share:>5.1} %"
            );
        }
        text
    }

    /// Writes `rank_{rank}.json` and `rank_{rank}.txt` into `folder`, each whole or not at all.
    pub fn write(&self, folder: &Path, rank: usize, zero: Zero) -> Result<(), TraceError> {
        fs::create_dir_all(folder).map_err(|error| TraceError::Io { path: folder.to_owned(), error })?;
        for (ending, text) in [("json", self.to_json(rank, zero)), ("txt", self.table())] {
            let path = folder.join(format!("rank_{rank}.{ending}"));
            write_whole(&path, &text).map_err(|error| TraceError::Io { path, error })?;
        }
        Ok(())
    }
}

/// Writes beside `path`, then renames.
fn write_whole(path: &Path, text: &str) -> std::io::Result<()> {
    let partial = path.with_added_extension("tmp");
    let mut file = BufWriter::new(File::create(&partial)?);
    file.write_all(text.as_bytes())?;
    file.flush()?;
    fs::rename(partial, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Events of `json` with this `ph`.
    fn events(json: &Value, ph: &str) -> Vec<Value> {
        json["traceEvents"].as_array().unwrap().iter().filter(|event| event["ph"] == ph).cloned().collect()
    }

    fn pause() {
        std::thread::sleep(Duration::from_millis(2));
    }

    #[test]
    fn nothing_is_recorded_unless_it_is_on() {
        drop(operation("before").with("bytes", 7));
        assert!(transfer("all_gather", "world", 8).is_none() && finish().is_none());
        let across = operation("across");
        start();
        drop(across);
        let (open, flying) = (operation("open"), transfer("all_gather", "world", 8));
        let trace = finish().unwrap();
        assert!(trace.spans.is_empty(), "{:?}", trace.spans);
        assert_eq!(trace.transfers.len(), 1);
        // What outlives its recording is not in the next.
        start();
        drop((open, flying));
        let trace = finish().unwrap();
        assert!(trace.spans.is_empty() && trace.transfers.is_empty(), "{trace:?}");
        assert!(!is_on() && RECORDING.with_borrow(|recording| recording.inside.is_empty()));
    }

    #[test]
    fn inner_spans_lie_inside_outer_ones_and_own_times_add_up() {
        let zero = zero();
        start();
        {
            let _step = span(Category::Step, "step").with("step", 3usize);
            {
                let _phase = span(Category::Phase, "forward").with("unit", 1usize);
                pause();
                for _ in 0..2 {
                    let _operation = operation("linear.forward");
                    pause();
                }
            }
            let flying = transfer("all_gather", "shard", 64);
            drop(span(Category::Collective, "all_reduce").with("bytes", 12usize).with("group", "world"));
            drop(flying);
        }
        let trace = finish().unwrap();
        let sum: Duration = trace.spans.iter().map(|event| event.own).sum();
        let step = trace.spans.last().unwrap();
        assert_eq!((step.name, step.duration), ("step", sum));

        let json: Value = serde_json::from_str(&trace.to_json(5, zero)).unwrap();
        let spans = events(&json, "X");
        let names: Vec<&str> = spans.iter().map(|event| event["name"].as_str().unwrap()).collect();
        assert_eq!(names, ["linear.forward", "linear.forward", "forward", "all_reduce", "step"]);
        let reach = |event: &Value| {
            let begin = event["ts"].as_f64().unwrap();
            (begin, begin + event["dur"].as_f64().unwrap())
        };
        let inside = |inner: &Value, outer: &Value| {
            let ((a, b), (begin, end)) = (reach(inner), reach(outer));
            assert!(begin - 1e-3 <= a && a <= b && b <= end + 1e-3, "{inner} outside of {outer}");
        };
        for event in &spans[..4] {
            inside(event, &spans[4]);
            assert_eq!((&event["pid"], &event["tid"]), (&json!(5), &json!(5)));
        }
        inside(&spans[0], &spans[2]);
        inside(&spans[1], &spans[2]);
        assert!(reach(&spans[0]).1 <= reach(&spans[1]).0 && spans[0]["dur"].as_f64().unwrap() >= 2000.0);
        assert!(spans[4]["ts"].as_f64().unwrap() >= 0.0 && spans[4]["ts"].as_f64().unwrap() < 60e6);
        assert_eq!(spans[4]["args"], json!({"step": 3}));
        assert_eq!(spans[3]["args"], json!({"bytes": 12, "group": "world"}));
        assert_eq!((&spans[3]["cat"], &spans[2]["cat"]), (&json!("collective"), &json!("phase")));

        let (begun, ended) = (events(&json, "b").remove(0), events(&json, "e").remove(0));
        assert_eq!((&begun["id"], &begun["id"]), (&ended["id"], &json!("5.0")));
        assert_eq!(begun["args"], json!({"bytes": 64, "group": "shard"}));
        assert!(begun["ts"].as_f64().unwrap() < ended["ts"].as_f64().unwrap());
        assert!(reach(&spans[4]).1 >= ended["ts"].as_f64().unwrap());
        let names = events(&json, "M");
        assert!(names.iter().any(|event| event["args"]["name"] == "rank 5"), "{names:?}");

        let table = trace.table();
        let rows: Vec<&str> = table.lines().skip(2).collect();
        assert_eq!(rows.len(), 4, "{table}");
        let operation = rows.iter().find(|row| row.starts_with("operation   linear.forward")).expect(&table);
        assert!(operation.ends_with('%'), "{table}");
        // The column of own times; the pauses make no order that a busy machine keeps.
        let own = |row: &&str| row.split_whitespace().nth(4).unwrap().parse::<f64>().unwrap();
        assert!(rows.iter().map(own).is_sorted_by(|a, b| a >= b), "{table}");
    }

    #[test]
    fn a_file_that_cannot_be_written_is_named() {
        let folder = tempfile::tempdir().unwrap();
        start();
        let trace = finish().unwrap();
        let good = folder.path().join("trace/run");
        trace.write(&good, 1, zero()).unwrap();
        let mut files: Vec<_> = fs::read_dir(&good).unwrap().map(|file| file.unwrap().file_name()).collect();
        files.sort();
        assert_eq!(files, ["rank_1.json", "rank_1.txt"]);
        fs::write(folder.path().join("file"), "").unwrap();
        let error = trace.write(&folder.path().join("file/run"), 1, zero()).unwrap_err().to_string();
        assert!(error.contains("file/run: cannot write the trace"), "{error}");
    }
}
