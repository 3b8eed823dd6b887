#!/bin/bash
# Runs in the guest (scripts/guest-run): DH-HMAC-CHAP of the Linux kernel's NVMe/TCP initiator.
#   auth.sh TRADDR PORT SUBNQN HOSTNQN SECRET CTRLSECRET OTHERSECRET
# The target knows HOSTNQN with SECRET and has CTRLSECRET itself. One PASS or FAIL line per step.
set -uo pipefail

[ $# -eq 7 ] || { echo "usage: $0 TRADDR PORT SUBNQN HOSTNQN SECRET CTRLSECRET OTHERSECRET" >&2; exit 2; }
traddr=$1 port=$2 nqn=$3 host=$4 secret=$5 ctrl=$6 other=$7

fail() {
    printf 'FAIL %s: %s\n--- kernel log\n' "$step" "$*"
    dmesg | tail -n 25
    exit 1
}
pass() { printf 'PASS %s\n' "$step"; }
modprobe nvme-tcp 2>/dev/null || { step=start; fail "no nvme-tcp module"; }

try() {
    timeout 60 nvme connect -t tcp -a "$traddr" -s "$port" -n "$nqn" --hostnqn="$host" \
        --hostid=6f1a0b54-5a3c-4f0e-9d2a-7c1b7e6f0a12 -i 2 -k 5 -l 5 "$@" 2>&1
}
works() {
    local output tries
    output=$(try "$@") || fail "refused: $output"
    for ((tries = 0; tries < 100; tries++)); do
        [ -b /dev/nvme0n1 ] && break
        sleep 0.1
    done
    timeout 30 dd if=/dev/zero of=/dev/nvme0n1 bs=1M count=4 oflag=direct status=none || fail "no I/O"
    timeout 30 nvme disconnect -n "$nqn" >/dev/null || fail "no disconnect"
    pass
}
refused() {
    local output
    output=$(try "$@") && fail "connected"
    pass
}

step="without a secret" && refused
step="with another secret" && refused --dhchap-secret="$other"
step="one way, admin and 2 I/O queues" && works --dhchap-secret="$secret"
step="both ways" && works --dhchap-secret="$secret" --dhchap-ctrl-secret="$ctrl"
# The kernel authenticates again, on all queues, when its secret is set.
again() {
    local output tries before
    output=$(try "$@") || fail "refused: $output"
    for ((tries = 0; tries < 100; tries++)); do
        [ -b /dev/nvme0n1 ] && break
        sleep 0.1
    done
    before=$(dmesg | wc -l)
    timeout 60 dd if=/dev/zero of=/dev/nvme0n1 bs=64k count=400 oflag=direct status=none &
    local io=$!
    echo "$secret" >/sys/class/nvme/nvme0/dhchap_secret || fail "the secret can not be set"
    for ((tries = 0; tries < 300; tries++)); do
        dmesg | tail -n +$((before + 1)) | grep -q 'qid 0: authenticated' && break
        sleep 0.1
    done
    dmesg | tail -n +$((before + 1)) | grep -q 'qid 0: authenticated' || fail "it has not authenticated again"
    # The kernel speaks of I/O queues only when they fail.
    sleep 5
    wait "$io" || fail "I/O failed meanwhile"
    dmesg | tail -n +$((before + 1)) | grep -iE 'failed|reset|reconnect' && fail "the kernel complains"
    timeout 30 nvme disconnect -n "$nqn" >/dev/null || fail "no disconnect"
    pass
}
step="again, under I/O" && again --dhchap-secret="$secret" --dhchap-ctrl-secret="$ctrl"
step="the target has another secret than the host expects" && refused --dhchap-secret="$secret" --dhchap-ctrl-secret="$other"
dmesg | grep -iE 'Call Trace|BUG:' && { step=end; fail "the kernel complains"; }
echo "all steps passed in $SECONDS s"
