"""The program as a real process that need not import torch anew: a server imports everything once and forks.

`run` and `start` take what `python -m danceopd` takes, `python` what `python -c` takes. The child is a process of its
own, with its own environment, folder, signals and exit status, and runs `danceopd.cli.main`; only its imports are those
of the server, one for each test session. What is tested about imports themselves, or about how the interpreter starts,
starts it afresh.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TIMEOUT = 300.0
"""Seconds after which a child counts as hanging."""


class Running:
    """A child of the server: `subprocess.Popen` as far as tests need it. What it prints is in `out` and `err`."""

    def __init__(self, pid: int, out: Path, err: Path) -> None:
        self.pid, self.out, self.err = pid, out, err
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = _ask(poll=self.pid)
        return self.returncode

    def wait(self, timeout: float = TIMEOUT) -> int:
        """Its status: negative for a signal that ended it. TimeoutExpired, after killing it, where it hangs."""
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                self.send_signal(signal.SIGKILL)
                raise subprocess.TimeoutExpired(f"danceopd, which said {self.stderr[-2000:]!r}", timeout)
            time.sleep(0.005)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    @property
    def stdout(self) -> str:
        return self.out.read_text()

    @property
    def stderr(self) -> str:
        return self.err.read_text()


def start(*arguments: object, cwd: Path | None = None, code: str = "", **environment: object) -> Running:
    """Begin `danceopd ARGUMENTS`; `code` is executed in the child first."""
    folder = Path(tempfile.mkdtemp(prefix="program-"))
    out, err = folder / "out", folder / "err"
    pid = _ask(
        arguments=[str(one) for one in arguments], cwd=str(cwd or Path.cwd()), code=code, out=str(out), err=str(err),
        environment={**os.environ, "COLUMNS": "200", "NO_COLOR": "1"} | {k: str(v) for k, v in environment.items()},
    )  # fmt: skip
    return Running(pid, out, err)


def run(
    *arguments: object, cwd: Path | None = None, code: str = "", **environment: object
) -> subprocess.CompletedProcess[str]:
    """What `danceopd ARGUMENTS` did."""
    process = start(*arguments, cwd=cwd, code=code, **environment)
    status = process.wait()
    return subprocess.CompletedProcess(list(map(str, arguments)), status, process.stdout, process.stderr)


def python(code: str, *arguments: object, **how: Any) -> Running:
    """Begin `python -c CODE ARGUMENTS`, for what is not about imports; `how` is for `start`."""
    return start(*arguments, code=f"{code}\nexit()", **how)


def with_merge(body: str) -> str:
    """`code` that replaces the program's merge: what the command line does around it is what is tested."""
    return (
        "import sys, types\nfrom danceopd.errors import UserError\nfake = types.ModuleType('danceopd.merge')\n"
        f"def merge(recipe):\n    {body}\nfake.merge = merge\nsys.modules['danceopd.merge'] = fake\n"
    )


def environment_of(rank: int, world: int, port: int) -> dict[str, object]:
    """What torchrun tells a process."""
    return {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as there:
        there.bind(("127.0.0.1", 0))
        return int(there.getsockname()[1])


# -- the server -------------------------------------------------------------------------------------------

_server: subprocess.Popen[str] | None = None


def _ask(**request: Any) -> Any:
    global _server
    if _server is None:
        _server = subprocess.Popen(
            [sys.executable, "-c", "import program; program._serve()"],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        atexit.register(_server.kill)
    assert _server.stdin is not None and _server.stdout is not None
    print(json.dumps(request), file=_server.stdin, flush=True)
    return json.loads(_server.stdout.readline())


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    _import_everything()
    gc.collect()
    gc.freeze()  # a child that collects garbage would copy every page that it shares with this process
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        elif (answer := os.fork()) == 0:
            _become(**request)
        print(json.dumps(answer), file=answers, flush=True)


def _import_everything() -> None:
    import importlib
    import pkgutil

    import diffusers
    import transformers
    from torch.utils import tensorboard

    import danceopd

    for module in pkgutil.walk_packages(danceopd.__path__, "danceopd."):
        if not any(word in module.name for word in ("__main__", "triton", "ui.page")):  # the last needs an extra
            importlib.import_module(module.name)
    for name in ("Flux2KleinPipeline", "AutoencoderKLFlux2", "FlowMatchEulerDiscreteScheduler", "loaders"):
        getattr(diffusers, name)
    for name in ("Qwen3ForCausalLM", "Qwen2TokenizerFast", "AutoTokenizer"):
        getattr(transformers, name)
    assert tensorboard is not None


def _become(
    arguments: list[str], cwd: str, code: str, out: str, err: str, environment: Mapping[str, str]
) -> None:
    """The child: the program, and nothing of the server's."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGHUP, signal.SIGTERM):  # a background job's children inherit that they are ignored
        signal.signal(number, signal.SIG_DFL)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # an import may have looked at the server's TMPDIR
    os.chdir(cwd)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding=environment.get("PYTHONIOENCODING", "utf-8"))  # type: ignore[union-attr]
    sys.argv = ["danceopd", *arguments]
    status = 0
    try:
        exec(code, {})
        from danceopd.cli import main

        main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status & 255)
