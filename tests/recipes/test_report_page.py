"""The report page: whole, self-contained, safe with hostile data, and still a page where figures are missing."""

from __future__ import annotations

import copy
import math
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from twofold.recipes import charts, report

HOSTILE = "</script></pre></table><img src=x onerror=alert(1)><script>alert(2)</script>\"' &amp;"
VOID = {"meta", "link", "br", "wbr", "img", "input", "hr"}
BLOCKS = {"p", "div", "section", "table", "dl", "ul", "pre", "figure", "h1", "h2", "h3", "header", "details"}
SUPERVISED = [("{", True), ('"a"', True), ("}", True), ("<|im_end|>", True)]


class Page(HTMLParser):
    """Reads a page strictly: every element is closed in turn, and no paragraph holds a block."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert not ("p" in self.open and tag in BLOCKS), f"{tag} inside a paragraph"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert "svg" in self.open or tag in VOID, f"{tag} closes itself outside a drawing"
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    @property
    def text(self) -> str:
        return "".join(data for tag, data in self.texts if tag != "style")

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def steps(count: int) -> list[dict[str, Any]]:
    return [
        {
            "event": "step", "step": i, "steps": count, "epoch": i / count, "loss": 3 * math.exp(-i / count) + 0.1 * (i % 3),
            "learning_rate": 1e-3 * (1 - i / count), "gradient_norm": 1 + i % 5, "tokens_per_second": 400.0 + i % 7,
            "memory_bytes": 2_000_000_000 + i, "time": 1_795_000_000.0 + i,
        }
        for i in range(1, count + 1)
    ]  # fmt: skip


def verification(**changes: Any) -> dict[str, Any]:
    found = {"max_abs_logit_difference": 1.875, "tolerance": 4.25, "control_difference": 34.875, "top1_agreement": 0.97}
    return {**found, "passed": True, **changes}


def a_report() -> dict[str, Any]:
    total = {"low": 1.4e9, "expected": 1.7e9, "high": 2.1e9}
    parameters = {
        "adapted_base": 106_168_320,
        "base": 134_515_008,
        "fraction": 0.0363,
        "modules": 210,
        "trainable": 4_884_480,
    }
    counts = {"examples": 240, "tokens": 5662}
    return {
        "run": "runs/mine", "adapter": "runs/mine/adapter", "base": "smollm2-135m-instruct", "dtype": "bfloat16",
        "device": "cpu", "steps": 32, "best_step": None, "seconds": 165.6, "tokens": 28451, "supervised_tokens": 12252,
        "tokens_per_second": 171.8, "peak_memory_bytes": 3_937_251_328, "parameters": parameters,
        "predicted": {"seconds": 58.3, "memory": {"total": total}},
        "evaluation": {
            "base": {**counts, "loss": 3.8679, "token_accuracy": 0.3592},
            "adapter": {**counts, "loss": 0.4098, "token_accuracy": 0.8866},
            "merged": {**counts, "loss": 0.4109, "token_accuracy": 0.8878},
        },
        "verification": verification(), "base_unchanged": True,
    }  # fmt: skip


def a_preflight() -> dict[str, Any]:
    counts = {"examples": 512, "tokens": 28451, "supervised_tokens": 12252, "longest": 77}
    cut = {"too_long": 0, "lost_supervised_tokens": 0, "unsupervised": 0}
    data = {
        "source": "train.jsonl",
        "format": "messages",
        "columns": ["messages"],
        "digest": "7cead6e7",
        **counts,
        **cut,
    }
    sample = [("<|im_start|>", False), ("user", False), ("\n", False), (" hi", False), ("\n\n", False), *SUPERVISED]
    return {
        "train": data, "evaluation": {**data, "source": "held_out.jsonl", "examples": 240}, "path": "fast path",
        "steps": 32, "seconds": 58.3, "samples": [sample, sample], "warnings": [],
    }  # fmt: skip


def a_task() -> dict[str, Any]:
    names = ("base", "base, intents and 3 examples in its prompt", "adapter")
    scores = [{"name": n, "intent_exact": i / 3, "whole_exact": i / 4, "sentences": 240} for i, n in enumerate(names)]
    sample = {"prompt": "stop the timer", "expected": '{"a": 1}', "base": "Sure!", "adapter": '{"a":1}'}
    return {"scores": scores, "samples": [sample]}


def render(
    found: dict[str, Any] | None = None,
    preflight: dict[str, Any] | None = None,
    events: list[dict[str, Any]] | None = None,
) -> str:
    found, preflight = a_report() if found is None else found, a_preflight() if preflight is None else preflight
    return report.render(found, preflight, steps(32) if events is None else events, {})


def test_write_page_tells_the_run_and_its_settings(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump({"adapter": {"r": 16, "target_modules": ["q_proj", "v_proj"]}})
    )
    report.write_page(tmp_path / "report.html", a_report(), a_preflight(), steps(32))
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    text = page.text
    for said in (
        "smollm2-135m-instruct · mine", "Held-out loss fell from 3.868 to 0.410.", "Proof passed: the merged model says",
        "2\u00a0min 46\u00a0s", "predicted 58\u00a0s", "3.94\u00a0GB", "predicted 1.70\u00a0GB", "4.88\u00a0M", "3.63%", "88.66%",
        "Nothing was cut off", "not one bit changed", "adapter.target_modules", "[q_proj, v_proj]",
    ):  # fmt: skip
        assert said in text, said
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".partial")] == []


def test_page_loads_nothing() -> None:
    html = render({**a_report(), "task": a_task()})
    page = Page(html)
    assert re.search(r"https?:|@import|url\(|src=|<script|<iframe", html) is None
    assert [a["href"] for a in page.all("link")] == ["data:,"]


def test_page_is_accessible() -> None:
    page = Page(render({**a_report(), "task": a_task(), "peft": verification()}))
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert all(a["aria-labelledby"] in ids for _, a in page.elements if "aria-labelledby" in a)
    headings = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h\d", tag)]
    assert headings[0] == 1
    assert headings.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(headings))
    assert all(a.get("scope") in {"row", "col"} for a in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table")) > 5
    plots = [a for a in page.all("svg") if a.get("class") == "plot"]
    assert len(plots) == 4
    assert all(a["role"] == "img" and a["aria-label"] for a in plots)
    assert page.all("html") == [{"lang": "en"}]


def test_hostile_text_is_inert() -> None:
    found, preflight = a_report(), a_preflight()
    found.update(base=HOSTILE, run=f"runs/{HOSTILE}", dtype=HOSTILE, task=a_task())
    found["task"]["scores"][0]["name"] = HOSTILE
    found["task"]["samples"][0] = dict.fromkeys(("prompt", "expected", "base", "adapter"), HOSTILE)
    preflight["samples"][0] = [(HOSTILE, True), ("<script>", False), (HOSTILE, False)]
    preflight["warnings"] = [HOSTILE]
    preflight["train"].update(source=HOSTILE, columns=[HOSTILE], format=HOSTILE)
    html = report.render(
        found, preflight, [*steps(4), {"event": "warned", "text": HOSTILE}], {"data": {HOSTILE: HOSTILE}}
    )
    page = Page(html)
    assert {tag for tag, _ in page.elements}.isdisjoint({"img", "script"})
    assert not [name for _, a in page.elements for name in a if name.startswith("on")]
    assert page.text.count("<img src=x onerror=alert(1)>") >= 8


@pytest.mark.parametrize(
    "missing", ["evaluation", "verification", "predicted", "parameters", "base_unchanged", "best_step"]
)
def test_missing_part_leaves_a_page(missing: str) -> None:
    Page(render({**a_report(), missing: None}))
    Page(render({k: v for k, v in a_report().items() if k != missing}))


def test_missing_parts_are_said() -> None:
    none = {"base": None, "adapter": None, "merged": None}
    text = Page(render({**a_report(), "evaluation": none, "verification": None}, events=[])).text
    assert "Trained without held-out data" in text
    assert "Not proved: no verification was run" in text
    assert "No steps were recorded" in text
    assert "No held-out data was given" in text


def test_empty_run_leaves_a_page() -> None:
    page = Page(render({}, {}, []))
    assert "No samples were kept." in page.text
    assert "No account of the data was kept." in page.text


def test_figures_that_are_not_finite_leave_a_page() -> None:
    events = steps(4)
    events[1]["loss"] = events[2]["gradient_norm"] = float("nan")
    found = a_report()
    found["evaluation"]["adapter"]["loss"] = float("nan")
    found["verification"].update(max_abs_logit_difference=float("nan"), passed=False)
    html = render(found, events=[*events, {"event": "evaluated", "step": 2, "loss": float("inf"), "best": False}])
    Page(html)
    assert re.search(r'="[^"]*(nan|inf)%', html) is None


def test_failed_proof_is_plain() -> None:
    differs = render({**a_report(), "verification": verification(passed=False, max_abs_logit_difference=12.5)})
    assert "Proof FAILED: the merged model differs from the adapter by 12.5" in Page(differs).text
    idle = verification(passed=False, control_difference=0.5)
    assert (
        "FAILED: the merged model cannot be told from the base"
        in Page(render({**a_report(), "verification": idle})).text
    )
    changed = Page(render({**a_report(), "base_unchanged": False})).text
    assert "FAILED: the base's weights changed during training" in changed
    assert "THEY CHANGED" in changed


def test_comparison_with_peft_counts() -> None:
    both = Page(render({**a_report(), "peft": verification()})).text
    assert "Proof passed: the merged model and PEFT say what the adapter says" in both
    assert "The adapter against PEFT: passed" in both
    one = {**a_report(), "peft": verification(passed=False, max_abs_logit_difference=9.0)}
    assert "Proof FAILED: PEFT differs from the adapter by 9" in Page(render(one)).text


def test_headline_says_which_way_the_loss_went() -> None:
    found = a_report()
    found["evaluation"]["adapter"]["loss"] = 4.5
    assert report.headline(found) == "Held-out loss rose from 3.868 to 4.500."
    found["evaluation"]["adapter"]["loss"] = 3.86791
    assert report.headline(found) == "Held-out loss stayed at 3.868."


def test_task_tables() -> None:
    page = Page(render({**a_report(), "task": a_task()}))
    assert "66.7%" in page.text
    assert "base, intents and 3 examples in its prompt" in page.text
    assert page.text.count("✓ same") == 1
    assert page.text.count("✗ differs") == 1
    assert "The task" not in Page(render()).text


@pytest.mark.parametrize("answer", ["[" * 100_000, "{", ""])
def test_same_bears_any_answer(answer: str) -> None:
    assert not report.same(answer, '{"a": 1}')


def test_sample_shows_whitespace_and_the_mask() -> None:
    tokens = report.sample(
        1, [("\n\n", False), (" hi\t", True), ("a\nb", True), ("</s>", False), ("[INST]", True), ("\x00", False)]
    )
    assert tokens.title == "Example 1: 6 tokens, 3 supervised"
    assert tokens.tokens == [
        ("context", "↵↵", "\n\n"),
        ("supervised", "·hi⇥", ""),
        ("supervised", "a↵\nb", ""),
        ("special context", "</s>", ""),
        ("special supervised", "[INST]", ""),
        ("context", "␀", ""),
    ]
    page = Page(render())
    assert len([a for a in page.all("mark") if a]) == 2 * len(SUPERVISED)


def test_long_sample_keeps_both_ends() -> None:
    shown = report.sample(1, [(str(i), False) for i in range(5000)]).tokens
    assert len(shown) == report.SAMPLE_TOKENS + 1
    assert (shown[0][1], shown[-1][1]) == ("0", "4999")
    assert "3,800 tokens not shown" in shown[report.SAMPLE_TOKENS // 2][1]


def test_warnings_come_once_each() -> None:
    preflight = {**a_preflight(), "warnings": ["beware"]}
    events = [{"event": "warned", "text": "beware"}, {"event": "warned", "text": "and mind"}]
    page = Page(render(preflight=preflight, events=[*steps(2), *events]))
    assert page.text.count("beware") == 1
    assert "and mind" in page.text


def test_truncation_is_counted() -> None:
    preflight = a_preflight()
    preflight["train"].update(too_long=1, lost_supervised_tokens=1234)
    assert report.cut_sentence(preflight).startswith("1 example is over the length limit; 1,234 supervised tokens")


@pytest.mark.parametrize("count", [1, 2, 3, 32, 801, 5000])
def test_runs_of_any_length(count: int) -> None:
    html = render({**a_report(), "steps": count}, events=steps(count))
    page = Page(html)
    assert len(html) < 500_000
    rows = [t for tag, t in page.texts if tag == "th" and t == f"{count:,}"]
    assert rows, "the last step is in the table"


def test_downsampling_keeps_ends_and_extremes() -> None:
    points = [(float(i), math.sin(i) + (50.0 if i == 7777 else -50.0 if i == 4321 else 0.0)) for i in range(20_000)]
    kept = charts.downsample(points)
    assert len(kept) <= charts.POINTS
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert {min(points, key=lambda p: p[1]), max(points, key=lambda p: p[1])} <= set(kept)
    assert kept == sorted(kept)
    assert charts.downsample(points[:800]) == points[:800]


@pytest.mark.parametrize(
    ("values", "expected", "texts"),
    [
        ([0.3, 3.8], (0, 4), ["0", "1", "2", "3", "4"]),
        ([3e-6, 1e-3], (0, 1e-3), ["0", "2e-4", "4e-4", "6e-4", "8e-4", "1e-3"]),
        ([19_400, 22_500], (19_000, 23_000), ["19k", "20k", "21k", "22k", "23k"]),
        ([2.01, 2.18], (2, 2.2), ["2.00", "2.05", "2.10", "2.15", "2.20"]),
        ([-1.5, 1.0], (-1.5, 1.0), ["-1.5", "-1.0", "-0.5", "0", "0.5", "1.0"]),
    ],
)
def test_axes_are_round(values: list[float], expected: tuple[float, float], texts: list[str]) -> None:
    interval = charts.extent(values, 5)
    assert interval == pytest.approx(expected)
    step = charts.round_step(interval[1] - interval[0], 5)
    assert [charts.tick_text(t, step) for t in charts.ticks(interval, 5)] == texts


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 1e-9, 1e12])
def test_constant_curve_has_room(value: float) -> None:
    low, high = charts.extent([value, value], 5)
    assert low < high
    assert low <= value <= high


def test_smoothing_is_centred_and_keeps_a_line() -> None:
    points = [(float(i), 2.0 * i) for i in range(100)]
    assert np.allclose(charts.smoothed(points, 5), points)
    assert charts.smoothing_window(32) == 5
    assert charts.smoothing_window(20_000) == 1001


def test_held_out_losses_are_marked() -> None:
    events = [{"event": "evaluated", "step": s, "loss": 1.0, "token_accuracy": 0.5, "best": True} for s in (16, 32)]
    ends, along = charts.held_out(a_report(), events)
    assert [m.point for m in ends] == [(0, 3.8679), (32, 0.4098)]
    assert [m.point for m in along] == [(16, 1.0)]
    assert render(events=[*steps(32), *events]).count('<circle class="mark"') == 3
    many = [{**events[0], "step": s} for s in range(1, 60)]
    html = render({**a_report(), "steps": 100}, events=[*steps(100), *many])
    assert html.count('<circle class="mark"') == 2
    assert 'class="line held"' in html


def test_inputs_are_left_alone() -> None:
    found, preflight, events = a_report(), a_preflight(), steps(8)
    kept = copy.deepcopy((found, preflight, events))
    render(found, preflight, events)
    assert (found, preflight, events) == kept
