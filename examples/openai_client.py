"""OpenAI's own client against `twofold serve`: models, an answer, a stream, and an answer with a form.

    python examples/openai_client.py [URL]

Without a URL it starts a server of its own, on the built-in base.
"""

import contextlib
import os
import socket
import subprocess
import sys
import time

import openai


@contextlib.contextmanager
def own_server():
    """`twofold serve` on a free port, until the block ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "twofold", "serve", "--port", str(port), "--context", "512"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def when_ready(client, patience):
    """The models of a server that may still be loading its base, for so many seconds at most."""
    until = time.monotonic() + patience
    while True:
        try:
            return client.models.list()
        except openai.APIConnectionError:
            if time.monotonic() > until:
                raise SystemExit(f"no server answers at {client.base_url}") from None
            time.sleep(0.5)


def talk(url, patience):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("TWOFOLD_API_KEY", "none"))
    models = [model.id for model in when_ready(client, patience)]
    print("models:", ", ".join(models))
    model = models[0]  # an adapter is asked for by its name, in the same way
    messages = [{"role": "user", "content": "What is the capital of France? One sentence."}]

    answer = client.chat.completions.create(model=model, messages=messages, max_tokens=32, temperature=0)
    print("answer:", answer.choices[0].message.content)
    print("tokens:", answer.usage.total_tokens)

    stream = client.chat.completions.create(model=model, messages=messages, max_tokens=32, temperature=0, stream=True)
    print("stream:", end=" ")
    for chunk in stream:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()

    schema = {"type": "object", "properties": {"capital": {"type": "string", "maxLength": 20}}, "required": ["capital"]}
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": {**schema, "additionalProperties": False}}}
    answer = client.chat.completions.create(
        model=model, messages=messages, max_tokens=64, temperature=0, response_format=form
    )
    print("in a form:", answer.choices[0].message.content)

    try:
        client.chat.completions.create(model=model + "x", messages=messages)
    except openai.NotFoundError as error:
        print("a wrong name:", error.body["message"])


if len(sys.argv) > 1:
    talk(sys.argv[1], patience=5)
else:
    with own_server() as where:
        talk(where, patience=300)
