"""A target with a pool, volumes and hosts that do I/O, for the tests of its page."""

import json
import os
import socket
import subprocess
import time

NQN = "nqn.2026-01.io.cryptfold:page"
# What a host or an operator may call things; the page has to show it, and nothing else.
HOSTILE_VOLUME = "<script>document.title='owned'<script>\"'&<img src=x onerror=alert(1)>"
HOSTILE_HOST = "nqn.2026-01.io.example:<script>document.title='owned'</script><img src=x onerror=alert(1)>"
HOST = "nqn.2026-01.io.example:database"
# Generous: two busy cores. Nothing waits that long unless it is broken.
PATIENCE = 120


class Failure(Exception):
    """Something is not as it has to be."""


def wait(what, probe):
    """The first true result of probe; Failure says what was waited for and what there was last."""
    deadline = time.monotonic() + PATIENCE
    while True:
        result = probe()
        if result:
            return result
        if time.monotonic() > deadline:
            raise Failure(f"{what}: not within {PATIENCE} s, last: {result!r}")
        time.sleep(0.1)


def wait_equal(what, probe):
    """Until both halves of what probe gives are the same; Failure shows what was different last."""
    last = [None, None]

    def same():
        last[:] = probe()
        return last[0] == last[1]

    try:
        wait(what, same)
    except Failure:
        raise Failure(f"{what}: not within {PATIENCE} s; expected {last[1]!r}, got {last[0]!r}") from None


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Target:
    """`cryptfold target` with its page at .url; what it is told goes to DIR/NAME.log."""

    def __init__(self, program, directory, name, *options):
        self.program, self.directory, self.options = program, directory, options
        self.socket, self.log = f"{directory}/{name}.sock", f"{directory}/{name}.log"
        self.http = free_port()
        self.url = f"http://127.0.0.1:{self.http}"
        self.process = None

    def start(self, *options):
        command = [self.program, "target", "-r", self.socket, "--http", f"127.0.0.1:{self.http}", *self.options, *options]
        environment = dict(os.environ, CRYPTFOLD_KEYS=f"{self.directory}/keys")
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        wait("the target is ready", self.is_ready)

    def is_ready(self):
        with open(self.log) as log:
            text = log.read()
        if self.process.poll() is not None:
            raise Failure(f"the target has ended with {self.process.returncode}: {text}")
        return "cryptfold: ready" in text

    def kill(self):
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process = None

    def stop(self):
        """In order; the status has to be 0."""
        self.process.terminate()
        status = self.process.wait(PATIENCE)
        self.process = None
        if status != 0:
            raise Failure(f"the target ended with status {status}")

    def call(self, method, **params):
        request = {"jsonrpc": "2.0", "id": 1, "method": method}
        if params:
            request["params"] = params
        with socket.socket(socket.AF_UNIX) as s:
            s.settimeout(PATIENCE)
            s.connect(self.socket)
            s.sendall(json.dumps(request).encode())
            text = b""
            while True:
                piece = s.recv(1 << 16)
                if not piece:
                    raise Failure(f"{method}: no reply but {text!r}")
                text += piece
                try:
                    reply = json.loads(text)
                    break
                except ValueError:
                    continue
        if "error" in reply:
            raise Failure(f"{method} {params}: {reply['error']}")
        return reply["result"]

    def pool(self):
        return self.call("bdev_lvol_get_lvstores")[0]


def set_up(target, size_gib=2):
    """A pool in a file, volumes in two domains, a snapshot, a subsystem with two namespaces; returns the port of NVMe/TCP."""
    disk = f"{target.directory}/disk"
    with open(disk, "wb") as file:
        file.truncate(size_gib << 30)
    call = target.call
    call("bdev_uring_create", name="disk", filename=disk, block_size=4096)
    call("bdev_lvol_create_lvstore", bdev_name="disk", lvs_name="tank")
    for name, mib, domain in [("database", 512, "default"), ("mail", 256, "default"), (HOSTILE_VOLUME, 256, "tenant-b")]:
        call("bdev_lvol_create", lvs_name="tank", lvol_name=name, size_in_mib=mib, domain=domain)
    # More than the tables show at first.
    for n in range(1, 13):
        call("bdev_lvol_create", lvs_name="tank", lvol_name=f"vm-{n}", size_in_mib=64 * n)
    port = free_port()
    call("nvmf_create_transport", trtype="TCP")
    call("nvmf_create_subsystem", nqn=NQN, allow_any_host=True)
    for volume in ("database", HOSTILE_VOLUME):
        call("nvmf_subsystem_add_ns", nqn=NQN, namespace={"bdev_name": f"tank/{volume}"})
    address = {"trtype": "TCP", "adrfam": "IPv4", "traddr": "127.0.0.1", "trsvcid": str(port)}
    call("nvmf_subsystem_add_listener", nqn=NQN, listen_address=address)
    call("bdev_lvol_snapshot", lvol_name="tank/mail", snapshot_name="mail-monday")
    return port


class Load:
    """Hosts that read and write for as long as they are let."""

    def __init__(self, perf, port, directory):
        self.perf, self.port, self.directory, self.processes = perf, port, directory, []

    def start(self, host, nsid, *options, rw="randrw", runtime=1200):
        command = [self.perf, "nvmf", "--traddr", "127.0.0.1", "--trsvcid", str(self.port), "--subnqn", NQN, "--nsid", str(nsid),
                   "--hostnqn", host, "--rw", rw, "--iodepth", "2", "--runtime", str(runtime), *options]
        with open(f"{self.directory}/load-{nsid}.log", "w") as log:
            self.processes.append(subprocess.Popen(command, stdout=log, stderr=log))

    def alive(self):
        return all(process.poll() is None for process in self.processes)

    def stop(self):
        for process in self.processes:
            process.kill()
            process.wait()
        self.processes = []
