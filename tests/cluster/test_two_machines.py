"""The section "Two machines" of docs/cluster.md, as it stands there: head and other machine are nodes of this one.

Each has a home of its own. What the page cannot know is put in its place: addresses, ports, the shared directory, and
settings that make the runs small.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from contextlib import suppress
from itertools import product
from pathlib import Path

import psutil
import pytest
from runs import CHAOS
from test_watching import exported

import fedray
from fedray.record.run import Run

ROOT = Path(__file__).parents[2]
MARK = "FEDRAY_TEST_CLUSTER"  # in the environment of all processes that this test starts
SMALL = "--clients 4 --local-steps 1 --evaluate-samples 0 --no-use-ema"
PORTS = "--dashboard-agent-listen-port 0 --min-worker-port 0 --max-worker-port 0 --object-store-memory 150000000"


def blocks(heading):
    """Return the commands of a section of docs/cluster.md, by block."""
    _, _, section = (ROOT / "docs/cluster.md").read_text().partition(f"\n## {heading}\n")
    return re.findall(r"^```\n(.*?)^```", section.partition("\n## ")[0], flags=re.MULTILINE | re.DOTALL)


def free_ports(count):
    """Return ports that nobody listens on, above those that Ray gives to its workers."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


class Machines:
    """Two nodes on this machine, and shells on them; a checkout whose .venv leads to this Python."""

    def __init__(self, root):
        self.root, self.mark = root, uuid.uuid4().hex
        self.temporary = Path(tempfile.mkdtemp(prefix="fr", dir="/tmp"))  # a socket's path is short
        self.port, self.dashboard, client = free_ports(3)
        for home in ("head", "other"):
            (root / home / ".ray").mkdir(parents=True)
        (root / "shared").mkdir()
        python = f'exec "{sys.executable}" -m'
        head = f"--dashboard-port {self.dashboard} --ray-client-server-port {client} --disable-usage-stats"
        ray = f"""
            case "$1 $2" in
                "start --head") set -- "$@" --num-cpus 1 {PORTS} {head} ;;
                "start --address") set -- "$@" --num-cpus 1 {PORTS} ;;
                "stop "*) echo "it would stop every Ray of this machine"; exit 1 ;;
            esac
            {python} ray.scripts.scripts "$@" """
        script(root / "checkout/.venv/bin/ray", ray)
        script(root / "checkout/.venv/bin/fedray", f'{python} fedray "$@"')
        script(root / "stubs/scp", f'cp -p "$2" "{root}/other/${{3#OTHER:}}"')

    def placed(self, commands):
        """Put what the page cannot know into its commands."""
        for said, meant in {
            "HEAD:6379": f"127.0.0.1:{self.port}", "--port 6379": f"--port {self.port}", ":8265": f":{self.dashboard}",
            "/shared/": f"{self.root}/shared/", "--gpus-per-actor 1": SMALL,
        }.items():  # fmt: skip
            commands = commands.replace(said, meant)
        return commands

    def environment(self, home, **more):
        names = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        path = os.pathsep.join([str(self.root / "stubs"), os.environ["PATH"]])
        return names | {
            "HOME": str(self.root / home), "PATH": path, MARK: self.mark, "RAY_TMPDIR": str(self.temporary),
            "PYTHONPATH": str(Path(fedray.__file__).parents[1]), "RAY_metrics_report_interval_ms": "1000",
        } | more  # fmt: skip

    def start(self, commands, home="head", output=None, **more):
        """Start a shell on a machine."""
        to = open(output or self.root / "output.txt", "wb")  # noqa: SIM115  not a pipe: daemons would hold it
        return subprocess.Popen(
            ["bash", "-ec", self.placed(commands)], cwd=self.root / "checkout", env=self.environment(home, **more),
            stdin=subprocess.DEVNULL, stdout=to, stderr=subprocess.STDOUT, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
        )  # fmt: skip

    def do(self, commands, home="head", code=0, timeout=240, **more):
        """Run commands on a machine; return what they print."""
        output = self.root / f"{uuid.uuid4().hex}.txt"
        found = self.start(commands, home, output, **more).wait(timeout)
        said = output.read_text()
        assert found == code, said
        return said

    def ours(self):
        """Return the processes that this test has started, and what they have started."""
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == self.mark:
                    yield process

    def close(self):
        while left := list(self.ours()):  # one may have just been started
            for process in left:
                with suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(left, timeout=5)
        shutil.rmtree(self.temporary, ignore_errors=True)


@pytest.fixture
def machines(tmp_path):
    machines = Machines(tmp_path)
    try:
        yield machines
    finally:
        machines.close()


def wait_until(holds, process, output):
    deadline = time.monotonic() + 240
    while not (found := holds()):
        assert time.monotonic() < deadline, output.read_text()
        assert process is None or process.poll() is None, output.read_text()
        time.sleep(0.2)
    return found


def metrics_of(machines):
    """Return what the agents of the nodes offer to Prometheus, of those that have started: `name{tags} value`."""
    pages = []
    with suppress(OSError):
        (found,) = json.loads((machines.temporary / "ray/prom_metrics_service_discovery.json").read_text())
        for target in found["targets"]:
            with urllib.request.urlopen(f"http://{target}/metrics", timeout=20) as page:
                pages.append(page.read().decode())
    return [line for page in pages for line in page.splitlines() if line.startswith("ray_fedray_")]


def actors_of(machines):
    """Return the actors as the dashboard has them."""
    token = (machines.root / "head/.ray/auth_token").read_text().strip()
    address = f"http://127.0.0.1:{machines.dashboard}/logical/actors"
    request = urllib.request.Request(address, headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=60) as page:
        return list(json.load(page)["data"]["actors"].values())


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_two_machines_as_the_page_says(machines):
    head, other, train, watch, job = blocks("Two machines")
    shared, output = machines.root / "shared/runs", machines.root / "output.txt"
    machines.do(head)
    token = machines.root / "head/.ray/auth_token"
    assert token.stat().st_mode & 0o777 == 0o600
    assert (machines.root / "other/.ray/auth_token").read_text() == token.read_text()
    machines.do(other, home="other")

    # A run on both nodes, left by Ctrl-C.
    training = machines.start(train.replace("--gpus", "--rounds 100000 --gpus"))
    out = shared / "digits"
    wait_until(lambda: (out / "rounds.jsonl").exists() and len(Run(out).rows[-1]["nodes"]) == 2, training, output)
    assert re.search(r"Active:\n 1 node_", output.read_text())  # `ray status`, which may not know the other yet

    offered = {}

    def all_offered():
        offered.update({re.match(r"\w+", line)[0]: line for line in metrics_of(machines)})
        return offered.keys() >= {"ray_fedray_rounds_total", "ray_fedray_loss", "ray_fedray_waiting_seconds_total"}

    wait_until(all_offered, training, output)
    failures = {name for name in exported() if re.search(r"_(failed|retried|lost)_", name)}  # Ray shows no zeros
    assert offered.keys() == exported() - failures
    assert all(f'run="{out}"' in line for line in offered.values())
    assert all("node=" in line for name, line in offered.items() if re.search("busy|waiting", name))

    actors = [actor for actor in actors_of(machines) if actor["state"] == "ALIVE"]
    assert {actor["reprName"] for actor in actors if actor["actorClass"] == "ClientActor"} == {
        f"fedray client actor {index} of {out}" for index in range(2)
    }
    assert [actor["name"] for actor in actors if actor["actorClass"] == "DriverActor"] == [f"driver:{out}"]
    assert {path.name for path in (out / "logs").iterdir()} >= {"actor-0.log", "actor-1.log"}

    os.killpg(training.pid, signal.SIGINT)
    assert training.wait(60) == 130
    assert "The run goes on on the cluster." in output.read_text()

    runs, attach, stop = watch.splitlines()
    assert re.search(r"digits.*goes on", machines.do("export RAY_AUTH_MODE=token\n" + runs))
    attached = machines.root / "attached.txt"
    attaching = machines.start(attach, output=attached)
    wait_until(lambda: re.search(r"loss", attached.read_text()), attaching, attached)
    os.killpg(attaching.pid, signal.SIGINT)
    assert attaching.wait(30) == 130
    assert "The run goes on." in attached.read_text()
    stopped = re.search(r"stopped after round (\d+)", machines.do(stop))
    assert int(stopped[1]) == len(Run(out).rows)
    assert re.search(r"digits.*stopped", machines.do("export RAY_AUTH_MODE=token\n" + runs))

    # A wrong token, and none, are told in one sentence at once.
    refused = "the cluster refuses the token of this process, or it has none"
    commands = train.splitlines()[-1].replace("/digits", "/refused"), runs
    tokens = {"RAY_AUTH_TOKEN": "a" * 64}, {"HOME": str(machines.root)}
    for command, settings in product(commands, tokens) if CHAOS else zip(commands, tokens, strict=True):
        said = machines.do(command.replace("auto", "HEAD:6379"), code=2, RAY_AUTH_MODE="token", **settings)
        assert [line for line in said.splitlines() if line][-1].startswith("fedray: --address ")
        assert said.count(refused) == 1
        assert "Traceback" not in said

    # A job of Ray's, to its end.
    said = machines.do("export RAY_AUTH_MODE=token\n" + job.replace("--gpus", "--rounds 3 --gpus"))
    assert "succeeded" in said
    run = Run.open(shared / "job")
    assert run.result["rounds"] == 3
    assert set(run.rows[-1]["nodes"]) <= set(Run(out).rows[-1]["nodes"])  # it joined the same cluster
    assert re.search(r"job.*complete", machines.do("export RAY_AUTH_MODE=token\n" + runs))
