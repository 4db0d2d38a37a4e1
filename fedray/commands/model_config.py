"""The configuration of a diffusers U-Net, as settings of the task that trains one."""

from dataclasses import replace

from fedray.errors import UserError, reason
from fedray.lazy import torch
from fedray.tasks.ddpm import DDPM

FLAG = "--model-config-name-or-path"


def with_network(task: DDPM, place: str, resolution: bool) -> DDPM:
    """Return the task with the network that a config.json describes, in a folder or on the hub.

    Args:
        resolution: take its resolution too, where it has one.

    Raises:
        UserError: there is none, or the task cannot build it.
    """
    from diffusers import UNet2DModel

    from fedray.tasks.ddpm.learner import difference

    try:
        values = UNet2DModel.load_config(place)
        with torch.device("meta"):
            theirs = UNet2DModel.from_config(values)
    except Exception as error:  # the hub and diffusers have dozens
        raise UserError(f"{FLAG} {place}: it cannot be read ({reason(error)}).") from None
    known, size = theirs.config, theirs.config.sample_size
    found = replace(
        task,
        block_out_channels=tuple(known.block_out_channels),
        attention=tuple("Attn" in kind for kind in known.down_block_types),
        mid_block_attention=known.add_attention,
        layers_per_block=known.layers_per_block,
        norm_num_groups=known.norm_num_groups,
        num_class_embeds=known.num_class_embeds,
        channels=known.in_channels,
        resolution=size if resolution and isinstance(size, int) else task.resolution,
    )
    with torch.device("meta"):
        other = difference(found.unet(), theirs)
    if other is not None:
        raise UserError(f"{FLAG} {place}: {other}, which --task ddpm does not build; make a task of your own of it.")
    return found
