"""Two machines on one: network namespaces with a cable between them, else two loopback addresses."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[1]
ADDRESSES = ("10.77.0.1", "10.77.0.2")
LOOPBACK = ("127.0.0.1", "127.0.0.2")


def holder(*prefix):
    """Start a process that holds namespaces; return its number once it has them."""
    process = subprocess.Popen(
        [*prefix, "sh", "-c", "echo $$; exec sleep 100000"], stdout=subprocess.PIPE, text=True
    )
    return process, process.stdout.readline().strip()


class Machines:
    """Two machines; used as a context manager."""

    def __enter__(self):
        self.holders, self.groups = [], []
        self.addresses, self.prefixes = LOOPBACK, ([], [])
        self.interfaces = ("lo", "lo")
        with suppress(OSError, subprocess.CalledProcessError):
            self.wire()
        return self

    def wire(self):
        """Make the namespaces and the cable. Raises CalledProcessError where they are not permitted."""
        subprocess.run(["unshare", "-rn", "true"], check=True, capture_output=True)
        one, first = holder("unshare", "-rn")
        self.holders.append(one)
        enter = ["nsenter", "-t", first, "-U", "-n", "--preserve-credentials"]
        two, second = holder(*enter, "unshare", "-n")
        self.holders.append(two)
        other = ["nsenter", "-t", second, "-U", "-n", "--preserve-credentials"]
        for words in (
            [*enter, "ip", "link", "add", "cable0", "type", "veth", "peer", "name", "cable1"],
            [*enter, "ip", "link", "set", "cable1", "netns", second],
            *(
                [*prefix, "ip", *rest.split()]
                for prefix, name, address in (
                    (enter, "cable0", ADDRESSES[0]),
                    (other, "cable1", ADDRESSES[1]),
                )
                for rest in (
                    f"addr add {address}/24 dev {name}",
                    f"link set {name} up",
                    "link set lo up",
                )
            ),
        ):
            subprocess.run(words, check=True, capture_output=True)
        self.addresses, self.prefixes = ADDRESSES, (enter, other)
        self.interfaces = ("cable0", "cable1")

    def start(self, number, words, log):
        """Start a command on a machine, in a process group of its own; its output goes to a log."""
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        environment |= {"GLOO_SOCKET_IFNAME": self.interfaces[number]}
        with open(log, "w") as file:
            process = subprocess.Popen(
                [*self.prefixes[number], sys.executable, *words],
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.groups.append(process.pid)
        return process

    def launch(self, number, machines, port, words, log):
        """Start the launcher of a machine with one process."""
        launcher = ["-m", "accelerate.commands.launch", "--config_file"]
        launcher += ["configs/accelerate/cpu_2.yaml", "--num_processes", str(machines)]
        launcher += ["--num_machines", str(machines), "--machine_rank", str(number)]
        launcher += ["--main_process_ip", self.addresses[0], "--main_process_port", str(port)]
        return self.start(number, [*launcher, *words], log)

    def kill(self, process):
        """Let a machine lose power: kill all that a command has started there."""
        for pid in descendants(process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()

    def __exit__(self, *error):
        for group in self.groups:
            for pid in descendants(group):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for process in self.holders:
            process.kill()
            process.wait()


def descendants(pid):
    """List a process and all below it, the deepest last; a session of their own does not hide them."""
    found = [int(pid)]
    for one in found:
        with suppress(OSError):
            for task in Path(f"/proc/{one}/task").iterdir():
                found += [int(word) for word in (task / "children").read_text().split()]
    return found


def wait_for(done, seconds, process=None):
    """Wait until `done()`, at most so long; return the seconds that it took."""
    began = time.monotonic()
    while not done():
        assert time.monotonic() - began < seconds, "too long"
        assert process is None or process.poll() is None, "it has ended"
        time.sleep(0.05)
    return time.monotonic() - began
