"""Execute the notebooks from their scripts: ``NN_title.py`` becomes ``NN_title.ipynb``, outputs included.

The scripts (jupytext, percent format) are what is written and reviewed; the notebooks are made from them. A script runs
in a fresh kernel and an empty folder. What is written holds no times, paths or versions, and cell ids are counted, so
that the same code with the same outputs gives the same file.

The cell tagged ``parameters`` says how large a notebook's experiments are. ``--set EPOCHS=3`` puts a cell with another
value behind it, as papermill does; what is made then is no longer the script's notebook, and needs ``--into FOLDER``.

Usage: ``python notebooks/build.py [--check] [--set NAME=VALUE ... --into FOLDER] [SCRIPT ...]`` (every script, when
none is named). With ``--check`` nothing is executed or written: it says which notebooks are out of step with their
scripts, and exits with 1 if any is.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent

_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
# A fixed width for printed tables, pictures into the notebook, one thread.
_ENVIRONMENT = {
    "COLUMNS": "110",
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    "OMP_NUM_THREADS": "1",
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # silences the kernel's debugger, which is not used
    "PYTHONWARNINGS": "ignore:IProgress not found",  # tqdm's, where ipywidgets are not installed
}
_PATIENCE = 10**6  # seconds for a kernel to start or to show something; one that dies is noticed at once


def load(script: Path, values: Mapping[str, Any] | None = None) -> Any:
    """Return a script's cells, with other values for its parameters.

    Parameters
    ----------
    script
        The script, in jupytext's percent format.
    values
        Name to value, a Python literal. A cell that assigns them is put behind the one tagged ``parameters``.

    Returns
    -------
    nbformat.NotebookNode
        The notebook, not executed.

    Raises
    ------
    ValueError
        There are values, and no cell is tagged ``parameters``, or it does not assign one of the names.
    """
    notebook = jupytext.read(script)
    if not values:
        return notebook
    tagged = [n for n, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ())]
    if not tagged:
        raise ValueError(f"{script.name} has no cell tagged 'parameters': expected one that assigns {sorted(values)}")
    statements = ast.parse(notebook.cells[tagged[0]].source).body
    known = {ast.unparse(t) for each in statements if isinstance(each, ast.Assign) for t in each.targets}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"{script.name} has no parameter {unknown[0]!r}: expected some of {sorted(known)}")
    assignments = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    make_cell: Any = nbformat.v4.new_code_cell
    cell = make_cell(assignments, metadata={"tags": ["injected-parameters"]})
    notebook.cells.insert(tagged[0] + 1, cell)
    return notebook


def build(script: Path, target: Path | None = None, values: Mapping[str, Any] | None = None) -> Path:
    """Execute one script in a fresh kernel, in an empty folder, and write the notebook.

    Parameters
    ----------
    script
        The script, in jupytext's percent format.
    target
        The notebook to write; beside the script, when None. Nothing is written when a cell fails.
    values
        Other values for the script's parameters, see :func:`load`; needs a target.

    Returns
    -------
    pathlib.Path
        The notebook.

    Raises
    ------
    nbclient.exceptions.CellExecutionError
        A cell raised; the message shows the cell and its traceback.
    ValueError
        A cell shows what differs from machine to machine or from run to run: a path or an address in memory. Or there
        are values, and no target, or no such parameters.
    """
    if values and target is None:
        raise ValueError(
            f"other values for {sorted(values)} do not make the notebook of {script.name}: say where it goes instead"
        )
    notebook = load(script, values)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(
            notebook,
            timeout=None,
            startup_timeout=_PATIENCE,
            iopub_timeout=_PATIENCE,
            kernel_name="python3",
            extra_arguments=["--log-level=ERROR", "--InlineBackend.figure_formats={'retina'}"],
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": folder}},
        ).execute(env=os.environ | _ENVIRONMENT)
        # Warnings show where they were raised: in the kernel's temporary files or in an installed package.
        _refuse_traces(script, notebook, (tempfile.gettempdir(), str(HERE.parent), str(Path.home()), sys.prefix))
    notebook.metadata = _METADATA
    for number, cell in enumerate(notebook.cells, start=1):
        cell["id"] = f"cell-{number:02d}"
        cell["metadata"] = {"tags": cell["metadata"]["tags"]} if "tags" in cell["metadata"] else {}
    nbformat.validate(notebook)
    target = target or script.with_suffix(".ipynb")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    partial.write_text(jupytext.writes(notebook, fmt="ipynb"), encoding="utf-8")
    partial.replace(target)
    return target


def problems(script: Path, target: Path | None = None) -> Iterator[str]:
    """Yield one sentence for every way in which a notebook is out of step with its script.

    In step means: the same cells in the same order, every code cell executed from the first to the last in one go, and
    no cell in error. Outputs are not compared: their last digits belong to the machine.

    Parameters
    ----------
    script
        The script.
    target
        The notebook; beside the script, when None.
    """
    target = target or script.with_suffix(".ipynb")
    if not target.is_file():
        yield f"{target.name} is missing"
        return
    notebook = jupytext.read(target)
    written = [(cell.cell_type, cell.source) for cell in jupytext.read(script).cells]
    committed = [(cell.cell_type, cell.source) for cell in notebook.cells]
    if len(written) != len(committed):
        yield f"{target.name} has {len(committed)} cells, its script {len(written)}"
    for number, (mine, theirs) in enumerate(zip(written, committed, strict=False), start=1):
        if mine != theirs:
            yield f"cell {number} of {target.name} differs from the script"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for count, cell in enumerate(code, start=1):
        if cell.execution_count != count:
            yield f"code cell {count} of {target.name} was executed as number {cell.execution_count}"
        if any(output.output_type == "error" for output in cell.outputs):
            yield f"code cell {count} of {target.name} ended in an error"


def _refuse_traces(script: Path, notebook: Any, paths: Sequence[str]) -> None:
    """Raise if a cell shows one of the paths or an address in memory."""
    trace = re.compile("|".join([*map(re.escape, paths), r"\bat 0x[0-9a-f]+"]))
    for number, cell in enumerate(notebook.cells, start=1):
        for output in cell.get("outputs", []):
            texts = [output.get("text", ""), *(v for k, v in output.get("data", {}).items() if k.startswith("text/"))]
            found = trace.search("\n".join(texts))
            if found:
                raise ValueError(
                    f"cell {number} of {script.name} shows {found[0]!r}, which differs between machines or runs: "
                    "print something else"
                )


def _assignment(text: str) -> tuple[str, Any]:
    """Return the name and the value in ``NAME=VALUE``."""
    name, equals, value = text.partition("=")
    try:
        return name.strip(), ast.literal_eval(value.strip())
    except (SyntaxError, ValueError) as error:
        wanted = "a Python literal after NAME=" if equals else "NAME=VALUE"
        raise argparse.ArgumentTypeError(f"expected {wanted}, got {text!r}") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Build or check, and return the exit status."""
    parser = argparse.ArgumentParser(description="Execute the notebooks from their scripts.")
    parser.add_argument("scripts", nargs="*", type=Path, metavar="SCRIPT", help="default: every notebooks/NN_*.py")
    parser.add_argument("--check", action="store_true", help="execute nothing; say what is out of step")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        type=_assignment,
        metavar="NAME=VALUE",
        help="another value of a parameter",
    )
    parser.add_argument("--into", type=Path, metavar="FOLDER", help="where notebooks go; default: beside the scripts")
    options = parser.parse_args(arguments)
    if options.set and options.into is None:
        parser.error("--set makes another notebook than the script's: expected --into FOLDER with it")
    scripts: list[Path] = options.scripts or sorted(HERE.glob("[0-9][0-9]_*.py"))
    if options.check:
        found = [problem for script in scripts for problem in problems(script)]
        if found:
            print("\n".join([*found, "run make notebooks"]), file=sys.stderr)
        return 1 if found else 0
    for script in scripts:
        print(f"executing {script.name}", flush=True)
        target = options.into / f"{script.stem}.ipynb" if options.into else None
        build(script, target, values=dict(options.set))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
