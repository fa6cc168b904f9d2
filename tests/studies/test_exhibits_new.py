"""A new exhibit: declared in fewer than thirty lines, and found in finished runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jinja2
import pytest
from matplotlib import pyplot as plt

from msam_analysis.results import Result
from msam_analysis.studies import pictures, prose
from msam_analysis.studies.claims import difference
from msam_analysis.studies.exhibits import EXHIBITS, Exhibit, find, main_tables
from msam_analysis.studies.exhibits.wanted import each
from msam_analysis.studies.store import DivergedError
from msam_analysis.studies.tables import FinishedRun, outcomes

from .finished import finished_of
from .toy import TOY

SEEDS = 3
Finished = dict[str, FinishedRun]

# The example of CONTRIBUTING.md begins here.
GAP = Exhibit(
    name="gap",
    wants=lambda workload, seeds: each(workload, ("SGD", "MSAM"), seeds),
    table=lambda evidence: outcomes(evidence.runs).assign(gap=lambda runs: runs["test_loss"] - runs["train_loss"]),
    draw=lambda table, _: pictures.by_group(table, {"gap": "test loss − train loss (nats)"}, "workload"),
    comparisons={"smaller": lambda table: [difference(table, "gap", "SGD", "MSAM", unit="nats")]},
    facts=lambda table, _: {"epochs": table["epochs"].max()},
    words="""
The gap between test and train loss

Test loss less train loss, at the end of training.

Trained for {{ epochs }} epochs.

* smaller, T1, control: Readers' question: MSAM's gap is smaller than SGD's.
  paper: asked by readers
  note: Test loss less train loss, paired by seed.
""",
)
# The example of CONTRIBUTING.md ends here.


@pytest.fixture(scope="module")
def finished() -> Finished:
    return finished_of(TOY, SEEDS, [GAP])


def test_a_new_exhibit_is_thirty_lines_at_most_and_those_of_the_manual() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    begin, end = (f"# The example of CONTRIBUTING.md {verb} here.\n" for verb in ("begins", "ends"))
    example = source.partition(begin)[2].partition(end)[0]
    assert GAP.name in example
    assert len(example.splitlines()) <= 30
    assert example.strip() in (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_a_new_exhibit_is_found(finished: Finished) -> None:
    finding = find(GAP, TOY, SEEDS, finished)
    assert finding.table is not None
    assert finding.table["optimizer"].to_list() == ["SGD"] * SEEDS + ["MSAM"] * SEEDS
    (claim,) = finding.claims
    assert GAP.ids == (), "a control answers no figure"
    gaps = [
        [run.scores["test_loss"] - run.scores["train_loss"] for run in finished.values() if run.optimizer == name]
        for name in ("SGD", "MSAM")
    ]
    mean = sum(a - b for a, b in zip(*gaps, strict=True)) / SEEDS
    assert float(claim.measured.split()[3].replace("−", "-")) == pytest.approx(mean, rel=0.1)
    assert claim.control
    assert (claim.exhibit, claim.paper) == ("T1", "asked by readers")
    assert claim.note == "Test loss less train loss, paired by seed."
    assert (GAP.prose.title, finding.note) == (
        "The gap between test and train loss",
        f"Trained for {TOY.recipe.epochs} epochs.",
    )
    assert finding.draw is not None
    assert all(ax.has_data() for ax in finding.draw())
    plt.close("all")


def test_an_exhibit_gets_its_own_runs_and_no_others(finished: Finished) -> None:
    more = {**finished, "another": dataclasses.replace(next(iter(finished.values())), optimizer="other")}
    evidence = GAP.evidence(TOY, SEEDS, more)
    assert [(run.optimizer, run.seed) for run in evidence.runs] == [
        (name, seed) for name in ("SGD", "MSAM") for seed in range(SEEDS)
    ]
    assert evidence.workload is TOY
    assert [*evidence.groups] == [""]


def test_groups_have_the_exhibit_s_names(finished: Finished) -> None:
    two = dataclasses.replace(
        GAP, wants=lambda workload, seeds: {name: each(workload, (name,), seeds) for name in ("MSAM", "SGD")}
    )
    assert [run.optimizer for run in two.runs(TOY, 1)] == ["MSAM", "SGD"]
    groups = two.evidence(TOY, SEEDS, finished).groups
    assert {name: {run.optimizer for run in runs} for name, runs in groups.items()} == {
        "MSAM": {"MSAM"},
        "SGD": {"SGD"},
    }


def test_a_network_that_is_wanted_twice_is_handed_over_once(finished: Finished) -> None:
    """Rounding makes points of a grid meet where a workload is small."""
    twice = dataclasses.replace(GAP, wants=lambda workload, seeds: each(workload, ("SGD", "MSAM", "SGD"), seeds))
    assert [run.optimizer for run in twice.evidence(TOY, 1, finished).runs] == ["SGD", "MSAM"]


def test_a_table_without_rows_tells_nothing(finished: Finished) -> None:
    words = GAP.words.replace("Trained for {{ epochs }} epochs.", "{% if found %}found{% else %}not asked{% endif %}")
    empty = dataclasses.replace(GAP, table=lambda evidence: outcomes([]), words=words)
    finding = find(empty, TOY, SEEDS, finished)
    assert (finding.draw, finding.table, finding.shown, finding.note) == (None, None, None, "not asked")
    assert [(claim.measured, claim.verdict) for claim in finding.claims] == [
        ("not measured", "cannot tell at this scale")
    ]


class Nothing(dict[str, Result]):
    """Results of a network that diverged: it has none."""

    def __missing__(self, name: str) -> Result:
        raise DivergedError(f"there is no {name}")


def lost(run: FinishedRun) -> FinishedRun:
    return dataclasses.replace(run, results=Nothing())


def test_what_a_diverged_network_does_not_have(finished: Finished) -> None:
    runs = {identity: lost(run) if run.seed == 1 else run for identity, run in finished.items()}
    asks = dataclasses.replace(
        GAP, table=lambda evidence: [run.results["plane"] for run in evidence.runs if run.seed == 1]
    )
    finding = find(asks, TOY, SEEDS, runs)
    assert finding.draw is None
    (claim,) = finding.claims
    assert claim.measured == "not measured: there is no plane"
    assert find(GAP, TOY, SEEDS, runs).table is not None, "what it does have is looked at"


def test_no_main_tables_of_a_diverged_network(finished: Finished) -> None:
    main = next(exhibit for exhibit in EXHIBITS if exhibit.main)
    run = lost(next(iter(finished.values())))
    assert main_tables(TOY, 1, {wanted.identity: run for wanted in main.runs(TOY, 1)}) is None


# --- words

FORM = "A title\n\nA caption\nof two lines.\n\n{% if found %}\nOne {{ number }}.\n{% endif %}\n\nTwo.\n\n"
CLAIM = "* first, T1: A sentence\n  of two lines.\n  paper: 1 %\n  note: {{ number }} words.\n"


def test_words_are_read() -> None:
    words = prose.read(f"{FORM}{CLAIM}* second, A1, control: Another.\n  paper: 2\n")
    assert (words.title, words.caption) == ("A title", "A caption of two lines.")
    assert prose.fill(words.note, {"number": 3, "found": True}) == "One 3.\n\nTwo."
    first, second = words.claimed({"second": lambda _: [], "first": lambda _: []}, {"number": 4})
    assert (first.exhibit, first.sentence, first.paper, first.note, first.control) == (
        "T1",
        "A sentence of two lines.",
        "1 %",
        "4 words.",
        False,
    )
    assert (second.exhibit, second.sentence, second.note, second.control) == ("A1", "Another.", "", True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A title alone", "need a title, an empty line and a caption"),
        (FORM + "* first: A sentence.\n  paper: 1\n", "a claim must be '\\* name, ID: sentence'"),
        (FORM + "* first, T1: A sentence.\n", "a claim must be '\\* name, ID: sentence'"),
    ],
)
def test_words_in_another_form(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prose.read(text)


def test_an_exhibit_without_words() -> None:
    with pytest.raises(ValueError, match=r"exhibit 'gap' has no words: give it some, or write '# gap: title' in"):
        _ = dataclasses.replace(GAP, words="").claims


def test_a_claim_without_a_comparison() -> None:
    with pytest.raises(ValueError, match=r"needs a comparison for every claim, \['first'\], got \['second'\]"):
        prose.read(FORM + CLAIM).claimed({"second": lambda _: []}, {"number": 1})


def test_a_number_that_is_not_given() -> None:
    with pytest.raises(jinja2.UndefinedError, match="'number' is undefined"):
        prose.read(FORM + CLAIM).claimed({"first": lambda _: []}, {})


def test_every_exhibit_has_words_of_its_own() -> None:
    assert [exhibit.name for exhibit in EXHIBITS] == [*prose.of_exhibits()], "in the report's order"
    for exhibit in EXHIBITS:
        assert [*exhibit.comparisons] == [*exhibit.prose.claims], exhibit.name
