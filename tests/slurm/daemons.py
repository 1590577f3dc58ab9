"""The daemons of a SLURM cluster whose nodes all are this machine: `python daemons.py FOLDER NODES`, which ends them when its input ends.

A process of its own that adopts whatever its descendants leave behind (slurmstepd detaches itself): tests that are killed close the
pipe as those that fail do, and nothing of the cluster is left. Everything lies in FOLDER; nothing of the machine's own SLURM is touched.
A line `start NODE` on the input starts a node's slurmd again.
"""

from __future__ import annotations

import ctypes
import getpass
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36

CONFIGURATION = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# a credential's lifetime is also how long a job that was requeued has to wait
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmctldPort={ports[0]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SlurmdParameters=config_overrides
GresTypes=gpu
# of the test machine's cores and memory more is promised than there is: no job computes much
ReturnToService=2
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0,batch_sched_delay=0
SlurmctldTimeout=30
SlurmdTimeout=5
KillWait=15
# longer than KillWait: a call that ends a step takes that long, and one that is not answered in time is made again a minute later, when
# the same step of the job's next start is under way; where a job waits two minutes to be queued again, as it does by default, nothing is there
MessageTimeout=60
MinJobAge=3600
# a job's id chooses the port at which its ranks meet: another cluster of this kind on the same machine begins elsewhere
FirstJobId={first}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
"""


def main(folder: Path, nodes: int) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # through the `finally` below
    adopt_orphans()
    with ExitStack() as ports_held:
        ports = [free_port(ports_held) for _ in range(nodes + 1)]
        write_configuration(folder, ports)
    # a configuration of its own is all by which SLURM's commands find this cluster
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    try:
        for command in (munge(folder), ["slurmctld", "-D", "-c"], *(slurmd(number) for number in range(1, nodes + 1))):
            start(command, folder)
        for line in sys.stdin:
            start(slurmd(int(line.split()[1])), folder)
    finally:
        end_all()


def adopt_orphans() -> None:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def end_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def free_port(held: ExitStack) -> int:
    """Held until all are found, so that no two are the same."""
    listener = held.enter_context(socket.socket())
    listener.bind(("127.0.0.1", 0))
    return int(listener.getsockname()[1])


def write_configuration(folder: Path, ports: list[int]) -> None:
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o600)
    host = socket.gethostname().split(".")[0]
    text = CONFIGURATION.format(host=host, user=getpass.getuser(), folder=folder, ports=ports, first=1 + secrets.randbelow(9000))
    for number, port in enumerate(ports[1:], 1):
        text += f"NodeName=node{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=16 RealMemory=64000 Gres=gpu:8 State=UNKNOWN\n"
    partition = f"Nodes=node[1-{len(ports) - 1}] MaxTime=INFINITE State=UP"
    text += f"PartitionName=batch {partition} Default=YES PriorityTier=1 GraceTime=60\n"
    text += f"PartitionName=urgent {partition} PriorityTier=2 PreemptMode=OFF\n"
    (folder / "slurm.conf").write_text(text)
    for gpu in range(8):  # slurmd wants a file for each GPU, of whatever kind
        (folder / f"gpu{gpu}").touch()
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-7]\n")
    (folder / "cgroup.conf").write_text("")


def munge(folder: Path) -> list[str]:
    options = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid", "log-file": "munged.log", "seed-file": "munged.seed"}
    return ["munged", "--foreground", "--force", "--num-threads=2", *(f"--{name}={folder / file}" for name, file in options.items())]


def slurmd(number: int) -> list[str]:
    return ["slurmd", "-D", "-N", f"node{number}"]


def start(command: list[str], folder: Path) -> None:
    """In a session of its own: Ctrl-C in a terminal is for the tests, which then close the pipe."""
    with (folder / "output.log").open("a") as output:
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True, preexec_fn=end_with_parent)
    if command[0] == "munged":
        deadline = time.monotonic() + 10
        while not (folder / "munge.socket").exists() and time.monotonic() < deadline:
            time.sleep(0.02)


def end_all() -> None:
    """Until nothing is left: a process that is killed may have started another a moment before."""
    while family := psutil.Process().children(recursive=True):
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=1)
        reap()


def reap() -> None:
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
