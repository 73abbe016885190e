//! A tiny run in which everything that is saved is in use, and the checks that hold after every kill of it.

use crate::common::{
    metrics, succeeded,
    tiny::{TinyRun, differences},
};
use prost::Message;
use serde_json::Value;
use std::{
    fs,
    path::{Path, PathBuf},
    process::Output,
};
use xorl_dist::checkpoint::{contents, failpoints, publish};

pub const STEPS: usize = 16;
const OUT: &str = "out";

/// A step saved after each, of which two stay; merges, whose base is in the steps; event files.
const SETTINGS: &str = "--train.max_steps 16 --train.save_steps 1 --train.save_total_limit 2 \
    --train.global_batch_size 4 --train.use_tensorboard true --lora.merge_lora_interval 3 \
    --train.load_checkpoint_path auto";

/// A run that is killed again and again in `out`, beside the undisturbed one.
pub struct Story {
    pub run: TinyRun,
    pub ranks: usize,
    undisturbed: PathBuf,
    /// The newest step that was seen.
    newest: Option<usize>,
}

impl Story {
    pub fn new(ranks: usize) -> Self {
        let run = TinyRun::new();
        let undisturbed = run.at("undisturbed");
        let story = Self { run, ranks, undisturbed, newest: None };
        // In the same place, which the steps name.
        succeeded(&story.command().output().unwrap());
        fs::rename(story.out(), &story.undisturbed).unwrap();
        story
    }

    pub fn out(&self) -> PathBuf {
        self.run.at(OUT)
    }

    /// Starts the run afresh or goes on with it.
    pub fn command(&self) -> std::process::Command {
        let settings: Vec<&str> = SETTINGS.split_whitespace().collect();
        let mut command = self.run.command(self.ranks, OUT, &settings);
        command.env("RUST_LOG", "info");
        command
    }

    /// The same, until rank `rank` has reached the instant `name` for the `nth` time, or to the end.
    pub fn until(&self, name: &str, nth: usize, rank: usize) -> Output {
        let mut command = self.command();
        command.env(failpoints::VARIABLE, format!("{name}:{nth}:{rank}"));
        command.output().unwrap()
    }

    /// Checks what a kill has left: every published step is whole, `latest` names one, and none was lost.
    pub fn check(&mut self, place: &str) {
        let steps = self.run.steps(OUT);
        for &step in &steps {
            let path = self.run.step(OUT, step);
            publish::verify(&path)
                .and_then(|()| contents::check(&path))
                .unwrap_or_else(|error| panic!("{place}: torn: {error}"));
        }
        let newest = steps.last().copied();
        assert!(newest >= self.newest, "{place}: step {:?} was there, now {newest:?}", self.newest);
        self.newest = newest;
        if let Ok(latest) = fs::read_to_string(self.run.run_dir(OUT).join("latest")) {
            let named = self.run.run_dir(OUT).join(latest.trim());
            publish::verify(&named).unwrap_or_else(|error| panic!("{place}: latest: {error}"));
        } else {
            assert!(steps.len() < 2, "{place}: no latest beside {steps:?}");
        }
    }

    /// Checks that the run has ended as the undisturbed one has, and removes it.
    pub fn finish(&mut self, place: &str) {
        self.check(place);
        let (own, other) = (self.out(), &self.undisturbed);
        assert_eq!(self.run.story(OUT), self.run.story("undisturbed"), "{place}");
        assert_eq!(metrics(&own).len(), STEPS, "{place}");
        assert_eq!(steps_of_events(&own.join("tensorboard/run")), (1..=STEPS).collect::<Vec<_>>(), "{place}");
        for step in [STEPS - 1, STEPS] {
            let different = differences(&self.run.step("undisturbed", step), &self.run.step(OUT, step));
            assert!(different.is_empty(), "{place}: step {step}: {different:?}");
        }
        let summary = |out: &Path| fs::read_to_string(out.join("training_metrics.json")).unwrap();
        assert_eq!(summary(&own), summary(other), "{place}");
        let hidden = fs::read_dir(self.run.run_dir(OUT)).unwrap().flatten();
        let hidden: Vec<_> = hidden
            .map(|entry| entry.file_name())
            .filter(|name| name.to_string_lossy().starts_with(".tmp-"))
            .collect();
        assert!(hidden.is_empty(), "{place}: {hidden:?}");
        fs::remove_dir_all(&own).unwrap();
        self.newest = None;
    }
}

/// The parts of an `Event` of TensorBoard that say which steps are read.
#[derive(Clone, PartialEq, Message)]
struct Event {
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(bytes, optional, tag = "5")]
    summary: Option<Vec<u8>>,
    #[prost(bytes, optional, tag = "7")]
    session_log: Option<Vec<u8>>,
}

/// The steps that TensorBoard reads of the files in `folder`: a file that begins at a step drops what those before it
/// have from there on, and a torn record ends its file.
fn steps_of_events(folder: &Path) -> Vec<usize> {
    let mut files: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    let mut steps = Vec::new();
    for file in files {
        let bytes = fs::read(file).unwrap();
        let mut rest = bytes.as_slice();
        while let Some((length, behind)) = rest.split_first_chunk() {
            // Length, its checksum, data, their checksum.
            let length = u64::from_le_bytes(*length) as usize;
            let Some(data) = behind.get(4..4 + length).filter(|_| behind.len() >= length + 8) else { break };
            let event = Event::decode(data).unwrap();
            if event.session_log.is_some() {
                steps.retain(|&step| step < event.step as usize);
            }
            if event.summary.is_some() {
                steps.push(event.step as usize);
            }
            rest = &behind[length + 8..];
        }
    }
    steps
}

/// The JSON of a file.
pub fn json(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}
