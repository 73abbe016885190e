//! The calls of `tinker` by real clients: 0.38, which sends passes as protobuf, and 0.24, which sends them as JSON.

use super::server::Server;
use crate::common::{client_python, python};
use std::{path::Path, process::Command, time::Duration};
use xorl_dist::server::{
    keys::Keys,
    request::{Pass, Request, Task},
};

/// The key `tml-one` of tenant `lab`; the hash is `printf %s tml-one | sha256sum`.
pub fn keys() -> Keys {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("keys");
    let lines = "37186f648184032ea0967255741152df482798b3ac1956d2fa5726c5722acc8e lab\n\
                 3fc4ccfe745870e2c0d99f71f30ff0656c8dedd41cc1d7d3d376b0dbe685e2f3 other\n";
    std::fs::write(&path, lines).unwrap();
    Keys::read(&path).unwrap()
}

/// The folder with torch, which clients need for losses of their users.
fn torch_site() -> String {
    let print = "import site; print(site.getsitepackages()[0])";
    let output = Command::new(python()).args(["-c", print]).output().unwrap();
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// Runs tests/clients/tinker_http.py by a client, and returns the requests of its first model.
fn run(variable: &str, venv: &str) -> Vec<Request> {
    let server = Server::with(keys(), |settings| settings.futures.poll = Duration::from_secs(30));
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients/tinker_http.py");
    let output = Command::new(client_python(variable, venv))
        .arg(script)
        .args([&format!("http://{}", server.address), "tml-one"])
        .env("TORCH_SITE", torch_site())
        .output()
        .unwrap();
    let (said, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && said.ends_with("done\n"), "{said}\n{errors}");
    let asked = server.engine.asked();
    let first = asked[0].model.clone();
    assert!(first.as_str().starts_with("lab:sess-") && first.as_str().ends_with(":train:0"), "{first}");
    asked.into_iter().filter(|asked| asked.model == first).collect()
}

/// Checks what reached the engine.
fn check(asked: &[Request]) {
    let Task::Create(spec) = &asked[0].task else { panic!("{:?}", asked[0]) };
    assert_eq!((spec.rank, spec.alpha, spec.seed), (8, 32.0, 5));
    assert!(spec.train_attn && !spec.train_mlp);
    let creations = asked.iter().filter(|asked| matches!(asked.task, Task::Create(_))).count();
    assert_eq!(creations, 1, "a repeat creates nothing");
    let passes: Vec<&Pass> = asked
        .iter()
        .filter_map(|asked| if let Task::Pass(pass) = &asked.task { Some(pass) } else { None })
        .collect();
    assert!(!passes[0].backward && passes[1].backward && passes[0].data.len() == 2);
    assert_eq!(passes[1].data[0].inputs["weights"], [0.0, 1.0, 2.0]);
    assert_eq!((passes[2].data[0].k, passes[2].data[0].targets.len()), (2, 6));
    assert_eq!((passes[3].loss.name.as_str(), passes[3].data[0].inputs.len()), ("ppo", 2));
    // The gradient of Σ log p² is 2·log p, with log p = -0.5: it comes back with weights of -1 times it.
    assert!(!passes[4].backward && passes[5].backward && passes[5].loss.name == "cross_entropy");
    assert!(passes[5].data.iter().all(|datum| datum.inputs["weights"] == [1.0; 3]));
    let chunks: Vec<usize> = passes[6..9].iter().map(|pass| pass.data.len()).collect();
    assert_eq!(chunks, [1024, 1024, 52], "chunks in order");
    for ids in [[9; 3], [8; 3]] {
        let times = passes.iter().filter(|pass| pass.data[0].ids == ids).count();
        assert_eq!(times, 1, "a pass of {ids:?}");
    }
    let rates: Vec<f64> = asked
        .iter()
        .filter_map(|asked| if let Task::OptimStep(step) = &asked.task { Some(step.lr) } else { None })
        .collect();
    assert_eq!(rates, [2e-4, 0.125, 2e-4]);
}

#[test]
fn python_the_client_that_sends_protobuf_trains() {
    check(&run("XORL_TINKER_PYTHON", ".venv-tinker"));
}

#[test]
fn python_the_client_that_sends_json_trains() {
    check(&run("XORL_TINKER_JSON_PYTHON", ".venv-tinker-json"));
}
