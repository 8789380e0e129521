"""The committed notebook runs and prints what it shows."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).parents[1] / "examples/models.ipynb"


def test_the_notebook_prints_what_it_shows(monkeypatch):
    monkeypatch.delenv("HOVIT_WEIGHTS", raising=False)
    monkeypatch.setenv("HOVIT_WEIGHTS", "")  # restored after the notebook has set it
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) >= 5
    names: dict[str, Any] = {}
    for number, cell in enumerate(cells, start=1):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("".join(cell["source"]), f"{NOTEBOOK.name}, cell {number}", "exec"), names)
        shown = "".join(line for output in cell["outputs"] for line in output["text"])
        assert printed.getvalue() == shown
        assert cell["execution_count"] == number
