//! Headless Chromium, driven over a pipe by its own protocol: JSON texts that end with NUL.

use crate::common::wait_for_at_most;
use serde_json::{Value, json};
use std::{
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::mpsc::{Receiver, channel},
    thread,
    time::Duration,
};
use tempfile::TempDir;

/// Time for an answer of the browser, or for a change of the page.
const LIMIT: Duration = Duration::from_secs(30);

/// The lowest contrast of a text in the page that is seen, with that text: WCAG's ratio, over the ground that is
/// behind it.
const CONTRAST: &str = r"
(() => {
  const context = new OffscreenCanvas(1, 1).getContext('2d', { willReadFrequently: true });
  // Colours over each other, as the browser paints them.
  const paint = (colours) => {
    context.clearRect(0, 0, 1, 1);
    for (const colour of colours) { context.fillStyle = colour; context.fillRect(0, 0, 1, 1); }
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = (rgb) => rgb.map((value) => value / 255)
    .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4))
    .reduce((sum, value, i) => sum + value * [0.2126, 0.7152, 0.0722][i], 0);
  let lowest = [99, ''];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !node.checkVisibility() || node.closest('.hidden, .skip, script, noscript, dialog:not([open])')) continue;
    const grounds = [];
    for (let above = node; above; above = above.parentElement) grounds.unshift(getComputedStyle(above).backgroundColor);
    const style = getComputedStyle(node);
    const ink = node.namespaceURI.endsWith('svg') ? style.fill : style.color;
    const [a, b] = [light(paint([...grounds, ink])), light(paint(grounds))].sort((a, b) => b - a);
    const contrast = (a + 0.05) / (b + 0.05);
    if (contrast < lowest[0]) lowest = [contrast, walker.currentNode.data.trim()];
  }
  return lowest;
})()";

/// A browser with one page. It is killed when dropped.
pub struct Browser {
    child: Child,
    input: ChildStdin,
    answers: Receiver<Value>,
    calls: u64,
    /// The page, once there is one.
    session: Option<String>,
    _profile: TempDir,
}

/// `$XORL_BROWSER`, else the Chromium of this machine.
fn program() -> PathBuf {
    let known = ["chromium", "chromium-browser", "google-chrome"];
    let own = known.map(|name| Path::new("/usr/bin").join(name)).into_iter().find(|path| path.exists());
    let program = std::env::var_os("XORL_BROWSER").map(PathBuf::from).or(own);
    program.expect("no Chromium: launch/setup.sh installs it, XORL_BROWSER names another")
}

impl Browser {
    pub fn start() -> Self {
        let profile = tempfile::tempdir().unwrap();
        // The protocol is read from descriptor 3 and written to 4.
        let mut child = Command::new("sh")
            .args(["-c", r#"exec "$0" "$@" 3<&0 4>&1 </dev/null >/dev/null 2>&1"#])
            .arg(program())
            .args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"])
            .args(["--disable-background-networking", "--disable-component-update", "--disable-sync"])
            .arg("--remote-debugging-pipe")
            .arg(format!("--user-data-dir={}", profile.path().display()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (input, output) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        let (sender, answers) = channel();
        thread::spawn(move || {
            for text in output.split(0).map_while(Result::ok) {
                let value: Value = serde_json::from_slice(&text).unwrap();
                if value["id"].is_u64() && sender.send(value).is_err() {
                    return;
                }
            }
        });
        let mut browser = Self { child, input, answers, calls: 0, session: None, _profile: profile };
        let target = browser.call("Target.createTarget", json!({"url": "about:blank"}));
        let attach = json!({"targetId": target["targetId"], "flatten": true});
        let session = browser.call("Target.attachToTarget", attach)["sessionId"].as_str().unwrap().to_owned();
        browser.session = Some(session);
        browser.call("Page.enable", json!({}));
        browser
    }

    /// Calls a method of the protocol.
    pub fn call(&mut self, method: &str, params: Value) -> Value {
        self.calls += 1;
        let mut call = json!({"id": self.calls, "method": method, "params": params});
        if let Some(session) = &self.session {
            call["sessionId"] = json!(session);
        }
        self.input.write_all(format!("{call}\0").as_bytes()).unwrap();
        loop {
            let answer = self.answers.recv_timeout(LIMIT).unwrap_or_else(|_| panic!("{method}: no answer"));
            if answer["id"] == self.calls {
                assert!(answer["error"].is_null(), "{method}: {answer}");
                return answer["result"].clone();
            }
        }
    }

    /// The value of an expression in the page; a promise is waited for.
    pub fn value(&mut self, expression: &str) -> Value {
        let params = json!({"expression": expression, "awaitPromise": true, "returnByValue": true});
        let answer = self.call("Runtime.evaluate", params);
        assert!(answer["exceptionDetails"].is_null(), "{expression}: {answer}");
        answer["result"]["value"].clone()
    }

    pub fn text(&mut self, expression: &str) -> String {
        self.value(expression).as_str().unwrap_or_default().to_owned()
    }

    /// Waits until an expression is true.
    pub fn wait(&mut self, expression: &str) {
        wait_for_at_most(LIMIT, expression, || {
            thread::sleep(Duration::from_millis(20));
            (self.value(expression) == true).then_some(())
        });
    }

    /// Opens an address.
    pub fn open(&mut self, address: &str) {
        self.call("Page.navigate", json!({"url": address}));
        self.wait("document.readyState === 'complete'");
    }

    /// The colours that the system asks for: `light` or `dark`.
    pub fn prefer(&mut self, scheme: &str) {
        let features = json!([{"name": "prefers-color-scheme", "value": scheme}]);
        self.call("Emulation.setEmulatedMedia", json!({"features": features}));
    }

    /// Resizes the window, in pixels.
    pub fn resize(&mut self, width: u32) {
        let size = json!({"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": false});
        self.call("Emulation.setDeviceMetricsOverride", size);
    }

    /// Presses a key by its name.
    pub fn press(&mut self, key: &str) {
        let (code, text) = match key {
            "Tab" => (9, None),
            "Enter" => (13, Some("\r")),
            "ArrowLeft" => (37, None),
            "ArrowRight" => (39, None),
            _ => panic!("no code of {key}"),
        };
        let mut press = json!({"type": "keyDown", "key": key, "code": key, "windowsVirtualKeyCode": code});
        if let Some(text) = text {
            press["text"] = json!(text);
        }
        self.call("Input.dispatchKeyEvent", press.clone());
        press["type"] = json!("keyUp");
        self.call("Input.dispatchKeyEvent", press);
    }

    /// The lowest contrast of a text in the page, with that text.
    pub fn lowest_contrast(&mut self) -> Value {
        self.value(CONTRAST)
    }

    /// Checks the tree that screen readers get: one of each of `landmarks`, and a name for everything that takes focus.
    /// Nodes with a name.
    pub fn named_nodes(&mut self, landmarks: &[&str]) -> usize {
        let tree = self.call("Accessibility.getFullAXTree", json!({}));
        let nodes: Vec<&Value> =
            tree["nodes"].as_array().unwrap().iter().filter(|node| node["ignored"] == false).collect();
        let role = |node: &Value| node["role"]["value"].as_str().unwrap_or_default().to_owned();
        let roles: Vec<String> = nodes.iter().map(|node| role(node)).collect();
        for landmark in landmarks {
            assert_eq!(roles.iter().filter(|role| role == landmark).count(), 1, "{landmark}");
        }
        let mut named = 0;
        for node in &nodes {
            let takes_focus = node["properties"]
                .as_array()
                .into_iter()
                .flatten()
                .any(|property| property["name"] == "focusable" && property["value"]["value"] == true);
            let role = role(node);
            if takes_focus || ["table", "heading", "region"].contains(&&*role) {
                assert!(!node["name"]["value"].as_str().unwrap_or_default().is_empty(), "no name: {node}");
                named += 1;
            }
        }
        named
    }

    /// A picture of the whole page, as a PNG file.
    pub fn screenshot(&mut self) -> Vec<u8> {
        let answer = self.call("Page.captureScreenshot", json!({"captureBeyondViewport": true}));
        from_base64(answer["data"].as_str().unwrap())
    }

    pub fn write(&mut self, text: &str) {
        self.call("Input.insertText", json!({"text": text}));
    }
}

/// The bytes of a text in base64.
fn from_base64(text: &str) -> Vec<u8> {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let digits: Vec<u32> = text
        .bytes()
        .filter_map(|byte| DIGITS.iter().position(|digit| *digit == byte))
        .map(|digit| digit as u32)
        .collect();
    let bytes = |part: &[u32]| {
        let word = (0..4).fold(0, |word, i| word << 6 | part.get(i).copied().unwrap_or(0));
        word.to_be_bytes()[1..part.len()].to_vec()
    };
    digits.chunks(4).flat_map(bytes).collect()
}

impl Drop for Browser {
    fn drop(&mut self) {
        // It ends with its pipe; its helpers do so with it.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
