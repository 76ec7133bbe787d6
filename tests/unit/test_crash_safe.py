"""Killed, out of room, or unable to read: the same command goes on where it was, and every byte is as if nothing had happened."""

import contextlib
import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from slow_conversion import convert_small

from glm45_tune.conversion import mcore_files
from glm45_tune.conversion.outdir import MARKER
from glm45_tune.conversion.stream import convert
from glm45_tune.errors import CheckpointError, UserError


@pytest.fixture(autouse=True)
def large_files_again():
    """convert_small changes it."""
    size = mcore_files.MAX_FILE_BYTES
    yield
    mcore_files.MAX_FILE_BYTES = size


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def sources(checkpoints, tmp_path_factory):
    """Target format → a checkpoint in the other one."""
    mcore = tmp_path_factory.mktemp("source") / "mcore"
    convert(checkpoints["355b"], mcore, "mcore", verify=False)
    return {"mcore": checkpoints["355b"], "hf": mcore}


class Starter:
    """Conversions as processes of their own, started at once: everything is imported already."""

    def __init__(self):
        script = Path(__file__).parent / "slow_conversion.py"
        self._server = subprocess.Popen(
            [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, model, output, to, pause, **how) -> int:
        """The process id."""
        print(json.dumps([[str(model), str(output), to, pause], how]), file=self._server.stdin, flush=True)
        return int(self._server.stdout.readline())

    def kill(self, pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # it was done
            os.kill(pid, signal.SIGKILL)
        assert self._server.stdout.readline() == "ended\n"

    def close(self) -> None:
        self._server.stdin.close()
        self._server.wait()


@pytest.fixture(scope="module")
def starter():
    starter = Starter()
    yield starter
    starter.close()


@pytest.mark.parametrize("to", ["mcore", "hf"])
def test_killed_at_any_moment_it_goes_on_and_ends_byte_equal(sources, starter, tmp_path, to):
    """kill -9 at 20 random moments: nothing under the final name, whole files stay untouched, and in the end every byte is equal."""
    (tmp_path / "straight").mkdir()
    convert_small(sources[to], tmp_path / "straight" / "out", to)
    expected = contents(tmp_path / "straight" / "out")
    rng, kept, kills, met = random.Random(to), {}, 0, set()
    output, partial = tmp_path / "out", tmp_path / "out.partial"
    while kills < 20:
        process = starter.start(sources[to], output, to, 0.0005)
        time.sleep(rng.random() ** 2)
        starter.kill(process)
        if output.exists():  # it was done first: whole, and we begin anew
            assert contents(output) == expected
            shutil.rmtree(output)
            kept = {}
            continue
        kills += 1
        if partial.exists() and (partial / MARKER).exists():
            whole = json.loads((partial / MARKER).read_text())["files"]
            assert kept.keys() <= whole.keys()
            for name, entry in whole.items():
                path = partial / name
                assert path.read_bytes() == expected[name] and entry["size"] == len(expected[name])
                assert kept.get(name) in (None, path.stat().st_mtime_ns)
            kept = {name: (partial / name).stat().st_mtime_ns for name in whole}
            met.add(len(whole))
    assert len(met) > 1, "the kills all met the same moment"
    convert_small(sources[to], output, to)
    assert contents(output) == expected and not partial.exists()
    for name, written in kept.items():
        assert (output / name).stat().st_mtime_ns == written


def test_workers_share_the_work_and_change_no_byte(sources, tmp_path):
    for to in ("mcore", "hf"):
        for workers in (1, 3):
            (tmp_path / f"{workers}").mkdir(exist_ok=True)
            convert_small(sources[to], tmp_path / f"{workers}" / to, to, workers=workers)
        assert contents(tmp_path / "1" / to) == contents(tmp_path / "3" / to)


def test_workers_end_with_their_parent(sources, starter, tmp_path):
    """kill -9 of the command leaves no process behind that goes on writing."""
    output = tmp_path / "out"
    process = starter.start(sources["hf"], output, "hf", 0.05, workers=2)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("out.partial/*.safetensors")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with pytest.raises(UserError, match="another process is writing"):
        convert_small(sources["hf"], output, "hf")
    family = psutil.Process(process).children(recursive=True)
    assert len(family) >= 2
    starter.kill(process)
    assert not psutil.wait_procs(family, timeout=60)[1], "they go on"
    convert_small(sources["hf"], output, "hf")
    assert (output / MARKER).exists()


def test_another_job_does_not_go_on_with_this_ones_files(sources, checkpoints, tmp_path, monkeypatch):
    """Another source, or other options, under the same name: what lies there is of no use and goes."""
    _fail_after(monkeypatch, 300)
    with pytest.raises(CheckpointError):
        convert_small(sources["mcore"], tmp_path / "out", "mcore")
    monkeypatch.undo()
    for path in tmp_path.glob("out.partial/*.distcp"):
        path.write_bytes(b"of the other job" * 9)
    convert_small(checkpoints["355b-no-mtp"], tmp_path / "out", "mcore")
    assert not any(b"of the other job" in data for data in contents(tmp_path / "out").values())


def _fail_after(monkeypatch, count, error=None):
    """From the count-th read of a file on, the disk fails."""
    real, calls = os.preadv, []

    def failing(*arguments):
        calls.append(None)
        if len(calls) > count:
            raise error or OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*arguments)

    monkeypatch.setattr(os, "preadv", failing)


@pytest.mark.parametrize("to", ["mcore", "hf"])
def test_an_unreadable_source_is_named_and_what_is_whole_stays(sources, tmp_path, monkeypatch, to):
    (tmp_path / "straight").mkdir()
    convert_small(sources[to], tmp_path / "straight" / "out", to)
    _fail_after(monkeypatch, 500)
    with pytest.raises(CheckpointError, match=r"(safetensors|distcp): cannot be read at byte \d+: Input/output error"):
        convert_small(sources[to], tmp_path / "out", to)
    files = json.loads((tmp_path / "out.partial" / MARKER).read_text())["files"]
    assert files and not (tmp_path / "out").exists()
    written = {name: (tmp_path / "out.partial" / name).stat().st_mtime_ns for name in files}
    monkeypatch.undo()
    convert_small(sources[to], tmp_path / "out", to)
    assert contents(tmp_path / "out") == contents(tmp_path / "straight" / "out")
    assert written == {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in files}


def test_a_damaged_leftover_is_written_again(sources, tmp_path, monkeypatch):
    """A file that was whole when it was recorded and is not any more (the machine lost power) is not trusted."""
    (tmp_path / "straight").mkdir()
    convert_small(sources["mcore"], tmp_path / "straight" / "out", "mcore")
    _fail_after(monkeypatch, 500)
    with pytest.raises(CheckpointError):
        convert_small(sources["mcore"], tmp_path / "out", "mcore")
    monkeypatch.undo()
    path = sorted(tmp_path.glob("out.partial/*.distcp"))[0]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    convert_small(sources["mcore"], tmp_path / "out", "mcore")
    assert contents(tmp_path / "out") == contents(tmp_path / "straight" / "out")


@pytest.fixture
def mounted(tmp_path):
    """Mount something for the test; skips where we may not."""
    places = []

    def mount(*arguments):
        place = tmp_path / f"mount{len(places)}"
        place.mkdir()
        done = subprocess.run(["mount", *map(str, arguments), str(place)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no mounting here: {done.stderr}")
        places.append(place)
        return place

    yield mount
    for place in reversed(places):
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_disk_that_fills_up_ends_in_one_sentence_and_goes_on_with_room(sources, tmp_path, mounted):
    """On a file system of 6 MiB that somebody else fills meanwhile."""
    disk = mounted("-t", "tmpfs", "-o", "size=6m", "tmpfs")
    convert_small(sources["mcore"], tmp_path / "straight", "mcore")
    done, ballast = [0], disk / "ballast"

    def fill(size):
        done[0] += size
        if done[0] > 1_000_000 and not ballast.exists():
            ballast.write_bytes(bytes(shutil.disk_usage(disk).free - 100_000))

    with pytest.raises(UserError, match="No space left on device. Make room and start the same command again"):
        convert_small(sources["mcore"], disk / "out", "mcore", tick=fill)
    kept = json.loads((disk / "out.partial" / MARKER).read_text())["files"]
    assert kept and not (disk / "out").exists()
    with pytest.raises(UserError, match=r"GiB are to be written and .* are free"):  # seen before starting
        convert_small(sources["mcore"], disk / "out", "mcore")
    ballast.unlink()
    convert_small(sources["mcore"], disk / "out", "mcore")
    assert contents(disk / "out") == contents(tmp_path / "straight")


def test_no_room_is_said_before_the_first_byte(sources, tmp_path, mounted, cli):
    disk = mounted("-t", "tmpfs", "-o", "size=1m", "tmpfs")
    code, _, err = cli("convert", "--to-mcore", "--model", sources["mcore"], "--output", disk / "out")
    assert code == 2 and "free" in err and "Traceback" not in err and not any(disk.iterdir())


def test_a_file_size_limit_ends_in_one_sentence(sources, tmp_path, cli):
    """ulimit -f, as a quota would."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))
    try:
        code, _, err = cli("convert", "--to-mcore", "--model", sources["mcore"], "--output", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2 and "File too large. Make room" in err and "Traceback" not in err


def test_a_source_on_a_read_only_mount_works(sources, tmp_path, mounted):
    place = mounted("--bind", sources["mcore"])
    if subprocess.run(["mount", "-o", "remount,bind,ro", place]).returncode:
        pytest.skip("no remounting here")
    with pytest.raises(OSError, match="Read-only"):
        (place / "probe").write_text("")
    convert(place, tmp_path / "out", "mcore")
