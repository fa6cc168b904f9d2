"""The table of faults in docs/trust.md is that of the counts that were committed, and nothing fell short in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
COUNTS = ROOT / "benchmarks" / "results" / "faults_cpu.json"


@pytest.fixture(scope="module")
def counts() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        (ROOT / "benchmarks" / "results" / "faults_cpu.json").read_text(encoding="utf-8")
    )
    return found


def test_the_page_has_what_was_counted(counts: dict[str, Any]) -> None:
    page = (ROOT / "docs" / "trust.md").read_text(encoding="utf-8")
    for part in counts["parts"]:
        assert f"| {part['name']} | {part['tried']} | {part['held']} |" in page


def test_what_fell_short_is_named(counts: dict[str, Any]) -> None:
    for part in counts["parts"]:
        assert part["tried"] - part["held"] == len(part["failed"])
        assert part["tried"] > 5
