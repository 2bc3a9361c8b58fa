#!/usr/bin/env bash
# Train on Cloud TPU VMs: create a queued resource, wait for it, install, run on all workers, and delete it when the run is done.
#
#   launch/tpu/tpu.sh run --zone Z --config FILE --data gs://B/D --workdir gs://B/W --accelerator v5e:4x4 [flags] [-- flags of mimo train]
#   launch/tpu/tpu.sh logs --zone Z --name NAME       shows the output of worker 0 of the first slice
#   launch/tpu/tpu.sh delete --zone Z --name NAME     deletes the resource (an active run saves first)
#
#   --accelerator A   v5e:4x4, v5p:2x2x4, v6e:16x16 …: generation and topology, as in mimo compile --topology
#   --nodes N         number of slices (1)
#   --spot            cheaper, but may be preempted; --reserved: from a reservation
#   --keep            do not delete the TPU at the end
#   --project P, --runtime VERSION, --service-account EMAIL
#   --init gs://…, --report FILE (of mimo compile), --name NAME, --retries N (failures tolerated, 3), --dry-run
#
# The script keeps watching the run: a run that stopped with its state saved (75) is restarted, and a preempted TPU is requested again.
# Keep it running (such as in tmux on a small machine). Ctrl-C leaves the TPU running; the same command attaches to it again.
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

verb=${1:-}
case $verb in
  run | logs | delete) shift ;;
  -h | --help) parse --help ;;
  *) die "'$verb': is not a command; use run, logs or delete, see $0 --help" ;;
esac
flag+=([zone]="" [project]="" [runtime]="" [service-account]="" [spot]=no [reserved]=no [keep]=no)
parse "$@"
[[ -n ${flag[zone]} ]] || die "--zone: is missing; gcloud compute tpus locations list shows all"
scope=(--zone "${flag[zone]}" --quiet)
[[ -z ${flag[project]} ]] || scope+=(--project "${flag[project]}")
tpus=(gcloud compute tpus)

# on NODE WORKER COMMAND: runs the command there by ssh; WORKER is a number or all.
on() { run "${tpus[@]}" tpu-vm ssh "$1" "${scope[@]}" --worker "$2" --command "$3"; }

# everywhere COMMAND: runs the command on all workers of all slices at once; fails if one does.
everywhere() {
  local node pid pids=() result=0
  for node in "${slices[@]}"; do
    if dry; then on "$node" all "$1"; else on "$node" all "$1" & pids+=($!); fi
  done
  for pid in "${pids[@]}"; do
    wait "$pid" || result=1
  done
  return "$result"
}

# slices_of N: sets `slices` to the names that the queued resource gives to its N slices.
slices_of() {
  (($1 == 1)) && slices=("$name") && return
  mapfile -t slices < <(seq -f "$name-%g" 0 $(($1 - 1)))
}

remove() { run "${tpus[@]}" queued-resources delete "$name" "${scope[@]}" --force; }

if [[ $verb != run ]]; then
  name=${flag[name]}
  [[ -n $name ]] || die "--name: is missing; gcloud compute tpus queued-resources list --zone ${flag[zone]} shows all"
  slices_of "${flag[nodes]}"
  if [[ $verb == logs ]]; then
    on "${slices[0]}" 0 "tail -n +1 -f $name/.launch/log"
  else
    everywhere "bash $name/launch/tpu/worker.sh stop" || say "not all workers responded; they are deleted nevertheless"
    remove
  fi
  exit
fi

check_flags
name=${flag[name]}
tpu_slice "${flag[accelerator]}" || die "--accelerator '${flag[accelerator]}': name a TPU slice, such as v5e:4x4"
[[ ${flag[spot]}${flag[reserved]} != yesyes ]] || die "--spot and --reserved: choose one"
slices_of "${flag[nodes]}"
workers=$((tpu_hosts * flag[nodes]))
check_config
config_within
train_command
check "gcloud: log in (gcloud auth login) and choose a project (gcloud config set project P)" gcloud auth print-access-token
check_gcs
check "--accelerator ${flag[accelerator]}: zone ${flag[zone]} has none; gcloud compute tpus accelerator-types list --zone ${flag[zone]}" \
  "${tpus[@]}" accelerator-types describe "$tpu_type" "${scope[@]}"

# --- watching the run

PATIENCE=20 # polls to wait for workers that do not respond or do not end

create() {
  local how=(--accelerator-type "$tpu_type" --runtime-version "${flag[runtime]:-$tpu_runtime}")
  if ((flag[nodes] == 1)); then how+=(--node-id "$name"); else how+=(--node-count "${flag[nodes]}" --node-prefix "$name"); fi
  [[ ${flag[spot]} == no ]] || how+=(--spot)
  [[ ${flag[reserved]} == no ]] || how+=(--reserved)
  [[ -z ${flag[service-account]} ]] || how+=(--service-account "${flag[service-account]}")
  say "requesting $tpu_type x ${flag[nodes]} in ${flag[zone]}"
  run "${tpus[@]}" queued-resources create "$name" "${scope[@]}" "${how[@]}"
}

# state: prints the state of the queued resource, nothing if there is none; fails if it cannot be queried.
state() { "${tpus[@]}" queued-resources list "${scope[@]}" --filter "name~(^|/)$name\$" --format "value(state.state)"; }

# Packs the files of this checkout, except those that git ignores.
pack() {
  if dry; then
    echo "git -C $ROOT ls-files -co --exclude-standard -z | tar -C $ROOT --null -T - -czf $name.tar.gz"
  else
    git -C "$ROOT" ls-files -co --exclude-standard -z | tar -C "$ROOT" --null -T - -czf "$workspace/$name.tar.gz"
  fi
}

install() {
  local node
  say "installing on $workers workers"
  pack || return 1
  for node in "${slices[@]}"; do
    run "${tpus[@]}" tpu-vm scp "$workspace/$name.tar.gz" "$node:" "${scope[@]}" --worker all || return 1
  done
  everywhere "mkdir -p $name && tar -xzf $name.tar.gz -C $name && bash $name/launch/tpu/worker.sh install"
}

begin() {
  say "starting on $workers workers"
  everywhere "bash $name/launch/tpu/worker.sh start $(quoted "${train[@]}")"
}

ask="bash $name/launch/tpu/worker.sh state 2>/dev/null || echo mimo-worker: none"
# look: sets states, one per worker that responds.
look() {
  mapfile -t states < <(everywhere "$ask" | sed -n 's/.*mimo-worker: //p')
}

# finish CODE: stops watching and exits.
finish() {
  say "ended with $1"
  [[ $1 == 0 ]] || on "${slices[0]}" 0 "tail -n 40 $name/.launch/log" >&2 || true
  if [[ ${flag[keep]} == yes ]]; then
    say "the TPU is kept; delete it with: $0 delete --zone ${flag[zone]} --name $name --nodes ${flag[nodes]}"
  else
    remove
  fi
  exit "$1"
}

# again CODE…: exits after these exit codes, unless the run is to be restarted.
again() {
  local result
  result=$(settle "$ledger" "${flag[retries]}" "$@")
  ((result == 75)) || finish "$result"
  say "exit codes $*; restarting"
}

# step: polls the workers of a TPU that is active.
step() {
  local code ended=() running=0
  look
  if ((${#states[@]} < workers)); then
    silent=$((silent + 1))
    say "${#states[@]} of $workers workers respond"
    if ((silent > PATIENCE)); then # the TPU is lost, whatever its state says
      silent=0
      remove
    fi
    return
  fi
  silent=0
  if [[ " ${states[*]} " == *" none "* ]]; then # new machines
    { install && begin; } || again 1
    return
  fi
  for code in "${states[@]}"; do
    if [[ $code == running ]]; then running=$((running + 1)); else ended+=("$code"); fi
  done
  if ((${#ended[@]} == 0)); then
    waited=0
  elif ((running)); then
    # One worker has ended, so the others must end too: they notice within minutes.
    waited=$((waited + 1))
    ((waited <= PATIENCE)) || everywhere "bash $name/launch/tpu/worker.sh stop" || true
  else
    waited=0
    again "${ended[@]}"
    begin || true
  fi
}

if dry; then
  workspace=.
  create
  install
  begin
  everywhere "$ask"
  remove
  exit 0
fi
workspace=$(mktemp -d)
ledger=$workspace/faults
trap 'rm -rf "$workspace"' EXIT
waited=0 silent=0 before=""
while true; do
  if ! now=$(state); then
    say "gcloud does not respond; retrying in $DELAY s"
  else
    [[ $now == "$before" ]] || say "$name: ${now:-does not exist}"
    before=$now
    case $now in
      "") create ;;
      ACTIVE) step ;;
      SUSPENDED) remove || true ;; # preempted; the next poll finds nothing and requests it again
      FAILED)
        again 1
        remove || true
        ;;
    esac
  fi
  sleep "$DELAY"
done
