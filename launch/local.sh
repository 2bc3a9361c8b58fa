#!/usr/bin/env bash
# Train on this machine, and restart the run by itself if it stopped with its state saved (75).
#
#   launch/local.sh --config configs/tiny.py --data DIR --workdir DIR [flags] [-- flags of mimo train, such as --config.train.steps=500]
#
#   --accelerator A   auto (what jax finds, the default), cpu, gpu (all GPUs) or gpu:N
#   --processes N     1 process uses all devices; with gpu:N, N processes use one GPU each; with cpu, they simulate a cluster
#   --devices N       with cpu: virtual devices per process
#   --init PATH, --report FILE (of mimo compile), --name NAME, --retries N (failures tolerated, 3), --dry-run
#
# SIGINT, SIGTERM or SIGHUP stop it: the run saves its state, and the exit code is 75.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
set -m # children get their own process groups, so that Ctrl-C reaches them once, from here

flag+=([accelerator]=auto [processes]=1 [devices]=1)
parse "$@"
check_flags
for name in processes devices; do
  [[ ${flag[$name]} =~ ^[1-9][0-9]*$ ]] || die "--$name ${flag[$name]}: is not a number of 1 or more"
done
processes=${flag[processes]} settings=()
case ${flag[accelerator]} in
  auto) ;;
  cpu) settings=(JAX_PLATFORMS=cpu "JAX_NUM_CPU_DEVICES=${flag[devices]}") ;;
  gpu) settings=(JAX_PLATFORMS=cuda) ;;
  gpu:*)
    gpu_count "${flag[accelerator]}" || die "--accelerator ${flag[accelerator]}: write gpu:N, such as gpu:8"
    settings=(JAX_PLATFORMS=cuda "CUDA_VISIBLE_DEVICES=$(seq -s, 0 $((gpus - 1)))")
    ;;
  *) die "--accelerator ${flag[accelerator]}: is not one of this machine; use auto, cpu, gpu or gpu:N" ;;
esac
((processes == 1)) || [[ ${flag[accelerator]} == cpu || ${flag[accelerator]} == "gpu:$processes" ]] ||
  die "--processes $processes: needs --accelerator cpu or gpu:$processes"
[[ ${flag[devices]} == 1 || ${flag[accelerator]} == cpu ]] || die "--devices: sets virtual devices of a CPU; add --accelerator cpu"
((flag[nodes] == 1)) || die "--nodes: this is one machine; use launch/slurm, launch/gke, launch/tpu or launch/sky"

check_config
for path in "${data[@]}" ${flag[init]:+"${flag[init]}"}; do
  check_path --data "$(path_of "$path")"
done
[[ ${flag[workdir]} != gs://* ]] || die "--workdir ${flag[workdir]}: mount the bucket (gcsfuse) and name the folder"
check "mimo: activate its environment (source .venv/bin/activate)" command -v mimo
[[ ${flag[accelerator]} != gpu* ]] || check "no GPU responds; use --accelerator cpu, or check the driver" nvidia-smi -L
train_command

# start I: starts process I of this attempt in the background; adds its id to pids.
start() {
  local own=("${settings[@]}")
  if ((processes > 1)); then
    own+=("MIMO_COORDINATOR=127.0.0.1:$port" "MIMO_PROCESSES=$processes" "MIMO_PROCESS=$1")
    [[ ${flag[accelerator]} == cpu ]] || own+=("JAX_LOCAL_DEVICE_IDS=$1")
  fi
  if dry; then
    quoted env "${own[@]}" "${train[@]}"
  else
    env "${own[@]}" "${train[@]}" &
    pids+=($!)
  fi
}

# finish: waits for the children `pids`; sets codes. A signal that arrived before they were known is forwarded now.
finish() {
  local pid
  codes=()
  [[ $asked == no ]] || stop
  for pid in "${pids[@]}"; do
    await "$pid"
    codes+=("$code")
  done
}

if dry; then
  port=PORT
  for ((i = 0; i < processes; i++)); do
    start "$i"
  done
  exit 0
fi

asked=no pids=()
# Called by a trap: lets the run save its state and end.
stop() {
  asked=yes broken=yes
  for pid in "${pids[@]}"; do
    kill -TERM "$pid" 2>/dev/null || true
  done
}
trap stop INT TERM HUP
ledger=$(mktemp)
trap 'rm -f "$ledger"' EXIT
while true; do
  pids=() port=$((20000 + RANDOM % 20000))
  for ((i = 0; i < processes; i++)); do
    start "$i"
  done
  finish
  [[ $asked == no ]] || flag[retries]=0
  result=$(settle "$ledger" "${flag[retries]}" "${codes[@]}")
  [[ $result == 75 && $asked == no ]] || exit "$result"
  say "exit codes ${codes[*]}; restarting in $DELAY s"
  sleep "$DELAY" &
  pids=($!)
  finish
  [[ $asked == no ]] || exit 75
done
