#!/usr/bin/env python3
"""A small NVMe/TCP host, for tests only: one admin and one I/O queue, one command at a time.

    nvme_tcp.py ADDRESS PORT SUBNQN write|verify NSID SEED MIB

`write` fills the first MIB mebibytes of the namespace with bytes that follow from SEED and flushes; `verify` reads them
back and compares. It shares no code with the target. NVMe/TCP transport 1.1 section 3.6, NVMe over Fabrics 1.1 section 3,
NVM command set 1.0.
"""

import random
import socket
import struct
import sys
import uuid

ICREQ, ICRESP, C2H_TERM, COMMAND, RESPONSE, H2C_DATA, C2H_DATA, R2T = 0, 1, 3, 4, 5, 6, 7, 9
LAST_PDU, SUCCESS = 0x04, 0x08
FABRICS, CONNECT, PROPERTY_SET, PROPERTY_GET = 0x7F, 1, 0, 4
CC, CSTS, ENABLED = 0x14, 0x1C, 0x460001  # 64-byte submissions, 16-byte completions, enable
HOST_NQN = "nqn.2014-08.org.nvmexpress:uuid:0b5f7f6e-4f63-4a53-9b64-0a5f2e1d9c77"
TRANSFER = 64 * 1024  # bytes per read or write


class NvmeError(Exception):
    """A completion with a status other than success."""


class Queue:
    """One queue, that is one TCP connection."""

    def __init__(self, address, port):
        self.socket = socket.create_connection((address, port), timeout=30)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.in_capsule_bytes = 8192  # what fabrics and admin commands may carry; lower for I/O, from Identify
        self.cid = 0
        self.socket.sendall(struct.pack("<BBBBIHBBI112x", ICREQ, 0, 128, 0, 128, 0, 0, 0, 0))
        kind, _, header, data = self.receive()
        if kind != ICRESP:
            raise NvmeError(f"PDU type {kind} instead of ICResp")
        self.max_h2c_bytes = struct.unpack_from("<HBBI", data if data else header, 0)[3]

    def read_exactly(self, count):
        parts = bytearray()
        while len(parts) < count:
            part = self.socket.recv(count - len(parts))
            if not part:
                raise NvmeError("the target closed the connection")
            parts += part
        return bytes(parts)

    def receive(self):
        """The next PDU: type, flags, header after the common part, data."""
        kind, flags, hlen, pdo, plen = struct.unpack("<BBBBI", self.read_exactly(8))
        rest = self.read_exactly(plen - 8)
        if kind == C2H_TERM:
            raise NvmeError(f"the target ended the connection: {rest[:8].hex()}")
        return kind, flags, rest[: hlen - 8], rest[pdo - 8 :] if pdo else b""

    def command(self, opcode, nsid=0, fields=(), write=b"", read_bytes=0):
        """Runs one command. `fields` are (offset, format, value) in the submission. Returns (dw0..1, data read)."""
        self.cid = (self.cid + 1) % 0xFFF0
        sqe = bytearray(64)
        struct.pack_into("<BBHI", sqe, 0, opcode, 0x40, self.cid, nsid)
        in_capsule = 0 < len(write) <= self.in_capsule_bytes
        if in_capsule:
            struct.pack_into("<QI3xB", sqe, 24, 0, len(write), 0x01)
        else:
            struct.pack_into("<QI3xB", sqe, 24, 0, len(write) or read_bytes, 0x5A)
        for offset, form, value in fields:
            struct.pack_into("<" + form, sqe, offset, value)
        data = write if in_capsule else b""
        pdo = 72 if data else 0
        self.socket.sendall(struct.pack("<BBBBI", COMMAND, 0, 72, pdo, 72 + len(data)) + sqe + data)
        result, received, whole = bytearray(read_bytes), 0, False
        while True:
            kind, flags, header, data = self.receive()
            if kind == C2H_DATA:
                cccid, _, offset, length = struct.unpack_from("<HHII", header)
                if cccid != self.cid or length != len(data) or offset + length > read_bytes:
                    raise NvmeError(f"C2HData for command {cccid}, {offset}+{length} of {read_bytes} bytes")
                result[offset : offset + length] = data
                received += length
                whole = received == read_bytes
                if flags & SUCCESS:
                    if not whole:
                        raise NvmeError(f"success after {received} of {read_bytes} bytes")
                    return 0, bytes(result)
            elif kind == R2T:
                self.send_requested(header, write)
            elif kind == RESPONSE:
                value, _, _, cid, status = struct.unpack_from("<QHHHH", header)
                if cid != self.cid:
                    raise NvmeError(f"completion of {cid}, expected {self.cid}")
                if status >> 1:
                    raise NvmeError(f"opcode {opcode:#x}: status code type {status >> 9 & 7}, code {status >> 1 & 0xFF:#x}")
                if opcode != FABRICS and read_bytes and not whole:
                    raise NvmeError(f"completed after {received} of {read_bytes} bytes")
                return value, bytes(result)
            else:
                raise NvmeError(f"unexpected PDU type {kind}")

    def send_requested(self, header, write):
        cccid, ttag, offset, length = struct.unpack_from("<HHII", header)
        if cccid != self.cid or offset + length > len(write):
            raise NvmeError(f"R2T for command {cccid}, {offset}+{length} of {len(write)} bytes")
        end = offset + length
        while offset < end:
            part = write[offset : min(end, offset + self.max_h2c_bytes)]
            flags = LAST_PDU if offset + len(part) == end else 0
            self.socket.sendall(
                struct.pack("<BBBBIHHII4x", H2C_DATA, flags, 24, 24, 24 + len(part), cccid, ttag, offset, len(part)) + part
            )
            offset += len(part)

    def connect(self, qid, controller, subnqn, host_id, entries):
        data = struct.pack("<16sH238x256s256s256x", host_id, controller, subnqn.encode(), HOST_NQN.encode())
        fields = [(4, "B", CONNECT), (42, "H", qid), (44, "H", entries - 1)]
        return self.command(FABRICS, fields=fields, write=data)[0] & 0xFFFF


class Host:
    """A connected, enabled controller with one I/O queue."""

    def __init__(self, address, port, subnqn):
        host_id = uuid.UUID(HOST_NQN.rsplit(":", 1)[1]).bytes
        self.admin = Queue(address, port)
        controller = self.admin.connect(0, 0xFFFF, subnqn, host_id, 32)
        self.admin.command(FABRICS, fields=[(4, "B", PROPERTY_SET), (44, "I", CC), (48, "Q", ENABLED)])
        for _ in range(100):
            ready = self.admin.command(FABRICS, fields=[(4, "B", PROPERTY_GET), (44, "I", CSTS)])[0]
            if ready & 1:
                break
        else:
            raise NvmeError(f"CSTS.RDY never rose: {ready:#x}")
        identity = self.admin.command(0x06, fields=[(40, "I", 1)], read_bytes=4096)[1]
        (capsule,) = struct.unpack_from("<I", identity, 1792)
        self.io = Queue(address, port)
        self.io.connect(1, controller, subnqn, host_id, 32)
        self.io.in_capsule_bytes = max(0, capsule * 16 - 64)

    def block_bytes(self, nsid):
        space = self.admin.command(0x06, nsid, read_bytes=4096)[1]
        blocks, flbas = struct.unpack_from("<Q", space)[0], space[26]
        if blocks == 0:
            raise NvmeError(f"namespace {nsid} does not exist")
        return 1 << space[128 + 4 * (flbas & 0xF) + 2]

    def transfer(self, opcode, nsid, block, offset, count, data=b""):
        fields = [(40, "Q", offset // block), (48, "H", count // block - 1)]
        return self.io.command(opcode, nsid, fields, write=data, read_bytes=0 if data else count)[1]

    def flush(self, nsid):
        self.io.command(0x00, nsid)


def pattern(seed, offset):
    """TRANSFER bytes, unlike those of any other seed or offset; half of them compressible."""
    half = random.Random(f"{seed}/{offset}").randbytes(TRANSFER // 2)
    return half + (f"{seed}/{offset};".encode() * TRANSFER)[: TRANSFER // 2]


def main():
    address, port, subnqn, action, nsid, seed, mib = sys.argv[1:]
    nsid = int(nsid)
    host = Host(address, int(port), subnqn)
    block = host.block_bytes(nsid)
    for offset in range(0, int(mib) << 20, TRANSFER):
        expected = pattern(seed, offset)
        if action == "write":
            # The first block of each transfer goes alone: small enough for the capsule, where larger ones need an R2T.
            host.transfer(0x01, nsid, block, offset, 4096, expected[:4096])
            host.transfer(0x01, nsid, block, offset + 4096, TRANSFER - 4096, expected[4096:])
        elif host.transfer(0x02, nsid, block, offset, TRANSFER) != expected:
            sys.exit(f"namespace {nsid}: wrong data in the {TRANSFER} bytes at {offset}")
    if action == "write":
        host.flush(nsid)
    print(f"{action} of {mib} MiB on namespace {nsid}, seed {seed}: done")


if __name__ == "__main__":
    if len(sys.argv) != 8 or sys.argv[4] not in ("write", "verify"):
        sys.exit(__doc__)
    try:
        main()
    except (NvmeError, OSError) as error:
        sys.exit(f"nvme_tcp.py: {error}")
