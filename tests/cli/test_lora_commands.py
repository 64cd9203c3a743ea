"""`inspect`, `export`, `extract` and `blend` on LoRA files as they are found: what they say of them, and do."""

from __future__ import annotations

import json

import pytest
import torch
from lora_files import flat, klein_adapter, klein_transformer, saved_base
from safetensors.torch import save_file
from typer.testing import CliRunner

from danceopd.adapters.read import read_adapter
from danceopd.cli.app import app
from danceopd.cli.inspect import describe
from danceopd.models.lora import Adapter

base = pytest.fixture(scope="module")(saved_base)
transformer = pytest.fixture(scope="module")(klein_transformer)
adapter = pytest.fixture(scope="module")(klein_adapter)
Q = "transformer_blocks.0.attn.to_q"
STOCK = "stock load_lora_weights"


def run(*words) -> tuple[int, str]:
    """Exit status and output of a command."""
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, " ".join(done.output.split())


def put(folder, tensors, metadata=None, name="x.safetensors"):
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, folder / name, metadata)
    return folder / name


def test_a_text_encoder_is_dropped_on_the_way_to_a_teacher(base, transformer, adapter, tmp_path):
    extra = {f"lora_te1_text_model_x.lora_{half}.weight": torch.ones(1, 1) for half in ("down", "up")}
    file = put(tmp_path, flat(adapter) | extra)
    status, said = run("export", file, "--base", base, "-o", tmp_path / "no")
    assert status == 2 and "--drop text-encoder" in said
    assert run("export", file, "--base", base, "-o", tmp_path / "out", "--drop", "text-encoder")[0] == 0
    assert read_adapter(tmp_path / "out", transformer).sha256 == adapter.sha256
    assert run("blend", file, "--base", base, "-o", tmp_path / "blend", "--drop", "text-encoder")[0] == 0
    assert run("extract", base, file, "-o", tmp_path / "e", "-r", 4, "--drop", "text-encoder")[0] == 0


def test_export_leaves_layers_out(base, adapter, tmp_path):
    file = put(tmp_path, flat(adapter))
    status, said = run("export", file, "--base", base, "-o", tmp_path / "out", "--leave-out", "single_*")
    assert status == 0 and f"{sum(not n.startswith('single_') for n in adapter.tensors)} layers" in said
    status, said = run("export", file, "--base", base, "-o", tmp_path / "no", "--leave-out", "nothing")
    assert status == 2 and "no layer nothing to leave out" in said


def test_an_empty_lora_is_said_to_be_empty(base, adapter, tmp_path):
    file = put(tmp_path, flat(Adapter({n: (a, 0 * b) for n, (a, b) in adapter.tensors.items()})))
    status, said = run("export", file, "--base", base, "-o", tmp_path / "out")
    assert status == 0 and "changes nothing" in said and "exact" not in said
    other = put(tmp_path / "other", flat(adapter))
    for command in (["blend", other, file, "-o", tmp_path / "b"], ["extract", base, file, "-o", tmp_path / "e"]):
        status, said = run(*command)
        assert status == 2 and ("is empty" in said or "nothing to extract" in said)


@pytest.mark.parametrize("flag, value", [("--weights", "1e300,1"), ("--scale", "1e300"), ("--weights", "nan,1")])
def test_a_blend_of_absurd_weights(adapter, tmp_path, flag, value):
    files = [put(tmp_path / name, flat(adapter)) for name in "ab"]
    status, said = run("blend", *files, "-o", tmp_path / "out", flag, value)
    assert status == 2 and "from -10000 to 10000" in said


def test_extract_says_what_a_rank_of_an_adapter_loses(base, transformer, tmp_path):
    draw = torch.Generator().manual_seed(0)
    stem = f"lycoris_{Q.replace('.', '_')}"
    tensors = {f"{stem}.lokr_w{i}": torch.randn(size, size, generator=draw) for i, size in ((1, 4), (2, 8))}
    file = put(tmp_path, tensors)
    assert read_adapter(file, transformer).rank == 32
    status, said = run("extract", base, file, "-o", tmp_path / "out", "--rank", 8)
    assert status == 0 and "1 layers, rank 8" in said and "residual" in said
    assert describe(tmp_path / "out")["rank"] == 8


# inspect


def test_inspect_names_the_kind_and_refuses_what_a_reader_refuses(adapter, tmp_path):
    tensors = flat(adapter)
    told = {
        "DoRA": tensors | {f"transformer.{Q}.lora_magnitude_vector": torch.ones(32)},
        "text encoder": tensors | {f"text_encoder.x.lora_{half}.weight": torch.ones(1, 1) for half in "AB"},
        "incomplete": {key: tensor for key, tensor in tensors.items() if not key.endswith("to_q.lora_B.weight")},
        "belong to no LoRA layer": tensors | {f"transformer.{Q}.diff_b": torch.ones(32)},
        "other numbers than floats": tensors | {f"transformer.{Q}.lora_A.weight": torch.ones(4, 32, dtype=torch.int8)},
    }
    for says, changed in told.items():
        facts = describe(put(tmp_path / says.replace(" ", "_"), changed))
        assert says in facts["refused"] and facts["uses"] == []
    for says, config in {"pissa": {"init_lora_weights": "pissa"}, "rank 8": {"r": 8, "lora_alpha": 8}}.items():
        metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in config.items()})}
        facts = describe(put(tmp_path / says, tensors, metadata))
        assert says in facts["refused"] and facts["uses"] == [] and facts["kind"] == "LoRA"
    facts = describe(put(tmp_path / "lokr", {f"transformer.{Q}.lokr_w{i}": torch.ones(2, 2) for i in (1, 2)}))
    assert facts["kind"] == "LoKr" and not facts["refused"] and STOCK not in facts["uses"] and facts["rank"] == 4


def test_inspect_claims_the_stock_loader_only_where_it_reads_the_file(adapter, tmp_path):
    blocks = {f"diffusion_model.double_blocks.0.img_attn.proj.lora_{h}.weight": torch.ones(2, 2) for h in "AB"}
    last = {f"diffusion_model.final_layer.adaLN_modulation.1.lora_{h}.weight": torch.ones(2, 2) for h in "AB"}
    mlp = {f"diffusion_model.double_blocks.0.img_mod.lin.lora_{h}.weight": torch.ones(2, 2) for h in "AB"}
    klein = {f"diffusion_model.double_stream_modulation_img.lin.lora_{h}.weight": torch.ones(2, 2) for h in "AB"}
    assert STOCK not in describe(put(tmp_path / "a", blocks | last))["uses"]
    facts = describe(put(tmp_path / "b", blocks | klein))  # the first and last layers tell the architecture, too
    assert facts["transformer"] == ["Flux2Transformer2DModel"] and "comfyui" in facts["uses"][-1]
    assert describe(put(tmp_path / "c", blocks | mlp))["transformer"] == ["FluxTransformer2DModel"]
    assert STOCK in describe(put(tmp_path / "d", flat(adapter)))["uses"]
    assert STOCK not in describe(put(tmp_path / "e", flat(adapter, "transformer._orig_mod.{}")))["uses"]
    odd = describe(put(tmp_path / "f", {f"transformer.odd.lora_{h}.weight": torch.ones(2, 2) for h in "AB"}))
    assert odd["transformer"] == [] and "with a base that has these layers" in odd["uses"][0]


def test_inspect_says_where_alpha_comes_from(adapter, tmp_path):
    put(tmp_path, flat(adapter, "{}"))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8}))
    facts = describe(tmp_path)
    assert facts["alpha"].startswith("8 by ") and "adapter_config.json" in facts["alpha"] and STOCK not in facts["uses"]
    (tmp_path / "adapter_config.json").write_text("{")
    assert "cannot be read" in describe(tmp_path)["refused"]


def test_a_quantised_base_is_refused_by_name(base, tmp_path):
    import shutil

    shutil.copytree(base, tmp_path / "nf4")
    file = tmp_path / "nf4" / "transformer" / "config.json"
    quantised = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    file.write_text(json.dumps(json.loads(file.read_text()) | quantised))
    facts = describe(tmp_path / "nf4")
    assert "quantised (bitsandbytes)" in facts["refused"]
    assert facts["uses"] == ["stock DiffusionPipeline.from_pretrained"]
    assert describe(tmp_path / "nf4" / "transformer")["uses"] == []
    status, said = run("extract", base, tmp_path / "nf4", "-o", tmp_path / "e")
    assert status == 2 and "quantised" in said
    (tmp_path / "x.gguf").write_bytes(b"GGUF\x03\0\0\0" + bytes(64))
    status, said = run("extract", base, tmp_path / "x.gguf", "-o", tmp_path / "e")
    assert status == 2 and "is a GGUF" in said
