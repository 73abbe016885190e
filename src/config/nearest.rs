//! "Did you mean": the known name that a misspelt one is closest to.

use super::{compat, schema};
use crate::config::data::DatasetArgs;
use crate::config::section::Section;

/// Below this similarity (Jaro-Winkler, 0 to 1) a suggestion would mislead.
const SIMILAR: f64 = 0.84;

fn closest<S: AsRef<str>>(name: &str, known: impl IntoIterator<Item = S>) -> Option<String> {
    let scored = known.into_iter().map(|k| (strsim::jaro_winkler(name, k.as_ref()), k));
    let best = scored.max_by(|a, b| a.0.total_cmp(&b.0))?;
    (best.0 >= SIMILAR).then(|| best.1.as_ref().to_owned())
}

fn all_fields() -> Vec<String> {
    let ours = schema().into_iter().map(|(section, field)| format!("{section}.{}", field.key));
    ours.chain(compat::names().map(str::to_owned)).collect()
}

/// For an unknown `section.key`: a like name in the section, else the same name in another section.
pub(super) fn field(section: &str, key: &str) -> Option<String> {
    let all = all_fields();
    let elsewhere = || all.iter().find(|name| name.rsplit('.').next() == Some(key)).cloned();
    let within = all.iter().filter_map(|name| name.strip_prefix(section)?.strip_prefix('.'));
    let here =
        closest(key, within.filter(|name| !name.contains('.'))).map(|name| format!("{section}.{name}"));
    elsewhere().or(here)
}

/// For an unknown section, or a field written where a section belongs.
pub(super) fn section(name: &str) -> Option<String> {
    let sections = super::SECTIONS;
    let field = || all_fields().into_iter().find(|known| known.rsplit('.').next() == Some(name));
    field().or_else(|| closest(name, sections))
}

/// For an unknown field of an entry of `data.datasets`.
pub(super) fn dataset_field(key: &str) -> Option<String> {
    closest(key, DatasetArgs::default().fields().into_iter().map(|field| field.key))
}
