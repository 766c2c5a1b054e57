"""The files of examples/kubernetes and examples/ray have the form they need, and Ray Serve runs the application.

The last is slow, and runs only where TWOFOLD_RAY_PYTHON names the Python of an environment with Twofold and `ray[serve]`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
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
    """The two replicas of the example's file, over a tiny base and the folder `root`, in a Ray on this machine."""
    shutil.copytree(adapters, tmp_path / "root")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    described = yaml.safe_load((EXAMPLES / "ray" / "twofold.yaml").read_text())
    described["http_options"] = {"host": "127.0.0.1", "port": port}
    (application,) = described["applications"]
    tiny = {"name": "tiny", "dtype": "float32", "streams": 4, "context": 256, "poll_seconds": 0.2}
    application["args"] |= {"base": str(llama_base), "adapters": str(tmp_path / "root"), **tiny}
    application["deployments"][0]["ray_actor_options"] = {"num_cpus": 1}
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(described))
    (tmp_path / "run.py").write_text(
        "import ray\n"
        "from ray.serve.scripts import cli\n"
        "ray.init(num_cpus=4, include_dashboard=False, log_to_driver=True)\n"
        f"cli(['run', {str(tmp_path / 'serve.yaml')!r}])\n"
    )
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([str(PYTHON), str(tmp_path / "run.py")], stdout=log, stderr=log, env=os.environ)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 300
        while not answers(f"{url}/ready"):
            said = (tmp_path / "log").read_text()
            assert process.poll() is None, said[-4000:]
            assert time.monotonic() < deadline, said[-4000:]
            time.sleep(0.5)
        yield url
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def ask(url: str, model: str) -> httpx.Response:
    return httpx.post(f"{url}/v1/chat/completions", json=question(model), timeout=60)


def answers(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(url, timeout=5).status_code == 200
    return False


@pytest.mark.slow
@pytest.mark.skipif(PYTHON is None, reason="TWOFOLD_RAY_PYTHON names no Python with Ray Serve")
def test_ray_serve_answers_as_our_own_server_does(ray: str, live: Running, tmp_path: Path) -> None:
    for model in ("tiny", "red", "green", "tiny:blue"):
        found = ask(ray, model)
        assert found.status_code == 200, found.text
        assert found.json()["choices"][0]["message"]["content"] == live.say(model, "hat?")
    with httpx.stream("POST", f"{ray}/v1/chat/completions", json=question("red", stream=True), timeout=60) as response:
        assert list(response.iter_lines())[-2] == "data: [DONE]"
    assert ask(ray, "rad").status_code == 404
    assert httpx.get(f"{ray}/v1/models", headers={"host": "evil.example"}, timeout=60).status_code == 403
    shutil.copytree(tmp_path / "root" / "red", tmp_path / "root" / ".coming")
    (tmp_path / "root" / ".coming").rename(tmp_path / "root" / "twin")
    deadline = time.monotonic() + 30
    while {ask(ray, "twin").status_code for _ in range(12)} != {200}:  # until every replica has looked
        assert time.monotonic() < deadline
