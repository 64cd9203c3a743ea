"""LoRA files as they are found: every layer's name, wrappers, fused layers, other adapters, and where alpha stands."""

from __future__ import annotations

import json
import logging
import re

import pytest
import torch
from lora_files import flat, klein_adapter, klein_transformer, refused, saved_base
from safetensors.torch import save_file
from tinies import TINYS

from danceopd.adapters.dialects import linear_sizes
from danceopd.adapters.export import distance
from danceopd.adapters.header import WEIGHTS
from danceopd.adapters.original_names import ARCHITECTURES
from danceopd.adapters.read import adapter_shapes, read_adapter
from danceopd.adapters.svd import full_factors, hadamard_factors, kronecker_factors
from danceopd.errors import UserError
from danceopd.models.base import empty_transformer
from danceopd.models.lora import Adapter

base = pytest.fixture(scope="module")(saved_base)
transformer = pytest.fixture(scope="module")(klein_transformer)
adapter = pytest.fixture(scope="module")(klein_adapter)
Q, K = "transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_k"


def pair(sizes, name: str, rank: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    into, out = sizes[name]
    return 0.3 * torch.randn(rank, into, generator=draw), 0.3 * torch.randn(out, rank, generator=draw)


@pytest.fixture(scope="module")
def two(transformer) -> Adapter:
    """An adapter of two layers."""
    sizes = linear_sizes(transformer)
    return Adapter({Q: pair(sizes, Q), K: pair(sizes, K, seed=1)})


def put(folder, tensors, name="x.safetensors", metadata=None):
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, folder / name, metadata)
    return folder / name


# Names

OWN_NAMES_ONLY = (  # their LoRAs are read in the names of diffusers, or by its converter
    "longcat-image", "bria-fibo", "hidream", "qwen-image-2.1",
)  # fmt: skip


@pytest.mark.parametrize("tiny", {tiny.family: tiny for tiny in reversed(TINYS)}.values(), ids=lambda t: t.family)
def test_every_linear_of_every_family_has_a_name_in_the_tables(tiny, tmp_path):
    tiny.build(tmp_path)
    model = empty_transformer(tmp_path)
    if tiny.family in OWN_NAMES_ONLY:
        assert type(model).__name__ not in ARCHITECTURES
        return
    names = ARCHITECTURES[type(model).__name__]
    sizes = linear_sizes(model)
    assert [name for name in sizes if not (names.is_own(name) and names.has(name))] == []
    pairs = {name: (torch.ones(1, into), torch.arange(out).float()[:, None]) for name, (into, out) in sizes.items()}
    if names.stacked:  # Qwen-Image's original names are diffusers'
        joined = names.join(pairs, sizes)
        back = {m: p for layer, (a, b) in joined.items() for m, p in names.split(layer, a, b, sizes).items()}
        assert Adapter(back).sha256 == Adapter(pairs).sha256


@pytest.mark.parametrize(
    "form",
    [
        "transformer._orig_mod.{}",
        "_orig_mod.{}",
        "module.{}",
        "base_model.model._orig_mod.{}",
        "module._orig_mod.{}",
        "base_model.model.module.{}",
        "transformer._fsdp_wrapped_module.{}",
        "diffusion_model.transformer.{}",
        "base_model.model.base_model.model.{}",
        "base_model.model.diffusion_model.{}",
        "transformer.transformer.{}",
        "model.diffusion_model.{}",
    ],
)
def test_wrappers_and_doubled_prefixes(transformer, two, tmp_path, form):
    file = put(tmp_path, flat(two, form))
    assert read_adapter(file, transformer).sha256 == two.sha256
    compiled = flat(two, form.format("{}"), ("lora_A.edit.v1", "lora_B.edit.v1"))  # PEFT's name of the adapter
    assert read_adapter(put(tmp_path / "named", compiled), transformer).sha256 == two.sha256


def test_a_compiled_block(transformer, two, tmp_path):
    tensors = {key.replace("blocks.0.", "blocks.0._orig_mod."): t for key, t in flat(two).items()}
    assert read_adapter(put(tmp_path, tensors), transformer).sha256 == two.sha256


@pytest.mark.parametrize("form", ["transformer.{}", "lora_unet_{}"])
def test_fused_projections_are_split(transformer, tmp_path, form):
    """As SimpleTuner saves them; alpha belongs to the fused layer."""
    tensors, wanted = {}, {}
    for seed, (fused, parts) in enumerate({"to_qkv": "to_{}", "to_added_qkv": "add_{}_proj"}.items()):
        a, b = pair({"x": (32, 96)}, "x", seed=seed)
        name = f"transformer_blocks.0.attn.{fused}"
        stem = form.format(name if "." in form else name.replace(".", "_"))
        tensors |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b, f"{stem}.alpha": torch.tensor(8.0)}
        wanted |= {f"transformer_blocks.0.attn.{parts.format(p)}": (a, 2 * rows) for p, rows in zip("qkv", b.chunk(3))}
    assert distance(Adapter(wanted), read_adapter(put(tmp_path, tensors), transformer)) < 1e-6


def test_xlabs_names_equal_the_stock_converter(tmp_path):
    from diffusers.loaders.lora_conversion_utils import _convert_xlabs_flux_lora_to_diffusers
    from tiny_flux1 import TINY

    model = TINY.build(tmp_path / "base").transformer
    width = model.transformer_blocks[0].attn.to_q.in_features
    layers = {f"double_blocks.0.processor.{n}": (width, k * width) for n, k in (("qkv_lora1", 3), ("proj_lora2", 1))}
    layers |= {"single_blocks.0.processor.qkv_lora": (width, 3 * width)}
    tensors = {}
    for seed, name in enumerate(layers):
        a, b = pair(layers, name, seed=seed)
        tensors |= {f"{name}.down.weight": a, f"{name}.up.weight": b}
    stock = _convert_xlabs_flux_lora_to_diffusers({k: t.clone() for k, t in tensors.items()})
    found = read_adapter(put(tmp_path, tensors), model)
    assert len(found) == len(stock) // 2 == 7
    for name, (a, b) in found.tensors.items():
        assert torch.equal(stock[f"transformer.{name}.lora_A.weight"], a)
        assert torch.equal(stock[f"transformer.{name}.lora_B.weight"], b)


@pytest.mark.parametrize("prefix", ["diffusion_model.", "base_model.model.", "lora_unet_"])
def test_flux2_last_modulation_as_in_a_whole_checkpoint(transformer, tmp_path, prefix, caplog, monkeypatch):
    """Its original has (shift, scale), diffusers (scale, shift); stock's LoRA converter does not exchange them."""
    from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers as whole

    monkeypatch.setattr(logging.getLogger("danceopd"), "propagate", True)
    a, b = pair(linear_sizes(transformer), "norm_out.linear")
    wanted = whole({"final_layer.adaLN_modulation.1.weight": b @ a})["norm_out.linear.weight"]
    name = "final_layer.adaLN_modulation.1"
    stem = prefix + (name.replace(".", "_") if prefix.endswith("_") else name)
    file = put(tmp_path, {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b})
    torch.testing.assert_close(read_adapter(file, transformer).delta("norm_out.linear"), wanted)
    assert "exchanges them" in caplog.text
    own = put(tmp_path / "own", flat(Adapter({"norm_out.linear": (a, b)})))
    torch.testing.assert_close(read_adapter(own, transformer).delta("norm_out.linear"), b @ a)
    if prefix != "lora_unet_":  # and without the model
        read = read_adapter(file, family="flux2-klein").delta("norm_out.linear")
        torch.testing.assert_close(read, wanted)


def test_sd3_last_context_block_is_exchanged_and_the_others_are_not(tmp_path):
    from diffusers import SD3Transformer2DModel

    with torch.device("meta"):
        model = SD3Transformer2DModel(
            num_layers=2, attention_head_dim=4, num_attention_heads=2, caption_projection_dim=8, joint_attention_dim=8
        )
    sizes, tensors, wanted = linear_sizes(model), {}, {}
    for number in (0, 1):
        name = f"transformer_blocks.{number}.norm1_context.linear"
        a, b = pair(sizes, name, seed=number)
        stem = f"lora_unet_joint_blocks_{number}_context_block_adaLN_modulation_1"
        tensors |= {f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b}
        wanted[name] = (a, b if number == 0 else torch.cat(b.chunk(2)[::-1]))
    assert [sizes[name][1] // 8 for name in wanted] == [6, 2]
    assert read_adapter(put(tmp_path, tensors), model).sha256 == Adapter(wanted).sha256


# Other kinds of adapters


def lokr(form: str, draw) -> tuple[dict[str, torch.Tensor], torch.Tensor, float]:
    """(tensors, their Kronecker product (32, 32), alpha / rank)."""
    r = lambda *shape: 0.3 * torch.randn(*shape, generator=draw)  # noqa: E731
    if form == "full":
        t = {"lokr_w1": r(4, 8), "lokr_w2": r(8, 4)}
        return t, torch.kron(t["lokr_w1"], t["lokr_w2"]), 1.0
    if form == "w2":
        t = {"lokr_w1": r(4, 4), "lokr_w2_a": r(8, 2), "lokr_w2_b": r(2, 8)}
        return t, torch.kron(t["lokr_w1"], t["lokr_w2_a"] @ t["lokr_w2_b"]), 3 / 2
    t = {"lokr_w1_a": r(4, 2), "lokr_w1_b": r(2, 4), "lokr_w2_a": r(8, 2), "lokr_w2_b": r(2, 8)}
    return t, torch.kron(t["lokr_w1_a"] @ t["lokr_w1_b"], t["lokr_w2_a"] @ t["lokr_w2_b"]), 3 / 2


@pytest.mark.parametrize("stem", [f"lycoris_{Q.replace('.', '_')}", f"transformer.{Q}", f"diffusion_model.{Q}"])
@pytest.mark.parametrize("form", ["full", "w2", "both"])
def test_lokr_is_read_as_the_lora_it_equals(transformer, tmp_path, stem, form):
    tensors, product, scale = lokr(form, torch.Generator().manual_seed(0))
    tensors = {f"{stem}.{part}": t for part, t in tensors.items()} | {f"{stem}.alpha": torch.tensor(3.0)}
    found = read_adapter(put(tmp_path, tensors), transformer)
    torch.testing.assert_close(found.delta(Q), scale * product)
    assert found.rank == {"full": 16, "w2": 8, "both": 4}[form]
    assert adapter_shapes(tmp_path, transformer).ranks == found.ranks


def test_lokr_of_a_fused_layer_as_ai_toolkit_saves_it(transformer, tmp_path):
    draw = torch.Generator().manual_seed(0)
    w1, w2 = torch.randn(4, 4, generator=draw), torch.randn(24, 8, generator=draw)
    stem = "diffusion_model.double_blocks.0.img_attn.qkv"
    found = read_adapter(
        put(tmp_path, {f"{stem}.lokr_w1": w1, f"{stem}.lokr_w2": w2, f"{stem}.alpha": torch.tensor(1e10)}), transformer
    )
    rows = torch.cat([found.delta(f"transformer_blocks.0.attn.to_{part}") for part in "qkv"])
    torch.testing.assert_close(rows, torch.kron(w1, w2))


@pytest.mark.parametrize("kind, rank", [("LoKr", 4), ("LoHa", 4), ("LoHa", 8), ("LoKr", 32)])
def test_lokr_and_loha_of_peft(transformer, tmp_path, kind, rank):
    """PEFT's own files: alpha stands in adapter_config.json."""
    import peft

    config = getattr(peft, f"{kind}Config")(r=rank, alpha=3, target_modules=["to_q"], init_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = peft.get_peft_model(klein_transformer(), config)
    model.save_pretrained(tmp_path)
    merged = model.merge_and_unload()
    found = read_adapter(tmp_path, transformer)
    assert len(found) == 2
    for name in found.tensors:
        wanted = merged.get_submodule(name).weight - transformer.get_submodule(name).weight
        torch.testing.assert_close(found.delta(name), wanted.detach(), rtol=1e-4, atol=1e-5)


def test_factors_are_exact():
    draw = torch.Generator().manual_seed(0)
    first, second = [(torch.randn(2, 6, generator=draw), torch.randn(8, 2, generator=draw)) for _ in range(2)]
    for make, wanted in (
        (kronecker_factors, torch.kron(first[1] @ first[0], second[1] @ second[0])),
        (hadamard_factors, (first[1] @ first[0]) * (second[1] @ second[0])),
    ):
        a, b = make(first, second)
        torch.testing.assert_close(b @ a, wanted)
        assert a.shape[0] == 4
    for shape in ((3, 5), (5, 3)):
        matrix = torch.randn(shape, generator=draw)
        a, b = full_factors(matrix)
        assert torch.equal(b @ a, matrix) and a.shape[0] == 3


@pytest.mark.parametrize(
    "tensors, says",
    [
        ({"lokr_w1": (4, 4)}, "lokr_w2 is missing"),
        ({"lokr_w1": (4, 4), "lokr_w2": (8, 8), "lokr_w2_a": (8, 2)}, "lokr_w2 is missing, or no matrix"),
        ({"lokr_w1": (4, 4), "lokr_w2_a": (8, 2), "lokr_w2_b": (3, 8)}, "do not multiply"),
        ({"lokr_w1": (4, 4), "lokr_w2": (4, 8)}, "another size"),
        ({"lokr_w1": (4, 4), "lokr_t2": (8, 8, 3, 3)}, "LoKr of convolutions"),
        ({"hada_w1_a": (32, 2), "hada_w1_b": (2, 32), "hada_w2_a": (31, 2), "hada_w2_b": (2, 32)}, "its halves map"),
        ({"oft_blocks": (4, 8, 8)}, "is an adapter of the kind OFT"),
        ({"lokr_w1": (4, 4), "lokr_w2": (8, 8), "lora_A.weight": (2, 32), "lora_B.weight": (32, 2)}, "two kinds"),
    ],
)
def test_refuses_other_adapters_that_do_not_fit(transformer, tmp_path, tensors, says):
    file = put(tmp_path, {f"transformer.{Q}.{part}": torch.ones(shape) for part, shape in tensors.items()})
    refused(file, says, transformer=transformer)
    with pytest.raises(UserError, match=says):
        adapter_shapes(file, transformer)


# Where alpha stands


def folder_with(tmp_path, adapter, config, form="base_model.model.{}", name="adapter_model.safetensors"):
    put(tmp_path, flat(adapter, form), name)
    (tmp_path / "adapter_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return tmp_path


CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}


@pytest.mark.parametrize("form", ["base_model.model.{}", "transformer.{}", "{}"])
def test_a_configuration_beside_the_file_scales_it(transformer, two, tmp_path, form, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("danceopd"), "propagate", True)
    found = read_adapter(folder_with(tmp_path, two, CONFIG, form), transformer)
    torch.testing.assert_close(found.delta(Q), 2 * two.delta(Q))
    assert ("adapter_config.json" in caplog.text) == (form != "base_model.model.{}")  # stock reads it there only


@pytest.mark.parametrize(
    "metadata, scale",
    [
        ({"lora_config": json.dumps({"r": 4, "lora_alpha": 2})}, 0.5),
        ({"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 16})}, 4.0),
        ({"ss_network_dim": "4", "ss_network_alpha": "1.0"}, 0.25),
        ({"ss_network_dim": "None", "ss_network_alpha": "None"}, 1.0),
        ({"lora_config": json.dumps({"r": 4, "lora_alpha": 8, "use_rslora": True})}, 4.0),
        ({"lora_config": json.dumps({"r": 4, "lora_alpha": 8, "alpha_pattern": {r"^.*blocks\.0.*to_q": 4}})}, 1.0),
    ],
)
def test_alpha_in_the_metadata_is_used(transformer, two, tmp_path, metadata, scale):
    tensors = flat(two)
    if "ss_network_dim" in metadata:
        kohya = Adapter({f"lora_unet_{name.replace('.', '_')}": pair for name, pair in two.tensors.items()})
        tensors = flat(kohya, "{}", ("lora_down", "lora_up"))
    found = read_adapter(put(tmp_path, tensors, metadata=metadata), transformer)
    torch.testing.assert_close(found.delta(Q), scale * two.delta(Q))


def test_alpha_tensors_win_over_the_metadata(transformer, two, tmp_path):
    tensors = flat(two) | {f"transformer.{name}.alpha": torch.tensor(4.0) for name in two.tensors}
    file = put(tmp_path, tensors, metadata={"lora_config": json.dumps({"r": 4, "lora_alpha": 99})})
    assert read_adapter(file, transformer).sha256 == two.sha256


BROKEN = {
    "git-lfs pointer": "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 800\n",
    "cannot be read as JSON": '{"r": 4, "lora_',
    "no JSON object": "[1]",
    "as JSON": "[" * 100_000,
    "r 'four', which is no number": {**CONFIG, "r": "four"},
    r"r \[4\], which is no number": {**CONFIG, "r": [4]},
    "lora_alpha True": {**CONFIG, "lora_alpha": True},
    r"lora_alpha \[8\]": {**CONFIG, "lora_alpha": [8]},
    "lora_alpha inf": '{"r": 4, "lora_alpha": 1e400}',
    "alpha is 0": {**CONFIG, "lora_alpha": 0},
    "alpha is -8": {**CONFIG, "lora_alpha": -8},
    "rank_pattern that is no map": {**CONFIG, "rank_pattern": ["a"]},
    "alpha_pattern that is no map": {**CONFIG, "alpha_pattern": {"a": "b"}},
    "'\\(', which is no regular expression": {**CONFIG, "rank_pattern": {"(": 4}},
    "takes too long": {**CONFIG, "alpha_pattern": {r"(?:\w|\w\w|\w\w\w|\.|\w\.|\.\w|\w\.\w)+[XYZ]": 4}},
    "says rank 8 and its tensors say 4": {**CONFIG, "r": 8},
    "has no lora_alpha": {"peft_type": "LORA", "r": 4},
    "has no alpha, ": {"peft_type": "LOHA", "r": 4},
    "has no lora_alpha, ": {},
    "DoRA, and the file has no magnitudes": {**CONFIG, "use_dora": True},
    "of a IA3 adapter": {**CONFIG, "peft_type": "IA3"},
    "fan_in_fan_out": {**CONFIG, "fan_in_fan_out": True},
} | {
    f"init_lora_weights '{start}'": {**CONFIG, "init_lora_weights": start}
    for start in ("pissa", "pissa_niter_4", "olora", "loftq", "corda", "lora_ga")
}


@pytest.mark.parametrize("says", BROKEN)
def test_refuses_a_configuration_that_is_broken_or_of_another_kind(transformer, two, tmp_path, says):
    config = BROKEN[says]
    folder = folder_with(tmp_path, two, config)
    for read in (read_adapter, adapter_shapes):  # a plan refuses what a merge refuses
        with pytest.raises(UserError, match=says) as caught:
            read(folder, transformer)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500 and "; " in str(caught.value)
    if isinstance(config, dict) and "peft_type" in config and "rank_pattern" not in config:
        inside = {f"transformer.{key}": value for key, value in config.items()}
        file = put(tmp_path / "in", flat(two), metadata={"lora_adapter_metadata": json.dumps(inside)})
        refused(file, says, transformer=transformer)


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal"])
def test_other_beginnings_are_plain_loras(transformer, two, tmp_path, start):
    folder = folder_with(tmp_path, two, {**CONFIG, "init_lora_weights": start})
    torch.testing.assert_close(read_adapter(folder, transformer).delta(Q), 2 * two.delta(Q))


# Which file


def test_shards_are_refused_one_and_all(transformer, two, tmp_path):
    tensors, names = flat(two), [f"pytorch_lora_weights-0000{i}-of-00002.safetensors" for i in (1, 2)]
    keys = sorted(tensors)
    for name, held in zip(names, (keys[:2], keys[2:])):
        put(tmp_path, {key: tensors[key] for key in held}, name)
    refused(tmp_path / names[0], "one of 2 shards", "load_file", transformer=transformer)
    with pytest.raises(UserError, match="one of 2 shards"):
        read_adapter(tmp_path, transformer)
    (tmp_path / names[1]).unlink()  # and one that was downloaded alone
    with pytest.raises(UserError, match="one of 2 shards"):
        read_adapter(tmp_path, transformer)
    half = put(tmp_path / "other", {key: tensors[key] for key in keys[:2]}, "half.safetensors")
    index = tmp_path / "other" / "half.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {keys[0]: "half.safetensors", keys[2]: "rest.safetensors"}}))
    refused(half, "one of 2 shards", transformer=transformer)
    index.write_text("{")
    refused(half, "cannot be read", transformer=transformer)
    whole = put(tmp_path / "one", tensors, "pytorch_lora_weights-00001-of-00001.safetensors")
    assert read_adapter(whole, transformer).sha256 == two.sha256


def test_a_peft_folder_says_which_file(transformer, two, tmp_path):
    folder = folder_with(tmp_path / "run" / "default", two, CONFIG)
    put(folder, {"exp_avg": torch.ones(2)}, "optimizer.safetensors")
    torch.testing.assert_close(read_adapter(folder, transformer).delta(Q), 2 * two.delta(Q))
    with pytest.raises(UserError, match="name one: .*default"):
        read_adapter(tmp_path / "run", transformer)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / WEIGHTS).symlink_to("gone")
    with pytest.raises(UserError, match="cannot be opened"):
        read_adapter(tmp_path / "broken", transformer)


# What is dropped, and what is left out


@pytest.mark.parametrize(
    "encoder",
    [
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1",
        "text_encoder.layers.0.q",
    ],
)
def test_a_text_encoder_part_is_dropped_if_asked_for(transformer, two, tmp_path, encoder, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("danceopd"), "propagate", True)
    extra = {f"{encoder}.lora_{half}.weight": torch.ones(1, 1) for half in ("down", "up")}
    file = put(tmp_path, flat(two) | extra | {f"{encoder}.alpha": torch.tensor(1.0)})
    refused(file, "text encoder", "--drop text-encoder", transformer=transformer)
    assert read_adapter(file, transformer, drop=["text-encoder"]).sha256 == two.sha256
    assert "1 text-encoder layers are dropped" in caplog.text
    with pytest.raises(UserError, match="known: text-encoder"):
        read_adapter(file, transformer, drop=["encoder"])
    with pytest.raises(UserError, match="text encoders only"):
        read_adapter(put(tmp_path, extra), transformer, drop=["text-encoder"])


def test_layers_are_left_out_by_either_name(transformer, two, tmp_path):
    odd = {f"transformer.not_here.lora_{half}.weight": torch.ones(2, 2) for half in "AB"}
    file = put(tmp_path, flat(two) | odd)
    refused(file, "does not have", "--leave-out", transformer=transformer)
    assert read_adapter(file, transformer, leave_out=["not_here"]).sha256 == two.sha256
    assert list(read_adapter(file, transformer, leave_out=["not_*", "*.to_k"]).tensors) == [Q]
    with pytest.raises(UserError, match="no layer to_qq to leave out"):
        read_adapter(file, transformer, leave_out=["not_here", "to_qq"])
    with pytest.raises(UserError, match="but those left out"):
        read_adapter(file, transformer, leave_out=["*"])


def test_zero_differences_of_biases_change_nothing(transformer, two, tmp_path):
    extra = {f"transformer.{Q}.diff_b": torch.zeros(32), "transformer.norm.w_norm": torch.zeros(2)}
    assert read_adapter(put(tmp_path, flat(two) | extra), transformer).sha256 == two.sha256
    for key in (f"{Q}.diff_b", f"{Q}.lora_B.bias"):
        refused(put(tmp_path, flat(two) | {key: torch.ones(32)}), "belong to no LoRA layer", transformer=transformer)
    refused(put(tmp_path, flat(two) | {f"{Q}.set_weight": torch.zeros(32)}), "set_weight", transformer=transformer)


# Numbers


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.int64])
def test_refuses_integers(transformer, two, tmp_path, dtype):
    tensors = flat(two)
    tensors[f"transformer.{Q}.lora_A.weight"] = torch.ones(4, 32, dtype=dtype)
    refused(put(tmp_path, tensors), "other numbers than floats", "to_q", transformer=transformer)
    with pytest.raises(UserError, match="than floats"):
        adapter_shapes(tmp_path, transformer)


def test_an_integer_alpha_is_a_number(transformer, two, tmp_path):
    tensors = flat(two) | {f"transformer.{name}.alpha": torch.tensor(8) for name in two.tensors}
    torch.testing.assert_close(read_adapter(put(tmp_path, tensors), transformer).delta(Q), 2 * two.delta(Q))


def header_with(tmp_path, **over) -> str:
    """What is said of a file whose first entry is changed so."""
    file = put(tmp_path, {f"x.lora_{half}.weight": torch.ones(2, 2) for half in "AB"})
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    name = over.pop("name", "x.lora_A.weight")
    header[name] = header.pop("x.lora_A.weight") | over
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length :])
    return refused(file, "damaged|header cannot be read")


@pytest.mark.parametrize(
    "over",
    [
        {"shape": [-2, 2]},
        {"shape": [2**40, 2**40]},
        {"shape": [2**70, 1]},
        {"shape": [2.5, 2]},
        {"shape": [2, 3]},
        {"dtype": "Q4_K"},
        {"dtype": 5},
        {"data_offsets": [16, 0]},
        {"data_offsets": [-16, 16]},
        {"name": "k" * 1_000_000},
        {"name": "x\x1b[31m.lora_A.weight"},
        {"name": "x\n\nerror: fake"},
    ],
)
def test_a_hostile_header_is_one_short_sentence(tmp_path, over):
    assert re.fullmatch(r"[^\x00-\x1f]{1,400}", header_with(tmp_path, **over))
