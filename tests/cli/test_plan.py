"""`danceopd plan`: its figures against the real model, its refusals, and that it loads no weight."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import CALL, random_adapter, random_image, tiny_klein
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from danceopd.adapters.write import write_adapter
from danceopd.cli.app import app
from danceopd.data.dataset import ConditionDataset
from danceopd.engine.teachers import RoutedTeacher
from danceopd.engine.trainer import STUDENT, Trainer
from danceopd.errors import UserError
from danceopd.models.backbone import Backbone
from danceopd.models.flops import TokenCounts, activation_bytes, forward_flops
from danceopd.pipelines import EditingPipeline, family_of
from danceopd.plan import plan
from danceopd.recipe.recipe import Recipe

TOKENS = TokenCounts(image=16, source=16, text=24)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    pipe = tiny_klein(folder / "base")
    (folder / "base" / "danceopd.json").write_text(
        json.dumps({"height": 64, "width": 64, "num_inference_steps": 6, "max_sequence_length": 32})
    )
    for seed, name in enumerate(("draws", "edits")):
        write_adapter(random_adapter(pipe.transformer, rank=3 + seed, seed=seed), folder / name)
    random_image(0).save(folder / "0.png")
    random_image(1, 128, 64).save(folder / "1.png")
    with open(folder / "e.csv", "w", newline="") as file:
        csv.writer(file).writerows([("prompt", "image"), ("make it red", "0.png"), ("make it blue", "1.png")])
    return folder


def recipe(models: Path, tmp_path: Path, **over: Any) -> Recipe:
    fields = {"generation": str(models / "draws"), "editing": str(models / "edits"), "steps": 20, "batch": 4}
    rest = {"data": {"editing": str(models / "e.csv"), "rows": 8}, "student": {"rank": 8}, "device": "cpu"}
    return Recipe(base=str(models / "base"), output=tmp_path / "run", **{**fields, **rest, **over})


def edit() -> tuple[Any, Any]:
    pipe = tiny_klein()
    return pipe, EditingPipeline(pipe, family_of(pipe), CALL).conditions(["make it red"], [random_image(0)])


def test_flops_are_those_that_torch_counts() -> None:
    pipe, condition = edit()
    x = torch.randn(1, *condition.shape)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        family_of(pipe).velocity(pipe.transformer, x, torch.ones(1), condition)
    assert forward_flops(pipe.transformer, TOKENS) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_activations_are_those_that_autograd_keeps() -> None:
    pipe, condition = edit()
    said = activation_bytes(pipe.transformer, TOKENS, 4)
    whole = activation_bytes(pipe.transformer, TOKENS, 4, checkpointed=True)
    backbone = Backbone(pipe.transformer, family_of(pipe))
    backbone.new_student("student", 4)
    weights = {p.untyped_storage().data_ptr() for p in pipe.transformer.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda v: v), backbone.acting_as("student"):
        backbone.velocity(torch.randn(1, *condition.shape), torch.ones(1), condition)
    assert said == pytest.approx(sum(s.nbytes() for s in kept.values()), rel=0.15)
    assert whole < 0.6 * said


def test_student_and_teachers_weigh_what_they_weigh(models: Path, tmp_path: Path) -> None:
    facts = plan(recipe(models, tmp_path), tflops=1.0)
    parts = {m["part"]: m["bytes"] for m in facts["memory"]}
    pipe, condition = edit()
    backbone = Backbone(pipe.transformer, family_of(pipe))
    assert parts["backbone"] == sum(p.nbytes for p in pipe.transformer.parameters())
    for name in ("draws", "edits"):
        adapter = random_adapter(pipe.transformer, rank=3 if name == "draws" else 4)
        teacher = "generation" if name == "draws" else "editing"
        assert parts[f"teacher {teacher}"] == sum(t.nbytes for pair in adapter.tensors.values() for t in pair)
    weights = backbone.new_student(STUDENT, 8)
    dataset = ConditionDataset([(condition, torch.tensor([1.0, 0.5, 0.0]))])
    field = lambda x, s, c: torch.ones_like(x)  # noqa: E731
    made = recipe(models, tmp_path, rollout={"steps": 2}, batch=2)
    teachers = [RoutedTeacher(t.name, field, dataset, None, {}) for t in made.teachers]
    trainer = Trainer(made, backbone, teachers, torch.device("cpu"))
    trainer.train_step()
    moments = [v for state in trainer.optimizer.adamw.state.values() for k, v in state.items() if k != "step"]
    merged = [pipe.transformer.get_submodule(path).weight for path in backbone.modules(STUDENT)]
    assert parts["student"] == sum(w.nbytes for w in weights)
    assert parts["student, EMA"] == sum(w.nbytes for w in trainer.optimizer.ema)
    assert parts["student, Adam"] == sum(v.nbytes for v in moments) > 0
    assert parts["merged weights"] == sum(w.nbytes for w in merged) > 0
    text = sum(t.numel() for t in load_file(next((models / "base/text_encoder").glob("*.safetensors"))).values())
    assert parts["text_encoder, which then leaves"] == 4 * text


def test_the_pool_of_cuda_graphs(models: Path, tmp_path: Path) -> None:
    def pool(made: Recipe, gpu: str | None) -> int:
        facts = plan(made, tflops=1.0, gpu=gpu)
        return sum(m["bytes"] for m in facts["memory"] if "CUDA graphs" in m["part"])

    made = recipe(models, tmp_path, rollout={"steps": 4, "cuda_graphs": True})
    assert pool(made, None) == 0 < pool(made, "24GB")  # on a CPU there are none
    assert pool(recipe(models, tmp_path), "24GB") == 0


def test_a_speed_that_is_none(models: Path, tmp_path: Path) -> None:
    for speed in (0.0, float("inf"), float("nan")):
        with pytest.raises(UserError, match="give a number above 0"):
            plan(recipe(models, tmp_path), tflops=speed)


def test_pictures_queries_and_shares(models: Path, tmp_path: Path) -> None:
    facts = plan(recipe(models, tmp_path, rollout={"steps": 6}, call={"height": 128, "width": 128}), tflops=2.0)
    sizes = {(p["capability"], tuple(p["size"])): p for p in facts["pictures"]}
    assert set(sizes) == {("generation", (128, 128)), ("editing", (64, 64)), ("editing", (64, 128))}
    assert sizes["editing", (64, 128)]["share"] == 0.5 and sizes["editing", (64, 128)]["source"] == 32
    assert sum(facts["queries"]["levels"]) == pytest.approx(1) and 0 < facts["queries"]["depth"] < 6
    assert [t["share"] for t in facts["teachers"]] == [0.5, 0.5] and facts["teachers"][1]["drawn"] == 2
    assert facts["passes"]["rollout"] == facts["queries"]["depth"] and facts["passes"]["teachers"] == 1
    assert facts["total_seconds"] == pytest.approx(20 * sum(facts["flops"].values()) / 2e12)
    several = recipe(models, tmp_path, query={"count": 3})
    passes = plan(several, tflops=1.0)["passes"]
    assert (passes["teachers"], passes["student, forward"], passes["student, backward"]) == (3, 3, 3)
    assert passes["validation"] > 0
    off = plan(recipe(models, tmp_path, validation={"every": 0}), tflops=1.0)
    assert "validation" not in off["passes"] and not [m for m in off["memory"] if "validation" in m["part"]]
    patient = plan(recipe(models, tmp_path, validation={"patience": 2}), tflops=1.0)
    best = {m["part"]: m["bytes"] for m in patient["memory"]}
    assert best["student, EMA of the best validation"] == best["student, EMA"]
    json.dumps(facts)


def test_no_weight_is_loaded(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of any file is read; nothing on the CPU is larger than a row of noise; no folder is made."""
    import safetensors

    def refused(*args: object, **kwargs: object) -> None:
        raise AssertionError("a tensor was read")

    class Headers:
        """`safe_open` without the means to read a tensor."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._file = real(*args, **kwargs)

        def __enter__(self) -> Headers:
            return self

        def __exit__(self, *error: object) -> None: ...

        def __getattr__(self, name: str) -> Any:
            return refused if name == "get_tensor" else getattr(self._file, name)

    real = safetensors.safe_open
    monkeypatch.setattr(safetensors, "safe_open", Headers)
    for where in ("danceopd.models.checkpoint", "danceopd.adapters.read", "danceopd.data.store"):
        monkeypatch.setattr(f"{where}.safe_open", Headers, raising=False)
    monkeypatch.setattr("safetensors.torch.load_file", refused)
    for loader in ("transformers.PreTrainedModel", "diffusers.ModelMixin"):
        monkeypatch.setattr(f"{loader}.from_pretrained", refused)
    facts = plan(recipe(models, tmp_path), tflops=1.0)
    assert facts["parameters"] > 0 and not (tmp_path / "run").exists()


def test_everything_is_refused_that_a_merge_refuses(models: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    wrong = random_adapter(tiny_klein().transformer)
    wrong.tensors = {f"{name}.not": pair for name, pair in wrong.tensors.items()}
    write_adapter(wrong, other)
    with pytest.raises(UserError, match="LoRA of another architecture"):
        plan(recipe(models, tmp_path, editing=str(other)), tflops=1.0)
    (tmp_path / "e.jsonl").write_text('{"prompt": "x", "image": "gone.png"}\n')
    with pytest.raises(UserError, match="e.jsonl, line 1: image .*gone.png does not exist"):
        plan(recipe(models, tmp_path, data={"editing": str(tmp_path / "e.jsonl")}), tflops=1.0)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds files that are not a run"):
        plan(recipe(models, tmp_path), tflops=1.0)


def test_a_disk_that_is_too_small_is_warned_of(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert plan(recipe(models, tmp_path), tflops=1.0)["warnings"] == []
    monkeypatch.setattr("danceopd.plan._free", lambda path: 1000)
    said = plan(recipe(models, tmp_path), tflops=1.0)["warnings"]
    assert len(said) == 2 and "needs up to" in said[0] and "DANCEOPD_CACHE" in said[1]


def test_the_shipped_demo(danceopd: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = danceopd("plan", "--tflops", 0.1, "--steps", 5)
    assert done.returncode == 0, done.stderr
    for words in ("Teachers", "Queries by noise level", "student, Adam", "rollout", "at least", "disk: run folder"):
        assert words in done.stdout
    assert list(tmp_path.iterdir()) == []
    monkeypatch.chdir(tmp_path)
    facts = json.loads(CliRunner().invoke(app, ["plan", "--tflops", "0.1", "--steps", "5", "--json"]).stdout)
    assert facts["family"] == "flux2-klein" and facts["tflops"] == 0.1 and facts["warnings"] == []
    as_ever = {"dtype": "fp32", "micro_batch": None, "gradient_checkpointing": False, "rollout.merged": True}
    assert facts["settings"] == as_ever and facts["refused"] is None
