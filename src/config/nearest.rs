//! Hints for names that are not known: the same name elsewhere, another trainer's name, or a misspelt one.

use super::data::DatasetArgs;
use super::error::Problem;
use super::section::Section;
use super::{compat, foreign, schema};

/// A hint, and the field or section that was probably meant: nothing else is said of it.
pub(super) struct Hint {
    pub problem: Problem,
    pub meant: Option<String>,
}

impl Hint {
    fn field(nearest: Option<String>) -> Self {
        Self { problem: Problem::UnknownField { nearest: nearest.clone() }, meant: nearest }
    }

    fn section(nearest: Option<String>) -> Self {
        Self { problem: Problem::UnknownSection { nearest: nearest.clone() }, meant: nearest }
    }

    fn foreign(name: &str) -> Option<Self> {
        let (problem, meant) = foreign::field(name)?;
        Some(Self { problem, meant: meant.map(str::to_owned) })
    }
}

/// The one of `known` that `name` is a misspelling of: a letter or two wrong, missing, added or swapped. A more distant
/// name would mislead.
fn misspelt<S: AsRef<str>>(name: &str, known: impl IntoIterator<Item = S>) -> Option<S> {
    let lower = name.to_ascii_lowercase().replace('-', "_");
    let wrong_letters = |known: &str| strsim::osa_distance(&lower, known);
    let most = match name.chars().count() {
        0..=2 => 0,
        3..=7 => 1,
        _ => 2,
    };
    let best = known.into_iter().min_by_key(|known| wrong_letters(known.as_ref()))?;
    (wrong_letters(best.as_ref()) <= most).then_some(best)
}

fn ours() -> Vec<String> {
    schema().into_iter().map(|(section, field)| format!("{section}.{}", field.key)).collect()
}

fn key(field: &str) -> &str {
    field.rsplit('.').next().unwrap_or(field)
}

/// The field of ours with this very name, in another section.
fn of_another_section(name: &str) -> Option<String> {
    ours().into_iter().find(|field| key(field) == name)
}

/// The field of xorl's with this very name, in another section.
fn of_xorl(name: &str) -> Option<String> {
    let of_section = |field: &&str| field.matches('.').count() == 1;
    compat::names().filter(of_section).find(|field| key(field) == name).map(str::to_owned)
}

/// A field of ours that `name` is a misspelling of, of `section` first.
fn misspelt_field(section: Option<&str>, name: &str) -> Option<String> {
    let all = ours();
    let within =
        all.iter().filter(|field| section.is_none_or(|section| field.split('.').next() == Some(section)));
    let keys: Vec<&str> = within.clone().map(|field| key(field)).collect();
    let found = misspelt(name, keys)?;
    within.into_iter().find(|field| key(field) == found).cloned()
}

/// A foreign name that `name` is a misspelling of, by one letter: they are many.
fn misspelt_foreign(name: &str) -> Option<Hint> {
    let is_near = |known: &&str| known.len() > 4 && strsim::osa_distance(name, known) == 1;
    Hint::foreign(foreign::names().find(is_near)?)
}

/// The hint for an unknown `section.key`.
pub(super) fn field(section: &str, key: &str) -> Hint {
    of_another_section(key)
        .map(|name| Hint::field(Some(name)))
        .or_else(|| Hint::foreign(key))
        .or_else(|| of_xorl(key).map(|name| Hint::field(Some(name))))
        .or_else(|| misspelt_field(Some(section), key).map(|name| Hint::field(Some(name))))
        .or_else(|| misspelt_field(None, key).map(|name| Hint::field(Some(name))))
        .or_else(|| misspelt_foreign(key))
        .unwrap_or_else(|| Hint::field(None))
}

/// The hint for an unknown section, or for a field in the place of a section.
pub(super) fn section(name: &str) -> Hint {
    let misspelt_section = || misspelt(name, super::SECTIONS).map(str::to_owned);
    of_another_section(name)
        .map(|name| Hint::section(Some(name)))
        .or_else(|| Hint::foreign(name))
        .or_else(|| of_xorl(name).map(|name| Hint::section(Some(name))))
        .or_else(|| misspelt_section().map(|name| Hint::section(Some(name))))
        .or_else(|| misspelt_field(None, name).map(|name| Hint::section(Some(name))))
        .or_else(|| misspelt_foreign(name))
        .unwrap_or_else(|| Hint::section(None))
}

/// The problem of an unknown field of an entry of `data.datasets`.
pub(super) fn dataset_field(key: &str) -> Problem {
    let ours = DatasetArgs::default().fields().into_iter().map(|field| field.key);
    foreign::dataset_field(key)
        .unwrap_or_else(|| Problem::UnknownField { nearest: misspelt(key, ours).map(str::to_owned) })
}
