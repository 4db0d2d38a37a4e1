"""Command lines written for diffusers' training scripts."""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from runs import sha

from fedray.cli import main
from fedray.commands import aliases
from fedray.commands.flags import flags_of
from fedray.commands.settings import names_of
from fedray.commands.train import Finetune, Train, asked_for
from fedray.data.sources import digits
from fedray.errors import UserError
from fedray.presets import PRESETS
from fedray.record.run import Run
from fedray.tasks.ddpm import DDPM
from fedray.tasks.lora import LoRA

# All flags of examples/unconditional_image_generation/train_unconditional.py and
# examples/text_to_image/train_text_to_image_lora.py of diffusers.
UNCONDITIONAL = """
dataset_name dataset_config_name model_config_name_or_path train_data_dir output_dir overwrite_output_dir cache_dir
resolution center_crop random_flip train_batch_size eval_batch_size dataloader_num_workers num_epochs
save_images_epochs save_model_epochs gradient_accumulation_steps learning_rate lr_scheduler lr_warmup_steps adam_beta1
adam_beta2 adam_weight_decay adam_epsilon use_ema ema_inv_gamma ema_power ema_max_decay push_to_hub hub_token
hub_model_id hub_private_repo logger logging_dir local_rank mixed_precision prediction_type ddpm_num_steps
ddpm_num_inference_steps ddpm_beta_schedule checkpointing_steps checkpoints_total_limit resume_from_checkpoint
enable_xformers_memory_efficient_attention preserve_input_precision
"""
TEXT_TO_IMAGE = """
pretrained_model_name_or_path revision variant dataset_name dataset_config_name train_data_dir image_column
caption_column validation_prompt num_validation_images validation_epochs max_train_samples output_dir cache_dir seed
resolution center_crop random_flip train_batch_size num_train_epochs max_train_steps gradient_accumulation_steps
gradient_checkpointing learning_rate scale_lr lr_scheduler lr_warmup_steps snr_gamma use_8bit_adam allow_tf32
dataloader_num_workers adam_beta1 adam_beta2 adam_weight_decay adam_epsilon max_grad_norm push_to_hub hub_token
prediction_type hub_model_id logging_dir mixed_precision report_to local_rank checkpointing_steps
checkpoints_total_limit resume_from_checkpoint enable_xformers_memory_efficient_attention noise_offset rank
image_interpolation_mode
"""
SCRIPTS = {
    "train_unconditional.py": (UNCONDITIONAL, Train, DDPM),
    "train_text_to_image_lora.py": (TEXT_TO_IMAGE, Finetune, LoRA),
}
PAGE = (Path(__file__).parents[2] / "docs/diffusers.md").read_text()

# The commands of the scripts' own documentation, from the script's name on.
FLOWERS = """
  --dataset_name="huggan/flowers-102-categories" --resolution=64 --center_crop --random_flip
  --output_dir="ddpm-ema-flowers-64" --train_batch_size=16 --num_epochs=100 --gradient_accumulation_steps=1
  --use_ema --learning_rate=1e-4 --lr_warmup_steps=500 --mixed_precision=no --push_to_hub
"""
POKEMON = FLOWERS.replace("flowers-102-categories", "pokemon").replace("ema-flowers", "ema-pokemon")
DRAGON = """
  --pretrained_model_name_or_path=$MODEL --dataset_name=$DATASET --caption_column="text" --resolution=512
  --random_flip --train_batch_size=1 --num_train_epochs=100 --checkpointing_steps=5000 --learning_rate=1e-04
  --lr_scheduler="constant" --lr_warmup_steps=0 --seed=42 --output_dir="sd-pokemon-model-lora"
  --validation_prompt="cute dragon creature" --report_to="wandb"
"""


def rows(script):
    """The rows of a script's table: the flag, and the texts of its three columns."""
    section = PAGE.split(f"## {script}")[1].split("\n## ")[0]
    return {
        flag: (same.strip(), other.strip(), refused.strip())
        for flag, same, other, refused in re.findall(r"^\| `--(\w+)` \|(.*?)\|(.*?)\|(.*?)\|$", section, re.MULTILINE)
    }


def config_of(arguments, command="train"):
    return asked_for(arguments, command, "")[1]


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_page_has_every_flag_as_the_parser_has_it(script):
    names, command, task = SCRIPTS[script]
    own, table = names_of(flags_of(command, task)), rows(script)
    assert sorted(table) == sorted(names.split())
    for flag, (same, other, refused) in table.items():
        name = "--" + flag.replace("_", "-")
        assert [bool(same), bool(other), bool(refused)].count(True) == 1, flag
        assert bool(same) == (name in own), flag
        assert bool(other) == (name in {*aliases.RENAMED, *aliases.MEANT, *aliases.NOTHING} - own), flag
        if refused:
            assert refused == aliases.REFUSED[name]
        if name in aliases.NOTHING and other:
            assert aliases.NOTHING[name] in other.replace("`", "")


@pytest.mark.parametrize("script", SCRIPTS)
def test_refused_flags_say_what_to_use(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    _, command, task = SCRIPTS[script]
    command = command.__name__.lower()
    preset = ["--preset", "digits-lora"] if command == "finetune" else []
    for flag, (_, _, refused) in rows(script).items():
        if refused:
            assert main([command, *preset, f"--{flag}"]) == 2
            assert capsys.readouterr().err == f"fedray: --{flag.replace('_', '-')}: {refused}.\n"
    assert list(tmp_path.iterdir()) == []


def test_no_flag_has_two_meanings():
    tables = (aliases.RENAMED, aliases.MEANT, aliases.NOTHING, aliases.REFUSED)
    assert len(aliases.ALL) == sum(map(len, tables))
    assert not aliases.ALL & names_of(flags_of(Train, DDPM)) - {"--class-conditional"}  # which fine-tuning refuses
    assert not aliases.ALL & names_of(flags_of(Finetune, LoRA))
    assert set(aliases.RENAMED.values()) <= names_of(flags_of(Train, DDPM))


@pytest.mark.parametrize("command", [FLOWERS, POKEMON], ids=["flowers", "pokemon"])
def test_the_readmes_commands_are_that_scripts_training(command, capsys):
    config = config_of(shlex.split(command))
    name = "huggan/pokemon" if "pokemon" in command else "huggan/flowers-102-categories"
    expected = PRESETS["unconditional"]
    task = replace(expected.task, dataset_name=name)
    assert config == replace(expected, task=task, random_flip=True, use_ema=True)
    assert (config.rounds * config.local_epochs, config.lr_scheduler, config.lr_warmup_steps) == (100, "cosine", 500)
    assert "--preset unconditional" in capsys.readouterr().err


def test_the_network_of_that_script():
    """As train_unconditional.py builds it."""
    import torch
    from diffusers import UNet2DModel

    blocks = ["DownBlock2D"] * 6
    blocks[4] = "AttnDownBlock2D"
    with torch.device("meta"):
        mine = PRESETS["unconditional"].task.unet()
        theirs = UNet2DModel(
            sample_size=64, in_channels=3, out_channels=3, layers_per_block=2,
            block_out_channels=(128, 128, 256, 256, 512, 512), down_block_types=tuple(blocks),
            up_block_types=("UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4),
        )  # fmt: skip
    assert mine.to_json_string() == theirs.to_json_string()


def test_the_command_of_text_to_image_lora(photos):
    from fedray.tasks.lora import PIPELINE

    command = DRAGON.replace("$MODEL", str(PIPELINE)).replace("$DATASET", "lambdalabs/naruto-blip-captions")
    config = config_of(shlex.split(command), "finetune")
    base = PRESETS["sd"]
    task = replace(
        base.task, pretrained_model_name_or_path=str(PIPELINE), dataset_name="lambdalabs/naruto-blip-captions",
        validation_prompt=("cute dragon creature",),
    )  # fmt: skip
    assert config == replace(base, task=task, rounds=100, random_flip=True, seed=42)


@pytest.fixture
def folder(tmp_path):
    """Eight digits in colour, of 64×64 pixels."""
    place = tmp_path / "flowers"
    place.mkdir()
    for index, image in enumerate(digits().images[:8]):
        Image.fromarray(image[0]).resize((64, 64)).convert("RGB").save(place / f"{index}.png")
    return place


@pytest.mark.slow
def test_a_scripts_command_runs_stops_and_goes_on_by_itself(folder, tmp_path, monkeypatch, capsys):
    """With a small network: `latest` begins the run, continues it, and finds it complete."""
    monkeypatch.chdir(tmp_path)
    small = "--clients 2 --block-out-channels 8 8 --attention False False --norm-num-groups 4 --actors 0"
    command = FLOWERS.replace('--dataset_name="huggan/flowers-102-categories"', f"--train_data_dir={folder}")
    command = command.replace("--push_to_hub", "--logger=tensorboard").replace(
        "num_epochs=100", "num_epochs=2 --save_images_epochs=2 --ddpm_num_inference_steps=2"
    )
    arguments = ["train", *shlex.split(command), *small.split(), "--resume_from_checkpoint=latest"]
    assert main(arguments) == 0
    whole = sha("ddpm-ema-flowers-64")
    run = Run.open("ddpm-ema-flowers-64")
    assert len(run.rows) == 2
    assert run.config.task.channels == 3
    (run.directory / "result.json").unlink()  # as one that was killed while it wrote the model
    assert main(arguments) == 0
    assert sha("ddpm-ema-flowers-64") == whole
    assert main(arguments) == 0
    assert main([*arguments[:-1], f"--resume_from_checkpoint={run.directory}"]) == 0
    assert main([*arguments, "--learning-rate=1e-3"]) == 2
    assert "--learning-rate is 0.001 now, but was 0.0001 when the run began" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--num-epochs 12", {"rounds": 3, "local_epochs": 4}),
        ("--num_train_epochs=12 --rounds 2", {"rounds": 2, "local_epochs": 6}),
        ("--num-epochs 12 --local-epochs 2", {"rounds": 6, "local_epochs": 2}),
        ("--max-train-steps 80", {"rounds": 40, "local_steps": 2, "local_epochs": None}),
        ("--max-train-steps 80 --rounds 8", {"rounds": 8, "local_steps": 10}),
        ("--max-train-steps 80 --local-steps 8", {"rounds": 10, "local_steps": 8}),
        ("--max-train-steps 80 --num-epochs 3", {"rounds": 40, "local_steps": 2}),
        ("--save-images-epochs 8", {"evaluate_every": 2}),
        ("--save-images-epochs 9 --save-model-epochs 1", {"evaluate_every": 3, "checkpoint_every": 1}),
        ("--validation-epochs 8", {"validation_rounds": 2}),
        ("--scale-lr --learning-rate 1e-3 --train-batch-size 8 --gradient-accumulation-steps 4",
         {"learning_rate": 1e-3 * 32}),
        ("--ddpm_num_inference_steps 7", {"sampling_steps": 7}),
        ("--allow_tf32 --cache_latents --center_crop --dataloader_num_workers 8 --checkpointing-steps=500", {}),
    ],
)  # fmt: skip
def test_meanings_in_rounds(flags, expected, capsys):
    base, config = PRESETS["digits"], config_of(["--preset", "digits", *flags.split()])
    changed = {name: getattr(config, name) for name in expected}
    assert changed == expected
    durations = {name: getattr(base, name) for name in ("rounds", "local_epochs", "local_steps")}
    rest = {"train_batch_size": 32, "gradient_accumulation_steps": 1}
    if "--scale-lr" not in flags:
        assert replace(config, **dict.fromkeys(expected, None) | durations | rest) == replace(
            base, **dict.fromkeys(expected, None) | durations
        )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--num-epochs 7", "--num-epochs 7: it is no multiple of the 4 local epochs of a round"),
        ("--num-epochs 7 --rounds 2", "no multiple of the 2 rounds"),
        ("--num-epochs 8 --rounds 2 --local-epochs 4", "all given; leave one of them out"),
        ("--num-epochs 8 --local-steps 4", "with local steps, say --rounds or --max-train-steps"),
        ("--num-epochs some", "--num-epochs some: it must be a whole number above 0"),
        ("--num-epochs 0", "--num-epochs 0: it must be a whole number above 0"),
        ("--num-epochs", "--num-epochs needs a value"),
        ("--num-epochs --rounds 3", "--num-epochs needs a value"),
        ("--max-train-steps 81", "--max-train-steps 81: it is no multiple of the 40 rounds"),
        ("--max-train-steps 81 --local-steps 2", "no multiple of the 2 local steps of a round"),
        ("--max-train-steps 80 --local-steps 2 --rounds 40", "all given; leave one of them out"),
        ("--max-train-steps 80 --local-epochs 2", "with --local-epochs, say --num-epochs or --rounds"),
        ("--save-images-epochs 3 --local-steps 4", "with local steps, say --evaluate-every in rounds"),
        ("--resume-from-checkpoint latest", "say of which run, with --output-dir"),
        ("--resume-from-checkpoint checkpoint-500", "it must be latest, or the directory of a run"),
        ("--lr 3", "--lr: say --learning-rate"),
        ("--num-clients 3", "--num-clients: say --clients"),
        ("--enable_bucket", "--enable-bucket: say --aspect-ratio-buckets, with the sizes as HEIGHT,WIDTH"),
    ],
)
def test_what_does_not_fit_is_one_sentence(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *flags.split()]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_is_not_the_last_is_refused(tmp_path):
    for name in ("round-000001", "round-000002"):
        (tmp_path / "run/checkpoints").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"run/checkpoints/{name}.safetensors").touch()
    (tmp_path / "run/config.json").touch()
    for value, expected in (("run/checkpoints/round-000002.safetensors", "run"), ("run", "run")):
        given = [aliases.RESUME, str(tmp_path / value)]
        assert aliases.run_to_resume(given, None) == tmp_path / expected
    with pytest.raises(UserError, match="a run continues after its last complete round"):
        aliases.run_to_resume([f"{aliases.RESUME}={tmp_path}/run/checkpoints/round-000001.safetensors"], None)
    assert aliases.run_to_resume([aliases.RESUME, "latest"], tmp_path / "run") == tmp_path / "run"
    assert aliases.run_to_resume([aliases.RESUME, "latest"], tmp_path / "new") is None
    assert aliases.run_to_resume(["--rounds", "3"], tmp_path / "run") is None


def test_only_a_scripts_command_starts_from_its_network():
    """Neither fedray's own flags, nor a preset that is named."""
    for flags in (
        "--output-dir x",
        "--dataset-name digits --out x",
        "--preset digits --dataset-name digits --num-epochs 4",
    ):
        assert config_of(flags.split()).task.block_out_channels == (16, 32)
    config = config_of(["--train-data-dir", "x"])
    assert (config.task.dataset_name, config.task.block_out_channels) == ("imagefolder", (16, 32))


def test_the_page_says_other_defaults():
    table = re.findall(r"^\| `--(\w+)` \| (\S+) \| (\S+) \| (\S+) \|$", PAGE, re.MULTILINE)
    assert len(table) == 5
    for flag, script, _, here in table:
        config = PRESETS["unconditional" if script == "train_unconditional.py" else "sd"]
        assert here == str(getattr(config, flag, None) or getattr(config.task, flag, 0))


def test_a_networks_own_configuration(tmp_path, capsys):
    import torch
    from diffusers import UNet2DModel

    blocks = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (8, 16), "norm_num_groups": 4, "sample_size": 32,
    }  # fmt: skip
    with torch.device("meta"):
        theirs = UNet2DModel(**blocks, layers_per_block=3)
        theirs.save_config(tmp_path / "model")
        UNet2DModel(**blocks, dropout=0.5).save_config(tmp_path / "other")
    command = ["--preset", "digits", f"--model_config_name_or_path={tmp_path}/model"]
    task = config_of(command).task
    assert task.resolution == 32
    with torch.device("meta"):
        assert task.unet().to_json_string() == theirs.to_json_string()
    assert config_of([*command, "--resolution", "16"]).task.resolution == 16
    for name, message in (("other", "its U-Net has dropout 0.5, not 0.0"), ("absent", "it cannot be read")):
        assert main(["train", f"--model_config_name_or_path={tmp_path}/{name}"]) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1
