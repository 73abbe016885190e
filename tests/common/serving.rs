//! The program `xorl-dist serve` on a port of its own, and a client by hand.

use super::{ranks_of, signal, wait_for};
use serde_json::{Value, json};
use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpStream},
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex},
    thread::JoinHandle,
    time::Duration,
};

/// A server that listens. It is killed when dropped.
pub struct Serving {
    pub child: Child,
    pub address: SocketAddr,
    said: Arc<Mutex<String>>,
    reader: Option<JoinHandle<()>>,
}

/// `xorl-dist serve` on `ranks` ranks, on a free port.
pub fn command(ranks: usize, config: &Path, more: &[&str]) -> Command {
    command_on("cpu", ranks, config, more)
}

/// The same on `device`.
pub fn command_on(device: &str, ranks: usize, config: &Path, more: &[&str]) -> Command {
    let mut command = ranks_of(Path::new(env!("CARGO_BIN_EXE_xorl-dist")), ranks);
    command
        .args(["serve", "--device", device, "--config"])
        .arg(config)
        .args(["--server.api_port", "0"])
        .args(more);
    command
}

impl Serving {
    pub fn start(ranks: usize, config: &Path, more: &[&str]) -> Self {
        Self::started(command(ranks, config, more))
    }

    /// Starts `command` and waits until it listens.
    pub fn started(mut command: Command) -> Self {
        command.env_remove("RUST_LOG").stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (said, stderr) = (Arc::<Mutex<String>>::default(), child.stderr.take().unwrap());
        let own = said.clone();
        let reader = std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                own.lock().unwrap().push_str(&(line + "\n"));
            }
        });
        let mut address = None;
        wait_for("a server that listens", || {
            let ended = child.try_wait().unwrap();
            let text = said.lock().unwrap().clone();
            address = address_in(&text);
            assert!(ended.is_none() || address.is_some(), "{ended:?}: {text}");
            address
        });
        Self { child, address: address.unwrap(), said, reader: Some(reader) }
    }

    /// The lines on stderr so far.
    pub fn said(&self) -> String {
        self.said.lock().unwrap().clone()
    }

    /// Sends `number` to the launcher, and waits for its end: status and all lines.
    pub fn end(mut self, number: i32) -> (ExitStatus, String) {
        signal(self.child.id(), number);
        self.ended()
    }

    /// Waits for the end.
    pub fn ended(&mut self) -> (ExitStatus, String) {
        let status = self.child.wait().unwrap();
        if let Some(reader) = self.reader.take() {
            reader.join().unwrap();
        }
        (status, self.said())
    }

    pub fn get(&self, path: &str) -> (u16, Value) {
        exchange(self.address, "GET", path, "").unwrap()
    }

    pub fn post(&self, name: &str, body: &Value) -> (u16, Value) {
        exchange(self.address, "POST", &format!("/api/v1/{name}"), &body.to_string()).unwrap()
    }

    /// Submits and waits as clients do: a 408 is asked again.
    pub fn call(&self, name: &str, body: &Value) -> Value {
        let (status, reply) = self.post(name, body);
        assert_eq!(status, 200, "{name}: {reply}");
        loop {
            let (status, result) = self.post("retrieve_future", &json!({"request_id": reply["request_id"]}));
            if status != 408 {
                assert_eq!(status, 200, "{name}: {result}");
                assert!(result.get("error").is_none(), "{name}: {result}");
                return result;
            }
        }
    }

    /// The text of a request that is refused at once.
    pub fn refused(&self, name: &str, body: &Value) -> String {
        let (status, reply) = self.post(name, body);
        assert_eq!(status, 400, "{name}: {reply}");
        reply["detail"].as_str().unwrap().to_owned()
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        // mpirun takes its ranks along when it is terminated, not when it is killed.
        if self.child.try_wait().is_ok_and(|ended| ended.is_none()) {
            signal(self.child.id(), libc::SIGTERM);
            let _ = self.child.wait();
        }
    }
}

/// The address in the line of a server that listens.
pub fn address_in(text: &str) -> Option<SocketAddr> {
    let rest = text.split_once("listening on http://")?.1;
    let end = rest.find(|c: char| !c.is_ascii_hexdigit() && !".:[]".contains(c))?;
    rest[..end].trim_end_matches(':').parse().ok()
}

/// Sends one request on a connection of its own; returns status and JSON body (text where it is no JSON).
pub fn exchange(address: SocketAddr, method: &str, path: &str, body: &str) -> std::io::Result<(u16, Value)> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    let length = body.len();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n"
    );
    stream.write_all((head + body).as_bytes())?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
    Ok((status, serde_json::from_str(body).unwrap_or_else(|_| Value::String(body.into()))))
}
