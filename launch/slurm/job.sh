#!/usr/bin/env bash
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
#SBATCH --open-mode=append
# One training run as a SLURM job: job.sh ROOT LOGS RETRIES COMMAND…, made by submit.sh.
#
# Two minutes before the time limit, SLURM sends SIGTERM to this script, which forwards it to all processes: they save and exit with 75.
# The job then requeues itself, unless it was cancelled. SLURM itself requeues the job if a node fails (--requeue).
root=$1 logs=$2 retries=$3
shift 3
# shellcheck source=../lib.sh
source "$root/launch/lib.sh"

codes=$logs/$SLURM_JOB_ID.codes
rm -rf "$codes"
mkdir -p "$codes"
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun does not inherit it
# jax uses one GPU, chosen by the index of the task on its node; a task that is alone on its node uses all.
if [[ ${SLURM_NTASKS_PER_NODE:-1} == 1 && -n ${SLURM_GPUS_ON_NODE:-} ]]; then
  JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((SLURM_GPUS_ON_NODE - 1)))
  export JAX_LOCAL_DEVICE_IDS
fi

# stop AGAIN: lets the run save its state and end; AGAIN says whether the job is requeued.
# shellcheck disable=SC2329 # called by the traps
stop() {
  again=$1 broken=yes
  kill -TERM "$step" 2>/dev/null || true
}
again=yes
trap 'stop yes' TERM
trap 'stop no' USR1

# srun returns only the highest exit code, so every task writes its own to a file. srun waits for the slowest task: when one has saved,
# the others must not be killed.
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
  ended+=("$(cat "$codes/$i" 2>/dev/null || echo 137)") # without a code, it was killed with its node
done
result=$(settle "$logs/$SLURM_JOB_ID.faults" "$retries" "${ended[@]}")
say "exit codes ${ended[*]}: $result"
if [[ $result == 75 && $again == yes ]] && scontrol show job "$SLURM_JOB_ID" | grep -q JobState=RUNNING; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$result"
