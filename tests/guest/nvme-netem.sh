#!/bin/bash
# Runs in the guest: a bad network between the kernel's initiator and the target, below TCP and in both directions (netem on
# both ends of a veth pair). What fio writes it verifies; digests are on.
#   nvme-netem.sh CRYPTFOLD
set -uo pipefail
. "$(dirname "$0")/steps.sh"
[ $# -eq 1 ] || { echo "usage: $0 CRYPTFOLD" >&2; exit 2; }
binary=$1
for module in nvme-tcp veth sch_netem; do
    modprobe "$module" 2>/dev/null || fail "no module $module"
done
work=/dev/shm/netem
mkdir -p "$work" && export CRYPTFOLD_KEYS=$work/keys
nqn=nqn.2026-01.io.cryptfold:netem

step "two ends of a cable"
ip netns add far && ip link add near0 type veth peer name far0 netns far || fail "no namespace or cable"
run ip addr add 10.9.0.1/24 dev near0
run ip link set near0 up
run ip -n far addr add 10.9.0.2/24 dev far0
run ip -n far link set far0 up
run ip -n far link set lo up
# network KIND OPTION...: of both directions.
network() {
    run tc qdisc replace dev near0 root netem limit 10000 "$@"
    run ip netns exec far tc qdisc replace dev far0 root netem limit 10000 "$@"
}
# lost: packets that the near end has dropped so far.
lost() { tc -s qdisc show dev near0 | sed -n 's/.*dropped \([0-9]*\).*/\1/p'; }
cat >"$work/config.json" <<JSON
{"subsystems": [
  {"subsystem": "bdev", "config": [
    {"method": "bdev_malloc_create", "params": {"name": "ram", "num_blocks": 16384, "block_size": 4096}}]},
  {"subsystem": "nvmf", "config": [
    {"method": "nvmf_create_transport", "params": {"trtype": "TCP"}},
    {"method": "nvmf_create_subsystem", "params": {"nqn": "$nqn", "allow_any_host": true, "serial_number": "NETEM001"}},
    {"method": "nvmf_subsystem_add_ns", "params": {"nqn": "$nqn", "namespace": {"bdev_name": "ram"}}},
    {"method": "nvmf_subsystem_add_listener", "params": {"nqn": "$nqn", "listen_address":
      {"trtype": "TCP", "adrfam": "IPv4", "traddr": "10.9.0.2", "trsvcid": "4420"}}}]}]}
JSON
ip netns exec far "$binary" target -r "$work/rpc.sock" -c "$work/config.json" --cores 0 >"$work/log" 2>&1 &
target=$!
within 60 grep -q '^cryptfold: ready' "$work/log"
run nvme connect -t tcp -a 10.9.0.2 -s 4420 -n "$nqn" -i 2 -k 5 -l 300 -c 1 -g -G
within 60 test -b /dev/nvme0n1
pass

# under_fio SECONDS: starts it.
under_fio() {
    timeout $(($1 + 120)) fio --name=netem --filename=/dev/nvme0n1 --rw=randrw --bsrange=4k-64k --blockalign=4k --ioengine=libaio \
        --iodepth=8 --direct=1 --size=48m --time_based --runtime="$1" --verify=crc32c --verify_fatal=1 --verify_backlog=32 \
        --rate_iops=100,100 >"$work/fio.log" 2>&1 &
    fio=$!
}
fio_is_content() {
    wait "$fio" || fail "fio: $(tail -n 20 "$work/fio.log")"
    grep -qE 'err= 0' "$work/fio.log" || fail "fio: $(tail -n 20 "$work/fio.log")"
    dmesg | grep -E 'Buffer I/O error|digest error|BUG:|Oops:' && fail "the kernel complains"
    process_is_there || fail "the target ended: $(tail -n 5 "$work/log")"
    grep -E '^ *(read|write): ' "$work/fio.log"
}
process_is_there() { kill -0 "$target" 2>/dev/null; }

step "2% of the packets lost, 5 ms late, a quarter out of order, 1% twice"
network delay 5ms 3ms 25% loss 2% reorder 75% 50% duplicate 1%
under_fio 20
fio_is_content
[ "$(lost)" -gt 10 ] || fail "the network lost $(lost) packets: nothing was tested"
pass

step "bursts of loss: half of the packets behind a lost one"
network delay 1ms loss 3% 50%
under_fio 15
fio_is_content
pass

step "nothing passes for 12 s: the host connects again"
network delay 1ms
under_fio 35
sleep 4
network loss 100%
sleep 12
network delay 1ms
fio_is_content
dmesg | grep -q 'Successfully reconnected' || fail "the kernel did not reconnect"
pass

run nvme disconnect -n "$nqn"
kill -TERM "$target" && wait "$target" || { step=end; fail "the target did not end well: $(tail -n 5 "$work/log")"; }
echo "all steps passed in $SECONDS s"
