"""A merge from disk to disk against the one in memory, and what it leaves when it is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from twofold.adapter.attach import activate, attach
from twofold.adapter.config import LoraConfig
from twofold.base.load import Base, load_base
from twofold.base.stored import StoredBase, open_stored
from twofold.errors import BaseError, ConfigError, RunError
from twofold.events import Event, Message
from twofold.merging.checkpoint import write_merged
from twofold.merging.disk import NotStreamed, differing, plan_replay, write_replay
from twofold.recipes.merge import check_merged, merge_checkpoint, said_of_check, write

pytest_plugins = ("tiny_fixtures",)

CASES: dict[str, dict[str, Any]] = {
    "all-linear": {},
    "dora": {"use_dora": True},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head"]},
    "saved-head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
}


def stored_as(source: Path, folder: Path, dtype: str, shard: str) -> Path:
    """The base anew in another type and other shards, with a file that no tool knows."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size=shard)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    (folder / "NOTES.txt").write_text("as it is\n")
    return folder


def adapted(folder: Path, dtype: Any, *names: str, **settings: Any) -> Base:
    base = load_base(str(folder), dtype, "cpu")
    torch.manual_seed(0)  # in a process of its own too
    for i, name in enumerate(names or ("default",)):
        attach(base.model, LoraConfig(**{"r": 4, **settings}), name)
        generator = torch.Generator().manual_seed(30 + i)
        for parameter in (p for p in base.model.parameters() if p.requires_grad):
            parameter.data += torch.randn(parameter.shape, generator=generator).to(parameter) * 0.05
    return base


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


def written(base: Base, folder: Path) -> StoredBase:
    write_replay(plan_replay(base.model, open_stored(base.reference)), folder)
    return open_stored(str(folder))


def check_equal(base: Base, tmp_path: Path) -> None:
    """Both ways hold the same tensors, bit for bit, and the folder from disk loads as it is."""
    written(base, tmp_path / "disk")
    write_merged(base.model, base.tokenizer, tmp_path / "memory")
    ours, theirs = tensors(tmp_path / "disk"), tensors(tmp_path / "memory")
    assert ours.keys() == theirs.keys()
    assert [k for k in ours if ours[k].dtype != theirs[k].dtype or not torch.equal(ours[k], theirs[k])] == []
    tie = [
        json.loads((tmp_path / f / "config.json").read_text()).get("tie_word_embeddings") for f in ("disk", "memory")
    ]
    assert tie[0] == tie[1]
    told = AutoModelForCausalLM.from_pretrained(tmp_path / "disk", output_loading_info=True)[1]
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
@pytest.mark.parametrize("kind", ["llama_base", "tied_base"])
def test_every_kind_of_layer_as_in_memory(
    kind: str, settings: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    check_equal(adapted(request.getfixturevalue(kind), "float32", **settings), tmp_path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["tied_base", "gpt2_base"])
def test_shards_and_types_as_in_memory(kind: str, dtype: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder = stored_as(request.getfixturevalue(kind), tmp_path / "base", dtype, "20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    check_equal(adapted(folder, dtype), tmp_path)


def test_a_cut_tie_among_shards(tied_base: Path, tmp_path: Path) -> None:
    folder = stored_as(tied_base, tmp_path / "base", "bfloat16", "20KB")
    check_equal(adapted(folder, "bfloat16", target_modules=["lm_head"]), tmp_path)
    index = json.loads((tmp_path / "disk" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors(tmp_path / "disk"))
    assert index["metadata"]["total_parameters"] == sum(t.numel() for t in tensors(tmp_path / "disk").values())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(tmp_path / "disk").values())


def test_several_weighted_adapters(llama_base: Path, tmp_path: Path) -> None:
    base = adapted(llama_base, "float32", "one", "two")
    activate(base.model, {"one": 0.7, "two": -0.3})
    check_equal(base, tmp_path)


def test_all_else_stays_byte_for_byte(llama_base: Path, tmp_path: Path) -> None:
    folder = stored_as(llama_base, tmp_path / "base", "bfloat16", "20KB")
    base = adapted(folder, "bfloat16", target_modules=["q_proj"])
    found = written(base, tmp_path / "merged")
    assert {p.name for p in folder.iterdir()} == {p.name for p in (tmp_path / "merged").iterdir()}
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            assert (tmp_path / "merged" / path.name).read_bytes() == path.read_bytes(), path.name
    before = open_stored(str(folder))
    assert {n: f.header for n, f in found.shards.items()} == {n: f.header for n, f in before.shards.items()}
    moved = {k for k in before.where if not torch.equal(before.read(k), found.read(k))}
    assert moved == {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)}


def test_another_template_replaces_the_bases(llama_base: Path, tmp_path: Path) -> None:
    base = adapted(llama_base, "float32")
    replay = plan_replay(base.model, open_stored(base.reference))
    write_replay(replay, tmp_path / "merged", chat_template="{{ messages[0]['content'] }}")
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == "{{ messages[0]['content'] }}"


def test_the_check_tells_one_bit(llama_base: Path, tmp_path: Path) -> None:
    base = adapted(llama_base, "float32")
    replay = plan_replay(base.model, open_stored(base.reference))
    folder = written(base, tmp_path / "merged")
    assert differing(replay, folder) == {}
    path = tmp_path / "merged" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    last = folder.shards[path.name].in_order()[-1]
    assert differing(replay, open_stored(str(tmp_path / "merged"))) == {last: "other values"}


def test_a_folder_that_is_not_there_is_told(tied_base: Path, tmp_path: Path) -> None:
    with pytest.raises(BaseError, match="no merged checkpoint at"):
        check_merged(adapted(tied_base, "float32"), tmp_path / "nowhere")


@pytest.mark.parametrize(("target", "tied"), [("lm_head", False), ("q_proj", True)])
def test_the_check_tells_a_config_that_ties_otherwise(target: str, tied: bool, tied_base: Path, tmp_path: Path) -> None:
    base = adapted(tied_base, "float32", target_modules=[target])
    written(base, tmp_path / "merged")
    assert check_merged(base, tmp_path / "merged")["holds_the_adapter"]
    path = tmp_path / "merged" / "config.json"
    config = json.loads(path.read_text())
    assert config["tie_word_embeddings"] is tied
    path.write_text(json.dumps({**config, "tie_word_embeddings": not tied}))
    found = check_merged(base, tmp_path / "merged")
    assert not found["holds_the_adapter"]
    assert said_of_check(found) == (
        f"{tmp_path / 'merged'} has every tensor of this base with this adapter merged in, but its config.json says "
        f"tie_word_embeddings: {str(not tied).lower()}, though its head is {'its embedding' if tied else 'a tensor of its own'}"
    )


def test_another_type_than_the_files_is_not_streamed(llama_base: Path) -> None:
    with pytest.raises(NotStreamed, match="stored in"):
        plan_replay(adapted(llama_base, "bfloat16").model, open_stored(str(llama_base)))


def test_an_output_that_exists_is_refused(llama_base: Path, tmp_path: Path) -> None:
    base = adapted(llama_base, "float32")
    (tmp_path / "there").mkdir()
    with pytest.raises(RunError, match="exists already"):
        written(base, tmp_path / "there")


def test_the_recipe_streams_and_says_where_it_cannot(llama_base: Path, tmp_path: Path) -> None:
    heard: list[Event] = []
    found = merge_checkpoint(adapted(llama_base, "float32"), tmp_path / "disk", emit=heard.append)
    assert found["verification"]["passed"]
    assert not any(isinstance(e, Message) and "in memory" in e.text for e in heard)
    assert check_merged(adapted(llama_base, "float32"), tmp_path / "disk")["holds_the_adapter"]
    assert not check_merged(adapted(llama_base, "float32", use_dora=True), tmp_path / "disk")["holds_the_adapter"]
    merge_checkpoint(adapted(llama_base, "bfloat16"), tmp_path / "memory", emit=heard.append)
    assert any(isinstance(e, Message) and "in memory" in e.text for e in heard)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])  # from disk, and in memory
def test_other_files_go_along_and_what_does_not_is_said(dtype: str, llama_base: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama_base, tmp_path / "base"))
    (folder / "code").mkdir()
    for name in ("LICENSE", "code/modeling.py", "extra.bin"):
        (folder / name).write_text(name)
    (folder / "linked").symlink_to(tmp_path)
    (folder / "dangling").symlink_to(tmp_path / "nothing")
    heard: list[Event] = []
    write(adapted(folder, dtype), tmp_path / "merged", heard.append)
    assert [(tmp_path / "merged" / name).read_text() for name in ("LICENSE", "code/modeling.py")] == [
        "LICENSE",
        "code/modeling.py",
    ]
    (said,) = (e.text for e in heard if isinstance(e, Message) and "left behind" in e.text)
    assert said.endswith(": dangling, extra.bin, linked")
    with pytest.raises(RunError, match="lies inside the base's own folder"):
        write(adapted(folder, dtype), folder / "merged")
    assert not (folder / "merged").exists()


def test_a_merge_that_cannot_be_leaves_nothing(llama_base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="bias"):
        write(adapted(llama_base, "float32", lora_bias=True), tmp_path / "merged")
    assert [*tmp_path.iterdir()] == []


SLOW = """
import sys, time
sys.path[:0] = sys.argv[3:]
from pathlib import Path
from merging import test_disk as t
from twofold.merging import disk
base = t.adapted(Path(sys.argv[1]), "bfloat16")
read = disk.Replay.tensor
def slowly(self, key, formed):
    time.sleep(0.1)
    return read(self, key, formed)
print("ready", flush=True)
disk.Replay.tensor = slowly
t.written(base, Path(sys.argv[2]))
"""


@pytest.mark.parametrize("after", [0.05, 0.5])
def test_killed_it_goes_on_from_the_whole_shards(after: float, llama_base: Path, tmp_path: Path) -> None:
    folder = stored_as(llama_base, tmp_path / "base", "bfloat16", "20KB")
    paths = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
    running = subprocess.Popen(
        [sys.executable, "-c", SLOW, folder, tmp_path / "merged", *paths], stdout=subprocess.PIPE, text=True
    )
    assert running.stdout is not None
    assert running.stdout.readline() == "ready\n"
    time.sleep(after)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    assert not (tmp_path / "merged").exists()
    whole = {p.name: p.stat().st_ino for p in tmp_path.glob(".merged.*.unfinished/*.safetensors")}
    (unfinished,) = tmp_path.glob(".merged.*.unfinished")
    (unfinished / "gone.txt").write_text("copied before, and no longer in the base")
    base = adapted(folder, "bfloat16")
    found = written(base, tmp_path / "merged")
    assert not (tmp_path / "merged" / "gone.txt").exists()
    assert {n: (tmp_path / "merged" / n).stat().st_ino for n in whole} == whole
    assert differing(plan_replay(base.model, open_stored(str(folder))), found) == {}
    assert not list(tmp_path.glob(".merged*"))


def test_two_merges_into_one_output_at_once_are_refused(llama_base: Path, tmp_path: Path) -> None:
    folder = stored_as(llama_base, tmp_path / "base", "bfloat16", "20KB")
    paths = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
    running = subprocess.Popen(
        [sys.executable, "-c", SLOW, folder, tmp_path / "merged", *paths], stdout=subprocess.PIPE, text=True
    )
    assert running.stdout is not None
    assert running.stdout.readline() == "ready\n"
    while not list(tmp_path.glob(".merged.*.unfinished/*")):
        time.sleep(0.01)
    same, other = adapted(folder, "bfloat16"), adapted(folder, "bfloat16", r=2)
    for base in (same, other):
        with pytest.raises(RunError, match=r"merged is being written by another process; wait for it"):
            written(base, tmp_path / "merged")
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    written(other, tmp_path / "merged")
    assert not list(tmp_path.glob(".merged*"))
