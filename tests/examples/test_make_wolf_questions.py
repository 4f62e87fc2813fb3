"""examples/make_wolf_questions.py with rules, with a small local model, and with an endpoint."""

import copy
import http.server
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

SCRIPT = Path(__file__).parents[2] / "examples" / "make_wolf_questions.py"
CAPTION = "The ego vehicle slows down. Two white cars stand on the left. It waits for a pedestrian."


@pytest.fixture
def captions(tmp_path):
    file = tmp_path / "captions.jsonl"
    rows = [{"clip_id": f"c{number}", "video": f"{number}.mp4", "caption": CAPTION} for number in range(3)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def run(*options):
    done = subprocess.run([sys.executable, SCRIPT, *map(str, options)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def pairs(folder):
    return [json.loads(line) for line in (folder / "wolf_qa.jsonl").read_text().splitlines()]


def test_rules_need_no_model(captions, tmp_path):
    printed = run("--captions", captions, "--rules", "--output", tmp_path / "wolf")
    assert printed.startswith("9 pairs from 3 clips")
    sentences = [sentence for pair in pairs(tmp_path / "wolf") for sentence in pair["answer"].rstrip(".").split(". ")]
    assert sentences and all(sentence in CAPTION for sentence in sentences)


def test_garbage_of_a_local_model_is_rejected(captions, tmp_path, tiny_tokenizer):
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tiny_tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, eos_token_id=tiny_tokenizer.eos_token_id, pad_token_id=tiny_tokenizer.pad_token_id,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "model")
    local = ["--captions", captions, "--model", tmp_path / "model", "--max-new-tokens", 4]
    printed = run(*local, "--output", tmp_path / "wolf")
    assert printed.startswith("0 pairs from 3 clips") and "no JSON object with question and answer: 9" in printed
    rejected = (tmp_path / "wolf" / "rejected.jsonl").read_text().splitlines()
    assert len(rejected) == 9 and pairs(tmp_path / "wolf") == []


def test_endpoint_is_asked_for_each_topic(captions, tmp_path):
    pytest.importorskip("openai", reason='the extra "serve" is not installed')
    asked = []

    class Endpoint(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(request["messages"][0]["content"])
            pair = json.dumps({"question": "What stands on the left?", "answer": "Two white cars."})
            message = {"role": "assistant", "content": pair}
            body = json.dumps(
                {
                    "id": "1", "object": "chat.completion", "created": 0, "model": request["model"],
                    "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                }
            ).encode()  # fmt: skip
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endpoint) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/v1"
        run("--captions", captions, "--model", "some", "--base-url", url, "--output", tmp_path / "wolf")
        server.shutdown()
    assert len(asked) == 9 and all(CAPTION in prompt for prompt in asked)
    assert len(pairs(tmp_path / "wolf")) == 9
