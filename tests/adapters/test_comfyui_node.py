"""The ComfyUI node of examples/comfyui, imported against a stub of ComfyUI: what it loads, says and refuses."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file
from tiny import random_adapter, tiny_klein

from danceopd.adapters.export import export_as
from danceopd.adapters.write import write_adapter
from danceopd.common.shipped import shipped

NODE = Path(__file__).parents[2] / "examples" / "comfyui" / "__init__.py"


class Model:
    """As ComfyUI's ModelPatcher: clones, and says which patches found a weight."""

    def __init__(self, layers: set[str], applied: tuple = ()) -> None:
        self.model, self.layers, self.applied = SimpleNamespace(layers=layers), layers, list(applied)

    def clone(self) -> Model:
        return Model(self.layers, tuple(self.applied))

    def add_patches(self, patches: dict, strength: float) -> list[str]:
        self.applied.append((len(patches), strength))
        return [key for key in patches if key in self.layers]


def load_lora(tensors: dict, layers: dict) -> dict:
    """ComfyUI's: a patch for each known layer that the file has; the rest is logged alone."""
    halves = {where: tensors.get(f"{name}.lora_A.weight") for name, where in layers.items()}
    return {where: half for where, half in halves.items() if half is not None}


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loras")
    pipe = tiny_klein(folder / "base")
    write_adapter(random_adapter(pipe.transformer, seed=1), folder / "student", metadata={"teachers": "a (generation)"})
    export_as(folder / "student", folder, "comfyui", base=folder / "base")
    export_as(folder / "student", folder / "stock", "diffusers", base=folder / "base")
    save_file(load_file(folder / "student.safetensors"), folder / "other.safetensors")
    (folder / "cut.safetensors").write_bytes((folder / "student.safetensors").read_bytes()[:100])
    (folder / "text.safetensors").write_bytes(b"not one")
    return folder


@pytest.fixture
def node(loras: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    comfy = ModuleType("comfy")
    parts = {
        "comfy.utils": {"load_torch_file": lambda path, safe_load: load_file(path)},
        "comfy.lora": {
            "model_lora_keys_unet": lambda model, found: {layer: layer for layer in model.layers},
            "load_lora": load_lora,
        },
        "comfy.lora_convert": {"convert_lora": lambda tensors: tensors},
        "folder_paths": {
            "get_filename_list": lambda kind: ["student.safetensors"],
            "get_full_path_or_raise": lambda kind, name: str(loras / name),
        },
    }  # fmt: skip
    monkeypatch.setitem(sys.modules, "comfy", comfy)
    for name, members in parts.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
        if name.startswith("comfy."):
            setattr(comfy, name.removeprefix("comfy."), module)
    spec = importlib.util.spec_from_file_location("danceopd_comfyui", NODE)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def layers_of(loras: Path) -> set[str]:
    return {key.removesuffix(".lora_A.weight") for key in load_file(loras / "student.safetensors") if "lora_A" in key}


def test_what_it_takes_and_loads(node: ModuleType, loras: Path) -> None:
    [kind] = node.NODE_CLASS_MAPPINGS.values()
    inputs = kind.INPUT_TYPES()["required"]
    assert inputs["student"] == (["student.safetensors"],) and list(inputs) == ["model", "student", "strength"]
    assert node.NODE_CLASS_MAPPINGS.keys() == node.NODE_DISPLAY_NAME_MAPPINGS.keys()
    layers, run = layers_of(loras), getattr(kind(), kind.FUNCTION)
    model = Model(layers)
    patched, card = run(model, "student.safetensors", 0.5)
    assert patched.applied == [(len(layers), 0.5)] and model.applied == []
    assert str(loras / "base") in card and "merged from: a (generation)" in card and "strength 0.5" in card
    assert run(model, "student.safetensors", 0.0)[0] is model


@pytest.mark.parametrize(("file", "sentence"), [
    ("other.safetensors", "was not written by danceopd; load it with Load LoRA"),
    ("stock/pytorch_lora_weights.safetensors", "has diffusers' names; write the file for ComfyUI"),
    ("cut.safetensors", "is no safetensors file, or is cut off"),
    ("text.safetensors", "is no safetensors file"),
])  # fmt: skip
def test_files_that_are_refused(node: ModuleType, loras: Path, file: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        node.LoadStudent().load(Model(layers_of(loras)), file, 1.0)


def test_layers_that_the_model_lacks_are_no_silence(node: ModuleType, loras: Path) -> None:
    layers = layers_of(loras)
    with pytest.raises(ValueError, match=f"2 of the {len(layers)} layers of student.safetensors are not in this model"):
        node.LoadStudent().load(Model(set(sorted(layers)[2:])), "student.safetensors", 1.0)


def test_the_shipped_teachers_file_has_as_many_layers_as_it_names(node: ModuleType, tmp_path: Path) -> None:
    file = export_as(shipped("generation"), tmp_path, "comfyui").file
    record, keys = node.read_header(str(file))
    assert record["base"] == "base" and len(keys) == 48
