"""`fastvlm serve` as a process: what it prints, and how it ends."""

import os
import re
import signal
import socket
import subprocess
import sys

import openai
import pytest
from serving import read


def start(*arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "fastvlm_mlx", "serve", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def test_an_answer_on_its_way_comes_before_the_end(mlx_bundle):
    process = start(mlx_bundle, "--port", 0, "--name", "shapes", FASTVLM_API_KEY="secret")
    try:
        line = process.stdout.readline()
        url = re.fullmatch(r"shapes at (http://127\.0\.0\.1:\d+/v1) .*\n", line)[1]
        client = openai.OpenAI(base_url=url, api_key="secret", max_retries=0)
        stream = client.chat.completions.create(
            model="shapes",
            messages=[{"role": "user", "content": "Well?"}],
            temperature=2,
            max_tokens=100,
            stream=True,
        )
        chunks = iter(stream)
        next(chunks)
        process.send_signal(signal.SIGINT)
        assert [*chunks][-1].choices[0].finish_reason in ("stop", "length")
        _, told = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0
    assert "Traceback" not in told
    assert told.splitlines()[-1] == "stopped"
    assert re.search(r"POST · /v1/chat/completions · 200 · .* tokens", told)


def test_what_does_not_come_to_its_end_in_time_is_told_so(mlx_bundle):
    process = start(mlx_bundle, "--port", 0, "--shutdown-timeout", 1)
    try:
        port = int(re.search(r":(\d+)/v1", process.stdout.readline())[1])
        head = b"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: 9\r\n"
        with socket.create_connection(("127.0.0.1", port), timeout=20) as to:
            to.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nExpect: 100-continue\r\n")
            to.sendall(head + b"\r\n")
            assert to.recv(1000).startswith(b"HTTP/1.1 100")
            process.send_signal(signal.SIGTERM)
            assert read(to).startswith(b"HTTP/1.1 503")
        _, told = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "Traceback" not in told


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--host", "0.0.0.0"], "expected a key too"),
        (["--allow-url", "http://a.example"], "--allow-url is"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--name", "a\x01"], "expected printable text, give --name"),
    ],
)
def test_a_mistake_is_a_sentence(mlx_bundle, arguments, said):
    process = start(mlx_bundle, "--port", 0, *arguments)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 2
    assert told.startswith("error: ")
    assert said in told
    assert told.count("\n") == 1
