//! `model/` of a step: the base in HF layout, for `save_lora_only: false` and after merges. Existing files are
//! hard-linked, which takes no time and no space, or copied where links are not possible. Random weights are written
//! out, and so are merged ones.

use super::{
    CheckpointError, config_json, io,
    model_files::{INDEX, ModelFiles, fault},
};
use crate::{
    config::BaseFiles,
    weights::{WeightSource, weight_files},
};
use fail::fail_point;
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

/// The folder in a step.
pub const FOLDER: &str = "model";
pub(super) const CONFIG: &str = "config.json";
/// Small files that belong to an HF model: configs, tokenizer, chat template.
const SIDE_FILES: &[&str] = &["json", "txt", "model", "jinja"];

impl BaseFiles {
    /// Name and present path of every file but the weights that exists.
    pub fn side_files(&self) -> BTreeMap<String, PathBuf> {
        let config = if self.config.is_dir() { self.config.join(CONFIG) } else { self.config.clone() };
        let mut files = BTreeMap::new();
        // A config that is named as a file may lie beside files of other models.
        let folders = [Some(&self.config), self.weights.as_ref(), Some(&self.tokenizer)];
        for folder in folders.into_iter().flatten() {
            for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
                let path = entry.path();
                let kind = path.extension().and_then(|extension| extension.to_str());
                let name = entry.file_name().to_string_lossy().into_owned();
                let ours = kind.is_some_and(|kind| SIDE_FILES.contains(&kind)) && !is_of_others(&name);
                if ours && path.is_file() {
                    files.insert(name, path);
                }
            }
        }
        files.insert(CONFIG.into(), config);
        files
    }

    /// Name in `model/` and present path of every file that exists.
    fn list(&self) -> Result<BTreeMap<String, PathBuf>, CheckpointError> {
        let mut files = self.side_files();
        if let Some(directory) = &self.weights {
            let weights = weight_files(directory).map_err(fault)?;
            files.extend(weights.index.map(|index| (INDEX.into(), index)));
            files.extend(weights.files.into_iter().filter_map(|path| {
                let name = path.file_name()?.to_string_lossy().into_owned();
                Some((name, path))
            }));
        }
        Ok(files)
    }

    /// Puts the base into the step directory `step`. Links the files of `earlier`, the `model/` of an earlier step of
    /// this base, where they still exist.
    pub fn write(
        &self,
        step: &Path,
        earlier: Option<&Path>,
        source: &dyn WeightSource,
    ) -> Result<(), CheckpointError> {
        let folder = step.join(FOLDER);
        fs::create_dir(&folder).map_err(io(&folder))?;
        if let Some(earlier) = earlier.filter(|earlier| earlier.is_dir()) {
            for entry in fs::read_dir(earlier).map_err(io(earlier))? {
                let entry = entry.map_err(io(earlier))?;
                link_or_copy(&entry.path(), &folder.join(entry.file_name()))?;
            }
            return Ok(());
        }
        for (name, path) in self.list()? {
            link_or_copy(&path, &folder.join(name))?;
        }
        if self.weights.is_none() {
            write_weights(&folder, source)?;
        }
        Ok(())
    }
}

impl BaseFiles {
    /// Puts the base into the step directory `step` with weight files as `files` plans them, in which ranks then write
    /// the values.
    pub fn write_around(&self, step: &Path, files: &ModelFiles) -> Result<(), CheckpointError> {
        let folder = step.join(FOLDER);
        fs::create_dir(&folder).map_err(io(&folder))?;
        config_json::put_beside(self.side_files(), &folder, files, None, link_or_copy)?;
        files.create(&folder)
    }
}

/// Names of files in model directories that describe other weights than these.
fn is_of_others(name: &str) -> bool {
    name.ends_with(".index.json") || name.starts_with("adapter_") || name == super::publish::MANIFEST
}

fn link_or_copy(from: &Path, to: &Path) -> Result<(), CheckpointError> {
    // The target of a link in HF's cache, as the link is relative.
    let real = from.canonicalize().map_err(io(from))?;
    if fs::hard_link(&real, to).is_ok() {
        fail_point!("base.linked");
        return Ok(());
    }
    fs::copy(&real, to).map(|_| ()).map_err(io(to))
}

/// Writes all tensors of `source` in their own dtype into one file in `folder`.
fn write_weights(folder: &Path, source: &dyn WeightSource) -> Result<(), CheckpointError> {
    let tensors = source.names().into_iter().filter_map(|name| Some((source.meta(&name)?, name)));
    let files = ModelFiles::new(tensors.map(|(meta, name)| (name, meta)), u64::MAX);
    files.create(folder)?;
    let writer = files.open(folder)?;
    files.tensors().try_for_each(|(name, _)| writer.copy_whole(source, name))
}

#[cfg(test)]
mod tests {
    use super::{super::model_files::CHUNK, *};
    use crate::{
        dtype::DType,
        weights::{RandomSource, SafetensorsSource, digest},
    };
    use std::os::unix::fs::{MetadataExt, symlink};

    fn random() -> RandomSource {
        let tensors = [("embed", vec![7, 3]), ("norm", vec![3]), ("large", vec![3, CHUNK / 2])];
        RandomSource::new(tensors.map(|(name, shape)| (name.to_owned(), shape)).to_vec(), 0.02, 5)
    }

    fn links(path: &Path) -> u64 {
        fs::metadata(path).unwrap().nlink()
    }

    #[test]
    fn random_weights_are_written_once_and_then_linked() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(CONFIG), "{}").unwrap();
        let base = BaseFiles {
            weights: None,
            config: folder.path().join(CONFIG),
            tokenizer: folder.path().join("nowhere"),
        };
        let [first, second] = ["1", "2"].map(|name| folder.path().join(name));
        fs::create_dir(&first).unwrap();
        fs::create_dir(&second).unwrap();
        base.write(&first, None, &random()).unwrap();
        let back = SafetensorsSource::open(&first.join(FOLDER)).unwrap();
        assert_eq!(digest(&back).unwrap(), digest(&random()).unwrap());
        let read = |source: &dyn WeightSource| {
            let mut out = vec![0f32; CHUNK + CHUNK / 2];
            source.read("large", 0..out.len(), DType::F32, bytemuck::cast_slice_mut(&mut out)).unwrap();
            out
        };
        assert!(read(&back) == read(&random()), "more than one chunk");
        base.write(&second, Some(&first.join(FOLDER)), &random()).unwrap();
        assert_eq!(links(&second.join("model/model.safetensors")), 2);
        assert_eq!(fs::read_to_string(second.join("model/config.json")).unwrap(), "{}");
    }

    #[test]
    fn what_belongs_to_the_base_is_linked_through_symbolic_links_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let (blobs, model) = (folder.path().join("blobs"), folder.path().join("hf"));
        for folder in [&blobs, &model] {
            fs::create_dir(folder).unwrap();
        }
        let names =
            ["config.json", "tokenizer.json", "merges.txt", "model.safetensors", "README.md", "x.bin"];
        for name in names.iter().chain(&["adapter_config.json", "manifest.json", "old.safetensors"]) {
            fs::write(blobs.join(name), name).unwrap();
            symlink(format!("../blobs/{name}"), model.join(name)).unwrap();
        }
        let base =
            BaseFiles { weights: Some(model.clone()), config: model.clone(), tokenizer: model.clone() };
        base.write(folder.path(), None, &random()).unwrap();
        let entries = fs::read_dir(folder.path().join(FOLDER)).unwrap();
        let mut found: Vec<String> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        found.sort();
        assert_eq!(found, ["config.json", "merges.txt", "model.safetensors", "tokenizer.json"]);
        for name in found {
            assert_eq!(fs::read_to_string(folder.path().join(FOLDER).join(&name)).unwrap(), name);
            assert_eq!(links(&blobs.join(&name)), 2, "{name} is linked, not copied");
        }
    }
}
