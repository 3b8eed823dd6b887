#!/bin/bash
# Runs in the guest (scripts/guest-run): the commands of docs/luks2-guide.md, as they stand and in order, but for the download.
#   guide.sh GUIDE CRYPTFOLD VENV
# One PASS or FAIL line for each section of the guide.
set -uo pipefail
. "$(dirname "$0")/steps.sh"
[ $# -eq 3 ] || { echo "usage: $0 GUIDE CRYPTFOLD VENV" >&2; exit 2; }
guide=$1 cryptfold=$2 venv=$3
mkdir -p /tmp/guide /tmp/bin
mount -t tmpfs -o size=1200M tmpfs /tmp/guide
ln -s "$cryptfold" /tmp/bin/cryptfold
export PATH="/tmp/bin:$PATH"
cd /tmp/guide || exit 2

step "the guide's blocks"
[ "$(grep -cx '```sh download' "$guide")" = 1 ] || fail "more than one download"
# What the download makes.
ln -s "$venv" kms
commands_of 'sh( download)?' "$guide" >commands
bash -n commands || fail "no shell"
[ "$(grep -c '^section .[1-9]' commands)" -ge 5 ] || fail "only these sections: $(grep '^section .[1-9]' commands)"
# Key server and target outlive the commands.
timeout 500 bash -x commands 3>&1 >said 2>&1 || fail "$(grep -vE '^(\+ (sleep|seq)|grep:)' said | tail -n 40; tail -n 20 target.log kms.log 2>&1)"
step "what it promises"
grep -qE '^vol +bound' said || fail "not bound: $(tail -n 60 said)"
"$cryptfold" rpc bdev_lvol_get_lvstores >pools || fail "$(cat pools)"
# Two copies of the same files: the second one takes next to nothing.
python3 - pools <<'PY' || fail "$(cat pools)"
import json, sys
pool = json.load(open(sys.argv[1]))[0]
header = 16 << 20  # never written twice, and random
assert pool["logical_bytes"] - header > 3 * (pool["stored_bytes"] - header), pool
PY
pass
echo "all steps passed in $SECONDS s"
