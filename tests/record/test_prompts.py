"""Prompts beside what is drawn for them."""

from fedray.record.pictures import labels_of


def test_prompts_that_begin_alike_can_be_told_apart():
    prompts = [f"A photo of a little dog {what}" for what in ("on a beach", "in the snow", "beside a red car")]
    labels = labels_of(prompts, 28)
    assert [label.replace("\n", " ") for label in labels] == prompts
    assert max(len(line) for label in labels for line in label.split("\n")) <= 28


def test_of_long_prompts_that_begin_alike_the_ends_are_shown():
    start = "a very detailed painting of " * 9
    labels = labels_of([start + "a cat", start + "a dog"], 28)
    assert labels[0].endswith("a cat")
    assert labels[1].endswith("a dog")
    assert all(label.count("\n") <= 5 for label in labels)
    assert labels_of([start, "short"], 28)[0].endswith(" …")
    assert len(set(labels_of(["same", "same"], 28))) == 1
