"""A notebook that trains: what is in the outputs of its cells."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ipykernel")
pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

# In a process of its own: the client leaves sockets open.
EXECUTE = """
import nbclient
import nbformat

notebook = nbformat.read("notebook.ipynb", 4)
nbclient.NotebookClient(
    notebook, timeout=600, kernel_name="python3", allow_errors=True
).execute()
nbformat.write(notebook, "notebook.ipynb")
"""
ROOT = Path(__file__).resolve().parents[2]
SETUP = f"""
import sys
from pathlib import Path

sys.path.insert(0, {str(ROOT)!r})
from keras_bwetaf.training import (
    Monitor, TrainingCheckpoint, monitor, plot_losses, recipe,
)
from tests.training.resumable import make_lm, read_rows, write_rows

monitor.REFRESH_SECONDS = 0.0
rows = write_rows(Path("rows.npy"))
lm = make_lm()


def train(epochs=2):
    lm.fit(
        read_rows(rows, seed=3),
        steps_per_epoch=6,
        epochs=epochs,
        validation_data=read_rows(rows, shuffle=False),
        validation_steps=2,
        verbose=0,
        callbacks=[
            Monitor("run", total_steps=18),
            TrainingCheckpoint("checkpoints", save_every=6),
        ],
    )
"""
CELLS = {
    "setup": SETUP,
    "train": "train()",
    "again": "train()",
    "more": "train(epochs=3)",
    "other": """
lm.compile(recipe("97m", total_steps=40, peak_learning_rate=3e-3))
train(epochs=4)
""",
    "plot": 'plot_losses("run")',
}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """A dict of a cell's name to its outputs."""
    folder = tmp_path_factory.mktemp("notebook")
    cells = [nbformat.v4.new_code_cell(source) for source in CELLS.values()]
    path = folder / "notebook.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    subprocess.run([sys.executable, "-c", EXECUTE], cwd=folder, check=True)
    notebook = nbformat.read(path, 4)
    received = [cell["outputs"] for cell in notebook["cells"]]
    return dict(zip(CELLS, received, strict=True))


def shown(outputs, kind):
    return [
        output["data"][kind]
        for output in outputs
        if kind in output.get("data", {})
    ]


def errors(outputs):
    return [each for each in outputs if each["output_type"] == "error"]


@pytest.mark.slow
def test_a_table_and_a_picture(outputs):
    """One of each, although both were renewed many times."""
    for cell, step in (("train", 12), ("more", 18)):
        assert not errors(outputs[cell]), outputs[cell]
        (table,) = shown(outputs[cell], "text/html")
        for field in (f"{step}/18", "validation loss", "learning rate"):
            assert field in table
        (picture,) = shown(outputs[cell], "image/png")
        assert picture.startswith("iVBORw0KGgo")  # PNG, in base 64.


@pytest.mark.slow
def test_the_plot(outputs):
    (picture,) = shown(outputs["plot"], "image/png")
    assert picture.startswith("iVBORw0KGgo")
    (text,) = shown(outputs["plot"], "text/plain")
    assert "losses.png" in text


@pytest.mark.slow
def test_a_cell_that_is_run_again(outputs):
    text = "".join(output.get("text", "") for output in outputs["again"])
    assert "nothing is left to train after step 12" in text
    assert "pass a larger `epochs`" in text
    assert not shown(outputs["again"], "text/html")


@pytest.mark.slow
def test_another_learning_rate(outputs):
    (error,) = errors(outputs["other"])
    assert error["ename"] == "ValueError"
    assert "saved 0.0015, optimizer has 0.003" in error["evalue"]
