//! Real clients, unmodified, against the server on one and two ranks: `xorl-client`, and `tinker` as it is and as it
//! last spoke JSON. Every public method works or is refused with a text, in both worlds alike; adapters that clients
//! train alone, interleaved and together end as PEFT alone ends, also on experts divided over ranks and over NCCL.

use crate::common::{
    client_python, is_mpich, python,
    serving::{Serving, command_on},
    stand_in,
};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// The name in the README of xorl-client, which finds the tokenizer by it: below the folder where clients start.
const BASE_MODEL: &str = "Qwen/Qwen3-4B-Instruct-2507";
/// Bounds for one computation in two ways, and for two programs.
const SAME: f64 = 1e-5;
const PEFT: f64 = 1e-4;

fn scripts() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients")
}

/// A client, and how many adapters it trains.
struct Client {
    name: &'static str,
    family: &'static str,
    python: PathBuf,
    adapters: usize,
}

fn clients() -> [Client; 3] {
    let own = std::env::var_os("XORL_CLIENT_PYTHON").map_or_else(python, PathBuf::from);
    let tinker = client_python("XORL_TINKER_PYTHON", ".venv-tinker");
    let json = client_python("XORL_TINKER_JSON_PYTHON", ".venv-tinker-json");
    [
        Client { name: "xorl", family: "xorl", python: own, adapters: 8 },
        Client { name: "tinker", family: "tinker", python: tinker, adapters: 3 },
        Client { name: "tinker_json", family: "tinker", python: json, adapters: 2 },
    ]
}

/// Split projections, which PEFT has as modules. The experts' are parameters to it, gate and up of an expert one.
const SPLIT: [&str; 7] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
const WITH_EXPERTS: [&str; 6] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"];

/// Settings of a server of fp32 whose adapters of `targets` PEFT can have.
fn write_config(path: &Path, model: &Path, output: &Path, targets: &[&str], experts_over: usize) {
    let config = json!({
        "model_path": model, "base_model_name": BASE_MODEL, "output_dir": output,
        "lora_rank": 8, "lora_alpha": 16, "enable_mixed_precision": false,
        "lora_target_modules": targets, "expert_parallel_size": experts_over,
    });
    fs::write(path, config.to_string()).unwrap();
}

/// `client`, to be started, against `server`, whose base lies in `home`: it trains its adapters in each of `ways`; with
/// none of them it trains in all and calls all its methods.
fn driven(
    client: &Client,
    server: &Serving,
    out: &Path,
    home: &Path,
    report: &Path,
    ways: &[&str],
) -> Command {
    let mut command = Command::new(&client.python);
    command
        .arg(scripts().join("drive.py"))
        .args([client.family, &format!("http://{}", server.address)])
        .arg(out)
        .args([BASE_MODEL, &client.adapters.to_string()])
        .arg(report)
        .args(ways)
        .current_dir(home)
        .env("HF_HUB_OFFLINE", "1");
    command
}

/// Ends a server, which its clients have left.
fn end(server: Serving) {
    let (status, said) = server.end(libc::SIGUSR1);
    assert!(status.code() == Some(75) || is_mpich(), "{status} {said}");
}

/// The reports of each client on a server in `world`.
fn reports(world: usize, folder: &Path, packages: &str) -> BTreeMap<&'static str, PathBuf> {
    let own = folder.join(format!("world_{world}"));
    fs::create_dir(&own).unwrap();
    let (config, out) = (own.join("server.yaml"), own.join("out"));
    write_config(&config, &folder.join(BASE_MODEL), &out, &SPLIT, 1);
    let server = Serving::start(world, &config, &[]);
    let running: Vec<_> = clients()
        .into_iter()
        .map(|client| {
            let report = own.join(format!("{}_{world}.json", client.name));
            let mut command = driven(&client, &server, &out, folder, &report, &[]);
            command.env("BORROWED_PACKAGES", packages).stdout(Stdio::piped()).stderr(Stdio::piped());
            (client.name, command.spawn().unwrap(), report)
        })
        .collect();
    // All are waited for before any is judged: a failure leaves none behind.
    let ended: Vec<_> = running
        .into_iter()
        .map(|(name, child, report)| (name, child.wait_with_output().unwrap(), report))
        .collect();
    for (name, output, _) in &ended {
        let said = [&output.stdout[..], &output.stderr].map(String::from_utf8_lossy).concat();
        assert!(output.status.success(), "{name} on {world} ranks: {said}\n{}", server.said());
    }
    end(server);
    ended.into_iter().map(|(name, _, report)| (name, report)).collect()
}

/// The table of methods in a report: state and text of each.
fn table(report: &Path) -> BTreeMap<String, (String, Value)> {
    let told: Value = serde_json::from_slice(&fs::read(report).unwrap()).unwrap();
    let rows = told["methods"].as_array().unwrap().iter();
    rows.map(|row| {
        let text = |field: &str| row[field].as_str().unwrap().to_owned();
        (text("method"), (text("state"), row["error"].clone()))
    })
    .collect()
}

fn oracle(arguments: &[&Path]) -> String {
    let mut command = Command::new(python());
    command.arg(scripts().join("peft_alone.py")).args(arguments).env("HF_HUB_OFFLINE", "1");
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

#[test]
fn mpi_python_real_clients_get_what_each_method_promises_and_adapters_as_peft_alone() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join(BASE_MODEL);
    let tokenizer = scripts().with_file_name("data").join("chat/byte_level");
    let packages = oracle(&[Path::new("model"), &model, &tokenizer]);

    let [one, two] = [1, 2].map(|world| reports(world, folder.path(), &packages));
    for (name, report) in &one {
        let (alone, over_two) = (table(report), table(&two[name]));
        assert_eq!(alone, over_two, "{name}");
        let of_state = |state: &str| alone.values().filter(|(found, _)| found == state).count();
        let (working, refused) = (of_state("works"), of_state("refused"));
        println!("{name}: {working} methods work, {refused} are refused");
        assert_eq!(working + refused, alone.len(), "{name}: {alone:?}");
        assert!(working > 40, "{name}: {alone:?}");
        for (method, (_, error)) in alone.iter().filter(|(_, (state, _))| state == "refused") {
            println!("  {method}: {}", error.as_str().unwrap());
        }
    }

    let reports: Vec<&Path> = one.values().chain(two.values()).map(PathBuf::as_path).collect();
    assert_eq!(equal_alone_and_peft(&reports), 2 * (3 + 3 + 2));
}

/// Holds the adapters of `reports` against the same trained alone and against PEFT alone; returns the cases.
fn equal_alone_and_peft(reports: &[&Path]) -> usize {
    let compared = oracle(&[&[Path::new("compare")], reports].concat());
    let rows: BTreeMap<String, Value> = serde_json::from_str(compared.lines().last().unwrap()).unwrap();
    println!("{rows:#?}");
    for (case, row) in &rows {
        let number = |field: &str| row[field].as_f64().unwrap();
        assert!(number("alone") <= SAME, "{case}: {} from the same adapter trained alone", number("alone"));
        assert!(number("peft") <= PEFT, "{case}: {} from PEFT", number("peft"));
        assert!(number("moved") > 0.01, "{case}: an adapter moved by {} alone", number("moved"));
    }
    rows.len()
}

/// A server whose adapters one client trains.
#[derive(Clone, Copy)]
struct Served {
    name: &'static str,
    /// Folder of the base: `dense` or `experts`.
    base: &'static str,
    world: usize,
    device: &'static str,
    experts_over: usize,
    adapters: usize,
    ways: &'static [&'static str],
}

impl Served {
    /// The client's report; all of it is below `folder`.
    fn report(&self, folder: &Path) -> PathBuf {
        let &Self { name, base, world, device, experts_over, adapters, ways } = self;
        let (home, own) = (folder.join(base), folder.join(format!("{name}_{world}")));
        fs::create_dir(&own).unwrap();
        let (config, out, report) = (own.join("server.yaml"), own.join("out"), own.with_extension("json"));
        let targets: &[&str] = if base == "experts" { &WITH_EXPERTS } else { &SPLIT };
        write_config(&config, &home.join(BASE_MODEL), &out, targets, experts_over);
        let mut command = command_on(device, world, &config, &[]);
        if device == "stand-in" {
            stand_in(&mut command, &own);
        }
        let server = Serving::started(command);
        let [client, ..] = clients();
        let client = Client { adapters, ..client };
        let output = driven(&client, &server, &out, &home, &report, ways).output().unwrap();
        let said = [&output.stdout[..], &output.stderr].map(String::from_utf8_lossy).concat();
        assert!(output.status.success(), "{name} on {world} ranks: {said}\n{}", server.said());
        end(server);
        report
    }
}

/// Experts divided over two ranks, against a server of one rank; two ranks over NCCL, for which a library of ours
/// stands in.
#[test]
fn mpi_python_adapters_of_divided_experts_and_over_nccl_are_those_trained_alone_and_by_peft() {
    const ALL: &[&str] = &["alone", "interleaved", "together"];
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = scripts().with_file_name("data").join("chat/byte_level");
    let [dense, mixture] = ["dense", "experts"].map(|base| folder.path().join(base).join(BASE_MODEL));
    oracle(&[Path::new("model"), &dense, &tokenizer, &mixture]);
    let experts = Served {
        name: "experts",
        base: "experts",
        world: 1,
        device: "cpu",
        experts_over: 1,
        adapters: 3,
        ways: &["alone"],
    };
    let divided = Served { world: 2, experts_over: 2, ways: ALL, ..experts };
    let nccl =
        Served { name: "nccl", base: "dense", device: "stand-in", experts_over: 1, adapters: 8, ..divided };
    let reports = [experts, divided, nccl].map(|served| served.report(folder.path()));
    let reports: Vec<&Path> = reports.iter().map(PathBuf::as_path).collect();
    assert_eq!(equal_alone_and_peft(&reports), 1 + 3 + 3);
}
