"""`abyssal plan RECIPE` and `abyssal machine`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from abyssal.machine.limits import MachineLimits

Call = Callable[..., Any]
LIMITS = MachineLimits("bfloat16", "cpu, 2 threads", 8e11, 0.9, 40.0, 4e10, 24 * 10**9)
V3 = ("plan", "v3_671b", "--cluster", "h800:2048")


@pytest.fixture
def facts(abyssal: Call) -> dict[str, Any]:
    result = abyssal(*V3, "--then", "v3_671b_32k", "--other-hours", 5000, "--price", 3, "--json")
    assert result.err == ""
    loaded: dict[str, Any] = json.loads(result.out)
    return loaded


def test_plan_is_printed_with_the_published_figures(abyssal: Call) -> None:
    code, out, err = abyssal(*V3)
    assert (code, err) == (0, "")
    for text in (
        "v3_671b on 2,048 h800",
        "dualpipe PP16 EP64, fp8, 128 data-parallel ranks",
        "671B parameters, 37.55B activated",
        "1,542",
        "MFU 39.0%, not causal 43.8%",
        "DualPipe: 16 ranks",
        "memory of a device, 85.9 GB: fits",
        "prefill: unit of 32",
        "decode, unit of 320",
    ):
        assert text in out, text
    assert "layouts within" not in out


def test_json_holds_every_section_and_adds_up(facts: dict[str, Any]) -> None:
    hours = [phase["device_hours"] for phase in facts["phases"]]
    assert facts["device_hours"] == pytest.approx(sum(hours) + 5000)
    assert facts["cost"] == pytest.approx(3 * facts["device_hours"])
    for rank in facts["memory"]["ranks"]:
        assert rank["total"] == pytest.approx(sum(size for kind, size in rank.items() if kind != "total"))
    for parts in facts["step"]["parts"].values():
        assert sum(parts.values()) == pytest.approx(facts["step"]["seconds"])
    assert facts["cluster"]["figures"]["network_bandwidth"]["value"] == 50e9
    assert {row["name"] for row in facts["calibration"]} >= {"other_kernels", "exposed_and_imbalance"}
    assert facts["parameters"]["total"] == 671_026_419_200
    assert facts["cache_bytes_per_token"] == 70_272


def test_length_price_and_batch_are_options(abyssal: Call) -> None:
    base, longer, larger = (
        json.loads(abyssal(*V3, "--json", *extra).out)
        for extra in (("--tokens", "1T"), ("--tokens", "2e12"), ("--tokens", "1T", "--batch", 30720))
    )
    assert longer["phases"][0]["tokens"] == 2 * base["phases"][0]["tokens"] == 2 * 10**12
    assert longer["device_hours"] > 1.9 * base["device_hours"]
    assert larger["step"]["tokens"] == 2 * base["step"]["tokens"]
    assert larger["device_hours"] < base["device_hours"]


def test_search_ranks_layouts_with_the_options_that_choose_them(abyssal: Call) -> None:
    call = ("plan", "v3_16b", "--cluster", "h100:16")
    found = json.loads(abyssal(*call, "--search", "--memory", 60, "--json").out)["search"]
    assert found["memory_limit"] == 60e9
    best = found["ranked"][0]
    chosen = json.loads(abyssal(*call, *best["options"], "--json").out)
    assert chosen["layout"]["text"] == best["layout"]
    assert chosen["step"]["seconds"] == pytest.approx(best["step_s"])
    out = abyssal(*call, "--search", "--memory", 60).out
    assert "layouts within 60 GB a device" in out
    assert re.search(r"\d+ fails?, such as", out)


def test_cluster_that_the_report_does_not_fit_gets_the_fastest_layout(abyssal: Call) -> None:
    found = json.loads(abyssal("plan", "v3_16b", "--cluster", "h100:16", "--json").out)
    assert found["memory"]["fits"]
    assert found["layout"]["text"] == found["search"]["ranked"][0]["layout"]


def test_page_and_trace_are_written(abyssal: Call, tmp_path: Path) -> None:
    code, out, err = abyssal(*V3, "--html", "plan.html", "--trace", "plan.json")
    assert (code, err) == (0, "")
    assert "written: plan.html" in out
    page = (tmp_path / "plan.html").read_text(encoding="utf-8")
    assert "Plan: v3_671b on 2,048 h800" in page
    assert page.count("<svg") == 3
    events = json.loads((tmp_path / "plan.json").read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert {event["tid"] for event in spans} == set(range(16))
    assert max(event["ts"] + event["dur"] for event in spans) == pytest.approx(19.48e6, rel=0.02)  # microseconds


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--cluster", "h80:8"), "no chip 'h80'; nearest: h800"),
        (("--cluster", "h800:2048", "--pp", 3), "must divide devices=2048; nearest: 2, 4"),
        (("--cluster", "h800:2048", "--pp", -16), "pp_size=-16: must be at least 1"),
        (("--cluster", "h800:2048", "--tokens", "many"), "--tokens many: must be a number"),
        (("--cluster", "h800:2048", "--tokens", "0"), "from 1 to 10^18"),
        (("--cluster", "h800:2048", "--price", -1), "--price -1: must be from 0"),
        (("--cluster", "h800:2048", "--price", "nan"), "--price nan"),
        (("--cluster", "h800:2048", "--memory", 0), "--memory 0: must be a number of GB above 0"),
        (("--cluster", "h800:2048", "--batch", 0), "--batch 0: must be at least 1"),
        (("--cluster", "h800:2048", "--html", "plan.txt"), "must end in .html"),
        (("--cluster", "h800:2048", "--then", "demo"), "must be a multiple of the first"),
        (("--cluster", "h800:8"), "no layout fits"),
        (("--cluster", "h100:8", "--hardware", "gone.toml"), "gone.toml: cannot read"),
    ],
)
def test_fault_of_the_user_is_one_sentence(abyssal: Call, arguments: tuple[object, ...], sentence: str) -> None:
    code, out, err = abyssal("plan", "v3_671b", *arguments)
    assert code == 2
    assert out == ""
    assert sentence in err
    assert err.count("\n") == 1


@pytest.mark.slow
def test_excess_names_how_much_what_and_the_nearest_layout_that_fits(abyssal: Call) -> None:
    layout = ("--schedule", "1f1b", "--pp", 2, "--ep", 8)
    code, _, err = abyssal("plan", "v3_671b", "--cluster", "h800:2048", *layout)
    assert code == 2
    match = re.search(
        r"needs ([\d.]+) GB of 85.9 GB, ([\d.]+) GB too many; most are \w+, .*; nearest .*: (--.*)\n", err
    )
    assert match, err
    assert float(match[1]) - 85.9 == pytest.approx(float(match[2]), abs=0.11)
    assert abyssal("plan", "v3_671b", "--cluster", "h800:2048", *match[3].split()).code == 0


def test_options_may_stand_before_the_recipe_and_other_commands_keep_their_names(abyssal: Call) -> None:
    assert abyssal("plan", "--cluster", "h100:1", "demo").code == 0
    assert "DualPipe" in abyssal("plan", "schedule", "dualpipe", "--ranks", 4, "--micro-batches", 8).out
    assert "schedule" in abyssal("plan", "--help").out


def test_chip_of_ones_own_is_planned_for(abyssal: Call, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("[cpu]\nbf16_flops = 8e11\nmemory_bytes = 2.4e10\nmemory_bandwidth = 4e10\n")
    plan = json.loads(abyssal("plan", "demo", "--hardware", "mine.toml", "--cluster", "cpu:1", "--json").out)
    assert plan["layout"]["state"] == "trainer"
    assert 1_000 < plan["step"]["tokens_per_s"] < 50_000
    assert plan["cluster"]["figures"]["bf16_flops"]["source"] == "not stated"


def test_machine_is_measured_into_a_file_that_a_plan_takes(
    abyssal: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from abyssal.machine import limits

    monkeypatch.setattr(limits, "measure_limits", lambda device: LIMITS)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    code, out, err = abyssal("machine", "--out", "machine.toml", "--name", "here")
    assert (code, err) == (0, "")
    assert abyssal(*out.split("abyssal ", 1)[1].split(), "--json").code == 0
    assert abyssal("machine").out.startswith("[machine]\n")
    assert "--name a b: must be letters" in abyssal("machine", "--name", "a b").err
    assert "must end in .toml" in abyssal("machine", "--out", "x.txt").err
