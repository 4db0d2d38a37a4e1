"""fedray config: all settings of a run as a file, for --config."""

from fedray.commands.config_file import as_yaml
from fedray.commands.flags import flags_of
from fedray.commands.settings import command_of
from fedray.commands.train import FLAGS, Known, asked_for
from fedray.errors import check_name
from fedray.presets import PRESETS
from fedray.record.run import Run


def main(arguments: list[str]) -> None:
    """Print the settings that `fedray train` or `finetune` would have with these flags, as YAML."""
    known = Known.of(arguments)
    command = "train"
    if known.resume:
        command = command_of(Run.open(known.resume).config)
    elif known.preset is not None:
        check_name("preset", known.preset, PRESETS)
        command = command_of(PRESETS[known.preset])
    what = f"Print all settings of `fedray {command}` with these flags as a file, for its --config."
    _, config, _ = asked_for(arguments, command, what, "config")
    config.check()
    print(as_yaml(config, flags_of(FLAGS[command], type(config.task))), end="")
