//! Steps of a run directory (`{output_dir}/weights/{run_id}`): lists them, finds the newest whole one, removes old
//! ones. The caller is the only writer of the directory.

use super::{
    CheckpointError,
    adapter_config::{AdapterConfig, CONFIG_FILE, read_config},
    base, io,
    publish::{sync, verify, withdraw},
    state::{check_place, progress_of},
};
use crate::{
    hub::{self, HubId},
    regular_file,
};
use fail::fail_point;
use std::{
    fs,
    path::{Path, PathBuf},
};

const LATEST: &str = "latest";
/// The text file that names the step with the best evaluation.
const BEST: &str = "best";
/// The folder of the runs in an output directory.
pub const WEIGHTS: &str = "weights";

/// The directory of step `step` of `run`.
pub fn directory(run: &Path, step: usize) -> PathBuf {
    run.join(format!("step_{step}"))
}

/// The number of the step that a directory is named after.
pub fn number(directory: &Path) -> Option<usize> {
    let name = directory.file_name()?.to_str()?;
    let number = name.strip_prefix("step_")?.parse().ok()?;
    // `step_007` and `step_+7` parse, but no step has such a name.
    (name == format!("step_{number}")).then_some(number)
}

/// The numbers of the steps in `run`, ascending. They may be damaged: see [`verify`].
pub fn published(run: &Path) -> Vec<usize> {
    let entries = fs::read_dir(run).into_iter().flatten().flatten();
    let mut steps: Vec<usize> = entries.filter_map(|entry| number(&entry.path())).collect();
    steps.sort_unstable();
    steps
}

/// Checks that `step` is whole, and the step that its folder's name says.
///
/// # Errors
/// As [`verify`], or a state of another step.
pub fn whole(step: &Path) -> Result<(), CheckpointError> {
    verify(step)?;
    progress_of(step).map_or(Ok(()), |(made, _)| check_place(step, made))
}

/// The newest whole step of `run`, if any, and the errors of the newer ones that are not.
pub fn newest_whole(run: &Path) -> (Option<PathBuf>, Vec<CheckpointError>) {
    let mut skipped = Vec::new();
    for step in published(run).into_iter().rev() {
        let path = directory(run, step);
        match whole(&path) {
            Ok(()) => return (Some(path), skipped),
            Err(error) => skipped.push(error),
        }
    }
    (None, skipped)
}

/// The steps to remove so that the `limit` newest up to `newest` stay. `newest` has just been published, and stays; so
/// do `others`: the step that the run resumed from, and the best. Steps beyond `newest` are damaged ones from before a
/// resume: they neither count nor go, and are replaced when the run reaches them.
pub fn surplus(steps: &[usize], limit: usize, newest: usize, others: &[usize]) -> Vec<usize> {
    let mut own: Vec<usize> = steps.iter().copied().filter(|&step| step <= newest).collect();
    own.sort_unstable_by(|a, b| b.cmp(a));
    let rest = own.into_iter().skip(limit.max(1));
    rest.filter(|step| *step != newest && !others.contains(step)).collect()
}

/// Removes all steps later than `after`, or all steps if that is `None`.
pub fn withdraw_later(run: &Path, after: Option<usize>) -> Result<(), CheckpointError> {
    let later: Vec<usize> =
        published(run).into_iter().filter(|&step| after.is_none_or(|after| step > after)).collect();
    if later.is_empty() {
        return Ok(());
    }
    // `latest` and `best` change before the steps go, so they never name a removed one.
    if named(run, BEST).and_then(|path| number(&path)).is_some_and(|best| later.contains(&best)) {
        set_best(run, None)?;
    }
    match after.filter(|&step| directory(run, step).is_dir()) {
        Some(step) => set_latest(run, step)?,
        None => remove(&run.join(LATEST))?,
    }
    later.into_iter().rev().try_for_each(|step| withdraw(&directory(run, step)))
}

/// Replaces the text file that names the newest step.
pub(super) fn set_latest(run: &Path, step: usize) -> Result<(), CheckpointError> {
    name(run, LATEST, step)
}

/// Has `best` of `run` name the step with the best evaluation; `None`: there is none, and no such file. Writes nothing
/// where that is so already.
pub fn set_best(run: &Path, step: Option<usize>) -> Result<(), CheckpointError> {
    match step {
        None => remove(&run.join(BEST)),
        Some(step) if named(run, BEST) == Some(directory(run, step)) => Ok(()),
        Some(step) => name(run, BEST, step),
    }
}

/// The step of `run` with the best evaluation, if there is one.
pub fn best(run: &Path) -> Option<PathBuf> {
    named(run, BEST).filter(|step| step.is_dir())
}

/// Replaces the text file `file` of `run`, which names a step.
fn name(run: &Path, file: &str, step: usize) -> Result<(), CheckpointError> {
    let (path, hidden) = (run.join(file), run.join(format!(".{file}.tmp")));
    fs::write(&hidden, format!("step_{step}\n")).map_err(io(&hidden))?;
    fail_point!("name.written");
    sync(&hidden)?;
    fail_point!("name.synced");
    fs::rename(&hidden, &path).map_err(io(&path))?;
    fail_point!("name.renamed");
    sync(run)?;
    fail_point!("name.run_synced");
    Ok(())
}

/// The step that the text file `file` of `run` names.
fn named(run: &Path, file: &str) -> Option<PathBuf> {
    let step = regular_file::read_to_string(&run.join(file)).ok().map(|name| run.join(name.trim()));
    step.filter(|step| number(step).is_some())
}

fn remove(file: &Path) -> Result<(), CheckpointError> {
    if file.exists() { fs::remove_file(file).map_err(io(file)) } else { Ok(()) }
}

/// [`adapter_folder`]; the log tells a step that `path` does not name itself.
///
/// # Errors
/// As there.
pub fn adapter_at(path: &Path) -> Result<PathBuf, String> {
    let step = adapter_folder(path)?;
    let best = step.parent().and_then(best).filter(|best| *best != step);
    match best.as_deref().and_then(Path::file_name) {
        _ if step == path => {}
        None => tracing::info!("{}: {} is taken", path.display(), step.display()),
        Some(best) => tracing::info!(
            "{}: {} is taken, the newest; {} was better when the run evaluated: name {} for it",
            path.display(),
            step.display(),
            best.display(),
            step.with_file_name(BEST).display(),
        ),
    }
    Ok(step)
}

/// The adapter directory that `path` stands for: itself, the newest step of a run directory (or of its `latest`), its
/// best step behind `best`, or the newest or best step of the only run of an output directory.
///
/// # Errors
/// A line that names `path`, and says what would be right.
pub fn adapter_folder(path: &Path) -> Result<PathBuf, String> {
    let fault = |words: String| Err(format!("{}: {words}", path.display()));
    if path.join(CONFIG_FILE).is_file() {
        return Ok(path.to_owned());
    }
    if let (true, Some(run)) = (path.is_file() && path.ends_with(BEST), path.parent()) {
        return best(run)
            .map_or_else(|| fault("the step that it names is gone; name another, or the run".into()), Ok);
    }
    // OUTPUT_DIR/best: of its run.
    if let (true, Some(output)) = (!path.exists() && path.ends_with(BEST), path.parent())
        && let [run] = &runs_of(output)[..]
    {
        return best(run).map_or_else(|| fault(format!("{} has no best step", run.display())), Ok);
    }
    let run = match path.file_name() {
        Some(name) if name == LATEST => path.parent().unwrap_or(path),
        _ => path,
    };
    if let Some(step) = newest(run) {
        return Ok(step);
    }
    match &runs_of(path)[..] {
        [run] => newest(run).map_or_else(|| fault("it has just lost its steps".into()), Ok),
        [] if !path.exists() => {
            fault("no such folder; expected a PEFT adapter directory, or that of a run".into())
        }
        [] if path.is_file() => {
            fault("a file, where a PEFT adapter directory or that of a run belongs".into())
        }
        [] => fault(format!("expected a PEFT adapter ({CONFIG_FILE}) or the steps of a run, found neither")),
        several => {
            let names: Vec<String> = several.iter().map(|run| run.display().to_string()).collect();
            fault(format!("several runs are in it; name one of {}", names.join(", ")))
        }
    }
}

/// The runs with steps of an output directory, by name.
fn runs_of(output: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(output.join(WEIGHTS)).into_iter().flatten().flatten();
    let mut runs: Vec<PathBuf> =
        entries.map(|entry| entry.path()).filter(|run| newest(run).is_some()).collect();
    runs.sort();
    runs
}

/// The base of the adapter in `adapter`: the `model/` of a step that has one, else the folder that its configuration
/// names.
///
/// # Errors
/// A line that names the field, and says what would be right.
pub fn base_of(adapter: &Path) -> Result<PathBuf, String> {
    let own = adapter.join(base::FOLDER);
    if own.join(base::CONFIG).is_file() {
        return Ok(own);
    }
    let place = format!("{}: base_model_name_or_path", adapter.join(CONFIG_FILE).display());
    let config = read_config(adapter).map_err(|error| error.to_string())?;
    if let Some(id) = id_of(&config) {
        return hub::cached(&id, true)
            .map_err(|error| format!("{place} is {id}: {error}; or give --model DIR"));
    }
    let base = config.base_model_name_or_path.map(PathBuf::from);
    let base = base.ok_or_else(|| format!("{place} names no model; give --model DIR"))?;
    if base.is_dir() {
        return Ok(base);
    }
    Err(format!("{place} is {}, which is no folder here; give --model DIR", base.display()))
}

/// The id of the base of the adapter in `adapter`, if it is a model of the hub.
pub fn base_id(adapter: &Path) -> Option<HubId> {
    let own = adapter.join(base::FOLDER).join(base::CONFIG);
    if own.is_file() { None } else { id_of(&read_config(adapter).ok()?) }
}

fn id_of(config: &AdapterConfig) -> Option<HubId> {
    let id = HubId::of_path(Path::new(config.base_model_name_or_path.as_deref()?))?;
    Some(match &config.revision {
        Some(revision) => id.at(revision),
        None => id,
    })
}

/// The step that `latest` of `run` names, else its newest.
fn newest(run: &Path) -> Option<PathBuf> {
    let named = named(run, LATEST).filter(|step| step.is_dir());
    named.or_else(|| published(run).last().map(|&step| directory(run, step)))
}

#[cfg(test)]
mod tests {
    use super::super::{FolderWriter, publish::KnownHashes, state::STATE_FILE};
    use super::*;
    use proptest::prelude::*;

    fn run_of(steps: &[usize]) -> tempfile::TempDir {
        let run = tempfile::tempdir().unwrap();
        for &step in steps {
            let writer = FolderWriter::of_step(run.path(), step).unwrap();
            fs::write(writer.directory().join("file"), step.to_string()).unwrap();
            writer.publish(&mut KnownHashes::default()).unwrap();
        }
        run
    }

    fn latest(run: &Path) -> Option<String> {
        fs::read_to_string(run.join(LATEST)).ok()
    }

    #[test]
    fn an_adapter_is_named_by_its_step_its_run_or_its_output_directory() {
        let output = tempfile::tempdir().unwrap();
        let run = output.path().join("weights/run");
        for step in ["step_2", "step_10"] {
            fs::create_dir_all(run.join(step)).unwrap();
            fs::write(run.join(step).join(CONFIG_FILE), "{}").unwrap();
        }
        let at = |path: &Path| adapter_at(path);
        for path in [&run, &run.join("latest"), &output.path().to_owned(), &run.join("step_10")] {
            assert_eq!(at(path), Ok(run.join("step_10")), "{path:?}");
        }
        set_latest(&run, 2).unwrap();
        for path in [&run, &run.join("latest"), &output.path().to_owned()] {
            assert_eq!(at(path), Ok(run.join("step_2")), "{path:?}");
        }
        set_best(&run, Some(10)).unwrap();
        assert_eq!((at(&run.join("best")), best(&run)), (Ok(run.join("step_10")), Some(run.join("step_10"))));
        assert_eq!(at(&run), Ok(run.join("step_2")), "the newest");
        set_best(&run, Some(7)).unwrap();
        assert!(at(&run.join("best")).unwrap_err().contains("is gone") && best(&run).is_none());
        set_best(&run, None).unwrap();
        assert!(at(&run.join("best")).unwrap_err().contains("no such folder"));
        fs::create_dir_all(output.path().join("weights/other/step_1")).unwrap();
        let error = at(output.path()).unwrap_err();
        assert!(error.contains("several runs") && error.contains("weights/other"), "{error}");
        for (path, words) in [
            ("nowhere", "no such folder"),
            ("weights/run/latest/x", "no such folder"),
            ("weights", "found neither"),
        ] {
            let error = at(&output.path().join(path)).unwrap_err();
            assert!(error.contains(words), "{error}");
        }
    }

    #[test]
    fn steps_are_found_by_number_and_nothing_else_is_one() {
        let run = run_of(&[2, 10, 9]);
        for name in ["step_07", "step_", "step_x", ".tmp-step_11-5", "step_-1", "model"] {
            fs::create_dir(run.path().join(name)).unwrap();
        }
        assert_eq!(published(run.path()), [2, 9, 10]);
        assert!(published(&run.path().join("nowhere")).is_empty());
    }

    #[test]
    fn the_newest_whole_step_is_found_behind_damaged_ones() {
        let run = run_of(&[5, 10, 15, 20]);
        fs::write(run.path().join("step_20/file"), "20!").unwrap();
        fs::remove_file(run.path().join("step_15/manifest.json")).unwrap();
        let (found, skipped) = newest_whole(run.path());
        assert_eq!(found.unwrap(), run.path().join("step_10"));
        let said: Vec<String> = skipped.iter().map(ToString::to_string).collect();
        assert!(said[0].contains("step_20") && said[0].contains("file has 3 bytes, 2 were"), "{said:?}");
        assert!(said[1].contains("step_15") && said[1].contains("manifest.json"), "{said:?}");
        let none = tempfile::tempdir().unwrap();
        assert!(newest_whole(none.path()).0.is_none());
    }

    #[test]
    fn best_of_an_output_directory_is_that_of_its_run() {
        let output = tempfile::tempdir().unwrap();
        let run = output.path().join("weights/run");
        fs::create_dir_all(&run).unwrap();
        for step in [5, 10] {
            FolderWriter::of_step(&run, step).unwrap().publish(&mut KnownHashes::default()).unwrap();
        }
        let error = adapter_folder(&output.path().join("best")).unwrap_err();
        assert!(error.contains("has no best step"), "{error}");
        set_best(&run, Some(5)).unwrap();
        assert_eq!(adapter_folder(&output.path().join("best")), Ok(run.join("step_5")));
        assert_eq!(adapter_folder(output.path()), Ok(run.join("step_10")));
    }

    #[test]
    fn a_step_under_the_name_of_another_is_not_taken() {
        let run = run_of(&[5]);
        let writer = FolderWriter::of_step(run.path(), 10).unwrap();
        let state = writer.directory().join(STATE_FILE);
        fs::create_dir(state.parent().unwrap()).unwrap();
        fs::write(state, "{\"step\": 5, \"total_steps\": 20}").unwrap();
        writer.publish(&mut KnownHashes::default()).unwrap();
        let (found, skipped) = newest_whole(run.path());
        assert_eq!(found.unwrap(), run.path().join("step_5"));
        assert!(skipped[0].to_string().contains("it is the state of step 5"), "{skipped:?}");
    }

    #[test]
    fn surplus_steps_by_case() {
        let steps = [5, 10, 15, 20];
        for (limit, newest, others, gone) in [
            (2, 20, &[][..], vec![10, 5]),
            (1, 20, &[], vec![15, 10, 5]),
            (9, 20, &[], vec![]),
            (2, 20, &[5], vec![10]),
            (2, 20, &[20], vec![10, 5]),
            (1, 20, &[10, 5], vec![15]),
            // 20 is a damaged one from before a resume: neither counted nor touched.
            (1, 15, &[10], vec![5]),
            (2, 10, &[], vec![]),
        ] {
            assert_eq!(surplus(&steps, limit, newest, others), gone, "{limit} {newest} {others:?}");
        }
    }

    #[test]
    fn later_steps_go_and_latest_never_names_one_that_is_gone() {
        let run = run_of(&[5, 10, 15]);
        set_best(run.path(), Some(15)).unwrap();
        withdraw_later(run.path(), Some(10)).unwrap();
        assert_eq!((published(run.path()), latest(run.path())), (vec![5, 10], Some("step_10\n".into())));
        assert_eq!(best(run.path()), None);
        set_best(run.path(), Some(5)).unwrap();
        withdraw_later(run.path(), Some(10)).unwrap();
        assert_eq!(best(run.path()), Some(directory(run.path(), 5)));
        withdraw_later(run.path(), None).unwrap();
        assert_eq!((published(run.path()), latest(run.path())), (vec![], None));
        assert_eq!(fs::read_dir(run.path()).unwrap().count(), 0, "nothing hidden is left");
    }

    proptest! {
        #[test]
        fn the_newest_and_the_resumed_step_stay(
            steps in prop::collection::btree_set(0usize..30, 1..12), limit in 1usize..6,
            newest in any::<prop::sample::Index>(), resumed in any::<prop::sample::Index>(),
            best in any::<prop::sample::Index>(),
        ) {
            let steps: Vec<usize> = steps.into_iter().collect();
            let [newest, resumed, best] = [newest, resumed, best].map(|index| *index.get(&steps));
            let gone = surplus(&steps, limit, newest, &[resumed, best]);
            prop_assert!([newest, resumed, best].iter().all(|step| !gone.contains(step)));
            let own = steps.iter().filter(|&&step| step <= newest).count();
            let left = own - gone.len();
            prop_assert!(left >= limit.min(own) && left <= limit + 2);
            prop_assert!(gone.iter().all(|step| *step < newest));
        }
    }
}
