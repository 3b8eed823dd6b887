# shellcheck shell=bash
# Sourced by the scripts that run a guest which makes control requests.
# answer_guest DIR SOCKET: makes the control requests that the guest writes into DIR (rpc of steps.sh). A method that begins with
# kms_ is for the function kms of the script, with its parameters as words.
answer_guest() {
    local n=1 method params binary words
    trap - EXIT INT TERM
    binary=$(target_binary) || return 1
    while :; do
        if [ -e "$1/ask.$n" ]; then
            { read -r method && params=$(cat); } <"$1/ask.$n"
            case $method in
                kms_*) read -ra words <<<"$params" && kms "${method#kms_}" "${words[@]}" ;;
                *) "$binary" rpc -r "$2" "$method" "$params" ;;
            esac >"$1/answer.new" 2>&1
            echo "status $?" >>"$1/answer.new"
            mv "$1/answer.new" "$1/answer.$n"
            n=$((n + 1))
        else
            sleep 0.1
        fi
    done
}
