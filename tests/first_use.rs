//! The program as a newcomer meets it: mistakes are told in a line with place and remedy, what is printed fits a
//! terminal of 80 columns, and the end of a run says what to do next.

use crate::common::{failed, metrics, mpirun, succeeded, tiny::TinyRun, xorl};
use serde_json::{Value, json};
use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
};
use xorl_dist::{comm::FreeMemory, config::Override, data::Tokenizer, device::RankDevice, train::Run};

const COLUMNS: usize = 80;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The lines with which a run ends before it begins, in this process.
fn refused(run: &TinyRun, overrides: &[(&str, &str)]) -> Vec<String> {
    let given = |(field, value): &(&str, &str)| Override {
        field: (*field).to_owned(),
        values: vec![(*value).to_owned()],
    };
    let overrides: Vec<Override> = overrides.iter().map(given).collect();
    let error = Run::prepare(&run.at("run.yaml"), &overrides, 1).and_then(|mut run| run.start_afresh());
    let error = error.expect_err("the run is refused");
    assert_eq!(error.exit_code(), 2, "{error}");
    error.lines("").lines().map(str::to_owned).collect()
}

/// `text` in place of the run's configuration from `line` on, counted from 1.
fn edit(run: &TinyRun, from: &str, to: &str) -> usize {
    let path = run.at("run.yaml");
    let text = fs::read_to_string(&path).unwrap();
    let line = 1 + text.lines().position(|line| line.contains(from)).expect(from);
    fs::write(&path, text.replacen(from, to, 1)).unwrap();
    line
}

/// A run on chats, with a tokenizer and a chat template beside the model's config.
fn chatty() -> TinyRun {
    let run = TinyRun::new();
    let data = root().join("tests/data/chat");
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        fs::copy(data.join("byte_level").join(file), run.at(file)).unwrap();
    }
    fs::copy(data.join("templates/chatml.jinja"), run.at("chat_template.jinja")).unwrap();
    let chat = |i: usize| {
        let turn = |role: &str, content: String| json!({"role": role, "content": content});
        json!({"messages": [turn("user", format!("Say {i}.")), turn("assistant", format!("It is {i}."))]})
    };
    let rows: String = (0..30).map(|i| chat(i).to_string() + "\n").collect();
    fs::write(run.at("chats.jsonl"), rows).unwrap();
    edit(&run, "rows.jsonl, type: tokenized", "chats.jsonl, type: chat");
    run
}

#[test]
fn a_mistake_in_a_field_is_one_line_with_place_and_remedy() {
    // In the section of the text that is replaced: the text, its replacement, the field, words of the line.
    let (train, lora, model) = ("  lr: 5e-3", "  lora_alpha: 8", "model:");
    let cases: &[(&str, &str, &str, &[&str])] = &[
        (train, "  learning_rate: 1e-4", "train.learning_rate", &["learning_rate is train.lr here"]),
        (
            train,
            "  per_device_train_batch_size: 4",
            "train.per_device_train_batch_size",
            &["train.micro_batch_size"],
        ),
        (train, "  warmup_ratio: 0.1", "train.warmup_ratio", &["warmup_ratio is train.lr_warmup_ratio here"]),
        (train, "  warmup_steps: 3", "train.warmup_steps", &["warmup_steps is train.lr_warmup_steps here"]),
        (train, "  bf16: true", "train.bf16", &["bf16 is train.enable_mixed_precision here"]),
        (train, "  plot_loss: true", "train.plot_loss", &["not needed", "metrics.jsonl"]),
        (train, "  report_to: wandb", "train.report_to", &["is train.use_tensorboard here", "metrics.jsonl"]),
        (train, "  wandb_entity: me", "train.wandb_entity", &["not built", "metrics.jsonl"]),
        (
            train,
            "  gradient_checkpointing: true",
            "train.gradient_checkpointing",
            &["enable_gradient_checkpointing"],
        ),
        (lora, "  r: 8", "lora.r", &["r is lora.lora_rank here"]),
        (lora, "  target_modules: [q_proj]", "lora.target_modules", &["is lora.lora_target_modules here"]),
        (
            model,
            "model:\n  load_in_4bit: true",
            "model.load_in_4bit",
            &["load_in_4bit is lora.enable_qlora here"],
        ),
        (model, "model:\n  base_model: x/y", "model.base_model", &["base_model is model.model_path here"]),
        ("[q_proj, v_proj", "[lm_head, v_proj", "lora.lora_target_modules", &["lm_head", "frozen"]),
        ("[q_proj, v_proj", "[q_porj, v_proj", "lora.lora_target_modules", &["q_porj matches nothing"]),
    ];
    for (from, to, field, words) in cases {
        let run = TinyRun::new();
        let line = edit(&run, from, to) + to.matches('\n').count();
        let told = refused(&run, &[]);
        assert_eq!(told.len(), 1, "{told:?}");
        let place = format!("run.yaml:{line}: {field}: ");
        assert!(told[0].contains(&place), "{place} {told:?}");
        for word in *words {
            assert!(told[0].contains(word), "{word}: {told:?}");
        }
        assert!(!told[0].contains("did you mean"), "{told:?}");
    }
}

#[test]
fn a_path_that_leads_nowhere_is_named_as_what_it_is() {
    let run = TinyRun::new();
    let weights = run.at("model.safetensors");
    let gguf = run.at("model.gguf");
    for file in [&weights, &gguf] {
        fs::write(file, [0u8, 255, 3]).unwrap();
    }
    let (weights, gguf) = (weights.display().to_string(), gguf.display().to_string());
    let data = |path: &str| json!([{"path": path, "type": "tokenized"}]).to_string();
    let rows = run.at("rows.jsonl").display().to_string();
    let cases: &[(&str, &str, &[&str])] = &[
        (
            "model.model_path",
            "HuggingFaceTB/SmolLM2-135M",
            &["no such folder here", "no such model in the cache"],
        ),
        ("model.model_path", &weights, &["a file", "did you mean its folder"]),
        ("model.model_path", &gguf, &["GGUF is not read"]),
        ("model.model_path", "nowhere", &["no such folder", "HF model directory"]),
        ("model.model_path", "~/model", &["~ is not expanded"]),
        ("model.model_path", "models/*", &["a glob"]),
        ("model.config_path", "nowhere", &["no such folder", "config.json"]),
        ("model.tokenizer_path", "nowhere", &["no such folder", "tokenizer.json"]),
        ("model.tokenizer_path", &weights, &["a file", "tokenizer.json"]),
        ("lora.adapter_path", "nowhere", &["no such folder", "PEFT adapter"]),
        ("lora.adapter_path", &weights, &["a file", "PEFT adapter"]),
        ("data", "tatsu-lab/alpaca", &["no such file or folder here", "no such data set in the cache"]),
        ("data", "data/*.jsonl", &["no file matches this glob"]),
        ("data", "nowhere.jsonl", &["no such file or folder"]),
    ];
    for (field, path, words) in cases {
        let set = data(path);
        let given = if *field == "data" { ("data.datasets", set.as_str()) } else { (*field, *path) };
        let told = refused(&run, &[given]);
        assert_eq!(told.len(), 1, "{told:?}");
        let place = if *field == "data" { "--data.datasets[0].path" } else { &format!("--{field}") };
        assert!(told[0].starts_with(&format!("{place}: {path}: ")), "{place}: {told:?}");
        for word in *words {
            assert!(told[0].contains(word), "{word}: {told:?}");
        }
    }
    // In the file, the line of the path itself.
    let line = edit(&run, &format!("[{{path: {rows}"), "\n    - {path: tatsu-lab/alpaca") + 1;
    let text = fs::read_to_string(run.at("run.yaml")).unwrap();
    fs::write(run.at("run.yaml"), text.replace("type: tokenized}]", "type: tokenized}")).unwrap();
    let told = refused(&run, &[]);
    assert!(
        told[0].contains(&format!("run.yaml:{line}: data.datasets[0].path: tatsu-lab/alpaca: ")),
        "{told:?}"
    );
}

#[test]
fn steps_that_exist_are_told_before_the_data_are_read_and_by_check() {
    let run = TinyRun::new();
    let step = run.step("out", 5);
    fs::create_dir_all(&step).unwrap();
    let said = |output: &std::process::Output| String::from_utf8_lossy(&output.stderr).into_owned();
    let config = run.at("run.yaml").display().to_string();
    let out = run.at("out").display().to_string();
    let mut check = vec!["check", "--config", &config, "--train.output_dir", &out];
    let output = xorl(1, &check);
    succeeded(&output);
    let words = "the run would be refused: ";
    assert!(
        said(&output).contains(words) && said(&output).contains("load_checkpoint_path auto"),
        "{}",
        said(&output)
    );
    check.extend(["--train.overwrite", "true"]);
    assert!(!said(&xorl(1, &check)).contains(words));
    // A step without its files is none to go on from.
    check.extend(["--train.load_checkpoint_path", step.to_str().unwrap()]);
    assert!(failed(&xorl(1, &check), 2).contains("is not a whole step"));

    fs::write(run.at("rows.jsonl"), "{").unwrap();
    let line = failed(&run.run(1, "out", &[]), 2);
    assert!(line.contains("holds steps of an earlier run"), "{line}");
}

#[test]
fn all_mistakes_of_a_file_are_told_at_once() {
    let run = TinyRun::new();
    let lines = [
        edit(&run, "  config_path:", "  tokenizer_path: nowhere\n  config_path:"),
        edit(&run, "sample_packing_method: none", "sample_packing_method: some"),
        edit(&run, "  lr: 5e-3", "  learning_rate: 5e-3"),
        edit(&run, "  lora_rank: 4", "  lora_rank: four"),
    ];
    let output =
        xorl(1, &["check", "--config", run.at("run.yaml").to_str().unwrap(), "--train.max_steps", "x"]);
    assert_eq!(output.status.code(), Some(2));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let told: Vec<&str> = said.lines().collect();
    assert_eq!(told.len(), 5, "{said}");
    for (line, told) in lines.iter().zip(&told) {
        assert!(
            told.starts_with("error: ") && told.contains(&format!("run.yaml:{line}: ")),
            "{line}: {said}"
        );
    }
    assert!(told[4].starts_with("error: --train.max_steps: expected a whole number"), "{said}");
}

#[test]
fn mpi_a_wrong_command_line_is_told_once() {
    let output = xorl(2, &["--frobnicate"]);
    let line = failed(&output, 2);
    assert!(line.contains("--frobnicate"), "{line}");
    let run = TinyRun::new();
    let ignored = run.run(2, "out", &["--train.gc_steps", "5", "--train.max_steps", "1"]);
    succeeded(&ignored);
    let said = String::from_utf8_lossy(&ignored.stderr).into_owned();
    assert_eq!(said.matches("train.gc_steps: ignored").count(), 1, "{said}");
}

#[test]
fn a_batch_script_outside_slurm_says_a_sentence() {
    for script in ["node", "nodes", "sweep"] {
        let mut command = Command::new("bash");
        command.arg(root().join(format!("launch/slurm/{script}.sbatch"))).env_remove("SLURM_JOB_ID");
        let output = command.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
        assert!(said.contains("sbatch launch/slurm/") && said.contains("launch/mpirun.sh"), "{said}");
    }
}

#[test]
fn the_end_of_a_run_says_where_the_adapter_is_and_how_to_try_it() {
    let run = chatty();
    let more = ["--train.max_steps", "40", "--train.num_train_epochs", "1", "--lora.save_lora_only", "false"];
    edit(&run, "  save_total_limit: null", "");
    let output = run.run(1, "out", &more);
    succeeded(&output);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    // The data repeat, three steps stay, an epoch is short, and nothing has a colour.
    for words in [
        "train.max_steps 40 is more than the 8 steps of train.num_train_epochs 1: the data repeats",
        "the newest 3 saves stay (train.save_total_limit)",
        "an epoch is 8 steps only (30 rows",
        "1 rank (",
    ] {
        assert!(said.contains(words), "{words}: {said}");
    }
    assert_eq!(run.steps("out"), [30, 35, 40]);
    assert!(!said.contains('\u{1b}'), "{said}");
    let (step, dir) = (run.step("out", 40), run.run_dir("out"));
    let last = said.lines().last().unwrap();
    assert!(last.contains(&format!("done: the adapter is {}; try: ", step.display())), "{last}");
    assert!(
        last.ends_with(&format!("xorl-dist generate --adapter {} --chat 'Hello'", dir.display())),
        "{last}"
    );
    let note = fs::read_to_string(step.join("model/README.md")).unwrap();
    assert!(note.contains("unmerged"), "{note}");

    // The command works as printed, on the run, its output directory, and the step: the base is the adapter's.
    let answer = |adapter: &Path| {
        let adapter = adapter.to_str().unwrap();
        let output = xorl(1, &["generate", "--adapter", adapter, "--chat", "Hello", "--max-new-tokens", "4"]);
        succeeded(&output);
        output.stdout
    };
    let expected = answer(&step);
    for adapter in [&dir, &dir.join("latest"), &run.at("out")] {
        assert_eq!(answer(adapter), expected, "{adapter:?}");
    }
    fs::remove_dir_all(step.join("model")).unwrap();
    let line = failed(&xorl(1, &["generate", "--adapter", dir.to_str().unwrap(), "--chat", "Hello"]), 2);
    assert!(line.contains("base_model_name_or_path") && line.contains("give --model DIR"), "{line}");
}

#[test]
fn check_shows_rows_as_the_model_sees_them() {
    let run = chatty();
    let output = xorl(1, &["check", "--config", run.at("run.yaml").to_str().unwrap(), "--show-samples", "2"]);
    succeeded(&output);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let (_, rows) = said.split_once("== row 1: ").expect(&said);
    assert!(rows.contains("== row 2: ") && !rows.contains("== row 3: "), "{rows}");
    let mark = |c: char| c == '⟦' || c == '⟧';
    let text = rows.split("== row 2").next().unwrap();
    // What transformers renders, see tests/chat_template.rs, with the assistant's turn and its end marked.
    let number: String =
        text.split("Say ").nth(1).unwrap().chars().take_while(char::is_ascii_digit).collect();
    assert!(
        text.contains(&format!("<|im_start|>user\nSay {number}.<|im_end|>\n<|im_start|>assistant\n⟦It is"))
    );
    let marked = text.split(mark).nth(1).unwrap();
    assert_eq!(marked.trim_end(), format!("It is {number}.<|im_end|>"), "{text}");
    let tokenizer = Tokenizer::load(&run.at("")).unwrap();
    let trained = tokenizer.encode(marked).unwrap().len();
    assert!(text.lines().next().unwrap().ends_with(&format!("{trained} with loss")), "{text}");
}

/// The default of the packing length, in a model that takes `longest` tokens.
#[test]
fn packs_are_as_long_as_the_model_takes_but_not_longer_than_2048() {
    for (longest, given, expected) in
        [(Some(24), None, 24), (Some(4096), None, 2048), (None, None, 2048), (Some(24), Some("32"), 32)]
    {
        let run = TinyRun::new();
        let text = fs::read_to_string(run.at("config.json")).unwrap();
        let mut model: Value = serde_json::from_str(&text).unwrap();
        model["max_position_embeddings"] = json!(longest);
        fs::write(run.at("config.json"), model.to_string()).unwrap();
        edit(&run, "packing_method: none", "packing_method: sequential");
        let length = given.map(|given: &str| Override {
            field: "data.sample_packing_sequence_len".into(),
            values: vec![given.into()],
        });
        let prepared = Run::prepare(&run.at("run.yaml"), length.as_slice(), 1).unwrap();
        let free = FreeMemory::supposed(&RankDevice::host(), 1).unwrap();
        let report = prepared.report(None, &free).unwrap();
        let line = format!("sample_packing_sequence_len: {expected}\n");
        assert!(report.contains(&line), "{longest:?} {given:?}: {report}");
    }
}

/// Tokens of the data, counted in its file, against those of an epoch's steps.
#[test]
fn mpi_the_rate_of_packed_rows_leaves_padding_out() {
    let run = TinyRun::new();
    let rows = fs::read_to_string(run.at("rows.jsonl")).unwrap();
    let tokens =
        |line: &str| serde_json::from_str::<Value>(line).unwrap()["input_ids"].as_array().unwrap().len();
    let expected: usize = rows.lines().map(tokens).sum();
    let packed = "--data.sample_packing_method sequential --data.sample_packing_sequence_len 32 \
                  --data.pad_to_multiple_of 16 --train.num_train_epochs 1 --train.max_steps null \
                  --train.global_batch_size 4";
    let packed: Vec<&str> = packed.split_whitespace().collect();
    for ranks in [1, 2] {
        let out = format!("{ranks} ranks");
        succeeded(&run.run(ranks, &out, &packed));
        let (mut total, mut padding) = (0, 0);
        for step in metrics(&run.at(&out)) {
            let count = |field: &str| step[field].as_u64().unwrap() as usize;
            total += count("tokens_total");
            padding += count("tokens_padding");
            let counted = (count("tokens_total") - count("tokens_padding")) as f64;
            let rated = step["tokens_per_second"].as_f64().unwrap() * step["step_seconds"].as_f64().unwrap();
            assert!((rated - counted).abs() < 1e-6 * counted, "{step}");
        }
        assert!(total.is_multiple_of(16) && padding > 0, "{total} tokens, {padding} of padding");
        assert_eq!(total - padding, expected, "{ranks} ranks");
    }
}

/// A terminal of [`COLUMNS`] columns: the rows that `bytes` leave on it, and whether a row goes on in the next.
fn terminal(bytes: &[u8]) -> Vec<(String, bool)> {
    let text = String::from_utf8_lossy(bytes);
    let mut rows = vec![(vec![' '; COLUMNS], false)];
    let mut column = 0usize;
    let mut characters = text.chars();
    while let Some(character) = characters.next() {
        match character {
            '\r' => column = 0,
            '\n' => {
                rows.push((vec![' '; COLUMNS], false));
                column = 0;
            }
            '\u{8}' => column = column.saturating_sub(1),
            // A colour: up to its letter.
            '\u{1b}' => drop(characters.by_ref().find(char::is_ascii_alphabetic)),
            _ => {
                if column == COLUMNS {
                    rows.last_mut().unwrap().1 = true;
                    rows.push((vec![' '; COLUMNS], false));
                    column = 0;
                }
                rows.last_mut().unwrap().0[column] = character;
                column += 1;
            }
        }
    }
    let text = |row: Vec<char>| row.into_iter().collect::<String>().trim_end().to_owned();
    rows.into_iter().map(|(row, goes_on)| (text(row), goes_on)).collect()
}

/// Lines of a terminal, of one or more rows.
fn lines(bytes: &[u8]) -> Vec<String> {
    let (mut lines, mut line) = (Vec::new(), String::new());
    for (row, goes_on) in terminal(bytes) {
        line += &row;
        if goes_on {
            line += &" ".repeat(COLUMNS.saturating_sub(row.chars().count()));
        } else {
            lines.push(std::mem::take(&mut line));
        }
    }
    lines
}

/// Bytes that `command` writes to a terminal.
fn on_terminal(command: &Command, no_color: bool) -> Vec<u8> {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let words: Vec<String> = words.map(|word| format!("'{}'", word.to_str().unwrap())).collect();
    let line = format!("stty cols {COLUMNS} rows 24; exec {}", words.join(" "));
    let mut script = Command::new("script");
    script.args(["-qec", &line, "/dev/null"]).env("TERM", "xterm").stdin(Stdio::null());
    script.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    if no_color {
        script.env("NO_COLOR", "1");
    } else {
        script.env_remove("NO_COLOR");
    }
    let output = script.output().unwrap();
    succeeded(&output);
    output.stdout
}

fn is_bar(line: &str) -> bool {
    line.contains("/20 [") && !line.contains("[STEP")
}

#[test]
fn a_terminal_of_80_columns_shows_bar_and_log_lines_whole_also_after_a_resume() {
    let run = TinyRun::new();
    let first = on_terminal(&run.command(1, "out", &["--train.max_steps", "10"]), false);
    assert!(String::from_utf8_lossy(&first).contains('\u{1b}'), "colours on a terminal");
    let auto = ["--train.load_checkpoint_path", "auto"];
    let bytes = on_terminal(&run.command(1, "out", &auto), true);
    let text = String::from_utf8_lossy(&bytes).into_owned();
    assert!(!text.contains('\u{1b}'), "NO_COLOR: {text}");
    let lines = lines(&bytes);
    let shown = lines.join("\n");
    let bars: Vec<&String> = lines.iter().filter(|line| is_bar(line)).collect();
    assert_eq!(bars.len(), 1, "{shown}");
    assert!(
        bars[0].starts_with("####") && bars[0].contains("20/20 [00:0") && bars[0].contains("<00:00] loss=")
    );
    assert!(bars[0].len() < COLUMNS, "{shown}");
    for step in [15, 20] {
        let saved = format!("saved {}", run.step("out", step).display());
        assert_eq!(lines.iter().filter(|line| line.ends_with(&saved)).count(), 1, "{saved}: {shown}");
    }
    assert!(lines.iter().any(|line| line.contains("done: the adapter is ")), "{shown}");
    for line in lines.iter().filter(|line| !is_bar(line) && !line.is_empty()) {
        assert!(line.starts_with("20"), "a log line with its time, and nothing before it: {line:?}\n{shown}");
    }
    // Right after the resume the time that is left is that of ten steps of a few milliseconds.
    let drawn: Vec<&str> = text.split('\r').filter(|bar| bar.contains("/20 [")).collect();
    assert!(drawn[0].contains("10/20 [00:00<?]"), "{drawn:?}");
    let eleventh = drawn.iter().find(|bar| bar.contains("11/20 [")).unwrap();
    assert!(eleventh.contains("<00:0"), "{eleventh}");
}

#[test]
fn mpi_ranks_on_a_terminal_leave_whole_lines_with_the_time_that_is_left() {
    let run = TinyRun::new();
    let mut command = mpirun();
    command.args(["-n", "2", env!("CARGO_BIN_EXE_xorl-dist")]).args(run.arguments("out", &[]));
    let bytes = on_terminal(&command, true);
    let lines = lines(&bytes);
    let shown = lines.join("\n");
    assert!(!lines.iter().any(|line| is_bar(line)) && !shown.contains('\u{1b}'), "{shown}");
    // The steps take less than ten seconds: the first and the last are told.
    let steps: Vec<&String> = lines.iter().filter(|line| line.starts_with("[STEP ")).collect();
    assert!((2..20).contains(&steps.len()), "{shown}");
    let (first, last) = (steps[0], steps[steps.len() - 1]);
    assert!(first.starts_with("[STEP 1/20] loss=") && first.contains(" eta=0"), "{shown}");
    assert!(last.starts_with("[STEP 20/20] loss=") && last.ends_with(" eta=00:00"), "{shown}");
    let saved = format!("saved {}", run.step("out", 20).display());
    assert!(lines.iter().any(|line| line.ends_with(&saved)), "{shown}");
}
