//! Files of prepared rows. A file is named after everything that its rows depend on, and carries a hash of its rows: a
//! damaged one is never used. One process of a host builds it while the others wait for its lock, and all map it.
//!
//! Without `dataset_prepared_path` the file lies in the folder for temporary files and goes with the last process that
//! maps it; one that a killed run left is removed by the next.

use super::{
    DataError,
    dataset::Summary,
    spool::{Column, Segment, Spool},
    store::{NO_LABEL, NO_NUMBER, RowHash, RowStore, Words},
};
use crate::regular_file;
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, BufWriter, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

const ARRAYS: [&str; 4] = ["tokens", "labels", "document_lengths", "row_documents"];

/// Before the names of inputs of the loss.
const INPUT: &str = "input.";

/// The field of the file's header that holds the hash and, behind a space, the summary.
const HEADER: &str = "xorl-dist rows";

/// Rows to be written: which samples each has, in order, with the padding behind them.
#[derive(Debug, Default)]
pub(super) struct Plan {
    pub rows: Vec<Vec<usize>>,
    /// Tokens of padding of each row.
    pub padding: Vec<usize>,
    pub pad: u32,
    pub summary: Summary,
}

/// Rows that are ready, with their counts. Dropping it removes a temporary file that no other process maps.
#[derive(Debug)]
pub(super) struct Prepared {
    pub rows: RowStore,
    pub summary: Summary,
    pub digest: [u8; 32],
    temporary: Option<(File, PathBuf)>,
}

impl Drop for Prepared {
    fn drop(&mut self) {
        // Others that map it hold a shared lock.
        if let Some((file, path)) = self.temporary.take()
            && file.try_lock().is_ok()
        {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// The folder for temporary files of this user.
fn temporary_folder() -> PathBuf {
    // SAFETY: getuid takes nothing and cannot fail.
    let user = unsafe { libc::getuid() };
    std::env::temp_dir().join(format!("xorl-dist-{user}"))
}

/// The rows of each of `keys` in `folder`, or of this host's temporary files. `build` makes those of all where one has
/// none; other processes of this host wait for it meanwhile.
pub(super) fn obtain(
    folder: Option<&Path>,
    keys: &[String],
    build: impl FnOnce(&Path) -> Result<(Spool, Vec<Plan>), DataError>,
) -> Result<Vec<Prepared>, DataError> {
    let temporary = temporary_folder();
    let io = |source| DataError::Temporary { path: temporary.clone(), source };
    std::fs::create_dir_all(&temporary).map_err(io)?;
    let names: Vec<String> = keys.iter().map(|key| format!("rows-{key}.safetensors")).collect();
    let lock_path = temporary.join(format!("{}.lock", lock_name(folder, keys)));
    let lock = File::create(&lock_path).map_err(io)?;
    // A file system without locks lets each process build the file for itself.
    let _ = lock.lock();
    let found: Option<Vec<Read>> = names.iter().map(|name| find(name, folder, &temporary)).collect();
    if let Some(found) = found {
        return Ok(found.into_iter().map(|rows| rows.counted(&temporary)).collect());
    }
    sweep(&temporary, &names, &lock_path);
    let usable = folder.filter(|folder| match std::fs::create_dir_all(folder) {
        Ok(()) => true,
        Err(error) => {
            tracing::warn!("{}: could not keep the prepared data: {error}", folder.display());
            false
        }
    });
    let (mut spool, plans) = build(usable.unwrap_or(&temporary))?;
    let all = names.iter().zip(&plans);
    all.map(|(name, plan)| {
        if let Some(path) = usable.map(|folder| folder.join(name)) {
            match write(&path, &mut spool, plan, true) {
                Ok(written) => return reread(written, &path, &temporary),
                Err(error) => {
                    tracing::warn!("{}: could not keep the prepared data: {error}", path.display());
                }
            }
        }
        let path = temporary.join(name);
        let written = write(&path, &mut spool, plan, false).map_err(io)?;
        reread(written, &path, &temporary)
    })
    .collect()
}

/// The rows of a file called `name` in `folder` or among temporary files.
fn find(name: &str, folder: Option<&Path>, temporary: &Path) -> Option<Read> {
    let places = folder.into_iter().chain([temporary]);
    places.map(|folder| folder.join(name)).find_map(|path| {
        read(&path).unwrap_or_else(|reason| {
            tracing::warn!("{}: damaged ({reason}); preparing the data again", path.display());
            None
        })
    })
}

/// The rows that were just written to `file`, which may have lost its name since.
fn reread((file, digest): (File, [u8; 32]), path: &Path, temporary: &Path) -> Result<Prepared, DataError> {
    match read_from(file, path, Some(digest)) {
        Ok(rows) => Ok(rows.counted(temporary)),
        Err(reason) => Err(DataError::Temporary { path: path.into(), source: io::Error::other(reason) }),
    }
}

/// The name of the lock for `keys` in `folder`.
fn lock_name(folder: Option<&Path>, keys: &[String]) -> String {
    let folder = folder.map(|folder| std::path::absolute(folder).unwrap_or_else(|_| folder.into()));
    format!("{:x}", Sha256::new().chain_update(format!("{folder:?} {keys:?}")).finalize())
}

/// Removes temporary files that ended processes left. Those of the last minute may be between their creation and their
/// lock.
fn sweep(folder: &Path, own: &[String], own_lock: &Path) {
    const OLD: Duration = Duration::from_secs(60);
    let age = |file: &File| file.metadata().and_then(|found| found.modified()).map(|time| time.elapsed());
    let is_left = |path: &Path| {
        regular_file::open(path)
            .is_ok_and(|file| matches!(age(&file), Ok(Ok(age)) if age > OLD) && file.try_lock().is_ok())
    };
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        let is_named = |name: &String| path.file_name().is_some_and(|file| file == name.as_str());
        let is_ours = path == own_lock || own.iter().any(is_named);
        if !is_ours && is_left(&path) {
            let _ = std::fs::remove_file(&path);
        }
    }
}

/// A file that was read, and its path.
struct Read {
    prepared: Prepared,
    file: File,
    path: PathBuf,
}

impl Read {
    /// The rows, which count as used as long as they live where their file is temporary.
    fn counted(self, temporary: &Path) -> Prepared {
        let Self { mut prepared, file, path } = self;
        if path.starts_with(temporary) && file.lock_shared().is_ok() {
            prepared.temporary = Some((file, path));
        }
        prepared
    }
}

/// The rows at `path`, as [`read`] gives them.
pub(super) fn at(path: &Path) -> Result<Option<Prepared>, String> {
    Ok(read(path)?.map(|read| read.prepared))
}

/// Rows that were prepared before: `Ok(None)` if there are none, `Err` with the reason if they are damaged.
fn read(path: &Path) -> Result<Option<Read>, String> {
    match regular_file::open(path) {
        Ok(file) => read_from(file, path, None).map(Some),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error.to_string()),
    }
}

/// The rows of a file. Those of a known digest are not hashed again.
fn read_from(file: File, path: &Path, known: Option<[u8; 32]>) -> Result<Read, String> {
    // SAFETY: a file of rows is written under another name, then renamed, and never changed after that.
    let map = unsafe { Mmap::map(&file) }.map_err(|error| error.to_string())?;
    let map = Arc::new(map);
    let tensors = SafeTensors::deserialize(&map).map_err(|error| error.to_string())?;
    let (_, header) = SafeTensors::read_metadata(&map).map_err(|error| error.to_string())?;
    let stated =
        header.metadata().as_ref().and_then(|fields| fields.get(HEADER)).ok_or("its header says nothing")?;
    let (stated, counts) = stated.split_once(' ').ok_or("its header is cut")?;

    let array = |name: &str| {
        let view = tensors.tensor(name).map_err(|error| error.to_string())?;
        if view.dtype() != Dtype::U32 || view.shape().len() != 1 {
            return Err(format!("{name} is not a list of u32"));
        }
        let start = view.data().as_ptr() as usize - map.as_ptr() as usize;
        let words = Words::new(&map, start..start + view.data().len());
        words.ok_or_else(|| format!("{name} does not lie at a multiple of 4 bytes"))
    };
    let [tokens, labels, lengths, documents] = ARRAYS.map(array);
    let inputs = tensors.names().into_iter().filter_map(|name| {
        let input = name.strip_prefix(INPUT)?.to_owned();
        Some(array(name).map(|bits| (input, bits)))
    });
    let inputs = inputs.collect::<Result<BTreeMap<_, _>, String>>()?;
    let rows = RowStore::new([tokens?, labels?, lengths?, documents?], inputs);
    let rows = rows.ok_or("its arrays do not fit together")?;
    let digest = known.unwrap_or_else(|| rows.digest());
    if hash(digest, counts) != stated {
        return Err("its rows do not have the hash that it states".into());
    }
    let summary = serde_json::from_str(counts).map_err(|error| format!("summary: {error}"))?;
    let prepared = Prepared { rows, summary, digest, temporary: None };
    Ok(Read { prepared, file, path: path.into() })
}

/// Writes rows so that a reader sees all of them or nothing, also when other hosts write the same file. Returns the
/// open file and their digest.
fn write(path: &Path, spool: &mut Spool, plan: &Plan, is_kept: bool) -> io::Result<(File, [u8; 32])> {
    let folder = path.parent().unwrap_or(Path::new("."));
    // Process ids repeat over nodes that share the folder, the clock's nanoseconds hardly do.
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let unfinished = folder.join(format!(".rows-{}-{}.tmp", std::process::id(), now.as_nanos()));
    let mut publish = || {
        let mut file = File::options().read(true).write(true).create_new(true).open(&unfinished)?;
        // Keeps it from being swept away.
        let _ = file.try_lock();
        let digest = write_to(&mut file, spool, plan)?;
        if is_kept {
            file.sync_all()?;
        }
        std::fs::rename(&unfinished, path)?;
        if is_kept {
            File::open(folder)?.sync_all()?;
        }
        Ok((file, digest))
    };
    publish().inspect_err(|_: &io::Error| {
        let _ = std::fs::remove_file(&unfinished);
    })
}

/// Arrays that are written one after the other, and their hash.
struct Arrays<'a> {
    file: BufWriter<&'a mut File>,
    hash: RowHash,
}

impl Arrays<'_> {
    fn add(&mut self, words: &[u32]) -> io::Result<()> {
        self.hash.add(words);
        self.file.write_all(bytemuck::cast_slice(words))
    }

    /// Adds an array of parts of `column`; inputs have a name.
    fn copy(&mut self, name: Option<&str>, column: &mut Column, segments: &[Segment]) -> io::Result<()> {
        self.hash.begin(name, words_of(segments));
        column.copy(segments, &mut |words| self.add(words))
    }
}

fn words_of(segments: &[Segment]) -> usize {
    segments.iter().map(Segment::words).sum()
}

fn write_to(file: &mut File, spool: &mut Spool, plan: &Plan) -> io::Result<[u8; 32]> {
    let (tokens, labels) = (plan.segments(spool, plan.pad), plan.segments(spool, NO_LABEL));
    let (documents, row_documents) = (plan.document_lengths(spool), plan.row_documents(spool));
    let inputs: Vec<(&'static str, Vec<Segment>)> =
        spool.inputs.iter().map(|(name, column)| (*name, plan.input_segments(spool, column))).collect();

    let lengths = [words_of(&tokens), words_of(&labels), documents.len(), row_documents.len()];
    let mut sizes: Vec<(String, usize)> = ARRAYS.map(str::to_owned).into_iter().zip(lengths).collect();
    sizes.extend(inputs.iter().map(|(name, segments)| (format!("{INPUT}{name}"), words_of(segments))));
    let summary = serde_json::to_string(&plan.summary)?;
    // The hash is known at the end; its place in the header is kept free.
    let blank = header(&"0".repeat(64), &summary, &sizes);

    let mut arrays = Arrays { file: BufWriter::with_capacity(1 << 20, file), hash: RowHash::default() };
    arrays.file.write_all(&blank)?;
    arrays.copy(None, &mut spool.tokens, &tokens)?;
    arrays.copy(None, &mut spool.labels, &labels)?;
    for array in [&documents, &row_documents] {
        arrays.hash.begin(None, array.len());
        arrays.add(array)?;
    }
    for (name, segments) in &inputs {
        if let Some(column) = spool.inputs.get_mut(name) {
            arrays.copy(Some(name), column, segments)?;
        }
    }
    let Arrays { mut file, hash: rows } = arrays;
    let digest = rows.finish();
    file.seek(SeekFrom::Start(0))?;
    file.write_all(&header(&hash(digest, &summary), &summary, &sizes))?;
    file.flush()?;
    Ok(digest)
}

/// The start of a file of safetensors with arrays of u32 of these names and words.
fn header(hash: &str, summary: &str, sizes: &[(String, usize)]) -> Vec<u8> {
    let mut fields = Map::new();
    fields.insert("__metadata__".into(), json!({ HEADER: format!("{hash} {summary}") }));
    let mut at = 0;
    for (name, words) in sizes {
        let end = at + 4 * words;
        fields.insert(name.clone(), json!({"dtype": "U32", "shape": [words], "data_offsets": [at, end]}));
        at = end;
    }
    let mut text = Value::Object(fields).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    [&(text.len() as u64).to_le_bytes()[..], &text].concat()
}

impl Plan {
    /// The parts of tokens or labels that make the rows, `fill` for padding.
    fn segments(&self, spool: &Spool, fill: u32) -> Vec<Segment> {
        let mut segments = Vec::with_capacity(spool.samples() + self.rows.len());
        for (samples, &words) in self.rows.iter().zip(&self.padding) {
            segments.extend(samples.iter().map(|&sample| {
                let (start, words) = spool.tokens_of(sample);
                Segment::Copy { start, words }
            }));
            segments.extend((words > 0).then_some(Segment::Fill { word: fill, words }));
        }
        segments
    }

    fn document_lengths(&self, spool: &Spool) -> Vec<u32> {
        let mut lengths = Vec::new();
        for (samples, &padding) in self.rows.iter().zip(&self.padding) {
            samples.iter().for_each(|&sample| lengths.extend_from_slice(spool.documents_of(sample)));
            lengths.extend((padding > 0).then_some(padding as u32));
        }
        lengths
    }

    fn row_documents(&self, spool: &Spool) -> Vec<u32> {
        let of_row = |(samples, &padding): (&Vec<usize>, &usize)| {
            let documents: usize = samples.iter().map(|&sample| spool.documents_of(sample).len()).sum();
            (documents + usize::from(padding > 0)) as u32
        };
        self.rows.iter().zip(&self.padding).map(of_row).collect()
    }

    /// The parts of an input that make the rows, up to the last token that has it. Padding behind one has zeros, for no
    /// loss reads them.
    fn input_segments(&self, spool: &Spool, column: &Column) -> Vec<Segment> {
        let (mut segments, mut token, mut written) = (Vec::new(), 0, 0);
        let mut add = |token: usize, segment: Segment| {
            if token > written {
                segments.push(Segment::Fill { word: NO_NUMBER, words: token - written });
            }
            written = token + segment.words();
            segments.push(segment);
        };
        let mut has_begun = false;
        for (samples, &padding) in self.rows.iter().zip(&self.padding) {
            for &sample in samples {
                let (start, length) = spool.tokens_of(sample);
                let words = (start + length).min(column.len()).saturating_sub(start);
                if words > 0 {
                    has_begun = true;
                    add(token, Segment::Copy { start, words });
                }
                token += length;
            }
            if padding > 0 && has_begun {
                add(token, Segment::Fill { word: 0, words: padding });
            }
            token += padding;
        }
        segments
    }
}

/// SHA-256 over the rows and the text of their summary.
fn hash(digest: [u8; 32], counts: &str) -> String {
    format!("{:x}", Sha256::new().chain_update(digest).chain_update(counts).finalize())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{Row, tokenized::Sample};
    use tempfile::TempDir;

    fn sample(tokens: &[u32], inputs: &[(&'static str, &[f32])]) -> Sample {
        let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect();
        let inputs = inputs.iter().map(|(name, values)| (*name, bits(values))).collect();
        Sample { inputs, ..Sample::whole(tokens.to_vec(), tokens.iter().map(|&id| i64::from(id)).collect()) }
    }

    fn prepared(samples: &[Sample], rows: &[&[usize]], padding: &[usize]) -> Prepared {
        let folder = TempDir::new().unwrap();
        let mut spool = Spool::new(folder.path()).unwrap();
        samples.iter().for_each(|sample| spool.push(sample, 0).unwrap());
        let rows = rows.iter().map(|row| row.to_vec()).collect();
        let plan = Plan { rows, padding: padding.to_vec(), pad: 9, summary: Summary::default() };
        let path = folder.path().join("rows");
        let (_, digest) = write(&path, &mut spool, &plan, true).unwrap();
        let read = read(&path).unwrap().unwrap().prepared;
        assert_eq!(read.digest, digest);
        read
    }

    #[test]
    fn rows_come_back_as_they_went_in() {
        let first = Sample { labels: vec![-100, 2, 3], ..sample(&[1, 2, 3], &[]) };
        let two = Sample { documents: vec![1, 1], ..sample(&[4, 5], &[]) };
        let stored = prepared(&[first, two, sample(&[6], &[])], &[&[2, 0], &[1]], &[2, 0]);
        let stored = &stored.rows;
        let row = |ids: &[i64], labels: &[i64], lengths: &[usize]| Row {
            input_ids: ids.to_vec(),
            labels: labels.to_vec(),
            document_lengths: lengths.to_vec(),
            ..Row::default()
        };
        let expected = row(&[6, 1, 2, 3, 9, 9], &[6, -100, 2, 3, -100, -100], &[1, 3, 2]);
        assert_eq!(stored.row(0), Some(expected));
        assert_eq!(stored.row(1), Some(row(&[4, 5], &[4, 5], &[1, 1])));
        assert_eq!((stored.row(2), stored.rows()), (None, 2));
    }

    #[test]
    fn inputs_stay_with_their_tokens_in_any_order_of_rows() {
        let samples = [
            sample(&[1, 2], &[]),
            sample(&[3, 4], &[("a", &[0.5, 1.5])]),
            sample(&[5], &[("a", &[2.5]), ("b", &[3.5])]),
            sample(&[6], &[]),
        ];
        let stored = prepared(&samples, &[&[2, 3, 1], &[0]], &[1, 0]);
        let rows = &stored.rows;
        let row = rows.row(0).unwrap();
        let bits = |name: &str| row.inputs[name].iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        let expected = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits("a"), expected(&[2.5, f32::NAN, 0.5, 1.5, 0.0]));
        assert_eq!(bits("b"), expected(&[3.5, f32::NAN, f32::NAN, f32::NAN, 0.0]));
        assert!(rows.row(1).unwrap().inputs.is_empty());
    }

    #[test]
    fn the_digest_is_frozen() {
        // Steps of earlier builds resume on rows of the same digest; computed in Python.
        let rows = prepared(&[sample(&[1, 2], &[("a", &[0.5, 1.5])]), sample(&[3], &[])], &[&[0, 1]], &[1]);
        let hex: String = rows.digest.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, "b48afd1bff2470e095a2a9793bf262451b66acd5e6f15e074a501b620d406b54");
    }
}
