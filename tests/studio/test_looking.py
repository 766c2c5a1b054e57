"""What a page reads: files, adapters, plans and previews, equal to what the recipes say, and nothing outside of the roots."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from studio_app import Live, sentence

from twofold.adapter.files import open_adapter
from twofold.adapter.updates import updates_of
from twofold.recipes.inspect import compare, inspect_adapter
from twofold.recipes.plan import PlanSettings, plan
from twofold.studio.catalogue import bases, entries
from twofold.studio.roots import open_roots

pytest_plugins = ("tiny_fixtures",)
MODULE = "model.layers.0.self_attn.q_proj"


def test_it_says_what_there_is(live: Live) -> None:
    about = live.get("/api/about").json()
    assert {"name": "work", "path": str(live.root)} in about["roots"]
    assert "work/tiny-llama" in about["bases"]
    assert about["defaults"]["train"]["training"]["learning_rate"] == 2e-4
    assert "ties" in about["choices"]["combine_methods"]
    listed = {a["id"]: a for a in live.get("/api/adapters").json()["adapters"]}
    assert listed["work/red"]["r"] == 4
    assert MODULE in listed["work/red"]["modules"]
    kinds = {e["name"]: e["kind"] for e in live.get("/api/files?root=work").json()["entries"]}
    expected = {"red": "adapter", "tiny-llama": "base", "data.jsonl": "data"}
    assert {name: kinds[name] for name in expected} == expected


def test_a_module_can_be_drawn_at_any_rank(live: Live) -> None:
    found = live.get("/api/adapters/module", params={"adapter": "work/red", "module": MODULE}).json()
    delta = updates_of(open_adapter(live.root / "red"))[MODULE].delta().double()
    u, values, vh = torch.linalg.svd(delta)
    assert found["shape"] == list(delta.shape)
    assert found["singular_values"] == pytest.approx(values[:4].tolist(), rel=1e-5)
    assert found["energy"] == pytest.approx(float(delta.square().sum()), rel=1e-5)
    for r in (1, 3, 4):  # 32 rows and columns: each is a block of its own
        drawn = torch.tensor(found["u"])[:, :r] * torch.tensor(found["singular_values"])[:r]
        drawn = drawn @ torch.tensor(found["v"])[:, :r].T
        best = u[:, :r] * values[:r] @ vh[:r]
        assert torch.allclose(drawn.double(), best, atol=1e-5)
    said = live.get("/api/adapters/module", params={"adapter": "work/red", "module": "model.layers.0.self_attn.q_prj"})
    assert "q_proj" in sentence(said)


def test_a_wide_module_is_drawn_in_the_means_of_its_blocks() -> None:
    from twofold.studio.pictures import block_means

    wide = torch.arange(200.0).reshape(100, 2)
    found = block_means(wide, 10)
    assert torch.equal(found, torch.stack([wide[i * 10 : i * 10 + 10].mean(0) for i in range(10)]))


def test_figures_are_those_of_the_command_line(live: Live) -> None:
    red, green = live.root / "red", live.root / "green"
    inspected = live.made("/api/inspect", {"adapter": "work/red", "base": "work/tiny-llama"})
    assert inspected == inspect_adapter(red, str(live.root / "tiny-llama")).as_json()
    assert live.made("/api/lint", {"adapter": "work/red"})["findings"] == inspect_adapter(red).as_json()["findings"]
    expected = json.loads(json.dumps(compare(red, green).as_json()))
    assert live.made("/api/compare", {"a": "work/red", "b": "work/green"}) == expected
    settings = {"base": "llama-3.1-8b", "r": 8, "target_modules": "attention", "memory": "24GB"}
    planned, direct = live.made("/api/plan", settings), plan(PlanSettings(**settings))  # type: ignore[arg-type]
    assert {k: planned[k] for k in ("parameters", "memory", "budget")} == {
        k: direct[k] for k in ("parameters", "memory", "budget")
    }
    assert sum(t["expected"] for t in planned["terms"]) == planned["memory"]["total"]["expected"]
    assert sum(t["low"] for t in planned["terms"]) == pytest.approx(planned["memory"]["total"]["low"], abs=20)
    assert [g["fits"] for g in planned["gpus"]] == sorted(
        (g["fits"] for g in planned["gpus"]), key=["does not fit", "tight", "fits"].index
    )
    there = plan(PlanSettings(**settings, device="cuda"))["memory"]["total"]  # type: ignore[arg-type]
    assert planned["gpu_memory"] == there
    assert [g["bytes"] >= there["high"] for g in planned["gpus"]] == [g["fits"] == "fits" for g in planned["gpus"]]
    three = live.made("/api/plan", {**settings, "compare": True})
    assert three["full"]["memory"]["total"]["expected"] > three["qlora"]["memory"]["total"]["expected"]


def test_data_is_shown_token_by_token(live: Live) -> None:
    config = {"base": "work/tiny-llama", "data": {"train": "work/data.jsonl"}}
    found = live.made("/api/preview", {"config": config, "examples": 2})
    assert found["train"]["examples"] == 23
    assert len(found["samples"]) == 2
    said = "".join(text for text, supervised in found["samples"][0] if supervised)
    assert said.startswith("black cup")


def test_adapters_are_made_as_the_command_line_makes_them(live: Live) -> None:
    two = {"adapters": [{"id": "work/red", "weight": 0.5}, {"id": "work/green"}], "method": "svd", "r": 4}
    preview = live.made("/api/combine/preview", two)
    made = live.made("/api/combine", {**two, "output": "both"})
    assert made["output"] == "work/adapters/both"
    assert made["lost"] == preview["lost"] > 0
    assert "exists already" in live.refusal("/api/combine", {**two, "output": "both"})
    curve = live.made("/api/resize/curve", {"adapter": "work/red"})
    resized = live.made("/api/resize", {"adapter": "work/red", "r": 2, "output": "red-2"})
    assert 1 - resized["lost"] == pytest.approx(curve["total"][1], rel=1e-6)
    assert inspect_adapter(live.root / "adapters" / "red-2").r == 2
    for name in ("../x", "a/b", "", ".x", "x\0"):
        assert "cannot name" in live.refusal("/api/resize", {"adapter": "work/red", "r": 2, "output": name})


# ---------------------------------------------------------------------------------------------- mistakes


def test_every_mistake_is_one_sentence(live: Live) -> None:
    assert "did you mean 'adapter'" in live.refusal("/api/inspect", {"adaptr": "work/red"})
    assert "did you mean 'sequence_length'" in live.refusal("/api/plan", {"sequence_lenght": 3})
    assert "JSON" in sentence(httpx.post(live.url + "/api/plan", content=b"{"))
    assert "JSON object" in sentence(httpx.post(live.url + "/api/plan", content=b"[1]"))
    assert "at most" in sentence(httpx.post(live.url + "/api/plan", content=b" " * 5_000_000))
    half = httpx.post(live.url + "/api/inspect", content=b'{"adapter": "work/\\ud800"}')
    assert (half.status_code, "half of a surrogate pair" in sentence(half)) == (400, True)
    assert "cannot find the files of" in live.refusal("/api/inspect", {"adapter": "work/red", "base": "no/such-base"})
    far = {"adapters": [{"id": "work/red"}], "method": "dare_linear", "seed": 2**70, "output": "far"}
    assert "seed is 1180591620717411303424 but must be" in live.refusal("/api/combine", far)
    assert "'config'" in live.refusal("/api/preview", {})
    assert live.get("/api/nothing").status_code == 404
    assert "/api/nothing" in sentence(live.get("/api/nothing"))
    (live.root / "broken").mkdir(exist_ok=True)
    (live.root / "broken" / "adapter_config.json").write_text("{")
    (live.root / "broken" / "adapter_model.safetensors").write_bytes(b"x")
    listed = {a["id"]: a for a in live.get("/api/adapters").json()["adapters"]}
    assert "not valid JSON" in listed["work/broken"]["error"]
    said = live.refusal("/api/inspect", {"adapter": "work/broken"})
    assert "work/broken" in said
    assert str(live.root) not in said


@pytest.mark.parametrize(
    "reference",
    [
        "work/../outside",
        "work/..",
        "/etc",
        "work//etc/passwd",
        "work/way-out",
        "nowhere/x",
        "work/.hidden",
        "work/\0",
        "",
    ],
)
def test_nothing_outside_of_the_roots_is_found(live: Live, reference: str) -> None:
    outside = live.root.parent / "outside"
    outside.mkdir(exist_ok=True)
    (outside / "secret.jsonl").write_text("{}\n")
    way_out = live.root / "way-out"
    if not way_out.is_symlink():
        way_out.symlink_to(outside)
    (live.root / ".hidden").mkdir(exist_ok=True)
    assert "nothing lies" in live.refusal("/api/inspect", {"adapter": reference}, status=404)
    assert live.get("/api/files", params={"root": "work", "path": reference.removeprefix("work/")}).status_code in (
        200,
        404,
    )
    names = {e["name"] for e in live.get("/api/files", params={"root": "work"}).json()["entries"]}
    assert not names & {"way-out", ".hidden"}


def test_names_that_are_no_text_hide_nothing_else(tmp_path: Path) -> None:
    for name in (b"\xff.jsonl", b"data.jsonl"):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_text("{}\n")
    for name in (b"tiny", b"tiny\xff"):
        folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
        folder.mkdir()
        for file in ("config.json", "model.safetensors"):
            (folder / file).touch()
    roots = open_roots((tmp_path,))
    root = next(iter(roots.folders))
    assert [entry["name"] for entry in entries(roots, root)] == ["tiny", "data.jsonl"]
    assert bases(roots) == [f"{root}/tiny"]


def test_links_inside_an_adapter_lead_nowhere(live: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = live.root / "linked"
    folder.mkdir(exist_ok=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        target = tmp_path / name
        target.write_bytes((live.root / "red" / name).read_bytes())
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(target)
    assert "leads out" in live.refusal("/api/inspect", {"adapter": "work/linked"}, status=404)
    config: dict[str, Any] = {"base": "work/tiny-llama", "data": {"train": str(tmp_path / "x.jsonl")}}
    assert "nothing is called" in live.refusal("/api/preview", {"config": config}, status=404)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    config["data"] = {"train": "a/b"}  # looks like a hub id, but is a folder where the Studio runs
    assert "nothing is called" in live.refusal("/api/preview", {"config": config}, status=404)


def test_roots_have_names_of_their_own(tmp_path: Path) -> None:
    from twofold.errors import ConfigError

    (tmp_path / "a" / "x").mkdir(parents=True)
    (tmp_path / "b" / "x").mkdir(parents=True)
    assert [*open_roots((tmp_path / "a", tmp_path / "b")).folders][:2] == ["a", "b"]
    with pytest.raises(ConfigError, match="two roots"):
        open_roots((tmp_path / "a" / "x", tmp_path / "b" / "x"))
    with pytest.raises(ConfigError, match="no folder"):
        open_roots((tmp_path / "none",))
