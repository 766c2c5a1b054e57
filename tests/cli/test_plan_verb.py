"""`twofold plan` on the terminal."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from warm_cli import WarmCli

from twofold.cli.flags import parse
from twofold.cli.plan_verb import PlanFlags

pytest_plugins = ("tiny_fixtures",)
GPU = ("--device", "cuda")


def test_the_terms_are_listed_and_formulas_explained(cli: WarmCli, llama_base: Path) -> None:
    found = cli("plan", "--base", llama_base, "--explain").stdout
    for term in ("weights", "adapter", "gradients", "optimizer", "activations", "logits", "runtime", "total"):
        assert re.search(rf"^  {term} +\d+\.\d [MG]B", found, re.MULTILINE), term
    assert re.search(r"optimizer += 8 · P_train", found)
    assert re.search(r"P_train += [\d,]+ +parameters that train", found)
    assert "tokens/s" in found


def test_a_shape_is_planned_without_weights_or_network(cli: WarmCli) -> None:
    found = cli("plan", "--base", "llama-3.1-8b", *GPU, "--memory", "24GB")
    assert "41,943,040 of 8,030,261,248 parameters train (0.52%) in 224 modules" in found.stdout
    assert "of 24.0 GB of memory: does not fit" in found.stdout
    assert re.search(r"GB less: gradient checkpointing \(--gradient-checkpointing\); then: fits", found.stdout)
    assert "shapes only, without weights" in cli("base", "list").stdout


def test_methods_side_by_side(cli: WarmCli) -> None:
    found = cli("plan", "--base", "llama-2-7b", *GPU, "--compare")
    heads, *rows = found.stdout.splitlines()
    assert heads.split() == ["full", "fine-tuning", "LoRA", "QLoRA"]
    totals = [float(t) for row in rows if row.startswith("total") for t in re.findall(r"([\d.]+) GB", row)]
    assert totals == sorted(totals, reverse=True)
    found = cli("plan", "--base", "llama-2-7b", *GPU, "--compare", "--json").json()
    assert list(found) == ["full", "lora", "qlora"]


def test_the_usual_loop_takes_more(cli: WarmCli) -> None:
    ours, theirs = (
        cli("plan", "--base", "llama-3.2-3b", *GPU, "--json", *more).json()["memory"]["total"]["expected"]
        for more in ((), ("--as", "peft"))
    )
    assert theirs > ours


def test_several_devices(cli: WarmCli) -> None:
    found = cli("plan", "--base", "llama-2-7b", *GPU, "--devices", 4).stdout
    assert "each of 4, whole" in found
    assert re.search(r"^  weights +13\.5 GB +3\.4 GB$", found, re.MULTILINE)


def test_measured_beside_predicted(cli: WarmCli, llama_base: Path) -> None:
    flags = ("--base", llama_base, "--sequence-length", 16, "--batch-size", 1, "--dtype", "float32", "--measure")
    found = cli("plan", *flags)
    assert found.code == 0, found.stderr
    assert re.search(r"measured .* at the peak: the estimate is [+-]", found.stdout)
    assert "can be planned but not measured" in cli("plan", "--base", "llama-2-7b", *GPU, "--measure").refusal()


def test_a_rate_far_from_known_good_ones(cli: WarmCli, llama_base: Path) -> None:
    assert "Schulman 2025" in cli("plan", "--base", llama_base, "--learning-rate", 3.0).stdout
    assert "advice" not in cli("plan", "--base", llama_base, "--learning-rate", 1e-3).stdout


@pytest.mark.parametrize(
    ("said", "meant"),
    [("5", (5,)), ("5 9", (5, 9)), ("embed_tokens 5 9", {"embed_tokens": [5, 9]}), ("None", None)],
)
def test_tokens_are_given_by_flags_alone_or_by_embedding(said: str, meant: object) -> None:
    flags = ["--trainable-token-indices", *said.split()]
    assert parse(PlanFlags, flags, verb="plan", description="").trainable_token_indices == meant
