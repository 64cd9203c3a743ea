"""LoRA files: every dialect against the stock loader, and every refusal in one sentence."""

import json
import logging
import os
import re
import resource
import struct
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import random_adapter, tiny_klein

from danceopd.adapters.header import inspect_adapter
from danceopd.adapters.read import read_adapter
from danceopd.adapters.write import write_adapter
from danceopd.errors import UserError
from danceopd.models.lora import Adapter

WEIGHTS = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_klein(folder)
    return folder


@pytest.fixture(scope="module")
def transformer():
    return tiny_klein().transformer


@pytest.fixture(scope="module")
def adapter(transformer) -> Adapter:
    return random_adapter(transformer, rank=4, seed=1)


def probe(transformer) -> torch.Tensor:
    """The transformer's output on fixed random inputs: 2 rows, 16 tokens, 5 words."""
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        return transformer(
            hidden_states=torch.randn(2, 16, 32, generator=draw),
            encoder_hidden_states=torch.randn(2, 5, 48, generator=draw),
            timestep=torch.tensor([0.3, 0.9]),
            img_ids=torch.cartesian_prod(*map(torch.arange, (1, 4, 4, 1))).expand(2, -1, -1),
            txt_ids=torch.cartesian_prod(*map(torch.arange, (1, 1, 1, 5))).expand(2, -1, -1),
            return_dict=False,
        )[0]


def merged(transformer, adapter: Adapter) -> torch.Tensor:
    """The oracle by hand: the same probe with W + BA written into a copy's weights."""
    copy = deepcopy(transformer)
    with torch.no_grad():
        for name in adapter.tensors:
            copy.get_submodule(name).weight += adapter.delta(name)
    return probe(copy)


def stock(base: Path, file: Path) -> torch.Tensor:
    """The probe through stock diffusers: from_pretrained, load_lora_weights."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(base)
    pipe.load_lora_weights(file)
    return probe(pipe.transformer)


def refused(path, *says: str, transformer=None, family=None) -> str:
    with pytest.raises(UserError) as caught:
        read_adapter(path, transformer, family)
    sentence = str(caught.value)
    for part in (Path(path).name, *says):
        assert re.search(part, sentence), f"{part!r} is not in {sentence!r}"
    assert "\n" not in sentence and len(sentence) < 600 and "; " in sentence
    return sentence


def flat(adapter: Adapter, form: str = "transformer.{}", halves=("lora_A", "lora_B")) -> dict[str, torch.Tensor]:
    return {
        f"{form.format(name)}.{half}.weight": tensor.clone()
        for name, pair in adapter.tensors.items()
        for half, tensor in zip(halves, pair)
    }


def original_names(transformer) -> dict[str, torch.Tensor]:
    """{original FLUX.2 layer: (A, B)} for a double and a single block, as ai-toolkit and kohya name them."""
    draw = torch.Generator().manual_seed(3)
    block, single = transformer.transformer_blocks[1], transformer.single_transformer_blocks[0]
    width = block.attn.to_q.in_features
    sizes = {
        "double_blocks.1.img_attn.qkv": (width, 3 * width),
        "double_blocks.1.txt_attn.qkv": (width, 3 * width),
        "double_blocks.1.img_attn.proj": (width, width),
        "double_blocks.1.txt_attn.proj": (width, width),
        "double_blocks.1.img_mlp.0": (block.ff.linear_in.in_features, block.ff.linear_in.out_features),
        "double_blocks.1.txt_mlp.2": (
            block.ff_context.linear_out.in_features,
            block.ff_context.linear_out.out_features,
        ),
        "single_blocks.0.linear1": (
            single.attn.to_qkv_mlp_proj.in_features,
            single.attn.to_qkv_mlp_proj.out_features,
        ),
        "single_blocks.0.linear2": (single.attn.to_out.in_features, single.attn.to_out.out_features),
    }
    return {
        name: (0.3 * torch.randn(4, i, generator=draw), 0.3 * torch.randn(o, 4, generator=draw))
        for name, (i, o) in sizes.items()
    }


# The adapter itself


def test_adapter_counts_hashes_and_multiplies():
    a, b = torch.randn(2, 5), torch.randn(3, 2)
    one = Adapter({"y": (a, b), "x": (a[:1], b[:, :1])})
    assert (one.rank, one.ranks, one.parameters, len(one)) == (2, {"x": 1, "y": 2}, 24, 2)
    assert torch.equal(one.delta("y"), b @ a)
    assert one.sha256 == Adapter({"x": (a[:1], b[:, :1]), "y": (a, b)}).sha256
    assert one.sha256 != Adapter({"y": (a, b), "z": (a[:1], b[:, :1])}).sha256
    assert one.sha256 != Adapter({"y": (a + 1e-6, b), "x": (a[:1], b[:, :1])}).sha256
    with pytest.raises(ValueError, match="y"):
        Adapter({"y": (a, b.T)})


def test_adapter_to_rounds_and_copies():
    one = Adapter({"y": (torch.randn(2, 5), torch.randn(3, 2))})
    low = one.to(dtype=torch.bfloat16)
    assert low.tensors["y"][0].dtype == torch.float32
    assert torch.equal(low.tensors["y"][0], one.tensors["y"][0].bfloat16().float())
    copy = one.to()
    copy.tensors["y"][0].zero_()
    assert one.tensors["y"][0].abs().min() > 0


# Writing, and what stock diffusers makes of it


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_through_the_stock_pipeline(base, transformer, adapter, tmp_path, dtype):
    write_adapter(adapter, tmp_path, dtype)
    ours = merged(transformer, adapter.to(dtype=dtype))
    assert (stock(base, tmp_path) - ours).abs().max() <= 1e-5 * ours.abs().max()
    assert (ours - probe(transformer)).abs().max() > 0.01 * ours.abs().max()
    back = read_adapter(tmp_path, transformer)
    assert back.sha256 == adapter.to(dtype=dtype).sha256


def test_ranks_may_differ_between_modules(base, transformer, tmp_path):
    pairs = random_adapter(transformer, rank=4).tensors
    mixed = Adapter({name: (a[: 1 + i % 4], b[:, : 1 + i % 4]) for i, (name, (a, b)) in enumerate(pairs.items())})
    write_adapter(mixed, tmp_path)
    assert read_adapter(tmp_path, transformer).ranks == mixed.ranks
    torch.testing.assert_close(stock(base, tmp_path), merged(transformer, mixed), rtol=1e-5, atol=1e-5)


def test_same_adapter_same_bytes(adapter, tmp_path):
    notes = {f"key{i}": "x" for i in range(8)}
    files = [write_adapter(adapter, tmp_path / str(i), metadata=notes).read_bytes() for i in range(4)]
    assert len(set(files)) == 1


def test_keys_metadata_and_header_without_weights(adapter, tmp_path):
    file = write_adapter(adapter, tmp_path, torch.bfloat16, {"base": "abc"})
    assert file == tmp_path / WEIGHTS and os.listdir(tmp_path) == [WEIGHTS]
    header = inspect_adapter(tmp_path)
    assert (header.dialect, header.rank, header.dtypes, len(header.ranks)) == (
        "diffusers",
        4,
        ("BF16",),
        len(adapter),
    )
    assert header.record == {
        "base": "abc",
        "modules": len(adapter),
        "sha256": adapter.to(dtype=torch.bfloat16).sha256,
    }
    assert header.shapes["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"] == (4, 32)
    with safe_open(str(file), "pt") as opened:
        assert set(header.shapes) == set(opened.keys())


def test_writing_refuses_nonsense(adapter, tmp_path):
    with pytest.raises(ValueError, match="strings"):
        write_adapter(adapter, tmp_path, metadata={"steps": 3})
    with pytest.raises(ValueError, match="without layers"):
        write_adapter(Adapter({}), tmp_path)
    with pytest.raises(ValueError, match="NaN or infinite"):
        write_adapter(Adapter({"x": (torch.full((1, 2), 1e30), torch.ones(2, 1))}), tmp_path, torch.float16)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_file_whole(adapter, tmp_path):
    """The kernel itself cuts the write short: files may not pass 8 KiB."""
    file = write_adapter(Adapter({"x": (torch.ones(1, 2), torch.ones(2, 1))}), tmp_path)
    before = file.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        with pytest.raises(UserError, match=f"{WEIGHTS}.*too large"):
            write_adapter(adapter, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == before and os.listdir(tmp_path) == [WEIGHTS]


def test_a_folder_that_is_a_file_is_a_sentence(adapter, tmp_path):
    (tmp_path / "student").write_text("mine")
    with pytest.raises(UserError, match="cannot write"):
        write_adapter(adapter, tmp_path / "student")
    assert (tmp_path / "student").read_text() == "mine"


# Dialects


@pytest.mark.parametrize(
    "form, halves",
    [
        ("transformer.{}", ("lora_A", "lora_B")),
        ("base_model.model.{}", ("lora_A", "lora_B")),
        ("base_model.model.{}", ("lora_A.default", "lora_B.default")),
        ("diffusion_model.{}", ("lora_A", "lora_B")),
        ("{}", ("lora_A", "lora_B")),
        ("flat", ("lora_down", "lora_up")),
    ],
)
def test_module_paths_under_any_prefix(transformer, adapter, tmp_path, form, halves):
    tensors = flat(adapter, "transformer.{}" if form == "flat" else form, halves)
    if form == "flat":
        tensors = {
            re.sub(
                r"^transformer\.(.*)\.(lora_\w+\.weight)$",
                lambda m: f"lora_unet_{m[1].replace('.', '_')}.{m[2]}",
                key,
            ): tensor
            for key, tensor in tensors.items()
        }
    save_file(tensors, tmp_path / "x.safetensors")
    assert read_adapter(tmp_path, transformer).sha256 == adapter.sha256


@pytest.mark.parametrize("dialect, alpha", [("comfyui", None), ("kohya", None), ("kohya", 2.0)])
def test_original_names_equal_the_stock_loader(base, transformer, tmp_path, dialect, alpha):
    tensors = {}
    for name, (a, b) in original_names(transformer).items():
        stem = f"diffusion_model.{name}" if dialect == "comfyui" else "lora_unet_" + name.replace(".", "_")
        down, up = ("lora_A", "lora_B") if dialect == "comfyui" else ("lora_down", "lora_up")
        tensors |= {f"{stem}.{down}.weight": a, f"{stem}.{up}.weight": b}
        if alpha:
            tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    save_file(tensors, tmp_path / "other.safetensors")
    ours = read_adapter(tmp_path / "other.safetensors", transformer)
    assert inspect_adapter(tmp_path).dialect == dialect
    assert len(ours) == 12  # two fused qkv become six
    torch.testing.assert_close(stock(base, tmp_path), merged(transformer, ours), rtol=1e-5, atol=1e-5)
    assert (merged(transformer, ours) - probe(transformer)).abs().max() > 1e-2
    assert read_adapter(tmp_path, family="flux2-klein").sha256 == ours.sha256


def test_comfyui_alpha_is_folded(transformer, tmp_path):
    """Stock diffusers refuses such a file."""
    pairs = original_names(transformer)
    plain = {f"diffusion_model.{n}.lora_{h}.weight": t for n, p in pairs.items() for h, t in zip("AB", p)}
    save_file(plain, tmp_path / "plain.safetensors")
    save_file(
        plain | {f"diffusion_model.{n}.alpha": torch.tensor(8.0) for n in pairs},
        tmp_path / "alpha.safetensors",
    )
    one, two = (read_adapter(tmp_path / f"{n}.safetensors", transformer) for n in ("plain", "alpha"))
    for name in one.tensors:
        torch.testing.assert_close(two.delta(name), 2 * one.delta(name))


@pytest.mark.parametrize("rslora", [False, True])
def test_diffusers_metadata_scales_as_the_stock_loader_does(base, transformer, tmp_path, rslora):
    """A file as diffusers' save_lora_weights leaves it: alpha in its metadata, with a pattern."""
    from diffusers import Flux2KleinPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    copy = deepcopy(transformer)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["to_q", "to_k"],
        alpha_pattern={"to_k": 3},
        use_rslora=rslora,
        rank_pattern={"to_k": 2},
        init_lora_weights=False,
    )
    copy.add_adapter(config, "default")
    metadata = {k: list(v) if isinstance(v, set) else v for k, v in copy.peft_config["default"].to_dict().items()}
    Flux2KleinPipeline.save_lora_weights(
        tmp_path,
        get_peft_model_state_dict(copy, adapter_name="default"),
        transformer_lora_adapter_metadata=metadata,
    )
    ours = read_adapter(tmp_path, transformer)
    assert set(ours.ranks.values()) == {2, 4}
    torch.testing.assert_close(probe(copy), merged(transformer, ours), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stock(base, tmp_path), merged(transformer, ours), rtol=1e-5, atol=1e-5)
    assert read_adapter(tmp_path, copy).sha256 == ours.sha256  # through a transformer that wears adapters


def test_a_peft_folder_brings_its_alpha(transformer, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        deepcopy(transformer),
        LoraConfig(r=4, lora_alpha=16, target_modules=["to_q"], init_lora_weights=False),
    )
    model.save_pretrained(tmp_path)
    ours = read_adapter(tmp_path, transformer)
    torch.testing.assert_close(probe(model.base_model.model), merged(transformer, ours), rtol=1e-5, atol=1e-5)
    assert inspect_adapter(tmp_path).dialect == "peft"


def test_a_transformer_on_the_meta_device_will_do(transformer, adapter, tmp_path):
    write_adapter(adapter, tmp_path)
    with torch.device("meta"):
        empty = type(transformer).from_config(transformer.config)
    assert read_adapter(tmp_path, empty).sha256 == adapter.sha256


# Refusals: the path


def test_refuses_paths(tmp_path, base):
    refused(tmp_path / "nowhere", "does not exist")
    refused(tmp_path, "holds no safetensors file", WEIGHTS)
    refused(base, "whole pipeline")
    (tmp_path / "pytorch_lora_weights.bin").write_bytes(b"\x80\x04evil")
    refused(tmp_path, "pytorch_lora_weights.bin", "unpickled")
    refused(tmp_path / "pytorch_lora_weights.bin", "pickle")
    torch.save({"x": torch.ones(1)}, tmp_path / "renamed.safetensors")
    refused(tmp_path / "renamed.safetensors", "pickle")
    (tmp_path / "b.safetensors").write_bytes(b"")
    refused(tmp_path, "2 safetensors files", "b.safetensors")


def test_refuses_damaged_files(adapter, tmp_path):
    whole = write_adapter(adapter, tmp_path).read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    file = tmp_path / "bad.safetensors"

    def is_refused(content: bytes, *says: str) -> None:
        file.write_bytes(content)
        refused(file, *says)

    is_refused(b"", "empty")
    is_refused(whole[:5], "not a safetensors file")
    is_refused(whole[: 8 + length // 2], "cut off inside its header")
    is_refused(whole[:-7], "cut off", "promises")
    is_refused(whole + b"more", "damaged")
    is_refused(b"<!DOCTYPE html><html>not found</html>", "not a safetensors file")
    is_refused(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer")
    is_refused(struct.pack("<Q", 9) + b'{"a": 12}', "header cannot be read")
    is_refused(struct.pack("<Q", 4) + b"[1]\n", "header cannot be read")
    is_refused(struct.pack("<Q", 2) + b"{}", "no tensors")
    middle = json.loads(whole[8 : 8 + length])
    first = min((v for k, v in middle.items() if k != "__metadata__"), key=lambda v: v["data_offsets"][0])
    first["shape"][0] += 1
    text = json.dumps(middle).encode()
    is_refused(struct.pack("<Q", len(text)) + text + whole[8 + length :], "cannot be read")


def test_a_header_that_begins_like_a_pickle_is_read(adapter, tmp_path):
    """640 bytes of header make the file begin with 0x80 0x02, as a pickle does."""
    save_file({f"x.lora_{half}.weight": torch.ones(2, 2) for half in "AB"}, tmp_path / "x.safetensors")
    whole = (tmp_path / "x.safetensors").read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    for size in (640, 1152):
        header = whole[8 : 8 + length].ljust(size)
        (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", size) + header + whole[8 + length :])
        assert len(read_adapter(tmp_path / "x.safetensors")) == 1


def test_a_lora_beside_a_pipeline_is_found(adapter, tmp_path):
    write_adapter(adapter, tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    assert read_adapter(tmp_path).sha256 == adapter.sha256


# Refusals: what is in the file


def changed(adapter, tmp_path, change) -> Path:
    """A foreign file (no metadata of ours) with `change` made to its tensors."""
    tensors = flat(adapter)
    change(tensors)
    save_file(tensors, tmp_path / "teacher.safetensors")
    return tmp_path / "teacher.safetensors"


Q = "transformer.transformer_blocks.0.attn.to_q"


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda t: t.pop(f"{Q}.lora_A.weight"), ("incomplete: 1 of", "B without A", "blocks.0.attn.to_q")),
        (lambda t: t.pop(f"{Q}.lora_B.weight"), ("incomplete: 1 of", "A without B", "blocks.0.attn.to_q")),
        (lambda t: t.update({f"{Q}.alpha": torch.tensor(0.0)}), ("to_q cannot be scaled", "alpha is 0")),
        (lambda t: t.update({f"{Q}.alpha": torch.ones(2)}), ("to_q.alpha", "not one number")),
        (
            lambda t: t.update({"transformer.gone.alpha": torch.tensor(1.0)}),
            ("alpha but no matrices", "gone"),
        ),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(3, 32)}), (r"\(3, 32\)", "to_q", "rank")),
        (
            lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(4, 31)}),
            ("another size", "31 to 32", "32 to 32"),
        ),
        (lambda t: t[f"{Q}.lora_A.weight"].fill_(torch.nan), ("NaN or infinite", "blocks.0.attn.to_q")),
        (lambda t: t[f"{Q}.lora_B.weight"].fill_(torch.inf), ("NaN or infinite", "blocks.0.attn.to_q")),
        (
            lambda t: t.update({"transformer.norm.weight": torch.ones(2)}),
            ("1 tensors that belong", "norm.weight"),
        ),
        (lambda t: t.update({f"{Q}.lora_B.bias": torch.ones(32)}), ("1 tensors that belong", "lora_B.bias")),
        (
            lambda t: t.update({f"text_encoder.x.lora_{h}.weight": torch.ones(1, 1) for h in "AB"}),
            ("text encoder", "text_encoder.x.lora_A"),
        ),
        (
            lambda t: t.update({"lora_te1_text_model_x.lora_down.weight": torch.ones(1, 1)}),
            ("text encoder", "lora_te1"),
        ),
        (lambda t: t.update({f"{Q}.dora_scale": torch.ones(32)}), ("DoRA", "to_q.dora_scale")),
        (lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(32)}), ("DoRA",)),
        (lambda t: t.update({f"{Q}.lokr_w1": torch.ones(2, 2)}), ("LoKr",)),
        (
            lambda t: t.update(
                {
                    f"transformer.transformer_blocks.9.attn.to_q.lora_{h}.weight": t[f"{Q}.lora_{h}.weight"].clone()
                    for h in "AB"
                }
            ),
            ("1 layers of its", "does not have", r"blocks\.9\.attn\.to_q", "Flux2Transformer2DModel"),
        ),
        (
            lambda t: t.update(
                {
                    f"diffusion_model.transformer_blocks.0.attn.to_q.lora_{h}.weight": t[f"{Q}.lora_{h}.weight"].clone()
                    for h in "AB"
                }
            ),
            ("twice", r"blocks\.0\.attn\.to_q"),
        ),
        (
            lambda t: t.update({f"{Q}.lora_A.other.weight": t[f"{Q}.lora_A.weight"].clone()}),
            ("twice", "to_q"),
        ),
    ],
)
def test_refuses_a_changed_tensor(transformer, adapter, tmp_path, change, says):
    file = changed(adapter, tmp_path, lambda tensors: None)
    assert read_adapter(file, transformer).sha256 == adapter.sha256
    refused(changed(adapter, tmp_path, change), *says, transformer=transformer)


def test_names_three_and_counts_the_rest(transformer, adapter, tmp_path):
    file = changed(
        adapter,
        tmp_path,
        lambda t: [t.pop(k) for k in list(t) if k.endswith("to_q.lora_A.weight") or k.endswith("to_k.lora_A.weight")],
    )
    sentence = refused(file, "and 1 more", transformer=transformer)
    assert len(re.findall(r"\.to_[qk]\b", sentence)) == 3


def test_refuses_another_architecture(transformer, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    pair = {"lora_A": torch.ones(2, 8), "lora_B": torch.ones(8, 2)}
    save_file(
        {f"transformer.layers.0.attention.to_q.{h}.weight": t for h, t in pair.items()},
        tmp_path / "z.safetensors",
    )
    refused(tmp_path / "z.safetensors", "another architecture", "none of its 1", transformer=transformer)
    assert not caplog.records  # diffusers would warn of every key it does not know
    save_file({f"transformer_blocks.0.to_q.{h}.weight": t for h, t in pair.items()}, tmp_path / "p.safetensors")
    refused(tmp_path / "p.safetensors", "another architecture", transformer=transformer)
    save_file({f"lora_unet_down_blocks_0_{h}.weight": t for h, t in pair.items()}, tmp_path / "sd.safetensors")
    refused(tmp_path / "sd.safetensors", "not a LoRA")
    save_file({"conv.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    refused(tmp_path / "model.safetensors", "not a LoRA", "conv.weight")


def test_refuses_a_wider_base(transformer, adapter, tmp_path):
    wide = Adapter({n: (torch.cat([a, a], 1), torch.cat([b, b])) for n, (a, b) in adapter.tensors.items()})
    write_adapter(wide, tmp_path)
    refused(
        tmp_path,
        "another size of Flux2Transformer2DModel",
        f"{len(adapter)} of {len(adapter)} layers differ",
        transformer=transformer,
    )


def test_a_converter_that_drops_a_layer_is_seen(transformer, tmp_path):
    """diffusers only warns about kohya keys it does not know; here they are refused."""
    tensors = {}
    for name, (a, b) in original_names(transformer).items():
        stem = "lora_unet_" + name.replace(".", "_")
        tensors |= {f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b}
    extra = {f"lora_unet_double_blocks_0_img_mod_lin.lora_{h}.weight": torch.ones(2, 2) for h in ("down", "up")}
    save_file(tensors | extra, tmp_path / "k.safetensors")
    refused(tmp_path / "k.safetensors", "1 layers of its 9", "img_mod_lin", transformer=transformer)


def test_foreign_names_need_to_know_the_model(transformer, tmp_path):
    pairs = original_names(transformer)
    save_file(
        {f"diffusion_model.{n}.lora_{h}.weight": t for n, p in pairs.items() for h, t in zip("AB", p)},
        tmp_path / "x.safetensors",
    )
    refused(tmp_path / "x.safetensors", "comfyui", "name its base or its family")
    refused(tmp_path / "x.safetensors", "name its base or its family", family="no-such-family")


def test_refuses_a_configuration_that_contradicts(transformer, adapter, tmp_path):
    def save(**config):
        save_file(flat(adapter), tmp_path / "c.safetensors", {"lora_adapter_metadata": json.dumps(config)})

    save(**{"transformer.r": 8, "transformer.lora_alpha": 8})
    refused(tmp_path / "c.safetensors", "configuration says rank 8 and its tensors say 4", transformer=transformer)
    save(**{"transformer.r": 4, "transformer.lora_alpha": -1})
    refused(tmp_path / "c.safetensors", "alpha is -1", transformer=transformer)
    save(**{"transformer.r": 4, "transformer.use_dora": True})
    refused(tmp_path / "c.safetensors", "DoRA", transformer=transformer)


def test_our_own_files_know_how_many_layers_they_hold(transformer, adapter, tmp_path):
    file = write_adapter(adapter, tmp_path)
    metadata = inspect_adapter(file).metadata
    tensors = load_file(file)
    fewer = {key: tensor for key, tensor in tensors.items() if not key.startswith(f"{Q}.")}
    save_file(fewer, file, metadata)
    refused(file, f"written with {len(adapter)} layers and holds {len(adapter) - 1}", transformer=transformer)
    refused(file, f"written with {len(adapter)} layers")
    more = tensors | {
        f"transformer.proj_out.lora_{h}.weight": torch.ones(s) for h, s in (("A", (1, 32)), ("B", (32, 1)))
    }
    save_file(more, file, metadata)
    refused(file, f"holds {len(adapter) + 1}", transformer=transformer)
    tensors[f"{Q}.lora_A.weight"][0, 0] += 1
    save_file(tensors, file, metadata)
    refused(file, "no longer holds the numbers", transformer=transformer)
