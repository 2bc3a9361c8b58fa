# Shared by the launchers: flags, checks, dry runs, and the handling of the exit codes of `mimo train`. Sourced, not run.
#
# Exit codes of a launcher: 0 done or submitted · 1 a tool failed · 2 usage error, nothing rented · 75 stopped on request.
# shellcheck shell=bash
set -euo pipefail

say() { echo "launch: $*" >&2; }

# die LINE: exits with a usage error; the line says what to do.
die() {
  say "error: $*"
  exit 2
}

((BASH_VERSINFO[0] >= 4)) || die "bash $BASH_VERSION: is too old; install bash 4 or newer (macOS: brew install bash)"
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck disable=SC2034 # read by the launchers
DELAY=${MIMO_LAUNCH_DELAY:-30} # seconds between two polls, and before a run is restarted

# --- flags

# Flags by name, with their defaults; a flag with the default "no" is a switch. A launcher adds its own before `parse`.
declare -A flag=([config]="" [workdir]="" [init]="" [accelerator]="" [nodes]=1 [name]="" [retries]=3 [report]="" [dry-run]=no)
data=()  # values of --data
extra=() # arguments after --, for mimo itself

# parse ARGUMENT…: fills flag, data and extra. --help prints the launcher's head comment.
parse() {
  local name
  while (($#)); do
    name=${1#--}
    case $1 in
      -h | --help)
        sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$0"
        exit 0
        ;;
      --)
        extra=("${@:2}")
        break
        ;;
      --?*)
        [[ $name == data || -n ${flag[$name]+known} ]] || die "$1: is unknown; see $0 --help (flags of mimo itself follow --)"
        if [[ $name != data && ${flag[$name]} == no ]]; then
          flag[$name]=yes
        else
          (($# > 1)) || die "$1: needs a value"
          [[ $name == data ]] && data+=("$2") || flag[$name]=$2
          shift
        fi
        ;;
      *) die "'$1': is not a flag; see $0 --help (flags of mimo itself follow --)" ;;
    esac
    shift
  done
}

# check_flags: checks the flags that every launch needs; sets the name of the run.
check_flags() {
  local name
  for name in config workdir; do
    [[ -n ${flag[$name]} ]] || die "--$name: is missing; see $0 --help"
  done
  ((${#data[@]})) || die "--data: is missing; name a dataset, such as --data DIR"
  for name in nodes retries; do
    [[ ${flag[$name]} =~ ^[0-9]+$ ]] || die "--$name ${flag[$name]}: is not a number"
  done
  ((flag[nodes] >= 1)) || die "--nodes 0: must be at least 1"
  if [[ -z ${flag[name]} ]]; then
    name=$(basename "${flag[workdir]}" | tr '[:upper:]_.' '[:lower:]--')
    flag[name]=${name:0:40}
  fi
  [[ ${flag[name]} =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] ||
    die "--name ${flag[name]}: give 1 to 40 characters of a-z, 0-9 and -, starting with a letter"
}

# --- dry runs and checks

dry() { [[ ${flag[dry-run]} == yes ]]; }

# quoted WORD…: prints one line that a shell parses as these words.
quoted() {
  local word line=()
  for word; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+~-]+$ ]] && line+=("$word") || line+=("${word@Q}")
  done
  echo "${line[*]}"
}

# run COMMAND…: runs the command, or prints it in a dry run.
run() {
  if dry; then quoted "$@"; else "$@"; fi
}

# check REMEDY COMMAND…: makes a check that needs a tool or the network; a dry run only prints it.
check() {
  local remedy=$1
  shift
  if dry; then
    echo "# check: $(quoted "$@")"
  elif ! command -v "$1" >/dev/null; then
    die "$1: is not installed; $remedy"
  else
    "$@" >/dev/null 2>&1 </dev/null || die "$remedy (failed: $(quoted "$@"))"
  fi
}

# check_config: checks that the config parses with its overrides, and that the report of `mimo compile`, if there is one, says that the run
# fits.
check_config() {
  local python=${PYTHON:-python3}
  "$python" -c "import absl, ml_collections" 2>/dev/null ||
    die "$python: lacks the packages that mimo needs; activate its environment (source .venv/bin/activate)"
  PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH} "$python" "$ROOT/launch/check.py" --config "${flag[config]}" \
    --report "${flag[report]}" --accelerator "${flag[accelerator]}" --nodes "${flag[nodes]}" -- "${extra[@]}" || exit
}

# check_path FLAG PATH: checks that a path or a bucket exists.
check_path() {
  if [[ $2 == gs://* ]]; then
    check "$1 $2: cannot be listed; check that it exists and that you can read it (gcloud auth login)" gcloud storage ls "$2"
  elif [[ ! -e $2 ]]; then
    die "$1 $2: does not exist"
  fi
}

# check_gcs: checks that all paths are in buckets and exist, since rented machines cannot see this one.
check_gcs() {
  local path bucket
  for path in "${data[@]}" "${flag[init]:-gs://}" "${flag[workdir]}"; do
    [[ $(path_of "$path") == gs://* ]] ||
      die "$path: is on this machine, which the rented ones cannot see; copy it to a bucket (gcloud storage cp -r) and name it gs://…"
  done
  for path in "${data[@]}"; do
    check_path --data "$(path_of "$path")"
  done
  [[ -z ${flag[init]} ]] || check_path --init "${flag[init]}"
  bucket=$(bucket_of "${flag[workdir]}")
  # A checkpoint becomes complete by renaming its folder, which is atomic only with a hierarchical namespace.
  check "--workdir ${flag[workdir]}: its bucket does not exist, is not readable, or has no hierarchical namespace; create one with: \
gcloud storage buckets create gs://$bucket --uniform-bucket-level-access --enable-hierarchical-namespace" \
    sh -c "gcloud storage buckets describe gs://$bucket --format 'value(hierarchical_namespace.enabled)' | grep -qi true"
}

# --- paths: a bucket gs://B is mounted as /gcs/B wherever a run is launched, since data are read as files

path_of() { [[ -e $1 ]] && echo "$1" || echo "${1#*=}"; } # the path in [NAME=]PATH

bucket_of() { cut -d/ -f3 <<<"$1"; }

# buckets: prints the names of all buckets of a run, one per line.
buckets() {
  local path
  for path in "${data[@]}" "${flag[workdir]}" ${flag[init]:+"${flag[init]}"}; do
    bucket_of "$(path_of "$path")"
  done | sort -u
}

# train_command: sets `train` to the complete `mimo train` command, with the paths at which the buckets are mounted.
train_command() {
  local value
  train=(mimo train --config "${flag[config]}" --workdir "${flag[workdir]}")
  for value in "${data[@]}"; do
    train+=(--data "$value")
  done
  [[ -z ${flag[init]} ]] || train+=(--init "${flag[init]}")
  train=("${train[@]//gs:\/\///gcs/}" "${extra[@]//gs:\/\///gcs/}")
}

# config_within: if the checkout is copied to the machines, --config must be in it; makes its path relative to it.
config_within() {
  local path
  [[ -f ${flag[config]} ]] || return 0 # a packaged config, which check_config has found by name
  path=$(cd "$(dirname "${flag[config]}")" && pwd)/$(basename "${flag[config]}")
  [[ $path == "$ROOT"/* ]] || die "--config ${flag[config]}: is outside $ROOT, which is copied to the machines; put it under configs/"
  flag[config]=${path#"$ROOT"/}
}

# --- accelerators

# tpu_slice v5e:4x4: sets tpu_type and tpu_runtime (the names of Cloud TPU), tpu_label (GKE), tpu_topology, tpu_hosts and tpu_chips (per
# host). Returns 1 if it is not the name of a TPU.
# shellcheck disable=SC2034 # read by the launchers
tpu_slice() {
  local small="1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16" chips shapes
  local cubes="2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16"
  [[ $1 == v[4-6]* ]] || return 1
  tpu_topology=${1#*:}
  case $1 in
    v4:*) shapes=$cubes tpu_runtime=tpu-ubuntu2204-base tpu_label=tpu-v4-podslice ;;
    v5e:*) shapes=$small tpu_runtime=v2-alpha-tpuv5-lite tpu_label=tpu-v5-lite-podslice ;;
    v5p:*) shapes="$cubes 16x16x16 16x16x24" tpu_runtime=v2-alpha-tpuv5 tpu_label=tpu-v5p-slice ;;
    v6e:*) shapes=$small tpu_runtime=v2-alpha-tpuv6e tpu_label=tpu-v6e-slice ;;
    *) die "--accelerator $1: name a generation and a topology, such as v5e:4x4, v6e:16x16 or v5p:2x2x4" ;;
  esac
  [[ " $shapes " == *" $tpu_topology "* ]] || die "--accelerator $1: there is no such slice; ${1%%:*} has $shapes"
  chips=$((${tpu_topology//x/ * }))
  tpu_chips=$((chips <= 8 && ${#tpu_topology} == 3 ? chips : 4))
  tpu_hosts=$((chips / tpu_chips))
  case $1 in
    v5e:*) tpu_type=v5litepod-$chips ;;
    v6e:*) tpu_type=v6e-$chips ;;
    *) tpu_type=${1%%:*}-$((2 * chips)) ;; # counted in cores
  esac
}

# gpu_count h100:8: sets gpu and gpus. Returns 1 if it is not of that form.
# shellcheck disable=SC2034 # read by the launchers
gpu_count() {
  [[ $1 =~ ^([a-z0-9-]+):([1-9][0-9]*)$ ]] || return 1
  gpu=${BASH_REMATCH[1]} gpus=${BASH_REMATCH[2]}
}

# --- after a run

# settle LEDGER RETRIES CODE…: combines the exit codes of all processes of a run into one and prints it: 0 done; 2, 3 or 130 (usage error,
# done in part, interrupted) do not retry; 75 restart; 1 give up. A 75 is free; any other failure, such as 1 or a death by a signal, adds a
# line to the file LEDGER, and up to RETRIES of them are tolerated.
settle() {
  local ledger=$1 retries=$2 code result=0
  shift 2
  for code; do
    case $code in
      0) ;;
      2 | 3 | 130) result=$code && break ;;
      75) [[ $result != 0 ]] || result=75 ;;
      *) result=1 ;;
    esac
  done
  if [[ $result == 1 ]]; then
    echo "$*" >>"$ledger"
    [[ $(wc -l <"$ledger") -gt $retries ]] || result=75
    say "exit codes $*: a failure, $(($(wc -l <"$ledger"))) so far, of which $retries are tolerated"
  fi
  echo "$result"
}

# await PID: waits for a child and sets `code` to its exit code, also if a trapped signal interrupts the wait (traps set `broken=yes`), or
# if the child is only suspended.
# shellcheck disable=SC2034 # read by the launchers
await() {
  while true; do
    broken=no code=0
    wait "$1" || code=$?
    [[ $broken == no ]] || continue
    kill -0 "$1" 2>/dev/null || return 0
    sleep 1
  done
}
