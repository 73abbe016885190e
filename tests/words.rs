//! Rules for the text of this repository: openings and lengths of comments, reasons for unsafe blocks, names that were
//! replaced. A failure lists `file:line` of every breach.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// Doc comments may open with one of these words this often: a noun or a verb is nearly always clearer.
const MOST_OPENINGS: usize = 60;
const OPENINGS: [&str; 7] = ["What", "Which", "Whether", "Where", "How", "Who", "Of"];

/// Columns of a comment's line.
const COLUMNS: usize = 120;

/// Lines above an `unsafe` among which its SAFETY comment is.
const SAFETY_LINES: usize = 8;

/// Names that were replaced by the field's words, each with its successor.
const REPLACED: [(&str, &str); 20] = [
    ("from_first", "broadcast_from_root"),
    ("Layers", "GroupedLinear"),
    ("Groups", "RowSegments or ProcessGroups"),
    ("thin", "lora_hidden"),
    ("ThinGradient", "LoraHiddenGrad"),
    ("Exchange", "ExpertDispatcher"),
    ("there", "dispatch"),
    ("back", "combine"),
    ("Places", "RoutePlan or FieldLocations"),
    ("Booked", "Instrumented"),
    ("book", "record"),
    ("Lane", "CommStream"),
    ("Sight", "VisibleDevices"),
    ("Level", "Isa"),
    ("Machine", "MicroKernel"),
    ("wide", "accum_kind"),
    ("Walk", "BatchSchedule"),
    ("Stride", "StepRows"),
    ("Position", "DataCursor"),
    ("Ring", "SlotPool"),
];

/// Items whose name may be one of [`REPLACED`]; of words that are common as names of values, only these count.
const ITEMS: [&str; 8] = ["fn ", "struct ", "enum ", "trait ", "type ", "mod ", "const ", "static "];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Files below `folders` with one of `endings`, by their path in the repository, with their text.
fn files(folders: &[&str], endings: &[&str]) -> Vec<(PathBuf, String)> {
    fn walk(folder: &Path, endings: &[&str], found: &mut Vec<(PathBuf, String)>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let ending = path.extension().and_then(|ending| ending.to_str());
            if path.is_dir() {
                walk(&path, endings, found);
            } else if ending.is_some_and(|ending| endings.contains(&ending)) {
                let text = fs::read_to_string(&path).unwrap();
                found.push((path.strip_prefix(root()).unwrap().to_owned(), text));
            }
        }
    }
    let mut found = Vec::new();
    folders.iter().for_each(|folder| walk(&root().join(folder), endings, &mut found));
    found.sort();
    assert!(!found.is_empty(), "no file in {folders:?}");
    found
}

/// Parts a line of Rust into code without strings, and comment. A string over several lines counts as code.
fn parts(line: &str) -> (String, &str) {
    let (mut code, mut in_string) = (String::new(), false);
    let mut characters = line.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' if line[..at].ends_with('\'') => {}
            '"' => in_string = !in_string,
            '\\' if in_string => drop(characters.next()),
            '/' if !in_string && line[at..].starts_with("//") => return (code, &line[at..]),
            _ if !in_string => code.push(character),
            _ => {}
        }
    }
    (code, "")
}

fn is_word(character: char) -> bool {
    character.is_alphanumeric() || character == '_'
}

/// The words of a line, each with the text before it.
fn words(line: &str) -> impl Iterator<Item = (&str, &str)> {
    line.split(|character| !is_word(character)).filter(|word| !word.is_empty()).map(|word| {
        let start = word.as_ptr().addr() - line.as_ptr().addr();
        (&line[..start], word)
    })
}

/// Opening lines of doc comments that start with one of [`OPENINGS`].
fn openings(text: &str) -> Vec<usize> {
    let doc = |line: &str| {
        ["/// ", "//! "].iter().find_map(|sign| line.trim_start().strip_prefix(sign).map(str::to_owned))
    };
    let lines: Vec<Option<String>> = text.lines().map(doc).collect();
    let opens = |i: &usize| {
        let first = i.checked_sub(1).is_none_or(|before| lines[before].is_none());
        let word = lines[*i].as_deref().and_then(|line| words(line).next());
        first && word.is_some_and(|(before, word)| before.is_empty() && OPENINGS.contains(&word))
    };
    (0..lines.len()).filter(opens).collect()
}

/// Lines with an unsafe block or implementation that no SAFETY comment precedes.
fn undocumented_unsafe(text: &str) -> Vec<usize> {
    let lines: Vec<&str> = text.lines().collect();
    let is_bare = |i: &usize| {
        let (code, _) = parts(lines[*i]);
        let needs_reason = words(&code).any(|(before, word)| {
            let rest = code[before.len() + word.len()..].trim_start();
            let declares = rest.starts_with("fn")
                || rest.starts_with("extern") && rest.contains("fn")
                || rest.starts_with("(");
            word == "unsafe" && !declares
        });
        needs_reason
            && !lines[i.saturating_sub(SAFETY_LINES)..=*i].iter().any(|line| line.contains("// SAFETY:"))
    };
    (0..lines.len()).filter(is_bare).collect()
}

/// Names of [`REPLACED`] in a line of code.
fn replaced(code: &str) -> Vec<(&'static str, &'static str)> {
    let names = words(code).filter_map(|(before, word)| {
        let found = REPLACED.iter().find(|(name, _)| *name == word)?;
        let is_item = ITEMS.iter().any(|item| before.ends_with(item));
        (word.starts_with(char::is_uppercase) || word.contains('_') || is_item).then_some(*found)
    });
    names.collect()
}

/// `file:line: text` of each of `lines` (from 0 on).
fn listed(path: &Path, text: &str, lines: Vec<usize>) -> Vec<String> {
    let line =
        |i: usize| format!("{}:{}: {}", path.display(), i + 1, text.lines().nth(i).unwrap_or("").trim());
    lines.into_iter().map(line).collect()
}

fn rust() -> Vec<(PathBuf, String)> {
    files(&["src", "tests", "benches"], &["rs"])
}

#[test]
fn few_doc_comments_open_with_a_pronoun() {
    let found: Vec<String> =
        rust().iter().flat_map(|(path, text)| listed(path, text, openings(text))).collect();
    assert!(
        found.len() <= MOST_OPENINGS,
        "{} of at most {MOST_OPENINGS}:\n{}",
        found.len(),
        found.join("\n")
    );
}

#[test]
fn comments_fit_their_columns() {
    let others = files(
        &["src", "tests", "benches", "launch", "ci", "configs"],
        &["cu", "cpp", "sh", "sbatch", "py", "yaml"],
    );
    let signs =
        |path: &Path| if path.extension().is_some_and(|e| e == "cu" || e == "cpp") { "//" } else { "#" };
    let is_long = |line: &str, comment: bool| comment && line.chars().count() > COLUMNS;
    let mut found = Vec::new();
    for (path, text) in rust() {
        let long = text.lines().enumerate().filter(|(_, line)| is_long(line, !parts(line).1.is_empty()));
        found.extend(listed(&path, &text, long.map(|(i, _)| i).collect()));
    }
    for (path, text) in others {
        let sign = signs(&path);
        let long =
            text.lines().enumerate().filter(|(_, line)| is_long(line, line.trim_start().starts_with(sign)));
        found.extend(listed(&path, &text, long.map(|(i, _)| i).collect()));
    }
    assert!(
        found.is_empty(),
        "{} comments of more than {COLUMNS} columns:\n{}",
        found.len(),
        found.join("\n")
    );
}

#[test]
fn every_unsafe_block_says_why_it_is_sound() {
    let found: Vec<String> =
        rust().iter().flat_map(|(path, text)| listed(path, text, undocumented_unsafe(text))).collect();
    assert!(found.is_empty(), "{} without SAFETY:\n{}", found.len(), found.join("\n"));
}

#[test]
fn no_replaced_name_is_left() {
    let mut found = Vec::new();
    for (path, text) in files(&["src"], &["rs"]) {
        for (i, line) in text.lines().enumerate() {
            let names = replaced(&parts(line).0).into_iter();
            found.extend(names.map(|(old, new)| format!("{}:{}: {old} is {new}", path.display(), i + 1)));
        }
    }
    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn breaches_are_found() {
    assert_eq!(openings("/// What is\n/// Of it\nfn f() {}\n/// Whatever\nfn g() {}\n/// Of\n"), [0, 5]);
    assert_eq!(parts("let x = \"// no\"; // yes"), ("let x = ; ".into(), "// yes"));
    assert_eq!(parts("let x = '\"'; // \"yes\""), ("let x = ''; ".into(), "// \"yes\""));
    let bare = "unsafe { f() }\nunsafe fn f() {}\nunsafe extern \"C\" fn g() {}\n// unsafe {\n";
    assert_eq!(undocumented_unsafe(bare), [0]);
    assert_eq!(
        undocumented_unsafe("// SAFETY: it is.\nunsafe impl Send for X {}\n\n\n\n\n\n\n\n\nunsafe { }"),
        [10]
    );
    assert_eq!(replaced("struct Ring; let ring = Ring::new(thin); fn thin() {}").len(), 3);
    assert_eq!(replaced("let walk = stepping.position; fn backward() {}"), []);
}
