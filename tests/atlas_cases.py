"""What the tests of the experiments share: real tiny data once a module, and verdicts by key."""

import copy
from pathlib import Path

import numpy as np

from experiments.atlas import frame, running


def measured(experiment: frame.Experiment, folder: Path) -> running.Result:
    """The tiny preset, run."""
    return running.run(experiment, "tiny", folder)


def words(experiment: frame.Experiment, config, data) -> dict[str, str]:
    """{key of a claim: the word that its judge gives}."""
    return {claim.key: claim.judge(config, data).word for claim in experiment.claims}


def verdict(experiment: frame.Experiment, key: str, config, data) -> frame.Verdict:
    """What one claim's judge gives."""
    (claim,) = (claim for claim in experiment.claims if claim.key == key)
    return claim.judge(config, data)


def tampered(data, point: str, name: str, change):
    """A copy of the data with one array changed."""
    other = {key: dict(arrays) for key, arrays in copy.deepcopy(dict(data)).items()}
    other[point][name] = np.asarray(change(np.array(other[point][name])))
    return other


def spread(mean, seeds: int, width: float = 1e-3):
    """Seeds whose mean is given exactly, `width` apart: a small interval around it."""
    mean = np.asarray(mean, float)
    offsets = np.linspace(-1, 1, seeds).reshape(-1, *(1,) * mean.ndim) * width
    return mean[None] + offsets
