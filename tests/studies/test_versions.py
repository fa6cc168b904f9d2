"""Numbers that change without a version that is raised: finished runs would be taken for what they no longer are."""

from __future__ import annotations

import pytest
import torch

from .versions import COMMAND, PARTS, stored


@pytest.mark.parametrize("part", PARTS)
def test_numbers_belong_to_their_version(part: str) -> None:
    """Trained on another processor, 8 steps of the toy agree to about 1e-5; whatever is changed changes more."""
    if "robustness" in part:
        pytest.importorskip("art")
    version, numbers = PARTS[part]
    before = stored().get(part, {"version": None})
    assert version == before["version"], f"the version of {part} was raised: store its numbers with {COMMAND}"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        now = numbers()
    finally:
        torch.set_num_threads(threads)
    alike = now.keys() == before["numbers"].keys() and all(
        value is was if None in (value, was) else value == pytest.approx(was, rel=1e-3, abs=1e-5)
        for value, was in ((now[name], before["numbers"][name]) for name in now)
    )
    assert alike, f"the numbers of {part} changed: raise its VERSION and store them again with {COMMAND}"


def test_every_part_is_stored() -> None:
    assert stored().keys() == PARTS.keys()
