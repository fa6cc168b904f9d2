"""What an exhibit is: the runs that it needs, what it finds in them, and what it says about that."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd

from msam_analysis.report.page import Claim
from msam_analysis.studies import prose
from msam_analysis.studies.claims import Compare, PaperClaim
from msam_analysis.studies.prose import Prose
from msam_analysis.studies.runs import Run, gather
from msam_analysis.studies.store import DivergedError
from msam_analysis.studies.tables import FinishedRun
from msam_analysis.studies.workloads import Workload

Wanted = Sequence[Run] | Mapping[str, Sequence[Run]]


@dataclass(frozen=True, eq=False)
class Evidence:
    """The finished runs that an exhibit wanted, and no others, by its names of groups; those of a list under ``""``."""

    workload: Workload
    seeds: int
    groups: Mapping[str, Sequence[FinishedRun]]

    @property
    def named(self) -> list[tuple[str, FinishedRun]]:
        """The runs of all groups, in the order in which they are wanted, each with the name of its group."""
        return [(name, run) for name, group in self.groups.items() for run in group]

    @property
    def runs(self) -> list[FinishedRun]:
        """The runs of all groups."""
        return [run for _, run in self.named]


@dataclass(frozen=True, eq=False)
class Finding:
    """What an exhibit found: the figure and its table, a short one for the report, claims with verdicts, and a note.

    ``draw`` makes the figure and returns its axes; it and the tables are None where there is nothing to show.
    """

    draw: Callable[[], Any] | None
    table: pd.DataFrame | None = None
    claims: Sequence[Claim] = ()
    shown: pd.DataFrame | None = None
    note: str = ""


@dataclass(frozen=True, eq=False)
class Exhibit:
    """A figure of the report: the runs behind it, its table, and the claims about it. :func:`find` does the rest.

    ``name``: Name of its files.
    ``wants``: Function of the workload and the number of seeds. It returns the runs that the exhibit needs: a list, or
        lists by the name of a group.
    ``table``: Function of the finished runs. It returns what is judged and drawn: a tidy table. A table without rows
        means that the workload has nothing that the exhibit could be about.
    ``draw``: Function of the table and the finished runs. It draws a new figure, and returns its axes.
    ``comparisons``: Name of a claim to the function of the table that tests it.
    ``shown``: Function of the table. It returns a short one for the report; default none.
    ``constants``: Numbers that the words name.
    ``facts``: Function of the table and the finished runs. It returns more numbers for the note; default none. The note
        can also ask whether there is anything to show: ``found``.
    ``written``: Function of the table. It returns what is written beside the figure; default the table itself.
    ``main``: Whether the exhibit is part of the study that is made when none is chosen.
    ``words``: Title, caption, note and claims, in the form of :func:`~msam_analysis.studies.prose.read`; default those
        under the exhibit's name in ``templates/exhibits.md.j2``.
    """

    name: str
    wants: Callable[[Workload, int], Wanted]
    table: Callable[[Evidence], Any]
    draw: Callable[[Any, Evidence], Any]
    comparisons: Mapping[str, Compare] = field(default_factory=dict)
    shown: Callable[[Any], pd.DataFrame] | None = None
    constants: Mapping[str, object] = field(default_factory=dict)
    facts: Callable[[Any, Evidence], Mapping[str, object]] = lambda *_: {}
    written: Callable[[Any], pd.DataFrame] = lambda table: table
    main: bool = False
    words: str = ""

    @functools.cached_property
    def prose(self) -> Prose:
        """Title, caption, note and claims, in words; a ValueError says that there are none."""
        if self.words:
            return prose.read(self.words)
        if self.name not in prose.of_exhibits():
            raise ValueError(
                f"exhibit {self.name!r} has no words: give it some, or write '# {self.name}: title' in exhibits.md.j2"
            )
        return prose.of_exhibits()[self.name]

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids of the paper's figures and tables that it answers: those of its claims; of an addition of ours none."""
        return tuple(dict.fromkeys(key for key, *_, control in self.prose.claims.values() if not control))

    @functools.cached_property
    def claims(self) -> tuple[PaperClaim, ...]:
        """What is tested on the table."""
        return self.prose.claimed(self.comparisons, self.constants)

    def groups(self, workload: Workload, seeds: int) -> Mapping[str, Sequence[Run]]:
        """Return the runs that it needs, by group, each network once in its group."""
        wanted = self.wants(workload, seeds)
        groups = wanted if isinstance(wanted, Mapping) else {"": wanted}
        return {name: [*gather(runs).values()] for name, runs in groups.items()}

    def runs(self, workload: Workload, seeds: int) -> list[Run]:
        """Return all the runs that it needs."""
        return [run for group in self.groups(workload, seeds).values() for run in group]

    def evidence(self, workload: Workload, seeds: int, finished: Mapping[str, FinishedRun]) -> Evidence:
        """Return its own runs among those that are finished, known by :attr:`Run.identity`."""
        groups = self.groups(workload, seeds)
        return Evidence(
            workload, seeds, {name: [finished[run.identity] for run in group] for name, group in groups.items()}
        )


def find(exhibit: Exhibit, workload: Workload, seeds: int, finished: Mapping[str, FinishedRun]) -> Finding:
    """Return what an exhibit finds in finished runs, known by :attr:`~msam_analysis.studies.runs.Run.identity`.

    Where it needs what a diverged network does not have, nothing is found, and the claims say why.
    """
    evidence = exhibit.evidence(workload, seeds, finished)
    try:
        table = exhibit.table(evidence)
        found = not (isinstance(table, pd.DataFrame) and table.empty)
        facts = exhibit.facts(table, evidence) if found else {}
        note = prose.fill(exhibit.prose.note, {"found": found, **exhibit.constants, **facts})
        if not found:
            return Finding(None, claims=_untold(exhibit), note=note)
        return Finding(
            draw=functools.partial(exhibit.draw, table, evidence),
            table=exhibit.written(table),
            claims=[claim.judge(table) for claim in exhibit.claims],
            shown=None if exhibit.shown is None else exhibit.shown(table),
            note=note,
        )
    except DivergedError as error:
        return Finding(None, claims=_untold(exhibit, f"not measured: {error}"))


def _untold(exhibit: Exhibit, measured: str = "not measured") -> list[Claim]:
    """Return the claims where nothing was found."""
    judged = [replace(claim, compare=lambda _: []).judge(None) for claim in exhibit.claims]
    return [replace(claim, measured=measured) for claim in judged]
