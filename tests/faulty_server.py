"""A model server that is scripted, mostly to be wrong; it says its own process id and its child's at once.

python tests/faulty_server.py FAULT PORT WEIGHTS      # FAULT is one of `FAULTS`, or another that `main` knows, or `none`
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from servers import Answer, completion

FAULTS = {
    "hangs": "was not ready within",
    "dies": "the weights are damaged",
    "fails": "answered a completion with 500: the engine is dead",
    "other-name": "answers as 'somebody@else'",
    "no-ids": "no prompt ids",
    "no-logprobs": "no log-probabilities",
    "not-json": "is not JSON",
}
"""What is wrong with the server, and what is said of it."""


def main(fault: str, port: int, weights: str) -> None:
    stubborn = fault == "stubborn"
    if stubborn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # its child inherits that
    child = subprocess.Popen(["sleep", "600"])
    print("pids", os.getpid(), child.pid, flush=True)
    if fault == "hangs":
        time.sleep(600)
    if fault == "dies":
        raise ValueError("the weights are damaged")
    if fault == "taken" and not (first := Path("taken-before")).exists():
        first.touch()
        raise OSError(98, "Address already in use")
    ThreadingHTTPServer(("127.0.0.1", port), _handler(fault, weights)).serve_forever()


def _handler(fault: str, weights: str) -> type[BaseHTTPRequestHandler]:
    asked, names = 0, {weights}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._say(200, b"{}")

        def do_POST(self) -> None:
            nonlocal asked
            asked += 1
            raw = self.rfile.read(int(self.headers["content-length"]))
            request = json.loads(raw)
            if self.path.endswith("load_lora_adapter") and fault == "adapters":
                name, damaged = request["lora_name"], request.get("lora_path", "").endswith("damaged")
                (names.discard if "unload" in self.path else names.add)(name)
                time.sleep(5 if request.get("lora_path", "").endswith("slow") else 0)
                return self._say(400 if damaged else 200, b"damaged" if damaged else b"done")
            if "model" not in request:
                return self._say(404, b"nothing here")
            if fault == "fails":
                return self._say(500, b"the engine is dead")
            if fault == "not-json":
                return self._say(200, b"<html>")
            if fault == "loading" and asked < 3:
                return self._say(503, b"loading")
            if request["model"] not in names:
                return self._say(404, b"no such model")
            body = completion(request, raw, Answer("goal"))
            if fault == "other-name":
                body["model"] = "somebody@else"
            if fault == "no-ids":
                body.pop("prompt_token_ids")
            if fault == "no-logprobs":
                body["choices"][0].pop("logprobs")
            return self._say(200, json.dumps(body).encode())

        def _say(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
