//! Paths of checkpoints as clients write them, turned into folders of the tenant. Nothing here trusts its input: a
//! path is taken apart into names, each name is checked, and [`inside`] follows the result through the file system.
//!
//! | Text | Folder |
//! |---|---|
//! | `n`, `weights/n` | `weights/{the request's model}/n` |
//! | `m/n`, `weights/m/n`, `xorl://m/weights/n`, `tinker://m/weights/n` | `weights/m/n` |
//! | the same with `sampler_weights`, `external_weights` or `full_weights` | `sampler_weights/m/n` and so on |
//! | another with '/' | the folder itself |

use super::request::ModelId;
use std::{
    fmt, fs,
    path::{Component, Path, PathBuf},
};

/// Bytes of a path, at most.
const LONGEST: usize = 512;
/// Bytes of a name in a path, at most.
const LONGEST_NAME: usize = 128;
const SCHEMES: [&str; 2] = ["xorl://", "tinker://"];
/// The folder of the tenants' folders, which no path names.
const TENANTS: &str = "tenants";

/// The reason why a path is refused.
#[derive(Debug, thiserror::Error)]
pub enum PathError {
    #[error("path: expected 1 to {LONGEST} bytes, got {0}")]
    Length(usize),
    #[error(
        "path {path:?}: expected names of letters, digits, '.', '_' and '-', the first of them a letter, a digit or \
         '_', with '/' between them and relative to the server's output_dir, got {part:?}"
    )]
    Name { path: String, part: String },
    #[error("path {path:?}: must be relative to output_dir, like \"runs/final\"")]
    Absolute { path: String },
    #[error("path {path:?}: expected {SCHEMES:?} with model/weights/name or model/sampler_weights/name")]
    Uri { path: String },
    #[error(
        "path {path:?}: {model} saves to its own {kind} or to a folder outside them; give a name like \"step_10\""
    )]
    Elsewhere { path: String, model: ModelId, kind: Kind },
    #[error("path {path:?}: {kind} are saved under a name without '/'")]
    Folder { path: String, kind: Kind },
    #[error("path {0}: a link is on the way; name the folder that it leads to, if that is in output_dir")]
    Link(PathBuf),
    #[error("path {0}: it is not below the server's output_dir")]
    Outside(PathBuf),
    #[error("path {path}: {error}")]
    Io { path: PathBuf, error: std::io::Error },
}

/// The kinds of saved adapters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// With the state of training.
    Weights,
    /// For a sampler: the adapter alone.
    Sampler,
    /// To be downloaded: the adapter alone.
    External,
    /// A model of its own: the base with the adapter merged into it.
    Full,
}

impl Kind {
    pub const ALL: [Self; 4] = [Self::Weights, Self::Sampler, Self::External, Self::Full];

    /// The name of the folder, and of the kind in a path.
    pub fn folder(self) -> &'static str {
        match self {
            Self::Weights => "weights",
            Self::Sampler => "sampler_weights",
            Self::External => "external_weights",
            Self::Full => "full_weights",
        }
    }

    /// The kind whose folder has this name.
    pub fn of(folder: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.folder() == folder)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.folder())
    }
}

/// A saved adapter by its names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    pub model: ModelId,
    pub kind: Kind,
    pub name: String,
}

impl Checkpoint {
    /// `{scheme}://{model}/weights/{name}`
    pub fn uri(&self, scheme: &str) -> String {
        format!("{scheme}://{}/{}/{}", self.model, self.kind, self.name)
    }

    /// `weights/{name}`, as lists of one adapter call it.
    pub fn id(&self) -> String {
        format!("{}/{}", self.kind, self.name)
    }

    /// The folder below the tenant's.
    pub fn folder(&self) -> PathBuf {
        [self.kind.folder(), &self.model.folder(), &self.name].iter().collect()
    }
}

/// The place that a path names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    Checkpoint(Checkpoint),
    /// A folder of the client's choice, below the tenant's.
    Folder(PathBuf),
}

/// True for a text that may be a name in a path.
pub fn is_name(text: &str) -> bool {
    let is_first = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let is_allowed = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    text.len() <= LONGEST_NAME && text.starts_with(is_first) && text.chars().all(is_allowed)
}

/// The parts of `path`, each a name; a model's name may have ':'.
fn parts(path: &str) -> Result<Vec<&str>, PathError> {
    if path.is_empty() || path.len() > LONGEST {
        return Err(PathError::Length(path.len()));
    }
    if path.starts_with('/') {
        return Err(PathError::Absolute { path: path.into() });
    }
    let parts: Vec<&str> = path.strip_suffix('/').unwrap_or(path).split('/').collect();
    match parts.iter().find(|part| !is_name(&part.replace(':', "_"))) {
        Some(part) => Err(PathError::Name { path: path.into(), part: (*part).into() }),
        None => Ok(parts),
    }
}

/// A checkpoint of the named model.
fn checkpoint(path: &str, model: &str, kind: Kind, name: &str) -> Result<Checkpoint, PathError> {
    let wrong = |part: &str| PathError::Name { path: path.into(), part: part.into() };
    let model = ModelId::new(model).map_err(|_| wrong(model))?;
    if is_name(name) { Ok(Checkpoint { model, kind, name: name.into() }) } else { Err(wrong(name)) }
}

/// A path with a scheme, which has exactly three parts.
fn uri(path: &str) -> Option<Result<Checkpoint, PathError>> {
    let rest = SCHEMES.iter().find_map(|scheme| path.strip_prefix(scheme))?;
    Some(match parts(rest) {
        Err(error) => Err(error),
        Ok(found) => match found[..] {
            [model, kind, name] if Kind::of(kind).is_some() && !rest.ends_with('/') => {
                checkpoint(path, model, Kind::of(kind).unwrap_or(Kind::Weights), name)
            }
            _ => Err(PathError::Uri { path: path.into() }),
        },
    })
}

fn folder(path: &str, parts: &[&str]) -> Result<Place, PathError> {
    match parts.iter().enumerate().find(|(i, part)| !is_name(part) || (*i == 0 && **part == TENANTS)) {
        Some((_, part)) => Err(PathError::Name { path: path.into(), part: (*part).into() }),
        None => Ok(Place::Folder(parts.iter().collect())),
    }
}

/// The places that `path` may name for a request of `model`, the first that exists of them in order.
///
/// # Errors
/// A part is no name.
pub fn to_load(path: &str, model: &ModelId) -> Result<Vec<Place>, PathError> {
    if let Some(found) = uri(path) {
        return Ok(vec![Place::Checkpoint(found?)]);
    }
    let parts = parts(path)?;
    let of = |model: &str, kind, name| checkpoint(path, model, kind, name).map(Place::Checkpoint);
    let kind = Kind::of(parts[0]);
    match (&parts[..], kind) {
        (&[name], _) => Ok(vec![of(model.as_str(), Kind::Weights, name)?]),
        (&[_, name], Some(kind)) => Ok(vec![of(model.as_str(), kind, name)?]),
        (&[_, model, name], Some(kind)) => Ok(vec![of(model, kind, name)?]),
        (&[other, name], None) => {
            let mut places = vec![of(other, Kind::Weights, name)?];
            places.extend(folder(path, &parts));
            Ok(places)
        }
        _ => Ok(vec![folder(path, &parts)?]),
    }
}

/// The place of a save of `model` to `path`.
///
/// # Errors
/// A part is no name, or the place is another adapter's.
pub fn to_save(path: &str, model: &ModelId, kind: Kind) -> Result<Place, PathError> {
    let elsewhere = || PathError::Elsewhere { path: path.into(), model: model.clone(), kind };
    let own = |found: Checkpoint| {
        let is_own = found.model == *model && found.kind == kind;
        if is_own { Ok(Place::Checkpoint(found)) } else { Err(elsewhere()) }
    };
    if let Some(found) = uri(path) {
        return own(found?);
    }
    let parts = parts(path)?;
    match (&parts[..], Kind::of(parts[0])) {
        (&[name], _) => own(checkpoint(path, model.as_str(), kind, name)?),
        (&[_, name], Some(named)) => own(checkpoint(path, model.as_str(), named, name)?),
        (&[_, other, name], Some(named)) => own(checkpoint(path, other, named, name)?),
        (_, Some(_)) => Err(elsewhere()),
        (_, None) if kind != Kind::Weights => Err(PathError::Folder { path: path.into(), kind }),
        (_, None) => folder(path, &parts),
    }
}

/// `relative` below `root`, which must exist. Parts that exist are no links.
///
/// # Errors
/// A link is on the way, or the folder is not below `root`.
pub fn inside(root: &Path, relative: &Path) -> Result<PathBuf, PathError> {
    let io = |path: &Path| {
        let path = path.to_owned();
        move |error| PathError::Io { path, error }
    };
    let root = root.canonicalize().map_err(io(root))?;
    let mut path = root.clone();
    for part in relative.components() {
        let Component::Normal(part) = part else { return Err(PathError::Outside(relative.into())) };
        path.push(part);
        match fs::symlink_metadata(&path) {
            Ok(data) if data.is_symlink() => return Err(PathError::Link(relative.into())),
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(io(relative)(error)),
        }
    }
    let existing = path.ancestors().find(|folder| folder.exists()).unwrap_or(&root);
    let real = existing.canonicalize().map_err(io(relative))?;
    if path != root && real.starts_with(&root) { Ok(path) } else { Err(PathError::Outside(relative.into())) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::symlink;

    fn model() -> ModelId {
        ModelId::new("policy_v1").unwrap()
    }

    fn loaded(path: &str) -> Vec<String> {
        let places = to_load(path, &model()).unwrap_or_else(|error| panic!("{path}: {error}"));
        places.iter().map(shown).collect()
    }

    fn shown(place: &Place) -> String {
        match place {
            Place::Checkpoint(found) => found.folder().display().to_string(),
            Place::Folder(folder) => format!("folder {}", folder.display()),
        }
    }

    #[test]
    fn every_form_of_a_path_names_its_folder() {
        let cases: [(&str, &[&str]); 13] = [
            ("xorl://m/weights/n", &["weights/m/n"]),
            ("tinker://sess-1:train:0/weights/n", &["weights/sess-1%3Atrain%3A0/n"]),
            ("tinker://m/sampler_weights/n", &["sampler_weights/m/n"]),
            ("weights/m/n", &["weights/m/n"]),
            ("weights/s:train:0/n", &["weights/s%3Atrain%3A0/n"]),
            ("sampler_weights/m/n", &["sampler_weights/m/n"]),
            ("weights/n", &["weights/policy_v1/n"]),
            ("sampler_weights/n", &["sampler_weights/policy_v1/n"]),
            ("m/n", &["weights/m/n", "folder m/n"]),
            ("s:train:0/n", &["weights/s%3Atrain%3A0/n"]),
            ("n", &["weights/policy_v1/n"]),
            ("outputs/adapters/policy_v1", &["folder outputs/adapters/policy_v1"]),
            ("outputs/adapters/policy_v1/", &["folder outputs/adapters/policy_v1"]),
        ];
        for (path, folders) in cases {
            assert_eq!(loaded(path), folders, "{path}");
        }
    }

    #[test]
    fn a_save_goes_to_the_own_checkpoints_or_to_a_folder() {
        let saved = |path: &str, kind| to_save(path, &model(), kind).map(|place| shown(&place));
        for path in ["n", "weights/n", "weights/policy_v1/n", "xorl://policy_v1/weights/n"] {
            assert_eq!(saved(path, Kind::Weights).unwrap(), "weights/policy_v1/n", "{path}");
        }
        assert_eq!(saved("n", Kind::Sampler).unwrap(), "sampler_weights/policy_v1/n");
        assert_eq!(saved("full_weights/n", Kind::Full).unwrap(), "full_weights/policy_v1/n");
        let page = saved("outputs/adapters/policy_v1", Kind::Weights).unwrap();
        assert_eq!(page, "folder outputs/adapters/policy_v1");
        for path in [
            "weights/m/n",
            "xorl://m/weights/n",
            "sampler_weights/n",
            "weights/a/b/c",
            "weights/policy_v1/a/b",
        ] {
            let error = saved(path, Kind::Weights).unwrap_err();
            assert!(matches!(error, PathError::Elsewhere { .. }), "{path}: {error}");
        }
        assert!(matches!(saved("a/b", Kind::Sampler), Err(PathError::Folder { .. })));
    }

    #[test]
    fn what_is_no_name_is_refused() {
        let long = "a".repeat(129);
        let bad = [
            "..",
            "../n",
            "a/../b",
            "a/..",
            "weights/../n",
            "weights/m/..",
            "xorl://../weights/n",
            "xorl://m/weights/..",
            "xorl://m/../n",
            "/etc",
            "/",
            "//",
            "a//b",
            "~/n",
            "~",
            "%2e%2e/n",
            "..%2fn",
            "a%2Fb",
            "%",
            "a%00",
            "a\0b",
            "\0",
            ".",
            "./n",
            ".hidden",
            "a/.tmp-step_1",
            "a\\..\\b",
            "C:\\n",
            "a b",
            "a\nb",
            "é",
            "．．/n",
            "-n",
            "a:b",
            "n?x=1",
            "",
            "xorl://",
            "xorl://m",
            "xorl://m/weights",
            "xorl://m/weights/",
            "xorl://m/weights/a/b",
            "xorl://m/weights/n/",
            "xorl://m/models/n",
            "file:///etc/passwd",
            "http://x/y/z",
            "tenants/other/weights/m/n",
            "tenants/x/y",
            &long,
        ];
        for path in bad {
            assert!(to_load(path, &model()).is_err(), "load {path:?}: {:?}", to_load(path, &model()));
            assert!(to_save(path, &model(), Kind::Weights).is_err(), "save {path:?}");
        }
        assert!(to_load(&"a/".repeat(300), &model()).is_err());
        let error = to_load("../n", &model()).unwrap_err().to_string();
        assert!(error.contains("relative to the server's output_dir, got \"..\""), "{error}");
        let error = to_load("/etc/n", &model()).unwrap_err().to_string();
        assert!(error.contains("must be relative to output_dir"), "{error}");
    }

    #[test]
    fn links_and_roots_are_refused_wherever_they_are() {
        let (output, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let root = output.path();
        fs::create_dir_all(root.join("weights/m/real")).unwrap();
        symlink(outside.path(), root.join("out")).unwrap();
        symlink(root.join("weights/m/real"), root.join("weights/m/inner")).unwrap();
        symlink("/nowhere", root.join("weights/m/dangling")).unwrap();
        fs::write(root.join("file"), "").unwrap();
        let real = root.canonicalize().unwrap();
        for good in ["weights/m/real", "weights/m/new", "new/folder"] {
            assert_eq!(inside(root, Path::new(good)).unwrap(), real.join(good));
        }
        for bad in ["out", "out/n", "weights/m/inner", "weights/m/inner/n", "weights/m/dangling"] {
            assert!(matches!(inside(root, Path::new(bad)), Err(PathError::Link(_))), "{bad}");
        }
        for bad in ["", "..", "weights/../..", "/etc"] {
            assert!(matches!(inside(root, Path::new(bad)), Err(PathError::Outside(_))), "{bad}");
        }
        assert!(inside(root, Path::new("file/n")).is_err());
        assert!(matches!(inside(&root.join("absent"), Path::new("n")), Err(PathError::Io { .. })));
        // The root itself may be reached by a link: that is the operator's choice.
        let link = outside.path().join("link");
        symlink(root, &link).unwrap();
        assert_eq!(inside(&link, Path::new("n")).unwrap(), real.join("n"));
    }

    proptest! {
        #[test]
        fn a_path_stays_below_the_root_or_is_refused(
            start in "(xorl://|tinker://|weights/|/|)",
            rest in "([a-c.%:/\\\\~_\\-\u{0}é ]|\\.\\./|m/|weights){0,12}",
        ) {
            let text = start + &rest;
            let root = tempfile::tempdir().unwrap();
            let places = to_load(&text, &model()).into_iter().flatten();
            for place in places.chain(to_save(&text, &model(), Kind::Weights)) {
                let relative = match place {
                    Place::Checkpoint(found) => found.folder(),
                    Place::Folder(folder) => folder,
                };
                prop_assert!(relative.components().all(|part| matches!(part, Component::Normal(_))), "{:?}", relative);
                prop_assert!(!relative.to_string_lossy().split('/').any(|part| part.starts_with('.')));
                let folder = inside(root.path(), &relative).unwrap();
                prop_assert!(folder.starts_with(root.path().canonicalize().unwrap()));
            }
        }
    }
}
