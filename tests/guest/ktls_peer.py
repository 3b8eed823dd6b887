"""A host that is OpenSSL's s_client, for ktls.sh:
  ktls_peer.py new                                   prints a key (NVMeTLSkey-1:...)
  ktls_peer.py KEYFILE HOSTNQN SUBNQN PORT greet       ICReq, ICResp, good-bye
  ktls_peer.py KEYFILE HOSTNQN SUBNQN PORT inject HEX  the same, then these bytes in the middle of the stream; the target has to end it
  ktls_peer.py KEYFILE HOSTNQN SUBNQN PORT update      sends a KeyUpdate
"""

import base64
import hashlib
import hmac
import os
import socket
import subprocess
import sys
import threading
import zlib

# NVMe/TCP 1.0 section 3.6.2.2: type 0, 128 bytes.
ICREQ = bytes([0, 0, 128, 0, 128, 0, 0, 0]) + bytes(120)
PATIENCE = 90


def derive(key, label, context):
    """HKDF-Expand-Label over HKDF-Extract, SHA-256 (RFC 8446 section 7.1)."""
    secret = hmac.new(bytes(32), key, hashlib.sha256).digest()
    info = b"\0\x20" + bytes([6 + len(label)]) + b"tls13 " + label + bytes([len(context)]) + context
    return hmac.new(secret, info + b"\1", hashlib.sha256).digest()


def client(port, more):
    """s_client with the identity of version 0 (NVMe/TCP 1.0 section 3.6.1)."""
    with open(sys.argv[1], encoding="ascii") as f:
        key = base64.b64decode(f.read().split(":")[2])[:-4]
    host, subsystem = sys.argv[2:4]
    identity = f"NVMe0R01 {host} {subsystem}"
    psk = derive(derive(key, b"HostNQN", host.encode()), b"nvme-tls-psk", identity.encode())
    command = ["openssl", "s_client", "-tls1_3", "-connect", f"127.0.0.1:{port}", "-psk_identity", identity, "-psk", psk.hex()]
    return subprocess.Popen(command + more, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def greet(port):
    process = client(port, ["-quiet", "-no_ign_eof"])
    process.stdin.write(ICREQ)
    process.stdin.flush()
    answer = process.stdout.read(128)
    assert len(answer) == 128 and answer[0] == 1, f"no ICResp: {answer!r}"
    return process


def inject(port, garbage):
    """The client goes through a relay, which forwards what it says until the target has greeted, then sends garbage to the target."""
    listener = socket.create_server(("127.0.0.1", 0))
    threads = []

    def relay():
        near, _ = listener.accept()
        far = socket.create_connection(("127.0.0.1", port))
        far.settimeout(PATIENCE)

        def forward():
            while data := near.recv(65536):
                far.sendall(data)

        threads.append(threading.Thread(target=forward, daemon=True))
        threads[-1].start()
        sockets.extend([near, far])
        try:
            while data := far.recv(65536):
                near.sendall(data)
        except ConnectionResetError:
            pass
        over.set()

    sockets, over = [], threading.Event()
    threading.Thread(target=relay, daemon=True).start()
    process = greet(listener.getsockname()[1])
    sockets[1].sendall(garbage)
    assert over.wait(PATIENCE), "the target did not end the connection"
    process.kill()
    process.wait()


def main():
    if sys.argv[1:] == ["new"]:
        key = os.urandom(32)
        crc = zlib.crc32(key).to_bytes(4, "little")
        print(f"NVMeTLSkey-1:01:{base64.b64encode(key + crc).decode()}:")
        return
    port, what = int(sys.argv[4]), sys.argv[5]
    if what == "greet":
        process = greet(port)
        process.stdin.close()
        assert process.wait(PATIENCE) == 0
    elif what == "inject":
        inject(port, bytes.fromhex(sys.argv[6]))
    elif what == "update":
        # Without -quiet a line that begins with "k" is a command.
        process = client(port, [])
        process.stdin.write(b"k\n")
        process.stdin.flush()
        # The target ends it.
        process.stdout.read()
        process.stdin.close()
        process.wait(PATIENCE)
    else:
        raise SystemExit(f"{what}?")


main()
