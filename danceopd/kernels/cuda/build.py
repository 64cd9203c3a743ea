"""Compile the CUDA sources on first use and cache the machine code on disk.

`cubin(name, arch, defines)` compiles `csrc/<name>.cu` with NVRTC (part of a CUDA build of torch) or else nvcc, and
keeps the result below the cache folder under a hash of source, architecture and defines. Nothing is built at install
time and no CUDA or torch header is needed. Files appear by one rename, so processes may build the same kernel at once.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from danceopd.common.cache import cache_folder
from danceopd.common.files import write_atomic

SOURCES = Path(__file__).parent / "csrc"
HEADERS = ("common.cuh", "ptx.cuh", "rows.cuh")
OPTIONS = ("--std=c++17",)


class CannotBuild(RuntimeError):
    """There is no compiler, or it failed; the message says which and why."""


def cubin(name: str, arch: str, defines: Mapping[str, int], anew: bool = False) -> bytes:
    """Machine code of `csrc/<name>.cu` for one architecture ("sm_90"), from the cache or made now (`anew`: always).

    CannotBuild when there is no compiler or it does not know the architecture.
    """
    kept = cache_folder() / "kernels" / f"{name}-{arch}-{digest(name, arch, defines)}.cubin"
    with suppress(OSError):
        if not anew:
            return kept.read_bytes()
    flags = [f"-D{key}={value}" for key, value in sorted(defines.items())]
    code = compile_source(name, arch, flags)
    with suppress(OSError):  # no place for a cache: compile again next time
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(kept, code)
    return code


def digest(name: str, arch: str, defines: Mapping[str, int]) -> str:
    """A hash of all that the machine code depends on, 16 hexadecimal digits."""
    content = "\0".join([*sources(name), arch, *OPTIONS, *(f"{k}={v}" for k, v in sorted(defines.items()))])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def sources(name: str) -> list[str]:
    """The text of the kernel's source and of the shared headers."""
    return [(SOURCES / file).read_text(encoding="utf-8") for file in (f"{name}.cu", *HEADERS)]


def compiler() -> str | None:
    """The compiler that would be used: "nvrtc", "nvcc <path>", or None."""
    if nvrtc() is not None:
        return "nvrtc"
    return f"nvcc {nvcc()}" if nvcc() else None


def compile_source(name: str, arch: str, flags: list[str]) -> bytes:
    """Machine code from NVRTC if it is installed and knows the architecture, else from nvcc. CannotBuild if neither."""
    library, program = nvrtc(), nvcc()
    if library is None and program is None:
        raise CannotBuild("neither NVRTC (libnvrtc, part of a CUDA build of torch) nor nvcc is installed")
    if library is not None:
        try:
            return _with_nvrtc(library, name, arch, flags)
        except CannotBuild:
            if program is None:
                raise
    assert program is not None
    return _with_nvcc(program, name, arch, flags)


# nvcc


def nvcc() -> str | None:
    """Path of nvcc, from CUDA_HOME, the PATH or /usr/local/cuda; None if there is none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [Path(home) / "bin" / "nvcc"] if home else []
    found = shutil.which("nvcc")
    places += [Path(found)] if found else []
    return next((str(place) for place in [*places, Path("/usr/local/cuda/bin/nvcc")] if place.is_file()), None)


def _with_nvcc(program: str, name: str, arch: str, flags: list[str]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "kernel.cubin"
        command = [program, "-cubin", f"-arch={arch}", *OPTIONS, *flags, f"-I{SOURCES}", "-o", str(out)]
        command.append(str(SOURCES / f"{name}.cu"))
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise CannotBuild(f"nvcc cannot compile {name} for {arch}: {(done.stderr or done.stdout).strip()}")
        return out.read_bytes()


# NVRTC


@functools.cache
def nvrtc() -> ctypes.CDLL | None:
    """The NVRTC library of a CUDA build of torch, or of a CUDA toolkit; None if there is none."""
    for place in _nvrtc_places():
        beside = Path(place).parent.glob("libnvrtc-builtins.so.*") if Path(place).is_absolute() else ()
        for builtins in beside:  # which the library does not find by itself
            with suppress(OSError):
                ctypes.CDLL(str(builtins))
        with suppress(OSError):
            return ctypes.CDLL(place)
    return None


def _nvrtc_places() -> Iterator[str]:
    if os.name == "nt":
        yield from (f"nvrtc64_{major}0_0.dll" for major in (13, 12))
        return
    with suppress(ImportError, ValueError):
        wheels = importlib.util.find_spec("nvidia")  # nvidia/cu13/lib, or nvidia/cuda_nvrtc/lib before CUDA 13
        for folder in (wheels.submodule_search_locations or []) if wheels else []:
            yield from sorted((str(path) for path in Path(folder).glob("*/lib/libnvrtc.so.*")), reverse=True)
    yield from ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    yield f"{home}/lib64/libnvrtc.so"


def _with_nvrtc(library: ctypes.CDLL, name: str, arch: str, flags: list[str]) -> bytes:
    def call(function: str, *arguments: object) -> None:
        status = getattr(library, function)(*arguments)
        if status:
            library.nvrtcGetErrorString.restype = ctypes.c_char_p
            raise CannotBuild(f"{function}: {library.nvrtcGetErrorString(status).decode()}")

    source, *headers = (text.encode() for text in sources(name))
    options = [option.encode() for option in (f"--gpu-architecture={arch}", *OPTIONS, *flags)]
    program = ctypes.c_void_p()
    names = [header.encode() for header in HEADERS]
    strings = ctypes.c_char_p * len(names)
    given = len(names), strings(*headers), strings(*names)
    call("nvrtcCreateProgram", ctypes.byref(program), source, name.encode(), *given)
    try:
        try:
            call("nvrtcCompileProgram", program, len(options), (ctypes.c_char_p * len(options))(*options))
        except CannotBuild as error:
            text = _nvrtc_result(library, program, "ProgramLog").rstrip(b"\0")
            raise CannotBuild(f"NVRTC cannot compile {name} for {arch}: {text.decode().strip() or error}") from None
        return _nvrtc_result(library, program, "CUBIN")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _nvrtc_result(library: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(library, f"nvrtcGet{what}")(program, buffer)
    return buffer.raw
