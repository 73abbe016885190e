//! TensorBoard's event files: the scalars of each line of metrics.jsonl.
//!
//! A file is a row of records as `tensorflow/core/lib/io/record_writer.h` frames them; a record is an `Event` of
//! `tensorflow/core/util/event.proto`.

use super::records::Records;
use prost::Message;
use serde_json::Value;
use std::{
    fs::{self, File},
    io,
    path::Path,
    time::SystemTime,
};

/// Begins the names of event files; the second at which one begins follows.
const PREFIX: &str = "events.out.tfevents.";
/// Steps that a session begins anew are dropped from this version of files on.
const VERSION: &str = "brain.Event:2";
/// `SessionLog.START`
const START: i32 = 1;

/// An `Event`. Of file_version, summary and session_log one is there.
#[derive(Clone, PartialEq, Message)]
struct Event {
    /// Seconds since the epoch.
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(string, optional, tag = "3")]
    file_version: Option<String>,
    #[prost(message, optional, tag = "5")]
    summary: Option<Summary>,
    #[prost(message, optional, tag = "7")]
    session_log: Option<SessionLog>,
}

#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    value: Vec<Scalar>,
}

/// A `Summary.Value` with a simple_value.
#[derive(Clone, PartialEq, Message)]
struct Scalar {
    #[prost(string, tag = "1")]
    tag: String,
    #[prost(float, optional, tag = "2")]
    simple_value: Option<f32>,
}

#[derive(Clone, PartialEq, Message)]
struct SessionLog {
    #[prost(int32, tag = "1")]
    status: i32,
}

/// The event file of one process.
pub(super) struct EventFile(pub(super) Records);

impl EventFile {
    /// Begins a file in `folder`. Of the files before it TensorBoard drops what they have from step `first` on, as with
    /// `purge_step` of torch's `SummaryWriter`.
    pub fn begin(folder: &Path, first: usize) -> io::Result<Self> {
        fs::create_dir_all(folder)?;
        let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        // Files are read in the order of their names: that of their seconds, which two must not share.
        let now = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default().as_secs();
        let last = fs::read_dir(folder)?.flatten().filter_map(|entry| {
            entry.file_name().to_str()?.strip_prefix(PREFIX)?.split('.').next()?.parse::<u64>().ok()
        });
        let second = last.max().map_or(now, |last| now.max(last + 1));
        let name = format!("{PREFIX}{second:010}.{}.{}.0", host.trim(), std::process::id());
        let mut file = Self(Records::after(File::create_new(folder.join(name))?, 0)?);
        file.write(Event { file_version: Some(VERSION.into()), ..Event::default() })?;
        let session_log = Some(SessionLog { status: START });
        file.write(Event { step: first as i64, session_log, ..Event::default() })?;
        for made in [Some(folder), folder.parent()].into_iter().flatten() {
            File::open(made)?.sync_all()?;
        }
        Ok(file)
    }

    /// Adds a line of metrics.jsonl.
    pub fn add(&mut self, line: &Value) -> io::Result<()> {
        let scalar = |(tag, value): (String, f64)| Scalar { tag, simple_value: Some(value as f32) };
        let summary = Some(Summary { value: scalars(line).into_iter().map(scalar).collect() });
        self.write(Event { step: line["step"].as_i64().unwrap_or(0), summary, ..Event::default() })
    }

    fn write(&mut self, event: Event) -> io::Result<()> {
        let wall_time = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default().as_secs_f64();
        self.0.add(&record(&Event { wall_time, ..event }.encode_to_vec()))
    }
}

/// The scalars of a line by their tags: `train/loss` and `eval/loss` as of transformers' callback, and the numbers of
/// an object below its name.
fn scalars(line: &Value) -> Vec<(String, f64)> {
    let mut found = Vec::new();
    for (key, value) in line.as_object().into_iter().flatten() {
        let tag = match key.as_str() {
            "step" | "steps" | "total_steps" => continue,
            "lr" => "train/learning_rate".to_owned(),
            "peak_rss_bytes" | "device_memory_bytes" => format!("memory/{key}"),
            _ => match key.strip_prefix("eval_") {
                Some(key) => format!("eval/{key}"),
                None => format!("train/{key}"),
            },
        };
        let parts = value.as_object().into_iter().flatten();
        found.extend(parts.filter_map(|(part, value)| Some((format!("{key}/{part}"), value.as_f64()?))));
        found.extend(value.as_f64().map(|value| (tag, value)));
    }
    found
}

/// A record: length, its checksum, data, their checksum.
fn record(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    [&length[..], &masked(&length).to_le_bytes(), data, &masked(data).to_le_bytes()].concat()
}

/// The checksum of a record's part: CRC-32C, turned and offset (`tensorflow/core/lib/hash/crc32c.h`).
fn masked(data: &[u8]) -> u32 {
    crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// CRC-32C (Castagnoli), reflected, bit by bit: a record has some hundred bytes.
fn crc32c(data: &[u8]) -> u32 {
    let bit = |crc: u32| if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
    !data.iter().fold(!0, |crc, &byte| (0..8).fold(crc ^ u32::from(byte), |crc, _| bit(crc)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// RFC 3720, B.4.
    #[test]
    fn checksums_are_those_of_the_standard() {
        let ascending: Vec<u8> = (0..32).collect();
        for (data, expected) in [
            (&[0; 32][..], 0x8a91_36aa),
            (&[0xff; 32], 0x62a8_ab43),
            (&ascending, 0x46dd_794e),
            (b"123456789", 0xe306_9283),
        ] {
            assert_eq!(crc32c(data), expected);
        }
    }

    #[test]
    fn a_line_becomes_tags_with_values() {
        let line = json!({"step": 3, "total_steps": 9, "loss": 0.5, "lr": 0.25, "peak_rss_bytes": 1024, "eval_loss": 2.0,
            "grad_norm": null, "phase_seconds": {"forward": 0.125}, "comm_bytes": {"all_gather/shard": 64}});
        let expected = [
            ("train/loss", 0.5),
            ("train/learning_rate", 0.25),
            ("memory/peak_rss_bytes", 1024.0),
            ("eval/loss", 2.0),
            ("phase_seconds/forward", 0.125),
            ("comm_bytes/all_gather/shard", 64.0),
        ];
        assert_eq!(scalars(&line), expected.map(|(tag, value)| (tag.to_owned(), value)));
    }

    #[test]
    fn files_sort_in_the_order_in_which_they_begin() {
        let folder = tempfile::tempdir().unwrap();
        for first in 1..=12 {
            EventFile::begin(&folder.path().join("run"), first).unwrap();
        }
        let entries = fs::read_dir(folder.path().join("run")).unwrap().map(|entry| entry.unwrap().path());
        let mut paths: Vec<_> = entries.collect();
        paths.sort();
        let first = |path: &std::path::PathBuf| {
            let bytes = fs::read(path).unwrap();
            let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            let second = &bytes[16 + length..];
            let length = u64::from_le_bytes(second[..8].try_into().unwrap()) as usize;
            Event::decode(&second[12..12 + length]).unwrap().step
        };
        assert_eq!(paths.iter().map(first).collect::<Vec<_>>(), (1..=12).collect::<Vec<i64>>());
    }
}
