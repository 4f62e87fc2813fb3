"""examples/make_wolf_questions.py against an endpoint of this process, killed and started again."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "make_wolf_questions.py"
REPLY = json.dumps({"question": "How many?", "answer": "Two pedestrians wait."})


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked, self.hang_at, self.fail_first = [], None, 0
        self.hanging, self.released = threading.Event(), threading.Event()


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def do_POST(self):
        server = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.asked.append(request)
        if server.hang_at == len(server.asked):
            server.hanging.set()
            server.released.wait(60)
            return
        failing = len(server.asked) <= server.fail_first
        message = {"role": "assistant", "content": REPLY}
        content = {"choices": [{"index": 0, "finish_reason": "stop", "message": message}]}
        content |= {"id": "1", "object": "chat.completion", "created": 0, "model": request["model"]}
        body = json.dumps({} if failing else content).encode()
        self.send_response(500 if failing else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def server():
    pytest.importorskip("openai", reason='the extra "serve" is not installed')
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.released.set()
        server.shutdown()


@pytest.fixture
def captions(tmp_path):
    path = tmp_path / "captions.jsonl"
    clips = [{"clip_id": f"c{i}", "video": f"{i}.mp4", "caption": f"Two pedestrians wait ({i})."} for i in range(5)]
    path.write_text("".join(json.dumps(clip) + "\n" for clip in clips))
    return path


def command(captions, output, *arguments):
    return [sys.executable, str(SCRIPT), "--captions", str(captions), "--output", str(output), *arguments]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OPENAI_API_KEY": "x"}


def run(*arguments):
    return subprocess.run(command(*arguments), env=ENVIRONMENT, capture_output=True, text=True, timeout=120)


def test_killed_run_goes_on_and_ends_as_if_it_was_not(server, captions, tmp_path):
    address = f"http://127.0.0.1:{server.server_port}/v1"
    arguments = ("--model", "m", "--base-url", address, "--concurrency", "1")
    server.hang_at = 4
    process = subprocess.Popen(
        command(captions, tmp_path / "killed", *arguments),
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not server.hanging.wait(0.1):
            assert process.poll() is None, "the run ended by itself"
    finally:
        process.kill()
        process.wait()
    assert len((tmp_path / "killed" / "clips.jsonl").read_bytes().splitlines()) == 3
    assert not (tmp_path / "killed" / "wolf_qa.jsonl").exists()
    done = run(captions, tmp_path / "killed", *arguments)
    assert done.returncode == 0, done.stderr
    assert len(server.asked) == 4 + 2  # the fourth got no reply; nothing that was done is asked again
    assert server.asked[-1]["temperature"] == 0 and "(4)" in server.asked[-1]["messages"][0]["content"]
    whole = run(captions, tmp_path / "whole", *arguments[:-1], "3")
    assert whole.returncode == 0, whole.stderr
    for name in ("wolf_qa.jsonl", "rejected.jsonl", "report.json", "settings.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert len((tmp_path / "whole" / "wolf_qa.jsonl").read_bytes().splitlines()) == 5


def test_failing_requests_are_repeated(server, captions, tmp_path):
    server.fail_first = 1
    address = f"http://127.0.0.1:{server.server_port}/v1"
    done = run(captions, tmp_path / "out", "--model", "m", "--base-url", address)
    assert done.returncode == 0 and len(server.asked) == 6, done.stderr


def test_rules_need_no_model_and_other_settings_are_refused(captions, tmp_path):
    done = run(captions, tmp_path / "out", "--rules")
    assert done.returncode == 0 and json.loads(done.stdout)["pairs"] == 5, done.stderr
    captions.write_text(captions.read_text().replace("Two", "Three"))
    refused = run(captions, tmp_path / "out", "--rules")
    assert refused.returncode == 1 and "captions_sha256" in refused.stderr and "Traceback" not in refused.stderr
