"""A server of the S3 protocol on this machine, for the tests of pairs in a bucket."""

import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

NAMES = {
    "AWS_ACCESS_KEY_ID": "tests",
    "AWS_SECRET_ACCESS_KEY": "tests",
    "AWS_DEFAULT_REGION": "eu-central-1",
}


@contextmanager
def server():
    """Run moto's server on a free port; the environment of this process and its children names it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    before = dict(os.environ)
    os.environ.update(NAMES, AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}")
    try:
        wait(port, process)
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        process.kill()
        process.wait()


def wait(port, process):
    """Wait until the server answers."""
    while True:
        assert process.poll() is None, "the server ended"
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.05)


@pytest.fixture(scope="session")
def s3():
    """Give the client of a running server."""
    pytest.importorskip("moto", reason="moto[server] is not installed")
    s3fs = pytest.importorskip("s3fs")
    with server():
        yield s3fs.S3FileSystem(use_listings_cache=False)


@pytest.fixture
def bucket(s3, request):
    """Give the URL of an empty bucket."""
    name = f"pairs-{abs(hash(request.node.nodeid)) % 10**12}"
    s3.mkdir(name, region_name=NAMES["AWS_DEFAULT_REGION"])
    return f"s3://{name}"
