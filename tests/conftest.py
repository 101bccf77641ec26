"""One thread each: two of them on a busy pair of cores can be many times slower than one."""

import os
import subprocess

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)

from flowmatch.export import fresh  # noqa: E402
from tests import forked  # noqa: E402
from tests.bucket import bucket, s3  # noqa: E402, F401

fresh.start = forked.Program  # which needs no seconds of imports


@pytest.fixture
def fresh_process(monkeypatch):
    """Exports are checked in a process started from nothing."""
    monkeypatch.setattr(fresh, "start", subprocess.Popen)


@pytest.fixture(autouse=True)
def of_slow_tests(request):
    """Slow tests have the fresh process itself."""
    if request.node.get_closest_marker("slow"):
        request.getfixturevalue("fresh_process")
