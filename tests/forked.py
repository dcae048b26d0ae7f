"""Python processes that begin with libraries imported: `Popen` and `plain_run` are those of subprocess, sooner.

Importing torch, transformers, trl and peft takes each process four seconds, several times what a run of a tiny model
needs. Here one process imports them and does nothing else; from it each program is forked, and the processes that a
launcher starts (torchrun, accelerate) are forked from the launcher. A program finds its own arguments, environment,
folder, streams, session and signals. Not its own are the seed of hashes, which the processes of a run so share, what a
library reads of the environment while it is imported, but for the cache of datasets, and the interpreter's end. Linux
alone lets a process wait for one that it has not started itself (PR_SET_CHILD_SUBREAPER): elsewhere all is plain
subprocess. Starts as a user makes them are seen in test_startup.py, test_security.py and, by torchrun and accelerate,
with DDP and FSDP, training/test_processes.py.
"""

import atexit
import contextlib
import ctypes
import functools
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MESSAGE_BYTES = 2**20
PR_SET_CHILD_SUBREAPER = 36  # of Linux's prctl.h
PLAIN = subprocess.Popen


def _run(program, cwd, environment, streams, own_session=False):
    """Is the program that `python *program` would be, in a process just forked, and ends it."""
    if own_session:
        os.setsid()
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    is_launcher = program[0] == "-m"
    subprocess.Popen = _Forked if is_launcher else PLAIN
    if elastic := sys.modules.get("torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler"):
        elastic.Popen = subprocess.Popen
    for stream, number in zip(streams, (1, 2), strict=True):
        os.dup2(stream, number)
    os.closerange(3, min(os.sysconf("SC_OPEN_MAX"), 2**16))
    encoding, _, errors = environment.get("PYTHONIOENCODING", "utf-8").partition(":")
    sys.stdout = open(1, "w", encoding=encoding, errors=errors or None, closefd=False)
    sys.stderr = open(2, "w", encoding=encoding, closefd=False, buffering=1, errors="backslashreplace")
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    if folder := environment.get("HF_DATASETS_CACHE"):
        sys.modules["datasets"].config.HF_DATASETS_CACHE = Path(folder)
    code = _exit_code(program)
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _exit_code(program):
    try:
        if program[0] == "-m":
            sys.argv, sys.path[0] = program[1:], os.getcwd()
            runpy.run_module(program[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = program, str(Path(program[0]).parent)
            runpy.run_path(program[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code & 0xFF if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)
    except BaseException:  # of any kind: an interpreter ends by it too, and past here the server would go on
        traceback.print_exc()
        return 1
    return 0


class _Forked(PLAIN):
    """subprocess.Popen, of which it overrides the one step that starts the program, if it is this Python: it is forked
    from the process that asks, a launcher's."""

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *others):
        if isinstance(args, (str, bytes, os.PathLike)) or args[0] != sys.executable or args[1] == "-c":
            super()._execute_child(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *others)
            return
        streams = others[3:9]  # p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite
        own = [1 if streams[3] == -1 else streams[3], 2 if streams[5] == -1 else streams[5]]
        program = list(map(str, args[2 if args[1] in ("-u", "-P") else 1 :]))
        self._own_session = others[14]  # start_new_session
        self.pid = self._start(program, str(cwd or os.getcwd()), dict(os.environ if env is None else env), own)
        self._child_created = True
        self._close_pipe_fds(*streams)

    def _start(self, program, cwd, environment, streams):
        pid = os.fork()
        if not pid:
            _run(program, cwd, environment, streams, self._own_session)
        return pid


class _OfServer(_Forked):
    """What a test starts, forked from the server that has the libraries imported."""

    kind = "ours"

    def _start(self, program, cwd, environment, streams):
        server = _server(self.kind)
        prctl = ctypes.CDLL(None).prctl
        prctl(PR_SET_CHILD_SUBREAPER, 1)  # no longer than the start: else what killed programs leave would be ours
        socket.send_fds(server, [json.dumps((program, cwd, environment)).encode()], streams)
        pid = int(server.recv(MESSAGE_BYTES))
        prctl(PR_SET_CHILD_SUBREAPER, 0)
        return pid


class _OfPlainServer(_OfServer):
    kind = "plain"


Popen = _OfServer if sys.platform == "linux" else PLAIN


def plain_run(command, **options):
    """subprocess.run with captured output, of a program that needs transformers and nothing of ours."""
    options.pop("capture_output")
    kind = _OfPlainServer if sys.platform == "linux" else PLAIN
    with kind(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options) as process:
        stdout, stderr = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


@functools.cache
def _server(kind):
    """The way to a process that has the libraries imported: all, or plain transformers."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with its:
        command = [sys.executable, str(Path(__file__)), kind, str(its.fileno())]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        PLAIN(command, env=environment, pass_fds=[its.fileno()])
    return ours


def serve(requests, kind):
    """Forks what is asked for until whoever asks has ended."""
    if kind == "plain":
        from transformers import AutoTokenizer, GenerationConfig  # noqa: F401
        from transformers.utils import chat_template_utils  # noqa: F401
    else:
        sys.path.insert(1, str(ROOT))
        import run_sft

        run_sft.import_libraries()
        import torch.distributed.run  # noqa: F401 - for launchers
    gc.freeze()
    while True:
        asked, streams, _, _ = socket.recv_fds(requests, MESSAGE_BYTES, 2)
        if not asked:
            return
        read, write = os.pipe()
        between = os.fork()
        if not between:  # it ends at once, so that the program's parent is the process that asked
            if pid := os.fork():
                os.write(write, str(pid).encode())
                os._exit(0)
            _run(*json.loads(asked), streams)
        os.waitpid(between, 0)
        pid = os.read(read, 20)
        for each in (read, write, *streams):
            os.close(each)
        requests.send(pid)


if __name__ == "__main__":
    _, kind_, number = sys.argv
    sys.path.pop(0)  # of this file, which a program would not find beside itself
    sys.path.insert(0, "")
    with socket.socket(fileno=int(number)) as requests_, contextlib.suppress(KeyboardInterrupt):
        serve(requests_, kind_)
