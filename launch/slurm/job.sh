#!/usr/bin/env bash
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
#SBATCH --open-mode=append
# One training run as a SLURM job: job.sh ROOT LOGS RETRIES COMMAND…, made by submit.sh.
#
# Two minutes before the time limit SLURM sends this script SIGTERM, which goes on to all processes: they save and exit 75. The job then
# queues itself again, unless it was cancelled. Nodes that fail are SLURM's to see to: --requeue.
root=$1 logs=$2 retries=$3
shift 3
# shellcheck source=../lib.sh
source "$root/launch/lib.sh"

codes=$logs/$SLURM_JOB_ID.codes
rm -rf "$codes"
mkdir -p "$codes"
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun does not take it over by itself
# jax takes one GPU by the task's number on its node; a task alone on its node takes all.
if [[ ${SLURM_NTASKS_PER_NODE:-1} == 1 && -n ${SLURM_GPUS_ON_NODE:-} ]]; then
  JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((SLURM_GPUS_ON_NODE - 1)))
  export JAX_LOCAL_DEVICE_IDS
fi

# stop AGAIN: the run saves and ends; AGAIN says whether the job is to come back.
# shellcheck disable=SC2329 # the traps do
stop() {
  again=$1 broken=yes
  kill -TERM "$step" 2>/dev/null || true
}
again=yes
trap 'stop yes' TERM
trap 'stop no' USR1

# srun tells the highest exit code only, so every task writes down its own. It waits for the slowest: a task that has saved must
# not have the others killed.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=0 --wait=0 bash -c '
  trap : TERM
  codes=$1
  shift
  "$@" && code=0 || code=$?
  echo "$code" >"$codes/$SLURM_PROCID"
  exit "$code"' task "$codes" "$@" &
step=$!
await "$step"

ended=()
for ((i = 0; i < SLURM_NTASKS; i++)); do
  ended+=("$(cat "$codes/$i" 2>/dev/null || echo 137)") # no code: it was killed with its node
done
result=$(settle "$logs/$SLURM_JOB_ID.faults" "$retries" "${ended[@]}")
say "exit codes ${ended[*]}: $result"
if [[ $result == 75 && $again == yes ]] && scontrol show job "$SLURM_JOB_ID" | grep -q JobState=RUNNING; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$result"
