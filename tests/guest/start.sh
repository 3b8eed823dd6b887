#!/bin/bash
# Runs in the guest (scripts/guest-run): the commands of README.md and docs/guide.md, as they stand and in order, but for those that
# build, install or show.
#   start.sh README GUIDE CRYPTFOLD
# One PASS or FAIL line for each section.
set -uo pipefail
. "$(dirname "$0")/steps.sh"
[ $# -eq 3 ] || { echo "usage: $0 README GUIDE CRYPTFOLD" >&2; exit 2; }
readme=$1 guide=$2 cryptfold=$3
mkdir -p /tmp/bin /tmp/start
mount -t tmpfs -o size=1G tmpfs /var/tmp
# What the build makes.
ln -s "$cryptfold" /tmp/bin/cryptfold
export PATH="/tmp/bin:$PATH"
cd /tmp/start || exit 2

step "the documents' blocks"
commands_of 'sh( build| demo| package)?|text' "$readme" "$guide" >commands
bash -n commands || fail "no shell"
for heading in "Try it" "1. A volume" "6. The end"; do
    grep -q "^section .$heading" commands || fail "no section $heading: $(grep ^section commands)"
done
pass
step "the commands"
timeout 700 bash -x commands 3>&1 >said 2>&1 || fail "$(tail -n 40 said; tail -n 20 /var/tmp/cryptfold/target.log 2>&1)"
step "what they promise"
grep -q '^nvme connect -t tcp -a 127.0.0.1 -s 4420 -n nqn.2026-01.io.example:vol$' said || fail "no line for hosts: $(cat said)"
grep -q 'pool: clean; 0 problems in' said && grep -q '^pool: done, .* 0 damaged' said || fail "not checked: $(tail -n 60 said)"
"$cryptfold" rpc bdev_lvol_get_lvstores >pools || fail "$(cat pools)"
# Three copies of one file, one of them encrypted by its host: less than the file itself.
python3 - pools /usr/bin/python3 <<'PY' || fail "$(cat pools)"
import json, os, sys
pool, file = json.load(open(sys.argv[1]))[0], os.stat(sys.argv[2]).st_size
assert pool["logical_bytes"] > 2 * file and pool["stored_bytes"] < file, (pool, file)
PY
pass
echo "all steps passed in $SECONDS s"
