"""The command line: `fedray COMMAND`, with a file in commands/ for each."""

import importlib
import os
import signal
import sys

import fedray

COMMANDS = (
    "train", "finetune", "plan", "config", "sample", "evaluate", "audit", "sweep", "report", "push", "runs", "attach",
    "stop", "cache", "completion",
)  # fmt: skip
USAGE = """fedray simulates federated training of diffusion models on Ray.

  fedray train [--preset digits] [--clients 4] [--rounds 20] …   train, and write a run directory
  fedray train --resume RUN                                      continue a run that was stopped
  fedray finetune --pretrained-model-name-or-path SD …           fine-tune Stable Diffusion by LoRA
  fedray plan [--preset digits] …                                measure a step: how long would that run take?
  fedray config [--preset digits] [--rounds 20] … > FILE         print all settings, for train --config FILE
  fedray sample RUN [--num-images 64] [--out FILE]               draw images from a run's model
  fedray evaluate RUN|PIPELINE|FOLDER [--features inception] …   score a model, or images
  fedray audit RUN [--images 1000]                               attack a run's model: what does it tell of its data?
  fedray sweep experiments/figure2.py [--smoke] [--resume] …     train many runs that differ, and compare them
  fedray report RUN|SWEEP… [--open]                              make one page of them, to look at
  fedray push RUN --hub-model-id USER/NAME [--license mit]       put a run's model on the Hugging Face hub
  fedray runs [PLACES…] [--address auto]                         list runs: which go on, are complete, have stopped
  fedray attach RUN                                              follow a run that another process does
  fedray stop RUN                                                end it at its last complete round
  fedray cache [--clean] [--unused-days 30]                      list or remove what this machine has cached
  fedray completion bash|zsh|tcsh                                print what completes commands and flags
  fedray --version

Each command has its own --help; --help-all shows every setting.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run a command, and return its exit code.

    0: all was done;  1: a run failed;  2: a mistake of the user's;  130: Ctrl-C;  143: SIGTERM.
    """
    ours, arguments = arguments is None, sys.argv[1:] if arguments is None else arguments
    command, *rest = arguments or ["--help"]
    if command == "--version":
        print(f"fedray {fedray.__version__}")
        return 0
    if command in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    from fedray.commands.interrupts import interruptible
    from fedray.errors import RunError, UserError, check_name, check_text
    from fedray.memory import keep_freed_memory

    if ours:  # the process
        keep_freed_memory()

    with interruptible() as caught:
        try:
            for argument in arguments:
                check_text(argument)
            check_name("command", command, COMMANDS)
            importlib.import_module(f"fedray.commands.{command}").main(rest)
        except UserError as error:
            print(f"fedray: {error}", file=sys.stderr)
            return 2
        except RunError as error:
            print(f"fedray: {error}", *getattr(error, "__notes__", []), sep="\n", file=sys.stderr)
            return 1
        except BrokenPipeError:  # nobody reads what is printed any more, as in `fedray runs | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE
        except OSError as error:  # a full disk, a directory that may not be written
            print(f"fedray: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 128 + (caught[0] if caught else signal.SIGINT)
    return 0
