"""Pages a person reads: figures, tables and claims with their verdicts. Prose lives in ``templates``.

This room may import ``results``.
"""

from msam_analysis.report.page import (
    Claim,
    Figure,
    Report,
    Section,
    Table,
    Verdict,
    counted,
    plus_minus,
    write,
    write_markdown,
)

__all__ = [
    "Claim",
    "Figure",
    "Report",
    "Section",
    "Table",
    "Verdict",
    "counted",
    "plus_minus",
    "write",
    "write_markdown",
]
