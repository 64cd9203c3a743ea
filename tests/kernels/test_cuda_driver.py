"""The launcher against a stand-in with the C signatures of CUDA's driver, and tensors that are not 16-byte aligned."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from cuda_on_cpu import Emulator
from kernel_cases import angles, draw, twice

from danceopd.kernels import backend, using
from danceopd.kernels.cuda import build, driver
from danceopd.kernels.cuda import launch as cuda
from danceopd.kernels.functional import add_norm, joint_qkv, parallel_qkv, swiglu_concat
from danceopd.kernels.inputs import Stream

on_cpu = pytest.mark.skipif(not shutil.which("g++"), reason="no g++ to build a driver or the CUDA sources for a CPU")

# As the real one: a context belongs to a thread, and nothing is loaded or launched without it.
DRIVER = """
#include <cstring>
typedef void* handle;
static thread_local handle current = nullptr;
static int retained = 0, loaded = 0;
static struct { handle function; unsigned at[7]; handle stream; unsigned char argument[64]; } last;
extern "C" {
int cuCtxGetCurrent(handle* c) { *c = current; return 0; }
int cuCtxSetCurrent(handle c) { current = c; return c ? 0 : 201; }
int cuDeviceGet(int* d, int ordinal) { *d = ordinal + 40; return 0; }
int cuDevicePrimaryCtxRetain(handle* c, int d) {
    ++retained, *c = reinterpret_cast<handle>(0x7000000000L + d);
    return 0;
}
int cuModuleLoadData(handle* m, const void* code) {
    if (!current) return 201;
    if (memcmp(code, "code", 4)) return 200;
    ++loaded, *m = reinterpret_cast<handle>(0x7100000001L);
    return 0;
}
int cuModuleGetFunction(handle* f, handle m, const char* name) {
    if (m != reinterpret_cast<handle>(0x7100000001L) || strcmp(name, "swiglu_forward")) return 500;
    *f = reinterpret_cast<handle>(0x7200000001L);
    return 0;
}
int cuLaunchKernel(handle f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, handle stream, void** arguments, void** extra) {
    if (!current) return 201;
    const unsigned at[7] = {gx, gy, gz, bx, by, bz, shared};
    last.function = f, last.stream = stream;
    memcpy(last.at, at, sizeof at);
    memcpy(last.argument, arguments[0], sizeof last.argument);
    return extra || f != reinterpret_cast<handle>(0x7200000001L) ? 1 : 0;
}
int cuGetErrorString(int status, const char** text) { *text = status == 201 ? "no context" : "other"; return 0; }
int counts() { return 100 * retained + loaded; }
const void* launched() { return &last; }
}
"""


class Launched(ctypes.Structure):
    _fields_ = [
        ("function", ctypes.c_void_p),
        ("at", ctypes.c_uint * 7),
        ("stream", ctypes.c_void_p),
        ("argument", ctypes.c_ubyte * 64),
    ]


@pytest.fixture
def library(tmp_path, monkeypatch):
    out = tmp_path / "libcuda.so"
    command = ["g++", "-shared", "-fPIC", "-std=c++17", "-x", "c++", "-", "-o", str(out)]
    subprocess.run(command, input=DRIVER, text=True, check=True)
    load, caches = ctypes.CDLL, (driver._library, driver._context, driver._module, driver._function)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: load(str(out)))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0x7300000001))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    made: list[bool] = []
    code = lambda name, arch, *_, anew=False: made.append(anew) or f"code of {name} for {arch}".encode()  # noqa: E731
    monkeypatch.setattr(build, "cubin", code)
    for cache in caches:
        cache.cache_clear()
    found = driver._library()
    found.launched.restype, found.made = ctypes.POINTER(Launched), made
    yield found
    for cache in caches:
        cache.cache_clear()


def launch() -> None:
    like = SimpleNamespace(device=SimpleNamespace(index=2))
    argument = cuda.Swiglu(gate=0x7F0000000010, up=0x7F0000000020, width=8)
    driver.launch(like, "swiglu", "swiglu_forward", {"DTYPE": 1}, (4097, 3), 96, argument)


@on_cpu
def test_every_thread_launches_in_torch_s_context(library):
    """Autograd's threads have no context until the runtime launches something there; modules are loaded once."""
    errors = []

    def elsewhere() -> None:
        try:
            launch()
        except RuntimeError as error:
            errors.append(error)

    launch()
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert not errors and library.counts() == 101
    last = library.launched().contents
    assert list(last.at) == [4097, 3, 1, 96, 1, 1, 0] and last.stream == 0x7300000001
    assert bytes(last.argument) == bytes(cuda.Swiglu(gate=0x7F0000000010, up=0x7F0000000020))[:64]


@on_cpu
def test_an_error_of_the_driver_is_raised_with_its_text(library, monkeypatch):
    monkeypatch.setattr(driver, "_enter", lambda device: None)
    errors = []

    def elsewhere() -> None:
        try:
            launch()
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert errors == ["loading swiglu: CUDA error 201, no context"]
    assert library.made == [False, True]  # the kept code may be damaged: it was compiled again


def test_a_forced_backend_that_cannot_be_built_raises(monkeypatch):
    """Inside `using` no other backend may run, and the build must not be tried for ever."""
    tries = []

    def refuse(*arguments):
        assert not tries, "tried again"
        tries.append(arguments)
        raise build.CannotBuild("no compiler")

    monkeypatch.setattr(cuda, "swiglu", refuse)
    x = draw(0, 1, 2, 16).float()
    with using("cuda"), pytest.raises(build.CannotBuild, match="no compiler"):
        swiglu_concat(x)
    assert "cuda" not in backend._disabled


def misaligned(x: torch.Tensor) -> torch.Tensor:
    """The same values, two bytes off alignment."""
    flat = torch.empty(x.numel() + 1, dtype=x.dtype)
    return flat[1:].view(x.shape).copy_(x)


@pytest.fixture
def emulator(tmp_path, monkeypatch):
    one = Emulator(tmp_path)
    monkeypatch.setattr(driver, "launch", one.launch)
    return one


@on_cpu
def test_one_compiled_graph_with_misaligned_tensors(emulator):
    """`fullgraph` through the checks of the CUDA backend; misaligned tensors, which a trace cannot see, are copied."""
    x, y = (draw(i, 1, n, 6 * 64).bfloat16() for i, n in ((0, 6), (1, 3)))
    weights = [draw(2 + i, 64).bfloat16() for i in range(4)]
    cos, sin = (misaligned(t) for t in twice(angles(9, 32), x))

    def run(x, y, weights, cos, sin):
        image, text = (x, None, None, *weights[:2], cos[3:], sin[3:]), (y, None, None, *weights[2:], cos[:3], sin[:3])
        joint = joint_qkv(Stream(*image), Stream(*text), head_dim=64, eps=1e-6)
        row = y[:, :1]
        return *joint, *add_norm(x, x, row, scale=row, shift=row), swiglu_concat(x), swiglu_concat(x, x, x)

    given = misaligned(x), misaligned(y), list(map(misaligned, weights)), cos, sin
    with torch.no_grad(), using("torch"):
        plain = run(*given)
    with torch.no_grad(), using("cuda"):
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(*given)
    assert len(emulator.launched) == 4
    assert all((a == b).float().mean() > 0.999 for a, b in zip(compiled, plain, strict=True))


TABLE = torch.randn(4, 66)
CASES = {
    "a table whose rows lie 66 apart": lambda q: joint_qkv(
        Stream(q, q, q, cos=TABLE[:, :64], sin=TABLE[:, :64]), head_dim=64, eps=1e-6
    ),
    "up behind 12 columns of gate": lambda q: parallel_qkv(
        torch.cat([q, q, q, q[..., :24]], -1).requires_grad_(), None, None, None, None, head_dim=64, width=64, eps=1e-6
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_misaligned_rows_are_not_supported(case, monkeypatch, caplog):
    monkeypatch.setattr(backend, "_warned", set())
    monkeypatch.setattr(driver, "launch", lambda *a: pytest.fail("launched"))
    q = draw(0, 1, 4, 64).to(torch.bfloat16)
    with using("cuda"):
        CASES[case](q)
    assert "multiple" in caplog.text
