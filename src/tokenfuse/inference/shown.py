"""What the model was shown of a video: the processor's frames, turned back into pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tokenfuse.prompt.inputs import PIXELS
from tokenfuse.tokens import Grid, Modality

Pictures = npt.NDArray[np.uint8]


def shown_frames(
    processor: Any,
    inputs: Mapping[str, Any],
    modality: Modality,
    number: int,
    grids: Sequence[Grid],
) -> Pictures | None:
    """The frames of item ``number`` of a modality as the vision tower reads them.

    ``grids``: those of all items of the modality. ``(T, height, width, 3)`` uint8, resized and
    cropped as the processor does it; where a grid frame stands for several frames, the first. None
    where the pixels are of a form that is not known.
    """
    values = inputs.get(PIXELS[modality])
    part = getattr(processor, f"{modality}_processor", None)
    if not isinstance(values, Tensor) or part is None:
        return None
    values = values.detach().float().cpu()
    grid = grids[number]
    if values.ndim == 2:
        pictures = _unpacked(values, part, number, grids)
    elif values.ndim == 5 and values.shape[:2] == (len(grids), grid[0]):
        pictures = values[number].permute(0, 2, 3, 1)
    elif values.ndim == 4 and len(values) == len(grids) and grid[0] == 1:
        pictures = values[number : number + 1].permute(0, 2, 3, 1)
    else:
        pictures = None
    if pictures is None or pictures.shape[-1] != 3:
        return None
    if getattr(part, "do_normalize", True):
        mean, std = (torch.tensor(getattr(part, f"image_{x}")) for x in ("mean", "std"))
        pictures = pictures * std + mean
    found: Pictures = (pictures * 255).round().clamp(0, 255).to(torch.uint8).numpy()
    return found


def resized_frames(frames: Pictures, grid: Grid) -> Pictures:
    """One of the caller's frames for each frame of the grid, where the processor's are unknown."""
    places = np.arange(grid[0]) * len(frames) // grid[0]
    found: Pictures = frames[places]
    return found


def _unpacked(values: Tensor, part: Any, number: int, grids: Sequence[Grid]) -> Tensor | None:
    """Frames from the patches of Qwen's processors, ``merge²`` patches of a token in a row."""
    sizes = [getattr(part, name, None) for name in ("patch_size", "temporal_patch_size")]
    merge = getattr(part, "merge_size", None)
    patch, temporal = sizes
    if not (isinstance(patch, int) and isinstance(temporal, int) and isinstance(merge, int)):
        return None
    lengths = [t * h * w * merge**2 for t, h, w in grids]
    if sum(lengths) != len(values) or values.shape[1] % (temporal * patch**2):
        return None
    t, h, w = grids[number]
    own = values.split(lengths)[number]
    cells = own.view(t, h, w, merge, merge, -1, temporal, patch, patch)[:, :, :, :, :, :, 0]
    high, wide = h * merge * patch, w * merge * patch
    pictures: Tensor = cells.permute(0, 1, 3, 6, 2, 4, 7, 5).reshape(t, high, wide, -1)
    return pictures
