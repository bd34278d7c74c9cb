"""docs/scaling.md: its table of memory is what a plan counts, and its files for clusters are sound."""

import re
import shlex
import subprocess

import pytest
import yaml
from torch.distributed.run import get_args_parser

from smolseek.cli import VERBS, parse_verb
from smolseek.config import ConvertSettings, TrainSettings
from smolseek.machine import Machine
from smolseek.planning import plan, training_memory
from tests.configs import LLAMA_31_8B, SMOLLM2_1_7B, SMOLLM2_135M
from tests.pages import ROOT

PAGE = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
FILES = ROOT / "docs" / "scaling"
SLURM, JOB = FILES / "heal.slurm", FILES / "heal-job.yaml"
GPU = Machine(flops_per_second=1e15, bytes_per_second=1e12, device="cuda", bfloat16=True)
SOURCES = {"SmolLM2-135M": SMOLLM2_135M, "SmolLM2-1.7B": SMOLLM2_1_7B, "Llama-3.1-8B": LLAMA_31_8B}
PROCESSES = (1, 8, 16, 64)


def memory_rows() -> list[str]:
    """The rows of the page's table: healing with a teacher, one window of 2,048 tokens in each process."""
    rows = []
    for name, source in SOURCES.items():
        for experts in ("none", "upcycle"):
            told = plan(source, ConvertSettings(experts=experts), GPU)
            sizes = []
            for processes in PROCESSES:
                train = TrainSettings(
                    batch_windows=processes, window_tokens=2048, distill_weight=0.9, activation_checkpointing=True
                )
                sizes.append(training_memory(told.config, train, processes, GPU, teacher=source).total)
            cells = [f"{name}, {'upcycled' if experts == 'upcycle' else 'dense MLPs'}"]
            cells += [f"{told.target.total_parameters / 1e9:.2f}", *(f"{size / 1e9:.1f}" for size in sizes)]
            rows.append(f"| {' | '.join(cells)} |")
    return rows


def test_the_table_of_memory_is_what_a_plan_counts():
    head = f"| model | parameters, billion | {' | '.join(map(str, PROCESSES))} |"
    shown = PAGE[PAGE.index(head) :].split("\n\n")[0].splitlines()[2:]
    assert shown == memory_rows(), "\n".join(memory_rows())


def command_of(script: str) -> list[str]:
    """The words of the torchrun command in a script, its lines joined and what the shell fills in by stand-ins."""
    (command,) = re.findall(r"^(?:srun|exec) (torchrun .*?)(?: &)?$", script.replace("\\\n", " "), re.MULTILINE)
    for pattern, value in (
        (r'"\$\{options\[@\]\}"', "--name heal --runs runs --device cuda --resume"),
        (r'"\$\{resume\[@\]\}"', "--resume"),
        (r'"\$@"', "--train.batch-windows 16"),
        (r'"\$recipe"', str(ROOT / "recipes" / "heal.yaml")),
        ("/shared/my-heal.yaml", str(ROOT / "recipes" / "heal.yaml")),
        (r'"\$first:\$port"', "node0:29500"),
        (r'"\$SLURM_\w+"', "2"),
    ):
        command = re.sub(pattern, value, command)
    return shlex.split(command)


def script_of_job() -> str:
    (container,) = list(yaml.safe_load_all(JOB.read_text()))[1]["spec"]["template"]["spec"]["containers"]
    assert container["command"][0] == "/bin/bash"
    return container["args"][0]


@pytest.mark.parametrize("script", [SLURM.read_text(), script_of_job()], ids=["slurm", "kubernetes"])
def test_a_script_is_bash_whose_options_exist(script):
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    words = command_of(script)
    assert not [word for word in words if "$" in word]
    options = get_args_parser().parse_args(words[1:])
    assert options.training_script == "train.py" and (ROOT / "train.py").is_file()
    asked = parse_verb(VERBS["train"][0], "train", options.training_script_args)
    assert asked.resume and asked.device == "cuda" and asked.name == "heal"
    machines, each = int(options.nnodes), int(options.nproc_per_node)
    assert asked.train.batch_windows % (machines * each) == 0 and int(options.max_restarts) > 0


def test_the_job_s_names_fit_together():
    service, job = yaml.safe_load_all(JOB.read_text())
    name, template = job["metadata"]["name"], job["spec"]["template"]["spec"]
    assert service["spec"]["selector"] == {"job-name": name} and service["spec"]["clusterIP"] == "None"
    assert template["subdomain"] == service["metadata"]["name"]
    options = get_args_parser().parse_args(command_of(script_of_job())[1:])
    assert options.rdzv_endpoint == f"{name}-0.{template['subdomain']}:29500"
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == int(options.nnodes)
    (container,) = template["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(options.nproc_per_node)
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in template["volumes"]}


FAKE = """#!/bin/bash
echo "$(basename "$0") $*" >> "$SAID"
case $(basename "$0") in
  scontrol) [[ $1 == show ]] && echo node0 || true ;;
  srun) trap 'echo stopped >> "$SAID"; exit 1' TERM; touch "$SAID.ready"; sleep "$SECONDS_TO_RUN" & wait $! ;;
esac
"""
"""Stands for Slurm's programs: they note how they are called, and srun ends early when it gets SIGTERM."""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Returns a folder in which the script runs, with stand-ins for Slurm's programs and variables."""
    for name in ("scontrol", "srun"):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(FAKE)
        path.chmod(0o755)
    for name, value in {
        "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin",
        "SAID": str(tmp_path / "said.txt"),
        "SECONDS_TO_RUN": "0",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node[0-1]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_slurm_script_begins_and_resumes(cluster):
    command = ["bash", str(SLURM), "heal", "my-heal.yaml", "--train.steps", "5"]
    assert subprocess.run(command, check=False).returncode == 0
    said = (cluster / "said.txt").read_text()
    assert "--rdzv-endpoint node0:20007" in said and "--resume" not in said and said.endswith("--train.steps 5\n")
    (cluster / "runs" / "heal").mkdir(parents=True)
    assert subprocess.run(command, check=False).returncode == 0
    assert "--device cuda --resume --train.steps 5\n" in (cluster / "said.txt").read_text()


def test_the_slurm_script_goes_back_to_the_queue_when_its_time_is_over(cluster, monkeypatch):
    monkeypatch.setenv("SECONDS_TO_RUN", "60")
    job = subprocess.Popen(["bash", str(SLURM), "heal", "my-heal.yaml"])
    while not (cluster / "said.txt.ready").exists():
        assert job.poll() is None
    job.terminate()
    assert job.wait(60) == 1
    assert (cluster / "said.txt").read_text().endswith("stopped\nscontrol requeue 7\n")
