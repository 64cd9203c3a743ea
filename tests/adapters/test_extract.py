"""`extract`: the difference of two models as a LoRA, its residuals, and the models that it refuses."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline, Flux2Transformer2DModel
from safetensors.torch import load_file, save_file
from tiny import random_adapter, tiny_klein

from danceopd.adapters.extract import difference, extract
from danceopd.adapters.header import inspect_adapter
from danceopd.adapters.read import read_adapter
from danceopd.adapters.svd import low_rank_factors, truncate_product
from danceopd.cli.extract import run
from danceopd.errors import UserError
from danceopd.models.base import base_fingerprint
from danceopd.models.checkpoint import open_checkpoint

NORM = "transformer_blocks.0.attn.norm_q.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(folder, adapter): a base, and the base with a rank-3 adapter on every target written into its weights."""
    folder = tmp_path_factory.mktemp("models")
    pipe = tiny_klein(folder / "base")
    adapter = random_adapter(pipe.transformer, rank=3, seed=5, size=0.1)
    with torch.no_grad():
        for name, (a, b) in adapter.tensors.items():
            pipe.transformer.get_submodule(name).weight += b @ a
    pipe.save_pretrained(folder / "tuned")
    with torch.no_grad():
        pipe.transformer.get_parameter(NORM).mul_(1.5)
        pipe.transformer.x_embedder.weight.add_(0.1)  # a Linear outside a LoRA's usual targets: it can be held
    pipe.save_pretrained(folder / "all")
    return folder, adapter


def test_a_fine_tune_of_low_rank_comes_back(models, tmp_path):
    folder, adapter = models
    file, found = extract(folder / "base", folder / "tuned", tmp_path / "lora", rank=3, device="cpu")
    again = read_adapter(file, tiny_klein().transformer)
    assert again.ranks == adapter.ranks and not found.not_adapted and found.residual < 1e-4
    for name in adapter.tensors:
        assert (again.delta(name) - adapter.delta(name)).abs().max() < 1e-5
    record = inspect_adapter(file).record
    assert record["base_sha256"] == base_fingerprint(folder / "base") and float(record["residual"]) < 1e-4
    stock, tuned = (DiffusionPipeline.from_pretrained(folder / name) for name in ("base", "tuned"))
    stock.load_lora_weights(str(tmp_path / "lora"))
    pictures = []
    for pipe in (stock, tuned):
        pipe.set_progress_bar_config(disable=True)
        call = {"height": 64, "width": 64, "num_inference_steps": 2, "max_sequence_length": 24, "output_type": "pt"}
        generator = torch.Generator().manual_seed(0)
        pictures.append(pipe(prompt="a red star", guidance_scale=1.0, generator=generator, **call).images)
    torch.testing.assert_close(pictures[0], pictures[1], atol=1e-3, rtol=0)


def test_residuals_are_the_best_possible_and_add_up(models):
    folder, adapter = models
    base, tuned = open_checkpoint(folder / "base"), open_checkpoint(folder / "all")
    found = difference(base, tuned, rank=2)
    lost = whole = 0.0
    for change in found.adapted:
        a, b = found.adapter.tensors[change.name]
        delta = tuned.tensor(f"{change.name}.weight") - base.tensor(f"{change.name}.weight")
        gap = (delta - b @ a).norm() / delta.norm()
        assert change.rank == 2 == len(a) and change.residual == pytest.approx(float(gap), abs=1e-5)
        if change.name in adapter.tensors:
            best = truncate_product(*adapter.tensors[change.name], 2)[0]
            assert gap < 1.01 * (delta - best[1] @ best[0]).norm() / delta.norm() + 1e-4
        lost, whole = lost + float((delta - b @ a).norm() ** 2), whole + float(delta.norm() ** 2)
    assert "x_embedder" in found.adapter.tensors
    (norm,) = found.not_adapted
    assert norm.name == NORM and norm.change == pytest.approx(0.5, abs=1e-5) and norm.residual == 1
    size = float((0.5 * base.tensor(NORM)).norm() ** 2)
    assert found.residual == pytest.approx(((lost + size) / (whole + size)) ** 0.5, rel=1e-4)


def test_energy_chooses_each_layers_rank(models):
    folder, _ = models
    base, tuned = open_checkpoint(folder / "base"), open_checkpoint(folder / "tuned")
    found = difference(base, tuned, rank=16, energy=0.8)
    assert set(found.adapter.ranks.values()) <= {1, 2, 3} and len(set(found.adapter.ranks.values())) > 1
    for change in found.adapted:
        assert change.residual**2 <= 0.2 + 1e-4
        if change.rank > 1:  # one less would not have done
            delta = tuned.tensor(f"{change.name}.weight") - base.tensor(f"{change.name}.weight")
            s = torch.linalg.svdvals(delta) ** 2
            assert s[: change.rank - 1].sum() < 0.8 * s.sum()
    assert max(difference(base, tuned, rank=2, energy=0.999).adapter.ranks.values()) == 2


def test_the_randomised_factors_are_nearly_the_best_and_seeded(monkeypatch):
    monkeypatch.setattr("danceopd.adapters.svd.EXACT_SIDE", 10)
    generator = torch.Generator().manual_seed(0)
    decaying = torch.randn(300, 200, generator=generator) @ torch.diag(0.9 ** torch.arange(200.0))
    decaying = decaying @ torch.randn(200, 200, generator=generator)
    state = torch.get_rng_state()
    a, b = low_rank_factors(decaying, 32)
    assert torch.equal(torch.get_rng_state(), state)
    best = float((torch.linalg.svdvals(decaying)[32:] ** 2).sum().sqrt())
    assert best <= float((decaying - b @ a).norm()) * 1.0001 and float((decaying - b @ a).norm()) < 1.01 * best
    again = low_rank_factors(decaying, 32)
    assert torch.equal(a, again[0]) and not torch.equal(a, low_rank_factors(decaying, 32, seed=1)[0])


def test_stored_in_half_precision_the_residual_is_of_what_is_stored(models, tmp_path):
    folder, _ = models
    file, found = extract(folder / "base", folder / "tuned", tmp_path / "x", 3, device="cpu", dtype=torch.bfloat16)
    assert inspect_adapter(file).dtypes == ("BF16",) and 1e-3 < found.residual < 1e-2
    again = read_adapter(file)
    assert all(torch.equal(a, again.tensors[n][0]) for n, (a, _) in found.adapter.tensors.items())


def original_names(state):
    """Black Forest Labs' names for a FLUX.2 transformer's weights, as ComfyUI files have them."""
    out, state = {}, dict(state)
    for block in (0, 1):
        here, there = f"transformer_blocks.{block}.", f"double_blocks.{block}."
        for stream, names in (("img", ("to_q", "to_k", "to_v")), ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"))):
            parts = [state.pop(f"{here}attn.{name}.weight") for name in names]
            out[f"{there}{stream}_attn.qkv.weight"] = torch.cat(parts)
        for old, new in (
            ("attn.norm_q.weight", "img_attn.norm.query_norm.scale"),
            ("attn.norm_k.weight", "img_attn.norm.key_norm.scale"),
            ("attn.to_out.0.weight", "img_attn.proj.weight"),
            ("ff.linear_in.weight", "img_mlp.0.weight"),
            ("ff.linear_out.weight", "img_mlp.2.weight"),
            ("attn.norm_added_q.weight", "txt_attn.norm.query_norm.scale"),
            ("attn.norm_added_k.weight", "txt_attn.norm.key_norm.scale"),
            ("attn.to_add_out.weight", "txt_attn.proj.weight"),
            ("ff_context.linear_in.weight", "txt_mlp.0.weight"),
            ("ff_context.linear_out.weight", "txt_mlp.2.weight"),
        ):
            out[there + new] = state.pop(here + old)
        here, there = f"single_transformer_blocks.{block}.attn.", f"single_blocks.{block}."
        out[f"{there}linear1.weight"] = state.pop(f"{here}to_qkv_mlp_proj.weight")
        out[f"{there}linear2.weight"] = state.pop(f"{here}to_out.weight")
        for half in ("query", "key"):
            out[f"{there}norm.{half}_norm.scale"] = state.pop(f"{here}norm_{half[0]}.weight")
    scale, shift = state.pop("norm_out.linear.weight").chunk(2)
    out["final_layer.adaLN_modulation.1.weight"] = torch.cat([shift, scale])
    for old, new in (
        ("x_embedder", "img_in"),
        ("context_embedder", "txt_in"),
        ("time_guidance_embed.timestep_embedder.linear_1", "time_in.in_layer"),
        ("time_guidance_embed.timestep_embedder.linear_2", "time_in.out_layer"),
        ("double_stream_modulation_img.linear", "double_stream_modulation_img.lin"),
        ("double_stream_modulation_txt.linear", "double_stream_modulation_txt.lin"),
        ("single_stream_modulation.linear", "single_stream_modulation.lin"),
        ("proj_out", "final_layer.linear"),
    ):
        out[f"{new}.weight"] = state.pop(f"{old}.weight")
    assert not state, sorted(state)
    return {f"model.diffusion_model.{name}": tensor.contiguous() for name, tensor in out.items()}


def test_single_files_in_either_naming_are_the_same_model(models, tmp_path):
    folder, _ = models
    state = load_file(folder / "all" / "transformer" / "diffusion_pytorch_model.safetensors")
    original = original_names(state)
    save_file(state, tmp_path / "plain.safetensors")
    save_file({**original, "vae.decoder.weight": torch.zeros(1)}, tmp_path / "comfy.safetensors")
    stock = Flux2Transformer2DModel.from_single_file(  # the oracle of the names above
        {k.removeprefix("model.diffusion_model."): v for k, v in original.items()},
        config=str(folder / "base"), subfolder="transformer",
    ).state_dict()  # fmt: skip
    base = open_checkpoint(folder / "base")
    for name in ("plain", "comfy"):
        opened = open_checkpoint(tmp_path / f"{name}.safetensors", like=base)
        assert opened.shapes.keys() == stock.keys()
        assert all(torch.equal(opened.tensor(n), t) and torch.equal(t, state[n]) for n, t in stock.items())
    want = difference(base, open_checkpoint(folder / "all"), 4)
    _, got = extract(folder / "base", tmp_path / "comfy.safetensors", tmp_path / "a", 4, device="cpu")
    assert got.adapter.sha256 == want.adapter.sha256
    _, back = extract(tmp_path / "plain.safetensors", folder / "base" / "transformer", tmp_path / "b", 4, device="cpu")
    name = "transformer_blocks.0.attn.to_q"
    assert (back.adapter.delta(name) + want.adapter.delta(name)).abs().max() < 1e-4
    with pytest.raises(UserError, match="single file, which does not say its architecture"):
        extract(tmp_path / "plain.safetensors", tmp_path / "comfy.safetensors", tmp_path / "c")


def rewritten(folder, target, change):
    """A copy of a pipeline folder whose transformer's tensors went through `change`."""
    shutil.copytree(folder, target)
    file = target / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file, {"format": "pt"})
    return target


def test_what_does_not_belong_together_is_refused(models, tmp_path):
    folder, _ = models
    base = folder / "base"

    def refused(finetuned, sentence, **how):
        with pytest.raises(UserError, match=sentence):
            extract(base, finetuned, tmp_path / "out", device="cpu", **how)
        assert not (tmp_path / "out").exists()

    refused(base, "equals .* in every number: nothing to extract; give a trained model")
    refused(rewritten(base, tmp_path / "less", lambda s: s.pop(NORM)), rf"1 missing \({NORM}\)")
    refused(rewritten(base, tmp_path / "more", lambda s: s.update(odd=torch.ones(1))), r"1 extra \(odd\)")

    def wider(state):
        state["proj_out.weight"] = torch.zeros(64, 32)

    refused(rewritten(base, tmp_path / "wide", wider), r"proj_out.weight is \(64, 32\) there and \(32, 32\) in the")
    refused(rewritten(base, tmp_path / "nan", lambda s: s[NORM].fill_(torch.nan)), f"{NORM} of .*NaN")
    refused(rewritten(base, tmp_path / "norm", lambda s: s[NORM].mul_(2)), "only where a LoRA cannot")
    fp8 = rewritten(base, tmp_path / "fp8", lambda s: s.update({NORM: s[NORM].to(torch.float8_e4m3fn)}))
    refused(fp8, r"quantised weights \(F8_E4M3\)")
    rope = rewritten(folder / "tuned", tmp_path / "rope", lambda s: None)
    config = rope / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rope_theta": 5}))
    refused(rope, "another architecture than .*rope_theta is 5 there and 2000 in the base")
    refused(folder / "tuned", "the rank is 0", rank=0)
    refused(folder / "tuned", "the energy is 2", energy=2.0)
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    refused(tmp_path / "other.safetensors", "another|neither in diffusers' names|does not have the")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine")
    with pytest.raises(UserError, match="not an empty folder"):
        extract(base, folder / "tuned", tmp_path / "full")


def test_sharded_weights_are_read_by_their_index(models, tmp_path):
    folder, _ = models
    pipe = DiffusionPipeline.from_pretrained(folder / "all")
    pipe.transformer.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    opened, whole = open_checkpoint(tmp_path / "sharded"), open_checkpoint(folder / "all")
    assert opened.shapes == whole.shapes
    assert all(torch.equal(opened.tensor(name), whole.tensor(name)) for name in whole.shapes)
    next(iter(sorted((tmp_path / "sharded").glob("*.safetensors")))).unlink()
    with pytest.raises(UserError, match="lacks .*00001-of"):
        open_checkpoint(tmp_path / "sharded")


def test_the_command_prints_every_layer_and_what_was_left(models, tmp_path, danceopd):
    folder, _ = models
    done = danceopd("extract", folder / "base", folder / "all", "-r", 2, "-o", tmp_path / "lora", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "transformer_blocks.1.ff.linear_in" in done.stdout and "x_embedder" in done.stdout
    left = done.stdout.partition("changed, and not in the LoRA")[2]
    assert NORM in left and "50.00%" in left and "29 layers, rank 2" in left and f"LoRA: {tmp_path / 'lora'}" in left
    again = danceopd("extract", folder / "base", folder / "all", "-o", tmp_path / "lora")
    assert again.returncode == 2 and "not an empty folder" in again.stderr and "Traceback" not in again.stderr
    with pytest.raises(UserError, match="did you mean 'bf16'"):
        run(str(folder / "base"), str(folder / "all"), tmp_path / "x", 4, None, "cpu", "bf61")


# An adapter in place of a fine-tuned model


@pytest.fixture(scope="module")
def dora(models, tmp_path_factory):
    """(PEFT's folder of a trained DoRA on to_q, to_k and to_v, the change that PEFT makes with it by module)."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("dora")
    model = get_peft_model(
        tiny_klein().transformer, LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=["to_q", "to_k", "to_v"])
    )
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    model.save_pretrained(str(folder))
    before, after = tiny_klein().transformer, model.merge_and_unload()
    names = [n for n, _ in before.named_modules() if n.endswith((".to_q", ".to_k", ".to_v"))]
    change = {n: (after.get_submodule(n).weight - before.get_submodule(n).weight).detach() for n in names}
    return folder, change


def dora_files(folder, change):
    """The same DoRA as kohya's and ai-toolkit's tools name it, q, k and v fused."""
    from safetensors.torch import load_file

    peft, found = load_file(folder / "adapter_model.safetensors"), {"kohya": {}, "ai-toolkit": {}}
    for block in {name.rpartition(".")[0] for name in change}:
        parts = [f"base_model.model.{block}.to_{part}" for part in "qkv"]
        downs, ups = ([peft[f"{part}.lora_{half}.weight"] for part in parts] for half in "AB")
        m = torch.cat([peft[f"{part}.lora_magnitude_vector"] for part in parts])
        a, b = torch.cat(downs), torch.block_diag(*ups)
        original = block.replace("transformer_blocks", "double_blocks").replace("attn", "img_attn.qkv")
        kohya, ai = f"lora_unet_{original.replace('.', '_')}", f"diffusion_model.{original}"
        alpha = torch.tensor(24.0)  # of rank 12
        found["kohya"] |= {f"{kohya}.lora_down.weight": a, f"{kohya}.lora_up.weight": b, f"{kohya}.alpha": alpha,
                           f"{kohya}.dora_scale": m[:, None].clone()}  # fmt: skip
        found["ai-toolkit"] |= {f"{ai}.lora_A.weight": a.clone(), f"{ai}.lora_B.weight": 2 * b,
                                f"{ai}.magnitude": m}  # fmt: skip
    return found


@pytest.mark.parametrize("dialect", ["peft", "kohya", "ai-toolkit"])
def test_a_dora_becomes_a_lora_by_its_base(models, dora, tmp_path, dialect):
    folder, change = dora
    if dialect != "peft":
        save_file(dora_files(*dora)[dialect], tmp_path / "dora.safetensors")
        folder = tmp_path / "dora.safetensors"
    with pytest.raises(UserError, match="is a DoRA .*danceopd extract BASE FILE"):
        read_adapter(folder, tiny_klein().transformer)
    file, found = extract(models[0] / "base", folder, tmp_path / "lora", rank=32, device="cpu")
    again = read_adapter(file, tiny_klein().transformer)
    assert again.tensors.keys() == change.keys() and found.residual < 1e-5 and not found.not_adapted
    for name, wanted in change.items():
        torch.testing.assert_close(again.delta(name), wanted, rtol=1e-4, atol=1e-5)
    small = extract(models[0] / "base", folder, tmp_path / "small", rank=2, device="cpu")[1]
    lost = sum(float((small.adapter.delta(n) - w).square().sum()) for n, w in change.items())
    whole = sum(float(w.square().sum()) for w in change.values())
    assert small.residual == pytest.approx((lost / whole) ** 0.5, rel=1e-3)


def test_a_magnitude_by_column_is_the_old_lycoris_dora(models, tmp_path):
    name, base = "transformer_blocks.0.attn.to_q", open_checkpoint(models[0] / "base")
    draw = torch.Generator().manual_seed(0)
    a, b, m = (0.3 * torch.randn(shape, generator=draw) for shape in ((4, 32), (32, 4), (1, 32)))
    stem = f"lycoris_{name.replace('.', '_')}"
    tensors = {f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b, f"{stem}.dora_scale": m}
    save_file(tensors, tmp_path / "x.safetensors")
    found = extract(models[0] / "base", tmp_path / "x.safetensors", tmp_path / "lora", rank=32, device="cpu")[1]
    old = base.tensor(f"{name}.weight")
    new = m * (old + b @ a) / (old + b @ a).norm(dim=0)
    torch.testing.assert_close(found.adapter.delta(name), new - old, rtol=1e-4, atol=1e-5)


def test_a_lora_at_a_smaller_rank(models, tmp_path):
    folder, adapter = models
    from danceopd.adapters.write import write_adapter

    write_adapter(adapter, tmp_path / "given")
    file, found = extract(folder / "base", tmp_path / "given", tmp_path / "lora", rank=2, device="cpu")
    assert found.adapter.rank == 2 and 1e-3 < found.residual < 1
    assert inspect_adapter(file).record["extracted_from"] == "pytorch_lora_weights.safetensors"
    with pytest.raises(UserError, match="was trained on another base than .*tuned"):
        extract(folder / "tuned", file, tmp_path / "other")
    with pytest.raises(UserError, match="give the base's folder"):
        single = next((folder / "base" / "transformer").glob("*.safetensors"))
        extract(single, tmp_path / "given", tmp_path / "other")
