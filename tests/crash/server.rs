//! A server that is killed at every instant of its start, of its clients' calls and of its end. The next one on the
//! same output_dir has each save that was acknowledged, to the byte; the one under way is whole or absent; and clients
//! go on.

use crate::common::{
    engine::model_folder,
    make_rows,
    serving::{address_in, command, exchange},
    signal,
    tiny::{copy_tree, tree},
    wait_for,
};
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Stdio},
    time::Instant,
};
use tempfile::TempDir;
use xorl_dist::checkpoint::{
    contents,
    failpoints::{OF_EVERY_RANK, OF_RUNS, OF_SAVES, VARIABLE},
    saves,
};

/// The files of a save, by their paths in it.
type Files = BTreeMap<PathBuf, Vec<u8>>;
/// Saves by their folders below output_dir.
type Saves = BTreeMap<String, Files>;
/// A call of the client, and its body.
type Call = (&'static str, Value);

/// The server's own saves of the two adapters: of `a`, which is trained, and of `b`, which is unloaded.
const OWN_A: &str = ".server/adapters/a";
const OWN_B: &str = ".server/adapters/b";
/// A save in a folder of the client's choice.
const ELSEWHERE: &str = "runs/final";
/// Instants that no server reaches: steps of runs have state of their own, a base beside it, and names.
const OF_STEPS_ALONE: [&str; 6] =
    ["load.state", "base.linked", "name.written", "name.synced", "name.renamed", "name.run_synced"];

/// What a server knows of an adapter when it starts.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Known {
    Nothing,
    /// It was saved at a stop, and comes back.
    Saved,
    /// It had changed when its server was killed.
    Lost,
}

/// One server: its start, the calls of its client, and its end by a signal.
struct Act {
    name: &'static str,
    calls: Vec<Call>,
    /// The saves before the start, after it, after each call and after the end, where nobody kills the server. The n-th
    /// moment is the time between the saves n - 1 and n.
    seen: Vec<Saves>,
    /// Adapter `a` at the start, before the first call changes it.
    a_at_first: Known,
    /// The first moment at which `b` is unloaded.
    b_is_gone_from: usize,
}

/// A server that may be killed at any time.
struct Server {
    child: Child,
    address: SocketAddr,
    /// For the message of a failure.
    place: String,
}

impl Server {
    /// The result of a call, or the reason why there is none.
    fn call(&self, (name, body): &Call) -> Result<Value, String> {
        let post = |name: &str, body: &Value| {
            let path = format!("/api/v1/{name}");
            let answer = exchange(self.address, "POST", &path, &body.to_string());
            answer.map_err(|error| format!("{name}: {error}"))
        };
        let (mut status, mut reply) = post(name, body)?;
        if let Some(id) = reply.get("request_id").filter(|_| status == 200) {
            let asked = json!({ "request_id": id });
            (status, reply) = post("retrieve_future", &asked)?;
            while status == 408 {
                (status, reply) = post("retrieve_future", &asked)?;
            }
        }
        let is_done = status == 200 && reply["error"].is_null();
        if is_done { Ok(reply) } else { Err(format!("{name} {body}: {status} {reply}")) }
    }

    /// The result of a call that succeeds.
    fn done(&self, call: &Call) -> Value {
        self.call(call).unwrap_or_else(|text| panic!("{}: {text}", self.place))
    }

    fn has(&self, model: &str) -> bool {
        let path = format!("/api/v1/session_info?model_id={model}");
        exchange(self.address, "GET", &path, "").unwrap().0 == 200
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // mpirun takes its ranks along when it is terminated, not when it is killed.
        if self.child.try_wait().is_ok_and(|ended| ended.is_none()) {
            signal(self.child.id(), libc::SIGTERM);
            let _ = self.child.wait();
        }
    }
}

/// The output directory of servers of a tiny model, and what servers do in it that nobody kills.
struct Scene {
    folder: TempDir,
    _model: TempDir,
    ranks: usize,
    acts: Vec<Act>,
}

impl Scene {
    fn new(ranks: usize) -> Self {
        let (folder, model) = (tempfile::tempdir().unwrap(), model_folder());
        let (at, path) = (folder.path().display(), model.path().display());
        // Memory for one adapter: the other waits on disk. A save names the weight decay of the adapter's last update,
        // which a load does not bring back: 0 is that of a new one.
        let memory = if ranks == 1 { "50KB" } else { "35KB" };
        let server = format!(
            "model_path: {path}\noutput_dir: {at}/out\nlora_rank: 2\nlora_alpha: 4\nlora_b_init_std: 0.05\n\
             lora_target_modules: [q_proj, down_proj]\nlr: 2e-3\nweight_decay: 0\nenable_mixed_precision: false\n\
             adapter_memory: {memory}\n"
        );
        fs::write(folder.path().join("server.yaml"), server).unwrap();
        make_rows(&folder.path().join("rows.jsonl"));
        let mut scene = Self { folder, _model: model, ranks, acts: Vec::new() };
        fs::create_dir(scene.out()).unwrap();
        for mut act in scene.acts_to_play() {
            copy_tree(&scene.out(), &scene.at(act.name));
            let (seen, is_killed) = scene.play(&act, None);
            assert!(!is_killed && scene.said().contains("; 1 of rank 2 fit"), "{}", scene.said());
            act.seen = seen;
            if act.name == "again" {
                // The third act is after a kill.
                assert!(scene.play(&act, Some("publish.replaced_away:1:0")).1);
            }
            scene.acts.push(act);
        }
        scene
    }

    fn acts_to_play(&self) -> [Act; 3] {
        let text = fs::read_to_string(self.at("rows.jsonl")).unwrap();
        let rows: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let pass = |model, row: usize| {
            let rows = &rows[row..row + 2];
            ("forward_backward", json!({"model_id": model, "batches": rows, "loss_fn": "causallm_loss"}))
        };
        let step = |model| ("optim_step", json!({"model_id": model}));
        let save = |path| ("save_weights", json!({"model_id": "a", "path": path, "overwrite": true}));
        let named = |call, name| (call, json!({"model_id": "a", "name": name, "overwrite": true}));
        let first = vec![
            create("b"),
            pass("b", 0),
            step("b"),
            create("a"),
            pass("a", 0),
            step("a"),
            save("state"),
            named("save_weights_for_sampler", "plain"),
            pass("a", 2),
            step("a"),
            // A gradient that waits.
            pass("a", 4),
            save("state"),
            save(ELSEWHERE),
            named("save_full_weights_safetensors", "whole"),
            ("copy_weights", json!({"source_path": "tinker://a/weights/state"})),
            ("delete_checkpoint", json!({"model_id": "a", "checkpoint_id": "weights/state"})),
            ("load_weights", json!({"model_id": "a", "path": ELSEWHERE})),
        ];
        let again = vec![("unload_model", json!({"model_id": "b"})), pass("a", 6), step("a"), save("state")];
        let act = |name, calls, a_at_first, b_is_gone_from| {
            let seen = Vec::new();
            Act { name, calls, seen, a_at_first, b_is_gone_from }
        };
        [
            act("first", first, Known::Nothing, usize::MAX),
            act("again", again, Known::Saved, 2),
            act("after a kill", Vec::new(), Known::Lost, 0),
        ]
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn out(&self) -> PathBuf {
        self.at("out")
    }

    fn said(&self) -> String {
        fs::read_to_string(self.at("stderr")).unwrap()
    }

    /// Starts a server that is killed at `instant`, if there is one; `None`: it was, before it listened.
    fn start(&self, instant: Option<&str>, place: &str) -> Option<Server> {
        let mut command = command(self.ranks, &self.at("server.yaml"), &[]);
        command.env_remove("RUST_LOG").envs(instant.map(|instant| (VARIABLE, instant)));
        command.stdout(Stdio::null()).stderr(File::create(self.at("stderr")).unwrap());
        let mut child = command.spawn().unwrap();
        let address = wait_for("a server that listens", || {
            let ended = child.try_wait().unwrap();
            address_in(&self.said()).map(Some).or(ended.map(|_| None))
        });
        let Some(address) = address else {
            self.check_killed(&mut child, instant, "the start");
            return None;
        };
        Some(Server { child, address, place: place.to_owned() })
    }

    /// Checks that a server which has failed to do `what` was killed at `instant`.
    fn check_killed(&self, child: &mut Child, instant: Option<&str>, what: &str) {
        let Some((name, _)) = instant.and_then(|instant| instant.split_once(':')) else {
            panic!("{what}: {}", self.said())
        };
        let status = wait_for("the end of the server", || child.try_wait().unwrap());
        let said = self.said();
        let is_killed = said.contains(&format!("killed at {name} ")) && !said.contains("panicked");
        assert!(is_killed, "{instant:?}: {what}: {status}: {said}");
    }

    /// Plays `act`, and kills its server at `instant`, if there is one. Returns the saves before it, after the start
    /// and so on, and true if the server was killed.
    fn play(&self, act: &Act, instant: Option<&str>) -> (Vec<Saves>, bool) {
        let place = format!("{}, {instant:?}", act.name);
        fs::remove_dir_all(self.out()).unwrap();
        copy_tree(&self.at(act.name), &self.out());
        let mut seen = vec![self.saves(&place)];
        let Some(mut server) = self.start(instant, &place) else { return (seen, true) };
        seen.push(self.saves(&place));
        for call in &act.calls {
            if let Err(text) = server.call(call) {
                self.check_killed(&mut server.child, instant, &text);
                return (seen, true);
            }
            seen.push(self.saves(&place));
        }
        signal(server.child.id(), libc::SIGUSR1);
        let status = wait_for("the end of the server", || server.child.try_wait().unwrap());
        if status.code() != Some(75) {
            self.check_killed(&mut server.child, instant, "the end");
            return (seen, true);
        }
        seen.push(self.saves(&place));
        (seen, false)
    }

    /// The saves in the output directory, each of which has to be whole.
    fn saves(&self, place: &str) -> Saves {
        let (root, mut found) = (self.out(), Saves::new());
        let shown = folders_below(&root).into_iter().filter(|folder| !is_hidden(folder));
        for (_, folder) in shown.flat_map(|folder| saves::list(&folder)) {
            let whole = saves::whole(&folder).and_then(|whole| contents::check(&whole).map(|_| whole));
            let whole = whole.unwrap_or_else(|error| panic!("{place}: {}: torn: {error}", folder.display()));
            let below = |path: &Path, root: &Path| path.strip_prefix(root).unwrap().to_owned();
            let files = tree(&whole).into_iter().map(|(path, bytes)| (below(&path, &whole), bytes));
            found.insert(timeless(&below(&folder, &root).to_string_lossy()), files.collect());
        }
        found
    }

    /// Kills the server of `act` at an instant, and checks what is left and the next server. False: the instant is
    /// not reached so often.
    fn kill(&self, act: &Act, (name, nth, rank): (&str, usize, usize)) -> bool {
        let place = format!("{}: {name}, time {nth}, rank {rank} of {}", act.name, self.ranks);
        let (seen, is_killed) = self.play(act, Some(&format!("{name}:{nth}:{rank}")));
        let moment = seen.len();
        for (number, (ours, undisturbed)) in seen.iter().zip(&act.seen).enumerate() {
            let parts = different(ours, undisturbed);
            assert!(parts.is_empty(), "{place}: {parts:?} differ after part {number}");
        }
        if !is_killed {
            assert_eq!(moment, act.seen.len(), "{place}");
            return false;
        }
        let (before, after) = (&act.seen[moment - 1], &act.seen[moment]);
        let found = self.saves(&place);
        for (name, files) in &found {
            let is_known = [before, after].iter().any(|saves| saves.get(name) == Some(files));
            assert!(is_known, "{place}: {name} is neither the earlier save nor the new one");
        }
        let lost = before.iter().filter(|(_, files)| has(after, files) && !has(&found, files));
        assert_eq!(lost.map(|(name, _)| name).next(), None, "{place}: lost");
        self.go_on(act, moment, &found, &place);
        true
    }

    /// Starts the next server behind a kill at `moment` of `act`, which has left the saves `found`, and goes on as
    /// clients do.
    fn go_on(&self, act: &Act, moment: usize, found: &Saves, place: &str) {
        let Some(server) = self.start(None, place) else { panic!("{place}: {}", self.said()) };
        let now = self.saves(place);
        let mut hidden = folders_below(&self.out());
        hidden.retain(|folder| is_hidden(folder));
        assert!(hidden.is_empty(), "{place}: {hidden:?}");
        // One of the two adapters waits on disk, at most.
        let spilled = tree(&self.out().join(".server/spilled")).len();
        assert!(spilled <= self.ranks, "{place}: {spilled} files of adapters that wait");
        assert!(now.values().all(|files| has(found, files)), "{place}: a save that was not there");
        for (name, files) in found {
            let may_go = name == OWN_B && moment >= act.b_is_gone_from;
            assert!(may_go || has(&now, files), "{place}: {name} has gone");
        }
        self.check_adapter(&server, act, moment, &now);
        self.check_loads(&server, &now);
        self.repeat(server);
    }

    /// Checks that `a` is there as it was saved, or that its client is told of its last save; then it is there.
    fn check_adapter(&self, server: &Server, act: &Act, moment: usize, now: &Saves) {
        let place = &server.place;
        let at_first = (moment == 1).then_some(act.a_at_first);
        if server.has("a") {
            let own = now.get(OWN_A);
            let is_newest = own == act.seen[act.seen.len() - 1].get(OWN_A);
            assert!(is_newest || at_first == Some(Known::Saved), "{place}: a has come back as it was before");
            server.done(&("save_weights", json!({"model_id": "a", "path": "check", "overwrite": true})));
            return self.check_values(own.unwrap(), "weights/a/check", place);
        }
        assert_ne!(at_first, Some(Known::Saved), "{place}: a has not come back");
        let refused = server.call(&("optim_step", json!({"model_id": "a"}))).unwrap_err();
        let is_new = at_first == Some(Known::Nothing);
        let words = if is_new { "does not exist" } else { "ended before it could save model_id a" };
        assert!(refused.contains(words), "{place}: {refused}");
        server.done(&create("a"));
        let named = refused.split([' ', ';']).find(|word| word.starts_with("xorl://a/weights/"));
        let is_saved = now.keys().any(|name| name.starts_with("weights/a/") || name == ELSEWHERE);
        assert_eq!(named.is_some(), is_saved, "{place}: {refused}");
        if let Some(path) = named {
            server.done(&("load_weights", json!({"model_id": "a", "path": path})));
        }
    }

    /// Checks that clients are told of all saves, and that each of `a` and its copy loads: a save of what was loaded
    /// has the same values.
    fn check_loads(&self, server: &Server, now: &Saves) {
        let mut listed = BTreeSet::new();
        let owners = now.keys().filter_map(|name| name.strip_prefix("weights/")?.split('/').next());
        for owner in owners.chain(["a"]).collect::<BTreeSet<_>>() {
            let answer = server.done(&("list_checkpoints", json!({"model_id": saves::name_of(owner)})));
            for checkpoint in answer["checkpoints"].as_array().unwrap() {
                let (kind, name) = checkpoint["checkpoint_id"].as_str().unwrap().split_once('/').unwrap();
                let folder = match name {
                    "check" => continue,
                    "final" => ELSEWHERE.to_owned(),
                    name => timeless(&format!("{kind}/{owner}/{name}")),
                };
                let call = match kind {
                    "weights" => "save_weights",
                    _ => "save_weights_for_sampler",
                };
                if kind != "full_weights" && owner != "b" {
                    server.done(&("load_weights", json!({"model_id": "a", "path": checkpoint["path"]})));
                    server.done(&(call, json!({"model_id": "a", "path": "check", "overwrite": true})));
                    self.check_values(&now[&folder], &format!("{kind}/a/check"), &server.place);
                }
                listed.insert(folder);
            }
        }
        let clients = now.keys().filter(|name| !name.starts_with(".server/")).cloned();
        assert_eq!(listed, clients.collect(), "{}", server.place);
    }

    /// Makes all calls of the first act once more, under the same names, and stops `server`: all is saved as there.
    fn repeat(&self, mut server: Server) {
        let first = &self.acts[0];
        for model in ["a", "b"].into_iter().filter(|model| server.has(model)) {
            server.done(&("unload_model", json!({ "model_id": model })));
        }
        for call in &first.calls {
            server.done(call);
        }
        signal(server.child.id(), libc::SIGUSR1);
        let status = wait_for("the end of the server", || server.child.try_wait().unwrap());
        let place = &server.place;
        assert_eq!(status.code(), Some(75), "{place}: {}", self.said());
        let (mut end, expected) = (self.saves(place), &first.seen[first.seen.len() - 1]);
        end.retain(|name, _| expected.contains_key(name));
        let parts = different(&end, expected);
        assert!(parts.is_empty(), "{place}: {parts:?} differ where all is done again");
    }

    /// Checks that the save in `folder` has the files of another one, but for what clients said about it.
    fn check_values(&self, files: &Files, folder: &str, place: &str) {
        let about = ["manifest.json", "metadata.json"].map(Path::new);
        for (name, bytes) in files.iter().filter(|(name, _)| !about.contains(&name.as_path())) {
            let path = self.out().join(folder).join(name);
            let ours = fs::read(&path).unwrap_or_default();
            let texts = [&ours, bytes].map(|bytes| String::from_utf8_lossy(bytes));
            assert!(ours == *bytes, "{place}: {}: {texts:?}", path.display());
        }
    }
}

/// The call that makes an adapter of rank 2.
fn create(model: &str) -> Call {
    ("create_model", json!({"model_id": model, "lora_config": {"rank": 2, "alpha": 4.0, "seed": 9}}))
}

/// The name of a save without the time of the stop that has made it.
fn timeless(name: &str) -> String {
    name.split_once("/stop-").map_or(name.to_owned(), |(parent, _)| format!("{parent}/stop"))
}

fn has(saves: &Saves, files: &Files) -> bool {
    saves.values().any(|own| own == files)
}

/// The saves that are not the same.
fn different<'a>(a: &'a Saves, b: &'a Saves) -> BTreeSet<&'a String> {
    a.keys().chain(b.keys()).filter(|name| a.get(*name) != b.get(*name)).collect()
}

/// `root` and all folders below it.
fn folders_below(root: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(root).unwrap().map(|entry| entry.unwrap().path());
    let below = entries.filter(|path| path.is_dir()).flat_map(|folder| folders_below(&folder));
    std::iter::once(root.to_owned()).chain(below).collect()
}

/// True for a folder that is not published, and for those in it.
fn is_hidden(folder: &Path) -> bool {
    folder.components().any(|part| part.as_os_str().to_string_lossy().starts_with(".tmp-"))
}

#[test]
fn clients_go_on_after_a_server_is_killed_and_have_all_that_was_saved() {
    let scene = Scene::new(1);
    let [first, again, after_a_kill] = &scene.acts[..] else { unreachable!() };
    for (act, kill) in [
        (first, ("pieces.written", 1, 0)),
        (first, ("publish.replaced_away", 1, 0)),
        (first, ("link.linked", 2, 0)),
        (first, ("withdraw.renamed", 1, 0)),
        (again, ("load.pieces", 1, 0)),
        (again, ("publish.renamed", 2, 0)),
        (after_a_kill, ("recover.renamed", 1, 0)),
        (after_a_kill, ("rename.renamed", 1, 0)),
    ] {
        assert!(scene.kill(act, kill), "{kill:?} is never reached");
    }
}

/// `ci/long.sh crashes`
#[test]
#[ignore = "minutes: ci/long.sh crashes"]
fn mpi_every_instant_on_every_rank_of_a_server() {
    let (begin, scene) = (Instant::now(), Scene::new(1));
    let (mut reached, mut kills) = (Vec::new(), 0);
    for (number, act) in scene.acts.iter().enumerate() {
        for &name in OF_RUNS.iter().chain(OF_SAVES) {
            let times = (1..).take_while(|&nth| scene.kill(act, (name, nth, 0))).count();
            reached.extend((times > 0).then_some((number, name)));
            kills += times;
        }
    }
    println!("{}", told(1, kills, begin));
    let is_never = |name: &&str| reached.iter().all(|(_, other)| other != name);
    let never: Vec<&str> = OF_RUNS.iter().chain(OF_SAVES).copied().filter(is_never).collect();
    assert_eq!(never, OF_STEPS_ALONE);
    let (begin, scene, mut kills) = (Instant::now(), Scene::new(2), 0);
    for (number, name) in reached {
        for rank in 0..if OF_EVERY_RANK.contains(&name) { 2 } else { 1 } {
            assert!(scene.kill(&scene.acts[number], (name, 1, rank)), "{name}, rank {rank}: never reached");
            kills += 1;
        }
    }
    println!("{}", told(2, kills, begin));
}

fn told(ranks: usize, kills: usize, begin: Instant) -> String {
    let seconds = begin.elapsed().as_secs_f64();
    format!(
        "server, world {ranks}: {kills} kills, {seconds:.0} s: 0 torn, 0 lost, all servers and clients went on"
    )
}
