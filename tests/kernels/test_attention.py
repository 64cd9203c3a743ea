"""The choice of the attention backend: plain SDPA on a CPU, measuring, the cache, messages, and unpadded rows."""

from __future__ import annotations

import json
import logging
import sys
from types import ModuleType

import pytest
import torch
from kernel_cases import draw
from tiny_transformers import build, forward
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from danceopd.cli.kernels import describe
from danceopd.kernels import attention, attention_backends, backend, installed, masks
from danceopd.kernels.attention import attend
from danceopd.kernels.attention_backends import AttentionCall, CachedKV

KEY = "dense 2x64x2x8 float32 no gradient"
HOLED = torch.tensor([[True, True, True], [True, False, False]])  # over the first three of seven tokens


def qkv(rows=2, tokens=7, dtype=torch.float32, seed=0):
    return [draw(seed + i, rows, tokens, 2, 8).to(dtype) for i in range(3)]


def stock(q, k, v, mask=None):
    out = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask)
    return out.transpose(1, 2)


def padding(mask, tokens):
    return masks.extend(mask, tokens)[:, None, None, :]


def call(mask=None, source=None, **how):
    q, k, v = qkv(**how)
    return AttentionCall(q, k, v, mask, None if mask is None else masks.unpad(mask, q.shape[1]), source)


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("DANCEOPD_CACHE", str(tmp_path))
    monkeypatch.setattr(attention, "_chosen", {})
    monkeypatch.setattr(backend, "_warned", set())


@pytest.fixture
def race(monkeypatch, fresh):
    """Attention backends that take a set time, `race(name=(milliseconds, backend))`; returns those that were timed."""
    timed = []

    def start(**given):
        everyone = {"sdpa": (1.0, attention_backends.sdpa), **given}
        monkeypatch.setattr(attention, "ATTENTION_BACKENDS", {name: one for name, (_, one) in everyone.items()})
        monkeypatch.setattr(attention, "candidates", lambda call: tuple(everyone))
        monkeypatch.setattr(attention, "unavailable", lambda name, call: "")

        def seconds(run):
            timed.append(run.args[0])
            return everyone[run.args[0]][0] / 1e3

        monkeypatch.setattr(attention, "_seconds", seconds)
        return timed

    return start


# What a CPU does


@pytest.mark.parametrize("mask", [None, HOLED, torch.ones(2, 7, dtype=torch.bool)])
def test_a_cpu_runs_plain_sdpa(mask, monkeypatch):
    for name in ("shape_key", "unpad", "_load", "measure"):
        monkeypatch.setattr(attention, name, lambda *a: pytest.fail("a CPU has nothing to choose from"))
    q, k, v = qkv()
    given = None if mask is None else padding(mask, 7)
    assert torch.equal(attend(q, k, v, mask), stock(q, k, v, given))


def test_a_mask_that_hides_nothing_is_dropped(monkeypatch):
    seen = []
    monkeypatch.setattr(attention, "sdpa", lambda call: seen.append(call.mask) or call.q)
    attend(*qkv(), torch.ones(2, 3, dtype=torch.bool))
    attend(*qkv(), HOLED)
    assert seen[0] is None and seen[1] is HOLED


@pytest.mark.parametrize("mask", [None, HOLED])
def test_cached_keys_are_inserted_where_they_belong(mask):
    q, k, v = qkv()
    more = [draw(9 + i, 2, 4, 2, 8).float() for i in range(2)]
    full_k, full_v = (torch.cat([x[:, :3], s, x[:, 3:]], 1) for x, s in zip((k, v), more))
    given = None
    if mask is not None:
        given = torch.cat([mask, torch.ones(2, 8, dtype=torch.bool)], 1)[:, None, None, :]
    assert torch.equal(attend(q, k, v, mask, CachedKV(*more, 3)), stock(q, full_k, full_v, given))


def test_one_graph_under_compile():
    function = torch.compile(lambda q, k, v, m: attend(q, k, v, m), fullgraph=True, backend="aot_eager")
    q, k, v = qkv()
    assert torch.equal(function(q, k, v, HOLED), stock(q, k, v, padding(HOLED, 7)))


def test_a_backend_set_in_diffusers_goes_first(monkeypatch):
    """By module and by context manager."""
    model, inputs = build("flux2")
    monkeypatch.setattr("danceopd.kernels.processors.attend", lambda *a: pytest.fail("the user chose another"))
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Registry
    from diffusers.models.attention_dispatch import attention_backend

    # A model's own backend becomes everybody's in diffusers 0.42: put it back.
    monkeypatch.setattr(Registry, "_active_backend", Registry._active_backend)
    with torch.no_grad(), installed(model):
        with attention_backend("_native_math"):
            chosen = forward(model, inputs)
        model.set_attention_backend("_native_math")
        assert torch.equal(forward(model, inputs), chosen)


# Rows


@pytest.mark.parametrize("mask", [HOLED, torch.tensor([[False, True], [True, True]])])
def test_rows_are_the_visible_tokens(mask):
    rows = masks.unpad(mask, 7)
    whole = masks.extend(mask, 7)
    assert rows.cu_seqlens.tolist() == [0, *whole.sum(1).cumsum(0).tolist()]
    assert rows.max_seqlen == int(whole.sum(1).max())
    assert rows.indices.tolist() == [7 * row + token for row in range(2) for token in range(7) if whole[row, token]]
    assert masks.unpad(mask, 7) is rows
    mask[0, 0] = ~mask[0, 0]  # in place: it is read again
    assert masks.unpad(mask, 7) is not rows
    assert masks.unpad(torch.zeros(1, 3, dtype=torch.bool), 3) is None


def one_by_one(q, k, v, lengths):
    """What a varlen backend computes, in plain torch."""
    parts = [(x.split(lengths.diff().tolist())) for x in (q, k, v)]
    return torch.cat([stock(*(x[None] for x in row))[0] for row in zip(*parts)])


@pytest.fixture
def flash(monkeypatch):
    """FlashAttention-4's two functions, in plain torch, noting what they are given."""
    seen = []

    def dense(q, k, v):
        seen.append("dense")
        return stock(q, k, v), None

    def ragged(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
        assert cu_seqlens_q.dtype == torch.int32 and torch.equal(cu_seqlens_q, cu_seqlens_k)
        assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
        seen.append("ragged")
        return one_by_one(q, k, v, cu_seqlens_q)

    module = ModuleType("flash_attn.cute")
    module.flash_attn_func, module.flash_attn_varlen_func = dense, ragged
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", module)
    return seen


def test_flash_attention_sees_no_padding(flash):
    """The visible rows and their gradients are SDPA's under the mask; what is hidden is zero."""
    leaves = [x.double().requires_grad_() for x in qkv()]
    exact = stock(*leaves, padding(HOLED, 7))
    found = attention_backends.flash4(AttentionCall(*leaves, HOLED, masks.unpad(HOLED, 7)))
    there = masks.extend(HOLED, 7)
    assert flash == ["ragged"] and not found[~there].any()
    assert torch.allclose(found[there], exact[there], rtol=1e-12, atol=1e-12)
    grad = draw(8, *exact.shape) * there[:, :, None, None]
    for a, b in zip(*(torch.autograd.grad(out, leaves, grad) for out in (found, exact))):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


def test_flash_attention_of_dense_rows(flash):
    q, k, v = qkv()
    source = CachedKV(*(draw(9 + i, 2, 4, 2, 8).float() for i in range(2)), 3)
    found = attention_backends.flash4(AttentionCall(q, k, v, source=source))
    assert flash == ["dense"] and torch.equal(found, attend(q, k, v, None, source))


# Measuring and keeping


def slightly_off(call):
    return attention_backends.sdpa(call) * 1.5


def refusing(call):
    raise RuntimeError("No available kernel.\nand more")


@pytest.mark.parametrize("gradient", [False, True])
def test_the_fastest_backend_that_agrees_is_chosen(race, gradient):
    sdpa = attention_backends.sdpa
    race(a=(0.5, sdpa), wrong=(0.1, slightly_off), broken=(0.1, refusing), slow=(3.0, sdpa))
    one = call()
    one.q.requires_grad_(gradient)
    choice = attention.measure(one)
    assert choice.backend == "a" and choice.reason.startswith("a 0.500 ms, sdpa 1.000 ms, slow 3.000 ms")
    assert "wrong: differs from SDPA by 5.0e-01" in choice.reason
    assert "broken: No available kernel." in choice.reason and "more" not in choice.reason
    assert one.q.grad is None


def test_measuring_inside_a_checkpointed_block(race, monkeypatch):
    """The recompute of the block measures again, or not at all; the gradient is the plain one."""
    race(a=(0.5, attention_backends.sdpa))
    monkeypatch.setattr(attention, "uses_plain_sdpa", lambda call: False)  # as on a CUDA device
    leaves = [x.requires_grad_() for x in qkv()]
    plain = torch.autograd.grad(stock(*leaves).square().sum(), leaves)
    for _ in range(2):  # measured; known
        out = checkpoint(attend, *leaves, use_reentrant=False)
        assert all(map(torch.allclose, torch.autograd.grad(out.square().sum(), leaves), plain))
    assert attention._chosen["dense 2x64x2x8 float32 with gradient"].backend == "a"


def test_a_backend_that_ran_out_of_memory_is_measured_again_by_the_next_process(race, tmp_path):
    def greedy(call):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    race(a=(0.5, greedy))
    assert attention._select(call()) == "sdpa" and "CUDA out of memory" in attention.choices()[KEY].reason
    assert not list(tmp_path.rglob("attention-*.json"))


def test_hidden_rows_are_not_compared(race):
    def zeros_there(call):
        return attention_backends.sdpa(call) * masks.extend(HOLED, 7)[:, :, None, None]

    race(packed=(0.5, zeros_there))
    assert attention.measure(call(HOLED)).backend == "packed"


def test_a_little_faster_is_not_enough(race):
    race(a=(0.99, attention_backends.sdpa))
    assert attention.measure(call()).backend == "sdpa"


def test_nothing_is_timed_where_nothing_else_can_run(fresh):
    choice = attention.measure(call(), lambda run: pytest.fail("timed"))
    assert choice.backend == "sdpa" and "cudnn: takes bf16 and fp16 only" in choice.reason


def test_measured_once_and_kept(race, tmp_path, monkeypatch):
    timed = race(a=(0.5, attention_backends.sdpa))
    assert attention._select(call()) == "a" and sorted(timed) == ["a", "sdpa"]
    assert attention._select(call(tokens=60)) == "a" and len(timed) == 2  # the same bucket
    assert attention._select(call(tokens=65)) == "a" and len(timed) == 4  # another
    monkeypatch.setattr(attention, "_chosen", {})  # another process
    monkeypatch.setattr(attention, "measure", lambda *a: pytest.fail("measured twice"))
    assert attention._select(call()) == "a"
    (file,) = tmp_path.rglob("attention-*.json")
    assert set(json.loads(file.read_text())) == {
        KEY,
        "dense 2x128x2x8 float32 no gradient",
    }
    assert attention.choices()[KEY].backend == "a"


def test_the_key_of_a_choice(fresh):
    mask, source = HOLED.clone(), CachedKV(*(draw(i, 2, 4, 2, 8) for i in range(2)), 0)
    other = AttentionCall(*qkv(), HOLED[:, None, None, :])
    with_gradient = call()
    with_gradient.k.requires_grad_()
    calls = [call(), call(mask), other, call(source=source), call(dtype=torch.float16), call(rows=3), with_gradient]
    keys = [attention.shape_key(one) for one in calls]
    assert len(set(keys)) == len(keys)
    assert keys[1].startswith("ragged ") and keys[2].startswith("masked ") and "+ source 64" in keys[3]


@pytest.mark.parametrize("content", ["", "[]", '{"dense 2x64x2x8 float32 no gradient": 3}'])
def test_a_damaged_file_is_measured_again(race, content):
    timed = race(a=(0.5, attention_backends.sdpa))
    attention.cache_file().parent.mkdir(parents=True)
    attention.cache_file().write_text(content)
    assert attention._select(call()) == "a" and timed


def test_no_place_for_a_cache(race, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("DANCEOPD_CACHE", str(tmp_path / "file"))
    race(a=(0.5, attention_backends.sdpa))
    assert attention._select(call()) == "a"


def test_a_backend_that_fails_later_is_replaced(race, monkeypatch, caplog):
    race(varlen=(0.5, attention_backends.sdpa))
    assert attention._select(call(HOLED)) == "varlen"
    calls = []
    monkeypatch.setitem(attention.ATTENTION_BACKENDS, "varlen", lambda call: calls.append(call) or refusing(call))
    monkeypatch.setattr(attention, "uses_plain_sdpa", lambda call: False)  # as on a CUDA device
    q, k, v = qkv()
    with caplog.at_level(logging.WARNING, "danceopd"):
        for _ in range(2):
            assert torch.equal(attend(q, k, v, HOLED), stock(q, k, v, padding(HOLED, 7)))
    assert len(calls) == 1 and len(caplog.records) == 1
    assert "varlen failed" in caplog.text and "No available kernel." in caplog.text


def test_the_command_shows_the_choice(race, monkeypatch):
    assert describe()["attention backend"].startswith("SDPA" if not torch.cuda.is_available() else "measured")
    race(a=(0.5, attention_backends.sdpa))
    attention._select(call())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *a: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *a: "a device")
    monkeypatch.setattr(backend, "_unavailable", lambda name: None)
    monkeypatch.setattr(attention, "_load", lambda: {})
    facts = describe()
    assert facts["attention for dense 2x64x2x8 float32 no gradient"] == "a (a 0.500 ms, sdpa 1.000 ms)"
