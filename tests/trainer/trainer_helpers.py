"""Tiny streams that a random two-layer BERT can learn: one keyword in a sentence of filler words decides the label."""

from __future__ import annotations

import random
import warnings

import torch
from transformers import TrainingArguments

import growthring as gr

WORDS = "the a of to and in is it that was for on are with as at be this have from or had by not but what"
FILLER = WORDS.split()
KEYWORDS = {"animals": ("cat", "dog"), "ways": ("train", "plane"), "places": ("north", "south")}
TEXTS = (("red", "blue"), ("one", "three"), ("good", "bad"))
SHARED = {"cold": "cold water", "warm": "warm water"}


def sentences(keywords, labels, count, seed):
    """``count`` pairs of text and label; the keyword at the label's place in ``keywords`` stands in the text."""
    draw = random.Random(f"{keywords}{seed}")
    rows = []
    for number in range(count):
        place = number % len(keywords)
        words = draw.sample(FILLER, draw.randint(2, 7))
        words.insert(draw.randrange(len(words)), keywords[place])
        rows.append((" ".join(words), labels[place]))
    draw.shuffle(rows)
    return rows


def stream_of(tasks=2, scenario="task", *, train=32, test=20, validation=None, change=None):
    """A stream of up to three tasks; label texts are no words of the texts, so that there is something to learn.

    ``change`` may alter the test rows: a function from rows to rows.
    """
    made = []
    for (name, keywords), words in list(zip(KEYWORDS.items(), TEXTS, strict=True))[:tasks]:
        labels = list(SHARED) if scenario == "domain" else [f"{name}-x", f"{name}-y"]
        texts = SHARED if scenario == "domain" else dict(zip(labels, words, strict=True))
        rows = sentences(keywords, labels, test, "test")
        task = gr.Task(
            name,
            sentences(keywords, labels, train, "train"),
            change(rows) if change else rows,
            sentences(keywords, labels, validation, "validation") if validation else None,
            labels=labels,
            label_texts=texts,
        )
        made.append(task)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # one task only
        return gr.TaskStream(made, scenario=scenario)


def arguments(**settings):
    defaults = {"learning_rate": 1e-2, "max_steps": 4, "per_device_train_batch_size": 8, "use_cpu": True}
    defaults |= {"output_dir": "never-made", "logging_steps": 1, "lr_scheduler_type": "constant"}
    return TrainingArguments(**defaults | settings)


def weights(trainer):
    return {n: p.detach().clone() for n, p in trainer.model.state_dict().items()}


def differing(left, right):
    """Names of the tensors that differ by a single bit; both must have the same names."""
    assert left.keys() == right.keys()
    return [n for n in left if not torch.equal(left[n], right[n])]
