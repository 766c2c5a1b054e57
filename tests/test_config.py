"""YAML to dataclasses: every mistake of a file at once, each with its place and the nearest right word."""

from __future__ import annotations

import dataclasses
import difflib
import time
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twofold.adapter.config import LoraConfig
from twofold.config import as_dict, build, read_yaml, write_yaml
from twofold.errors import ConfigError, did_you_mean, nearest
from twofold.training.optim import TrainingConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.5
    kind: Literal["cosine", "linear", "constant"] = "cosine"
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise ConfigError(f"rate is {self.rate} but must be at least 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
    base: str
    output: Path = Path("runs/x")
    steps: int | None = None
    on: bool = False
    inner: Inner = dataclasses.field(default_factory=Inner)
    targets: str | tuple[str, ...] = "all"
    table: dict[str, int] = dataclasses.field(default_factory=dict)


def built(values: dict[str, Any]) -> Outer:
    return build(Outer, values, source="my.yaml")


def refusal(values: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        built(values)
    said = str(caught.value)
    assert said.startswith("my.yaml: ")
    return said


def test_nested_values_become_dataclasses() -> None:
    found = built(
        {"base": "b", "output": "here", "steps": 3, "inner": {"rate": 1, "names": ["a"]}, "targets": ["q", "v"]}
    )
    assert found == Outer(
        base="b", output=Path("here"), steps=3, inner=Inner(rate=1.0, names=("a",)), targets=("q", "v")
    )
    assert isinstance(found.inner.rate, float)
    assert built({"base": "b", "targets": "q", "steps": None}) == Outer(base="b", targets="q")


@pytest.mark.parametrize("written", ["1e-3", "1E-3", "0.001", "1.0e-3", ".001"])
def test_numbers_that_yaml_reads_as_text_are_numbers(written: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"base: b\ninner: {{rate: {written}}}\n")
    assert built(read_yaml(path)).inner.rate == 0.001


def test_every_mistake_is_in_one_message_with_its_place() -> None:
    said = refusal(
        {
            "bas": "b",
            "steps": "three",
            "on": "maybe",
            "inner": {"rte": 1, "kind": "cosin", "names": "a"},
            "table": {"a": 1, "b": "x"},
            "output": 4,
        }
    )
    for expected in (
        "unknown key 'bas'; did you mean 'base'?",
        "missing key 'base'",
        "'steps' is 'three' but should be a whole number",
        "'on' is 'maybe' but should be true or false",
        "unknown key 'inner.rte'; did you mean 'rate'?",
        "'inner.kind' is 'cosin' but may be cosine, linear, constant; did you mean 'cosine'?",
        "'inner.names' is 'a' but should be a list",
        "'table.b' is 'x' but should be a whole number",
        "'output' is 4 but should be a path",
    ):
        assert expected in said, said


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"base": "b", "steps": True}, "'steps' is True but should be a whole number"),
        ({"base": "b", "steps": 1.5}, "'steps' is 1.5 but should be a whole number"),
        ({"base": "b", "inner": {"rate": True}}, "'inner.rate' is True but should be a number"),
        ({"base": "b", "inner": {"rate": "fast"}}, "'inner.rate' is 'fast' but should be a number"),
        ({"base": "b", "inner": 3}, "'inner' is 3 but should be a mapping"),
        ({"base": None}, "'base' is None but should be text"),
        ({"base": "b", "inner": {"rate": -1}}, "inner: rate is -1.0 but must be at least 0"),
        ({"base": "b", 3: 4}, "unknown key '3'"),
        ({"base": "b", "inner": {"names": ["a", 3]}}, "'inner.names[1]' is 3 but should be text"),
    ],
)
def test_each_mistake_is_told_in_words(values: dict[str, Any], said: str) -> None:
    assert said in refusal(values)


def test_checks_of_the_dataclass_itself_carry_the_source() -> None:
    with pytest.raises(ConfigError, match=r"my.yaml: .*warmup is 2.0"):
        build(TrainingConfig, {"warmup": 2}, source="my.yaml")
    assert build(LoraConfig, {"target_modules": ["q_proj"], "r": 4}, source="x").target_modules == ("q_proj",)
    assert build(LoraConfig, {"layers_to_transform": 1, "lora_alpha": 8}, source="x").layers == {1}


@given(
    st.builds(
        Outer,
        base=st.text(),
        steps=st.none() | st.integers(0, 10**9),
        on=st.booleans(),
        inner=st.builds(
            Inner, rate=st.floats(0, 1e6), kind=st.sampled_from(["cosine", "linear"]), names=st.tuples(st.text())
        ),
        targets=st.text() | st.tuples(st.text(), st.text()),
        table=st.dictionaries(st.text(), st.integers(), max_size=3),
    )
)
def test_what_is_written_reads_back_the_same(tmp_path_factory: pytest.TempPathFactory, config: Outer) -> None:
    path = tmp_path_factory.mktemp("yaml") / "c.yaml"
    path.write_text(write_yaml(config), encoding="utf-8")
    assert built(read_yaml(path)) == config
    assert built(as_dict(config)) == config


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "is not valid YAML"),
        ("- a\n- b", "holds no configuration: expected keys like `base:`, found list"),
        ("", "holds no configuration"),
        ("\x00", "is not valid YAML"),
    ],
)
def test_files_that_are_no_configuration(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"c.yaml") as caught:
        read_yaml(path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*none.yaml: No such file"):
        read_yaml(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"a: \xff")
    with pytest.raises(ConfigError, match="not valid YAML"):
        read_yaml(tmp_path / "latin.yaml")


def test_suggestions_only_where_something_is_close() -> None:
    assert nearest("q_prj", ["q_proj", "v_proj", "lm_head"])[0] == "q_proj"
    assert did_you_mean("zzz", ["q_proj"]) == ""
    assert did_you_mean("q_prj", ["q_proj"]) == "; did you mean 'q_proj'?"


def test_the_nearest_of_thousands_are_found_quickly() -> None:
    names = [f"customer-{i:04d}-support" for i in range(3000)]
    for wrong in ("custmer-1234-support", "customer-1234-suport", "Customer_2999-support"):
        start = time.perf_counter()
        expected = difflib.get_close_matches(wrong, names, n=1)
        between = time.perf_counter()
        assert nearest(wrong, names, n=1) == expected
        assert time.perf_counter() - between < (between - start) / 2
