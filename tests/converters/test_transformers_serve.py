"""The command of the page on converting, as OpenAI's client sees it."""

import shlex
import subprocess
import sys
import time

import openai
import pytest

import keras_bwetaf
from tests import pages
from tests.test_processes import free_address

PROMPT = "Once upon a time"
START = 120  # Seconds, at most.


@pytest.fixture(scope="module")
def lm():
    return keras_bwetaf.from_preset("tiny")


@pytest.fixture
def client(lm, tmp_path):
    """Of a server that has the model."""
    lm.export_to_transformers(tmp_path / "bwetaf-torch")
    (command,) = (
        line
        for block in pages.blocks("docs/converting.md", "bash")
        for line in block.code.splitlines()
        if " serve " in line
    )
    python, *words = shlex.split(command)
    assert python == "python"
    host, port = free_address().split(":")
    server = subprocess.Popen(
        [sys.executable, *words, "--device", "cpu", "--port", port],
        cwd=tmp_path,
    )
    client = openai.OpenAI(base_url=f"http://{host}:{port}/v1", api_key="-")
    deadline = time.monotonic() + START
    try:
        while True:
            try:
                client.models.list()
                break
            except openai.APIConnectionError:
                assert server.poll() is None, "the server has ended"
                assert time.monotonic() < deadline, "it does not answer"
                time.sleep(0.5)
        yield client
    finally:
        client.close()
        server.terminate()
        server.wait()


@pytest.mark.slow
def test_completions_are_the_text_of_keras(lm, client):
    request = dict(
        model="bwetaf-torch", prompt=PROMPT, max_tokens=40, temperature=0
    )
    expected = lm.generate(
        PROMPT, max_new_tokens=40, temperature=0, strip_prompt=True
    )
    whole = client.completions.create(**request).choices[0].text
    assert whole == expected
    parts = [
        part.choices[0].text
        for part in client.completions.create(**request, stream=True)
        if part.choices
    ]
    assert len(parts) > 10
    assert "".join(parts) == expected
