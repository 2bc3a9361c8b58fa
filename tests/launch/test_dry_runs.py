"""What every launcher would do, against golden/*.txt, and nothing done; and shellcheck over all of them.

After a change that is meant: MIMO_REWRITE_GOLDEN=1 python -m pytest tests/launch/test_dry_runs.py, and read the diff.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.launching import LAUNCH, ROOT, SCRIPTS, Tools

GOLDEN = Path(__file__).parent / "golden"
BUCKETS = "--config configs/mimo_7b.py --data gs://med/data --init gs://med/base --workdir gs://med/runs/night"
FOLDERS = "--config configs/mimo_7b.py --data TMP/data --workdir TMP/runs/night"
MORE = "-- --config.mesh.fsdp=16 --config.name='a night'"
IMAGE = "--image eu-docker.pkg.dev/p/r/mimo:tpu-1"
CASES = {
    "local": f"local.sh {FOLDERS} {MORE}",
    "local_8_gpus": f"local.sh {FOLDERS} --accelerator gpu:8",
    "local_8_processes": f"local.sh {FOLDERS} --accelerator gpu:8 --processes 8",
    "local_rehearsal": f"local.sh {FOLDERS} --accelerator cpu --processes 2 --devices 4",
    "slurm": f"slurm/submit.sh {FOLDERS} --accelerator h100:8 --nodes 2 --partition gpu --time 2-0 --cpus 12 {MORE}",
    "slurm_cpu": f"slurm/submit.sh {FOLDERS} --accelerator cpu --account lab",
    "gke_tpu": f"gke/submit.sh {BUCKETS} --accelerator v5e:4x4 --nodes 2 {IMAGE} --spot {MORE}",
    "gke_gpu": f"gke/submit.sh {BUCKETS} --accelerator h100:8 --nodes 2 {IMAGE}",
    "gke_xpk": f"gke/submit.sh {BUCKETS} --accelerator v5p:2x2x4 {IMAGE} --xpk pods {MORE}",
    "tpu": f"tpu/tpu.sh run --zone us-west4-a {BUCKETS} --accelerator v5e:16x16 --spot {MORE}",
    "tpu_slices": f"tpu/tpu.sh run --zone us-west4-a --project p {BUCKETS} --accelerator v6e:16x16 --nodes 2 --reserved",
    "tpu_logs": "tpu/tpu.sh logs --zone us-west4-a --name night",
    "tpu_delete": "tpu/tpu.sh delete --zone us-west4-a --name night --nodes 2",
    "sky": f"sky/submit.sh {BUCKETS} --accelerator h100:8 --nodes 2 --infra gcp {MORE}",
    "sky_tpu": f"sky/submit.sh {BUCKETS} --accelerator v6e:4x4",
}


@pytest.mark.parametrize("case", CASES)
def test_a_dry_run_shows_what_would_be_done_and_does_nothing(case, tmp_path):
    tools = Tools(tmp_path)
    names = ("mimo", "nvidia-smi", "sbatch", "gcloud", "kubectl", "xpk", "sky", "tar")
    tools.note(*names)
    tools.make("stat", "#!/bin/sh\necho nfs\n")
    (tmp_path / "data").mkdir()
    before = sorted(tmp_path.rglob("*"))
    line = f"bash {LAUNCH}/{CASES[case].replace('TMP', str(tmp_path)).replace(' -- ', ' --dry-run -- ', 1)}"
    line = line if "--dry-run" in line else f"{line} --dry-run"
    done = subprocess.run(line, shell=True, cwd=ROOT, env=tools.environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert sorted(tmp_path.rglob("*")) == before  # no tool was called, nothing was made
    shown = done.stdout.replace(str(tmp_path), "TMP").replace(str(ROOT), "ROOT")
    file = GOLDEN / f"{case}.txt"
    if os.environ.get("MIMO_REWRITE_GOLDEN"):
        file.write_text(shown)
    assert shown == file.read_text()


def test_every_golden_file_has_its_case():
    assert {file.stem for file in GOLDEN.iterdir()} == set(CASES)


def test_shellcheck_finds_nothing():
    shellcheck = shutil.which("shellcheck", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert shellcheck, "install the extra dev"
    done = subprocess.run([shellcheck, *SCRIPTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


ENTRIES = [s for s in SCRIPTS if s.name in ("local.sh", "submit.sh", "tpu.sh")]


@pytest.mark.parametrize("script", ENTRIES, ids=lambda script: str(script.relative_to(LAUNCH)))
def test_help_is_there_and_every_flag_in_it_is_known(script):
    done = subprocess.run(["bash", script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--dry-run" in done.stdout and not done.stderr
    known = script.read_text() + (LAUNCH / "lib.sh").read_text()
    flags = {word.strip("[],:;.") for word in done.stdout.split() if word.startswith("--") and word.strip("[],:;.") != "--"}
    own = {flag for flag in flags if f"[{flag[2:]}]=" in known}
    assert flags - own <= {"--data", "--config.train.steps=500", "--batch", "--signal=USR1", "--topology"}
