# What the launchers share: flags, checks, dry runs, and what the exit codes of `mimo train` come to. Sourced, not run.
#
# A launcher's own exit codes: 0 done or submitted · 1 a tool failed · 2 the user's fault, nothing rented · 75 stopped on request.
# shellcheck shell=bash
set -euo pipefail

say() { echo "launch: $*" >&2; }

# die LINE: the user's fault, in one line that says what to do.
die() {
  say "error: $*"
  exit 2
}

((BASH_VERSINFO[0] >= 4)) || die "bash $BASH_VERSION: is too old; install bash 4 or newer (macOS: brew install bash)"
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck disable=SC2034 # read by the launchers
DELAY=${MIMO_LAUNCH_DELAY:-30} # seconds between two looks, and before a run is started again

# --- flags

# Flags by name, with their defaults; "no" makes one a switch. A launcher adds its own before `parse`.
declare -A flag=([config]="" [workdir]="" [init]="" [accelerator]="" [nodes]=1 [name]="" [retries]=3 [report]="" [dry-run]=no)
data=()  # values of --data
extra=() # what follows --, for mimo itself

# parse ARGUMENT…: fills flag, data and extra. The launcher's head comment is its --help.
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
      *) die "'$1': is not understood; see $0 --help (flags of mimo itself follow --)" ;;
    esac
    shift
  done
}

# check_flags: what every launch needs; gives the run a name.
check_flags() {
  local name
  for name in config workdir; do
    [[ -n ${flag[$name]} ]] || die "--$name: is missing; see $0 --help"
  done
  ((${#data[@]})) || die "--data: is missing; name a dataset, as --data DIR"
  for name in nodes retries; do
    [[ ${flag[$name]} =~ ^[0-9]+$ ]] || die "--$name ${flag[$name]}: is not a number"
  done
  ((flag[nodes] >= 1)) || die "--nodes 0: must be at least 1"
  if [[ -z ${flag[name]} ]]; then
    name=$(basename "${flag[workdir]}" | tr '[:upper:]_.' '[:lower:]--')
    flag[name]=${name:0:40}
  fi
  [[ ${flag[name]} =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] ||
    die "--name ${flag[name]}: give 1 to 40 of a-z, 0-9 and -, beginning with a letter"
}

# --- dry runs and checks

dry() { [[ ${flag[dry-run]} == yes ]]; }

# quoted WORD…: one line that a shell reads as these words.
quoted() {
  local word line=()
  for word; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+~-]+$ ]] && line+=("$word") || line+=("${word@Q}")
  done
  echo "${line[*]}"
}

# run COMMAND…: runs it, or shows it in a dry run.
run() {
  if dry; then quoted "$@"; else "$@"; fi
}

# check REMEDY COMMAND…: a check that needs a tool or the network; a dry run only shows it.
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

# check_config: the config parses with its overrides, and the report of `mimo compile`, if one is given, says that it fits.
check_config() {
  local python=${PYTHON:-python3}
  "$python" -c "import absl, ml_collections" 2>/dev/null ||
    die "$python: has not what mimo needs; activate its environment (source .venv/bin/activate)"
  PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH} "$python" "$ROOT/launch/check.py" --config "${flag[config]}" \
    --report "${flag[report]}" --accelerator "${flag[accelerator]}" --nodes "${flag[nodes]}" -- "${extra[@]}" || exit
}

# check_path FLAG PLACE: it is there; a bucket is asked.
check_path() {
  if [[ $2 == gs://* ]]; then
    check "$1 $2: cannot be listed; see that it exists and that you may read it (gcloud auth login)" gcloud storage ls "$2"
  elif [[ ! -e $2 ]]; then
    die "$1 $2: does not exist"
  fi
}

# check_gcs: for rented machines, which see nothing of this one: all places lie in buckets, and are there.
check_gcs() {
  local place bucket
  for place in "${data[@]}" "${flag[init]:-gs://}" "${flag[workdir]}"; do
    [[ $(place_of "$place") == gs://* ]] ||
      die "$place: lies on this machine, which the rented ones cannot see; copy it to a bucket (gcloud storage cp -r) and name it gs://…"
  done
  for place in "${data[@]}"; do
    check_path --data "$(place_of "$place")"
  done
  [[ -z ${flag[init]} ]] || check_path --init "${flag[init]}"
  bucket=$(bucket_of "${flag[workdir]}")
  # A save is made whole by renaming its folder: one act only where folders are more than prefixes.
  check "--workdir ${flag[workdir]}: its bucket is not there, not yours to see, or has no hierarchical namespace; make one with: \
gcloud storage buckets create gs://$bucket --uniform-bucket-level-access --enable-hierarchical-namespace" \
    sh -c "gcloud storage buckets describe gs://$bucket --format 'value(hierarchical_namespace.enabled)' | grep -qi true"
}

# --- places: a bucket gs://B is mounted as /gcs/B wherever a run is launched, since data are read as files

place_of() { [[ -e $1 ]] && echo "$1" || echo "${1#*=}"; } # of [NAME=]PLACE

bucket_of() { cut -d/ -f3 <<<"$1"; }

# buckets: the names of all buckets of a run, a line each.
buckets() {
  local place
  for place in "${data[@]}" "${flag[workdir]}" ${flag[init]:+"${flag[init]}"}; do
    bucket_of "$(place_of "$place")"
  done | sort -u
}

# train_command: fills `train`, the whole `mimo train …`, with buckets as they are mounted there.
train_command() {
  local value
  train=(mimo train --config "${flag[config]}" --workdir "${flag[workdir]}")
  for value in "${data[@]}"; do
    train+=(--data "$value")
  done
  [[ -z ${flag[init]} ]] || train+=(--init "${flag[init]}")
  train=("${train[@]//gs:\/\///gcs/}" "${extra[@]//gs:\/\///gcs/}")
}

# config_within: where the checkout is copied, --config must lie in it; its path becomes relative to it.
config_within() {
  local path
  [[ -f ${flag[config]} ]] || return 0 # a packaged one, by name: check_config has found it
  path=$(cd "$(dirname "${flag[config]}")" && pwd)/$(basename "${flag[config]}")
  [[ $path == "$ROOT"/* ]] || die "--config ${flag[config]}: lies outside $ROOT, which is what the machines get; put it under configs/"
  flag[config]=${path#"$ROOT"/}
}

# --- accelerators

# tpu_slice v5e:4x4: sets tpu_type, tpu_runtime (as Cloud TPU names them), tpu_label (GKE), tpu_topology, tpu_hosts and tpu_chips a host.
# Returns 1 if it is not the name of a TPU.
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
    *) die "--accelerator $1: name a generation and a topology, as v5e:4x4, v6e:16x16 or v5p:2x2x4" ;;
  esac
  [[ " $shapes " == *" $tpu_topology "* ]] || die "--accelerator $1: there is no such slice; of ${1%%:*} there are $shapes"
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

# --- what comes after a run

# settle LEDGER RETRIES CODE…: prints what the exit codes of all processes of a run come to: 0 done; 2, 3 or 130 (refused, done in part,
# interrupted) not to be tried again; 75 start it again; 1 give up. 75 costs nothing; any other fault, as 1 or a death by a signal,
# takes a line in the file LEDGER, and RETRIES of them are forgiven.
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
    say "exit codes $*: a fault, $(($(wc -l <"$ledger"))) so far, of which $retries are forgiven"
  fi
  echo "$result"
}

# await PID: sets `code`, the exit code of a child, also where a trapped signal breaks the wait (traps set `broken=yes`), or where the child
# is only halted: then it is not over.
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
