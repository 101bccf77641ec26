"""Where the processes of a job meet: a store of torch's, at the address of their process group.

With torchrun and `accelerate launch` the launcher has the store, by hand and with mpirun rank 0 has it.
torch opens it again for the process group; here it carries words, not tensors.
"""

import contextlib
import json
import os
import socket
import threading
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from flowmatch.config import UserError
from flowmatch.runs.files import worker
from flowmatch.runs.process import rank, world_size

if TYPE_CHECKING:
    from torch.distributed import Store


class Meeting:
    """The store of the job, as this process sees it. Its calls raise RuntimeError once it is gone.

    Raises:
        UserError: This process has the store, and another program has the port.
    """

    def __init__(self) -> None:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # c10d's stack when a process ends
        import torch.distributed  # noqa: F401 (whole, before a thread imports from it)

        self.rank, self.world = rank(), world_size()
        self.host, self.port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        launcher_serves = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self.serves = self.rank == 0 and not launcher_serves
        self.open, self.closed = threading.Event(), threading.Event()
        self._ended: dict[str, Any] | None = None
        self._store: Store | None = self._connect() if self.serves else None

    def _connect(self) -> "Store":
        from torch.distributed import PrefixStore, TCPStore

        try:
            store = TCPStore(
                self.host,
                self.port,
                is_master=self.serves,
                timeout=timedelta(seconds=60),
                wait_for_workers=False,
                multi_tenant=True,  # torch's group opens it again
            )
        except RuntimeError as error:
            cause = str(error).splitlines()[0]
            raise UserError(
                f"the processes cannot meet at {self.host}:{self.port} (MASTER_ADDR, MASTER_PORT): "
                f"{cause}; use a port that no other job has, and one RANK=0"
            ) from None
        return PrefixStore(f"flowmatch/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)

    def join(self) -> bool:
        """Open the store, as soon as it is there. Returns False where `close` came first."""
        while self._store is None:
            if self.closed.is_set():
                return False
            try:
                socket.create_connection((self.host, self.port), 5).close()
                self._store = self._connect()
            except (OSError, UserError):
                self.closed.wait(0.2)
        self.put("worker", worker())
        self.open.set()
        return True

    @property
    def store(self) -> "Store":
        """The store, once it is open."""
        assert self._store is not None
        return self._store

    def put(self, kind: str, value: str) -> None:
        """Tell the others something of this process."""
        self.store.set(f"{kind}/{self.rank}", value)

    def get(self, kind: str, other: int) -> str | None:
        """Read what another process has told, if it has."""
        key = f"{kind}/{other}"
        return self.store.get(key).decode() if self.store.check([key]) else None

    def all_put(self, kind: str) -> bool:
        """Tell whether every process has told something."""
        return bool(self.store.check([f"{kind}/{r}" for r in range(self.world)]))

    def get_all(self, kind: str) -> list[str]:
        """Read what every process has told."""
        keys = [f"{kind}/{r}" for r in range(self.world)]
        return [value.decode() for value in self.store.multi_get(keys)]

    def claim(self, key: str, value: str) -> bool:
        """Set a key that the first process of the job keeps; tell whether this one has set it."""
        return bytes(self.store.compare_set(key, "", value)).decode() == value

    def end(self, code: int, who: int, text: str, grace: float) -> None:
        """Write that the job ends.

        Args:
            code: What the processes exit with.
            who: Rank of the process that is the cause.
            text: What one of the others prints.
            grace: Seconds that they leave the cause to exit before.
        """
        self.claim("end", json.dumps({"code": code, "rank": who, "text": text, "grace": grace}))

    def ended(self) -> dict[str, Any] | None:
        """Read how the job ends, if it does. What was read once is known when the store is gone."""
        with contextlib.suppress(RuntimeError):
            asks = self._ended is None and self.open.is_set() and not self.closed.is_set()
            if asks and self.store.check(["end"]):
                self._ended = json.loads(self.store.get("end"))
        return self._ended
