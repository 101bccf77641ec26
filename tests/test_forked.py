"""A fork of the helper is a process like any other: status, outputs, environment, signals."""

import os
import signal
import subprocess
import textwrap

import pytest

from tests import forked

SCRIPT = """
    import os, random, signal, sys, threading
    import numpy, torch

    class Local:
        pass

    def main(how):
        print(__name__, __spec__.name, sys.argv[1:], os.getcwd(), os.environ.get("FORKED"))
        print("err", sys.modules["__main__"].Local is Local, file=sys.stderr, flush=True)
        if how == "numbers":
            print(random.random(), numpy.random.rand(), torch.initial_seed(), flush=True)
            print(len(os.listdir("/proc/self/task")), torch.get_num_threads(), flush=True)
            print(sorted(int(f) for f in os.listdir("/proc/self/fd"))[:-1])
            print(*map(signal.getsignal, (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM)))
        if how == "wait":
            print("waits", flush=True)
            signal.pause()
        if how == "raise":
            raise OSError("the cause")
        if how == "thread":
            threading.Thread(target=print, args=["last"]).start()
        sys.exit(int(how) if how.isdigit() else 0)

    if __name__ == "__main__":
        main(*sys.argv[1:])
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forked")
    (folder / "script.py").write_text(textwrap.dedent(SCRIPT))
    return folder


def test_a_fork_says_what_python_would(place):
    done = forked.run(["script", "3"], cwd=place, env=os.environ | {"FORKED": "yes"})
    assert done.returncode == 3
    assert done.stdout == f"__main__ script ['3'] {place} yes\n"
    assert done.stderr == "err True\n"
    assert "FORKED" not in os.environ
    assert forked.run(["script", "0"], cwd=place).stdout.endswith(" None\n")
    with pytest.raises(subprocess.CalledProcessError, match="exit status 3"):
        forked.run(["script", "3"], cwd=place, check=True)
    assert "No module named absent" in forked.run(["absent"]).stderr
    assert "last" in forked.run(["script", "thread"], cwd=place).stdout
    raised = forked.run(["script", "raise"], cwd=place)
    assert raised.returncode == 1
    assert raised.stderr.splitlines()[-1] == "OSError: the cause"


def test_forks_share_no_numbers_threads_or_files(place):
    first, second = (
        forked.run(["script", "numbers"], cwd=place, check=True).stdout.splitlines()
        for _ in range(2)
    )
    assert first[1].split()[0] != second[1].split()[0]
    assert first[1].split()[1] != second[1].split()[1]
    assert first[1].split()[2] == second[1].split()[2]  # torch's own, of a fresh process
    assert first[2] == "1 1"
    assert first[3] == "[0, 1, 2]"
    assert first[4] == "0 <built-in function default_int_handler> 0"  # 0 is the default


def test_forks_run_at_once_and_are_killed(place):
    kinds = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
    children = [forked.Popen(["script", "wait"], cwd=place, stdout=forked.PIPE) for _ in kinds]
    for child in children:
        assert child.stdout.readline().startswith("__main__")
        assert child.stdout.readline() == "waits\n"
        assert child.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        children[0].wait(0)
    assert len({child.pid for child in children}) == 3
    for child, kind in zip(children, kinds, strict=True):
        child.send_signal(kind)
    assert [child.wait() for child in children] == [
        -signal.SIGKILL,
        -signal.SIGTERM,
        -signal.SIGINT,
    ]
    children[0].kill()  # of one that has ended: nothing


def test_a_pipe_is_read_to_its_end(place):
    child = forked.Popen(["script", "5"], cwd=place, stdout=forked.PIPE, stderr=forked.STDOUT)
    out, err = child.communicate()
    assert sorted(line.split()[0] for line in out.splitlines()) == ["__main__", "err"]
    assert err is None
    assert child.returncode == 5
    with forked.Popen(["script", "4"], cwd=place, stdout=forked.DEVNULL) as quiet:
        pass
    assert quiet.returncode == 4
