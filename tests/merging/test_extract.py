"""Adapters out of full fine-tunes, against dense decompositions of the differences."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from families import GROUPED
from safetensors.torch import load_file, save_file
from torch import Tensor
from warm_cli import WarmCli

from twofold.adapter.files import open_adapter
from twofold.adapter.updates import updates_of
from twofold.base.load import load_base
from twofold.errors import BaseError, ConfigError
from twofold.events import Event, Warned
from twofold.merging.extract import Extraction
from twofold.recipes.adapters import load_with_adapters
from twofold.recipes.extract import extract

pytest_plugins = ("tiny_fixtures",)


def tuned(
    base: Path, folder: Path, endings: tuple[str, ...], rank: int | None = None, seed: int = 3, shard: str = "40KB"
) -> Path:
    """A base with changed weights, of a rank or of the full one; everything else in the folder is the base's."""
    model = hf.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(endings):
                change = torch.randn(parameter.shape, generator=generator) * 0.02
                if rank is not None:
                    u, values, vh = torch.linalg.svd(change, full_matrices=False)
                    change = (u[:, :rank] * values[:rank]) @ vh[:rank]
                parameter.add_(change)
    model.save_pretrained(folder, max_shard_size=shard)
    hf.AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def weights(folder: Path) -> dict[str, Tensor]:
    model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return {n: p.detach().double() for n, p in model.named_parameters()}


def dense(path: Path) -> dict[str, Tensor]:
    return {n: u.scale * u.B.double() @ u.A.double() for n, u in updates_of(open_adapter(path)).items()}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_change_of_low_rank_is_found_whole(family: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    base: Path = request.getfixturevalue(f"{family}_base")
    targets = ("q_proj.weight", "down_proj.weight") if family == "llama" else ("c_attn.weight", "c_fc.weight")
    folder = tuned(base, tmp_path / "tuned", targets, rank=3)
    found = extract(str(base), str(folder), tmp_path / "out", Extraction(r=3))
    assert found["lost"] < 1e-6
    assert found["not_carried"] == {"share": 0.0, "norms": {}}
    adapted = load_with_adapters(str(base), [str(tmp_path / "out")], "float32", "cpu")
    whole = load_base(str(folder), "float32", "cpu")
    ids = torch.randint(3, 200, (2, 9), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(adapted.model(ids).logits, whole.model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("how", [{"r": 4}, {"energy": 0.7}])
def test_it_is_the_best_of_the_difference(how: dict[str, Any], exact: bool, llama_base: Path, tmp_path: Path) -> None:
    folder = tuned(llama_base, tmp_path / "tuned", ("proj.weight", "model.norm.weight"))
    found = extract(str(llama_base), str(folder), tmp_path / "out", Extraction(**how, exact=exact))
    before, after, deltas = weights(llama_base), weights(folder), dense(tmp_path / "out")
    assert len(deltas) == 14
    for module in found["modules"]:
        change = after[f"{module['name']}.weight"] - before[f"{module['name']}.weight"]
        values = torch.linalg.svdvals(change).square()
        kept = values.cumsum(0) / values.sum()
        assert module["r"] == how.get("r", int((kept < 0.7).sum()) + 1)
        missing = float((deltas[module["name"]] - change).square().sum())
        assert missing <= 1.01 * float(values[module["r"] :].sum())
        assert module["lost"] == pytest.approx(missing / float(values.sum()), rel=1e-3)
        assert module["norm"] == pytest.approx(float(change.norm()), rel=1e-5)
    assert list(found["not_carried"]["norms"]) == ["model.norm.weight"]
    beside = float((after["model.norm.weight"] - before["model.norm.weight"]).square().sum())
    total = sum(float((after[n] - before[n]).square().sum()) for n in after)
    assert found["not_carried"]["share"] == pytest.approx(beside / total, rel=1e-4)


def test_embeddings_and_the_fingerprint(llama_base: Path, tmp_path: Path) -> None:
    folder = tuned(llama_base, tmp_path / "tuned", ("embed_tokens.weight",), rank=2)
    extract(str(llama_base), str(folder), tmp_path / "out", Extraction(r=2), target_modules=["embed_tokens"])
    provenance = open_adapter(tmp_path / "out").provenance
    assert provenance is not None
    loaded = load_base(str(llama_base), "float32", "cpu")
    assert provenance.base == loaded.fingerprint.as_json()
    change = weights(folder)["model.embed_tokens.weight"] - weights(llama_base)["model.embed_tokens.weight"]
    torch.testing.assert_close(dense(tmp_path / "out")["model.embed_tokens"].T, change, rtol=1e-4, atol=1e-6)


def rewritten(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """The folder with other tensors in its one file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def left(base: Path, folder: Path, output: Path, *targets: str) -> dict[str, Any]:
    return extract(str(base), str(folder), output, Extraction(r=4), target_modules=targets or "all-linear")


def test_changed_experts_are_told(tmp_path: Path) -> None:
    """They lie apart in the files, and are stacked in the model."""
    model = hf.MixtralForCausalLM(hf.MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2))
    model.save_pretrained(tmp_path / "base")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name or "q_proj" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    model.save_pretrained(tmp_path / "tuned")
    found = left(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", "q_proj")
    norms = {n: float((p.detach() - before[n]).norm()) for n, p in model.named_parameters() if "experts" in n}
    assert len(norms) == 4
    assert found["not_carried"]["norms"] == pytest.approx(norms, rel=1e-5)
    assert found["not_compared"] == []


@pytest.mark.parametrize("untied", [False, True])
def test_a_head_that_goes_on_as_the_bases_is_told(untied: bool, tied_base: Path, tmp_path: Path) -> None:
    folder = tuned(tied_base, tmp_path / "tuned", ("embed_tokens.weight", "q_proj.weight"))
    model = hf.AutoModelForCausalLM.from_pretrained(folder)
    if untied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(-model.lm_head.weight.detach())
        model.save_pretrained(folder)
    before, after = weights(tied_base)["model.embed_tokens.weight"], model.lm_head.weight.detach()
    found = left(tied_base, folder, tmp_path / "out", "embed_tokens", "q_proj")
    assert found["not_carried"]["norms"] == pytest.approx({"lm_head.weight": float((after - before).norm())}, rel=1e-5)
    beside = left(tied_base, folder, tmp_path / "beside", "q_proj")["not_carried"]["norms"]
    assert list(beside) == ["model.embed_tokens.weight", *(["lm_head.weight"] if untied else [])]


def test_tensors_of_one_side_alone_are_told(llama_base: Path, tmp_path: Path) -> None:
    folder = tuned(llama_base, tmp_path / "tuned", ("q_proj.weight",), shard="1GB")
    rewritten(folder, lambda tensors: tensors.pop("model.norm.weight"))
    heard: list[Event] = []
    found = extract(str(llama_base), str(folder), tmp_path / "out", Extraction(r=4), emit=heard.append)
    assert found["not_compared"] == ["model.norm.weight"]
    assert any(isinstance(e, Warned) and "nothing tells whether they changed: model.norm" in e.text for e in heard)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.self_attn.q_proj.weight"])
def test_a_fine_tune_that_holds_nan_is_refused(name: str, llama_base: Path, tmp_path: Path) -> None:
    folder = tuned(llama_base, tmp_path / "tuned", ("v_proj.weight",), shard="1GB")
    rewritten(folder, lambda tensors: tensors[name].fill_(torch.nan))
    with pytest.raises(ConfigError, match=rf"'{name}' holds NaN or infinity"):
        left(llama_base, folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_no_fine_tune_is_refused(llama_base: Path, gpt2_base: Path, tmp_path: Path) -> None:
    def of(tuned: Path) -> Any:
        return extract(str(llama_base), str(tuned), tmp_path / "out", Extraction(r=2))

    with pytest.raises(ConfigError, match="nothing to extract"):
        of(llama_base)
    with pytest.raises(BaseError, match=r"holds no 'model\.layers.* as the model has it"):
        of(gpt2_base)
    with pytest.raises(ConfigError, match="say one of --r and --energy"):
        Extraction()
    assert not (tmp_path / "out").exists()


def test_the_command(cli: WarmCli, llama_base: Path, tmp_path: Path) -> None:
    folder = tuned(llama_base, tmp_path / "tuned", ("q_proj.weight",))
    flags = ("--base", llama_base, "--tuned", folder)
    found = cli("extract", *flags, "--energy", 0.9, "-o", tmp_path / "out", "--json").json()
    assert [m["name"].rsplit(".", 1)[-1] for m in found["modules"]] == ["q_proj", "q_proj"]
    said = cli("extract", *flags, "--r", 4, "--exact", "--target-modules", "q_proj", "-o", tmp_path / "other").stdout
    assert "rank 4 at most" in said
