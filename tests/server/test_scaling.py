"""The files of examples/kubernetes and examples/ray have the form they need, and Ray Serve runs the application.

The last is slow, and runs only where TWOFOLD_RAY_PYTHON names the Python of an environment with Twofold and `ray[serve]`.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from tiny_server import Running, question

from twofold.cli.flags import parse
from twofold.config import build
from twofold.recipes.serve import ServeConfig

pytest_plugins = ("tiny_fixtures", "server_fixtures")
EXAMPLES = Path(__file__).parents[2] / "examples"
PYTHON = os.environ.get("TWOFOLD_RAY_PYTHON")


# ---------------------------------------------------------------------------------------------- the files


@pytest.fixture(scope="module")
def objects() -> dict[str, Any]:
    return {o["kind"]: o for o in yaml.safe_load_all((EXAMPLES / "kubernetes" / "twofold.yaml").read_text())}


@pytest.fixture(scope="module")
def container(objects: dict[str, Any]) -> Any:
    (found,) = objects["Deployment"]["spec"]["template"]["spec"]["containers"]
    return found


def test_the_pods_command_is_one_that_twofold_takes(container: Any, objects: dict[str, Any]) -> None:
    verb, *flags = container["args"]
    assert (container["command"], verb) == (["twofold"], "serve")
    config = parse(ServeConfig, flags, verb="serve", description="")
    assert config.host == "0.0.0.0"
    assert config.port == container["ports"][0]["containerPort"]
    assert config.drain_seconds < objects["Deployment"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert {objects["Service"]["metadata"]["name"]} <= set(config.allowed_hosts)
    mounted = {m["mountPath"]: m for m in container["volumeMounts"]}
    assert mounted[str(config.adapters)]["readOnly"] is True


def test_the_probes_ask_what_the_server_answers_without_a_key(container: Any, live: Running) -> None:
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        probe = container[name]["httpGet"]
        assert probe["port"] == container["ports"][0]["name"]
        assert live.get(probe["path"], headers={"host": "10.1.2.3:8000"}).status_code == 200


def test_the_objects_find_one_another(objects: dict[str, Any], container: Any) -> None:
    pods = objects["Deployment"]["spec"]["template"]
    labels = pods["metadata"]["labels"]
    assert objects["Deployment"]["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert objects["Service"]["spec"]["selector"].items() <= labels.items()
    assert objects["Service"]["spec"]["ports"][0]["targetPort"] == container["ports"][0]["name"]
    volumes = {v["name"]: v for v in pods["spec"]["volumes"]}
    assert {m["name"] for m in container["volumeMounts"]} == set(volumes)
    claim = volumes["adapters"]["persistentVolumeClaim"]["claimName"]
    assert claim == objects["PersistentVolumeClaim"]["metadata"]["name"]
    assert all(o["apiVersion"] in ("v1", "apps/v1") for o in objects.values())


def test_rays_file_names_the_application_and_settings_that_exist() -> None:
    (application,) = yaml.safe_load((EXAMPLES / "ray" / "twofold.yaml").read_text())["applications"]
    module, _, name = application["import_path"].partition(":")
    source = importlib.util.find_spec(module)
    assert source is not None
    assert source.origin is not None
    assert f"def {name}(settings" in Path(source.origin).read_text()
    assert build(ServeConfig, application["args"], source="args").streams == 32
    assert [d["name"] for d in application["deployments"]] == ["twofold"]


# ---------------------------------------------------------------------------------------------- Ray


@pytest.fixture
def ray(llama_base: Path, adapters: Path, tmp_path: Path) -> Iterator[str]:
    """The application in two replicas of a Ray on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {
        "base": str(llama_base),
        "adapters": str(adapters),
        "name": "tiny",
        "dtype": "float32",
        "streams": 4,
        "context": 256,
    }
    (tmp_path / "run.py").write_text(
        "import signal, ray\n"
        "from ray import serve\n"
        "from twofold.server.ray_serve import app\n"
        "ray.init(num_cpus=4, include_dashboard=False, log_to_driver=True)\n"
        f"serve.start(http_options={{'host': '127.0.0.1', 'port': {port}}})\n"
        f"serve.run(app({settings!r}), _blocking=True)\n"
        "print('running', flush=True)\n"
        "signal.sigwait([signal.SIGTERM])\n"
        "serve.shutdown()\n"
        "ray.shutdown()\n"
    )
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([str(PYTHON), str(tmp_path / "run.py")], stdout=log, stderr=log, env=os.environ)
    try:
        deadline = time.monotonic() + 180
        while "\nrunning" not in (said := (tmp_path / "log").read_text()):
            assert process.poll() is None, said[-4000:]
            assert time.monotonic() < deadline, said[-4000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


@pytest.mark.slow
@pytest.mark.skipif(PYTHON is None, reason="TWOFOLD_RAY_PYTHON names no Python with Ray Serve")
def test_ray_serve_answers_as_our_own_server_does(ray: str, live: Running) -> None:
    for model in ("tiny", "red", "green", "tiny:blue"):
        found = httpx.post(f"{ray}/v1/chat/completions", json=question(model), timeout=60)
        assert found.status_code == 200, found.text
        assert found.json()["choices"][0]["message"]["content"] == live.say(model, "hat?")
    with httpx.stream("POST", f"{ray}/v1/chat/completions", json=question("red", stream=True), timeout=60) as response:
        assert list(response.iter_lines())[-2] == "data: [DONE]"
    assert httpx.post(f"{ray}/v1/chat/completions", json=question("rad"), timeout=60).status_code == 404
    assert httpx.get(f"{ray}/v1/models", headers={"host": "evil.example"}, timeout=60).status_code == 403
