"""The program as a real process: help without torch, one sentence and status 2 for what is wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import program
import pytest
import torch
from conftest import Program
from PIL import Image
from report_folders import scenes
from safetensors.torch import save_file

COMMANDS = (
    "merge", "sample", "bench", "suites", "report", "compare", "openmoji", "teach", "blend", "export", "extract",
    "plan", "kernels", "inspect", "version",
)  # fmt: skip


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert word in done.stderr


def flags(files: dict) -> list[str]:
    return [part for key, value in files.items() for part in (f"--{key}", value)]


def test_help_lists_every_command_and_never_loads_torch(danceopd: Program) -> None:
    done = danceopd("--help")
    assert done.returncode == 0
    assert all(name in done.stdout for name in COMMANDS)
    code = (
        "import sys\nsys.argv = ['danceopd', '--help']\nfrom danceopd.cli.app import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print('heavy:', sorted({'torch', 'diffusers', 'numpy', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "heavy: []"


def test_the_package_has_its_application() -> None:
    code = "import danceopd.cli; print(type(danceopd.cli.app.app).__name__); danceopd.cli.ap"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "App\n" and "has no attribute 'ap'" in done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_each_command(danceopd: Program, name: str) -> None:
    assert danceopd(name, "--help").returncode == 0


def test_version(danceopd: Program) -> None:
    import danceopd as package

    assert danceopd("version").stdout.startswith(f"danceopd {package.__version__}\ntorch {torch.__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "0"], ["steps is 0", "greater than 0"]),
        (["--steps", "-1"], ["steps is -1"]),
        (["--seed", "-1"], ["seed is -1"]),
        (["--device", "gpu"], ["device is 'gpu'"]),
        (["--editing", "lost"], ["adapter 'lost' does not exist"]),
        (["none.yaml"], ["recipe none.yaml does not exist"]),
    ],
)
def test_bad_merges(danceopd: Program, files: dict, arguments: list[str], words: list[str]) -> None:
    refused(danceopd("merge", *flags(files), *arguments), *words)


def test_an_unknown_recipe_key_names_the_nearest(danceopd: Program, files: dict) -> None:
    Path("r.yaml").write_text("optimizer:\n  learning_rat: 1\nstep: 3\n")
    refused(danceopd("merge", "r.yaml", *flags(files)), "unknown key", "r.yaml", "did you mean")


def test_an_unknown_flag_or_command_exits_with_2(danceopd: Program) -> None:
    for arguments in (["merge", "--stepz", "3"], ["murge"], ["sample"]):
        done = danceopd(*arguments)
        assert done.returncode == 2 and "Traceback" not in done.stderr


def test_bad_samples(danceopd: Program, files: dict) -> None:
    refused(danceopd("sample", "student", "  "), "the prompt is empty")
    refused(danceopd("sample", "student", "a fox", "-n", "0"), "0 images")
    Path("x.png").write_text("not a picture")
    refused(danceopd("sample", "student", "a fox", "--image", "x.png"), "x.png is not an image")
    Image.new("RGB", (32, 32)).save("x.png")
    refused(danceopd("sample", "student", "a fox", "--image", "x.png"), "32x32 pixels, too small")
    Image.new("RGBA", (64, 64)).save("x.png")
    refused(danceopd("sample", "generation", "a fox", "--image", "x.png"), "has an alpha channel")
    refused(danceopd("sample", "student", "a fox", "--image", "y.png"), "y.png does not exist")


def test_a_stage_that_is_none(danceopd: Program) -> None:
    refused(danceopd("teach", "edit"), "no stage is named 'edit'; did you mean 'editing'")


def test_inspect_a_lora(danceopd: Program, tmp_path: Path) -> None:
    tensors = {
        "transformer.block.to_q.lora_A.weight": torch.ones(4, 8),
        "transformer.block.to_q.lora_B.weight": torch.ones(8, 4),
    }
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    facts = json.loads(danceopd("inspect", ".", "--json").stdout)
    assert (facts["kind"], facts["rank"], facts["modules"], facts["parameters"]) == ("LoRA", 4, 1, 64)
    assert len(facts["sha256"]) == 64
    shown = danceopd("inspect", ".", "--names").stdout
    assert "block.to_q" in shown and facts["sha256"] in shown
    content = (tmp_path / "pytorch_lora_weights.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[:-8])
    refused(danceopd("inspect", "cut.safetensors"), "cut.safetensors is cut off")
    refused(danceopd("inspect", "lost"), "lost does not exist")


def test_inspect_a_pipeline(danceopd: Program, tmp_path: Path) -> None:
    index = {"_class_name": "Flux2KleinPipeline", "vae": ["diffusers", "AutoencoderKLFlux2"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "vae").mkdir()
    save_file({"a": torch.ones(3, 2)}, tmp_path / "vae/model.safetensors")
    facts = json.loads(danceopd("inspect", ".", "--json").stdout)
    assert facts["class"] == "Flux2KleinPipeline" and facts["weights"][0]["parameters"] == 6
    assert "vae/model.safetensors" in danceopd("inspect", ".").stdout
    (tmp_path / "vae/model.safetensors").write_bytes(b"x" * 20)
    refused(danceopd("inspect", "."), "vae/model.safetensors is damaged")


MAIN = "from danceopd.cli.app import main\nmain()\n"


def test_ctrl_c_says_how_to_continue(files: dict) -> None:
    code = program.with_merge("import time; print('running', flush=True); time.sleep(30)") + MAIN
    command = [sys.executable, "-c", code, "merge", *flags(files)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job, as CI may be, starts with SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None and process.stdout.readline() == "running\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 130
    assert errors == "\nstopped; run the same command again to continue\n"


def test_flags_reach_the_recipe(files: dict) -> None:
    body = "print(recipe.steps, recipe.seed, recipe.output, recipe.time_limit, recipe.device)"
    code = program.with_merge(body) + MAIN
    extra = ["--steps", "7", "--seed", "3", "-o", "there", "--time-limit", "2", "--device", "cpu"]
    command = [sys.executable, "-c", code, "merge", *flags(files), *extra]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert done.stdout.splitlines()[0] == "7 3 there 2.0 cpu"


def test_what_the_terminal_cannot_show_is_no_fault(danceopd: Program, tmp_path: Path) -> None:
    done = danceopd("report", scenes(tmp_path / "bench", each=1), PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and "? 95%" in done.stdout, done.stderr


def test_a_narrow_terminal_cuts_nothing(danceopd: Program) -> None:
    facts = json.loads(danceopd("inspect", "generation", "--json").stdout)
    assert facts["sha256"] in danceopd("inspect", "generation", COLUMNS="40").stdout
    shown = danceopd("plan", "--tflops", "1", COLUMNS="40").stdout
    assert "at times: activations of the proof" in shown and "…" not in shown


def test_inspect_leaves_out_what_training_left_and_knows_rank_0(danceopd: Program, tmp_path: Path) -> None:
    for folder in ("vae", ".training"):
        (tmp_path / folder).mkdir()
        save_file({"a": torch.ones(3, 2)}, tmp_path / folder / "model.safetensors")
    index = {"_class_name": "Flux2KleinPipeline", "vae": ["diffusers", "AutoencoderKLFlux2"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    facts = json.loads(danceopd("inspect", ".", "--json").stdout)
    assert [weight["file"] for weight in facts["weights"]] == ["vae/model.safetensors"]
    none = {"transformer.b.to_q.lora_A.weight": torch.ones(0, 8), "transformer.b.to_q.lora_B.weight": torch.ones(8, 0)}
    save_file(none, tmp_path / "none.safetensors")
    facts = json.loads(danceopd("inspect", "none.safetensors", "--json").stdout)
    assert facts["uses"] == [] and "A (0, 8)" in facts["refused"]


def test_an_empty_recipe_is_no_wish(danceopd: Program, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("# nothing yet\n")
    refused(danceopd("merge", "r.yaml"), "recipe r.yaml is empty")
