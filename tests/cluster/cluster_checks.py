"""Checks of the files that start clusters. Each raises `Mistake` with what is wrong; all work without a network."""

import contextlib
import io
import json
import re
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]
SCHEMAS = Path(__file__).parent / "schemas"
CLUSTERS = ["cluster.yaml", "experiments/cluster/gcp.yaml", "experiments/cluster/on-premises.yaml"]
RAYJOB = "experiments/cluster/rayjob.yaml"
DOCKERFILE = "experiments/cluster/Dockerfile"
SCRIPTS = ["experiments/cluster/slurm.sh", "experiments/cluster/train_or_resume.sh"]
BOOT_MINUTES = 15  # for a GPU machine to boot, pull the image and start Ray, with a margin
TOKEN = "~/.ray/auth_token"
TOKEN_SINCE = SpecifierSet(">=2.52")  # the first Ray with token authentication
SHARED = "/shared"


class Mistake(ValueError):
    """A cluster file is wrong; the message says where and how."""


class Versions(NamedTuple):
    """What an image is built on."""

    ray: str  # "2.60.0"
    python: str  # "3.11"


def require(condition: object, message: str) -> None:
    """Raise `Mistake` unless the condition holds."""
    if not condition:
        raise Mistake(message)


def read(path: str) -> dict[str, Any]:
    """Return a cluster file of this repository as a dictionary of its own."""
    return yaml.safe_load((ROOT / path).read_text())


def validate(value: Any, schema: dict[str, Any], where: str) -> None:
    """Check against a JSON schema."""
    for error in jsonschema.Draft7Validator(schema).iter_errors(value):
        raise Mistake(f"{'.'.join([where, *map(str, error.absolute_path)])}: {error.message}")


def schema_of(name: str) -> dict[str, Any]:
    """Return schemas/NAME.json."""
    return json.loads((SCHEMAS / f"{name}.json").read_text())


# --- cluster.yaml and its variants


def check_with_ray(config: dict[str, Any]) -> dict[str, Any]:
    """Do what `ray up` does before it talks to a cloud. Returns the configuration with Ray's defaults filled in."""
    screen = io.StringIO()  # where Ray's launcher says what is wrong, for some of its errors
    try:
        with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
            prepared = prepare_config(config)
            validate_config(prepared)
    except jsonschema.ValidationError as error:
        raise Mistake(f"Ray refuses it: {'.'.join(map(str, error.absolute_path))}: {error.message}") from None
    except Exception as error:
        raise Mistake(f"Ray refuses it: {type(error).__name__}: {error} {screen.getvalue()}") from None
    return prepared


def check_known_keys(config: dict[str, Any]) -> None:
    """Check `provider`, which Ray leaves open, and `node_config`, which Ray does not look into, for unknown keys."""
    kind = config["provider"].get("type")
    require((SCHEMAS / f"{kind}.json").exists(), f"provider.type: no list of keys for {kind!r}")
    schema = schema_of(kind)
    validate(config["provider"], schema["provider"], "provider")
    for name, node in config.get("available_node_types", {}).items():
        validate(node["node_config"], schema["node_config"], f"{name}.node_config")


def check_defaults(prepared: dict[str, Any]) -> None:
    """Check that nothing is left to Ray's defaults that would install another Ray than the image's."""
    for name, value in prepared.items():
        if name.endswith("_commands"):
            for command in value:
                require(
                    not re.search(r"ray-wheels|nightly|latest|pip3? install|conda", command),
                    f"{name}: `{command}` installs what the image should hold; give {name} in the file",
                )


def check_token(config: dict[str, Any]) -> None:
    """Check that every node gets the token, and refuses who lacks it."""
    mounts = config.get("file_mounts", {})
    require(mounts.get(TOKEN) == TOKEN, f"file_mounts: {TOKEN} is not mounted")
    for name in ("head_start_ray_commands", "worker_start_ray_commands"):
        starts = [command for command in config.get(name, []) if "ray start" in command]
        require(starts, f"{name}: Ray is not started")
        for command in starts:
            before = command.split("ray start")[0]
            require("RAY_AUTH_MODE=token" in before, f"{name}: RAY_AUTH_MODE=token is not set before `ray start`")
    head = config["head_start_ray_commands"]
    require("--dashboard-host=127.0.0.1" in " ".join(head), "head_start_ray_commands: the dashboard is not local")


def check_idle_timeout(config: dict[str, Any]) -> None:
    """Check that the autoscaler does not end nodes while they boot."""
    if config["provider"]["type"] == "local":
        fewest = config.get("min_workers", len(config["provider"]["worker_ips"]))
        require(fewest == len(config["provider"]["worker_ips"]), "min_workers: Ray would stop machines of yours")
        return
    timeouts = {"idle_timeout_minutes": config.get("idle_timeout_minutes", 5)}
    for name, node in config["available_node_types"].items():
        if "idle_timeout_s" in node:
            timeouts[f"{name}.idle_timeout_s"] = node["idle_timeout_s"] / 60
    for name, minutes in timeouts.items():
        require(minutes > BOOT_MINUTES, f"{name}: {minutes:g} min is not above the boot time of {BOOT_MINUTES} min")


def check_head(config: dict[str, Any]) -> None:
    """Check that no work runs on the head."""
    if config["provider"]["type"] == "local":
        command = " ".join(config["head_start_ray_commands"])
        for flag in ("--num-cpus=0", "--num-gpus=0"):
            require(flag in command, f"head_start_ray_commands: {flag} is missing, so clients would run on the head")
        return
    head = config["available_node_types"][config["head_node_type"]]
    require(head["resources"].get("CPU") == 0, "head: resources are not CPU: 0, so clients would run on it")
    require(not head["resources"].get("GPU"), "head: resources has a GPU, so clients would run on it")


def check_workers(config: dict[str, Any]) -> None:
    """Check that spot workers are asked for first, and that there is a floor of on-demand workers."""
    if config["provider"]["type"] == "local":
        return
    workers = {name: node for name, node in config["available_node_types"].items() if name != config["head_node_type"]}
    spot = {name for name, node in workers.items() if is_spot(node["node_config"])}
    require(spot, "available_node_types: no spot workers")
    floor = sum(node.get("min_workers", 0) for name, node in workers.items() if name not in spot)
    require(floor >= 1, "available_node_types: no on-demand worker has min_workers above 0, and Ray does not fall back")
    lowest = min(workers[name].get("priority", 0) for name in spot)
    highest = max(node.get("priority", 0) for name, node in workers.items() if name not in spot)
    require(lowest > highest, f"priority: spot has {lowest}, on demand {highest}; spot would not be asked for first")


def is_spot(node_config: dict[str, Any]) -> bool:
    """Return whether a node can be taken away at any time."""
    return (
        node_config.get("InstanceMarketOptions", {}).get("MarketType") == "spot"
        or node_config.get("scheduling", {}).get("provisioningModel") == "SPOT"
    )


def check_storage(config: dict[str, Any]) -> None:
    """Check that the shared directory is mounted on each machine, before it is mounted into the container."""
    require(f"-v {SHARED}:{SHARED}" in config["docker"].get("run_options", []), f"docker: {SHARED} is not mounted")
    commands = " ".join(config.get("initialization_commands", []))
    require(f"mountpoint -q {SHARED}" in commands, f"initialization_commands: {SHARED} is not mounted")


def check_cluster(config: dict[str, Any]) -> None:
    """Check a cluster.yaml, but for its versions."""
    prepared = check_with_ray(config)
    check_known_keys(config)
    check_defaults(prepared)
    check_token(config)
    check_idle_timeout(config)
    check_head(config)
    check_workers(config)
    check_storage(config)


# --- rayjob.yaml


def check_rayjob(job: dict[str, Any]) -> None:
    """Check a RayJob, but for whether its versions are those of other files."""
    schema = schema_of("rayjob")
    validate(job, schema, "RayJob")
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    require(cluster.get("authOptions", {}).get("mode") == "token", "authOptions: mode is not token")
    require(spec.get("backoffLimit", 0) >= 1, "backoffLimit: a failed run would not be resumed")
    require(spec.get("shutdownAfterJobFinishes"), "shutdownAfterJobFinishes: the cluster would stay when the run ends")
    check_entrypoint(spec["entrypoint"])
    num_cpus = cluster["headGroupSpec"].get("rayStartParams", {}).get("num-cpus")
    require(num_cpus == "0", "headGroupSpec: num-cpus is not 0, so clients would run on the head")
    if cluster.get("enableInTreeAutoscaling"):
        seconds = cluster.get("autoscalerOptions", {}).get("idleTimeoutSeconds", 60)
        require(
            seconds > 60 * BOOT_MINUTES,
            f"idleTimeoutSeconds: {seconds} s is not above the boot time of {BOOT_MINUTES} min",
        )
    for group in cluster["workerGroupSpecs"]:
        fewest, most = group["minReplicas"], group["maxReplicas"]
        replicas = group.get("replicas", 0)
        require(fewest <= replicas <= most, f"{group['groupName']}: {replicas} replicas, not {fewest} to {most}")
    for template in templates(job):
        check_volumes(template["spec"])


def check_entrypoint(entrypoint: str) -> None:
    """Check that it is one command, which begins the run or resumes it, in the shared directory."""
    require(
        not re.search(r"[;&|<>\n`]|\$\(", entrypoint.strip()),
        "entrypoint: more than one command; KubeRay would run the rest in the pod that submits the job",
    )
    require(
        re.search(rf"train_or_resume\.sh (train|finetune) {SHARED}/", entrypoint),
        f"entrypoint: it does not begin or resume a run below {SHARED}",
    )


def templates(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the templates of all pods of the cluster."""
    cluster = job["spec"]["rayClusterSpec"]
    return [cluster["headGroupSpec"]["template"]] + [group["template"] for group in cluster["workerGroupSpecs"]]


def check_volumes(pod: dict[str, Any]) -> None:
    """Check that each container has the shared directory, on a claim."""
    claims = {volume["name"] for volume in pod.get("volumes", []) if "persistentVolumeClaim" in volume}
    for container in pod["containers"]:
        mounted = {mount["name"] for mount in container.get("volumeMounts", []) if mount["mountPath"] == SHARED}
        require(mounted & claims, f"container {container['name']}: {SHARED} is not on a persistent volume claim")


# --- versions


def versions_in_tag(image: str) -> Versions:
    """Return the versions that an image's tag states: `…:2.60.0-py311` or `…:2.60.0-py311-gpu`."""
    tag = re.search(r":(\d+\.\d+\.\d+)-py(\d)(\d+)(-gpu|-cu\d+)?$", image)
    require(tag, f"image {image}: the tag does not pin Ray and Python")
    assert tag
    return Versions(tag[1], f"{tag[2]}.{tag[3]}")


def versions_in_dockerfile(text: str) -> Versions:
    """Return the versions of a Dockerfile's base, once it is known that no other line contradicts them."""
    base = re.search(r"^FROM (rayproject/ray:\S+)$", text, re.M)
    require(base, "Dockerfile: it is not based on rayproject/ray")
    assert base
    found = versions_in_tag(base[1])
    require(base[1].endswith("-gpu") or "-cu" in base[1], f"Dockerfile: {base[1]} has no CUDA")
    python = tuple(map(int, found.python.split(".")))
    require(f"ray[default,tune]=={found.ray}" in text, f"Dockerfile: pip is free to replace Ray {found.ray}")
    require(f"ray.__version__ == '{found.ray}'" in text, f"Dockerfile: it does not assert Ray {found.ray}")
    require(f"sys.version_info[:2] == {python}" in text, f"Dockerfile: it does not assert Python {found.python}")
    for tag in re.findall(r"\S+/fedray:\S+", text):
        require(versions_in_tag(tag) == found, f"Dockerfile: {tag} is built on Ray {found.ray}, Python {found.python}")
    return found


def images(config: dict[str, Any]) -> list[str]:
    """Return all images that a cluster.yaml or RayJob names."""
    if config.get("kind") == "RayJob":
        return [container["image"] for template in templates(config) for container in template["spec"]["containers"]]
    settings = [config["docker"], *(node.get("docker", {}) for node in config.get("available_node_types", {}).values())]
    return [value for setting in settings for name, value in setting.items() if name.endswith("image")]


def check_versions(files: dict[str, dict[str, Any]], dockerfile: str, pyproject: str) -> None:
    """Check that all files name one Ray and one Python, which fedray can run on."""
    found = versions_in_dockerfile(dockerfile)
    for name, config in files.items():
        for image in images(config):
            other = versions_in_tag(image)
            require(
                other == found, f"{name}: {image} is not Ray {found.ray} and Python {found.python}, the Dockerfile's"
            )
        if config.get("kind") == "RayJob":
            stated = config["spec"]["rayClusterSpec"].get("rayVersion")
            require(stated == found.ray, f"{name}: rayVersion {stated} is not that of the image, {found.ray}")
    project = tomllib.loads(pyproject)["project"]
    ray = next(one for one in map(Requirement, project["dependencies"]) if one.name == "ray")
    require(ray.specifier.contains(found.ray), f"Ray {found.ray} is outside pyproject.toml's {ray.specifier}")
    require(TOKEN_SINCE.contains(found.ray), f"Ray {found.ray} has no token authentication ({TOKEN_SINCE})")
    python = SpecifierSet(project["requires-python"])
    require(python.contains(found.python), f"Python {found.python} is outside pyproject.toml's {python}")


# --- words


def check_edits(text: str) -> None:
    """Check that the places to change are marked, numbered, and as many as the head of the file says."""
    words = ["no", "one", "two", "three", "four", "five"]
    stated = re.search(r"Change the (\w+) places marked EDIT", text)
    require(stated, "the head of the file does not say how many places to change")
    assert stated
    marks = [int(mark) for mark in re.findall(r"EDIT (\d)", text)]
    require(stated[1] in words and marks == list(range(1, words.index(stated[1]) + 1)), f"EDIT marks: {marks}")


def check_commands(text: str, flags: set[str]) -> None:
    """Check that fedray knows each flag that a text gives to it."""
    for command in re.findall(r"(?:fedray|train_or_resume\.sh|slurm\.sh) (?:train|finetune)\b([^`\n]*)", text):
        for flag in re.findall(r"(?<=\s)--[a-z-]+", command.split("#")[0]):
            require(flag in flags, f"fedray does not know {flag}")
