//! "Did you mean": the known name closest to a misspelt one.

use super::{compat, schema};
use crate::config::data::DatasetArgs;
use crate::config::section::Section;

/// Least similarity (Jaro-Winkler, 0 to 1) of a suggestion; below it, one would mislead.
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

/// Suggests the same name in another section for an unknown `section.key`, else a similar name in the section.
pub(super) fn field(section: &str, key: &str) -> Option<String> {
    let all = all_fields();
    let elsewhere = || all.iter().find(|name| name.rsplit('.').next() == Some(key)).cloned();
    let within = all.iter().filter_map(|name| name.strip_prefix(section)?.strip_prefix('.'));
    let here =
        closest(key, within.filter(|name| !name.contains('.'))).map(|name| format!("{section}.{name}"));
    elsewhere().or(here)
}

/// Suggests a name for an unknown section, or for a field in the place of a section.
pub(super) fn section(name: &str) -> Option<String> {
    let sections = super::SECTIONS;
    let field = || all_fields().into_iter().find(|known| known.rsplit('.').next() == Some(name));
    field().or_else(|| closest(name, sections))
}

/// Suggests a name for an unknown field of an entry of `data.datasets`.
pub(super) fn dataset_field(key: &str) -> Option<String> {
    closest(key, DatasetArgs::default().fields().into_iter().map(|field| field.key))
}
