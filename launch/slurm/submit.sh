#!/usr/bin/env bash
# Submit one training run to SLURM; prints the job id. The job requeues itself if the run stopped with its state saved.
#
#   launch/slurm/submit.sh --config FILE --data DIR --workdir DIR --accelerator h100:8 --nodes 2 [flags] [-- flags of mimo train]
#
#   --accelerator A   GPUs per node, such as h100:8 or gpu:8; or cpu
#   --nodes N         number of nodes (1)
#   --tasks T         gpu: one process per GPU (the default); node: one per node
#   --cpus N          CPU cores per process, for its data workers
#   --partition P, --account A, --time T   passed to sbatch; set other options by SBATCH_… variables
#   --init PATH, --report FILE (of mimo compile), --name NAME, --retries N (failures tolerated, 3), --dry-run
#
# Data, workdir and this checkout must be on a file system that all nodes share. Log and failures: WORKDIR.launch/.
# Stop: scancel --batch --signal=USR1 JOB (the run saves and is not requeued); scancel JOB also stops it.
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

flag+=([tasks]=gpu [cpus]="" [partition]="" [account]="" [time]="")
parse "$@"
check_flags
case ${flag[accelerator]} in
  cpu) request=(--ntasks-per-node 1 --export "ALL,JAX_PLATFORMS=cpu") ;;
  *)
    gpu_count "${flag[accelerator]}" ||
      die "--accelerator '${flag[accelerator]}': give the GPUs per node, such as h100:8 or gpu:8, or cpu"
    [[ $gpu == gpu ]] && request=(--gpus-per-node "$gpus") || request=(--gpus-per-node "$gpu:$gpus")
    case ${flag[tasks]} in
      gpu) request+=(--ntasks-per-node "$gpus") ;;
      node) request+=(--ntasks-per-node 1) ;;
      *) die "--tasks ${flag[tasks]}: use gpu or node" ;;
    esac
    ;;
esac
for name in partition account time; do
  [[ -z ${flag[$name]} ]] || request+=("--$name" "${flag[$name]}")
done
[[ -z ${flag[cpus]} ]] || request+=(--cpus-per-task "${flag[cpus]}")

check_config
for path in "${data[@]}" ${flag[init]:+"${flag[init]}"}; do
  check_path --data "$(path_of "$path")"
done
workdir=$(realpath -m "${flag[workdir]}")
[[ ${flag[workdir]} != gs://* ]] || die "--workdir ${flag[workdir]}: name a folder that all nodes share"
above=$workdir
until [[ -e $above ]]; do above=$(dirname "$above"); done
kind=$(stat -f -c %T "$above")
case $kind in
  ext2/ext3 | xfs | btrfs | tmpfs | overlayfs | zfs)
    ((flag[nodes] == 1)) || die "--workdir ${flag[workdir]}: is on this machine's own disk ($kind); name a folder that all nodes share"
    say "warning: $workdir is on this machine's own disk ($kind); a requeued job may start on another machine"
    ;;
esac
[[ -w $above ]] || die "--workdir ${flag[workdir]}: is not writable; choose another"
check "mimo: activate its environment (source .venv/bin/activate); the job inherits it" command -v mimo

flag[workdir]=$workdir
train_command
logs=$workdir.launch
job=(--job-name "${flag[name]}" --nodes "${flag[nodes]}" "${request[@]}" --output "$logs/%j.log"
  "$ROOT/launch/slurm/job.sh" "$ROOT" "$logs" "${flag[retries]}" "${train[@]}")
check "SLURM rejects this job: see sbatch --test-only, sinfo (partitions, GPU names) and sacctmgr show assoc (limits)" \
  sbatch --test-only "${job[@]}"
run mkdir -p "$logs"
if dry; then
  quoted sbatch --parsable "${job[@]}"
else
  sbatch --parsable "${job[@]}" | cut -d';' -f1
fi
