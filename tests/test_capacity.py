"""Capacities as people write them."""

from __future__ import annotations

import pytest

from specmoe.errors import SpecmoeError
from specmoe.offload.capacity import parse_capacity
from specmoe.topology import Topology

TOPOLOGY = Topology(model_id="m", layers=8, experts=16, top_k=2, hidden_size=0)
MIB = 1 << 20


@pytest.mark.parametrize(
    ("text", "experts"),
    [
        ("25%", 32),
        ("0.25", 32),
        (".5", 64),
        ("12.5 %", 16),
        ("100%", 128),
        ("64 experts", 64),
        ("1 expert", 1),
        ("64", 64),
        ("20MiB", 20),
        ("20MB", 19),
        ("0.5 gib", 128),
        ("10485760b", 10),
        ("9999 experts", 128),
        ("3TB", 128),
    ],
)
def test_what_fits(text: str, experts: int) -> None:
    assert parse_capacity(text, TOPOLOGY, MIB) == experts


def test_shares_are_exact() -> None:
    ten = Topology(model_id="m", layers=1, experts=10, top_k=1, hidden_size=0)
    assert [parse_capacity(f"{percent}%", ten, None) for percent in range(10, 101, 10)] == list(range(1, 11))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("8XB", "cannot be read; give a share like 25%"),
        ("8 gigabytes", "cannot be read"),
        ("eight", "cannot be read"),
        ("-8GB", "cannot be read"),
        ("1.5", "cannot be read"),
        ("2.5 experts", "cannot be read"),
        ("nan", "cannot be read"),
        ("120%", "at most 100%"),
        ("0", "not even one expert"),
        ("0%", "not even one expert"),
        ("0.001", "not even one expert"),
        ("1MB", "not even one expert of 1,048,576 bytes"),
    ],
)
def test_what_cannot_be(text: str, message: str) -> None:
    with pytest.raises(SpecmoeError, match=message) as caught:
        parse_capacity(text, TOPOLOGY, MIB)
    assert "\n" not in str(caught.value)


def test_a_size_needs_the_size_of_an_expert() -> None:
    assert parse_capacity("25%", TOPOLOGY, None) == 32
    assert parse_capacity("32", TOPOLOGY, None) == 32
    with pytest.raises(SpecmoeError, match="--expert-bytes"):
        parse_capacity("8GiB", TOPOLOGY, None)
    with pytest.raises(SpecmoeError, match="not even one expert; give more"):
        parse_capacity("0", TOPOLOGY, None)
