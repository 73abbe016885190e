//! `xorl-dist generate` continues as transformers does, with an adapter that PEFT made, on one rank and sharded over
//! several, whatever else is in the batch.

use crate::common::{failed, python, ranks_of, stand_in, succeeded, xorl};
use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Value, json};
use std::{
    io::{Read, Write},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

/// The model that launch/quickstart/convert_smollm2.py makes; ci/test.sh calls it.
fn smollm2() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/smollm2")
}

fn generate(ranks: usize, model: &Path, arguments: &[&str]) -> Output {
    let model = model.display().to_string();
    xorl(ranks, &[&["generate", "--model", &model], arguments].concat())
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn mpi_generates_what_transformers_and_peft_generate() {
    let model = smollm2();
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    let chat = |question: &str, answer: &str| {
        let turn = |role: &str, content: &str| json!({"role": role, "content": content});
        json!({"messages": [turn("user", question), turn("assistant", answer)]}).to_string() + "\n"
    };
    let questions =
        ["What is the capital of France?", "Count: 1, 2, 3", "Write one line about the sea, please."];
    let chats: String = questions.iter().map(|question| chat(question, "I do not know.")).collect();
    std::fs::write(at("chats.jsonl"), chats).unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/oracle/generate.py");
    let oracle = Command::new(python())
        .arg(script)
        .arg(&model)
        .args([&at("adapter"), &at("chats.jsonl"), "16"])
        .env("HF_HUB_OFFLINE", "1")
        .output()
        .unwrap();
    succeeded(&oracle);
    let expected = lines(&text(&oracle.stdout));
    assert_eq!(expected.len(), questions.len());

    for ranks in [1, 2] {
        let out = at(&format!("out{ranks}.jsonl"));
        let output = generate(
            ranks,
            &model,
            &[
                "--dtype",
                "float32",
                "--adapter",
                &at("adapter"),
                "--chat-file",
                &at("chats.jsonl"),
                "--out",
                &out,
                "--max-new-tokens",
                "16",
            ],
        );
        succeeded(&output);
        let stderr = text(&output.stderr);
        let summary = stderr.lines().find(|line| line.contains("3 prompts continued: ")).unwrap();
        let losses = expected.iter().map(|theirs| theirs["loss_sum"].as_f64().unwrap()).sum::<f64>();
        let tokens = expected.iter().map(|theirs| theirs["loss_tokens"].as_u64().unwrap()).sum::<u64>();
        let (_, mean) = summary.split_once("mean loss of the references ").unwrap();
        let (mean, of) = mean.split_once(" over ").unwrap();
        let (ours, theirs) = (mean.parse::<f64>().unwrap(), losses / tokens as f64);
        assert!((ours - theirs).abs() < 1e-3 && of == format!("{tokens} tokens"), "{theirs}: {summary}");
        let ours = lines(&std::fs::read_to_string(&out).unwrap());
        assert_eq!(ours.len(), expected.len());
        for (index, (ours, theirs)) in ours.iter().zip(&expected).enumerate() {
            assert_eq!(ours["prompt_index"], index);
            assert!(theirs["margin"].as_f64().unwrap() > 1e-3, "a near tie decides nothing: {theirs}");
            assert_eq!(ours["completion"], theirs["completion"], "{ranks} ranks");
            assert_eq!(ours["loss_tokens"], theirs["loss_tokens"]);
            let (a, b) = (ours["loss_sum"].as_f64().unwrap(), theirs["loss_sum"].as_f64().unwrap());
            assert!((a - b).abs() < 1e-4 * b, "{ranks} ranks: {a}, transformers {b}");
        }
    }

    // One question on stdout, without an adapter: check_smollm2.py holds transformers to the same answer.
    let arguments = ["--dtype", "float32", "--max-new-tokens", "12", "--chat", questions[0]];
    let output = generate(2, &model, &arguments);
    assert_eq!(text(&output.stdout), "The capital of France is Paris.\n", "{}", text(&output.stderr));

    // As devices compute it, over NCCL: see tests/nccl.rs.
    let folder = tempfile::tempdir().unwrap();
    let mut command = ranks_of(Path::new(env!("CARGO_BIN_EXE_xorl-dist")), 2);
    command.arg("generate").arg("--model").arg(&model).args(arguments).args(["--device", "stand-in"]);
    stand_in(&mut command, folder.path());
    let output = command.output().unwrap();
    assert_eq!(text(&output.stdout), "The capital of France is Paris.\n", "{}", text(&output.stderr));
}

/// The text that `arguments` give on stdout.
fn answer(ranks: usize, model: &Path, arguments: &[&str]) -> String {
    let output =
        generate(ranks, model, &[&["--dtype", "float32", "--max-new-tokens", "12"], arguments].concat());
    succeeded(&output);
    text(&output.stdout)
}

#[test]
fn mpi_tokens_are_chosen_as_the_options_say() {
    let model = smollm2();
    let prompt = ["--prompt", "Once upon a time, a small boat"];
    let with = |more: &[&str]| answer(1, &model, &[&prompt, more].concat());
    let greedy = with(&[]);
    assert!(greedy.len() > 10, "{greedy}");
    assert_eq!(with(&["--temperature", "0"]), greedy);
    assert_eq!(with(&["--temperature", "1.5", "--top-k", "1"]), greedy);
    assert_eq!(with(&["--temperature", "1.5", "--top-p", "0.000001", "--seed", "8"]), greedy);
    let sampled = with(&["--temperature", "1.2", "--seed", "3"]);
    assert_ne!(sampled, greedy);
    assert_ne!(with(&["--temperature", "1.2", "--seed", "4"]), sampled);
    let again = answer(2, &model, &[&prompt[..], &["--temperature", "1.2", "--seed", "3"]].concat());
    assert_eq!(again, sampled, "2 ranks");

    let france = ["--chat", "What is the capital of France?"];
    let stopped = |more: &[&str]| answer(1, &model, &[&france, more].concat());
    assert_eq!(stopped(&["--stop", " is Paris"]), "The capital of France\n");
    assert_eq!(stopped(&["--stop", "Rome", "--stop", "ital"]), "The cap\n");
    assert_eq!(stopped(&["--stop", "Rome"]), "The capital of France is Paris.\n");
}

#[test]
fn mpi_a_chat_keeps_its_history_and_its_system_message() {
    let model = smollm2();
    let folder = tempfile::tempdir().unwrap();
    let chats = folder.path().join("chats.jsonl");
    let turn = |role: &str, content: &str| json!({"role": role, "content": content});
    // The completions of whole chats, which mpi_generates_what_transformers_and_peft_generate holds to transformers.
    let completion = |messages: &[Value]| {
        std::fs::write(&chats, json!({"messages": messages}).to_string() + "\n").unwrap();
        let output = answer(1, &model, &["--chat-file", &chats.display().to_string()]);
        lines(&output)[0]["completion"].as_str().unwrap().to_owned()
    };
    let system = "You are a pirate. Answer like one.";
    let mut history = vec![turn("system", system)];
    let mut expected = Vec::new();
    let questions = ["What is the capital of France?", "Say it in other words.", "Thanks!"];
    for question in questions {
        history.push(turn("user", question));
        let answer = completion(&history);
        history.push(turn("assistant", &answer));
        expected.push(answer);
    }
    assert_eq!(answer(1, &model, &["--system", system, "--chat", questions[0]]), expected[0].clone() + "\n");

    let mut command = ranks_of(Path::new(env!("CARGO_BIN_EXE_xorl-dist")), 1);
    command.arg("generate").arg("--model").arg(&model).args(["--dtype", "float32", "--max-new-tokens", "12"]);
    command.args(["--interactive", "--system", system]);
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let lines = questions.map(|question| question.to_owned() + "\n\n").concat();
    child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    succeeded(&output);
    assert_eq!(text(&output.stdout), expected.join("\n") + "\n");
    let line = failed(&generate(2, &model, &["--interactive"]), 2);
    assert!(line.contains("--interactive takes one rank"), "{line}");
}

#[test]
fn mpi_text_is_shown_while_it_comes() {
    let mut command = ranks_of(Path::new(env!("CARGO_BIN_EXE_xorl-dist")), 1);
    command.arg("generate").arg("--model").arg(smollm2()).args(["--max-new-tokens", "400"]);
    command.args(["--prompt", "Count: 1, 2, 3, 4,"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut first = [0; 8];
    child.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
    assert!(child.try_wait().unwrap().is_none(), "{first:?}");
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn mpi_settings_of_sampling_that_are_not_used_are_told() {
    let model = smollm2();
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(&model).unwrap() {
        let path = std::fs::canonicalize(entry.unwrap().path()).unwrap();
        let name = path.file_name().unwrap();
        if name != "generation_config.json" {
            std::os::unix::fs::symlink(&path, folder.path().join(name)).unwrap();
        }
    }
    let settings =
        json!({"eos_token_id": 2, "do_sample": true, "temperature": 0.6, "top_k": 20, "min_p": null});
    std::fs::write(folder.path().join("generation_config.json"), settings.to_string()).unwrap();
    let arguments = ["--max-new-tokens", "1", "--prompt", "The sea"];
    let told = |more: &[&str]| text(&generate(1, folder.path(), &[&arguments, more].concat()).stderr);
    let stderr = told(&[]);
    assert!(stderr.contains("do_sample true, temperature 0.6, top_k 20 are not used"), "{stderr}");
    assert!(stderr.contains("to sample, --temperature 0.6 --top-k 20"), "{stderr}");
    let stderr = told(&["--temperature", "0.6"]);
    assert!(!stderr.contains("not used"), "{stderr}");
}

/// An adapter of rank 1 on the first q_proj of SmolLM2, all of whose B is `value`; its configuration selects `modules`.
fn adapter_of(folder: &Path, value: f32, modules: Value) {
    let tensor = |name: &str, shape: [usize; 2], values: &[f32]| {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        (format!("base_model.model.model.layers.0.self_attn.q_proj.{name}.weight"), shape.to_vec(), bytes)
    };
    let tensors = [tensor("lora_A", [1, 576], &[0.5; 576]), tensor("lora_B", [576, 1], &[value; 576])];
    let views = tensors
        .iter()
        .map(|(name, shape, bytes)| (name, TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap()));
    let file = safetensors::serialize(views.collect::<Vec<_>>(), None).unwrap();
    std::fs::write(folder.join("adapter_model.safetensors"), file).unwrap();
    let config = json!({"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": modules});
    std::fs::write(folder.join("adapter_config.json"), config.to_string()).unwrap();
}

#[test]
fn mpi_adapters_that_are_not_finite_or_not_whole_are_told() {
    let model = smollm2();
    let folder = tempfile::tempdir().unwrap();
    let adapter = folder.path().display().to_string();
    let arguments = ["--adapter", &adapter, "--max-new-tokens", "2", "--prompt", "The sea"];
    adapter_of(folder.path(), f32::NAN, json!(["layers.0.self_attn.q_proj"]));
    let output = generate(2, &model, &arguments);
    let line = failed(&output, 1);
    assert!(line.contains("the outputs have NaN or infinity") && output.stdout.is_empty(), "{line}");

    adapter_of(folder.path(), 0.0, json!(["q_proj"]));
    let output = generate(1, &model, &arguments);
    succeeded(&output);
    let stderr = text(&output.stderr);
    assert!(stderr.contains("model.layers.1.self_attn.q_proj, model.layers.2"), "{stderr}");
    assert!(stderr.contains("and 26 more are selected by adapter_config.json"), "{stderr}");
}

#[test]
fn mpi_what_cannot_be_generated_is_one_line() {
    let model = smollm2();
    let folder = tempfile::tempdir().unwrap();
    let chats = folder.path().join("chats.jsonl");
    std::fs::write(
        &chats,
        "{\"messages\": [{\"role\": \"user\", \"content\": \"hi\"}]}\n{\"messages\": 3}\n",
    )
    .unwrap();
    let chats = chats.display().to_string();
    for (arguments, word) in [
        (vec!["--chat-file", &chats], "chats.jsonl:2"),
        (vec!["--chat", "hi", "--adapter", "/nowhere"], "/nowhere"),
        (vec!["--chat-file", "/nowhere.jsonl"], "/nowhere.jsonl"),
        (vec!["--chat-file", &chats, "--out", "/nowhere/out"], "/nowhere"),
        (vec!["--prompt", ""], "at least one token"),
    ] {
        let output = generate(2, &model, &arguments);
        let line = failed(&output, 2);
        assert!(line.contains(word), "{arguments:?}: {line}");
        assert!(output.stdout.is_empty());
    }
}
