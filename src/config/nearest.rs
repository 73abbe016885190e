//! Hints for names that are not known: the same name elsewhere, another trainer's name, or a misspelt one.

use super::data::DatasetArgs;
use super::error::Problem;
use super::file::{self, ConfigFile};
use super::section::Section;
use super::{RunConfig, ServerConfig, compat, compat_server, foreign};

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
pub fn misspelt<S: AsRef<str>>(name: &str, known: impl IntoIterator<Item = S>) -> Option<S> {
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

fn key(field: &str) -> &str {
    field.rsplit('.').next().unwrap_or(field)
}

/// The field of a `C` with this very name.
fn of_any_section<C: ConfigFile>(name: &str) -> Option<String> {
    file::names::<C>().into_iter().find(|field| key(field) == name)
}

/// The field of xorl's with this very name, in another section.
fn of_xorl(name: &str) -> Option<String> {
    let of_section = |field: &&str| field.matches('.').count() == 1;
    compat::names().filter(of_section).find(|field| key(field) == name).map(str::to_owned)
}

/// A field of a `C` that `name` is a misspelling of, of `section` if one is given.
fn misspelt_field<C: ConfigFile>(section: Option<&str>, name: &str) -> Option<String> {
    let all = file::names::<C>();
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

/// The hint for an unknown `section.key` of `run.yaml`.
pub(super) fn field(section: &str, key: &str) -> Hint {
    of_any_section::<RunConfig>(key)
        .map(|name| Hint::field(Some(name)))
        .or_else(|| Hint::foreign(key))
        .or_else(|| of_xorl(key).map(|name| Hint::field(Some(name))))
        .or_else(|| misspelt_field::<RunConfig>(Some(section), key).map(|name| Hint::field(Some(name))))
        .or_else(|| misspelt_field::<RunConfig>(None, key).map(|name| Hint::field(Some(name))))
        .or_else(|| misspelt_foreign(key))
        .unwrap_or_else(|| Hint::field(None))
}

/// The hint for an unknown section of `run.yaml`, or for a field in the place of a section.
pub(super) fn section(name: &str) -> Hint {
    let misspelt_section = || misspelt(name, RunConfig::SECTIONS).map(|name| (*name).to_owned());
    of_any_section::<RunConfig>(name)
        .map(|name| Hint::section(Some(name)))
        .or_else(|| Hint::foreign(name))
        .or_else(|| of_xorl(name).map(|name| Hint::section(Some(name))))
        .or_else(|| misspelt_section().map(|name| Hint::section(Some(name))))
        .or_else(|| misspelt_field::<RunConfig>(None, name).map(|name| Hint::section(Some(name))))
        .or_else(|| misspelt_foreign(name))
        .unwrap_or_else(|| Hint::section(None))
}

/// The hint for an unknown field of `server.yaml`.
pub(super) fn server_field(name: &str) -> Hint {
    let says = |hint: String, meant: Option<String>| Hint { problem: Problem::Foreign { hint }, meant };
    if name == "server" {
        return says("the fields of server.yaml stand at its top, without a section".into(), None);
    }
    if RunConfig::SECTIONS.contains(&name) {
        let hint = format!("{name} is a section of run.yaml; the fields of server.yaml stand at its top");
        return says(hint, None);
    }
    if let Some((_, field)) = compat_server::RENAMED.iter().find(|(known, _)| *known == name) {
        return says(format!("{name} is {field} here"), None);
    }
    let of_run = || of_any_section::<RunConfig>(name).map(|field| says(not_of_a_server(name, &field), None));
    // Another trainer's name for a field of a run may be a field of the server too.
    let foreign = || {
        let field = foreign::field(name)?.1?;
        Some(match of_any_section::<ServerConfig>(key(field)) {
            Some(ours) => says(format!("{name} is {} here", key(field)), Some(ours)),
            None => says(not_of_a_server(name, field), None),
        })
    };
    of_run()
        .or_else(foreign)
        .or_else(|| misspelt_field::<ServerConfig>(None, name).map(|name| Hint::field(Some(name))))
        .unwrap_or_else(|| Hint::field(None))
}

fn not_of_a_server(name: &str, field: &str) -> String {
    let is = if key(field) == name { String::new() } else { format!("{field} ") };
    format!("{name} is {is}of run.yaml; a server has no such field")
}

/// The hint for the field `name` of the command line, whose section is not `server`.
pub(super) fn server_section(name: &str) -> Hint {
    let section = name.split('.').next().unwrap_or(name);
    match of_any_section::<ServerConfig>(key(name)) {
        Some(ours) if RunConfig::SECTIONS.contains(&section) => {
            let hint = format!("{name} is of run.yaml; the server's is {ours}");
            Hint { problem: Problem::Foreign { hint }, meant: Some(ours) }
        }
        Some(ours) => Hint::section(Some(ours)),
        None if RunConfig::SECTIONS.contains(&section) => server_field(key(name)),
        None => Hint::section(misspelt(section, ServerConfig::SECTIONS).map(|name| (*name).to_owned())),
    }
}

/// The problem of an unknown field of an entry of `data.datasets`.
pub(super) fn dataset_field(key: &str) -> Problem {
    let ours = DatasetArgs::default().fields().into_iter().map(|field| field.key);
    foreign::dataset_field(key)
        .unwrap_or_else(|| Problem::UnknownField { nearest: misspelt(key, ours).map(str::to_owned) })
}
