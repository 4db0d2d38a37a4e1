"""What weakens the privacy of a run that may be what its user wants all the same: told, not refused."""

from fedray.config import Config
from fedray.data.dataset import Dataset
from fedray.federation.canaries import alone
from fedray.seeds import generator


def cautions(config: Config, dataset: Dataset) -> list[str]:
    """Return sentences on seeded noise and cohorts that anybody can make again, and on δ that says little."""
    said, examples, guessed = [], config.method.hides_examples, config.seed == Config.seed
    if (config.links.private or examples) and not config.secure_noise and guessed:
        said.append(
            f"the noise follows from --seed {config.seed}, the default, with which anybody can take it off: give a "
            f"secret seed, or --secure-noise."
        )
    elif config.links.private and guessed and config.drawn.expected(config.clients) < config.clients:
        said.append(
            f"who takes part follows from --seed {config.seed}, the default, and ε counts on nobody knowing it: give a "
            f"secret seed."
        )
    if config.links.private and config.delta * config.clients >= 1:
        said.append(f"--delta {config.delta:g} is not below one over {config.clients:,} clients: ε says little.")
    if examples:
        shards = config.partition.split(dataset, config.clients - alone(config), generator(config.seed, "partition"))
        if config.delta * (most := shards.sizes.max()) >= 1:
            said.append(f"--delta {config.delta:g} is not below one over a client's {most:,} examples: ε says little.")
    return said
