"""What the machine of a run can do: export, and build engines for which cards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sdcompress_engines.errors import BackendMissing


@dataclass(frozen=True)
class Machine:
    """What this machine can do.

    Attributes:
        gpu: whether there is a CUDA device.
        onnxruntime: whether ONNX Runtime runs on the device.
        no_engine: why no TensorRT flavor can build here, or None. TensorRT for RTX builds without a GPU.
    """

    gpu: bool
    onnxruntime: bool
    no_engine: str | None


def read_machine(capabilities: Sequence[tuple[int, int]] | None) -> Machine:
    """Returns what this machine can do.

    Args:
        capabilities: as of `ChainSettings.compute_capabilities`.

    Raises:
        EngineError: the library builds for no such card.
    """
    import torch
    from sdcompress_engines.flavour import choose_flavour, present_card
    from sdcompress_engines.runners import available

    gpu = torch.cuda.is_available()
    no_engine = None
    try:
        choose_flavour(None, present_card())
    except BackendMissing as error:
        no_engine = str(error)
    else:
        choose_cards(capabilities)
    return Machine(gpu, not available("cuda" if gpu else "cpu")["onnxruntime"], no_engine)


def choose_cards(capabilities: Sequence[tuple[int, int]] | None) -> tuple[tuple[int, int], ...]:
    """Returns the compute capabilities that engines are built for; see `builder.targets`."""
    from sdcompress_engines.builder import targets
    from sdcompress_engines.flavour import choose_flavour, present_card

    return targets(choose_flavour(None, present_card(), capabilities), capabilities)
