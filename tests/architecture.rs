//! The map in `src/lib.rs` names every room, and a room imports only rooms below it.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

/// Imported by the rooms at the top only; imports the errors of all rooms.
const ERROR: &str = "error";
const IMPORT_ERROR: [&str; 4] = ["cli", "server", "train", "infer"];

fn source() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

/// Rooms in the order of the map.
fn map() -> Vec<String> {
    let lib = fs::read_to_string(source().join("lib.rs")).unwrap();
    let rooms = lib.lines().filter_map(|line| line.strip_prefix("//! - [`")?.split('`').next());
    rooms.map(str::to_owned).collect()
}

/// Every .rs file below `folder`.
fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let all = entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] });
    all.filter(|path| path.extension().is_some_and(|extension| extension == "rs")).collect()
}

/// The room of a file: its folder below src, or its own name.
fn room(file: &Path) -> String {
    let below = file.strip_prefix(source()).unwrap().components().next().unwrap();
    below.as_os_str().to_str().unwrap().trim_end_matches(".rs").to_owned()
}

/// Code without comments and without its tests, which stand last.
fn code(text: &str) -> String {
    let lines: String =
        text.lines().map(|line| line.split("//").next().unwrap_or("").to_owned() + "\n").collect();
    let tests = ["mod tests {", "mod testing {"].map(|module| lines.find(&format!("#[cfg(test)]\n{module}")));
    let end =
        tests.into_iter().flatten().min().or_else(|| lines.find("#[cfg(test)]\npub(crate) mod testing {"));
    lines[..end.unwrap_or(lines.len())].to_owned()
}

/// First segments of the paths behind `crate::`, those of import trees included.
fn imports(code: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    for (at, _) in code.match_indices("crate::") {
        if code[..at].ends_with(is_word) {
            continue;
        }
        let rest = &code[at + "crate::".len()..];
        let Some(tree) = rest.strip_prefix('{') else {
            found.insert(rest.chars().take_while(|&c| is_word(c)).collect());
            continue;
        };
        let (mut depth, mut is_first, mut word) = (1, true, String::new());
        for c in tree.chars() {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                _ => {}
            }
            if depth == 1 && is_first && is_word(c) {
                word.push(c);
                continue;
            }
            if !word.is_empty() {
                found.insert(std::mem::take(&mut word));
                is_first = false;
            }
            if depth == 1 && c == ',' {
                is_first = true;
            }
            if depth == 0 {
                break;
            }
        }
    }
    found
}

/// Imports of `room` that the order of `map` forbids: rooms above it, and names that are no room.
fn upward(map: &[String], room: &str, imports: &BTreeSet<String>) -> Vec<String> {
    let place = |name: &str| map.iter().position(|room| room == name);
    let own = place(room).unwrap_or_else(|| panic!("src/lib.rs's map does not name {room}"));
    let is_wrong = |name: &&String| match name.as_str() {
        ERROR | "Error" | "Result" => !IMPORT_ERROR.contains(&room),
        name => place(name).is_none_or(|other| other < own),
    };
    imports.iter().filter(is_wrong).cloned().collect()
}

#[test]
fn a_room_imports_only_rooms_below_it() {
    let map = map();
    let mut arrows = 0;
    for file in files(&source()) {
        let room = room(&file);
        if ["lib", "main", ERROR].contains(&room.as_str()) || file.ends_with("tests.rs") {
            continue;
        }
        let imports = imports(&code(&fs::read_to_string(&file).unwrap()));
        arrows += imports.len();
        let wrong = upward(&map, &room, &imports);
        assert!(wrong.is_empty(), "{}: {room} imports {wrong:?}, which the map has above it", file.display());
    }
    assert!(arrows > 200, "{arrows} imports were found");
}

#[test]
fn the_map_names_every_room() {
    let rooms = map();
    let lib = fs::read_to_string(source().join("lib.rs")).unwrap();
    let modules: BTreeSet<&str> =
        lib.lines().filter_map(|line| line.strip_prefix("pub mod ")?.strip_suffix(';')).collect();
    assert_eq!(rooms.iter().map(String::as_str).collect::<BTreeSet<_>>(), modules);
    assert_eq!(rooms.len(), modules.len(), "a room is named twice");
}

#[test]
fn an_arrow_up_is_found() {
    let text = "use crate::{\n    model::{a, b::{c}},\n    Error, rng::Stream,\n};\n// crate::cli\nfn f() { crate::trace::g(); }\n\
        #[cfg(test)]\nmod tests {\n    use crate::train;\n}\n";
    let imports = imports(&code(text));
    assert_eq!(imports, ["Error", "model", "rng", "trace"].map(str::to_owned).into());
    let map = ["cli", "model", "ops", "trace", "rng", "error"].map(str::to_owned);
    assert_eq!(upward(&map, "ops", &imports), ["Error", "model"]);
    assert_eq!(upward(&map, "ops", &["error".to_owned()].into()), ["error"]);
    assert!(upward(&map, "cli", &imports).is_empty());
    assert_eq!(upward(&map, "cli", &["room".to_owned()].into()), ["room"]);
}
