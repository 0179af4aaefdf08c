"""The process of a proof: it prepares one backend, runs a UNet with it, saves the output and times the step.

`python -m sdcompress.backends.worker` receives a `Case`, answers when the backend has run once, waits for a second
message, and then times the step.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import torch
from sdcompress_engines.child_process import receive_message, send_event
from sdcompress_engines.errors import BackendMissing, SdCompressError, shorten
from sdcompress_engines.exactness import ieee_fp32, use_ieee_fp32
from sdcompress_engines.flavour import FLAVOURS, present_card
from sdcompress_engines.runners import Runner, TorchRunner
from sdcompress_engines.runners.onnxruntime_install import require as require_onnxruntime
from sdcompress_engines.runners.torch import COMPILER

from sdcompress.backends.case_runner import build_ahead, explain_absence, open_case_runner
from sdcompress.backends.proof import REFERENCE, Case, answer_file
from sdcompress.backends.proof_plan import provable
from sdcompress.backends.subjects import load_subject, unet_inputs
from sdcompress.backends.torch_unet import PositionalUNet
from sdcompress.export.components import DTYPES, signature_of

_INSTALL_COMPILER = {
    "linux": "sudo apt-get install g++",
    "darwin": "xcode-select --install",
    "win32": (
        "winget install Microsoft.VisualStudio.2022.BuildTools"
        ' --override "--add Microsoft.VisualStudio.Workload.VCTools --includeRecommended"'
    ),
}
_SAMPLES, _MOST_SAMPLES = 3, 200
_LEAST_MS, _MOST_MS = 500.0, 10_000.0

Feeds = dict[str, torch.Tensor]
Timer = Callable[[], dict[str, Any]]
"""Times what was prepared. Returns the outcome."""


def prepare_case(case: Case) -> Timer:
    """Prepare the backend of a case, run it once and save its output. Returns what times it.

    Raises:
        SdCompressError: the backend cannot run. Other errors of its runtime pass through.
    """
    if case.precision == "fp32":
        use_ieee_fp32()
    if case.backend == "torch":
        return _prepare_torch(case)
    (subject,) = case.subjects
    if case.backend in FLAVOURS:
        flavour = FLAVOURS[case.backend]
        if absence := explain_absence(flavour):
            return lambda: {"not_here": absence}
        if present_card() is None:
            outcome = build_ahead(case)
            return lambda: outcome
    elif provable()[case.backend].artifact == "onnx":
        require_onnxruntime(case.device)  # before anything is exported for it
    loaded = load_subject(case.model, subject)
    feeds = unet_inputs(loaded.pipeline.unet, case.precision, case.device)
    runner = open_case_runner(loaded, case)
    del loaded  # a graph or an engine does not need the weights in torch
    _save(runner.infer(feeds), case.answer(subject))
    return lambda: {"ms": {subject: _median_ms(runner, feeds)}}


def _prepare_torch(case: Case) -> Timer:
    """Save the outputs of torch in IEEE fp32, with which all others are compared, and in the precision of the case."""
    opened: dict[str, tuple[Runner, Feeds]] = {}
    parameters = 0
    for subject in case.subjects:
        unet: Any = load_subject(case.model, subject).pipeline.unet.to(case.device)
        parameters = max(parameters, sum(weight.numel() for weight in unet.parameters()))
        exact = signature_of("unet", unet, "fp32")
        with ieee_fp32(), TorchRunner(PositionalUNet(unet), exact.inputs, exact.outputs) as reference:
            output = reference.infer(unet_inputs(unet, "fp32", case.device))
        _save(output, answer_file(case.folder, REFERENCE, subject))
        wanted = signature_of("unet", unet, case.precision)
        mode = "eager" if case.precision == "fp32" else "channels_last"
        module = PositionalUNet(unet.to(DTYPES[case.precision]))
        runner = TorchRunner(module, wanted.inputs, wanted.outputs, mode).open()
        feeds = unet_inputs(unet, case.precision, case.device)
        _save(runner.infer(feeds), case.answer(subject))
        opened[subject] = (runner, feeds)
    return lambda: {"ms": {name: _median_ms(*each) for name, each in opened.items()}, "parameters": parameters}


def _save(output: Mapping[str, torch.Tensor], path: Path) -> None:
    torch.save(next(iter(output.values())).float().cpu(), path)


def _median_ms(runner: Runner, feeds: Feeds) -> float:
    """Returns the median of three calls; of more if they are short, of fewer if they take long."""
    times: list[float] = []
    runner.infer(feeds)
    while sum(times) < (_MOST_MS if len(times) < _SAMPLES else _LEAST_MS) and len(times) < _MOST_SAMPLES:
        if runner.device.type == "cuda":
            torch.cuda.synchronize(runner.device)
        started = time.perf_counter()
        runner.infer(feeds)
        if runner.device.type == "cuda":
            torch.cuda.synchronize(runner.device)
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times)


def _attempt(work: Callable[[], Any]) -> Any:
    """Returns what `work` returns. An error is sent to the parent, and ends the process."""
    try:
        return work()
    except SdCompressError as error:
        expected = f"; expected {error.expected}" if error.expected else ""
        send_event(failed=f"{error.what}{expected}", command=_repair_command(error) or error.hint)
    except Exception as error:  # the errors of backends share no base class
        send_event(failed=f"{type(error).__name__}: {shorten(error)}", command=_repair_command(error))
    raise SystemExit(0)


def _repair_command(error: BaseException) -> str | None:
    """Returns the command against an error of a known cause: no compiler, no Triton, a package that does not import."""
    if isinstance(error, BackendMissing):
        return (
            _INSTALL_COMPILER.get(sys.platform, _INSTALL_COMPILER["linux"]) if COMPILER in (error.hint or "") else None
        )
    if "triton" in str(error).lower():
        return f"pip install triton{'-windows' if sys.platform == 'win32' else ''}"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ImportError) and cause.name:
            module = cause.name.partition(".")[0]
            return f"pip install --force-reinstall {packages_distributions().get(module, [module])[0]}"
        cause = cause.__cause__ or cause.__context__
    return None


def _serve() -> None:
    """Prepare the case that the parent sends; time it when the parent sends a second message."""
    message = receive_message()
    if message is None:
        return
    case = Case(**message | {"subjects": tuple(message["subjects"])})
    for name in case.hidden:
        sys.modules[name] = None  # type: ignore[assignment]  # importing it then fails
    timer = _attempt(lambda: prepare_case(case))
    send_event(prepared=True)
    if receive_message() is not None:
        send_event(**_attempt(timer))


if __name__ == "__main__":
    _serve()
