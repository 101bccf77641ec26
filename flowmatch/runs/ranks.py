"""The number of this process within its job, whatever launcher has started it.

torchrun and `accelerate launch` set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. The
numbers of mpirun and srun are taken as these; a job that is half described is refused.
"""

import os

from flowmatch.config import UserError

OWN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
OTHERS = (  # Open MPI; MVAPICH; MPICH and Intel MPI; srun
    tuple(f"OMPI_COMM_WORLD_{word}" for word in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    tuple(f"MV2_COMM_WORLD_{word}" for word in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    SLURM,
)
PORT = "29500"  # torchrun's
WAY = "set what is missing, or start the processes with accelerate launch"

_told: tuple[str, ...] = OWN  # the variables that have told the numbers


def settle() -> None:
    """Take the numbers of another launcher as RANK, WORLD_SIZE and LOCAL_RANK.

    Raises:
        UserError: A number is missing, is none, or does not fit the others.
    """
    environment = os.environ
    if environment.get("LOCAL_RANK") == "-1":  # "no launcher", as scripts write it
        del environment["LOCAL_RANK"]
    global _told
    names = _names()
    if names is None:
        return
    _told = names
    faults = [
        f"{name}={environment[name]!r}: expected a number; outside a job of several processes leave "
        f"{' and '.join(names[:2])} out"
        for name in names[:3]
        if not environment.get(name, "0").isdecimal()
    ]
    if faults:
        raise UserError(faults)
    rank, size, local = (int(environment[n]) if n in environment else None for n in names[:3])
    if size is None and not rank:
        size = 1
    if rank is None and size == 1:
        rank = 0
    if rank is None or size is None:
        missing = names[0] if rank is None else names[1]
        raise UserError(f"{_given(names)}: {missing} is missing; {WAY}")
    if rank >= size:
        raise UserError(f"{_given(names)}: expected a {names[0]} from 0 to {names[1]} - 1")
    if size == 1:
        return
    environment |= {"RANK": str(rank), "WORLD_SIZE": str(size)}
    if local is not None:
        environment["LOCAL_RANK"] = str(local)
    if environment.get(names[3]) == str(size):  # all of them on this machine
        environment.setdefault("MASTER_ADDR", "127.0.0.1")
    environment.setdefault("MASTER_PORT", PORT)


def launched() -> bool:
    """Tell whether a launcher has started this process, and is its parent."""
    marks = ("TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_BACKEND")
    return any(name in os.environ for name in marks) or _names() in OTHERS


def check_group() -> None:
    """Check that the processes of a job know where to meet.

    Raises:
        UserError: A variable is missing, or is no number where torch reads one.
    """
    environment = os.environ
    if environment.get("WORLD_SIZE", "1") == "1" and "LOCAL_RANK" not in environment:
        return
    faults = []
    if not environment.get("MASTER_ADDR"):
        faults.append(
            f"{_given(_told)}: MASTER_ADDR is missing: the address of the machine of rank 0 (127.0.0.1 "
            f"where all are on one); {WAY}"
        )
    for name in ("MASTER_PORT", "OMP_NUM_THREADS"):  # Accelerate reads the second one as a number
        value = environment.get(name, "1")
        if not value.isdecimal() or int(value) >= 2**16:
            faults.append(f"{name}={value!r}: expected a number")
    if faults:
        raise UserError(faults)


def _names() -> tuple[str, ...] | None:
    """Return the variables of the launcher that has set some."""
    if any(name in os.environ for name in OWN[:3]):
        return OWN
    for names in OTHERS:
        if names[1] in os.environ or (names[0] in os.environ and names != SLURM):
            return names
    return None


def _given(names: tuple[str, ...]) -> str:
    return ", ".join(f"{name}={os.environ[name]}" for name in names[:3] if name in os.environ)
