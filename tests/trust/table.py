"""The table of docs/trust.md, from the outcomes of the cases.

``python -m tests.trust.table`` runs every case and writes the table. With a word behind it, it runs the cases
whose kind or name contains the word and prints how they end.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch

from .cases import KINDS, OUTCOMES, Case, Verdict, run
from .kinds import CASES

DOCUMENT = Path(__file__).parents[2] / "docs" / "trust.md"
COMMAND = "python -m tests.trust.table"
BEGIN, END = "<!-- generated from tests/trust -->", "<!-- end of what is generated -->"
WORDS = {"short": "falls short"} | {outcome: outcome for outcome in OUTCOMES}


def line(case: Case, outcome: str) -> str:
    """Return a case's line."""
    return f"| {case.situation} | {WORDS[outcome]} |"


def generate(outcomes: dict[str, str]) -> str:
    """Return the table of kinds and, for each kind, the table of its members."""
    failing = "short" in outcomes.values()
    head = ["kind", "members", *OUTCOMES, *(["falls short"] if failing else []), "what is done"]
    rows = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    details: list[str] = []
    for kind, (title, done) in KINDS.items():
        members = [case for case in CASES if case.kind == kind]
        ends = [outcomes[case.name] for case in members]
        counts = [str(ends.count(outcome)) for outcome in [*OUTCOMES, *(["short"] if failing else [])]]
        rows.append("| " + " | ".join([title, str(len(members)), *counts, done]) + " |")
        details += ["", f"## {title}", "", "| situation | outcome |", "| --- | --- |"]
        details += [line(case, outcomes[case.name]) for case in members]
    return "\n".join([BEGIN, "", *rows, *details, "", END])


def written(document: str) -> dict[str, str]:
    """Return the outcomes that a document lists, by the name of the case."""
    listed = dict(re.findall(r"^\| (.*) \| ([a-z ]+) \|$", document, flags=re.MULTILINE))
    back = {word: outcome for outcome, word in WORDS.items()}
    return {case.name: back[listed[case.situation]] for case in CASES if case.situation in listed}


def insert(document: str, table: str) -> str:
    """Return the document with another table."""
    head, _, rest = document.partition(BEGIN)
    return head + table + rest.partition(END)[2]


def main(word: str = "") -> int:
    """Run the cases; write the table if all were run."""
    torch.set_num_threads(1)  # as in the tests
    document = DOCUMENT.read_text(encoding="utf-8")
    outcomes = written(document)
    short = 0
    for case in CASES:
        if word not in case.name and word not in case.kind:
            continue
        verdict: Verdict = run(case)
        fine = verdict.outcome in case.accepted
        short += not fine and verdict.outcome != "not tried"
        if not fine or word:
            mark = "holds" if fine else "SHORT"
            print(f"{mark} [{case.kind}] {case.name}: {verdict.outcome}: {verdict.text[:300]}", flush=True)  # noqa: T201
        if verdict.outcome != "not tried":
            outcomes[case.name] = verdict.outcome if fine else "short"
    if not word:
        DOCUMENT.write_text(insert(document, generate(outcomes)), encoding="utf-8")
    print(f"{short} of {len(CASES)} fall short")  # noqa: T201
    return int(short > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
