"""The command line's entry, and how it ends."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import typer

from msam_analysis.cli.factories import brief
from msam_analysis.cli.landscape import landscape_command
from msam_analysis.cli.measure import measure_command
from msam_analysis.cli.processes import rank
from msam_analysis.cli.saying import lost, prepared, say
from msam_analysis.cli.study import study_command
from msam_analysis.objective.explaining import told, where
from msam_analysis.objective.ranks import known_to_all

if TYPE_CHECKING:
    from typing_extensions import Never

_UNSAID, _MISTAKE, _INTERRUPTED = 1, 2, 130
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
    """Run the command and exit with its code.

    0: all is done. 1: something is missing in what was done, as a sentence says. 2: a mistake, in a sentence. 130: an
    interrupt. A reader who leaves standard output is no mistake: what was measured is in its files.
    """
    if len(sys.argv) < 2:
        sys.argv.append("--help")
    with prepared():
        _main()


def _main() -> None:
    code: Any = 0
    try:
        code = app(standalone_mode=False)  # typer turns the interrupt key into a code, or into Abort
    except _UsageError as error:
        _refuse(error.format_message())
    except RuntimeError as error:  # it may concern one process alone
        _refuse(_sentence(error), anybody=not known_to_all(error))
    except (ValueError, TypeError, ImportError, OSError) as error:
        _refuse(_sentence(error))
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    except BaseException as error:
        if not where(error) and not isinstance(error, MemoryError):
            raise  # a fault of ours, which its traceback explains
        _refuse(told(error))
    if code == _INTERRUPTED and rank() == 0:
        say("msam-analysis: interrupted; what is finished is kept, and the same command goes on from there", err=True)
    unsaid = lost()
    if unsaid is not None and rank() == 0:
        say(
            f"msam-analysis: all results are in their files; standard output did not take the rest ({unsaid})", err=True
        )
        code = code or (0 if isinstance(unsaid, BrokenPipeError) else _UNSAID)
    if isinstance(code, int) and code:
        raise SystemExit(code)


def _sentence(error: Exception) -> str:
    """Return what an error says, and the line of a user's code that it comes from."""
    text = str(error) or brief(error)
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    line = where(error)
    return f"{text} ({line})" if line and line not in text else text


def _refuse(sentence: str, *, anybody: bool = False) -> Never:
    """End with a sentence: from the first process, as it holds for all, or from ``anybody``."""
    line = " ".join(sentence.split())
    who = f"process {rank()}: " if rank() else ""
    if anybody or not who:
        say(f"msam-analysis: {who}{line[:900]}{' ...' if len(line) > 900 else ''}", err=True)
    lost()
    raise SystemExit(_MISTAKE) from None
