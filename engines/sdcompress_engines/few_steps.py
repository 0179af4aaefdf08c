"""What a few-step model was trained for, and what to choose in each host so that it samples in the same way.

Cards, hints of the plugins, model cards and the docs take the hosts' names from here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .export_folder import read_named_json
from .manifest import Manifest

STEPS, GUIDANCE = "_num_inference_steps", "_guidance_scale"
"""The entries of `model_index.json` that hold a model's own defaults. diffusers ignores names with an underscore."""
HOST_TITLES = {"webui": "AUTOMATIC1111", "forge": "Forge", "comfyui": "ComfyUI"}
_TRAINED_TIMESTEPS = 1000
AUTOMATIC = "Automatic"
"""The schedule type of A1111 and Forge where none is chosen."""


@dataclass(frozen=True)
class Choice:
    """What to choose in a host.

    Attributes:
        sampler: as the host lists it.
        schedule: the host's schedule type, or ComfyUI's scheduler.
        node: a node of ComfyUI to put before the sampler, or nothing.
        table: how many of the trained timesteps the sampler knows.
        predicts: the prediction types that it takes.
    """

    sampler: str
    schedule: str
    node: str = ""
    table: int = _TRAINED_TIMESTEPS
    predicts: tuple[str, ...] = ("epsilon", "v_prediction")

    def __str__(self) -> str:
        return ", ".join(filter(None, (self.sampler, self.schedule, self.node)))

    def timesteps(self, steps: int) -> list[int]:
        """Returns the timesteps of `steps` steps, from noise to picture, if they are counted from 1000."""
        skip = _TRAINED_TIMESTEPS // self.table
        return [_TRAINED_TIMESTEPS - 1 - step * self.table // steps * skip for step in range(steps)]


_DDIM_OPTIONS = (
    ("timestep_spacing", "leading", "trailing"),
    ("clip_sample", True, False),
    ("thresholding", False, False),
    ("set_alpha_to_one", True, True),
)
"""(option of `DDIMScheduler`, diffusers' default, what the hosts do)."""
_EULER, _EPSILON = Choice("Euler", "Simple"), ("epsilon",)
_LCM_OF_50 = Choice("LCM", "Simple", table=50)
_CHOICES: dict[str, dict[str, tuple[Choice, ...]]] = {
    # Both step from the predicted noise to the next timestep: DDIM is Euler's method along sigma.
    "DDIMScheduler": {"webui": (_EULER,), "forge": (_EULER,), "comfyui": (Choice("euler", "simple"),)},
    # The LCM of A1111 and Forge knows 50 timesteps, as that of ComfyUI does after its node. Forge's Turbo evades that.
    "LCMScheduler": {
        "webui": (Choice("LCM", "Simple", table=50, predicts=_EPSILON),),
        "forge": (Choice("LCM", "Turbo"), _LCM_OF_50),
        "comfyui": (
            Choice("lcm", "simple"),
            Choice("lcm", "simple", "ModelSamplingDiscrete: lcm", table=50, predicts=_EPSILON),
        ),
    },
}
"""diffusers' scheduler → host → choices; the first is taken if no other has the model's timesteps."""


@dataclass(frozen=True)
class FewStepSampling:
    """The sampling that a few-step model was trained for.

    Attributes:
        steps: denoising steps.
        guidance_scale: of classifier-free guidance; 1 is none.
        scheduler: its config, with the class.
    """

    steps: int
    guidance_scale: float
    scheduler: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.steps} {'step' if self.steps == 1 else 'steps'}, CFG {self.guidance_scale:g}"

    @property
    def timesteps(self) -> list[int] | None:
        """The trained timesteps, from noise to picture, as diffusers sets them; None of a scheduler without choices."""
        kind, config = self.scheduler.get("_class_name"), self.scheduler
        count = _count(config.get("num_train_timesteps"), _TRAINED_TIMESTEPS)
        if kind == "DDIMScheduler" and all(config.get(name, usual) == host for name, usual, host in _DDIM_OPTIONS):
            return [round(count - step * count / self.steps) - 1 for step in range(self.steps)]
        if kind == "LCMScheduler":
            known = _count(config.get("original_inference_steps"), 50)
            if self.steps <= known <= count:
                return [(known - step * known // self.steps) * (count // known) - 1 for step in range(self.steps)]
        return None

    def choice(self, host: str) -> Choice | None:
        """Returns what to choose in a host, or None where nothing there samples as the model was trained.

        Args:
            host: a key of `HOST_TITLES`.
        """
        wanted, prediction = self.timesteps, self.scheduler.get("prediction_type") or "epsilon"
        if wanted is None:
            return None
        choices = [each for each in _CHOICES[self.scheduler["_class_name"]][host] if prediction in each.predicts]
        exact = (each for each in choices if each.timesteps(self.steps) == wanted)
        return next(exact, choices[0] if choices else None)

    def is_exact(self, host: str) -> bool:
        """Returns whether the host then uses the trained timesteps, and not only near ones."""
        choice = self.choice(host)
        return choice is not None and choice.timesteps(self.steps) == self.timesteps

    def describe(self, host: str) -> str:
        """Returns what to set in a host, such as `4 steps, CFG 1, Euler, Simple`.

        Args:
            host: a key of `HOST_TITLES`.
        """
        choice = self.choice(host)
        if choice is None and self.timesteps is not None:
            return f"{self}, which no sampler of {HOST_TITLES[host]} draws"
        return f"{self}" if choice is None else f"{self}, {choice}"

    def describe_in(self, hosts: Sequence[str] = tuple(HOST_TITLES)) -> str:
        """Returns what to set in several hosts, such as `4 steps, CFG 1; AUTOMATIC1111 and Forge: Euler, Simple`.

        Args:
            hosts: keys of `HOST_TITLES`.
        """
        titles: dict[str, list[str]] = {}
        for host in hosts if self.timesteps else ():
            titles.setdefault(str(self.choice(host) or "no sampler draws it"), []).append(HOST_TITLES[host])
        return "; ".join([f"{self}", *(f"{' and '.join(names)}: {choice}" for choice, names in titles.items())])

    def find_differences(
        self, host: str, steps: int, guidance_scale: float, sampler: str, schedule: str | None
    ) -> list[str]:
        """Returns the settings of a picture that are not those that the model was trained for, in words for the user.

        Args:
            host: a key of `HOST_TITLES`.
            steps, guidance_scale, sampler, schedule: of the picture; None is the host's automatic schedule.
        """
        differences = []
        if steps != self.steps:
            differences.append(f"{steps} {'step' if steps == 1 else 'steps'}")
        if abs(guidance_scale - self.guidance_scale) > 1e-6:
            differences.append(f"CFG {guidance_scale:g}")
        choice = self.choice(host)
        if self.timesteps and (choice is None or _fold(sampler) != _fold(choice.sampler)):
            differences.append(f"the sampler {sampler}")
        if choice is not None and _fold(schedule or AUTOMATIC) != _fold(choice.schedule):
            differences.append(f"the schedule type {schedule or AUTOMATIC}")
        return differences


def read_few_steps(index: Mapping[str, Any], scheduler: Mapping[str, Any]) -> FewStepSampling | None:
    """Returns the sampling that a model was trained for, or None if it has no steps and guidance of its own.

    Args:
        index: its `model_index.json`.
        scheduler: the config of its scheduler.
    """
    steps, guidance = index.get(STEPS), index.get(GUIDANCE)
    if type(steps) is not int or not isinstance(guidance, (int, float)) or not 1 <= steps <= _TRAINED_TIMESTEPS:
        return None
    return FewStepSampling(steps, float(guidance), scheduler)


def read_exported_few_steps(folder: Path, manifest: Manifest) -> FewStepSampling | None:
    """Returns the sampling that the model of an engine or graph was trained for, or None if it has none of its own.

    Args:
        folder: that holds the manifest.
        manifest: read from there.

    Raises:
        ArtifactError: a config of the model is missing, altered, a link, or no JSON object.
    """
    index = read_named_json(folder, manifest, "pipeline/model_index.json") or {}
    scheduler = read_named_json(folder, manifest, "pipeline/scheduler/scheduler_config.json") or {}
    return read_few_steps(index, scheduler)


def _count(value: Any, default: int) -> int:
    return value if type(value) is int and value > 0 else default


def _fold(name: str) -> str:
    """Returns a name as the hosts compare it: `SGM Uniform` and `sgm_uniform` are one."""
    return name.casefold().replace("_", " ")
