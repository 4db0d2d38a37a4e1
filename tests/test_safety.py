"""What somebody else's run directory may not do: run code, or join a cluster."""

import ast
import json
from dataclasses import replace
from pathlib import Path

import pytest

import fedray
from fedray.cli import main
from fedray.config import Config
from fedray.errors import UserError
from fedray.federation.fit import prepare
from fedray.presets import PRESETS
from fedray.record.run import Run
from fedray.tasks.pretrained import load


@pytest.fixture
def evil(tmp_path):
    """A file that leaves a mark when it runs, with features in it."""
    file = tmp_path / "evil.py"
    mark = f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).write_text('')\n"
    file.write_text(mark + "def features(images):\n    return images.float().flatten(1)\n")
    return file


@pytest.fixture
def run(tmp_path, evil):
    """A run directory, as it may be downloaded, whose settings name that file and a cluster."""
    directory = tmp_path / "run"
    config = replace(PRESETS["digits"], rounds=1, local_steps=1, local_epochs=None, evaluate_samples=4)
    plan = prepare(config, Run(directory))
    Run(directory).create(config, {name: value for name, value in plan.data.items() if name != "features"}, {})
    saved = json.loads((directory / "config.json").read_text())
    saved["config"] |= {"features": f"{evil}:features", "address": "example.invalid:6379"}
    (directory / "config.json").write_text(json.dumps(saved))
    return directory


def test_features_in_a_file_run_only_where_the_file_is_named_again(run, evil, tmp_path, capsys):
    for command in (["evaluate", str(run)], ["train", "--resume", str(run), "--actors", "0"]):
        assert main(command) == 2
        assert f"name the file again (--code {evil})" in capsys.readouterr().err
        assert not (tmp_path / "ran").exists()
    with pytest.raises(UserError, match="which is code that the run names"):
        prepare(Run(run).config, Run(tmp_path / "new"))
    assert main(["train", "--resume", str(run), "--actors", "0", "--code", str(evil)]) == 0
    assert (tmp_path / "ran").exists()


def test_features_in_a_module_are_named_again(run, capsys):
    saved = json.loads((run / "config.json").read_text())
    saved["config"]["features"] = "os:system"
    (run / "config.json").write_text(json.dumps(saved))
    assert main(["evaluate", str(run)]) == 2
    assert "name it again (--features os:system)" in capsys.readouterr().err


def test_a_cluster_is_joined_only_where_it_is_named_again(run):
    assert json.loads((run / "config.json").read_text())["config"]["address"] == "example.invalid:6379"
    assert Run(run).config.address is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"clients": "4"}, r"--clients '4': it must be a whole number"),
        ({"clients": 4.0}, r"--clients 4.0: it must be a whole number"),
        ({"learning_rate": "1e-3"}, r"--learning-rate '1e-3': it must be a number"),
        ({"use_ema": 1}, r"--use-ema 1: it must be true or false"),
        ({"local_epochs": True}, r"--local-epochs True: it must be a whole number or None"),
        ({"sampler": None}, r"--sampler None: it must be text"),
    ],
)
def test_settings_of_the_wrong_type_are_refused_before_anything_starts(changes, said):
    with pytest.raises(UserError, match=said):
        Config(**({"local_epochs": 1} | changes)).check()
    Config(local_epochs=1, learning_rate=1).check()  # a whole number is a number


@pytest.mark.parametrize(
    "index",
    [
        {"_class_name": ["evil", "Evil"]},
        {"_class_name": "DDPMPipeline", "unet": ["evil", "Evil"]},
        {"_class_name": "DDPMPipeline", "unet": ["unet", "Evil"]},
    ],
    ids=["class", "library", "component"],
)
def test_a_pipeline_that_brings_code_is_refused_and_its_code_does_not_run(tmp_path, index):
    """As diffusers' `trust_remote_code`, which is never set."""
    folder, ran = tmp_path / "pipeline", tmp_path / "ran"
    (folder / "unet").mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps({"_diffusers_version": "0.30.0"} | index))
    code = f"open({str(ran)!r}, 'w').close()\nfrom diffusers import DDPMPipeline\nclass Evil(DDPMPipeline):\n    pass\n"
    for place in (folder / "evil.py", folder / "unet/evil.py", folder / "unet/unet.py", folder / "unet.py"):
        place.write_text(code)
    with pytest.raises(UserError, match="is no pipeline that diffusers can load"):
        load(str(folder))
    assert not ran.exists()


def test_nothing_is_unpickled_but_what_ray_brings_and_no_downloaded_code_is_trusted():
    package, seen = Path(fedray.__file__).parent, set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called, named = ast.unparse(node.func), {each.arg: ast.unparse(each.value) for each in node.keywords}
                assert "trust_remote_code" not in named, f"{path}, line {node.lineno}"
                assert named.get("allow_pickle", "False") == "False", f"{path}, line {node.lineno}"
                if called.endswith(("pickle.load", "pickle.loads", "torch.load")):
                    seen.add((path.relative_to(package).as_posix(), called, named.get("weights_only")))
    assert seen == {
        ("cluster/messages.py", "pickle.loads", None),
        ("scores/networks/inception.py", "torch.load", "True"),
    }
