//! The kinds of configuration files: `run.yaml` and `server.yaml`. Loader, hints, validation and help serve both.

use super::compat::Compat;
use super::error::{FieldLocations, Problem};
use super::nearest::Hint;
use super::paths::NamedPath;
use super::section::{FieldInfo, Section};

/// A rule between fields that is broken: the fields that it compares, of which the first is to blame.
pub(super) type Broken = (&'static [&'static str], Problem);

/// A configuration that a file of this kind holds.
pub(super) trait ConfigFile: Default {
    /// The sections in the order of a written file.
    const SECTIONS: &'static [&'static str];
    /// The fields of the one section stand at the top of the file; only the command line names the section.
    const IS_FLAT: bool;
    /// xorl's other fields.
    const COMPAT: Compat;

    /// In the order of [`Self::SECTIONS`].
    fn sections(&self) -> Vec<&dyn Section>;

    fn section_mut(&mut self, name: &str) -> Option<&mut dyn Section>;

    /// Sets the defaults that depend on another field.
    fn complete(&mut self, places: &FieldLocations);

    fn broken_rules(&self) -> Vec<Broken>;

    /// The paths that have to exist.
    fn named_paths(&self) -> Vec<NamedPath<'_>>;

    /// The hint for `key` of `section`, which is not known.
    fn unknown_field(section: &str, key: &str) -> Hint;

    /// The hint for a section that is not known, or for a dotted field of one.
    fn unknown_section(name: &str) -> Hint;
}

/// Every field with the name of its section.
pub(super) fn schema<C: ConfigFile>() -> Vec<(&'static str, FieldInfo)> {
    let config = C::default();
    let of = |(name, section): (&&'static str, &dyn Section)| {
        section.fields().into_iter().map(|field| (*name, field)).collect::<Vec<_>>()
    };
    C::SECTIONS.iter().zip(config.sections()).flat_map(of).collect()
}

/// The dotted names of all fields.
pub(super) fn names<C: ConfigFile>() -> Vec<String> {
    schema::<C>().into_iter().map(|(section, field)| format!("{section}.{}", field.key)).collect()
}
