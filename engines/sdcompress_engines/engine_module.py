"""A runner in the place of a diffusers pipeline's module, without an import of diffusers."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch

from .errors import EngineError, EngineMismatch, UsageError
from .graph_weights import WeightSpec
from .runners import Runner
from .signature import HOSTS


class Config(dict[str, Any]):
    """A component's config, read as a mapping or as attributes, as diffusers does both."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the config has no {name!r}") from None


class EngineModule(torch.nn.Module):
    """A runner as a torch module without parameters, because a pipeline asks its modules for their device.

    `to()` moves nothing: a runner stays on its device.

    Args:
        runner: of the component's graph; it is opened here.
        config: of the component.
        host: whose signature the graph has, a key of `signature.HOSTS`.

    Raises:
        UsageError: an unknown host. EngineMismatch: a graph of another component or host.
    """

    component: str
    needed: tuple[str, ...]
    """Canonical outputs without which a graph is not this component. Further ones are used where it has them."""

    def __init__(self, runner: Runner, config: Mapping[str, Any], host: str = "diffusers") -> None:
        super().__init__()
        self.runner = runner.open()
        self.config = Config(config)
        self.graph = ComponentGraph(self.runner, self.component, self.needed, host)
        self.eval()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the graph's (float) outputs."""
        return self.runner.outputs[0].dtype

    @property
    def device(self) -> torch.device:
        return self.runner.device

    @property
    def weights(self) -> Mapping[str, WeightSpec]:
        """The weights that `set_weights` exchanges; see `Runner.weights`."""
        return self.runner.weights

    def read_weight(self, name: str) -> torch.Tensor:
        """Returns the original value of a weight; see `Runner.read_weight`."""
        return self.runner.read_weight(name)

    def set_weights(self, changes: Mapping[str, torch.Tensor], key: Hashable = None) -> None:
        """Exchange weights; see `Runner.set_weights`."""
        self.runner.set_weights(changes, key)

    def close(self) -> None:
        """Free the engine. TensorRT-RTX keeps the kernels that it compiled for the next time."""
        self.runner.close()

    def refuse(self, **options: Any) -> None:
        """Refuse options of a diffusers module for which the graph has no input.

        Raises:
            EngineError: one of them has a value.
        """
        for name, value in options.items():
            if value is not None and value is not False and value != {}:
                raise EngineError(
                    f"a {self.component} engine cannot take {name}: it is not part of the graph",
                    where=self.runner.path,
                    hint="run this model with torch",
                )


class ComponentGraph:
    """One component's graph by canonical names, whichever names its host uses.

    Args:
        runner: open.
        component: its name.
        needed: canonical outputs without which a graph is not this component.
        host: whose signature the graph has.

    Raises:
        UsageError: an unknown host. EngineMismatch: a graph of another component or host.
    """

    def __init__(self, runner: Runner, component: str, needed: Sequence[str], host: str) -> None:
        if component not in HOSTS.get(host, {}):
            raise UsageError(f"no {component!r} in the signature {host!r}", expected=", ".join(HOSTS))
        self.runner, self.component = runner, component
        self._inputs, outputs = HOSTS[host][component]
        present = {spec.name for spec in runner.outputs}
        self._specs = {spec.name: spec for spec in runner.inputs}
        self.outputs = {name: of_host for name, of_host in outputs.items() if of_host in present}
        if not set(self._specs) <= set(self._inputs.values()) or not set(needed) <= set(self.outputs):
            found = ", ".join(spec.name for spec in (*runner.inputs, *runner.outputs))
            raise EngineMismatch(
                f"not a {component} with the {host} signature: it has {found}",
                where=runner.path,
                expected=", ".join((*self._inputs.values(), *(outputs[name] for name in needed))),
            )

    def feeds(self, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns the runner's inputs, on its device and in its dtypes, from inputs by canonical name.

        Raises:
            EngineMismatch: an input that the graph does not have, or one of the graph's that is missing.
        """
        named = {self._inputs[name]: tensor for name, tensor in tensors.items() if name in self._inputs}
        odd = [name for name in tensors if self._inputs.get(name) not in self._specs]
        if odd or (lacking := set(self._specs) - set(named)):
            what = f"takes no {', '.join(odd)}" if odd else f"needs {', '.join(sorted(lacking))} too"
            raise EngineMismatch(
                f"the {self.component} graph {what}", where=self.runner.path, expected=", ".join(self._specs)
            )
        device = self.runner.device
        # From the host to a GPU without waiting: the host's copy is staged before the call returns. A copy to the host
        # would not be complete yet.
        return {
            name: tensor.to(device, self._specs[name].dtype, non_blocking=device.type == "cuda")
            for name, tensor in named.items()
        }

    def infer(self, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns the outputs by canonical name, from inputs by canonical name."""
        results = self.runner.infer(self.feeds(**tensors))
        return {name: results[of_host] for name, of_host in self.outputs.items()}
