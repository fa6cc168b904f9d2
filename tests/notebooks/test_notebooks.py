from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import jupytext
import pytest

from tests.programs import script_ended

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
SCRIPTS = sorted(FOLDER.glob("[0-9][0-9]_*.py"))
# The experiments of a notebook at a size at which its assertions still hold.
TINY: dict[str, dict[str, object]] = {
    "01_sharpness_of_a_checkpoint": {"EPOCHS": 16, "ITERATIONS": 8, "POINTS": 5},
    "02_loss_landscapes": {"EPOCHS": 14, "POINTS": 13, "REFINE": 0.05, "WIDE": 7},
    "03_momentum_and_gradient": {"EPOCHS": 8, "SEEDS": 1},
    "04_from_msam_to_nag": {"EPOCHS": 10, "STRENGTHS": 2},
    "05_sam_and_msam_gradients": {"EPOCHS": 4, "SEEDS": 1},
    "06_hessian_along_training": {"EPOCHS": 6, "SAMPLES": 100, "PERIOD": 32},
    "07_training_and_test_set": {"EPOCHS": 10, "SEEDS": 1},
}
# Two cells of text, two of code; the code shows a text, a number and two pictures.
SMALL = """# %% [markdown]
# # Small
# %%
from matplotlib import pyplot as plt
print("text")
figure = plt.figure(figsize=(1, 1)).add_subplot()
# %% [markdown]
# And then:
# %%
figure = plt.figure(figsize=(1, 1)).add_subplot()
6 * 7
"""


@pytest.fixture(scope="module")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build", FOLDER / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def small(build: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    script = tmp_path_factory.mktemp("notebook") / "01_small.py"
    script.write_text(SMALL, encoding="utf-8")
    build.build(script)
    return script


def test_there_are_notebooks() -> None:
    assert SCRIPTS


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_notebook_is_in_step_with_its_script(build: ModuleType, script: Path) -> None:
    assert list(build.problems(script)) == []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_plot_of_a_notebook_is_shown(script: Path) -> None:
    plots = {
        number: any("image/png" in output.get("data", {}) for output in cell.outputs)
        for number, cell in enumerate(jupytext.read(script.with_suffix(".ipynb")).cells, start=1)
        if cell.cell_type == "code" and re.search(r"\b(plots|pictures)\.(?!save|style)", cell.source)
    }
    assert plots
    assert all(plots.values()), plots


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_script_runs_and_its_assertions_hold(build: ModuleType, script: Path, tmp_path: Path) -> None:
    tiny = tmp_path / "tiny.py"
    tiny.write_text(jupytext.writes(build.load(script, TINY[script.stem]), fmt="py:percent"), encoding="utf-8")
    program = script_ended(tiny, folder=tmp_path, environment={"MPLBACKEND": "Agg"})
    assert program.code == 0, program.err


def test_the_same_script_gives_the_same_file(build: ModuleType, small: Path, tmp_path: Path) -> None:
    again = build.build(small, tmp_path / "again.ipynb")
    assert again.read_bytes() == small.with_suffix(".ipynb").read_bytes()


def test_built_notebook_is_in_step_and_shows_everything(build: ModuleType, small: Path) -> None:
    assert list(build.problems(small)) == []
    assert build.main(["--check", str(small)]) == 0
    notebook = jupytext.read(small.with_suffix(".ipynb"))
    assert [cell.id for cell in notebook.cells] == ["cell-01", "cell-02", "cell-03", "cell-04"]
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec.name == "python3"
    shown = [
        {kind for output in cell.get("outputs", []) for kind in output.get("data", ["printed"])}
        for cell in notebook.cells
    ]
    assert shown == [set(), {"printed", "text/plain", "image/png"}, set(), {"text/plain", "image/png"}]


PARAMETRISED = """# %% tags=["parameters"]
EPOCHS = 40
SEEDS = 3
RHO = 0.5
# %%
print(EPOCHS, RHO)
"""


@pytest.fixture
def parametrised(tmp_path: Path) -> Path:
    script = tmp_path / "01_parametrised.py"
    script.write_text(PARAMETRISED, encoding="utf-8")
    return script


def printed(notebook: Path) -> list[str]:
    return [output.text for cell in jupytext.read(notebook).cells for output in cell.get("outputs", [])]


def test_parameters_are_set_and_their_cell_keeps_its_tag(build: ModuleType, parametrised: Path, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    assert build.main(["--set", "EPOCHS=2", "--set", "RHO = 'large'", "--into", str(folder), str(parametrised)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [parametrised.name, "elsewhere"]
    made = folder / "01_parametrised.ipynb"
    assert printed(made) == ["2 large\n"]
    tags = [cell.metadata.get("tags", []) for cell in jupytext.read(made).cells]
    assert tags == [["parameters"], ["injected-parameters"], []]
    assert list(build.problems(parametrised, made)) != []


def test_a_parameter_that_is_not_there_is_refused(build: ModuleType, parametrised: Path, small: Path) -> None:
    with pytest.raises(ValueError, match=r"no parameter 'EPOCH': expected some of \['EPOCHS', 'RHO', 'SEEDS'\]"):
        build.load(parametrised, {"EPOCH": 2})
    with pytest.raises(ValueError, match=r"01_small\.py has no cell tagged 'parameters': expected .*\['EPOCHS'\]"):
        build.load(small, {"EPOCHS": 2})


def test_other_parameters_do_not_make_the_notebook(build: ModuleType, parametrised: Path) -> None:
    with pytest.raises(ValueError, match=r"other values for \['RHO'\] do not make the notebook"):
        build.build(parametrised, values={"RHO": 1})
    assert not parametrised.with_suffix(".ipynb").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--set", "RHO=1"], "expected --into FOLDER"),
        (["--set", "RHO", "--into", "x"], "expected NAME=VALUE, got 'RHO'"),
        (["--set", "RHO=large", "--into", "x"], "expected a Python literal after NAME=, got 'RHO=large'"),
    ],
    ids=["no folder", "no value", "no literal"],
)
def test_arguments_are_checked(
    build: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    with pytest.raises(SystemExit):
        build.main(arguments)
    assert sentence in capsys.readouterr().err


def test_every_notebook_has_a_tiny_size(build: ModuleType) -> None:
    assert set(TINY) == {script.stem for script in SCRIPTS}
    for script in SCRIPTS:
        build.load(script, TINY[script.stem])


# What a hand does to a notebook, and what the check says of it.
TAMPERINGS = {
    "other code": ('"6 * 7"', '"6 * 8"', "cell 4 of 01_small.ipynb differs from the script"),
    "other text": ("And then:", "And now:", "cell 3 of 01_small.ipynb differs from the script"),
    "executed out of order": ('"execution_count": 1', '"execution_count": 7', "was executed as number 7"),
    "not executed": ('"execution_count": 2', '"execution_count": null', "was executed as number None"),
}


@pytest.mark.parametrize(("old", "new", "sentence"), TAMPERINGS.values(), ids=TAMPERINGS.keys())
def test_check_finds(
    build: ModuleType,
    small: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    old: str,
    new: str,
    sentence: str,
) -> None:
    text = small.with_suffix(".ipynb").read_text(encoding="utf-8")
    assert old in text
    script = tmp_path / small.name
    script.write_text(SMALL, encoding="utf-8")
    script.with_suffix(".ipynb").write_text(text.replace(old, new), encoding="utf-8")
    assert build.main(["--check", str(script)]) == 1
    assert sentence in capsys.readouterr().err


def test_check_finds_an_error(build: ModuleType, small: Path, tmp_path: Path) -> None:
    content = json.loads(small.with_suffix(".ipynb").read_text(encoding="utf-8"))
    content["cells"][3]["outputs"] = [{"output_type": "error", "ename": "E", "evalue": "", "traceback": []}]
    target = tmp_path / "01_small.ipynb"
    target.write_text(json.dumps(content), encoding="utf-8")
    assert list(build.problems(small, target)) == ["code cell 2 of 01_small.ipynb ended in an error"]


def test_check_finds_a_missing_cell_and_a_missing_notebook(build: ModuleType, small: Path, tmp_path: Path) -> None:
    script = tmp_path / small.name
    script.write_text(SMALL + "# %%\n1\n", encoding="utf-8")
    assert list(build.problems(script)) == ["01_small.ipynb is missing"]
    assert list(build.problems(script, small.with_suffix(".ipynb"))) == ["01_small.ipynb has 4 cells, its script 5"]


def test_a_cell_that_raises_leaves_nothing(build: ModuleType, tmp_path: Path) -> None:
    script = tmp_path / "01_raises.py"
    script.write_text("# %%\nassert False\n", encoding="utf-8")
    with pytest.raises(Exception, match="AssertionError"):
        build.build(script)
    assert list(tmp_path.iterdir()) == [script]


@pytest.mark.parametrize(
    "code",
    ["import os\nprint(os.getcwd())", "object()", "import warnings\nwarnings.warn('slow')"],
    ids=["path", "address", "warning"],
)
def test_a_cell_that_shows_the_machine_is_refused(build: ModuleType, tmp_path: Path, code: str) -> None:
    script = tmp_path / "01_shows.py"
    script.write_text(f"# %%\n{code}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"cell 1 of 01_shows\.py shows"):
        build.build(script)
    assert list(tmp_path.iterdir()) == [script]
