"""Hardware profiles: ready ones, files, and what a step costs on them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specmoe.cli import run_verb
from specmoe.errors import SpecmoeError
from specmoe.offload.hardware.cost import step_cost
from specmoe.offload.hardware.profile import Compute, Hardware, Link, ModelCost, load_hardware, ready_hardware
from specmoe.topology import Topology

SHAPE = Topology(model_id="m", layers=4, experts=8, top_k=2, hidden_size=64)
COST = ModelCost(
    model_id="m",
    layers=4,
    experts=8,
    top_k=2,
    hidden_size=64,
    expert_bytes=1000,
    layer_seconds=3e-3,
    token_layer_seconds=2e-4,
    expert_seconds=5e-4,
    token_seconds=1e-5,
    other_seconds=7e-3,
)


def machine(models: tuple[ModelCost, ...] = ()) -> Hardware:
    return Hardware(
        name="box",
        description="a box",
        source="made up for a test",
        links=(
            Link(name="disk", bandwidth=1e9, latency=1e-4, parallelism=2),
            Link(name="bus", bandwidth=1e10, latency=0),
        ),
        compute=Compute(memory_bandwidth=1e10, flops=1e12, kernel_seconds=1e-5, models=models),
        memory_bytes=10**9,
        host_bytes=10**10,
        measured={"points": [1, 2]},
    )


def test_a_profile_survives_a_file(tmp_path: Path) -> None:
    profile = machine((COST,))
    profile.save(tmp_path / "box.json")
    assert load_hardware(tmp_path / "box.json") == profile
    assert load_hardware(str(tmp_path / "box.json")) == profile
    assert profile.links[0].seconds(10**6) == pytest.approx(1.1e-3)


@pytest.mark.parametrize("name", sorted(ready_hardware()))
def test_a_ready_profile_names_its_sources_in_plausible_units(name: str) -> None:
    profile = load_hardware(name)
    assert profile.name == name
    assert profile.measured is None
    for link in profile.links:
        assert 1e8 < link.bandwidth < 1e11
        assert 1e-6 <= link.latency < 1e-3
        assert "https://" in link.source or "http://" in link.source
        # Each of the three figures is accounted for.
        assert re.search("Bandwidth|Derived", link.source)
        assert re.search("Fixed cost|fixed cost", link.source)
        assert "Parallelism" in link.source
    compute = profile.compute
    assert 1e10 < compute.memory_bandwidth < 1e13
    assert 1e11 < compute.flops < 2e15
    assert 0 <= compute.kernel_seconds < 1e-3
    assert all(word in compute.source for word in ("https://", "Memory", "Arithmetic", "Fixed cost of a layer"))
    # Reading a link must not beat the memory that it ends in.
    assert profile.links[-1].bandwidth < compute.memory_bandwidth


def test_the_buses_keep_their_order() -> None:
    order = ["sata-ssd", "nvme-gen3", "nvme-gen4", "nvme-gen5", "pcie-4-x16", "pcie-5-x16"]
    rates = [load_hardware(name).links[0].bandwidth for name in order]
    assert rates == sorted(rates)
    assert len(load_hardware("rtx-4090-nvme").links) == 2


def test_unknown_names_and_damaged_files_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(SpecmoeError, match=r"did you mean .*rtx-4090"):
        load_hardware("rtx4090")
    with pytest.raises(SpecmoeError, match="does not exist"):
        load_hardware("no/such.json")
    with pytest.raises(SpecmoeError, match="is a folder"):
        load_hardware(tmp_path)
    path = tmp_path / "box.json"
    good = machine().model_dump(mode="json")
    for change, message in [
        ({"format": "else"}, "is not a hardware profile"),
        ({"version": 2}, "version 2, this release reads 1"),
        ({"links": []}, "damaged: links"),
        ({"compute": {"memory_bandwidth": -1, "flops": 1}}, "damaged: compute.memory_bandwidth"),
        ({"surprise": 1}, "damaged: surprise"),
    ]:
        path.write_text(json.dumps({**good, **change}), encoding="utf-8")
        with pytest.raises(SpecmoeError, match=message) as caught:
            load_hardware(path)
        assert "specmoe hardware measure" in str(caught.value)
        assert "\n" not in str(caught.value)
    for text in ("[]", "{", '{"format": "specmoe-hardware", "version": 1, "name": NaN}'):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(SpecmoeError):
            load_hardware(path)


def test_measured_costs_count_for_their_model_only() -> None:
    profile = machine((COST,))
    cost = step_cost(profile, SHAPE, 1000)
    assert cost.layer_seconds == COST.layer_seconds
    assert cost.expert(3) == pytest.approx(5.2e-4)
    assert cost.layer(3) == pytest.approx(3.4e-3)
    assert cost.other_seconds == COST.other_seconds
    assert step_cost(profile, SHAPE.model_copy(update={"hidden_size": 0}), 1000) == cost
    other = SHAPE.model_copy(update={"experts": 9})
    assert step_cost(profile, other, 1000) == step_cost(machine(), other, 1000)


def test_an_estimate_is_the_roofline_by_hand() -> None:
    cost = step_cost(machine(), SHAPE, 2_000_000)
    # A million weights: 0.2 ms to read them, 2 µs of arithmetic.
    assert cost.expert_seconds == pytest.approx(2e-4)
    assert cost.token_seconds == pytest.approx(2e-6)
    assert cost.layer_seconds == pytest.approx(1e-5 + (4 * 64**2 + 64 * 8) * 2 / 1e10)
    assert step_cost(machine(), SHAPE.model_copy(update={"hidden_size": 0}), 1).layer_seconds == 1e-5
    # The same weights in a quarter of the bytes: less to read, as much to compute.
    quarter = step_cost(machine(), SHAPE, 500_000, bytes_per_weight=0.5)
    assert quarter.expert_seconds == pytest.approx(5e-5)
    assert quarter.token_seconds == pytest.approx(2e-6)
    with pytest.raises(ValueError, match="positive"):
        step_cost(machine(), SHAPE, 0)


@given(st.integers(1, 1 << 32), st.integers(1, 1 << 32), st.integers(1, 64), st.sampled_from(sorted(ready_hardware())))
def test_costs_grow_with_bytes_and_tokens(size: int, more: int, tokens: int, name: str) -> None:
    profile = load_hardware(name)
    small, large = step_cost(profile, SHAPE, size), step_cost(profile, SHAPE, size + more)
    assert large.expert(tokens) > small.expert(tokens)
    assert large.layer(tokens) == small.layer(tokens)
    assert small.expert(tokens + 1) > small.expert(tokens)
    assert small.layer(tokens + 1) > small.layer(tokens)
    # Between the roofline's maximum and twice that.
    compute = profile.compute
    roof = max(size / compute.memory_bandwidth, tokens * size / compute.flops)
    assert roof * (1 - 1e-9) <= small.expert(tokens) <= 2 * roof * (1 + 1e-9)


def test_verbs_list_and_show(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_verb(["hardware", "list", "--json"]) == 0
    assert {each["name"] for each in json.loads(capsys.readouterr().out)} == set(ready_hardware())
    assert run_verb(["hardware", "show", "nvme-gen4"]) == 0
    assert "7.4 GB/s" in capsys.readouterr().out
    assert run_verb(["hardware", "show", "nvme-gen9"]) == 2
    assert "did you mean" in capsys.readouterr().err


def test_the_documentation_has_every_ready_profile_as_it_is() -> None:
    page = (Path(__file__).parents[1] / "docs" / "hardware.md").read_text(encoding="utf-8")
    table = page.split("<!-- profiles -->")[1].split("<!-- /profiles -->")[0].strip()
    assert table == profile_table()


def profile_table() -> str:
    """The table of docs/hardware.md; ``python tests/test_hardware.py`` prints it."""
    lines = [
        "| name | what | links, GB/s | fixed cost, µs | at once | memory, GB/s | TFLOP/s |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for name in ready_hardware():
        profile = load_hardware(name)
        cells = [
            f"`{name}`",
            profile.description,
            " → ".join(f"{link.bandwidth / 1e9:.3g}" for link in profile.links),
            " → ".join(f"{link.latency * 1e6:.3g}" for link in profile.links),
            " → ".join(str(link.parallelism) for link in profile.links),
            f"{profile.compute.memory_bandwidth / 1e9:,.4g}",
            f"{profile.compute.flops / 1e12:,.4g}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(profile_table())
