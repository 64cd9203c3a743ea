"""The bytes that merges end at, for comparing two versions of this package: one table of sha256 a configuration.

    python benchmarks/same_bytes.py --inputs /tmp/inputs --output after.json
    PYTHONPATH=/path/to/older python benchmarks/same_bytes.py --inputs /tmp/inputs --output before.json \\
        --against after.json

Both are run from the newer version's checkout; `PYTHONPATH` says which version merges. The models and the data in
`--inputs` are made once (tiny pipelines of the real classes, from `tests/`), by the newer version, and read by both.
Each configuration is one real `danceopd merge` on one thread; `student` is the exported file's hash, `state` that of
the last checkpoint's weights, averages and Adam moments. With `--against` the exit status is 1 where one differs.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent.parent
WORDS = ["a red circle", "two blue square", "a white ring above", "a green star", "a black cross", "a yellow ring"]
EDITS = ["make it red", "remove the star", "add a ring", "make it blue", "remove the circle", "add a cross"]
WEIGHTS = "pytorch_lora_weights.safetensors"
EARLIER = {
    "validation": "gap", "monitor": "watch", "cache_source": "keep_source", "num_inference_steps": "steps",
}  # fmt: skip
"""Recipe keys, and their names in versions whose modules lay in one folder."""


def make_inputs(folder: Path, tests: Path) -> None:
    """Every family's base and two adapters, prompts, edits and their targets; a whole fine-tuned klein."""
    for place in (tests, tests / "helpers"):
        sys.path.insert(0, str(place))
    import torch
    from tinies import TINYS  # type: ignore[import-not-found]
    from tiny import random_adapter, random_image  # type: ignore[import-not-found]

    from danceopd.pipelines import registry as families

    folder.mkdir(parents=True)
    for i in range(len(WORDS)):
        random_image(i).save(folder / f"{i}.png")
        random_image(20 + i).save(folder / f"target-{i}.png")
    for name, words in {"generation": WORDS, "editing": EDITS}.items():
        lines = []
        for i, one in enumerate(words):
            row = {"prompt": one, "paraphrases": [f"please {one}", f"now {one}"], "expanded": f"{one} with care"}
            row["target"] = f"target-{i}.png"
            lines.append(json.dumps(row | ({"image": f"{i}.png"} if name == "editing" else {})))
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    from danceopd.adapters.write import write_adapter

    for tiny in TINYS:
        place = folder / tiny.family
        pipe = tiny.build(place / "base")
        for i in range(2):
            targets = families.FAMILIES[tiny.family].lora_targets
            write_adapter(random_adapter(pipe.transformer, targets=targets, seed=i, size=0.1), place / f"teacher{i}")
        if tiny.components is not None:
            tiny.components(place / "components")
        call = {key: value for key, value in tiny.call.items() if key != "steps"} | {"num_inference_steps": 2}
        facts = {"call": call, "tasks": tiny.tasks, "components": tiny.components is not None}
        (place / "facts.json").write_text(json.dumps(facts))
        if tiny.family == "flux2-klein":
            with torch.no_grad():
                for weight in pipe.transformer.parameters():
                    weight.add_(0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
            pipe.transformer.save_pretrained(place / "whole")


def recipe_of(inputs: Path, family: str, **fields: Any) -> dict[str, Any]:
    """A merge of a family's two adapters; `fields` win."""
    place, facts = inputs / family, json.loads((inputs / family / "facts.json").read_text())
    tasks = [*facts["tasks"], *facts["tasks"]][:2]
    teachers = [
        {"name": f"t{i}", "adapter": str(place / f"teacher{i}"), "capability": task} for i, task in enumerate(tasks)
    ]
    extra = {"editing_base": str(place / "components")} if facts["components"] else {}
    given = {
        "base": str(place / "base"), "teachers": teachers, "steps": 4, "batch": 4, "device": "cpu",
        "data": {"generation": str(inputs / "generation.jsonl"), "editing": str(inputs / "editing.jsonl")},
        "call": facts["call"], "student": {"rank": 8}, "rollout": {"steps": 3}, "samples": {"every": 0, "count": 1},
        "validation": {"every": 2, "rows": 2}, "save_every": 2, **extra,
    }  # fmt: skip
    return {**given, **fields}


def configurations(inputs: Path) -> dict[str, dict[str, Any]]:
    """Name -> recipe, with `processes`, and `first`: steps before a second call continues the run."""
    families = sorted(path.parent.name for path in inputs.glob("*/facts.json"))
    found: dict[str, dict[str, Any]] = {"demo, 24 steps": {"flags": ["--steps", "24"]}}
    for family in families:
        found[f"tiny {family}"] = recipe_of(inputs, family)
    klein = "flux2-klein"

    def more(name: str, **fields: Any) -> None:
        found[name] = recipe_of(inputs, klein, **fields)

    more("diffusionopd", objective="diffusionopd")
    more("diffusionopd, ab2", objective="diffusionopd", rollout={"steps": 3, "solver": "ab2"})
    more("flowopd", objective="flowopd", flowopd={"group": 2}, rollout={"steps": 3, "noise": 0.7})
    more("supervised", objective="supervised")
    more("offpolicy, targets", objective="offpolicy")
    more("offpolicy, teacher", objective="offpolicy", offpolicy={"clean": "teacher"})
    more("several queries, jitter, dt2, ab2", rollout={"steps": 4, "solver": "ab2"},
         query={"law": "high-noise", "count": 3, "jitter": True, "weight": "dt2"})  # fmt: skip
    more("stochastic rollout", rollout={"steps": 3, "noise": 0.5})
    more("guided rollout, unconditional rows", rollout={"steps": 3, "guidance": 2.0}, guidance={"unconditional": 0.4})
    more("routing per step", routing={"per": "step"})
    more("routing per turn", routing={"per": "turn", "groups": 2})
    teachers = recipe_of(inputs, klein)["teachers"]
    more("a guided teacher", teachers=[{**teachers[0], "guidance": 3.0, "scale": 0.5}, teachers[1]])
    whole = {**teachers[0], "adapter": str(inputs / klein / "whole"), "rank": 8}
    more("a whole model, low rank", teachers=[{**whole, "residual": 1.0}, teachers[1]])
    streamed = [{**whole, "residual": 0.0}, teachers[1]]
    more("a whole model, streamed", teachers=streamed, student={"rank": 8, "init": "t1"})
    more("init base", student={"rank": 4, "init": "base"})
    more("init ties", student={"rank": 4, "init": "blend", "init_method": "ties"})
    quiet = {"every": 0}
    for contrast in ("null", "prompt", "source"):
        more(f"gate evidence, {contrast}", gates={"evidence": {"contrast": contrast}}, monitor=quiet)
    more("gate evidence, groups", gates={"evidence": {"alpha": -0.5}, "group": 2}, monitor=quiet)
    more("gate consensus", gates={"consensus": True}, monitor=quiet)
    more("gate skills", gates={"skills": True}, monitor=quiet)
    more("gate skills, early", gates={"skills": {"eta": 0.5, "until": 0.7}}, query={"count": 2}, monitor=quiet)
    more("all gates", gates={"evidence": True, "consensus": True, "skills": True}, monitor=quiet, micro_batch=2)
    more("all gates, monitored", gates={"evidence": True, "consensus": True, "skills": True},
         monitor={"every": 2, "prompts": 8, "seeds": 2})  # fmt: skip
    more("bf16", dtype="bf16")
    more("fp16", dtype="fp16")
    more("micro-batches", micro_batch=1)
    more("gradient checkpointing", gradient_checkpointing=True)
    more("rollout through the layers", rollout={"steps": 3, "merged": False})
    found["cached source"] = recipe_of(inputs, "flux2-klein-kv", rollout={"steps": 3, "cache_source": True})
    more("validation chooses the best", validation={"every": 1, "rows": 2, "select": "best"})
    more("two processes", processes=2)
    more("two processes, sharded", processes=2, parallel="fsdp")
    every = {"evidence": True, "consensus": True, "skills": True}
    more("two processes, all gates", processes=2, gates=every, monitor=quiet)
    more("stopped and continued", first=2)
    return found


def earlier_keys(recipe: Any) -> Any:
    """The recipe in the keys of versions whose modules lay in one folder."""
    if isinstance(recipe, list):
        return [earlier_keys(value) for value in recipe]
    if isinstance(recipe, dict):
        return {EARLIER.get(key, key): earlier_keys(value) for key, value in recipe.items()}
    return recipe


def run(recipe: dict[str, Any], folder: Path) -> dict[str, str]:
    """One merge in real processes; the hashes of its student and of its last state."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    spec = importlib.util.find_spec("danceopd.recipe")
    recipe = earlier_keys(recipe) if spec is None or spec.submodule_search_locations is None else dict(recipe)
    processes, first, flags = recipe.pop("processes", 1), recipe.pop("first", None), recipe.pop("flags", None)
    for steps in (first, recipe.get("steps")) if first else (recipe.get("steps"),):
        arguments = ["merge", *(flags or []), "--output", str(folder / "student")]
        if flags is None:
            (folder / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "steps": steps}))
            arguments.insert(1, str(folder / "recipe.yaml"))
        start = [sys.executable, "-m", "danceopd"]
        if "qwen" in str(recipe.get("base")):  # its tokenizer is a class of the tests, which diffusers wants imported
            start = [sys.executable, "-c", "import tiny_qwen, runpy; runpy.run_module('danceopd', run_name='__main__')"]
        if processes > 1:
            start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
                     "-m", "danceopd"]  # fmt: skip
        done = subprocess.run([*start, *arguments], cwd=folder, capture_output=True, text=True)
        if done.returncode:
            return {"student": f"status {done.returncode}: {done.stderr.strip()[-300:]}", "state": ""}
    student = hashlib.sha256((folder / "student" / WEIGHTS).read_bytes()).hexdigest()
    return {"student": student, "state": state_hash(folder / "student" / "checkpoints")}


def state_hash(checkpoints: Path) -> str:
    """Of the last checkpoint's weights, averages and Adam moments, whatever else stands in it."""
    from safetensors.torch import load_file

    tensors = load_file(sorted(checkpoints.glob("step-*"))[-1] / "state.safetensors")
    whole = hashlib.sha256()
    for name in sorted(tensors):
        if name.startswith(("weight.", "average.", "optimizer.")):
            whole.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return whole.hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=Path, required=True, help="a folder of models and data; made where it is not")
    parser.add_argument("--output", type=Path, required=True, help="the table, as JSON")
    parser.add_argument("--against", type=Path, help="a table of another version, to compare with")
    parser.add_argument("--only", default="", help="configurations whose name holds this")
    parser.add_argument("--tests", type=Path, default=HERE / "tests", help="where the tiny pipelines are")
    options = parser.parse_args()
    places = [os.environ.get("PYTHONPATH", ""), str(options.tests), str(options.tests / "helpers")]
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", HF_HUB_OFFLINE="1")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, places))  # one family's tokenizer is a class of the tests
    if not options.inputs.is_dir():
        make_inputs(options.inputs, options.tests)
    before = json.loads(options.against.read_text()) if options.against else {}
    found: dict[str, dict[str, str]] = json.loads(options.output.read_text()) if options.output.is_file() else {}
    differ = 0
    for name, recipe in configurations(options.inputs.resolve()).items():
        if options.only not in name:
            continue
        found[name] = run(recipe, options.output.resolve().parent / f"{options.output.stem}-run")
        verdict = "" if name not in before else " same" if before[name] == found[name] else " DIFFERS"
        differ += verdict == " DIFFERS"
        print(f"{name:36} {found[name]['student'][:300]} {found[name]['state'][:8]}{verdict}", flush=True)
        options.output.write_text(json.dumps(found, indent=1))
    return int(differ > 0)


if __name__ == "__main__":
    sys.exit(main())
