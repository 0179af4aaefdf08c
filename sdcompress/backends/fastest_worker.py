"""The process that times one backend for `find_fastest`."""

from __future__ import annotations

import time
from typing import Any

import torch
from sdcompress_engines.child_process import receive_message, send_event
from sdcompress_engines.errors import SdCompressError

_LEAST_MS, _MOST_SAMPLES = 500.0, 200


def time_candidate(case: dict[str, Any]) -> dict[str, Any]:
    """Time a UNet step and save its output. Returns `ms`, the samples, or `failed`, the reason.

    Args:
        case: `model`, `backend`, `device` and `precision` as for `open_pipeline`; `batch`, samples of a call;
            `samples`, the least number of timed calls; `answer`, the file for the output.
    """
    from sdcompress.backends.assemble import open_pipeline

    try:
        pipeline = open_pipeline(
            case["model"], case["backend"], device=case["device"], precision=case["precision"], steady=True
        )
        times, output = _time_unet(pipeline.unet, case)
    except SdCompressError as error:
        return {"failed": str(error)}
    torch.save(output.float().cpu(), case["answer"])
    return {"ms": times}


def _time_unet(unet: Any, case: dict[str, Any]) -> tuple[list[float], torch.Tensor]:
    """Returns the times of the calls after the first, in ms, and the output, (B, 4, H/8, W/8)."""
    from sdcompress.backends.subjects import unet_inputs

    inputs = unet_inputs(unet, case["precision"], unet.device, case["batch"])
    sample, timestep, context = (inputs.pop(name) for name in ("sample", "timestep", "encoder_hidden_states"))
    times: list[float] = []
    with torch.no_grad():
        while len(times) <= case["samples"] or (sum(times[1:]) < _LEAST_MS and len(times) <= _MOST_SAMPLES):
            started = time.perf_counter()
            output = unet(
                sample, timestep, encoder_hidden_states=context, added_cond_kwargs=inputs or None, return_dict=False
            )[0]
            if output.is_cuda:
                torch.cuda.synchronize()
            times.append(1000 * (time.perf_counter() - started))
    return times[1:], output


if __name__ == "__main__":
    if (message := receive_message()) is not None:
        send_event(**time_candidate(message))
