//! The README is short and in order, its configuration loads, its links lead somewhere, and its commands run as
//! printed: the quick ones here on a tiny model, all of them by `ci/long.sh readme` from a fresh clone. A block that
//! needs a GPU, another host, a slurm cluster or more cores says so in its first line and is only parsed.

use crate::common::tiny::copy_tree;
use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Command, Output},
    time::Instant,
};
use xorl_dist::rng::Stream;

const SECTIONS: [&str; 11] = [
    "The two commands",
    "Install",
    "Your first run",
    "Commands",
    "Launching",
    "Parallelism in one picture",
    "LoRA targets and formats",
    "Speed",
    "When something is wrong",
    "Limits",
    "Contributing",
];

/// Reasons for which a block is only parsed; its first line begins with one.
const NEEDS: [&str; 4] =
    ["# needs a GPU", "# needs another host", "# needs a slurm cluster", "# needs more cores"];

/// Commands that install, build or take minutes: only `ci/long.sh readme` runs their blocks.
const LONG: [&str; 4] = ["launch/setup.sh", "launch/quickstart.sh", "ci/test.sh", "cargo "];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn readme() -> String {
    fs::read_to_string(root().join("README.md")).unwrap()
}

/// A fenced block.
struct Block {
    /// Line of its opening fence, from 1.
    line: usize,
    language: String,
    text: String,
}

impl Block {
    fn needs_what_is_not_here(&self) -> bool {
        NEEDS.iter().any(|reason| self.text.starts_with(reason))
    }

    fn is_long(&self) -> bool {
        LONG.iter().any(|command| self.text.contains(command))
    }

    /// The name of a file to save the block as: `# run.yaml` in its first line.
    fn file_name(&self) -> Option<&str> {
        if self.language == "yaml" { self.text.lines().next()?.strip_prefix("# ") } else { None }
    }
}

/// The fenced blocks of a page, in order.
fn blocks(page: &str) -> Vec<Block> {
    let mut found: Vec<Block> = Vec::new();
    let mut inside = false;
    for (index, line) in page.lines().enumerate() {
        match line.strip_prefix("```") {
            Some(_) if inside => inside = false,
            Some(language) => {
                inside = true;
                found.push(Block { line: index + 1, language: language.into(), text: String::new() });
            }
            None if inside => found.last_mut().unwrap().text += &format!("{line}\n"),
            None => {}
        }
    }
    assert!(!inside, "the last block of the README is not closed");
    found
}

fn of_language<'a>(blocks: &'a [Block], language: &str) -> Vec<&'a Block> {
    blocks.iter().filter(|block| block.language == language).collect()
}

/// A script that pastes `blocks` into one shell, as a reader does, and ends at the first command that fails. Blocks
/// that name a file are saved into `folder` before.
fn script(blocks: &[&Block], folder: &Path) -> String {
    let mut script = "set -euo pipefail\n".to_owned();
    for block in blocks {
        if let Some(name) = block.file_name() {
            fs::write(folder.join(name), &block.text).unwrap();
        } else if block.language == "sh" {
            script += &format!("echo '== README.md:{}'\n{}", block.line, block.text);
        }
    }
    script
}

/// A shell in `folder` that knows nothing of this session: neither what tests set for mpirun, nor programs to use.
fn fresh_shell(folder: &Path, home: &Path, script: &str) -> Command {
    let mut shell = Command::new("bash");
    shell.args(["-c", script]).current_dir(folder).env("HOME", home);
    for (name, _) in std::env::vars() {
        let ours = ["OMPI_", "OMP_", "XORL_", "CARGO_MANIFEST", "CARGO_PKG", "NEXTEST"];
        if ours.iter().any(|prefix| name.starts_with(prefix)) {
            shell.env_remove(name);
        }
    }
    shell
}

fn text(output: &Output) -> String {
    [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned()).concat()
}

#[test]
fn the_readme_is_read_in_five_minutes() {
    let page = readme();
    let lines = page.lines().count();
    assert!(lines <= 200 && page.len() <= 14 << 10, "{lines} lines, {} bytes", page.len());
}

#[test]
fn its_sections_stand_in_their_order() {
    let page = readme();
    // Comments of shell blocks begin with one #, not two.
    let sections: Vec<&str> = page.lines().filter_map(|line| line.strip_prefix("## ")).collect();
    assert_eq!(sections, SECTIONS);
}

#[test]
fn its_links_lead_to_files_of_the_repository() {
    let pages = [
        "README.md",
        "benches/README.md",
        "tests/README.md",
        "launch/README.md",
        "configs/README.md",
        "configs/server/README.md",
        "configs/server/examples/README.md",
    ];
    let mut links = 0;
    for page in pages.map(|page| root().join(page)) {
        let text = fs::read_to_string(&page).unwrap();
        let targets = text.split("](").skip(1).filter_map(|rest| rest.split_once(')'));
        for (target, _) in targets.filter(|(target, _)| !target.starts_with("http")) {
            assert!(page.parent().unwrap().join(target).exists(), "{}: {target}", page.display());
            links += 1;
        }
    }
    assert!(links >= 8, "{links}");
}

#[test]
fn its_configuration_loads_and_its_paths_exist_after_the_quickstart() {
    let blocks = blocks(&readme());
    let yaml = of_language(&blocks, "yaml");
    assert_eq!(yaml.len(), 1);
    let name = yaml[0].file_name().unwrap();
    let loaded = xorl_dist::config::load_yaml(Path::new(name), &yaml[0].text, &[]).unwrap();
    assert!(loaded.warnings.is_empty(), "{:?}", loaded.warnings);
    let quickstart = fs::read_to_string(root().join("launch/quickstart.sh")).unwrap();
    let model = loaded.config.model.model_path.unwrap();
    assert!(quickstart.contains(&format!("\nMODEL={}\n", model.display())), "{}", model.display());
    for data in loaded.config.data.datasets {
        assert!(root().join(&data.path).is_file(), "{}", data.path.display());
    }
}

#[test]
fn each_command_block_parses_and_names_files_that_exist() {
    let blocks = blocks(&readme());
    for block in &blocks {
        let known = ["sh", "yaml", "jsonl", "text"].contains(&block.language.as_str());
        assert!(known, "README.md:{}: language {:?}", block.line, block.language);
    }
    let commands = of_language(&blocks, "sh");
    assert!(commands.len() >= 7, "{}", commands.len());
    for block in commands {
        let parsed = Command::new("bash").args(["-n", "-c", &block.text]).output().unwrap();
        assert!(parsed.status.success(), "README.md:{}: {}", block.line, text(&parsed));
        for word in block.text.split_whitespace() {
            if ["launch/", "ci/", "configs/", "tests/"].iter().any(|folder| word.starts_with(folder)) {
                assert!(root().join(word).exists(), "README.md:{}: {word}", block.line);
            }
        }
        for line in block.text.lines().filter(|line| line.starts_with("# needs")) {
            let reason = NEEDS.iter().any(|reason| line.starts_with(reason));
            assert!(reason && block.needs_what_is_not_here(), "README.md:{}: {line}", block.line);
        }
    }
}

#[test]
fn the_first_mpirun_has_what_root_and_two_cores_need() {
    let blocks = blocks(&readme());
    let commands: String = of_language(&blocks, "sh").iter().map(|block| block.text.as_str()).collect();
    let (before, _) = commands.split_once("mpirun.sh ").unwrap();
    assert!(!before.contains("\nmpirun "));
    for name in [
        "OMPI_ALLOW_RUN_AS_ROOT=1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1",
        "OMPI_MCA_rmaps_base_oversubscribe=1",
        "OMP_NUM_THREADS=1",
    ] {
        assert!(before.contains(name), "{name} is set before the first mpirun");
    }
}

/// A Llama with random weights and a chat template, in place of the quickstart's model.
fn make_model(folder: &Path) {
    const VOCAB: usize = 437;
    const HIDDEN: usize = 32;
    const WIDE: usize = 48;
    fs::create_dir_all(folder).unwrap();
    let chat = root().join("tests/data/chat");
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        fs::copy(chat.join("byte_level").join(file), folder.join(file)).unwrap();
    }
    fs::copy(chat.join("templates/chatml.jinja"), folder.join("chat_template.jinja")).unwrap();
    let config = json!({"model_type": "llama", "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": WIDE,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "tie_word_embeddings": true});
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let layer = |name: &str| format!("model.layers.0.{name}.weight");
    let shapes = [
        ("model.embed_tokens.weight".to_owned(), vec![VOCAB, HIDDEN]),
        ("model.norm.weight".to_owned(), vec![HIDDEN]),
        (layer("input_layernorm"), vec![HIDDEN]),
        (layer("post_attention_layernorm"), vec![HIDDEN]),
        (layer("self_attn.q_proj"), vec![HIDDEN, HIDDEN]),
        (layer("self_attn.k_proj"), vec![HIDDEN, HIDDEN]),
        (layer("self_attn.v_proj"), vec![HIDDEN, HIDDEN]),
        (layer("self_attn.o_proj"), vec![HIDDEN, HIDDEN]),
        (layer("mlp.gate_proj"), vec![WIDE, HIDDEN]),
        (layer("mlp.up_proj"), vec![WIDE, HIDDEN]),
        (layer("mlp.down_proj"), vec![HIDDEN, WIDE]),
    ];
    let values: BTreeMap<String, (Vec<usize>, Vec<u8>)> = shapes
        .into_iter()
        .map(|(name, shape)| {
            let stream = Stream::new(5, &name);
            let count = shape.iter().product::<usize>() as u64;
            let bytes = (0..count).flat_map(|i| (0.1 * stream.normal(i)).to_le_bytes()).collect();
            (name, (shape, bytes))
        })
        .collect();
    let views = values
        .iter()
        .map(|(name, (shape, bytes))| (name, TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap()));
    safetensors::serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
}

/// A folder as the quickstart leaves it: scripts, configurations, part of the data, a model, and the program on PATH.
fn after_the_quickstart(folder: &Path) {
    copy_tree(&root().join("launch"), &folder.join("launch"));
    for name in ["configs", "tests"] {
        symlink(root().join(name), folder.join(name)).unwrap();
    }
    let data = folder.join("launch/quickstart/data/train.jsonl");
    let rows = fs::read_to_string(&data).unwrap();
    fs::write(&data, rows.split_inclusive('\n').take(80).collect::<String>()).unwrap();
    make_model(&folder.join("models/smollm2"));
    fs::create_dir_all(folder.join("home/.local/bin")).unwrap();
    symlink(env!("CARGO_BIN_EXE_xorl-dist"), folder.join("home/.local/bin/xorl-dist")).unwrap();
}

#[test]
fn mpi_quick_blocks_run_as_printed_and_leave_what_is_said() {
    let blocks = blocks(&readme());
    let quick: Vec<&Block> =
        blocks.iter().filter(|block| !block.is_long() && !block.needs_what_is_not_here()).collect();
    let commands: String = quick.iter().map(|block| block.text.as_str()).collect();
    for part in ["check", "--config run.yaml", "generate", "load_checkpoint_path auto", "\nmpirun -n 2"] {
        assert!(commands.contains(part), "{part} is in no quick block");
    }
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    after_the_quickstart(folder.path());
    let path = format!("{}:{}", at("home/.local/bin").display(), std::env::var("PATH").unwrap());
    let shell = |script: &str| {
        let mut shell = fresh_shell(folder.path(), &at("home"), script);
        // The build that is tested, not the release build of a shared target directory.
        shell.env_remove("CARGO_TARGET_DIR").env("PATH", &path).output().unwrap()
    };
    let output = shell(&script(&quick, folder.path()));
    assert!(output.status.success(), "{}", text(&output));

    // The files of the tree; its step is that of the real model.
    let first = at("outputs/first");
    let metrics = crate::common::metrics(&first);
    let epochs: Vec<&Value> = metrics.iter().map(|line| &line["epoch"]).collect();
    assert!(epochs.contains(&&json!(1)), "the resume adds an epoch: {epochs:?}");
    let latest = fs::read_to_string(first.join("weights/run/latest")).unwrap();
    let tree = of_language(&blocks, "text").into_iter().find(|block| block.text.contains("outputs/first"));
    for line in tree.unwrap().text.lines() {
        let line = line.replace("step_23", latest.trim());
        let mut names = line.split("   ").next().unwrap().split_whitespace().map(PathBuf::from);
        let whole = names.next().unwrap();
        assert!(at(whole.to_str().unwrap()).exists(), "{}", whole.display());
        for name in names {
            let sibling = folder.path().join(&whole).with_file_name(&name);
            assert!(sibling.is_file(), "{}", sibling.display());
        }
    }
    for ranks in ["outputs/script", "outputs/plain"] {
        assert_eq!(crate::common::metrics(&at(ranks)).len(), 4, "{ranks}");
    }

    // The rows that show the format.
    let rows = of_language(&blocks, "jsonl")[0];
    fs::write(at("own.jsonl"), &rows.text).unwrap();
    let config = fs::read_to_string(at("run.yaml")).unwrap();
    fs::write(at("own.yaml"), config.replace("launch/quickstart/data/train.jsonl", "own.jsonl")).unwrap();
    let output = shell("xorl-dist check --config own.yaml --data.val_set_size null");
    assert!(
        output.status.success() && text(&output).contains("data: 1 sample, 0 dropped"),
        "{}",
        text(&output)
    );

    // A reader whose data are Alpaca's, as parquet, changes the path alone.
    let rows = root().join("tests/fixtures/data/alpaca/snappy.parquet");
    fs::copy(rows, at("alpaca.parquet")).unwrap();
    let own =
        |text: &str| text.replace("outputs/first", "outputs/own").replace("outputs/merged", "outputs/one");
    let config = own(&config.replace("launch/quickstart/data/train.jsonl", "alpaca.parquet"));
    fs::write(at("run.yaml"), config).unwrap();
    let first = quick.iter().find(|block| block.text.contains("xorl-dist eval")).unwrap();
    let output = shell(&format!("set -euo pipefail\n{}", own(&first.text)));
    assert!(output.status.success(), "{}", text(&output));
    let said = text(&output);
    assert!(said.contains("type alpaca, as its field `instruction` tells"), "{said}");
    for made in ["outputs/own/weights/run/latest", "outputs/one/model.safetensors", "report.html"] {
        assert!(at(made).is_file(), "{made}");
    }
}

/// Clones what is committed and runs the README in it, as someone does who has only the repository. Command lines that
/// contain the text `XORL_README_WITHOUT` are left out, and counted. Torch is installed anew unless LIBTORCH names one,
/// or a venv that has it is active; CARGO_TARGET_DIR is taken as it is.
#[test]
#[ignore = "installs, builds, trains a real model: ci/long.sh readme"]
fn mpi_the_readme_runs_as_printed_from_a_fresh_clone() {
    let begin = Instant::now();
    let folder = tempfile::tempdir().unwrap();
    let (clone, home) = (folder.path().join("xorl-dist"), folder.path().join("home"));
    fs::create_dir(&home).unwrap();
    let cloned = Command::new("git").args(["clone", "--quiet"]).args([root(), &clone]).status().unwrap();
    assert!(cloned.success());

    let without = std::env::var("XORL_README_WITHOUT").unwrap_or_default();
    let mut left_out = 0;
    let mut blocks = blocks(&fs::read_to_string(clone.join("README.md")).unwrap());
    for block in blocks.iter_mut().filter(|block| block.language == "sh" && !without.is_empty()) {
        let (out, kept): (Vec<&str>, Vec<&str>) =
            block.text.split_inclusive('\n').partition(|line| line.contains(&without));
        left_out += out.len();
        block.text = kept.concat();
    }
    // The configuration is saved after the quickstart, before it is used: nothing writes over it.
    let run: Vec<&Block> = blocks.iter().filter(|block| !block.needs_what_is_not_here()).collect();
    let mut shell = fresh_shell(&clone, &home, &script(&run, &clone));
    // Downloads and toolchains are where they were: HOME moves, so that the link on PATH is not the user's.
    let old_home = PathBuf::from(std::env::var_os("HOME").unwrap());
    let places = [("CARGO_HOME", ".cargo"), ("RUSTUP_HOME", ".rustup"), ("PIP_CACHE_DIR", ".cache/pip")];
    for (name, below) in places {
        shell.env(name, std::env::var_os(name).unwrap_or_else(|| old_home.join(below).into()));
    }
    // .cargo/config.toml sets it for this test.
    if std::env::var_os("LIBTORCH").is_some_and(|path| Path::new(&path) == root().join(".venv/torch")) {
        shell.env_remove("LIBTORCH");
    }
    shell.env_remove("LD_LIBRARY_PATH").env_remove("RUSTUP_TOOLCHAIN");
    let status = shell.status().unwrap();
    assert!(status.success(), "{status}: the line above names the block");
    let commands = |blocks: &[&Block]| blocks.iter().filter(|block| block.language == "sh").count();
    let report = json!({"blocks": commands(&blocks.iter().collect::<Vec<_>>()), "run": commands(&run),
        "lines_left_out": left_out, "seconds": begin.elapsed().as_secs()});
    println!("{report}");
}
