"""A ComfyUI node that loads a danceopd student onto a model, and refuses what ComfyUI would leave out without a word.

Copy this folder to ComfyUI/custom_nodes/danceopd, and a student in ComfyUI's names (`danceopd export STUDENT --format
comfyui`, or `danceopd push --comfyui`) to ComfyUI/models/loras. The node needs nothing but ComfyUI.
"""

from __future__ import annotations

import json

import comfy.lora
import comfy.lora_convert
import comfy.utils
import folder_paths

RECORD = "danceopd"
"""The entry of a file's metadata that danceopd writes."""
DIFFUSERS, MOST = "transformer.", 1 << 26


class LoadStudent:
    """MODEL and a student's file go in; MODEL with the student, and the student's card as text, come out."""

    CATEGORY = "loaders/danceopd"
    RETURN_TYPES = ("MODEL", "STRING")
    RETURN_NAMES = ("model", "card")
    FUNCTION = "load"
    DESCRIPTION = "Loads a danceopd student. Every layer of it must find its place in the model."

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        strength = {"default": 1.0, "min": -4.0, "max": 4.0, "step": 0.05, "tooltip": "1: as it was trained"}
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The base that the student was trained on"}),
                "student": (folder_paths.get_filename_list("loras"),),
                "strength": ("FLOAT", strength),
            }
        }

    def load(self, model, student: str, strength: float):
        """(model with the student, card). ValueError in one sentence, which ComfyUI shows, where it does not fit."""
        path = folder_paths.get_full_path_or_raise("loras", student)
        record, keys = read_header(path)
        if not record:
            raise ValueError(f"{student} was not written by danceopd; load it with Load LoRA")
        if any(key.startswith(DIFFUSERS) for key in keys):
            raise ValueError(
                f"{student} has diffusers' names; write the file for ComfyUI: danceopd export STUDENT --format comfyui"
            )
        if strength == 0:
            return model, card(student, record, strength)
        tensors = comfy.utils.load_torch_file(path, safe_load=True)
        layers = comfy.lora.model_lora_keys_unet(model.model, {})
        patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(tensors), layers)
        patched = model.clone()
        placed = set(patched.add_patches(patches, strength))
        wanted = len({key.rsplit(".lora_", 1)[0] for key in keys if ".lora_" in key})
        if len(placed) < wanted:
            raise ValueError(
                f"{wanted - len(placed)} of the {wanted} layers of {student} are not in this model; load it on "
                f"{record.get('base', 'the base that it was trained on')}"
            )
        return patched, card(student, record, strength)


def read_header(path: str) -> tuple[dict, list[str]]:
    """danceopd's record in a safetensors file's metadata (empty: none), and the names of its tensors."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if not 2 <= size <= MOST:
            raise ValueError(f"{path} is no safetensors file")
        try:
            header = json.loads(file.read(size))
            record = json.loads((header.pop("__metadata__", None) or {}).get(RECORD, "{}"))
        except ValueError:
            raise ValueError(f"{path} is no safetensors file, or is cut off; copy it again") from None
    return record, list(header)


def card(student: str, record: dict, strength: float) -> str:
    """What the file says of itself, a line each."""
    lines = [student, f"base: {record.get('base', 'not recorded')}"]
    if record.get("teachers"):
        lines.append(f"merged from: {record['teachers']}")
    if record.get("num_inference_steps"):
        lines.append(f"draws in {record['num_inference_steps']} steps, without guidance")
    else:
        lines.append("sample without guidance where a teacher had some: cfg 1")
    lines.append(f"{record.get('modules', '?')} layers, sha256 {str(record.get('sha256', ''))[:12]}")
    lines.append("strength 1, as it was trained" if strength == 1 else f"strength {strength:g}; it was trained at 1")
    return "\n".join(lines)


NODE_CLASS_MAPPINGS = {"DanceOPDLoadStudent": LoadStudent}
NODE_DISPLAY_NAME_MAPPINGS = {"DanceOPDLoadStudent": "Load danceopd student"}
