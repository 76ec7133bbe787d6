"""A process of ours with everything it starts, ended whole.

A guard (this file, run by itself) starts the command and outlives it only to end what it left. It
ends all of it when it is told to and when the process that started it is gone, however that ended.
On Linux what leaves the group for a session of its own is found too: the guard adopts what loses
its parent.
"""

import contextlib
import ctypes
import errno
import os
import select
import shutil
import signal
import subprocess
import sys
import time

_PAUSE_SECONDS = 0.5  # between looks whether the starting process still lives
_END_SECONDS = 10.0


class Guarded(subprocess.Popen):
    """A command under a guard, whose process this is.

    Its exit code is the command's, 128 + N where signal N ended that.
    """

    def __init__(self, command: list[str], **options):
        """options: of subprocess.Popen. Raises OSError where there is no such command."""
        self.returncode = 0  # until it has begun
        if shutil.which(command[0], path=(options.get("env") or os.environ).get("PATH")) is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), command[0])
        front = [sys.executable, "-I", "-S", os.path.abspath(__file__), str(os.getpid())]
        super().__init__([*front, *command], start_new_session=True, **options)

    def __del__(self):
        if self.returncode is None:  # left behind by a fault
            self.terminate()
        super().__del__()

    def end(self) -> None:
        """End the command and all it started, and wait for that, at most some seconds."""
        self.terminate()
        self.send_signal(signal.SIGCONT)  # one that was stopped hears nothing
        try:
            self.wait(_END_SECONDS + 5)
        except subprocess.TimeoutExpired:  # the guard stands still
            self.kill()
            self.wait()
        for pipe in (self.stdin, self.stdout, self.stderr):
            if pipe:
                with contextlib.suppress(OSError):  # of what was not written any more
                    pipe.close()


def _main(parent: int, command: list[str]) -> int:
    """The guard: the exit code of the command."""
    told, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    if sys.platform == "linux":
        PR_SET_CHILD_SUBREAPER = 36
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    child = os.fork()
    if not child:
        _become(command)
    _leave_files(told, wake)
    ends = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
    code = None
    while code is None and os.getppid() == parent:
        select.select([told], [], [], _PAUSE_SECONDS)
        with contextlib.suppress(BlockingIOError):
            if ends & set(_drained(told)):
                break
        code = _reaped(child)
    _end_all(child)
    return 137 if code is None else code


def _become(command: list[str]) -> None:
    """The child: a session and a group of its own, and the command in it."""
    os.setsid()
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # where the guard itself is killed
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        os.write(2, f"{command[0]}: {error.strerror}\n".encode())
        os._exit(127)


def _leave_files(*kept: int) -> None:
    """The pipes are the command's: who reads from it hears its end, and not the guard's."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        if number not in kept:
            os.dup2(nothing, number)


def _drained(told: int) -> bytes:
    return os.read(told, 4096) if select.select([told], [], [], 0)[0] else b""


def _reaped(child: int) -> int | None:
    """The child's exit code where it has ended. What was adopted and has ended is forgotten."""
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            if found[0] == child:
                code = os.waitstatus_to_exitcode(found[1])
                return code if code >= 0 else 128 - code
    return None


def _end_all(child: int) -> None:
    """Kill the group, and in turn whatever loses its parent by that and so becomes ours."""
    deadline = time.monotonic() + _END_SECONDS
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    while time.monotonic() < deadline:
        for process in _children():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.01)


def _children() -> list[int]:
    if sys.platform != "linux":
        return []
    found = []
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError, ValueError):
            if name.isdigit():
                with open(f"/proc/{name}/stat", "rb") as file:
                    if int(file.read().rpartition(b")")[2].split()[1]) == os.getpid():
                        found.append(int(name))
    return found


if __name__ == "__main__":
    sys.exit(_main(int(sys.argv[1]), sys.argv[2:]))
