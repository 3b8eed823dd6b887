#!/bin/bash
# Runs in the guest (scripts/guest-run): DH-HMAC-CHAP of the Linux kernel's NVMe/TCP initiator.
#   auth.sh TRADDR PORT SUBNQN HOSTNQN SECRET CTRLSECRET OTHERSECRET
# The target knows HOSTNQN with SECRET and has CTRLSECRET itself. One PASS or FAIL line per step.
set -uo pipefail

[ $# -eq 7 ] || { echo "usage: $0 TRADDR PORT SUBNQN HOSTNQN SECRET CTRLSECRET OTHERSECRET" >&2; exit 2; }
traddr=$1 port=$2 nqn=$3 host=$4 secret=$5 ctrl=$6 other=$7

. "$(dirname "$0")/steps.sh"
modprobe nvme-tcp 2>/dev/null || fail "no nvme-tcp module"

try() {
    timeout 60 nvme connect -t tcp -a "$traddr" -s "$port" -n "$nqn" --hostnqn="$host" \
        --hostid=6f1a0b54-5a3c-4f0e-9d2a-7c1b7e6f0a12 -i 2 -k "${kato:-5}" -l 5 "$@" 2>&1
}
works() {
    local output tries
    output=$(try "$@") || fail "refused: $output"
    for ((tries = 0; tries < 600; tries++)); do
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

step "without a secret" && refused
step "with another secret" && refused --dhchap-secret="$other"
step "one way, admin and 2 I/O queues" && works --dhchap-secret="$secret"
step "both ways" && works --dhchap-secret="$secret" --dhchap-ctrl-secret="$ctrl"
# writes CORE: I/O without a pause until told to stop, on the queue of this core; a line in a file for each round.
writes() {
    while [ ! -e /tmp/stop ]; do
        taskset -c "$1" timeout 60 dd if=/dev/zero of=/dev/nvme0n1 bs=64k count=8 seek=$((1 + $1 * 64)) oflag=direct status=none || return 1
        echo round >>"/tmp/rounds.$1"
    done
}
# wrote N M: the first has written N rounds, the second M.
wrote() { [ "$(wc -l </tmp/rounds.0)" -ge "$1" ] && [ "$(wc -l </tmp/rounds.1)" -ge "$2" ]; }
# news: what the kernel has said since `before`.
news() { dmesg | tail -n +$((before + 1)); }
# all_proved: each queue has got to the last message of its transaction.
all_proved() {
    local qid
    for qid in 0 1 2; do
        news | grep -q "qid $qid send success2" || return 1
    done
}
# The kernel authenticates again, on all queues, when its secret is set.
again() {
    local output tries before core writers=()
    # An emulated kernel that is kept busy may be late with its Keep Alive.
    output=$(kato=30 && try "$@") || fail "refused: $output"
    for ((tries = 0; tries < 600; tries++)); do
        [ -b /dev/nvme0n1 ] && break
        sleep 0.1
    done
    # Of queues other than the admin queue the kernel speaks only so.
    echo 'file drivers/nvme/host/auth.c +p' >/proc/dynamic_debug/control || fail "the kernel can not tell of its steps"
    : >/tmp/rounds.0 && : >/tmp/rounds.1
    for core in 0 1; do
        writes "$core" &
        writers+=($!)
    done
    within 60 wrote 1 1
    before=$(dmesg | wc -l)
    echo "$secret" >/sys/class/nvme/nvme0/dhchap_secret || fail "the secret can not be set"
    within 60 all_proved
    # Rounds that began after the last message of the transactions, too: the writers never paused.
    within 60 wrote $(($(wc -l </tmp/rounds.0) + 2)) $(($(wc -l </tmp/rounds.1) + 2))
    touch /tmp/stop
    for core in "${writers[@]}"; do
        wait "$core" || fail "I/O failed meanwhile"
    done
    news | grep -iE 'fail|reset|reconnect|recovery' && fail "the kernel complains"
    timeout 30 nvme disconnect -n "$nqn" >/dev/null || fail "no disconnect"
    pass
}
step "again, under I/O" && again --dhchap-secret="$secret" --dhchap-ctrl-secret="$ctrl"
step "the target has another secret than the host expects" && refused --dhchap-secret="$secret" --dhchap-ctrl-secret="$other"
dmesg | grep -iE 'Call Trace|BUG:' && { step end; fail "the kernel complains"; }
echo "all steps passed in $SECONDS s"
