import os
import shutil
import signal
import tempfile

# One thread, as an actor of one CPU has; before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tests run side by side: threads that wait for each other must leave the cores to others.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ["COLUMNS"] = "200"
os.environ["FEDRAY_CACHE"] = tempfile.mkdtemp(prefix="fedray-test-cache-")
os.environ.pop("RAY_ADDRESS", None)

import pytest
import torch
import toy
from PIL import Image

from fedray.config import Config
from fedray.data.partition import ByLabel


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):  # keywords are also names of folders
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def pytest_sessionstart():
    # A shell has jobs in the background ignore it, and so would the processes that tests interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_sessionfinish():
    shutil.rmtree(os.environ["FEDRAY_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session")
def ray():
    """One small private Ray for all tests."""
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        namespace="fedray",
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=800_000_000,
        _node_ip_address="127.0.0.1",
    )
    ray.cloudpickle.register_pickle_by_value(toy)
    yield ray
    ray.shutdown()


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Four digits of each class that the embedded model has not seen; a folder, named as its prompt, is a client."""
    from fedray.data.sources import digits
    from fedray.tasks.embedded import HELD_OUT, enlarge, prompt

    root = tmp_path_factory.mktemp("photos")
    data = digits()
    for label in HELD_OUT:
        (root / prompt(label)).mkdir()
        for index, image in enumerate(enlarge(torch.from_numpy(data.images[data.labels == label][:4]))):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(root / prompt(label) / f"{index}.png")
    return root


@pytest.fixture
def toy_config():
    """Four clients of one label each, three rounds, in this process."""

    def make(**changes):
        kind = toy.ToyAdapters if changes.pop("adapters", False) else toy.Toy
        task = kind(**{key: changes.pop(key) for key in list(changes) if key in kind.__dataclass_fields__})
        settings = dict(
            task=task, clients=task.labels, partition=ByLabel(), rounds=3, local_epochs=2, train_batch_size=3,
            learning_rate=0.1, evaluate_samples=4, actors=0,
        )  # fmt: skip
        return Config(**(settings | changes))

    return make
