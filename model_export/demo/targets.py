"""What the demo checkpoint is trained on beside the answers: targets for encoder and projector."""

from __future__ import annotations

import torch
from torch import Tensor

from model_export.demo.model import DemoModel
from model_export.samples import scenes
from model_export.samples.scenes import GRID, Scene

# What the encoder's heads tell apart in each cell. Class 0 of the last three is "none".
HEADS = {
    "content": 4,  # empty, shape, tens, units
    "row": GRID,
    "column": GRID,
    "shape": 1 + len(scenes.SHAPES),
    "colour": 1 + len(scenes.COLOURS),
    "digit": 11,
}


def cell_targets(scene: Scene) -> list[list[int]]:
    """What is in each cell: [GRID², len(HEADS)], row-major as the encoder's tokens are."""
    targets = [[0, cell // GRID, cell % GRID, 0, 0, 0] for cell in range(GRID**2)]
    for item in scene.shapes:
        target = targets[item.row * GRID + item.column]
        target[0] = 1
        target[3] = 1 + scenes.SHAPES.index(item.shape)
        target[4] = 1 + tuple(scenes.COLOURS).index(item.colour)
    if scene.number is not None:
        cell = scene.number.row * GRID + scene.number.column
        for offset, digit in enumerate(divmod(scene.number.value, 10)):
            targets[cell + offset][0] = 2 + offset
            targets[cell + offset][5] = 1 + digit
    return targets


def word_targets(model: DemoModel, batch: list[Scene]) -> Tensor:
    """The words for each cell, as a distribution over the vocabulary: [B, GRID², vocabulary].

    The projector is trained on it beside the answers: an image's tokens then lie where the
    words for what they show lie, and the question's words find them. Without it the language
    model names some colour of the image, for thousands of steps, and not the one asked for.
    """
    targets = torch.zeros(len(batch), GRID**2, model.config["vocab_size"])
    for row, scene in enumerate(batch):
        words = [list[str]() for _ in range(GRID**2)]
        for item in scene.shapes:
            words[item.row * GRID + item.column] += [
                f" {item.shape}",
                f" {item.colour}",
                item.colour.capitalize(),
            ]
        if scene.number is not None:
            cell = scene.number.row * GRID + scene.number.column
            words[cell] += [str(scene.number.value // 10), " number"]
            words[cell + 1] += [str(scene.number.value % 10)]
        for cell, shown in enumerate(words):
            place = scenes.PLACES[2 * (2 * cell // GRID**2) + 2 * (cell % GRID) // GRID]
            for word in (*shown, *(f" {side}" for side in place.split())):
                targets[row, cell, model.tokenizer.encode(word).ids[0]] = 1
    return targets / targets.sum(-1, keepdim=True)
