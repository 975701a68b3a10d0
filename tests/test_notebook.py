"""In a notebook: bars, the table of epochs, and with Progress(graph=True) a picture of the losses; executed without a
head.
"""

import base64
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
CELL = """\
import torch
from torch import nn
from learnkit import *
from learnkit.callbacks import Progress
torch.manual_seed(0)
torch.set_num_threads(1)
x = torch.randn(400, 4)
y = (x[:, 0] > 0).long()
data = DataBunch.from_tensors((x, y), (x[:50], y[:50]), bs=20)
learn = Learner(data, nn.Linear(4, 2), metrics=accuracy, callbacks=Progress(graph=True))
learn.fit_one_cycle(4, 1e-1)
"""


EXECUTE = """\
import sys
import nbclient
import nbformat
book = nbformat.read(sys.argv[1], 4)
nbclient.NotebookClient(book, timeout=120, kernel_name="python3").execute()
nbformat.write(book, sys.argv[1])
"""


def outputs_of(cell: str) -> list[Any]:
    """What the cell's outputs are when a kernel has run it; in processes of their own, as this one is to be no
    notebook.
    """
    for name in ("nbclient", "nbformat", "ipykernel"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    code = {"cell_type": "code", "source": cell, "metadata": {}, "outputs": [], "execution_count": None, "id": "a"}
    Path("book.ipynb").write_text(json.dumps({"cells": [code], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"PYTHONPATH": path, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    done = subprocess.run([sys.executable, "-c", EXECUTE, "book.ipynb"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(Path("book.ipynb").read_text())["cells"][0]["outputs"]


def test_a_fit_shows_its_table_and_a_picture_of_its_losses():
    shown = [output["data"] for output in outputs_of(CELL) if "data" in output]
    tables = ["".join(data["text/html"]) for data in shown if "<table" in "".join(data.get("text/html", ""))]
    assert tables and all(name in tables[-1] for name in ("train_loss", "valid_loss", "accuracy", "time"))
    pictures = [base64.b64decode(data["image/png"]) for data in shown if "image/png" in data]
    assert pictures and pictures[0].startswith(b"\x89PNG")
    if keep := os.environ.get("KEEP_PICTURE"):
        Path(keep).write_bytes(pictures[-1])
