"""`sample.py llamagen --engine` without vLLM: what is asked of a server, and what goes wrong. See also test_vllm.py."""
import base64
import http.server
import io
import json
import sys
import threading
from functools import partial

import pytest
import torch

import llamagen
import sample
import vq
from helpers import complaint, info, run
from lib import serving
from lib.console import UserError


class Answers(http.server.BaseHTTPRequestHandler):
    """A server that answers as vLLM's does, and remembers what it was asked."""

    served = {"classes.safetensors": 17, "text.safetensors": 22}            # name -> longest sequence
    asked = []
    tokens = list(range(16))

    def answer(self, content, code=200):
        self.send_response(code)
        self.end_headers()
        self.wfile.write(content if isinstance(content, bytes) else json.dumps(content).encode())

    def do_GET(self):
        self.answer({"data": [{"id": name, "max_model_len": n} for name, n in self.served.items()]})

    def do_POST(self):
        self.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        if self.tokens is None:
            return self.answer({"error": "too much"}, 400)
        self.answer({"choices": [{"token_ids": self.tokens}]})

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(Answers, "asked", [])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_classes_and_texts_are_asked_for(server, token_files, tmp_path):
    argv = ("llamagen", "--engine", server, "--vq", token_files[1], "--device", "cpu", "--out", tmp_path / "a.png")
    run(sample, *argv, "--ckpt", token_files[2], "--classes", "dog", "fox", "--cfg", 3, "--cfg-interval", 5, "--seed",
        7)
    first, second = sorted(Answers.asked, key=lambda question: question["seed"])
    model = llamagen.load(token_files[2])
    V = model.config.vocab_size
    assert (first["prompt"], second["prompt"], second["seed"]) == ([V + 1], [V + 3], 8)
    assert first["vllm_xargs"] == {"cfg": 3.0, "cfg_interval": 5} and first["max_tokens"] == 16
    assert info(tmp_path / "a.png")[1]["engine"] == server
    Answers.asked.clear()
    run(sample, *argv, "--ckpt", token_files[3], "--prompt", "a cat")
    slots = torch.load(io.BytesIO(base64.b64decode(Answers.asked[0]["prompt_embeds"])), weights_only=True)
    assert slots.shape == (6, llamagen.load(token_files[3]).config.width)   # five bytes and the end


def test_the_tokens_are_decoded(server, token_files):
    model = llamagen.load(token_files[2])
    tokenizer = vq.load(token_files[1])
    engine = serving.Server(server, token_files[2], model.config)
    images = serving.sample(engine, model, tokenizer, torch.tensor([0, 1]), None, [1.0, 2.0], [0, 1], cfg_interval=-1,
                            temperature=1.0, top_k=0, top_p=0)
    expected = model.decode(tokenizer, torch.tensor([Answers.tokens] * 2))
    assert torch.equal(images, expected) and Answers.asked[0]["top_p"] == 1.0


def test_what_goes_wrong(server, token_files, tmp_path, capsys, monkeypatch):
    say = partial(complaint, capsys, sample, "llamagen", "--ckpt", token_files[2], "--vq", token_files[1], "--device",
                  "cpu", "--classes", "dog", "--out", tmp_path / "a.png", "--engine")
    assert "expected vllm, or the address of a server" in say("tpu")
    assert "no answer of vLLM's server" in say("http://127.0.0.1:9")
    assert "exclude each other" in say(server, "--steps-grid")
    monkeypatch.setattr(Answers, "tokens", None)
    assert "refused, 400 Bad Request" in say(server)
    monkeypatch.setattr(Answers, "served", {"classes.safetensors": 65})
    assert "draws 64 tokens for a picture, but here it has 16" in say(server)
    monkeypatch.setattr(Answers, "served", {"other.pt": 17})
    assert "serves other.pt, not classes.safetensors" in say(server)
    monkeypatch.setattr(Answers, "do_GET", lambda self: self.answer(b"<html>hello"))
    assert "no answer of vLLM's server" in say(server)
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert "--engine vllm: needs vLLM: pip install vllm" in say("vllm")


def test_the_folder_for_vllm(tmp_path):
    config = llamagen.CONFIGS["c2i_3B_384"]
    serving.write_folder(tmp_path, "c2i_3B_384.pt", config, torch.bfloat16)
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["head_dim"], written["vocab_size"], written["dtype"]) == (112, 2 * 16384, "bfloat16")
    assert llamagen.Config(**written["sizes"]) == config
    with pytest.raises(UserError, match="20000 classes; expected less than 16384"):
        serving.write_folder(tmp_path, "a.pt", llamagen.Config(num_classes=20000), torch.float32)
