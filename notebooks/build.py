"""Execute the notebooks from their scripts: ``NN_title.py`` becomes ``NN_title.ipynb``, outputs included.

The scripts (jupytext, percent format) are what is written and reviewed; the notebooks are made from them. Cell ids are
counted and no times are recorded, so that the same code with the same outputs gives the same file.

Usage: ``python notebooks/build.py [SCRIPT ...]`` (every script, when none is named).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import jupytext
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent


def build(script: Path, target: Path | None = None, timeout: float = 600) -> Path:
    """Execute one script in a fresh kernel, in the script's folder, and write the notebook.

    Parameters
    ----------
    script
        The script, in jupytext's percent format.
    target
        The notebook to write; beside the script, when None. Nothing is written when a cell fails.
    timeout
        The longest a cell may take, in seconds.

    Returns
    -------
    pathlib.Path
        The notebook.

    Raises
    ------
    nbclient.exceptions.CellExecutionError
        A cell raised; the message shows the cell and its traceback.
    """
    notebook = jupytext.read(script)
    for number, cell in enumerate(notebook.cells, start=1):
        cell["id"] = f"cell-{number:02d}"
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # silences the kernel's debugger, which is not used
    NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        extra_arguments=["--log-level=ERROR"],
        record_timing=False,
        resources={"metadata": {"path": str(script.parent)}},
    ).execute()
    target = target or script.with_suffix(".ipynb")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(jupytext.writes(notebook, fmt="ipynb"), encoding="utf-8")
    return target


if __name__ == "__main__":
    for path in [Path(name) for name in sys.argv[1:]] or sorted(HERE.glob("[0-9]*.py")):
        print(f"executing {path.name}", flush=True)
        build(path)
