"""Processes that need not load PyTorch: forks of one that has, behind a program that is called like an interpreter.

`serving` starts the process that has loaded all, and gives the path of the program. `PROGRAM script.py --flag value`
then does what `python` would, with the same open files, environment, signals and exit code, also under launchers. It
saves two seconds of computation for each rank of each job.
"""

import atexit
import contextlib
import ctypes
import fcntl
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path

# What takes long to load, and what PyTorch loads when it is first used. Of this project, what sampling loads: programs
# of tests put something in the place of parts of training before they load it.
LOADED = ("torch.distributed.run", "torch._dynamo", "torch.utils.flop_counter", "safetensors.torch", "scipy.linalg",
          "scipy.special", "PIL.Image", "yaml", "tqdm", "guided_diffusion.runs.command", "guided_diffusion.unet")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
MOST_FILES = 200

# Passes its words, environment and open files on, then signals; and ends, and closes its files, as the fork has ended.
PROGRAM = """#!{python} -SEs
import json, os, signal, socket, sys
files = [int(name) for name in os.listdir("/proc/self/fd") if os.path.exists("/proc/self/fd/" + name)]
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
socket.send_fds(server, [b"files"], files)
stream = server.makefile("rw")
signal.pthread_sigmask(signal.SIG_BLOCK, {signals})
print(json.dumps([sys.argv[1:], dict(os.environ), os.getcwd(), files]), file=stream, flush=True)
fork = int(stream.readline())
for number in {signals}:
    signal.signal(number, lambda number, frame: os.kill(fork, number))
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signals})
code = int(stream.readline())
if code < 0:
    if -code != signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
"""


@contextlib.contextmanager
def serving(folder):
    """The path of the program, which works until the end of the context.

    folder: for it. All contexts of one folder, also in other processes, have one server, which ends after the last.
    """
    with locked(folder):
        user, server = entered(folder), None
        if user is None:
            user, server = started(folder)
    yield folder / "python"
    os.close(user)
    if server:
        server.communicate()


@contextlib.contextmanager
def locked(folder):
    """Keeps other processes out."""
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def entered(folder):
    """Opens the pipe of the server, which works as long as anyone has it open; None where there is no server."""
    try:
        return os.open(folder / "users", os.O_WRONLY | os.O_NONBLOCK)
    except OSError:         # no pipe, or nobody reads it
        return None


def left(folder):
    """Says whether nobody uses the server any more; then nobody enters it from now on."""
    with locked(folder):
        if not select.select([sys.stdin], [], [], 0)[0]:
            return False
        sys.stdin.close()
        return True


def started(folder):
    """Starts a server, and returns its pipe and it."""
    address, program, repository = folder / "socket", folder / "python", str(Path(__file__).parents[2])
    if not program.exists():
        os.mkfifo(folder / "users")
        program.write_text(PROGRAM.format(python=sys.executable, address=str(address),
                                          signals=tuple(map(int, SIGNALS))))
        program.chmod(0o755)
    # What PyTorch reads when it is loaded, as the commands set it before.
    settings = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONPATH": repository}
    users = os.open(folder / "users", os.O_RDONLY | os.O_NONBLOCK)
    user = entered(folder)
    server = subprocess.Popen([sys.executable, __file__, folder], stdin=users, stdout=subprocess.PIPE, cwd=repository,
                              env={**os.environ, **settings})
    os.close(users)
    assert server.stdout.readline() == b"ready\n"
    return user, server


def serve(folder):
    """Loads all, and answers programs until nobody has its pipe, stdin, open.

    Returns the connection to its program in each fork.
    """
    for name in LOADED:
        __import__(name)
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads must not be forked"
    gc.freeze()         # a collection in a fork would copy all that is shared
    keepers, address = set(), folder / "socket"
    address.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(address))
        listener.listen(64)
        print("ready", flush=True)
        while True:
            ready = select.select([listener, sys.stdin], [], [])[0]
            if sys.stdin in ready and left(folder):
                break
            if listener not in ready:
                continue
            connection = listener.accept()[0]
            keepers = {keeper for keeper in keepers if not os.waitpid(keeper, os.WNOHANG)[0]}
            keeper = os.fork()
            if not keeper:
                return connection
            keepers.add(keeper)
            connection.close()
    for keeper in keepers:
        os.waitpid(keeper, 0)
    return None


def keep(connection):
    """Makes the fork of a program, to which it returns its words; tells the program how the fork ended.

    The fork is killed where the program is gone.
    """
    _, files, _, _ = socket.recv_fds(connection, 5, MOST_FILES)
    stream = connection.makefile("rw")
    words, environment, folder, numbers = json.loads(stream.readline())
    fork = os.fork()
    if not fork:
        take_over(environment, folder, dict(zip(numbers, files, strict=True)))
        return words
    for file in (0, 1, 2, *files):
        os.close(file)
    print(fork, file=stream, flush=True)
    if connection in select.select([connection, os.pidfd_open(fork)], [], [])[0]:
        os.kill(fork, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1])
    with contextlib.suppress(BrokenPipeError):
        print(code, file=stream, flush=True)
    os._exit(0)


def take_over(environment, folder, files):
    """Makes this process one with that environment, working folder, and open files by their numbers."""
    kept = {number: os.dup2(file, MOST_FILES + number) for number, file in files.items()}
    os.closerange(0, MOST_FILES)
    for number, file in kept.items():
        os.dup2(file, number)
    os.closerange(MOST_FILES, 2 * MOST_FILES)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)      # noqa: SIM115


def run(words):
    """Runs the words after the name of an interpreter: a script, -m and a module, or -c and code, and arguments.

    Leaves without taking its objects and PyTorch's to pieces, which would first copy all memory that it shares with the
    other forks: 0.12 s of computation for nothing. What is to be done at the end runs, from the last to the first, and
    the first is to leave; MPI tells its launcher there.
    """
    words, code, library = words[words[0] == "-u":], 0, ctypes.CDLL(None)
    library.on_exit(library._exit, None)
    try:
        if words[0] == "-c":
            sys.argv, sys.path[0] = ["-c", *words[2:]], ""
            exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
        elif words[0] == "-m":
            sys.argv, sys.path[0] = words[1:], ""
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = words, str(Path(words[0]).resolve().parent)
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi and not mpi.Is_finalized():
        mpi.Finalize()          # as mpi4py does on the usual way out
    sys.stdout.flush()
    library.exit(code)


if __name__ == "__main__" and (asked := serve(Path(sys.argv[1]))):
    run(keep(asked))
