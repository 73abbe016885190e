"""A server of SmolLM2 for scripts of this folder that run clients against it."""

import socket
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benches")]
from processes import Process  # noqa: E402


class Server:
    """configs/server/smollm2_lora.yaml on `ranks` ranks and a free port, with its files in `folder`."""

    def __init__(self, binary, ranks, folder, **settings):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        model = str(ROOT / "models/smollm2")
        settings = {"model_path": model, "tokenizer_path": model, "output_dir": folder, "api_port": port, **settings}
        command = [ROOT / "launch/serve.sh", "-n", ranks, ROOT / "configs/server/smollm2_lora.yaml", "--device", "cpu"]
        for name, value in settings.items():
            command += [f"--server.{name}", value]
        self.process = Process(command, {"XORL_DIST": str(binary)}, binary, watch=False)

    def __enter__(self):
        while True:
            if self.process.process.poll() is not None:
                self.process.wait()
                raise SystemExit("the server ended before it took requests")
            try:
                with urllib.request.urlopen(f"{self.url}/health"):
                    return self
            except urllib.error.URLError:
                time.sleep(0.2)

    def __exit__(self, *_):
        self.process.stop()
