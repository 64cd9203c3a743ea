"""The notebook in examples/ runs from a folder of its own, and ships without outputs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

NOTEBOOK = Path(__file__).parent.parent / "examples" / "first_merge.ipynb"
SHOWN = """
html = result._repr_html_()
assert html.startswith("<p><b>Cannot tell") and "data:image/png" in html and "Cannot tell" in repr(result)
assert result.grid.mode == student.grid.mode == "RGB" and result.grid.size == student.grid.size
assert student.report == result.report and result.report.is_file() and (student.folder / "bench/contact.png").is_file()
assert student.scores["verdict"] == result.scores["verdict"]
assert blended.scores is blended.report is blended.grid is None
assert "bench/contact.png" in (student.folder / "README.md").read_text() and "steps: 4" in result.scores["recipe_yaml"]
assert result.scores["samples"][-1]["step"] == 4 and "Samples over training" in result.report.read_text()
(work / "recipe.yaml").write_text(recipe.to_yaml())
assert danceopd.merge(work / "recipe.yaml").seconds == 0  # finished before
for call, words in (
    (lambda: danceopd.merge(3), "merge got a int; give a Recipe"),
    (lambda: danceopd.blend("generation"), "give a list of LoRAs"),
    (lambda: danceopd.blend(["generation", "editing"], desity=1), "blend has no option 'desity'"),
    (lambda: danceopd.blend(["generation", "editing"], output=work / "blend"), "is not overwritten"),
    (lambda: danceopd.bench(student.folder, "sceens"), "did you mean 'scenes'"),
):
    try:
        call()
    except danceopd.UserError as error:
        assert words in str(error), error
    else:
        raise AssertionError(words)
import danceopd.bench.run
assert callable(danceopd.bench) and callable(danceopd.merge) and danceopd.bench.__doc__.startswith("Score a student")
assert str(work) not in result.report.read_text().replace(f"<code>{work}", "")
"""


def test_the_notebook_runs(tmp_path: Path) -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells if "outputs" in cell)
    environment = os.environ | {"TMPDIR": str(tmp_path), "DANCEOPD_CACHE": str(tmp_path / "cache")}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", "\n".join([*code, SHOWN])],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "did you mean 'teachers'" in ran.stdout and "student" in ran.stdout
    assert list(tmp_path.glob("*/blend/pytorch_lora_weights.safetensors"))
