#!/usr/bin/env bash
# Submit one training run to a GKE cluster as a JobSet; prints its name. It restarts if the run stopped with its state saved.
#
#   launch/gke/submit.sh --config FILE --data gs://B/D --workdir gs://B/W --accelerator v5e:4x4 --image IMAGE [flags] [-- flags of mimo train]
#
#   --accelerator A   a TPU slice by generation and topology (v5e:4x4, v5p:2x2x4, v6e:16x16), GPUs per node (h100:8, a100:8, l4:1) or cpu
#   --nodes N         TPU: number of slices; GPU and CPU: number of machines (1)
#   --image IMAGE     built from launch/gke/Dockerfile; contains the code and the configs, so a change needs a new one
#   --spot            only preemptible machines
#   --namespace NS (default), --service-account KSA (default): has access to the buckets through Workload Identity
#   --xpk CLUSTER     TPU slices: submit through xpk instead, to this cluster
#   --init gs://…, --report FILE (of mimo compile), --name NAME, --retries N (failures tolerated, 3), --dry-run
#
# Needs JobSet 0.10 or newer, and the Cloud Storage FUSE CSI driver. Logs:
#   kubectl logs -f -l jobset.sigs.k8s.io/jobset-name=NAME,batch.kubernetes.io/job-completion-index=0
# Stop: kubectl delete jobset NAME (the run saves its state; the same command resumes it later).
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

flag+=([image]="" [spot]=no [namespace]=default [service-account]=default [xpk]="")
parse "$@"
check_flags
nodes=${flag[nodes]} name=${flag[name]}
[[ -n ${flag[image]} ]] || die "--image: is missing; build one with docker build -f launch/gke/Dockerfile, push it and name it"
[[ ${flag[image]} =~ :[^/]+$ && ${flag[image]} != *:latest ]] ||
  die "--image ${flag[image]}: name its tag or digest, so that a restart runs the same image"

declare -A gpu_label=([l4]=nvidia-l4 [a100]=nvidia-tesla-a100 [a100-80gb]=nvidia-a100-80gb [h100]=nvidia-h100-80gb
  [h100-mega]=nvidia-h100-mega-80gb [h200]=nvidia-h200-141gb [b200]=nvidia-b200)
slices=1 hosts=$nodes selector="" annotation="" environment=" []"
if tpu_slice "${flag[accelerator]}"; then
  slices=$nodes hosts=$tpu_hosts resources="google.com/tpu: $tpu_chips"
  selector="cloud.google.com/gke-tpu-accelerator: $tpu_label, cloud.google.com/gke-tpu-topology: $tpu_topology"
  annotation="alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool" # a node pool is a slice
else
  [[ -z ${flag[xpk]} ]] || die "--xpk: is only for TPU slices; omit it for --accelerator ${flag[accelerator]}"
  if gpu_count "${flag[accelerator]}"; then
    [[ -n ${gpu_label[$gpu]:-} ]] || die "--accelerator ${flag[accelerator]}: GKE has no such GPU; use one of ${!gpu_label[*]}, such as h100:8"
    resources="nvidia.com/gpu: $gpus" selector="cloud.google.com/gke-accelerator: ${gpu_label[$gpu]}"
  elif [[ ${flag[accelerator]} == cpu ]]; then
    resources="cpu: 4, memory: 16Gi"
  else
    die "--accelerator '${flag[accelerator]}': is unknown; name a TPU slice (v5e:4x4), the GPUs per node (h100:8) or cpu"
  fi
  # jax finds the processes of a TPU slice by itself; GPU and CPU machines need these variables.
  environment="
                    - {name: MIMO_PROCESSES, value: \"$nodes\"}"
  ((nodes == 1)) || environment+="
                    - {name: MIMO_COORDINATOR, value: $name-train-0-0.$name:12355}
                    - name: MIMO_PROCESS
                      valueFrom: {fieldRef: {fieldPath: \"metadata.annotations['batch.kubernetes.io/job-completion-index']\"}}"
fi
[[ ${flag[spot]} == no ]] || selector+="${selector:+, }cloud.google.com/gke-spot: \"true\""

check_config
config_within
check_gcs
train_command
workspace=$(mktemp -d)
trap 'rm -rf "$workspace"' EXIT
manifest=$name.yaml

if [[ -n ${flag[xpk]} ]]; then
  spot=()
  [[ ${flag[spot]} == no ]] || spot=(--spot)
  check "xpk: install it (pip install xpk), log in (gcloud auth login) and check that cluster ${flag[xpk]} exists" \
    xpk workload list --cluster "${flag[xpk]}"
  for bucket in $(buckets); do
    check "bucket $bucket is not attached: xpk storage attach $bucket --cluster ${flag[xpk]} --type gcsfuse --bucket $bucket \
--mount-point /gcs/$bucket --readonly false --auto-mount true --mount-options implicit-dirs" \
      sh -c "xpk storage list --cluster ${flag[xpk]} | grep -q /gcs/$bucket"
  done
  # xpk counts every restart. It restarts after 75 and after a death by a signal, never after 1 or 2.
  create=(xpk workload create --cluster "${flag[xpk]}" --workload "$name" --tpu-type "$tpu_type" --num-slices "$nodes" "${spot[@]}"
    --docker-image "${flag[image]}" --max-restarts 100 --restart-on-exit-codes 75 --termination-grace-period-seconds 120
    --command "$(quoted "${train[@]}")")
  if dry; then
    quoted "${create[@]}"
  else
    "${create[@]}" >&2
    echo "$name"
  fi
  exit 0
fi

"${PYTHON:-python3}" "$ROOT/launch/render.py" "$ROOT/launch/gke/jobset.yaml" "name=$name" "namespace=${flag[namespace]}" \
  "service_account=${flag[service-account]}" "image=${flag[image]}" "retries=${flag[retries]}" "slices=$slices" "hosts=$hosts" \
  "annotation=$annotation" "selector=$selector" "resources=$resources" "environment=$environment" -- "${train[@]}" >"$workspace/$manifest"
cd "$workspace"
check "kubectl: log in to the cluster (gcloud container clusters get-credentials CLUSTER)" \
  kubectl auth can-i create jobsets --namespace "${flag[namespace]}"
check "JobSet is missing or older than 0.10; see jobset.sigs.k8s.io/docs/installation" \
  kubectl explain jobset.spec.failurePolicy.rules.onJobFailureMessagePatterns
check "the cluster rejects it; if $name exists already: kubectl delete jobset $name --namespace ${flag[namespace]}" \
  kubectl create --dry-run server --filename "$manifest"
if dry; then
  quoted kubectl create --filename "$manifest"
  cat "$manifest"
else
  kubectl create --filename "$manifest" >&2
  echo "$name"
fi
