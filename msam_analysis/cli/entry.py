"""The command line's entry, and how it ends."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import typer

from msam_analysis.cli.factories import brief
from msam_analysis.cli.landscape import landscape_command
from msam_analysis.cli.measure import measure_command
from msam_analysis.cli.processes import rank
from msam_analysis.cli.study import study_command
from msam_analysis.objective.ranks import known_to_all

if TYPE_CHECKING:
    from typing_extensions import Never

_INTERRUPTED = 130
# The class of click, or of the copy of click inside newer versions of typer, which has no public name.
_UsageError: Any = typer.BadParameter.__base__

app = typer.Typer(
    help="How flat is this minimum, and why did the optimizer go there?",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command("study")(study_command)
app.command("measure")(measure_command)
app.command("landscape")(landscape_command)


def main() -> None:
    """Run the command; a user's mistake ends with one sentence and exit code 2, an interrupt with exit code 130."""
    if len(sys.argv) < 2:
        sys.argv.append("--help")
    code: Any = 0
    try:
        code = app(standalone_mode=False)  # typer turns the interrupt key into a code, or into Abort
    except _UsageError as error:
        _refuse(error.format_message())
    except RuntimeError as error:  # it may concern one process alone
        _refuse(str(error) or brief(error), told=not known_to_all(error))
    except (ValueError, TypeError, ImportError, OSError) as error:
        _refuse(str(error) or brief(error))
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    if code == _INTERRUPTED and rank() == 0:
        typer.echo(
            "msam-analysis: interrupted; what is finished is kept, and the same command goes on from there", err=True
        )
    if isinstance(code, int) and code:
        raise SystemExit(code)


def _refuse(sentence: str, *, told: bool = False) -> Never:
    """End with a sentence: from the first process, as it holds for all, or with ``told`` from any process."""
    line = " ".join(sentence.split())
    who = f"process {rank()}: " if rank() else ""
    if told or not who:
        typer.echo(f"msam-analysis: {who}{line[:900]}{' ...' if len(line) > 900 else ''}", err=True)
    raise SystemExit(2) from None
