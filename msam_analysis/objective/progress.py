"""How far a long work is: solvers tell it, one line shows it, and a budget may end it."""

from __future__ import annotations

import io
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

if TYPE_CHECKING:
    from typing_extensions import Self

Item = TypeVar("Item")

LINE = "{desc} [{elapsed}{postfix}]"
"""Form of a line that counts nothing itself."""
_INTERVAL = 0.1  # least seconds between two looks of a live line
_FIRST, _GROWTH = 20.0, 0.25  # seconds of silence in a log at first, and later as a part of the time passed


class Step(NamedTuple):
    """How far a solver is.

    ``unit``: What it counts. ``done``, ``of``: How many there are, and at most will be.
    ``error``: The relative residual or the standard error so far, as ``name`` says; NaN where none is known.
    """

    unit: str
    done: int
    of: int | None
    error: float = math.nan
    name: str = "residual"

    def __str__(self) -> str:
        """Say it in a few words."""
        error = "" if math.isnan(self.error) else f", {self.name} {self.error:.0e}"
        return f"{self.done}{'' if self.of is None else f'/{self.of}'} {self.unit}{error}"


Listener = Callable[[Step], bool]
_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


def told(unit: str, done: int, of: int | None, error: float = math.nan, name: str = "residual") -> bool:
    """Tell who listens how far a solver is; return whether it must end here, with what it has.

    The arguments are those of :class:`Step`. Nothing may be read from a device for them.
    """
    listener = _listener.get()
    return listener is not None and listener(Step(unit, done, of, error, name))


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Hear every step inside; who listens outside of it does so, too, and each may end the solver."""
    outer = _listener.get()
    token = _listener.set(listener if outer is None else lambda step: bool(outer(step) | listener(step)))
    try:
        yield
    finally:
        _listener.reset(token)


class Bar:
    """One line that says how far a work is: live on a terminal and in a notebook, now and then a line in a log.

    It also says how far the solvers inside are. In a log the first line comes after 20 seconds, and each further one
    once a quarter more time has passed.

    Parameters
    ----------
    total
        How much work there is; None where nobody knows.
    what
        What is done, in a word or two.
    unit
        What is counted.
    done
        Work that was done before.
    shown
        Whether anything is shown.
    form
        Format of the line as tqdm has it; default tqdm's own.
    leave
        Whether the last line stays.
    """

    def __init__(
        self,
        total: float | None,
        what: str,
        unit: str = "it",
        *,
        done: float = 0,
        shown: bool = True,
        form: str | None = None,
        leave: bool = True,
    ) -> None:
        self._shown, self._leave, self._live = shown, leave, False
        self._options: dict[str, Any] = dict(total=total, initial=done, desc=what, unit=unit, bar_format=form)
        self._bar: Any = None
        self._listening: Any = None
        self._what = what
        self._begun = self._said = 0.0

    def __enter__(self) -> Self:
        """Begin the line, and listen to the solvers."""
        if self._shown:
            with self._tried():
                self._begin()
        return self

    @contextmanager
    def _tried(self) -> Iterator[None]:
        """Fall silent where nothing can be shown: the work goes on."""
        try:
            yield
        except Exception:  # noqa: BLE001 -- whatever a terminal, a notebook or tqdm has
            self._bar = None

    def _begin(self) -> None:
        notebook = _in_notebook()
        self._live = notebook or sys.stderr.isatty()
        self._options |= {"miniters": 0, "smoothing": 0, "leave": self._leave}
        if self._live:
            # Imported where it is used: in a notebook without widgets the import alone warns.
            from tqdm.auto import tqdm

            # A terminal of no known height would hide tqdm's line: its size is asked for here.
            size = {"dynamic_ncols": True} if notebook else {"ncols": self.width, "nrows": 20}
            self._bar = tqdm(**self._options, **size, mininterval=_INTERVAL)
        else:
            from tqdm.std import tqdm as lines

            self._bar = lines(**self._options, file=io.StringIO(), mininterval=math.inf)
        self._begun = self._said = time.monotonic()
        self._listening = listening(self._hear)
        self._listening.__enter__()

    def __exit__(self, *_: object) -> None:
        """Leave the terminal as it was, but for the last line."""
        if self._listening is not None:
            self._listening.__exit__(None, None, None)
        if self._bar is not None:
            with self._tried():
                if not self._live and self._leave:
                    self._line()
                self._bar.close()

    def advance(self, amount: float = 1) -> None:
        """Say that some more of the work is done."""
        if self._bar is not None:
            with self._tried():
                self._bar.update(amount)
                self._show()

    @property
    def width(self) -> int:
        """Characters that a live line may have; in a log it may be long."""
        return shutil.get_terminal_size().columns if self._live else 200

    def say(self, what: str, more: str = "") -> None:
        """Say what is done now, and more about it behind the numbers."""
        if self._bar is not None:
            self._what = what
            with self._tried():
                self._bar.set_description_str(what, refresh=False)
                self._bar.set_postfix_str(more, refresh=False)
                self._show()

    def _hear(self, step: Step) -> bool:
        if self._bar is not None:
            with self._tried():
                self._bar.set_description_str(f"{self._what}, {step}", refresh=False)
                self._show()
        return False

    def _show(self) -> None:
        if self._live:
            self._bar.update(0)  # redraws when it is time
            return
        now = time.monotonic()
        if now - self._said >= max(_FIRST, _GROWTH * (now - self._begun)):
            self._line()
            self._said = now

    def _line(self) -> None:
        sys.stderr.write(f"{self._bar}\n")
        sys.stderr.flush()


def _in_notebook() -> bool:
    """Tell whether this is a cell of a notebook; that somebody has imported Jupyter is not enough."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel")


def counted(items: Sequence[Item], what: str, unit: str, *, shown: bool) -> Iterator[Item]:
    """Yield items, and show how many are done; see :class:`Bar`."""
    with Bar(len(items), what, unit, shown=shown) as bar:
        for item in items:
            yield item
            bar.advance()


@contextmanager
def progress(what: str = "measuring") -> Iterator[None]:
    """Show on one line how far the solvers inside are: products, draws or gradients done, and the residual so far.

    The line is live on a terminal and in a notebook. In a log there is one after 20 seconds, and another one whenever a
    quarter more time has passed. Numbers are the same with and without it.

    Parameters
    ----------
    what
        First words of the line.

    Examples
    --------
    >>> import torch, msam_analysis as ma
    >>> with ma.progress():
    ...     pairs = ma.top_eigenvalues(ma.MatrixOperator(torch.diag(torch.tensor([1.0, 2.0]))), 1)
    >>> pairs.converged
    True
    """
    with Bar(None, what, form=LINE, leave=False):
        yield
