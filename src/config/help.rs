//! The configuration as text: the long help of the command line and a table for the schema snapshot.

use super::data::DatasetArgs;
use super::section::Section;
use super::{SECTIONS, compat, schema};

/// Columns of the help text.
const WIDTH: usize = 100;

/// Every field with type, default and meaning, and lists of xorl's other fields.
pub fn help() -> String {
    let mut text = String::from(
        "Configuration fields. In the file they stand under their section; on the command line \
         --section.field value\n(or --section.field=value, lists separated by spaces) wins over the file.\n",
    );
    let fields = schema();
    for section in SECTIONS {
        text += &format!("\n{section}:\n");
        for (_, field) in fields.iter().filter(|(name, _)| *name == section) {
            text +=
                &format!("  --{section}.{} <{}>  [default: {}]\n", field.key, field.type_name, field.default);
            text += &wrapped(&field.meaning, 10);
            if (section, field.key) == ("data", "datasets") {
                for part in DatasetArgs::default().fields() {
                    let line = format!("{} <{}>: {}", part.key, part.type_name, part.meaning);
                    text += &wrapped(&line, 12);
                }
            }
        }
    }
    let list = |names: Vec<&str>| wrapped(&names.join(", "), 2);
    text += "\nFields of xorl that change nothing here, ignored with a warning:\n";
    text += &list(compat::ACCEPTED_WITH_WARNING.iter().map(|known| known.field).collect());
    text += "\nFields of xorl that are not built, refused unless they hold their neutral value:\n";
    text += &list(compat::REFUSED.iter().map(|known| known.field).collect());
    text
}

/// One line a field: name, type, default; tab-separated.
pub fn schema_table() -> String {
    let line = |(section, field): (&str, super::FieldInfo)| {
        format!("{section}.{}\t{}\t{}\n", field.key, field.type_name, field.default)
    };
    schema().into_iter().map(line).collect()
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
