"""`blend --report`, `--plan`, `--size`, `--dtype` and weights by layer, through the command."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from tiny import random_adapter, tiny_klein
from typer.testing import CliRunner

from danceopd.adapters.blend import blend
from danceopd.adapters.blending.conflict import measure, sentences
from danceopd.adapters.blending.layers import parse_blocks, parse_layers
from danceopd.adapters.header import WEIGHTS, inspect_adapter
from danceopd.adapters.read import read_adapter
from danceopd.adapters.write import write_adapter
from danceopd.cli.app import app
from danceopd.models.base import base_fingerprint
from danceopd.models.lora import Adapter


def run(*words) -> tuple[int, str]:
    """Exit status and output of a command."""
    done = CliRunner().invoke(app, ["blend", *(str(word) for word in words)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    """A folder with a tiny base and two LoRAs a and b of it, of ranks 2 and 3; b lacks the single-stream blocks."""
    folder = tmp_path_factory.mktemp("loras")
    pipe = tiny_klein(folder / "base")
    said = {"base": str(folder / "base"), "base_sha256": base_fingerprint(folder / "base")}
    one, two = (random_adapter(pipe.transformer, rank=2 + i, seed=i) for i in range(2))
    two = Adapter({name: pair for name, pair in two.tensors.items() if not name.startswith("single_")})
    for part, name in ((one, "a"), (two, "b")):
        write_adapter(part, folder / name, metadata=said)
    return folder, one, two


def model(seed: int, blocks=10, stack="transformer_blocks") -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    names = [f"{stack}.{i}.{layer}" for i in range(blocks) for layer in ("attn.to_q", "ff.net.0.proj")]
    return {name: (torch.randn(4, 64, generator=draw), torch.randn(64, 4, generator=draw)) for name in names}


def test_the_report_finds_where_two_fight():
    one, two = model(1), model(2)
    for i in (3, 4, 5, 6, 7):
        a, b = one[f"transformer_blocks.{i}.attn.to_q"]
        two[f"transformer_blocks.{i}.attn.to_q"] = a, -2 * b
    two["transformer_blocks.1.ff.net.0.proj"] = one["transformer_blocks.1.ff.net.0.proj"]
    blocks = measure([Adapter(one), Adapter(two)])
    found = {(b.number, b.kind): (b.cosine((0, 1)), b.conflict((0, 1)), b.energy(1) / b.energy(0)) for b in blocks}
    assert found[3, "attention"] == (pytest.approx(-1), 1.0, pytest.approx(4))
    assert found[1, "feed-forward"] == (pytest.approx(1), 0.0, pytest.approx(1))
    apart = [value for (i, kind), value in found.items() if i not in (1, 3, 4, 5, 6, 7)]
    assert all(abs(cosine) < 0.1 and 0.4 < conflict < 0.6 for cosine, conflict, _ in apart)
    first, second = sentences(blocks, ["a", "b"])
    assert first.startswith("a and b fight in blocks 3 to 7 of attention: there they undo each other")
    assert second.startswith("a and b make the same change in block 1 of feed-forward")


def test_numbers_by_block_are_those_of_the_whole_deltas():
    one, two = Adapter(model(1, 2)), Adapter(model(2, 2))
    for block in measure([one, two]):
        layer = {"attention": "attn.to_q", "feed-forward": "ff.net.0.proj"}[block.kind]
        name = f"transformer_blocks.{block.number}.{layer}"
        a, b = one.delta(name), two.delta(name)
        assert block.cosine((0, 1)) == pytest.approx(float((a * b).sum() / a.norm() / b.norm()), abs=1e-5)
        large = [d.abs() >= d.abs().flatten().sort(descending=True).values[int(0.2 * d.numel()) - 1] for d in (a, b)]
        both = large[0] & large[1]
        assert block.conflict((0, 1)) == pytest.approx(float((a.sign() != b.sign())[both].float().mean()))


def test_stacks_are_named_where_there_are_several_and_layers_outside_the_blocks_too():
    one = {**model(1, 2), **model(2, 2, "single_transformer_blocks")}
    one["proj_out"] = model(3, 1)["transformer_blocks.0.attn.to_q"]
    two = {name: (a, -b) for name, (a, b) in one.items()}
    (said,) = sentences(measure([Adapter(one), Adapter(two)]), ["a", "b"])
    assert "blocks 0 to 1 of attention in single_transformer_blocks" in said and "outside the blocks" in said
    (said,) = sentences(measure([Adapter(model(1, 2)), Adapter(model(2, 2, "other"))]), ["a", "b"])
    assert said == "a and b share no layer: a blend keeps both whole."


def test_the_command_reports_and_draws(loras, tmp_path):
    folder, one, two = loras
    against = Adapter({name: (a, -b) for name, (a, b) in one.tensors.items()})
    write_adapter(against, tmp_path / "c", metadata={"base": str(folder / "base")})
    status, said = run(folder / "a", tmp_path / "c", "-o", tmp_path / "out", "--weights", "1,0.5", "--report")
    assert status == 0, said
    assert "a and c fight in " in said and "of attention" in said and "energy of a" in said and "-1.00" in said
    with Image.open(tmp_path / "out" / "conflicts.png") as picture:
        assert (213, 94, 0) in {colour for _, colour in picture.getcolors(1 << 20)}
    three = run(folder / "a", folder / "b", tmp_path / "c", "-o", tmp_path / "three", "--report", "--weights", "1,1,.5")
    assert three[0] == 0 and "lowest cosine" in three[1] and "a and c" in three[1] and "b and c" in three[1]


def test_weights_by_layer_space_strength_and_dtype(loras, tmp_path):
    folder, one, two = loras
    status, said = run(
        folder / "a", folder / "b", "-o", tmp_path / "out", "--method", "ties", "--space", "core", "--scale", "auto",
        "--layers", "single_=0", "--blocks", "transformer_blocks.0=1,0", "--dtype", "bf16",
    )  # fmt: skip
    assert status == 0 and "strength" in said, said
    found, header = read_adapter(tmp_path / "out"), inspect_adapter(tmp_path / "out")
    assert not any(name.startswith("single_") for name in found.tensors) and header.dtypes == ("BF16",)
    assert header.record["layers"] == "--layers 'single_=0', --blocks 'transformer_blocks.0=1,0'"
    rules = [*parse_layers(["single_=0"]), *parse_blocks(["transformer_blocks.0=1,0"])]
    want = blend([one, two], method="ties", space="core", scale="auto", layers=rules).to(dtype=torch.bfloat16)
    assert found.sha256 == want.sha256


@pytest.mark.parametrize("method", ["knots", "tsv", "iso-c"])
def test_the_command_runs_methods_on_singular_vectors(loras, tmp_path, method):
    folder, one, two = loras
    status, said = run(folder / "a", folder / "b", "-o", tmp_path / "out", "--method", method)
    assert status == 0 and said.count("exact") == 1, said
    assert read_adapter(tmp_path / "out").sha256 == blend([one, two], method=method).sha256


def test_a_plan_says_what_is_then_written(loras, tmp_path):
    folder, one, two = loras
    words = [folder / "a", folder / "b", "-o", tmp_path / "out", "--dtype", "fp16", "--layers", "ff=0"]
    status, said = run(*words, "--plan")
    facts = dict(line.split(": ", 1) for line in said.strip().splitlines())
    assert status == 0 and not (tmp_path / "out").exists()
    assert run(*words)[0] == 0
    file = tmp_path / "out" / WEIGHTS
    assert facts["would write"] == str(file) and facts["dtype"] == "fp16"
    assert int(facts["layers"].split(",")[0]) == len(read_adapter(file))
    assert float(facts["size"].split()[1]) * 1e6 == pytest.approx(file.stat().st_size, rel=0.15)
    assert facts["rank"].startswith("5 (") and "2 (" in facts["rank"]  # the single-stream blocks are a's alone
    assert facts["blend"] == "linear of 0.5 x a + 0.5 x b" and facts["base"].endswith("base")


def test_a_size_sets_the_rank(loras, tmp_path):
    folder, *_ = loras
    whole = run(folder / "a", folder / "b", "-o", tmp_path / "whole")
    assert whole[0] == 0
    size = (tmp_path / "whole" / WEIGHTS).stat().st_size
    status, said = run(folder / "a", folder / "b", "-o", tmp_path / "out", "--size", f"{size / 2000:.1f}kB")
    assert status == 0 and "residual" in said
    assert size / 4 < (tmp_path / "out" / WEIGHTS).stat().st_size <= size / 2


@pytest.mark.parametrize(
    "words, says",
    [
        (["--size", "1kB"], "too small: these"),
        (["--size", "large"], "give the largest size of the file"),
        (["--dtype", "fp61"], "did you mean 'fp16'"),
        (["--scale", "much"], "--scale has 'much'"),
        (["--layers", "nothing=1"], "fits none of the"),
        (["--plan", "--weights", "1"], "give each its own weight"),
        (["--plan", "--method", "slerp", "--weights", "1,-1"], "two weights of 0 or more"),
    ],
)
def test_refusals_of_the_command(loras, tmp_path, words, says):
    folder, *_ = loras
    status, said = run(folder / "a", folder / "b", "-o", tmp_path / "out", *words)
    assert status == 2 and says in " ".join(said.split()) and not (tmp_path / "out").exists()
