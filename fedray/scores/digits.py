"""A small classifier of digits, on whose features `fd[digits]` is measured.

The weights beside this file are made by

    python -m fedray.scores.digits

which trains on three quarters of scikit-learn's digits for about ten seconds and prints the accuracy on the rest.
"""

import re
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fedray.data.sources import DIGITS, digits
from fedray.seeds import generator

WEIGHTS = Path(__file__).with_name("digits.safetensors")
SURE = 0.9  # an image counts as a recognisable digit if the classifier gives one class at least this probability


class DigitClassifier(nn.Module):
    """8×8 grey digits → 64 features → 10 classes; 38,282 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1, stride=2)
        self.hidden = nn.Linear(32 * 4 * 4, 64)
        self.out = nn.Linear(64, 10)

    def features(self, images: Tensor) -> Tensor:
        """Map uint8 [n, 1, 8, 8] to float32 [n, 64]."""
        x = F.relu(self.conv1(images.float() / 255))
        return F.relu(self.hidden(F.relu(self.conv2(x)).flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        """Map uint8 [n, 1, 8, 8] to logits [n, 10]."""
        return self.out(self.features(images))


@cache
def classifier(device: str = "cpu") -> DigitClassifier:
    """Load the classifier with the weights that ship with fedray."""
    model = DigitClassifier()
    model.load_state_dict(load_file(WEIGHTS))
    return model.to(device).eval()


def digit_in(prompt: str) -> int | None:
    """Read the digit that a prompt names first ("the digit three": 3), if it names one."""
    named = [DIGITS.index(word) for word in re.findall("[a-z]+", prompt.lower()) if word in DIGITS]
    return named[0] if named else None


@torch.no_grad()
def classes(features: Tensor) -> Tensor:
    """Classify digits, int64 [n], from the classifier's features [n, 64]."""
    return classifier().out(features).argmax(1)


@torch.no_grad()
def sure(features: Tensor) -> Tensor:
    """Tell of which images, bool [n], the classifier is at least 0.9 sure, from its features [n, 64]."""
    return classifier().out(features).softmax(1).amax(1) >= SURE


def train(steps: int = 1500, batch_size: int = 128) -> None:
    """Train the classifier and write its weights beside this file."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rng = generator(0, "classifier")
    data = digits()
    images, labels = torch.from_numpy(data.images.copy()), torch.tensor(data.labels)
    order = torch.randperm(len(images), generator=rng)
    trained, held_out = order[: len(order) * 3 // 4], order[len(order) * 3 // 4 :]
    model = DigitClassifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        batch = trained[torch.randint(len(trained), (batch_size,), generator=rng)]
        # Sure of what is not a digit would be worthless: noise, and digits with their pixels shuffled, are
        # taught to be no class.
        noise = torch.randint(256, (batch_size // 4, 1, 8, 8), generator=rng)
        flat = images[batch[: batch_size // 4]].flatten(1)
        shuffled = flat.gather(1, torch.rand(flat.shape, generator=rng).argsort(1)).view_as(noise)
        junk = torch.cat([noise, shuffled])
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        loss = loss - model(junk).log_softmax(1).mean()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        for name, part in (("trained on", trained), ("held out", held_out)):
            probabilities = model(images[part]).softmax(1)
            accuracy = (probabilities.argmax(1) == labels[part]).float().mean()
            sure = (probabilities.amax(1) >= SURE).float().mean()
            print(f"{name} ({len(part)} digits): accuracy {accuracy:.1%}, at least {SURE} sure of {sure:.1%}")
    save_file(model.state_dict(), WEIGHTS)
    print(f"wrote {WEIGHTS.name}, {WEIGHTS.stat().st_size:,} bytes")


if __name__ == "__main__":
    train()
