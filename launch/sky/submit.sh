#!/usr/bin/env bash
# Submit one training run to SkyPilot as a managed job; prints its number. It is restarted, elsewhere if need be, if a machine was
# preempted or the run stopped with its state saved.
#
#   launch/sky/submit.sh --config FILE --data gs://B/D --workdir gs://B/W --accelerator h100:8 --nodes 2 [flags] [-- flags of mimo train]
#
#   --accelerator A   GPUs per machine (h100:8, a100-80gb:8, l4:1) or a TPU slice on Google Cloud (v5e:4x4, v6e:16x16)
#   --nodes N         number of machines (1); a TPU slice counts as one
#   --infra I         infrastructure, passed to sky: gcp, aws/us-east-1, k8s …
#   --on-demand       only machines that are not preempted
#   --init gs://…, --report FILE (of mimo compile), --name NAME, --retries N (failures tolerated, 3), --dry-run
#
# Logs: sky jobs logs NUMBER. Stop: sky jobs cancel NUMBER.
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

flag+=([infra]="" [on-demand]=no)
parse "$@"
check_flags
package=cuda infra="" cluster=""
if tpu_slice "${flag[accelerator]}"; then
  ((flag[nodes] == 1)) || die "--nodes ${flag[nodes]}: SkyPilot supports one TPU slice; use launch/tpu or launch/gke for several"
  accelerator="tpu-$tpu_type" package=tpu infra="accelerator_args: {runtime_version: $tpu_runtime}"
elif gpu_count "${flag[accelerator]}"; then
  accelerator="${gpu^^}:$gpus"
  # jax finds the processes of a TPU slice by itself; GPU machines need these variables.
  # shellcheck disable=SC2016
  ((flag[nodes] == 1)) || cluster='
  export MIMO_COORDINATOR=$(echo "$SKYPILOT_NODE_IPS" | head -n 1):12355
  export MIMO_PROCESSES=$SKYPILOT_NUM_NODES MIMO_PROCESS=$SKYPILOT_NODE_RANK'
else
  die "--accelerator '${flag[accelerator]}': name the GPUs per machine (h100:8) or a TPU slice (v5e:4x4)"
fi
[[ -z ${flag[infra]} ]] || infra+="${infra:+$'\n  '}infra: ${flag[infra]}"
[[ ${flag[on-demand]} == yes ]] && spot=false || spot=true

check_config
config_within
check "sky: install it (pip install 'skypilot[gcp]') and set up a cloud" sky check
check_gcs
check "--accelerator ${flag[accelerator]}: none of the configured clouds offers it" sky gpus list "${accelerator%%:*}"
train_command
mounts=""
for bucket in $(buckets); do
  mounts+="${mounts:+, }/gcs/$bucket: {source: gs://$bucket, mode: MOUNT}"
done
logs=${flag[workdir]/#gs:\/\///gcs/}.launch

workspace=$(mktemp -d)
trap 'rm -rf "$workspace"' EXIT
"${PYTHON:-python3}" "$ROOT/launch/render.py" "$ROOT/launch/sky/task.yaml" "name=${flag[name]}" "root=$ROOT" "nodes=${flag[nodes]}" \
  "infra=$infra" "accelerator=$accelerator" "spot=$spot" "mounts=$mounts" "package=$package" "cluster=$cluster" \
  "retries=${flag[retries]}" "logs=$logs" "train=$(quoted "${train[@]}")" >"$workspace/task.yaml"
cd "$workspace"
if dry; then
  quoted sky jobs launch --yes --detach-run --name "${flag[name]}" task.yaml
  cat task.yaml
else
  sky jobs launch --yes --detach-run --name "${flag[name]}" task.yaml | tee /dev/stderr |
    sed -n 's/\x1b\[[0-9;]*m//g; s/.*Managed Job ID: \([0-9]*\).*/\1/p'
fi
