"""StableSyncNet configs with other clip lengths, embeddings or attention, for `train.py syncnet` and its study."""
import math
from dataclasses import replace


def variant(config, frames=None, embedding=None, attention=None):
    """A syncnet.Config that differs from `config` in what the paper compares; None leaves a property as it is.

    frames: frames of a clip; embedding: numbers of an embedding, a multiple of 32; attention: False removes it. Raises
    ValueError for combinations that cannot be built.
    """
    width = config.visual[-1][0]
    if config.plain:
        if frames not in (None, config.frames) or embedding not in (None, width):
            raise ValueError(f"a plain network is made for {config.frames} frames and {width} numbers")
        return config
    if embedding and embedding % 32:
        raise ValueError(f"an embedding of {embedding} numbers: expected a multiple of 32")
    visual, audio = config.visual, config.audio
    if frames and frames != config.frames:
        config = replace(config, frames=frames)
        audio = with_audio_factors(audio, config.columns, frames)
    return replace(config, visual=adapted(visual, embedding, attention), audio=adapted(audio, embedding, attention))


def with_audio_factors(levels, columns, frames):
    """Levels of the audio encoder for clips of `frames` frames, `columns` columns of mel spectrogram.

    The last levels halve time until one column is left; the levels before them shrink the 80 bands alone.
    """
    bands_only = 6 - int(math.log2(columns))
    if not 0 <= bands_only < 6 <= len(levels):
        raise ValueError(f"clips of {frames} frames: expected 1 to 39, and an audio encoder of 6 levels or more")
    factors = [(2, 1)] * bands_only + [2] * (6 - bands_only)
    factors[3:3] = [1] * (len(levels) - 6)                                  # more than 6 levels: some keep the size
    return [(width, factor, attends) for (width, _, attends), factor in zip(levels, factors)]


def adapted(levels, embedding, attention):
    """Levels with another last width, and without attention if `attention` is False."""
    levels = list(levels)
    levels[-1] = (embedding or levels[-1][0], *levels[-1][1:])
    if attention is False:
        levels = [(width, factor, False) for width, factor, _ in levels]
    return tuple(levels)
