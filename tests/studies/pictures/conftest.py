"""Pictures are drawn without a screen, and closed after each test; what tests of other folders left, before it."""

from collections.abc import Iterator

import matplotlib as mpl
import pytest

mpl.use("Agg")

from matplotlib import pyplot as plt


@pytest.fixture(autouse=True)
def _close_figures() -> Iterator[None]:
    plt.close("all")
    yield
    plt.close("all")
