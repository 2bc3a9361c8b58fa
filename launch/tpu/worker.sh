#!/usr/bin/env bash
# Runs on each worker of a TPU, called by tpu.sh. The checkout that contains this script is the folder of the run; its state is in .launch/.
#
#   worker.sh install         installs Python and this package, and mounts the buckets under /gcs
#   worker.sh start COMMAND…  starts the command, after stopping the previous one
#   worker.sh state           prints `mimo-worker: none`, `mimo-worker: running` or `mimo-worker: CODE`
#   worker.sh stop            stops the command; it has two minutes to save
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
state=$PWD/.launch
mkdir -p "$state"
pid=${MIMO_LAUNCH_RUN:-/dev/shm}/$(basename "$PWD").pid # removed when the machine reboots

alive() { [[ -s $pid ]] && kill -0 -- "-$(cat "$pid")" 2>/dev/null; }

stop() {
  local second
  alive || return 0
  kill -TERM -- "-$(cat "$pid")"
  for ((second = 0; second < 120; second++)); do
    alive || return 0
    sleep 1
  done
  kill -KILL -- "-$(cat "$pid")" 2>/dev/null || true
}

case $1 in
  install)
    # The images have Python 3.10; uv downloads 3.11.
    python3 -m pip install -q --user "uv>=0.7,<1"
    [[ -x .venv/bin/python ]] || ~/.local/bin/uv venv -q --python 3.11 .venv
    ~/.local/bin/uv pip install -q --python .venv/bin/python --constraint launch/constraints.txt -e ".[tpu]"
    if ! command -v gcsfuse >/dev/null; then
      release=gcsfuse-$(lsb_release -cs)
      curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee /usr/share/keyrings/cloud.google.asc >/dev/null
      echo "deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt $release main" |
        sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
      sudo apt-get update -q
      sudo apt-get install -q -y gcsfuse
    fi
    # Every bucket, as /gcs/BUCKET. Processes must see immediately what others write, so metadata is not cached.
    mountpoint -q /gcs || {
      sudo mkdir -p /gcs
      sudo chown "$(id -u)" /gcs
      gcsfuse --implicit-dirs --metadata-cache-ttl-secs 0 --metadata-cache-negative-ttl-secs 0 /gcs
    }
    ;;
  start)
    stop
    rm -f "$state/code"
    # shellcheck disable=SC2016
    PATH=$PWD/.venv/bin:$PATH setsid nohup bash -c '
      trap : TERM
      "${@:2}" && code=0 || code=$?
      echo "$code" >"$1/code.tmp"
      mv "$1/code.tmp" "$1/code"' run "$state" "${@:2}" >>"$state/log" 2>&1 </dev/null &
    echo $! >"$pid"
    ;;
  state)
    if [[ -s $state/code ]]; then
      echo "mimo-worker: $(cat "$state/code")"
    elif alive; then
      echo "mimo-worker: running"
    elif [[ -s $pid ]]; then
      echo "mimo-worker: 137" # it was killed
    else
      echo "mimo-worker: none"
    fi
    ;;
  stop) stop ;;
  *)
    echo "worker.sh $1: is unknown" >&2
    exit 2
    ;;
esac
