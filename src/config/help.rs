//! The configuration as text: the long help of the command line, the reference of the manuals, and a table for the
//! schema snapshot.

use super::data::DatasetArgs;
use super::file::{self, ConfigFile};
use super::section::{FieldInfo, Section};
use super::{RunConfig, ServerConfig};

/// Columns of the help text.
const WIDTH: usize = 100;

/// Every field of `run.yaml` with type, default and meaning, and lists of xorl's other fields.
pub fn help() -> String {
    help_of::<RunConfig>(
        "Configuration fields. In the file they stand under their section; on the command line \
         --section.field value\n(or --section.field=value, lists separated by spaces) wins over the file.\n",
    )
}

/// [`help`] for `server.yaml`.
pub fn server_help() -> String {
    help_of::<ServerConfig>(
        "Configuration fields. In the file they stand at the top, without `server.`; on the command line \
         --server.field value\n(or --server.field=value, lists separated by spaces) wins over the file.\n",
    )
}

fn help_of<C: ConfigFile>(opening: &str) -> String {
    let mut text = opening.to_owned();
    let fields = file::schema::<C>();
    for section in C::SECTIONS {
        text += &format!("\n{section}:\n");
        for (_, field) in fields.iter().filter(|(name, _)| name == section) {
            text +=
                &format!("  --{section}.{} <{}>  [default: {}]\n", field.key, field.type_name, field.default);
            text += &wrapped(&field.meaning, 10);
            if (*section, field.key) == ("data", "datasets") {
                for part in DatasetArgs::default().fields() {
                    let line = format!("{} <{}>: {}", part.key, part.type_name, part.meaning);
                    text += &wrapped(&line, 12);
                }
            }
        }
    }
    let list = |names: Vec<String>| wrapped(&names.join(", "), 2);
    text += "\nFields of xorl that change nothing here, ignored with a warning:\n";
    text += &list(C::COMPAT.accepted_names());
    text += "\nFields of xorl that are not built, refused unless they hold their neutral value:\n";
    text += &list(C::COMPAT.refused_names());
    text
}

/// Every field of `run.yaml` with type, default and meaning: a Markdown table for each section, which
/// `configs/README.md` holds.
pub fn reference() -> String {
    reference_of::<RunConfig>()
}

/// [`reference()`] of `server.yaml`, which `configs/server/README.md` holds.
pub fn server_reference() -> String {
    reference_of::<ServerConfig>()
}

fn reference_of<C: ConfigFile>() -> String {
    let row = |prefix: &str, field: &FieldInfo| {
        let FieldInfo { key, type_name, default, meaning } = field;
        let cells = [format!("`{prefix}{key}`"), type_name.clone(), format!("`{default}`"), meaning.clone()];
        format!("| {} |\n", cells.map(|cell| cell.replace('|', "\\|")).join(" | "))
    };
    let fields = file::schema::<C>();
    let section = |section: &&str| {
        let title = if C::IS_FLAT { String::new() } else { format!("### `{section}`\n\n") };
        let mut text = format!("{title}| Field | Value | Default | Meaning |\n|---|---|---|---|\n");
        for (_, field) in fields.iter().filter(|(name, _)| name == section) {
            text += &row("", field);
            if (*section, field.key) == ("data", "datasets") {
                text.extend(DatasetArgs::default().fields().iter().map(|part| row("datasets[].", part)));
            }
        }
        text
    };
    C::SECTIONS.iter().map(section).collect::<Vec<_>>().join("\n")
}

/// One line a field of `run.yaml`: name, type, default; tab-separated.
pub fn schema_table() -> String {
    table(super::schema())
}

/// [`schema_table`] of `server.yaml`.
pub fn server_schema_table() -> String {
    table(super::server_schema())
}

fn table(schema: Vec<(&str, FieldInfo)>) -> String {
    let line = |(section, field): (&str, FieldInfo)| {
        format!("{section}.{}\t{}\t{}\n", field.key, field.type_name, field.default)
    };
    schema.into_iter().map(line).collect()
}

/// `words` in lines of at most [`WIDTH`] columns, each indented, with a final newline.
fn wrapped(words: &str, indent: usize) -> String {
    let mut text = String::new();
    let mut line = String::new();
    for word in words.split_whitespace() {
        if !line.is_empty() && indent + line.chars().count() + 1 + word.chars().count() > WIDTH {
            text += &format!("{:indent$}{line}\n", "");
            line.clear();
        }
        if !line.is_empty() {
            line.push(' ');
        }
        line += word;
    }
    text + &format!("{:indent$}{line}\n", "")
}
