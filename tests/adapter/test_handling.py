"""Many adapters on one model: what each costs does not grow with their number, and their values stay in their files."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build_model, logits, randomise
from tiny_adapters import adapted, learned
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from twofold.adapter.attach import activate, active, attach, attached, detach, disabled, shares
from twofold.adapter.config import LoraConfig
from twofold.adapter.files import load_adapter, save_adapter
from twofold.layers.linear import LinearShare, LoraLinear
from twofold.layers.protocol import Share


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_adapter(adapted("llama"), tmp_path / "adapter")


class _Touched:
    """How many shares' tables were looked into."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        whole = Share.__getattribute__

        def counted(share: Share, name: str) -> Any:
            if name == "_parameters":
                self.names.append(whole(share, "name"))
            return whole(share, name)

        monkeypatch.setattr(Share, "__getattribute__", counted)


def test_loading_and_switching_look_at_no_adapter_that_is_not_concerned(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model("llama")
    for i in range(6):
        load_adapter(model, folder, f"a{i}")
    touched = _Touched(monkeypatch)
    load_adapter(model, folder, "new")
    activate(model, "a2")
    logits(model)
    assert set(touched.names) <= {"", "new", "a5", "a2"}
    assert "a2" in touched.names


def test_switching_walks_the_model_at_most_once(folder: Path) -> None:
    """However many adapters there are, and with no look at a parameter of an adapter that is neither left nor chosen."""
    model = build_model("llama")
    for i in range(3):
        load_adapter(model, folder, f"a{i}")
    seen: list[nn.Module] = []

    class Walked(dict[str, nn.Module]):
        def values(self) -> Any:
            seen.append(model)
            return super().values()

    model.__dict__["_modules"] = Walked(model._modules)
    activate(model, "a1")
    assert len(seen) == 1
    assert {n.split(".shares.")[1].split(".")[0] for n, _ in learned(model)} == {"a1"}


def test_a_start_follows_from_the_seed_alone(folder: Path) -> None:
    """Whatever is attached already; and what an adapter starts from is its own, also when the caller keeps the factors."""
    starts = []
    for held in (0, 2):
        model = build_model("llama")
        for i in range(held):
            load_adapter(model, folder, f"a{i}")
        torch.manual_seed(11)
        attach(model, LoraConfig(r=4), "new")
        starts.append({m: s.A.detach() for m, s in shares(model, "new").items() if isinstance(s, LinearShare)})
    assert starts[0].keys() == starts[1].keys()
    assert all(torch.equal(starts[0][m], starts[1][m]) for m in starts[0])
    given = {m: (torch.ones(4, s.A.shape[1]), torch.zeros(s.B.shape[0], 4)) for m, s in shares(model, "new").items()}
    attach(model, LoraConfig(r=4, init_lora_weights="eva"), "given", factors=given)
    with torch.no_grad():
        next(iter(given.values()))[0].zero_()
    assert all(bool((s.A == 1).all()) for s in shares(model, "given").values())


def mapped(model: nn.Module, name: str) -> set[int]:
    found = (p for s in shares(model, name).values() for p in s.parameters())
    return {p.untyped_storage().data_ptr() for p in found}


def test_factors_are_views_of_their_file_until_they_are_trained(folder: Path) -> None:
    """One mapping for a whole adapter; a step writes to private pages, so another reader and the file stay as they were."""
    file = folder / "adapter_model.safetensors"
    before = hashlib.sha256(file.read_bytes()).digest()
    model, other = build_model("llama"), build_model("llama")
    load_adapter(model, folder)
    load_adapter(other, folder)
    expected = logits(other)
    assert len(mapped(model, "default")) == 1
    optimiser = torch.optim.SGD([p for _, p in learned(model)], lr=0.5)
    logits(model).square().mean().backward()
    optimiser.step()
    assert len(mapped(model, "default")) == 1
    assert not torch.allclose(logits(model), expected)
    assert torch.equal(logits(other), expected)
    assert hashlib.sha256(file.read_bytes()).digest() == before


def test_an_adapter_saved_over_its_own_file_stays_whole(folder: Path) -> None:
    model = build_model("llama")
    load_adapter(model, folder)
    expected = logits(model)
    for _ in range(2):
        save_adapter(model, folder)
    assert torch.equal(logits(model), expected)
    again = build_model("llama")
    load_adapter(again, folder)
    assert torch.equal(logits(again), expected)


class _Drawn(TorchDispatchMode):
    """Random numbers asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(word in str(func) for word in ("uniform", "normal", "randn")):
            self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


def test_loading_draws_no_start(folder: Path) -> None:
    model = build_model("llama")
    state = torch.get_rng_state()
    with _Drawn() as drawn:
        load_adapter(model, folder)
    assert drawn.calls == []
    assert torch.equal(torch.get_rng_state(), state)


def test_a_copied_model_chooses_for_itself() -> None:
    model = adapted("llama")
    expected = logits(model)
    twin = copy.deepcopy(model)
    activate(twin, None)
    assert active(model) == {"default": 1.0}
    assert torch.equal(logits(model), expected)
    with disabled(model):
        activate(twin, "default")
        assert torch.equal(logits(twin), expected)


def test_parts_adapted_apart_are_one_model_for_whoever_holds_the_whole() -> None:
    model = build_model("llama").requires_grad_(False)
    bare = logits(model)
    first, second = model.model.layers[0], model.model.layers[1]
    attach(first, LoraConfig(r=2), "a")
    attach(second, LoraConfig(r=2), "b")
    randomise([(n, p) for n, p in model.named_parameters() if ".shares." in n])
    assert attached(model) == ["a", "b"]
    activate(model, {"a": 1.0, "b": 0.5})
    both = logits(model)
    attach(model, LoraConfig(r=2, target_modules=("up_proj",)), "c")
    assert attached(model) == ["a", "b", "c"]
    activate(model, {"a": 1.0, "b": 0.5})
    assert torch.equal(logits(model), both)
    assert active(first) == {"a": 1.0, "b": 0.5}
    with disabled(model):
        assert torch.equal(logits(model), bare)
    detach(model, "b")
    assert attached(model) == ["a", "c"]
    assert active(model) == {"a": 1.0}


def test_hooks_on_a_share_work_like_those_of_any_module() -> None:
    model = adapted("llama")
    layer = model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, LoraLinear)
    share, seen = layer.by_name()["default"], []
    share.register_state_dict_pre_hook(lambda module, prefix, keep: seen.append(prefix))
    keys = set(model.state_dict())
    assert seen == ["model.layers.0.self_attn.q_proj.shares.default."]
    assert "model.layers.0.self_attn.q_proj.shares.default.A" in keys
    assert set(copy.deepcopy(model).state_dict()) == keys
